"""Ways to fit a branch: like its checkpoint, or with some settings changed."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

from datasets.mvtec import Category
from datasets.region import RegionOfInterest
from models.branches import BRANCHES, weights_flag
from models.branches.branch import Branch, bit_depth_in, region_in, tiles_in
from models.networks.backbones import Backbone, BackboneSpec, build_backbone, empty_backbone
from training.settings import RunSettings, SplitSettings
from training.training import fit_branch
from utils.checkpoint import read_metadata
from utils.errors import InputError
from utils.files import sha256_of_file

SCORING = {"threshold"}  # settings that matter only when maps are made
PUBLISHED_SHARE = {"pc": 0.5}  # of the training images, for converted checkpoints, which do not tell


@dataclasses.dataclass(frozen=True)
class Variant:
    """All that decides what a branch has learned and how it scores; `checkpoint` if it is fitted already."""

    branch: type[Branch]
    network: BackboneSpec
    settings: dict[str, Any]
    train_ratio: float
    holdout_ratio: float
    seed: int
    roi: RegionOfInterest | None = None
    bit_depth: int = 16
    checkpoint: Path | None = None
    checkpoint_digest: str | None = None

    @classmethod
    def of_checkpoint(cls, name: str, path: Path) -> Variant:
        """The branch of that name as in the checkpoint; raises InputError if it cannot be read."""
        metadata = read_metadata(path)
        if metadata.get("branch") != name:
            raise InputError(f"{path} is a checkpoint of branch '{metadata.get('branch')}', not of '{name}'")
        try:
            if tiles_in(metadata) > 1:
                raise InputError("it was trained with --tiles, and the tables are of whole frames; train without")
            training = metadata["training"]
            variant = cls(
                BRANCHES[name],
                BackboneSpec.from_dict(metadata["backbone"]),
                metadata["settings"],
                float(training.get("train_ratio", PUBLISHED_SHARE.get(name, 1.0))),
                float(training.get("holdout_ratio", 0.0)),
                int(training.get("seed", 22)),
                region_in(metadata),
                bit_depth_in(metadata),
                path,
                sha256_of_file(path),
            )
            variant.mapper()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{path}: its metadata is not what branch '{name}' writes ({error!r}); train the branch again"
            ) from None
        return variant

    def changed(self, **changes: Any) -> Variant:
        """This variant with other fields, `settings` or `image_size`; itself if the changes change no result."""
        if "image_size" in changes:
            changes["network"] = dataclasses.replace(self.network, image_size=changes.pop("image_size"))
        if "settings" in changes:
            changes["settings"] = {**self.settings, **changes["settings"]}
        if "seed" in changes:
            changes |= self._reseeded(changes["seed"])
        other = dataclasses.replace(self, **changes, checkpoint=None, checkpoint_digest=None)
        return self if other.fit_needs() == self.fit_needs() else other

    def _reseeded(self, seed: int) -> dict[str, Any]:
        """What --seed of the training scripts decides beside the choice of images."""
        changes: dict[str, Any] = {}
        if "seed" in self.settings:
            changes["settings"] = {**self.settings, "seed": seed}
        if self.network.weights == "random" and self.network.seed != seed:
            changes["network"] = dataclasses.replace(self.network, seed=seed, fingerprint=None)
        return changes

    def fit_needs(self) -> dict[str, Any]:
        """What the fit depends on beside the training images, as JSON values; the seed only where it matters."""
        network = self.network.to_dict()
        if network["weights"] != "random":
            del network["seed"]
        del network["file"]  # the fingerprint tells weights apart
        chosen = self.train_ratio < 1 or self.holdout_ratio > 0
        return {
            "branch": self.branch.name,
            "network": network,
            "settings": {name: value for name, value in self.settings.items() if name not in SCORING},
            "train_ratio": self.train_ratio,
            "holdout_ratio": self.holdout_ratio,
            "seed": self.seed if chosen else None,
            "roi": self.roi and self.roi.to_text(),
            "bit_depth": self.bit_depth,
        }

    def fit(self, category: Category, run: RunSettings, weights: str | None) -> Branch:
        """Fit it, as the training scripts do."""
        backbone = build_backbone(
            self.network, run.device, weights=weights, precision=run.precision, flag=weights_flag(self.branch.name)
        )
        split = SplitSettings(self.train_ratio, self.holdout_ratio, self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too few images for the covariance: the first training has warned
            return fit_branch(run, category, split, self._built(backbone, self.settings))

    def mapper(self, **scoring: Any) -> Branch:
        """A branch without weights that makes maps of measured patch scores, perhaps with other `SCORING` settings."""
        return self._built(_outline(self.network), self.settings | scoring)

    def _built(self, backbone: Backbone, settings: dict[str, Any]) -> Branch:
        branch = self.branch(backbone, **settings)
        branch.roi, branch.bit_depth = self.roi, self.bit_depth
        return branch


@functools.lru_cache(maxsize=16)
def _outline(network: BackboneSpec):
    return empty_backbone(network)
