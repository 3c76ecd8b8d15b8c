"""The patches that enter PatchCore's memory bank: sparse random projection and greedy k-centre selection.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (2022), take the greedy k-centre of
Sener and Savarese (2018) on projected features: start at the first patch, then again and again the patch
farthest from all chosen ones. Here it is lazy (Minoux, 1978): distances to the nearest centre only shrink,
so one known from an earlier step bounds today's, and only points whose bound is large are looked at again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.branches.neighbors import exact_matmul
from models.networks.kernels import linear

HEAD = 256  # points whose mutual distances are computed in one pass, to take many centres from it
UNIT = 2.0**-53  # relative rounding error of one float64 operation
CHOSEN = -1.0  # stands for the distance of a centre to itself, below all others


def sparse_projection(features: Tensor, eps: float = 0.9, seed: int = 22) -> Tensor:
    """Project `features` [n, D] as scikit-learn's `SparseRandomProjection(eps=eps, random_state=seed)` does.

    Returns [n, d] float32 on the same device, d being the Johnson-Lindenstrauss width for n points (284 for
    100,000). Where d exceeds D (or is 0, for a single point) there is nothing to gain: `features` come back.
    """
    from scipy.sparse import csr_matrix
    from sklearn.random_projection import SparseRandomProjection, johnson_lindenstrauss_min_dim

    count, width = features.shape
    if not 0 < johnson_lindenstrauss_min_dim(count, eps=eps) <= width:
        return features.float()
    shape_only = csr_matrix((count, width), dtype=np.float32)  # the matrix depends on the data's shape alone
    components = SparseRandomProjection(eps=eps, random_state=seed).fit(shape_only).components_
    matrix = torch.from_numpy(components.toarray().astype(np.float32)).to(features.device)
    with exact_matmul(features.device):
        return linear(features.float(), matrix)


def greedy_k_center(features: Tensor, size: int, progress: bool = True) -> Tensor:
    """Indices [size] (int64, on the CPU) of the greedy k-centre of `features` [n, d], in order of selection.

    They are those of the plain algorithm in float64: index 0 first, then the point with the largest distance
    to its nearest chosen point, the lowest index among equals. No point is chosen twice: when all that are
    left coincide with chosen ones, the lowest indices follow. See `LazyGreedy` for memory. Raises ValueError
    if `size` is not in [1, n] or a feature is not finite.
    """
    return LazyGreedy(features).select(size, progress)


class LazyGreedy:
    """Greedy k-centre selection that evaluates only a part of the n · size distances.

    Each point has an interval [lower, upper] around the squared distance to the nearest of the first `seen`
    centres. `upper` stays a bound as centres are added. A pass brings the points with the largest upper
    bounds up to date, and takes centres from among them for as long as one is certainly farther than every
    point outside. The intervals cover the rounding of |x|² + |c|² - 2x·c in float64; where they overlap
    at the top, distances are recomputed from differences. `evaluations` counts all distances computed.

    Needs 32 bytes a point, 8·d·size bytes for the centres and about `workspace` bytes beside the features.
    Host and device meet a few times a pass, not at each centre.
    """

    def __init__(self, features: Tensor, workspace: int = 1 << 27) -> None:
        if features.ndim != 2 or features.shape[0] == 0:
            raise ValueError(f"features must be [n, d] with n > 0, not {list(features.shape)}")
        self.features = features.detach()
        self.workspace = workspace
        # Norms are taken about a point, so that an offset of all features costs no digits.
        self.origin = self.features[0].double()
        self.error = 2 * (features.shape[1] + 8) * UNIT
        self.evaluations = 0

    def select(self, size: int, progress: bool = True) -> Tensor:
        """Indices [size] of the centres, int64 on the CPU, in the order of selection."""
        count, width = self.features.shape
        if not 1 <= size <= count:
            raise ValueError(f"size must lie in [1, {count}], the number of points, not {size}")
        real = {"dtype": torch.float64, "device": self.features.device}
        self.lower, self.upper = torch.full((2, count), torch.inf, **real)
        self.seen, self.settled = torch.zeros(2, count, dtype=torch.int64, device=real["device"])
        self.centers = torch.empty(size, width, **real)  # about the origin
        self.squares = torch.empty(size, **real)
        self.chosen: list[int] = []
        with tqdm(total=size, desc="coreset", unit="point", disable=not progress or None) as bar:
            self._append(0, torch.zeros(width, **real))
            self._refresh(torch.arange(count, device=real["device"]))
            if not torch.isfinite(self.upper).all():
                raise ValueError("features contain NaN or infinite values")
            self._store(np.array([0]), np.array([CHOSEN]), np.array([CHOSEN]))
            self.block = HEAD
            bar.update(1)
            while len(self.chosen) < size:
                before = len(self.chosen)
                self._pass(size)
                bar.update(len(self.chosen) - before)
        return torch.tensor(self.chosen)

    def _pass(self, size: int) -> None:
        """Bring the `block` farthest points up to date and take the centres that follow with certainty."""
        count = len(self.features)
        block = min(self.block, count)
        values, points = self.upper.topk(min(block + 1, count))
        outside = values[block].item() if block < count else -1.0
        points = points[:block]
        self._refresh(points)
        lower, upper = self.lower[points].cpu().numpy(), self.upper[points].cpu().numpy()
        if lower.max() <= outside:
            self.block = 4 * block
            return
        live = np.flatnonzero(upper > outside)
        points, lower, upper = points.cpu().numpy()[live], lower[live], upper[live]
        first = self._farthest(points, lower, upper)
        if upper[first] == 0:  # only copies of chosen points are left
            rest = np.setdiff1d(np.arange(count), self.chosen)[: size - len(self.chosen)]
            self.chosen.extend(rest.tolist())
            return
        if len(points) > HEAD:
            self.block = max(HEAD, block // 2)
            self._store(points, lower, upper)
            upper[first] = np.inf
            order = np.argsort(-upper)
            upper[first] = lower[first]
            outside = upper[order[HEAD]]
            points, lower, upper = points[order[:HEAD]], lower[order[:HEAD]], upper[order[:HEAD]]
        self._take(points, lower, upper, outside, size)

    def _take(self, points: np.ndarray, lower: np.ndarray, upper: np.ndarray, outside: float, size: int) -> None:
        """Run the plain greedy on `points` [q] for a step, and on until a point outside may be farther."""
        rows = self._rows(torch.from_numpy(points).to(self.features.device))
        squares = rows.square().sum(1)
        gram = torch.addmm(squares, rows, rows.T, alpha=-2).add_(squares[:, None]).clamp_(min=0).cpu().numpy()
        norms = squares.cpu().numpy()
        self.evaluations += gram.size
        while True:
            best = self._farthest(points, lower, upper)
            self._append(int(points[best]), rows[best])
            slack = self.error * (8 * norms + 2 * gram[best])
            np.minimum(upper, gram[best] + slack, out=upper)
            np.minimum(lower, np.maximum(gram[best] - slack, 0), out=lower)
            lower[best] = upper[best] = CHOSEN
            if len(self.chosen) == size or lower.max() <= outside:
                break
        self._store(points, lower, upper)

    def _farthest(self, points: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> int:
        """Position of the farthest of `points` [q], lowest index among equals; settles overlaps in place."""
        rivals = np.flatnonzero(upper >= lower.max())
        if len(rivals) == 1:
            return int(rivals[0])
        vague = rivals[lower[rivals] < upper[rivals]]
        if len(vague):
            lower[vague] = upper[vague] = self._exact(points[vague], upper[vague])
        equal = rivals[lower[rivals] == lower[rivals].max()]
        return int(equal[points[equal].argmin()])

    def _refresh(self, points: Tensor) -> None:
        """Bring the intervals of `points` [q] up to all centres chosen so far."""
        done = len(self.chosen)
        points = points[self.seen[points] < done]
        if not len(points):
            return
        seen, order = self.seen[points].sort()
        points = points[order]
        # Equal histories lie together, so that few distances are computed twice.
        chunk = min(max(512, len(points) // 8), 2048, self._chunk(done))
        for part, start in zip(points.split(chunk), seen[::chunk].tolist(), strict=True):
            squares, scores = self._scores(part, start)
            nearest = (scores.amin(1) + squares).clamp_(min=0)
            slack = self.error * (8 * squares + 2 * nearest)
            self.upper[part] = torch.minimum(self.upper[part], nearest + slack)
            self.lower[part] = torch.minimum(self.lower[part], (nearest - slack).clamp_(min=0))
        self.seen[points] = done

    def _exact(self, points: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Squared distances [q] to the nearest centre from differences; `upper` [q] bounds them."""
        device, done = self.features.device, len(self.chosen)
        chosen = torch.tensor(self.chosen, device=device)
        result = upper.copy()
        for block in np.array_split(np.arange(len(points)), -(-len(points) // self._chunk(done))):
            part, bound = (
                torch.from_numpy(points[block]).to(device),
                torch.from_numpy(upper[block]).to(device),
            )
            settled = self.settled[part, None]
            start = int(settled.min())
            squares, scores = self._scores(part, start)
            limit = bound + 2 * self.error * (8 * squares + 2 * bound)
            near = scores <= (limit - squares)[:, None]
            near &= torch.arange(start, done, device=device) >= settled  # `upper` knows the ones before
            pairs = near.nonzero()
            for pair in pairs.split(self._chunk(0)):
                difference = (
                    self.features[part[pair[:, 0]]].double() - self.features[chosen[start + pair[:, 1]]].double()
                )
                # NumPy adds every row in the same order, so that copies of a point stay at equal distances.
                distance = np.square(difference.cpu().numpy()).sum(1)
                np.minimum.at(result, block[pair[:, 0].cpu().numpy()], distance)
            self.evaluations += len(pairs)
            self.settled[part] = done
        return result

    def _scores(self, points: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Squared norms [q] of `points` [q] and |c|² - 2x·c [q, k] for the centres from number `start` on."""
        rows = self._rows(points)
        squares = rows.square().sum(1)
        centers, offsets = self.centers[start : len(self.chosen)], self.squares[start : len(self.chosen)]
        self.evaluations += len(points) * len(centers)
        return squares, torch.addmm(offsets, rows, centers.T, alpha=-2)

    def _rows(self, points: Tensor) -> Tensor:
        return self.features.index_select(0, points) - self.origin  # float64, as the origin is

    def _chunk(self, centers: int) -> int:
        """Points that fit the workspace, with a few copies of their features and distances in float64."""
        return max(1, self.workspace // (8 * (3 * self.features.shape[1] + 2 * centers)))

    def _append(self, point: int, row: Tensor) -> None:
        self.centers[len(self.chosen)] = row
        self.squares[len(self.chosen)] = row.square().sum()
        self.chosen.append(point)

    def _store(self, points: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> None:
        index = torch.from_numpy(points).to(self.features.device)
        self.lower[index] = torch.from_numpy(lower).to(index.device)
        self.upper[index] = torch.from_numpy(upper).to(index.device)
        self.seen[index] = len(self.chosen)
