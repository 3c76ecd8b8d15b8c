"""The nearest bank row of one image's patches, beside the whole matrix of distances and faiss."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.measure import Row, difference, pair
from benchmarks.settings import SEED, Settings
from models.branches.neighbors import NearestNeighbors, load_faiss

MATRIX_BYTES = 3e9  # of distances and bank, up to which the whole matrix is computed


def neighbors(settings: Settings, rows: int) -> Iterator[Row]:
    """A bank of `rows`; the reference is `torch.cdist`, and faiss where it is installed."""
    width, queries = (64, 50) if settings.quick else (1536, 900)
    generator = torch.Generator().manual_seed(SEED)
    bank = torch.randn(rows, width, generator=generator).to(settings.device)
    patches = torch.randn(queries, width, generator=generator).to(settings.device)
    ours = NearestNeighbors(bank)
    ours.faiss = None
    fits = 4 * rows * (queries + width) < MATRIX_BYTES
    took, plain_took, found, plain = pair(
        lambda: ours.search(patches, 1), (lambda: reference.nearest(patches, bank)) if fits else None
    )
    agreement = f"distances within {difference(found[0][:, 0], plain[0]):.1e}" if plain else ""
    yield Row("neighbours", rows, "bank rows", took, plain_took, "torch.cdist whole, minimum", agreement)
    if search := faiss_search(bank):
        took, faiss_took, found, squares = pair(lambda: ours.search(patches, 1), lambda: search(patches))
        near = difference(found[0][:, 0], squares[:, 0].clamp(min=0).sqrt())
        yield Row("neighbours, faiss", rows, "bank rows", took, faiss_took, "faiss.knn", f"distances within {near:.1e}")


def faiss_search(bank: Tensor) -> Callable[[Tensor], Tensor] | None:
    """faiss's exact search on the bank's device: queries [q, D] -> squared distances [q, 1]; None without faiss."""
    faiss = load_faiss()
    if not faiss:
        return None
    if bank.is_cuda:
        import faiss.contrib.torch_utils  # lets it take torch's tensors

        resources = faiss.StandardGpuResources()
        return lambda queries: faiss.knn_gpu(resources, queries, bank, 1)[0]
    return lambda queries: torch.from_numpy(faiss.knn(queries.numpy(), bank.numpy(), 1)[0])
