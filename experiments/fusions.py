"""Points of the grid that fuse branches, and the tables made of them: ablation and sensitivity."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from experiments import SWEEPS
from experiments.cells import Cell, Row, Section, Table
from experiments.measurements import Measurements
from experiments.variants import Variant
from metrics.image import image_metrics
from models import MACLU, USAD, PatchCore
from models.branches.part import Part
from models.networks.backbones import size_step

DEFINED = "Figures are fractions; docs/figures.md defines each."
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
IN_FORCE = "the value in force"


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The branches by name, which of them (`parts`) are fused, and how (`settings`, the arguments of USAD)."""

    variants: dict[str, Variant]
    settings: dict[str, Any]
    parts: tuple[str, ...]
    scoring: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by branch, for its maps

    @property
    def size(self) -> int:
        """Side of the square at which test images are loaded and maps are evaluated, as in test_fusion.py."""
        return max(variant.network.image_size for variant in self.variants.values())

    def usad(self, statistics: dict[str, dict[str, float] | None]) -> USAD:
        """The fusion of the parts without networks, with the held-out `statistics` of the branches."""
        branches = [self.variants[name].mapper(**self.scoring.get(name, {})) for name in self.parts]
        for branch in branches:
            branch.calibration = statistics.get(branch.name)
        return USAD(branches, **self.settings)

    def settled(self) -> Fusion:
        """The same with every setting of the rule written out. Raises InputError if the rule lacks something."""
        # So far it is only known whether there will be statistics.
        usad = self.usad({name: {} if variant.holdout_ratio else None for name, variant in self.variants.items()})
        return dataclasses.replace(self, settings=usad.settings())

    def with_variants(self, **changes: Any) -> Fusion:
        """The same with these changes to every variant."""
        variants = {name: variant.changed(**changes) for name, variant in self.variants.items()}
        return dataclasses.replace(self, variants=variants)

    def with_variant(self, name: str, **changes: Any) -> Fusion:
        return dataclasses.replace(self, variants={**self.variants, name: self.variants[name].changed(**changes)})

    def with_settings(self, **settings: Any) -> Fusion:
        return dataclasses.replace(self, settings={**self.settings, **settings})


class Bench:
    """Turns fusions into cells."""

    def __init__(self, measurements: Measurements, batch_size: int) -> None:
        self.measurements, self.images, self.batch_size = measurements, measurements.images, batch_size

    def cell(self, fusion: Fusion, maps: bool = True) -> Cell:
        """Image and pixel figures of a fusion, or of a branch if it is alone; without `maps` only the image figures."""
        measured = {name: self.measurements.needs(fusion.variants[name], fusion.size) for name in fusion.parts}
        needs = {
            "measured": measured,
            "mapped": {name: fusion.variants[name].settings | fusion.scoring.get(name, {}) for name in fusion.parts},
            "fusion": fusion.settings,
            "size": fusion.size,
            "maps": maps,
        }
        return Cell(needs, lambda: self._figures(fusion, maps))

    def _figures(self, fusion: Fusion, maps: bool) -> dict[str, Any]:
        measured = {name: self.measurements.of(fusion.variants[name], fusion.size) for name in fusion.parts}
        usad = fusion.usad({name: found.calibration for name, found in measured.items()})

        def found() -> Iterator[Part]:
            for start in range(0, len(self.images.samples), self.batch_size):
                parts = {}
                for branch in usad.branches:
                    scores, patches = (part[start : start + self.batch_size] for part in measured[branch.name][:2])
                    parts[branch.name] = (
                        Part(scores, *branch.anomaly_map(patches)).resized(fusion.size).inside(usad.roi)
                    )
                yield usad.fuse(parts) if len(parts) > 1 else parts[usad.branches[0].name]

        if maps:
            return self.images.figures(found(), usad.roi)
        return image_metrics(torch.cat([part.scores for part in found()]).numpy(), self.images.labels)


def ablation(bench: Bench, fusions: list[Fusion]) -> Table:
    """Every subset of the branches, and of the terms of the paper's image score; one of `fusions` for each seed."""
    names = fusions[0].parts
    subsets = [subset for count in range(1, len(names) + 1) for subset in itertools.combinations(names, count)]
    rows = [
        Row(
            {"branches": " + ".join(subset)},
            [(bench.cell(dataclasses.replace(fusion, parts=subset)),) for fusion in fusions],
        )
        for subset in subsets
    ]
    sections, remarks = [Section("Branches", rows)], ["A branch alone is measured by its own score and map.", DEFINED]
    if "score_weights" in fusions[0].settings:
        sections.append(Section("Terms of the image score", _score_terms(bench, fusions)))
        remarks.append("The pixel figures do not depend on the terms of the image score: the map is that of all.")
    return Table("ablation", "Ablation", FIGURES, sections, remarks)


