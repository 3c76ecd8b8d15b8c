"""What a frame's border does to a branch's map, whatever lies there.

Networks see padding beyond the border, and a map is blurred with its own mirror image. So on frames that look the same
everywhere, the highest values lie along the border, and a threshold of the map would be one of padding. Values at each
distance to the border are therefore brought to the mean and the tail of those further inside; but only as far as the
border itself is the reason, since a product may have an edge of its own, where defects are to be seen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 4  # pixels; maps are looked at this coarsely, since their blur leaves nothing finer
REACH = 12  # steps from the border to where the effect has ended
ENOUGH = 100  # values at one distance, to tell their tail
LEAST = 1e-3  # factor of the tail
MARGIN = 1.25  # times the border's own effect, which so few frames leave open
TAIL = 3  # the power whose mean stands for the tail; a higher one hangs on a few values, and 32 frames have too few
Effect = tuple[list[float], list[float]]  # by steps to the border: what is added to values, the factor of their tail


def coarse(maps: Tensor) -> Tensor:
    """Maps [B, S, S] -> means of squares of 4 x 4 pixels [B, S // 4, S // 4]."""
    return F.avg_pool2d(maps[:, None], STEP)[:, 0]


def distances(side: int) -> Tensor:
    """How many places lie between each place and the nearest border of a frame: [side, side]."""
    places = torch.arange(side)
    nearest = torch.minimum(places, places.flip(0))
    return torch.minimum(nearest[:, None], nearest)


def interior(side: int) -> Tensor:
    """The places that the border does not reach: bool [side, side]."""
    return distances(side) >= reach(side)


def reach(side: int) -> int:
    """Steps from the border to where its effect has ended."""
    return min(REACH, side // 4)


def border_effect(groups: Sequence[Tensor], inside: Tensor) -> Effect:
    """How values at each distance to the border differ, the tail being what lies above their mean.

    `groups` are coarse normal maps [n, s, s], each about the mean of its own interior, several each in standard
    deviations of its own interior; of the places only those `inside` [s, s] are looked at. What is added is that of the
    first group. All make up the tail, for which one would often be too few. A distance with too few values is taken as
    the interior.
    """
    distance = distances(len(inside))

    def values(chosen: Tensor) -> list[Tensor]:
        return [maps[:, chosen & inside].flatten() for maps in groups]

    within = _tail(values(interior(len(inside))))
    shift, scale = [], []
    for step in range(reach(len(inside))):
        ring = values(distance == step)
        enough = min(map(len, ring)) >= ENOUGH and within > 0
        shift.append(float(ring[0].mean()) if enough else 0.0)
        scale.append(float((_tail(ring) / within).clamp(min=LEAST)) if enough else 1.0)
    return shift, scale


def rolled(frames: Tensor, step: int = STEP) -> Tensor:
    """Frames [..., S, S] moved by half a side: at the border lies what was in the middle, where seams are now.

    With a `step` of 1 coarse maps of theirs are moved likewise.
    """
    half = frames.shape[-1] // step // 2 * step
    return frames.roll((half, half), (-2, -1))


def limited(effect: Effect, groups: Sequence[Tensor]) -> Effect:
    """An effect of the border, as far as it shows where the same content lies inside and is moved to the border.

    `groups` are pairs of coarse maps [m, 2, s, s]: those of rolled frames, and those of the frames themselves, rolled
    afterwards; in the units of the groups of `border_effect`.
    """
    side = groups[0].shape[-1]
    distance = distances(side)
    away = (torch.arange(side) - (side - 1) / 2).abs() >= reach(side)  # from the seams
    shift, scale = [], []
    for step, (added, factor) in enumerate(zip(*effect, strict=True)):
        places = (distance == step) & away[:, None] & away
        at_border, inside = ([pairs[:, part, places].flatten() for pairs in groups] for part in (0, 1))
        own_shift = float(at_border[0].mean() - inside[0].mean())
        own_scale = float(_tail(at_border) / _tail(inside).clamp(min=LEAST))
        shift.append(min(added, max(0.0, MARGIN * own_shift)))
        scale.append(min(factor, max(1.0, MARGIN * own_scale)))
    return shift, scale


def by_distance(values: Sequence[float], beyond: float, size: int) -> Tensor:
    """Values by steps to the border, and the one beyond, for each pixel of a frame: [size, size].

    Between the middles of two steps they are interpolated, and up to the border extrapolated.
    """
    line = torch.tensor([*values, beyond, beyond])
    steps = (distances(size) + 0.5) / STEP - 0.5
    below = steps.floor().clamp(0, len(line) - 2).long()
    return line[below] + (steps - below).clamp(max=1) * (line[below + 1] - line[below])


def _tail(groups: Sequence[Tensor]) -> Tensor:
    above = torch.cat([(values - values.mean()).clamp(min=0) for values in groups])
    return above.pow(TAIL).mean().pow(1 / TAIL)
