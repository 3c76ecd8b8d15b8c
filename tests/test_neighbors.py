"""Nearest neighbours against differences in float64, on easy and on nasty rows."""

import contextlib

import numpy as np
import pytest
import torch
from machine import needs_cuda
from stand_in import StandIn

from models.branches import neighbors
from models.branches.neighbors import NearestNeighbors
from models.branches.patchcore import PatchCore

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def clusters(rng):
    rows = rng.normal(size=(5, 16))[rng.integers(0, 5, 2000)] + 1e-5 * rng.normal(size=(2000, 16))
    return rows, rows[:150] + 1e-6 * rng.normal(size=(150, 16))


CASES = {
    "wide and lopsided": lambda rng: (rng.gamma(1, size=(900, 96)), rng.gamma(1, size=(120, 96))),
    "gaussian": lambda rng: (rng.normal(size=(3000, 24)), rng.normal(size=(400, 24))),
    "grid": lambda rng: (rng.integers(0, 3, size=(1500, 4)), rng.integers(0, 3, size=(200, 4))),
    "copies": lambda rng: (
        np.repeat(rng.normal(size=(30, 8)), 40, 0)[rng.permutation(1200)],
        rng.normal(size=(100, 8)),
    ),
    "offset": lambda rng: (1000 + rng.normal(size=(n, 20)).astype(np.float16) for n in (2000, 200)),
    "tight clusters": clusters,
    "outlier": lambda rng: (
        rng.normal(size=(1500, 12)) * np.where(np.arange(1500) == 7, 1e5, 1)[:, None],
        rng.normal(size=(150, 12)),
    ),
    "itself": lambda rng: [rng.normal(size=(300, 64))] * 2,
    "several blocks of rows, selected by groups": lambda rng: (rng.normal(size=(20000, 8)), rng.normal(size=(50, 8))),
}
CLOSE = ["tight clusters", "outlier"]  # rows much nearer to one another than to the mean


def draw(case, rng):
    return [values.astype(np.float32) for values in CASES[case](rng)]


def check(found, rows, queries, slack=0.0):
    """The distances are those to the rows returned, and no row left out is nearer by more than `slack` (squared)."""
    distances, indices = (values.cpu().numpy() for values in found)
    assert distances.dtype == np.float32 and indices.dtype == np.int64
    square = sum((queries[:, None, i].astype(float) - rows[None, :, i]) ** 2 for i in range(rows.shape[1]))
    actual = np.take_along_axis(square, indices, 1)
    np.testing.assert_allclose(distances, np.sqrt(actual), rtol=1e-5, atol=0)
    expected = np.sort(square, axis=1)[:, : indices.shape[1]]
    assert (actual <= expected * (1 + 1e-5) + slack).all()
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    repeated = distances[:, 1:] == distances[:, :-1]
    assert (indices[:, 1:][repeated] > indices[:, :-1][repeated]).all()


def rounding(rows, queries):
    """The largest error of a float32 product of centred rows and queries."""
    mean = rows.mean(0)
    return 1e-6 * (np.square(rows - mean).sum(1).max() + np.square(queries - mean).sum(1).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("budget", [None, 1 << 16], ids=["default", "tiny budget"])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_differences(case, budget, k, device, rng):
    rows, queries = draw(case, rng)
    search = NearestNeighbors(torch.from_numpy(rows).to(device), budget).search
    check(search(torch.from_numpy(queries).to(device), k), rows, queries, rounding(rows, queries) * (case in CLOSE))


@pytest.mark.parametrize("case", CASES)
def test_faiss_gives_the_same(case, rng, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbors, "onednn_gains", lambda dtype: False)
    rows, queries = draw(case, rng)
    search = NearestNeighbors(torch.from_numpy(rows))
    assert search.faiss
    check(search.search(torch.from_numpy(queries), 5), rows, queries, rounding(rows, queries) * (case in CLOSE))


@pytest.mark.parametrize(("count", "k"), [(1, 1), (2, 2), (5, 3), (9, 9), (9, 8)])
def test_few_rows(count, k, rng):
    rows, queries = rng.normal(size=(count, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    check(NearestNeighbors(torch.from_numpy(rows)).search(torch.from_numpy(queries), k), rows, queries)


def test_no_queries_and_half_precision():
    rows = torch.arange(12.0).view(4, 3)
    distances, indices = NearestNeighbors(rows).search(torch.empty(0, 3), 2)
    assert distances.shape == indices.shape == (0, 2)
    distances, indices = NearestNeighbors(rows.half()).search(rows[2:].half(), 1)
    assert distances.flatten().tolist() == [0, 0] and indices.flatten().tolist() == [2, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_and_tf32_outside_cost_no_digits(device, rng):
    rows, queries = draw("gaussian", rng)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast(device, torch.bfloat16):
            found = NearestNeighbors(torch.from_numpy(rows).to(device)).search(torch.from_numpy(queries).to(device), 5)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    check(found, rows, queries)


def test_never_holds_the_whole_matrix(rng, monkeypatch):
    largest = []
    linear = neighbors.linear

    def watched(*arguments):
        result = linear(*arguments)
        largest.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(neighbors, "linear", watched)
    rows, queries = (torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)) for n in (30000, 2000))
    searched = NearestNeighbors(rows, budget=1 << 20)
    searched.faiss = None
    searched.search(queries, 2)
    assert 0 < max(largest) <= 1 << 20


@pytest.mark.parametrize("k", [1, 3])
def test_asks_the_device_for_nothing(k, monkeypatch):
    """Tensors on "meta" have shapes but no values, so that whatever needs a value on the host fails."""
    monkeypatch.setattr(neighbors, "exact_matmul", lambda device: contextlib.nullcontext())
    searched = NearestNeighbors(torch.empty(20000, 64, device="meta"))
    assert [found.shape for found in searched.search(torch.empty(30000, 64, device="meta"), k)] == [(30000, k)] * 2


def test_patchcore_asks_the_device_for_nothing(monkeypatch):
    monkeypatch.setattr(neighbors, "exact_matmul", lambda device: contextlib.nullcontext())
    branch = PatchCore(StandIn(64, (8, 8), 32))
    branch.memory_bank = NearestNeighbors(torch.empty(100, 32, device="meta"))
    features = torch.empty(5, 64, 32, device="meta")
    distances, nearest = torch.empty(5, 64, device="meta"), torch.empty(5, 64, device="meta", dtype=torch.int64)
    assert branch.image_scores(features, distances, nearest).shape == (5,)


@needs_cuda
def test_a_gpu_gets_few_launches_no_questions_and_little_memory(rng):
    """A batch of 32 at the paper's setting, and four times as much of everything within the same memory."""
    rows = torch.randn(144, 1536, device="cuda")
    queries = torch.randn(4 * 28800, 1536, device="cuda")
    searched = NearestNeighbors(rows)
    searched.search(queries[:28800], 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            searched.search(queries[:28800], 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    assert 0 < launches < 120
    many = NearestNeighbors(torch.randn(20000, 1536, device="cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    many.search(queries, 1)
    assert torch.cuda.max_memory_allocated() - before < 5 * many.budget


@pytest.mark.parametrize(("rows", "k", "said"), [(4, 0, r"\[1, 4\]"), (4, 5, r"\[1, 4\]"), (0, 1, "m > 0")])
def test_refuses_a_k_the_rows_cannot_give(rows, k, said):
    with pytest.raises(ValueError, match=said):
        NearestNeighbors(torch.zeros(rows, 3)).search(torch.zeros(1, 3), k)
