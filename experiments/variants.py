"""Ways to fit a branch: like its checkpoint, or with some settings changed."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from datasets.region import RegionOfInterest
from models.branches import BRANCHES
from models.branches.branch import Branch, bit_depth_in, region_in, tiles_in, understood
from models.networks.backbones import Backbone, BackboneSpec, empty_backbone
from training.settings import SplitSettings
from utils.checkpoint import read_metadata
from utils.errors import InputError
from utils.files import sha256_of_file

SCORING = {"threshold"}  # settings that matter only when maps are made, also those of the held-out statistics
PUBLISHED_SHARE = {"pc": 0.5}  # of the training images, for converted checkpoints, which do not tell


@dataclasses.dataclass(frozen=True)
class Variant:
    """All that decides what a branch has learned and how it scores; `checkpoint` if it is fitted already."""

    branch: type[Branch]
    network: BackboneSpec
    settings: dict[str, Any]
    split: SplitSettings
    roi: RegionOfInterest | None = None
    bit_depth: int = 16
    checkpoint: Path | None = None
    checkpoint_digest: str | None = None
    calibrated: bool = False  # the fusion takes the held-out statistics

    @classmethod
    def of_checkpoint(cls, name: str, path: Path, calibrated: bool = False) -> Variant:
        """The branch of that name as in the checkpoint; raises InputError if it cannot be read."""
        metadata = read_metadata(path)
        with understood(path, metadata, name):
            if tiles_in(metadata) > 1:
                raise InputError("it was trained with --tiles, and the tables are of whole frames; train without")
            known = {"train_ratio": PUBLISHED_SHARE.get(name, 1.0), "holdout_ratio": 0.0, "seed": 22}
            training = {key: type(value)(metadata["training"].get(key, value)) for key, value in known.items()}
            network, split = BackboneSpec.from_dict(metadata["backbone"]), SplitSettings(**training)
            learned = BRANCHES[name], network, metadata["settings"], split, region_in(metadata), bit_depth_in(metadata)
            variant = cls(*learned, path, sha256_of_file(path), calibrated)
            variant.built()
        return variant

    @property
    def values(self) -> dict[str, Any]:
        """What `changed` can change."""
        return {"image_size": self.network.image_size, **dataclasses.asdict(self.split), **self.settings}

    def changed(self, name: str, value: Any) -> Variant:
        """The same with another value; it keeps its checkpoint if the change has no part in the fit."""
        settings, split, network = self.settings, self.split, self.network
        if name in settings:
            settings = {**settings, name: value}
        if hasattr(split, name):
            split = dataclasses.replace(split, **{name: value})
        if name == "image_size":
            network = dataclasses.replace(network, image_size=value)
        if name == "seed" and network.weights == "random" and network.seed != value:
            network = dataclasses.replace(network, seed=value, fingerprint=None)
        other = dataclasses.replace(self, settings=settings, split=split, network=network)
        if other.fit_needs() == self.fit_needs():
            return other
        return dataclasses.replace(other, checkpoint=None, checkpoint_digest=None)

    def fit_needs(self) -> dict[str, Any]:
        """What the fit depends on beside the training images, as JSON values; the seed only where it matters."""
        network, split = self.network.to_dict(), dataclasses.asdict(self.split)
        if network["weights"] != "random":
            del network["seed"]
        del network["file"]  # the fingerprint tells weights apart
        free = () if self.calibrated else SCORING
        if split["train_ratio"] == 1 and not split["holdout_ratio"]:
            del split["seed"]
        return {
            "branch": self.branch.name,
            "network": network,
            "settings": {name: value for name, value in self.settings.items() if name not in free},
            "split": split,
            "roi": self.roi and self.roi.to_text(),
            "bit_depth": self.bit_depth,
        }

    def built(self, backbone: Backbone | None = None) -> Branch:
        """The branch before its fit; without a backbone it can only make maps of measured patch scores."""
        branch = self.branch(backbone or _outline(self.network), **self.settings)
        branch.roi, branch.bit_depth = self.roi, self.bit_depth
        return branch


_outline = functools.lru_cache(maxsize=16)(empty_backbone)
