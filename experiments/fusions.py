"""Points of the grid that fuse branches, and the tables made of them: ablation and sensitivity."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from experiments import SWEEPS
from experiments.measurements import Measured, Measurements
from experiments.table import IN_FORCE, Cell, Row, Section, Table
from experiments.variants import Variant
from models import MACLU, USAD
from models.branches.part import Part
from models.networks.spec import BackboneSpec
from models.networks.wavelets import SIZE_STEP
from training.options import fusion_record

DEFINED = "Metrics are fractions; docs/metrics.md defines each."
FIGURES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1",
    "aupro": "AUPRO",
    "pro_as_published": "PRO as published",
}


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The branches by name, which of them (`parts`) are fused, and how (`settings`, the arguments of USAD)."""

    variants: dict[str, Variant]
    settings: dict[str, Any]
    parts: tuple[str, ...]

    @property
    def size(self) -> int:
        """Side of the square at which test images are loaded and maps are evaluated, as in test_fusion.py."""
        return max(variant.network.image_size for variant in self.variants.values())

    @property
    def rule_in_words(self) -> str:
        return f"Fused by --fusion {self.settings['fusion']}."

    def usad(self, statistics: dict[str, dict[str, float] | None]) -> USAD:
        """The fusion of the parts without networks, with the held-out `statistics` of the branches."""
        branches = [self.variants[name].built() for name in self.parts]
        for branch in branches:
            branch.calibration = statistics.get(branch.name)
        settings = dict(self.settings)
        if "score_weights" in settings:
            settings["score_weights"] = {k: v for k, v in settings["score_weights"].items() if k in self.parts}
        return USAD(branches, **settings)

    def settled(self) -> Fusion:
        """The same with every setting of the rule written out. Raises InputError if the rule lacks something."""
        # So far it is only known whether there will be statistics.
        held_out = {name: {} if variant.split.holdout_ratio else None for name, variant in self.variants.items()}
        return dataclasses.replace(self, settings=self.usad(held_out).settings())

    def only(self, *parts: str) -> Fusion:
        return dataclasses.replace(self, parts=parts)

    def in_force(self, setting: str, owner: str | None) -> set[Any]:
        """The values of a setting of the rule, or of one branch (None: of all), which may differ in it."""
        rule = fusion_record(self.settings)
        if setting in rule:
            return {rule[setting]} - {None}
        variants = [variant for name, variant in self.variants.items() if owner in (name, None)]
        return {variant.values[setting] for variant in variants if setting in variant.values}

    def changed(self, setting: str, value: Any, owner: str | None = None) -> Fusion:
        """The same with another value of a setting of the rule, or of one branch (None: of all)."""
        if setting == "lambda_obj":
            setting, value = "score_weights", {**self.settings["score_weights"], MACLU.name: value}
        if setting in self.settings:
            return dataclasses.replace(self, settings={**self.settings, setting: value})
        variants = {
            name: variant.changed(setting, value) if owner in (name, None) else variant
            for name, variant in self.variants.items()
        }
        return dataclasses.replace(self, variants=variants)


def cell(measurements: Measurements, fusion: Fusion) -> Cell:
    """The figures of a fusion, or of a branch if it is alone."""
    variants = {name: fusion.variants[name] for name in fusion.parts}
    needs = {
        "measured": {name: measurements.needs(variant, fusion.size) for name, variant in variants.items()},
        "mapped": {name: variant.settings for name, variant in variants.items()},
        "fusion": fusion.settings,
        "size": fusion.size,
    }

    def compute() -> dict[str, Any]:
        measured = {name: measurements.of(variant, fusion.size) for name, variant in variants.items()}
        usad = fusion.usad({name: found.calibration for name, found in measured.items()})
        return measurements.figures(fused(usad, measured, measurements.run.batch_size, fusion.size), usad.roi)

    return Cell(needs, compute)


