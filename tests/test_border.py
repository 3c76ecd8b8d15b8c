"""The border's effect on a branch's map is measured where the content is known, and taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import Part
from models.branches.border import STEP, BorderEffect, across, coarse

SIDE = 128


def smooth(count: int, seed: int) -> torch.Tensor:
    """Images [count, 3, S, S] that look the same everywhere."""
    noise = torch.randn(count, 3, SIDE + 16, SIDE + 16, generator=torch.Generator().manual_seed(seed))
    return 4 * F.avg_pool2d(noise, 17, stride=1)


class Padded:
    """A branch whose map is the image's first channel, with an effect of the border by distance in steps."""

    def __init__(self, added=(), factor=()) -> None:
        self.image_size, self.roi = SIDE, None
        added, factor = (
            across(list(values), beyond, SIDE).repeat_interleave(STEP)
            for values, beyond in ((added, 0.0), (factor, 1.0))
        )
        self.added, self.factor = added[:, None] + added, factor[:, None] * factor

    def predict(self, images):
        return Part(images.mean((1, 2, 3)), images[:, 0] * self.factor + self.added)


def measured(branch, images):
    effect = BorderEffect(branch)
    for index in torch.arange(len(images)).split(5):
        effect.update(images[index], index)
    return effect.result()


@pytest.mark.parametrize(
    "effect",
    [{"added": (2.0, 1.0, 0.5)}, {"factor": (3.0, 2.0)}, {"factor": (0.5, 0.7)}, {}],
)
def test_a_known_effect_is_found(effect):
    added, factor = measured(Padded(**effect), smooth(24, seed=1))
    truth = np.zeros(len(added)), np.ones(len(factor))
    truth[0][: len(effect.get("added", ()))] = effect.get("added", ())
    truth[1][: len(effect.get("factor", ()))] = effect.get("factor", ())
    np.testing.assert_allclose(added, truth[0], atol=0.15)
    np.testing.assert_allclose(factor, truth[1], atol=0.15 * truth[1].max())


def test_what_really_lies_at_the_border_stays_in_the_map():
    images = smooth(24, seed=2)
    images[:, :, :12] += 5  # the belt's edge
    added, _ = measured(Padded(), images)
    assert np.abs(added[:8]).max() < 0.3  # not taken for an effect of the border


def test_distances():
    assert across([5.0, 3.0], 1.0, 24).tolist() == [5, 3, 1, 1, 3, 5]
    assert across([], 1.0, 24).tolist() == [1] * 6
    assert torch.equal(coarse(torch.ones(2, 24, 24)), torch.ones(2, 6, 6))
