"""Frames cut into overlapping tiles, for objects that are small beside the frame."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.region import RegionOfInterest
from utils.errors import InputError

OVERLAP = 0.25  # of a tile's side, with each neighbour: the effect of a tile's border is blended away
AT_ONCE = 32  # tiles of a frame that a network sees in one pass: all 256 of 16 x 16 would take some 6 GB
LARGEST_FRAME = 8192  # pixels along the side: a frame of that takes 0.8 GB, and each map 0.3 GB

Corner = tuple[int, int]  # top and left


class View(NamedTuple):
    """Tiles that show the same region of interest, at most AT_ONCE."""

    corners: tuple[Corner, ...]
    roi: RegionOfInterest | None  # in each of the tiles


@dataclasses.dataclass(frozen=True)
class Tiling:
    """`count` x `count` overlapping tiles of `side` x `side` pixels. Raises InputError for too large a frame."""

    count: int
    side: int

    def __post_init__(self) -> None:
        if self.count > 1 and self.frame_side > LARGEST_FRAME:
            raise InputError(
                f"--tiles {self.count}: with tiles of {self.side} pixels that is a frame of {self.frame_side}, and the "
                f"largest is {LARGEST_FRAME}; take fewer or smaller ones"
            )

    @property
    def step(self) -> int:
        return self.side - round(OVERLAP * self.side)

    @property
    def frame_side(self) -> int:
        """Side of the square frame that the tiles cover."""
        return self.side + (self.count - 1) * self.step

    @functools.lru_cache(maxsize=16)  # noqa: B019 (frozen, and there are few)
    def views(self, roi: RegionOfInterest | None) -> tuple[View, ...]:
        """The tiles that show something of the region of interest; those which show the same share a view."""
        starts = [index * self.step for index in range(self.count)]
        corners: dict[RegionOfInterest | None, list[Corner]] = {}
        inside = np.ones([self.frame_side] * 2, bool) if roi is None else roi.at(self.frame_side, self.frame_side)
        for top, left in itertools.product(starts, starts):
            shown = inside[top : top + self.side, left : left + self.side]
            if shown.any():
                corners.setdefault(None if shown.all() else RegionOfInterest(shown), []).append((top, left))
        return tuple(
            View(tuple(places[first : first + AT_ONCE]), seen)
            for seen, places in corners.items()
            for first in range(0, len(places), AT_ONCE)
        )

    def cut(self, frames: Tensor, view: View) -> Tensor:
        """Frames [B, 3, F, F] -> the view's tiles [B * n, 3, S, S], those of a frame one after the other."""
        tiles = [frames[..., top : top + self.side, left : left + self.side] for top, left in view.corners]
        return torch.stack(tiles, 1).flatten(0, 1)

    def joined(self, maps: Sequence[Tensor], views: Sequence[View]) -> Tensor:
        """The maps [B * n, S, S] of each view's tiles -> maps of the frames [B, F, F], lowest where no tile is."""
        window, weight = self._weights(tuple(views), maps[0].device)
        total = 0
        for tiles, view in zip(maps, views, strict=True):
            for tile, corner in zip(tiles.unflatten(0, (-1, len(view.corners))).unbind(1), view.corners, strict=True):
                total = total + self._placed(tile * window, corner)
        if sum(len(view.corners) for view in views) == self.count**2:
            return total / weight
        seen = weight > 0
        lowest = torch.where(seen, total / weight, torch.inf).amin((1, 2), keepdim=True)
        return torch.where(seen, total / weight, lowest)

    def _placed(self, tile: Tensor, corner: Corner) -> Tensor:
        """[..., S, S] -> [..., F, F], 0 elsewhere."""
        top, left = corner
        rest = self.frame_side - self.side
        return F.pad(tile, (left, rest - left, top, rest - top))

    @functools.lru_cache(maxsize=16)  # noqa: B019 (frozen, and there are few)
    def _weights(self, views: tuple[View, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """The weights of a tile's places [S, S], 1 and falling to its border, and their sum at a frame's [F, F]."""
        places = torch.arange(self.side, device=device) + 0.5
        line = (torch.minimum(places, self.side - places) / (self.side - self.step)).clamp(max=1)
        window = line[:, None] * line
        return window, sum(self._placed(window, corner) for view in views for corner in view.corners)


class TiledBatches:
    """The batches of a loader, cut into tiles; while it sees a view's, the branch looks at the view's region."""

    def __init__(self, loader: Any, branch: Any) -> None:
        self.loader, self.branch = loader, branch
        self.views = branch.tiling.views(branch.roi)
        self.tiles = sum(len(view.corners) for view in self.views)  # of a frame
        self.dataset = range(self.tiles * len(loader.dataset))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            first = 0
            for view in self.views:
                numbers = torch.arange(first, first + len(view.corners))
                index = (batch["index"][:, None] * self.tiles + numbers).flatten()
                with self.branch.looking_at(view.roi):
                    yield {"image": self.branch.tiling.cut(batch["image"], view), "index": index}
                first += len(view.corners)
