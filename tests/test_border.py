"""The border's effect on a branch's map is measured, and taken out of standardised maps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from stand_in import Batches, noise, normalised

from models.branches.border import STEP, border_effect, by_distance, coarse, distances, interior, limited, rolled
from models.branches.calibration import calibrate, interior_moments
from models.branches.patchcore import PatchCore, aligned_features
from models.networks import DEMO_NETWORK
from models.networks.backbones import BackboneSpec, build_backbone
from utils.errors import InputError

SIDE = 32
EVERYWHERE = torch.ones(SIDE, SIDE, dtype=torch.bool)


def normal_maps(count: int, seed: int) -> torch.Tensor:
    """Coarse maps [count, s, s] that look the same everywhere: mean 0, standard deviation 1, a long tail."""
    noise = torch.randn(count, 1, SIDE + 2, SIDE + 2, generator=torch.Generator().manual_seed(seed))
    smooth = F.avg_pool2d(noise, 3, stride=1)[:, 0] * 3
    values = smooth.square()
    return (values - values.mean()) / values.std()


def field(values, beyond) -> torch.Tensor:
    """Values by distance to the border for each place of a coarse map: [s, s]."""
    return coarse(by_distance(values, beyond, SIDE * STEP)[None])[0]


@pytest.mark.parametrize("added, factor", [((2.0, 1.0, 0.5), ()), ((), (3.0, 2.0)), ((), (0.5, 0.7)), ((), ())])
def test_a_known_effect_is_found(added, factor):
    maps = normal_maps(200, seed=1)
    found = border_effect([maps * field(factor, 1.0) + field(added, 0.0)], EVERYWHERE)
    for values, truth, beyond in zip(found, (added, factor), (0.0, 1.0), strict=True):
        truth = np.array([*truth, *[beyond] * (len(values) - len(truth))])
        np.testing.assert_allclose(values, truth, atol=0.25 * max(1, truth.max()))


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_few_maps_leave_no_border(seed):
    """The tail at the border is that of the interior, and few of the highest values lie there."""
    added, factor = field((1.0, 0.5), 0.0), field((2.0, 1.5, 1.2), 1.0)
    held_out, new = (normal_maps(*drawn) * factor + added for drawn in ((32, seed), (200, seed + 10)))
    shift, scale = border_effect([held_out[:6], held_out[6:]], EVERYWHERE)
    standardized = (new - field(shift, 0.0)) / field(scale, 1.0)
    for maps, least, most, highest in ((new, 1.5, math.inf, 1), (standardized, 0.9, 1.1, 0.2)):
        ring = distances(SIDE) < 1
        ratio = maps[:, ring].quantile(0.99) / maps[:, ~ring].quantile(0.99)
        assert least < ratio < most
        assert ring.flatten()[maps.flatten(1).argmax(1)].float().mean() <= highest


def test_where_nothing_is_looked_at_there_is_no_effect():
    inside = EVERYWHERE.clone()
    inside[:, :6] = inside[:, -6:] = inside[:6] = inside[-6:] = False
    shift, scale = border_effect([normal_maps(8, seed=6) + field((5.0,), 0.0)], inside)
    assert shift[:6] == [0.0] * 6 and scale[:6] == [1.0] * 6
    shift, scale = border_effect([torch.zeros(8, SIDE, SIDE)], EVERYWHERE)
    assert set(shift) == {0.0} and set(scale) == {1.0}


def test_distances():
    expected = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert distances(4).tolist() == expected and interior(4).tolist() == [[d > 0 for d in row] for row in expected]
    line = by_distance([5.0, 3.0], 1.0, 24)[12]
    assert line[:12].tolist() == [5.75, 5.25, 4.75, 4.25, 3.75, 3.25, 2.75, 2.25, 1.75, 1.25, 1.0, 1.0]
    assert torch.equal(line, line.flip(0)) and by_distance([], 1.0, 8).unique().tolist() == [1.0]
    assert torch.equal(coarse(torch.ones(2, 6 * STEP, 6 * STEP)), torch.ones(2, 6, 6))


def test_aligned_features_stand_where_the_network_computed_them():
    fine, coarse_map = torch.zeros(1, 2, 16, 16), torch.zeros(1, 1, 8, 8)
    fine[0, 0, 5, 11] = fine[0, 1, 0, 0] = coarse_map[0, 0, 4, 3] = 1.0
    features = aligned_features([fine, coarse_map])[0].T.unflatten(1, (16, 16))
    assert features[0].argmax() == 5 * 16 + 11
    rows, columns = torch.where(features[2] > 0.99 * features[2].max())
    assert set(rows.tolist()) == {8, 9} and set(columns.tolist()) == {6, 7}
    for layer in (features[0], features[1]):  # beyond the border lies nothing: its places have their neighbours' values
        assert torch.equal(layer[0], layer[1]) and torch.equal(layer[:, -1], layer[:, -2])
    ones = aligned_features([torch.ones(1, 2, 16, 16), torch.ones(1, 1, 8, 8)])
    torch.testing.assert_close(ones, torch.ones(1, 256, 3))


@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("blur", [0, 1, 3])
def test_the_bundled_networks_features_vary_at_the_border_as_elsewhere(blur, seed):
    """On frames that look the same everywhere. Uncopied, moduli vary by a quarter to a half more there."""
    grain = np.random.default_rng(seed).random((24, 208, 208, 3))
    grain = gaussian_filter(grain, (0, blur, blur, 0))[:, 40:-40, 40:-40]
    frames = normalised(torch.from_numpy(grain).permute(0, 3, 1, 2).float())
    backbone = build_backbone(BackboneSpec("maps", DEMO_NETWORK, 128, weights="demo"))
    ring = distances(16) < 1
    for layer in backbone(frames):
        deviations = layer - layer.mean((0, 2, 3), keepdim=True)
        variances = [deviations[..., places].square().mean((0, 2)) for places in (ring, ~ring)]
        assert 0.8 < (variances[0] / variances[1]).mean() < 1.2


def test_a_whitened_bank_of_patches_that_were_not_aligned_is_refused():
    """It would be compared with other features, and everything would look strange."""
    branch = PatchCore(build_backbone(BackboneSpec("maps", "test_resnet", 64, weights="random")), 0.1, whiten=True)
    branch.fit(Batches.of(noise(64, count=4)))
    former = {name.replace("aligned_", "whitening_"): tensor for name, tensor in branch.state().items()}
    with pytest.raises(InputError):
        branch.load_state(former)


def test_in_rolled_frames_the_middle_lies_at_the_border():
    frames = noise(52, 2)
    assert torch.equal(rolled(frames)[..., 0, 0], frames[..., 28, 28])
    assert torch.equal(rolled(coarse(frames[:, 0]), 1), coarse(rolled(frames)[:, 0]))


def test_an_effect_is_limited_to_what_moved_content_shows():
    before, distance = normal_maps(100, seed=1), distances(SIDE)
    factor, added = (torch.tensor([*own, *[none] * 30])[distance] for own, none in (((1.5, 1.2), 1.0), ((1.0,), 0.0)))
    pairs = torch.stack([before * factor + added, before], 1)
    few = torch.stack([pairs[:3, 0] + 9, pairs[:3, 1] - 5], 1)  # fitted frames, to which nothing inside is strange
    shift, scale = limited(([3.0, 0.5] + [0.0] * 6, [5.0, 1.1] + [0.8] * 6), [pairs[3:], few])
    np.testing.assert_allclose(shift, [1.25] + [0.0] * 7, atol=0.1)
    np.testing.assert_allclose(scale, [1.25 * 1.5, 1.1] + [0.8] * 6, rtol=1e-4)


@pytest.mark.parametrize("margin", [0, 12])
def test_what_a_product_has_at_its_edge_is_not_taken_out(margin):
    """Rough edges, or none: only what the border itself does to a map counts as its effect."""
    grain = np.random.default_rng(4).normal(0.5, 0.1, (40, 256, 256, 3))
    inside = slice(margin, 256 - margin)
    grain[:, inside, inside] = 0.5 + (grain[:, inside, inside] - 0.5) * (0.2 if margin else 1)
    frames = normalised(torch.from_numpy(grain).permute(0, 3, 1, 2).float())
    branch = PatchCore(build_backbone(BackboneSpec("maps", DEMO_NETWORK, 256, weights="demo")), 0.01, whiten=True)
    branch.fit(Batches.of(frames[:8]))
    maps, everywhere = coarse(branch.predict(frames[8:]).maps), torch.ones(64, 64, dtype=torch.bool)
    mean, deviation = interior_moments(maps, everywhere)
    shift, scale = border_effect([(maps - mean) / deviation], everywhere)
    found = calibrate(branch, Batches.of(frames[8:]))
    if margin:
        assert found["border_shift"][0] < 0.2 * shift[0] and found["border_scale"][0] < 0.8 * scale[0]
    else:
        np.testing.assert_allclose(found["border_shift"] + found["border_scale"], shift + scale, atol=0.02)
