"""The lazy greedy k-centre against the plain one in float64, and the projection against scikit-learn."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.random_projection import SparseRandomProjection

import models.branches.coreset
from models.branches.coreset import LazyGreedy, greedy_k_center, sparse_projection


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def plain_greedy(features, size):
    """One pass over all points per centre, in float64; chosen points are out of the running."""
    features = features.astype(np.float64)
    nearest, chosen = np.full(len(features), np.inf), [0]
    while len(chosen) < size:
        nearest = np.minimum(nearest, ((features - features[chosen[-1]]) ** 2).sum(1))
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


CASES = {
    "gaussian": lambda rng: (rng.normal(size=(3000, 20)), 200),
    "grid": lambda rng: (rng.integers(0, 3, size=(1500, 4)), 150),
    "two values": lambda rng: (rng.choice([0.1, 0.7], size=(800, 6)), 100),
    "copies": lambda rng: (np.repeat(rng.normal(size=(50, 8)), 30, 0)[rng.permutation(1500)], 45),
    "more centres than distinct points": lambda rng: (rng.normal(size=(20, 5))[rng.integers(0, 20, 400)], 60),
    "one point many times": lambda rng: (np.ones((700, 5)), 40),
    "corners of a simplex": lambda rng: (np.eye(200), 60),
    "half precision with an offset": lambda rng: (1000 + rng.normal(size=(2000, 20)).astype(np.float16), 200),
    "far clusters": lambda rng: (
        100 * rng.normal(size=(30, 16))[rng.integers(0, 30, 3000)] + rng.normal(size=(3000, 16)),
        200,
    ),
    "line": lambda rng: (rng.permutation(1500)[:, None] * np.ones((1, 3)), 200),
    "outlier first": lambda rng: (np.concatenate([np.full((1, 6), 1e5), rng.normal(size=(2000, 6))]), 100),
    "near ties": lambda rng: (1 + np.cumsum(rng.choice([0, 1e-7], size=(1500, 6)), 0), 150),
    "spheres": lambda rng: (
        (v := rng.normal(size=(2000, 9))) / np.linalg.norm(v, axis=1, keepdims=True) * rng.integers(1, 3, (2000, 1)),
        200,
    ),
    "every point": lambda rng: (rng.normal(size=(300, 3)), 300),
    "single point": lambda rng: (rng.normal(size=(1, 3)), 1),
}


@pytest.mark.parametrize(("limit", "value"), [("HEAD", 256), ("HEAD", 3), ("SCORES", 500)])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_greedy(case, limit, value, rng, monkeypatch):
    monkeypatch.setattr(models.branches.coreset, limit, value)
    features, size = CASES[case](rng)
    features = features.astype(np.float32)
    chosen = greedy_k_center(torch.from_numpy(features), size, progress=False)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == plain_greedy(features, size)


def test_points_chosen_before(rng):
    features = rng.normal(size=(1000, 8)).astype(np.float32)
    order = plain_greedy(features, 100)
    arranged = [*order[:60], *sorted(set(range(1000)) - set(order[:60]))]
    chosen = greedy_k_center(torch.from_numpy(features[arranged]), 100, progress=False, chosen=60)
    assert [arranged[place] for place in chosen] == order


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.integers(-3, 3).map(float)),
    st.floats(0, 1),
)
def test_equals_the_plain_greedy_on_small_grids(features, share):
    size = max(1, round(share * len(features)))
    chosen = greedy_k_center(torch.from_numpy(features), size, progress=False).tolist()
    assert chosen == plain_greedy(features, size)
    assert len(set(chosen)) == size


def test_most_distances_are_never_computed(rng):
    features = rng.normal(size=(50, 64))[rng.integers(0, 50, 30000)] + 0.3 * rng.normal(size=(30000, 64))
    greedy = LazyGreedy(torch.from_numpy(features.astype(np.float32)))
    greedy.select(300, progress=False)
    assert 30000 <= greedy.evaluations < 0.35 * 30000 * 300


@pytest.mark.parametrize(
    ("value", "size", "words"), [(0.0, 0, r"\[1, 5\]"), (0.0, 6, r"\[1, 5\]"), (torch.nan, 2, "NaN")]
)
def test_what_cannot_be_chosen_is_refused(value, size, words):
    features = torch.zeros(5, 2)
    features[3, 1] = value
    with pytest.raises(ValueError, match=words):
        greedy_k_center(features, size, progress=False)


def test_progress_goes_to_stderr_and_reaches_the_end(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a log file gets no bar
    greedy_k_center(torch.randn(50, 2), 10)
    out, err = capsys.readouterr()
    assert out == "" and "10/10" in err


@pytest.mark.parametrize("count", [40, 300])
def test_projection_equals_scikit_learn(count, rng):
    features = rng.normal(size=(count, 200)).astype(np.float32)
    expected = SparseRandomProjection(eps=0.9, random_state=22).fit_transform(features)
    projected = sparse_projection(torch.from_numpy(features))
    assert projected.dtype == torch.float32 and projected.shape[1] < 200
    np.testing.assert_allclose(projected.numpy(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("count", "width"), [(300, 100), (1, 5)])
def test_projection_never_widens(count, width):
    features = torch.randn(count, width)
    torch.testing.assert_close(sparse_projection(features), features, rtol=0, atol=0)
