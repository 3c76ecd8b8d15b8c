"""Exact nearest neighbours within a memory budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from models.networks.kernels import linear, onednn_gains

SPARE = 2  # candidates beyond k that the fast pass keeps for the exact one
GROUP = 64  # bank rows that one minimum stands for while candidates are sought
UNIT32 = 2.0**-24  # relative rounding error of one float32 operation


@contextlib.contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Within it, float32 products on `device` are float32, with TF32 or autocast on outside too."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class NearestNeighbors:
    """The rows of a bank nearest to queries, by Euclidean distance.

    A fast pass ranks the bank by |b|² - 2 q·b in float32, one matrix product for a block of queries and bank
    rows, and keeps k + SPARE candidates a query. Their distances are then taken from differences, which lose
    no digits. Where the rounding of the fast pass leaves room for a nearer row among the others (copies in
    the bank, rows much closer to each other than to the bank's mean), the query is settled in float64.

    On a CPU whose matrix products torch leaves to MKL, faiss, if installed, does the fast pass where it has
    queries enough to multiply matrices: it is 1.1 to 1.25 times faster there. Next to oneDNN's products, or
    with few queries, it is the slower one (benchmarks/README.md).

    `bank` [m, D] is kept, not copied, if it is contiguous float32; `budget` bytes bound everything else but
    the result.
    """

    def __init__(self, bank: Tensor, budget: int = 1 << 28) -> None:
        if bank.ndim != 2 or bank.shape[0] == 0:
            raise ValueError(f"bank must be [m, D] with m > 0, not {list(bank.shape)}")
        self.bank = bank.detach().float().contiguous()
        self.budget = budget
        self.faiss = None if self.bank.device.type != "cpu" or onednn_gains(torch.float32) else _load_faiss()
        # Squared norms are taken about the mean, so that an offset common to all rows costs few digits.
        self.origin = self.bank.mean(0)
        parts = self.bank.split(self._rows(4 * bank.shape[1], 1 << 16))
        self.squares = torch.cat([(rows - self.origin).square_().sum(1) for rows in parts])
        self.reach = max(rows.square().sum(1).max().item() for rows in parts) ** 0.5

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances [n, k] (float32, ascending) and bank indices [n, k] (int64) of the nearest rows.

        `queries` [n, D] lie on the bank's device. Of equally near rows the lowest index comes first. Raises
        ValueError if k is not in [1, m].
        """
        if not 1 <= k <= len(self.bank):
            raise ValueError(f"k must lie in [1, {len(self.bank)}], the size of the bank, not {k}")
        results = [(queries.new_empty(0, k, dtype=torch.float32), queries.new_empty(0, k, dtype=torch.int64))]
        step = self._rows(24 * queries.shape[1], 1024)
        with exact_matmul(self.bank.device):
            for start in range(0, len(queries), step):
                rows = queries[start : start + step].detach().float()
                squares, indices, doubtful = self._rank(rows, k)
                redo = doubtful.nonzero()[:, 0]
                for some in redo.split(256) if len(redo) else ():
                    squares[some], indices[some] = self._settle(rows[some], squares[some])
                results.append((squares.sqrt_(), indices))
        distances, indices = zip(*results, strict=True)
        return torch.cat(distances), torch.cat(indices)

    def _rank(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distances and indices [q, k], and which queries [q] may have a nearer row than these."""
        keep = min(k + SPARE, len(self.bank))
        if self.faiss and queries.numel() >= self.faiss.cvar.distance_compute_blas_threshold:
            scores, near, rounding = self._candidates_faiss(queries, keep)
        else:
            scores, near, rounding = self._candidates_torch(queries, keep)
        near = near.sort(1).values
        every = torch.arange(len(queries), device=near.device)
        squares, order = self._exact(queries, every, near).sort(dim=1, stable=True)
        indices = near.gather(1, order)[:, :k].contiguous()
        squares = squares[:, :k].contiguous()
        if keep == len(self.bank):
            return squares, indices, torch.zeros_like(squares[:, 0], dtype=torch.bool)
        return squares, indices, squares[:, -1] >= scores.amax(1) - rounding

    def _candidates_faiss(self, queries: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `_candidates_torch`."""
        scores, near = self.faiss.knn(queries.contiguous().numpy(), self.bank.numpy(), keep)
        length = torch.linalg.vector_norm(queries, dim=1)
        return torch.from_numpy(scores), torch.from_numpy(near), self._rounding(length, self.reach**2)

    def _candidates_torch(self, queries: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `keep` smallest squared distances [q, keep], rounded; their indices; the rounding error [q]."""
        count = len(self.bank)
        centered = queries - self.origin
        step = max(GROUP, self._rows(4 * len(queries), 8192) // GROUP * GROUP)
        scores = queries.new_empty(len(queries), 0)
        near = scores.long()
        for start in range(0, count, step):
            rows = self.bank[start : start + step]
            block = linear(-2 * centered, rows, self.squares[start : start + step])
            values, columns = _smallest(block, min(keep, len(rows)))
            scores, near = torch.cat([scores, values], 1), torch.cat([near, columns + start], 1)
            scores, order = scores.topk(min(keep, scores.shape[1]), largest=False)
            near = near.gather(1, order)
        length = torch.linalg.vector_norm(centered, dim=1)
        scores += (length.square() + 2 * (centered @ self.origin))[:, None]  # completes |q - b|²
        return scores, near, self._rounding(2 * length, self.squares.max())

    def _rounding(self, length: Tensor, square: float | Tensor) -> Tensor:
        """Error of a score: roundings within a product add up like a random walk; 4 standard deviations."""
        return 4 * UNIT32 * (2 * self.bank.shape[1] ** 0.5 * self.reach * length + square + length.square())

    def _settle(self, queries: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances and indices [q, k] by float64 products; `squares` [q, k] are attainable ones."""
        (count, width), k = self.bank.shape, squares.shape[1]
        best = torch.full_like(squares, torch.inf)
        indices = best.new_full(best.shape, count, dtype=torch.int64)
        centered = queries.double() - self.origin
        norms = centered.square().sum(1)
        limit = squares[:, -1].double() * (1 + 1e-5)  # float32 differences are good to a few 1e-7
        slack = 2 * (width + 8) * 2.0**-53 * (8 * norms + 2 * limit)
        limit += slack
        step = self._rows(24 * width + 40 * len(queries), 2048)
        for start in range(0, count, step):
            rows = self.bank[start : start + step].double() - self.origin
            block = torch.addmm(rows.square().sum(1), centered, rows.T, alpha=-2).add_(norms[:, None])
            if len(rows) >= k:
                limit = torch.minimum(limit, block.topk(k, largest=False).values[:, -1] + 2 * slack)
            hit = (block <= limit[:, None]).any(1).nonzero()[:, 0]
            query, column = (block[hit] <= limit[hit, None]).nonzero(as_tuple=True)
            values = best.new_full((len(hit), len(rows)), torch.inf)
            values[query, column] = self._exact(queries, hit[query], column[:, None] + start)[:, 0]
            numbers = torch.arange(start, start + len(rows), device=hit.device).expand(len(hit), -1)
            values, order = torch.cat([best[hit], values], 1).sort(dim=1, stable=True)
            best[hit] = values[:, :k]
            indices[hit] = torch.cat([indices[hit], numbers], 1).gather(1, order[:, :k])
        return best, indices

    def _exact(self, queries: Tensor, query: Tensor, near: Tensor) -> Tensor:
        """Squared distances [p, c] of the `queries` numbered `query` [p] to the bank rows `near` [p, c]."""
        step = max(1, (1 << 19) // (near.shape[1] * self.bank.shape[1]))  # a few MB, which stay in the cache
        parts = zip(query.split(step), near.split(step), strict=True)
        return torch.cat([(self.bank[b] - queries[q, None]).square_().sum(2) for q, b in parts])

    def _rows(self, size: int, most: int) -> int:
        """How many rows of `size` bytes a quarter of the budget holds, at least 1 and at most `most`."""
        return max(1, min(most, self.budget // 4 // size))


def _load_faiss() -> ModuleType | None:
    """faiss, with as many threads as torch, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _smallest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns [q, k] of the k smallest scores [q, c] in each row, in no fixed order."""
    count, columns = scores.shape
    if columns % GROUP or columns < 4 * k * GROUP:
        return scores.topk(k, largest=False)
    # The k smallest lie in the k groups with the smallest minima: far fewer numbers to select from.
    groups = scores.view(count, -1, GROUP).amin(2).topk(k, largest=False).indices
    members = (groups[:, :, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)
    values, place = scores.gather(1, members).topk(k, largest=False)
    return values, members.gather(1, place)