def fused(usad: USAD, measured: dict[str, Measured], batch_size: int, size: int) -> Iterator[Part]:
    """The fusion of what was measured, in batches, or the one branch; maps [B, size, size]."""
    for start in range(0, len(measured[usad.branches[0].name].scores), batch_size):
        parts = {}
        for branch in usad.branches:
            scores, patches = (part[start : start + batch_size] for part in measured[branch.name][:2])
            parts[branch.name] = branch.part(scores, patches).resized(size).inside(usad.roi)
        yield usad.fuse(parts) if len(parts) > 1 else parts[branch.name]


def subsets(names: tuple[str, ...] | list[str]) -> list[tuple[str, ...]]:
    """All but the empty one, the smallest first."""
    return [subset for count in range(1, len(names) + 1) for subset in itertools.combinations(names, count)]


def ablation(measurements: Measurements, fusions: list[Fusion]) -> Table:
    """Every subset of the branches, and of the terms of the paper's image score; one of `fusions` for each seed."""
    rows = [
        Row(" + ".join(parts), [cell(measurements, fusion.only(*parts)) for fusion in fusions])
        for parts in subsets(fusions[0].parts)
    ]
    sections, remarks = [Section("Branches", "branches", rows)], [fusions[0].rule_in_words, DEFINED]
    remarks.append("A branch alone is measured by its own score and map.")
    if "score_weights" in fusions[0].settings:
        sections.append(Section("Terms of the image score", "image score", _score_terms(measurements, fusions)))
        remarks.append("The pixel figures do not depend on the terms of the image score: the map is that of all.")
    return Table("ablation", FIGURES, sections, remarks)


def _score_terms(measurements: Measurements, fusions: list[Fusion]) -> list[Row]:
    settings, names = fusions[0].settings, fusions[0].parts
    factors = {f"score of {name}": settings["score_weights"][name] for name in names}
    factors["maximum of the map"] = settings["lambda_map"]
    rows = []
    for terms in subsets([term for term, factor in factors.items() if factor]):
        *weights, lambda_map = (factor if term in terms else 0.0 for term, factor in factors.items())
        weights = dict(zip(names, weights, strict=True))
        chosen = [f.changed("score_weights", weights).changed("lambda_map", lambda_map) for f in fusions]
        label = " + ".join(f"{factors[term]:g} · {term}" for term in terms)
        rows.append(Row(label, [cell(measurements, fusion) for fusion in chosen]))
    return rows


def sensitivity(measurements: Measurements, fusions: list[Fusion], kinds: list[str]) -> Table:
    """The fusion's figures at several values of one setting after the other; `kinds` are of SWEEPS."""
    swept = [(kind, *SWEEPS[kind]) for kind in kinds if kind != "image_size"]
    for name, variant in fusions[0].variants.items() if "image_size" in kinds else ():
        size, step = variant.network.image_size, _size_step(variant.network)
        sizes = [max(round(size * factor / step), 1) * step for factor in SWEEPS["image_size"].values]
        swept.append(("image_size", SWEEPS["image_size"].title.format(name), sizes, name))
    sections = []
    for setting, title, values, owner in swept:
        current = fusions[0].in_force(setting, owner)
        if not current:  # without a value it is another rule's
            continue
        rows = []
        for value in sorted({*values, *(current if len(current) == 1 else ())}):
            cells = [cell(measurements, fusion.changed(setting, value, owner)) for fusion in fusions]
            label = value if isinstance(value, str) else f"{value:g}"
            rows.append(Row(label, cells, IN_FORCE if {value} == current else ""))
        suffix = f"_{owner}" if setting == "image_size" else ""
        sections.append(Section(title, "value", rows, plot=f"sensitivity_{setting}{suffix}.png"))
    remarks = [
        "Each sweep changes one setting of the fusion and leaves the others as the checkpoints have them; branches are "
        "fitted again where the setting takes part in the fit.",
        "Maps are evaluated at the largest input of the three branches, as test_fusion.py does it.",
        fusions[0].rule_in_words,
        DEFINED,
    ]
    return Table("sensitivity", FIGURES, sections, remarks)


def _size_step(network: BackboneSpec) -> int:
    """Input sizes must be multiples of this: a ViT's patch, else the 8 pixels between places of a stride-8 map."""
    if network.weights == "demo":
        return SIZE_STEP
    from models.networks import libraries

    return libraries.patch_side(network.name) or 8
