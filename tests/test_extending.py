"""A branch, a fusion rule, a metric and a data set from outside: a class, and a line in a registry."""

import shutil
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from stand_in import StandIn
from tiny import draw_category, end_well, read_json, read_rows, refusal, small_flags, succeed
from torch import nn

from datasets import DOWNLOADS
from metrics import METRICS
from metrics.metric import Metric
from models import BRANCHES, USAD
from models.branches.branch import Branch
from models.fusion import RULES
from models.fusion.rule import FusionRule
from utils.errors import InputError
from utils.settings import settings_from

HERE = "test_extending"


class Brightness(Branch):
    """How far each patch's mean token is from the mean of the training patches."""

    name = "brightness"
    score_weight = 0.5

    def __init__(
        self, backbone: nn.Module, power: float = 2, label: str | None = None, depth: int | None = None
    ) -> None:
        super().__init__(backbone)
        self.power, self.label, self.depth = power, label, depth

    def fit(self, loader):
        self.mean = torch.cat([self.extract(batch["image"]) for batch in loader]).mean((0, 1))

    def extract(self, images):
        return self.backbone(images)[1]

    def patch_scores(self, features):
        patches = (features - self.mean).abs().pow(self.power).mean(-1)
        return patches.amax(1), patches.unflatten(1, self.backbone.grid)

    def anomaly_map(self, patches):
        maps = torch.nn.functional.interpolate(patches[:, None], size=(self.tile_size,) * 2)[:, 0]
        return maps, None, None

    def state(self):
        return {"mean": self.mean}

    def load_state(self, tensors):
        self.mean = tensors["mean"]


class Loudest(FusionRule):
    """The highest score and, at each pixel, the highest map, each times a gain."""

    name = "loudest"

    def __init__(self, branches, gain: float = 3.0, word: str = "loud", cap: float | None = None) -> None:
        super().__init__(branches)
        self.gain, self.word, self.cap = gain, word, cap

    def fuse(self, parts):
        scores = torch.stack([part.scores.double() for part in parts.values()]).amax(0)
        return self.gain * scores, self.gain * torch.stack([part.maps for part in parts.values()]).amax(0)


class HighestNormal(Metric):
    """The highest score of a normal image."""

    protocols = {"highest_normal": "highest score of a normal image"}  # noqa: RUF012

    def __init__(self) -> None:
        self.scores = np.zeros(0)

    def update(self, maps, masks, anomalous, scores, inside=None):
        self.scores = np.append(self.scores, np.asarray(scores)[~np.asarray(anomalous)])

    def compute(self):
        return {"highest_normal": np.float32(self.scores.max()) if len(self.scores) else None}

    def state(self):
        return {"scores": self.scores}

    def merge(self, state: Mapping[str, np.ndarray]):
        self.scores = np.append(self.scores, state["scores"])


def draw_far_belt(root):
    """A "download"."""
    if not (root / "far_belt").exists():
        draw_category(root / "far_belt", seed=3)


def figures(root, part="fusion"):
    return read_json(root / "result/belt" / part / "metrics.json")


def fuse(root, *flags):
    succeed(root, "test_fusion", *flags)
    return figures(root)


def ablation(root, *flags):
    succeed(root, "reproduce_tables", "--tables", "ablation", *flags)
    return read_json(root / "result/belt/tables/ablation.json")["sections"]


@pytest.fixture
def fourth(monkeypatch):
    monkeypatch.setitem(BRANCHES, "brightness", f"{HERE}:Brightness")


@pytest.mark.parametrize(
    ("branch", "flag", "value"),
    [
        *(("pc", *given) for given in (("--coreset-ratio", 2), ("--coreset-ratio", 0), ("--neighbors", 0))),
        *((branch, "--covariance", "foo") for branch in ("ma_clu", "ma2patch")),
    ],
)
def test_settings_out_of_range_are_refused(workplace, branch, flag, value):
    assert flag in refusal("training.__main__", branch, *small_flags(workplace, f"train_{branch}"), flag, value)


def test_a_fourth_branch_from_training_to_tables(workplace, fourth):
    three = fuse(workplace, "--no-images")
    assert set(three["branches"]) == {"ma_clu", "ma2patch", "pc"}  # folders of three checkpoints stay valid
    flags = small_flags(workplace, "train_ma_clu")
    end_well("training.__main__", "brightness", *flags, "--power", 1.5, "--depth", 3)
    assert (workplace / "models/belt/brightness.safetensors").is_file()
    assert "'brightness' cannot take in new frames" in refusal("training.__main__", "brightness", *flags, "--update")
    assert figures(workplace, "brightness")["image_auroc"] is not None
    four = fuse(workplace)
    assert set(four["branches"]) == {"ma_clu", "ma2patch", "pc", "brightness"}
    assert four["branches"]["pc"]["image_auroc"] == three["branches"]["pc"]["image_auroc"]
    report = (workplace / "result/belt/fusion/report.html").read_text(encoding="utf-8")
    assert "brightness" in report.lower()
    usad = USAD.load(workplace / "models/belt")
    added = usad.branches[-1]
    assert (added.name, added.power, added.label, added.depth) == ("brightness", 1.5, None, 3)
    assert usad.rule.score_weights["brightness"] == 0.5
    assert len(ablation(workplace)[0]["rows"]) == 15
    assert "no.pth" in refusal("test_fusion", *small_flags(workplace, "test_fusion"), "--brightness-weights", "no.pth")


