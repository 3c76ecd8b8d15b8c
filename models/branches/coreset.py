"""The patches that enter PatchCore's memory bank: sparse random projection and greedy k-centre selection.

Roth et al. (2022) use the greedy k-centre of Sener and Savarese (2018) on projected features. Here it is lazy (Minoux,
1978): a distance to the nearest centre can only shrink, so an old one is an upper bound, and only points with a large
bound are computed again.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.branches.neighbors import exact_cdist, exact_matmul
from models.networks.kernels import linear

EPS = 0.9  # Johnson-Lindenstrauss distortion that sets the projection's width
HEAD = 256  # farthest points, among which the plain greedy runs until a point outside may be farther
PART = 64, 2048  # fewest and most points that are updated in one product
SCORES = 1 << 24  # most float64 numbers in such a product
CHOSEN = -1.0  # the distance of a chosen point, below all others


def sparse_projection(features: Tensor, seed: int = 22) -> Tensor:
    """Project `features` [n, D] as scikit-learn's `SparseRandomProjection(eps=0.9, random_state=seed)` does.

    Returns [n, d] float32 on the same device, where d is the Johnson-Lindenstrauss width for n points (284 for
    100,000). If d exceeds D (or is 0, for a single point), `features` are returned as they are.
    """
    count, width = features.shape
    johnson_lindenstrauss = int(4 * np.log(count) / (EPS**2 / 2 - EPS**3 / 3))
    if not 0 < johnson_lindenstrauss <= width:
        return features.float()
    from scipy.sparse import csr_matrix  # only where it is needed: the import takes most of a second
    from sklearn.random_projection import SparseRandomProjection

    shape_only = csr_matrix((count, width), dtype=np.float32)  # the matrix depends on the data's shape alone
    components = SparseRandomProjection(eps=EPS, random_state=seed).fit(shape_only).components_
    matrix = torch.from_numpy(components.toarray().astype(np.float32)).to(features.device)
    with exact_matmul(features.device):
        return linear(features.float(), matrix)


def greedy_k_center(features: Tensor, size: int, progress: bool = True, chosen: int = 1) -> Tensor:
    """Indices [size] (int64, on the CPU) of the greedy k-centre of `features` [n, d], in order of selection.

    They are those of the plain algorithm in float64: the first `chosen` points, then always that with the largest
    distance to its nearest chosen point, the lowest index among equals. No point is chosen twice. Raises ValueError if
    `size` is not in [chosen, n] or a feature is not finite. To choose 1 % takes time that grows with the square of n.
    """
    return LazyGreedy(features).select(size, progress, chosen)


class LazyGreedy:
    """Greedy k-centre selection that evaluates only a part of the n · size distances.

    `nearest` [n] holds each point's distance to the nearest of the first `seen` [n] centres, an upper bound until the
    later centres are compared, too. The nearest centre is found by |c|² - 2 x·c in float64, the distance to it from
    differences, so that copies of a point have equal distances. `evaluations` counts all distances computed.

    Needs 16 bytes a point, 8·d·size bytes for the centres and less than 0.5 GB beside the features.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features.detach()
        self.evaluations = 0

    def select(self, size: int, progress: bool = True, chosen: int = 1) -> Tensor:
        count, width = self.features.shape
        if not chosen <= size <= count:
            raise ValueError(f"size must lie in [{chosen}, {count}], the number of points, not {size}")
        real = {"dtype": torch.float64, "device": self.features.device}
        self.nearest = torch.full((count,), torch.inf, **real)
        self.seen = torch.zeros(count, dtype=torch.int64, device=real["device"])
        self.centers = torch.empty(size, width, **real)
        self.squares = torch.empty(size, **real)
        self.chosen = list(range(chosen))
        self.centers[:chosen] = self.features[:chosen]
        self.squares[:chosen] = self.centers[:chosen].square().sum(1)
        with tqdm(total=size, desc="coreset", unit="point", disable=not progress or None) as bar:
            self._refresh(torch.arange(chosen, count, device=real["device"]))
            if not (torch.isfinite(self.nearest[chosen:]).all() and torch.isfinite(self.squares[:chosen]).all()):
                raise ValueError("features contain NaN or infinite values")
            self.nearest[:chosen] = CHOSEN
            bar.update(chosen)
            while len(self.chosen) < size:
                before = len(self.chosen)
                self._pass(size)
                bar.update(len(self.chosen) - before)
        return torch.tensor(self.chosen)

    def _pass(self, size: int) -> None:
        """Update the points with the largest bounds, and choose those that are certain."""
        bounds, head = self.nearest.topk(min(HEAD + 1, len(self.nearest)))
        outside = bounds[HEAD].item() if len(bounds) > HEAD else CHOSEN
        head = head[:HEAD].sort().values  # the first of equals has the lowest index
        self._refresh(head)
        farthest = self.nearest[head].max()
        if farthest <= outside:  # old bounds hide the next point: update all that may be it
            self._refresh((self.nearest >= farthest).nonzero()[:, 0])
            head = self.nearest.argmax()[None]
        self._take(head, outside, size)

    def _take(self, points: Tensor, outside: float, size: int) -> None:
        """Choose the farthest of `points` [q], and go on while one of them is farther than `outside`."""
        rows, near = self.features.index_select(0, points).double(), self.nearest[points]
        numbers, best = points.tolist(), near.argmax().item()
        while True:
            self.centers[len(self.chosen)] = rows[best]
            self.squares[len(self.chosen)] = rows[best].square().sum()
            self.chosen.append(numbers[best])
            near = torch.minimum(near, exact_cdist(rows, rows[best : best + 1])[:, 0])
            near[best] = CHOSEN
            self.evaluations += len(near)
            farthest, place = near.max(0)
            if len(self.chosen) == size or farthest.item() <= outside:
                break
            best = place.item()
        self.nearest[points] = near
        self.seen[points] = len(self.chosen)

    def _refresh(self, points: Tensor) -> None:
        """Update the distances of `points` [q] for all centres chosen so far."""
        done = len(self.chosen)
        points = points[(self.seen[points] < done) & (self.nearest[points] > 0)]
        if not len(points):
            return
        seen, order = self.seen[points].sort()
        points = points[order]  # points with equal history lie together, so that few distances are computed twice
        part = max(1, min(max(PART[0], len(points) // 8), PART[1], SCORES // done))
        for some, start in zip(points.split(part), seen[::part].tolist(), strict=True):
            rows = self.features.index_select(0, some).double()
            scores = torch.addmm(self.squares[start:done], rows, self.centers[start:done].T, alpha=-2)
            self.evaluations += scores.numel()
            centers = self.centers.index_select(0, scores.argmin(1) + start)
            near = exact_cdist(rows[:, None], centers[:, None])[:, 0, 0]
            self.nearest[some] = torch.minimum(self.nearest[some], near)
        self.seen[points] = done
