"""Nearest neighbours against scikit-learn and against differences in float64, on easy and on nasty banks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import models.branches.neighbors
from models.branches.neighbors import NearestNeighbors


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def gaussian(rng):
    return rng.normal(size=(3000, 24)), rng.normal(size=(400, 24))


def grid(rng):
    return rng.integers(0, 3, size=(1500, 4)), rng.integers(0, 3, size=(200, 4))


def copies(rng):
    return np.repeat(rng.normal(size=(30, 8)), 40, 0)[rng.permutation(1200)], rng.normal(size=(100, 8))


def offset(rng):
    return (1000 + rng.normal(size=(n, 20)).astype(np.float16) for n in (2000, 200))


def tight_clusters(rng):
    bank = rng.normal(size=(5, 16))[rng.integers(0, 5, 2000)] + 1e-5 * rng.normal(size=(2000, 16))
    return bank, bank[:150] + 1e-6 * rng.normal(size=(150, 16))


def outlier(rng):
    bank = rng.normal(size=(1500, 12))
    bank[7] *= 1e5
    return bank, rng.normal(size=(150, 12))


def itself(rng):
    bank = rng.normal(size=(300, 64))
    return bank, bank


def large(rng):
    """Several blocks of bank rows, selected by groups."""
    return rng.normal(size=(20000, 8)), rng.normal(size=(50, 8))


CASES = [gaussian, grid, copies, offset, tight_clusters, outlier, itself, large]


def draw(case, rng):
    return (values.astype(np.float32) for values in case(rng))


def check(search, bank, queries, k):
    distances, indices = search(torch.from_numpy(queries), k)
    square = sum((queries[:, None, i].astype(float) - bank[None, :, i]) ** 2 for i in range(bank.shape[1]))
    order = np.argsort(square, axis=1, kind="stable")[:, :k]
    expected = np.sqrt(np.take_along_axis(square, order, 1))
    assert distances.dtype == torch.float32 and indices.dtype == torch.int64
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5, atol=0)
    np.testing.assert_array_equal(indices.numpy(), order)


@pytest.mark.parametrize("budget", [1 << 28, 1 << 16], ids=["default", "tiny budget"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_equals_float64_differences(case, budget, rng):
    bank, queries = draw(case, rng)
    check(NearestNeighbors(torch.from_numpy(bank), budget).search, bank, queries, 5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_faiss_gives_the_same(case, rng):
    faiss = pytest.importorskip("faiss")
    bank, queries = draw(case, rng)
    neighbors = NearestNeighbors(torch.from_numpy(bank))
    neighbors.faiss = faiss  # also where torch is the faster one
    threshold = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 1
    try:
        check(neighbors.search, bank, queries, 5)
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold


def test_equals_scikit_learn(rng):
    from sklearn.neighbors import NearestNeighbors as Reference

    bank, queries = (rng.gamma(1, size=(n, 96)).astype(np.float32) for n in (900, 120))
    distances, indices = NearestNeighbors(torch.from_numpy(bank)).search(torch.from_numpy(queries), 3)
    expected, order = Reference(n_neighbors=3, algorithm="brute").fit(bank.astype(float)).kneighbors(queries)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(indices.numpy(), order)


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (2, 2), (5, 3), (9, 9), (9, 8)])
def test_small_banks(rows, k, rng):
    bank, queries = rng.normal(size=(rows, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    check(NearestNeighbors(torch.from_numpy(bank)).search, bank, queries, k)


def test_no_queries_and_half_precision():
    bank = torch.arange(12.0).view(4, 3)
    distances, indices = NearestNeighbors(bank).search(torch.empty(0, 3), 2)
    assert distances.shape == indices.shape == (0, 2)
    distances, indices = NearestNeighbors(bank.half()).search(bank[2:].half(), 1)
    assert distances.flatten().tolist() == [0, 0] and indices.flatten().tolist() == [2, 3]


def test_autocast_outside_costs_no_digits(rng):
    bank, queries = draw(gaussian, rng)
    with torch.autocast("cpu", torch.bfloat16):
        check(NearestNeighbors(torch.from_numpy(bank)).search, bank, queries, 5)


def test_only_doubtful_queries_are_settled_in_float64(rng, monkeypatch):
    settled = []
    settle = NearestNeighbors._settle
    monkeypatch.setattr(NearestNeighbors, "_settle", lambda self, *a: settled.append(len(a[0])) or settle(self, *a))
    bank, queries = draw(gaussian, rng)
    NearestNeighbors(torch.from_numpy(bank)).search(torch.from_numpy(queries), 5)
    assert sum(settled) < 5
    bank, queries = draw(copies, rng)
    NearestNeighbors(torch.from_numpy(bank)).search(torch.from_numpy(queries), 5)
    assert sum(settled) >= len(queries)


def test_never_holds_the_whole_matrix(rng, monkeypatch):
    largest = []
    linear = models.branches.neighbors.linear

    def watched(*arguments):
        result = linear(*arguments)
        largest.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(models.branches.neighbors, "linear", watched)
    bank, queries = (torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)) for n in (30000, 2000))
    neighbors = NearestNeighbors(bank, budget=1 << 22)
    neighbors.faiss = None
    neighbors.search(queries, 2)
    assert 0 < max(largest) <= 1 << 20


@pytest.mark.parametrize("k", [0, 5])
def test_refuses_a_k_the_bank_cannot_give(k):
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        NearestNeighbors(torch.zeros(4, 3)).search(torch.zeros(1, 3), k)


def test_refuses_an_empty_bank():
    with pytest.raises(ValueError, match="m > 0"):
        NearestNeighbors(torch.zeros(0, 3))