class Unkept(Brightness):
    def __init__(self, backbone: nn.Module, scale: float = 2.0) -> None:
        super().__init__(backbone)


class Flag(Brightness):
    def __init__(self, backbone: nn.Module, batch_size: int = 8) -> None:
        super().__init__(backbone)


class Pair(Brightness):
    def __init__(self, backbone: nn.Module, levels: tuple[int] = (1,)) -> None:
        super().__init__(backbone)


class Forgetful(Brightness):
    state = Branch.state


class Optional(Brightness):
    def __init__(self, backbone: nn.Module, *, power: float = 2, depth: int | None = 3) -> None:
        super().__init__(backbone, power, depth=depth)


def test_settings_are_restored_as_their_types():
    settings = Optional(StandIn(16, (2, 2), 4), depth=None).settings()
    assert str(settings_from(Optional, settings)) == "{'power': 2.0, 'depth': None}"


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        ("Unkept", "keep its setting 'scale' as self.scale"),
        ("Flag", "each training has a flag --batch-size"),
        ("Pair", "annotate its setting 'levels' as bool, int, float or str"),
        ("Forgetful", "lacks state and load_state"),
    ],
)
def test_a_branch_that_cannot_be_stored_is_refused_before_the_fit(workplace, monkeypatch, branch, reason):
    monkeypatch.setitem(BRANCHES, "brightness", f"{HERE}:{branch}")
    monkeypatch.setattr(Brightness, "fit", None)
    assert reason in refusal("training.__main__", "brightness", *small_flags(workplace, "train_ma_clu"))


def test_a_fourth_branch_in_the_benchmark(fourth, tmp_path):
    flags = ["--quick", "--stages", "extract,fused", "--sizes", "extract=1", "fused=1", "--device", "cpu"]
    end_well("benchmarks.run", *flags, "--out", tmp_path)
    *networks, fused = read_json(tmp_path / "results.json")["rows"]
    assert len(networks) == 4 and networks[3]["stage"] == networks[0]["stage"]  # the network of its kind
    assert fused["ours"] > 0 and fused["reference"] is None


def test_a_rule(workplace, monkeypatch):
    monkeypatch.setitem(RULES, "loudest", f"{HERE}:Loudest")
    before = fuse(workplace, "--no-images")
    fused = fuse(workplace, "--fusion", "loudest", "--no-images")
    assert read_json(workplace / "result/belt/fusion/config.json")["settings"]["gain"] == 3.0
    assert fused["branches"]["pc"] == before["branches"]["pc"]  # a rule changes nothing of the branches
    for row in read_rows(workplace / "result/belt/fusion/scores.csv"):
        score, *parts = map(float, list(row.values())[2:])
        assert score == pytest.approx(3 * max(parts))
    flags = [*small_flags(workplace, "test_fusion"), "--fusion", "loudest", "--lambda-map", 2]
    assert "--lambda-map has no effect" in refusal("test_fusion", *flags)
    assert [section["title"] for section in ablation(workplace, "--fusion", "loudest")] == ["Branches"]
    fuse(workplace, "--fusion", "loudest", "--false-alarm-rate", 0.2)
    for options in ({}, {"gain": 3.0}):  # usad.json names the rule
        usad = USAD.load(workplace / "models/belt", **options)
        assert usad.rule.settings() == {"gain": 3.0, "word": "loud", "cap": None} and usad.threshold is not None
    with pytest.raises(InputError, match="no settings of the fusion loudest"):
        USAD.load(workplace / "models/belt", volume=1.0)


def test_a_metric(workplace, monkeypatch):
    monkeypatch.setitem(METRICS, "highest_normal", f"{HERE}:HighestNormal")
    fused = fuse(workplace)
    rows = read_rows(workplace / "result/belt/fusion/scores.csv")
    normal = [float(row["score"]) for row in rows if row["label"] == "0"]
    assert fused["highest_normal"] == pytest.approx(max(normal))
    assert all("highest_normal" in branch for branch in fused["branches"].values())
    report = (workplace / "result/belt/fusion/report.html").read_text(encoding="utf-8")
    assert "highest score of a normal image" in report


def test_a_data_set_with_a_download(tmp_path, monkeypatch):
    monkeypatch.setitem(DOWNLOADS, "far_belt", f"{HERE}:draw_far_belt")
    (tmp_path / "data").mkdir()
    succeed(tmp_path, "train_pc", "--no-eval", categories=["far_belt"])
    assert (tmp_path / "models/far_belt/pc.safetensors").is_file()
    shutil.rmtree(tmp_path / "data/far_belt")
    monkeypatch.undo()
    assert "no category folder" in refusal("train_pc", *small_flags(tmp_path, "train_pc", "far_belt"), "--no-eval")
