"""What a frame's border does to a branch's map, whatever lies there.

Networks see padding beyond the border, and a map is blurred with its own mirror image. So on frames that look the same
everywhere, the highest values lie along the border. The effect is measured where the content is known: a frame is moved
by a quarter of its side, which brings to the border what was inside, and both maps of that content are compared. What
really differs at the border, such as the belt's edge, stays in the map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.branches.branch import Branch
from utils.gather import all_rows

STEP = 4  # pixels; maps are looked at this coarsely, since their blur leaves nothing finer
REACH = 12  # steps from the border to where the effect has ended
FRAMES = 32  # of the held-out images, on which it is measured


class BorderEffect:
    """Gathers a branch's maps of frames, as they are and moved; `result` tells how values at the border differ.

    Distances to the border count steps of 4 pixels. A region of interest is left aside: it would not move along.
    """

    def __init__(self, branch: Branch) -> None:
        self.branch = branch
        self.side = branch.image_size // STEP
        self.move = self.side // 4
        self.reach = min(REACH, self.move)
        self.strips = [torch.zeros(0, 2, self.reach, self.side)]

    def update(self, images: Tensor, index: Tensor) -> None:
        """Add images [B, 3, S, S] with the numbers `index` [B] among all."""
        if not self.reach:
            return
        roi, self.branch.roi = self.branch.roi, None
        for number, image in zip(index.tolist(), images, strict=True):
            if number < FRAMES:
                self._add(image[None], backward=number % 2 == 1)
        self.branch.roi = roi

    def _add(self, image: Tensor, backward: bool) -> None:
        """Move an image [1, 3, S, S] up and to the left, or down and to the right."""
        pixels = STEP * self.move
        kept = slice(None, -pixels) if backward else slice(pixels, None)
        start, end = (pixels, 0) if backward else (0, pixels)
        up = F.pad(image[:, :, kept], (0, 0, start, end), mode="reflect")
        left = F.pad(image[..., kept], (start, end, 0, 0), mode="reflect")
        before, up, left = (coarse(self.branch.predict(frame).maps)[0].cpu() for frame in (image, up, left))
        for at_border, inside in ((up, before), (left.T, before.T)):
            if backward:
                at_border, inside = at_border.flip(0), inside.flip(0)
            self.strips.append(torch.stack([at_border[: self.reach], inside[self.move : self.move + self.reach]])[None])

    def result(self) -> tuple[list[float], list[float]]:
        """By distance to the border: what it adds to a map's values, and the factor by which it spreads them."""
        strips = all_rows(torch.cat(self.strips)).double()
        if not strips.numel():
            return [], []
        values = strips.permute(1, 2, 0, 3).flatten(2)  # [2, reach, n]
        mean, spread = values.mean(2), values.std(2).clamp(min=1e-12)
        added, factor = mean[0] - mean[1], spread[0] / spread[1]
        beyond = slice(-max(1, self.reach // 4), None)  # the border does nothing there, but moving a frame may
        return (added - added[beyond].mean()).tolist(), (factor / factor[beyond].mean()).tolist()


def coarse(maps: Tensor) -> Tensor:
    """Maps [B, S, S] -> means of squares of 4 x 4 pixels [B, S // 4, S // 4]."""
    return F.avg_pool2d(maps[:, None], STEP)[:, 0]


def across(values: list[float], beyond: float, side: int) -> Tensor:
    """Values by distance to the border, and the one beyond, for each step of a line through `side` pixels."""
    places = torch.arange(side // STEP)
    return torch.tensor([*values, beyond])[torch.minimum(places, places.flip(0)).clamp(max=len(values))]
