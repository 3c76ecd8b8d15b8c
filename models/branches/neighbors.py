"""Nearest neighbours by matrix products, within a memory budget and without waiting for the device."""

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from models.networks.kernels import linear, onednn_gains

CACHE, BUDGET = 1 << 24, 1 << 28  # bytes of a block of distances on a CPU, and elsewhere: few launches
GROUP = 64  # columns that share one minimum in the search for the smallest


@contextlib.contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """For the block, products of float32 on `device` are exact float32, even with TF32 or autocast on outside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def exact_cdist(x: Tensor, y: Tensor) -> Tensor:
    """`torch.cdist` of [..., n, D] and [..., m, D] from differences, which lose no digits."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class NearestNeighbors:
    """The rows of a matrix nearest to queries, by Euclidean distance.

    Candidates are ranked by |r|² - 2 q·r in float32, one product for a block of queries and a block of rows. The mean
    of the rows is subtracted from both, so that a common offset costs no digits. The distances to the candidates come
    from differences and are exact to float32 rounding. Rows count as equally near if their squared distances differ by
    less than the product's rounding, about 1e-6 of the squared distance to the mean.

    `rows` [m, D] are kept without a copy if they are contiguous float32. A search takes about four times `budget`
    bytes beside its result, whatever m and the number of queries.

    If torch uses MKL for products on this CPU and faiss is installed, faiss finds the candidates. It is 1.3 times as
    fast as MKL, but slower than oneDNN (benchmarks/README.md).
    """

    def __init__(self, rows: Tensor, budget: int | None = None) -> None:
        if rows.ndim != 2 or rows.shape[0] == 0:
            raise ValueError(f"rows must be [m, D] with m > 0, not {list(rows.shape)}")
        self.rows = rows.detach().float().contiguous()
        self.budget = budget or (CACHE if rows.device.type == "cpu" else BUDGET)
        self.mean = self.rows.mean(0)
        parts = self.rows.split(self._at_once(1))
        self.squares = torch.cat([(part - self.mean).square_().sum(1) for part in parts])
        self.faiss = None if rows.device.type != "cpu" or onednn_gains(torch.float32) else load_faiss()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances [n, k] (float32, ascending) and indices [n, k] (int64) of the rows nearest to `queries` [n, D].

        Raises ValueError if k is not in [1, m].
        """
        if not 1 <= k <= len(self.rows):
            raise ValueError(f"k must lie in [1, {len(self.rows)}], the number of rows, not {k}")
        with exact_matmul(self.rows.device):
            found = [self._search(block.detach().float(), k) for block in queries.split(self._at_once(k))]
        distances, indices = zip(*found, strict=True)
        return torch.cat(distances), torch.cat(indices)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        centered = queries - self.mean
        step = self._at_once(1)
        scores, columns = [], []
        for start in range(0, len(self.rows), step):
            block = slice(start, start + step)
            best, column = self._candidates(centered, self.rows[block] - self.mean, self.squares[block], k)
            scores.append(best)
            columns.append(column + start)
        best = _lowest(torch.cat(scores, 1), k)[1]
        near = torch.cat(columns, 1).gather(1, best).sort(dim=1).values
        distances = exact_cdist(queries[:, None], self.rows[near])[:, 0]
        distances, order = distances.sort(dim=1, stable=True)
        return distances, near.gather(1, order)

    def _candidates(self, queries: Tensor, rows: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and positions [q, k] of the k best of some `rows` [r, D] with their `squares` [r]; all, if r < k."""
        k = min(k, len(rows))
        if self.faiss:
            scores, columns = self.faiss.knn(queries.numpy(), rows.numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(columns)
        return _smallest(linear(-2 * queries, rows, squares), k)

    def _at_once(self, copies: int) -> int:
        """How many vectors a block takes, if it holds so many copies of them."""
        side = math.isqrt(self.budget // 4)  # of a square block of distances
        return max(1, min(side, self.budget // (4 * copies * self.rows.shape[1])))


def load_faiss() -> ModuleType | None:
    """faiss, with as many threads as torch; None if it is not installed or lacks its CUDA libraries."""
    try:
        import faiss
    except (ImportError, RuntimeError):
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    faiss.cvar.distance_compute_blas_threshold = 1  # products for few queries, too
    return faiss


def _smallest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [q, k] of the k smallest scores [q, c] in each row, in no fixed order."""
    count, columns = scores.shape
    if columns % GROUP or columns < 4 * k * GROUP:
        return _lowest(scores, k)
    # The k smallest lie in the k groups with the smallest minima: far fewer numbers to select from.
    groups = _lowest(scores.view(count, -1, GROUP).amin(2), k)[1]
    members = (groups[:, :, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)
    values, place = _lowest(scores.gather(1, members), k)
    return values, members.gather(1, place)


def _lowest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by torch alone, which selects one number in half the time of several."""
    return scores.min(1, keepdim=True) if k == 1 else scores.topk(k, largest=False, sorted=False)