def _score_terms(bench: Bench, fusions: list[Fusion]) -> list[Row]:
    settings = fusions[0].settings
    factors = {f"score of {name}": settings["score_weights"][name] for name in fusions[0].parts}
    factors["maximum of the map"] = settings["lambda_map"]
    terms = [term for term, factor in factors.items() if factor]
    rows = []
    for count in range(1, len(terms) + 1):
        for subset in itertools.combinations(terms, count):
            *weights, lambda_map = (factor if term in subset else 0.0 for term, factor in factors.items())
            settings = {"score_weights": dict(zip(fusions[0].parts, weights, strict=True)), "lambda_map": lambda_map}
            cells = [(bench.cell(f), bench.cell(f.with_settings(**settings), maps=False)) for f in fusions]
            label = " + ".join(f"{factors[term]:g} · {term}" for term in subset)
            rows.append(Row({"image score": label}, cells))
    return rows


class Sweep(NamedTuple):
    """One setting at several values; all others stay as they are."""

    title: str
    values: list[Any]
    current: Any  # the value in force; None if the branches differ in it
    at: Callable[[Fusion, Any], Fusion]
    maps: bool = True  # whether it changes the maps or only the scores


def sweeps(fusion: Fusion, kinds: list[str]) -> dict[str, Sweep]:
    """The sweeps of these `kinds` (of SWEEPS) that the fusion has, by name."""
    ma_clu, pc = (fusion.variants[branch.name].settings for branch in (MACLU, PatchCore))
    estimators = {variant.settings.get("covariance") for variant in fusion.variants.values()} - {None}
    ratios = {variant.train_ratio for variant in fusion.variants.values()}
    found = {
        "threshold": Sweep(
            "Foreground threshold (MACLU)",
            SWEEPS["threshold"],
            ma_clu["threshold"],
            lambda fusion, value: dataclasses.replace(fusion, scoring={MACLU.name: {"threshold": value}}),
        ),
        "coreset_ratio": Sweep(
            "Coreset ratio (PatchCore)",
            SWEEPS["coreset_ratio"],
            pc["coreset_ratio"],
            lambda fusion, value: fusion.with_variant(PatchCore.name, settings={"coreset_ratio": value}),
        ),
        "covariance": Sweep(
            "Covariance estimator (MACLU and MA2Patch)",
            SWEEPS["covariance"],
            estimators.pop() if len(estimators) == 1 else None,
            _with_covariance,
        ),
        "train_ratio": Sweep(
            "Share of the training images, of all branches",
            SWEEPS["train_ratio"],
            ratios.pop() if len(ratios) == 1 else None,
            lambda fusion, value: fusion.with_variants(train_ratio=value),
        ),
    }
    if "score_weights" in fusion.settings:
        found["lambda_obj"] = Sweep(
            "λ_obj, the factor of MACLU's score",
            SWEEPS["lambda_obj"],
            fusion.settings["score_weights"][MACLU.name],
            lambda fusion, value: fusion.with_settings(
                score_weights={**fusion.settings["score_weights"], MACLU.name: value}
            ),
            maps=False,
        )
    if "lambda_map" in fusion.settings:
        found["lambda_map"] = Sweep(
            "λ_M, the factor of the map's maximum",
            SWEEPS["lambda_map"],
            fusion.settings["lambda_map"],
            lambda fusion, value: fusion.with_settings(lambda_map=value),
            maps=False,
        )
    for name, variant in fusion.variants.items():
        size, step = variant.network.image_size, size_step(variant.network)
        found[f"image_size_{name}"] = Sweep(
            f"Input resolution of {name} in pixels",
            [max(round(size * factor / step), 1) * step for factor in SWEEPS["image_size"]],
            size,
            lambda fusion, value, name=name: fusion.with_variant(name, image_size=value),
        )
    return {name: found[name] for kind in SWEEPS if kind in kinds for name in found if name.startswith(kind)}


def _with_covariance(fusion: Fusion, value: str) -> Fusion:
    for name, variant in fusion.variants.items():
        if "covariance" in variant.settings:
            fusion = fusion.with_variant(name, settings={"covariance": value})
    return fusion


def sensitivity(bench: Bench, fusions: list[Fusion], kinds: list[str]) -> Table:
    """The fusion's figures along each of the sweeps of these `kinds`."""
    sections = []
    for name, sweep in sweeps(fusions[0], kinds).items():
        rows = []
        added = [] if sweep.current is None else [sweep.current]
        for value in sorted({*sweep.values, *added}):
            cells = [bench.cell(sweep.at(fusion, value), sweep.maps) for fusion in fusions]
            seeds = [(cell,) if sweep.maps else (bench.cell(f), cell) for f, cell in zip(fusions, cells, strict=True)]
            label = value if isinstance(value, str) else f"{value:g}"
            rows.append(Row({"value": label}, seeds, note=IN_FORCE if value == sweep.current else ""))
        sections.append(Section(sweep.title, rows, plot=f"sensitivity_{name}.png"))
    remarks = [
        "Each sweep changes one setting of the fusion and leaves the others as the checkpoints have them; branches are "
        "fitted again where the setting takes part in the fit.",
        "Maps are evaluated at the largest input of the three branches, as test_fusion.py does it.",
        DEFINED,
    ]
    return Table("sensitivity", "Sensitivity", FIGURES, sections, remarks)
