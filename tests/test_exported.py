"""export_onnx.py and predict_onnx.py: one file that predicts what PyTorch does, on a machine without PyTorch."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import PATIENCE
from PIL import Image
from stand_in import normalised
from tiny import ROOT, draw_category, draw_frame, end_well, read_json, read_rows, refusal, small_flags, succeed

from models import USAD
from models.branches.postprocess import resize_images
from models.exported import operators
from models.exported.export import Exportable, halve_weights
from models.exported.model import OnnxModel, as_input
from models.exported.proof import Compared, Tolerance, prove, settle_thresholds
from models.fusion.prediction import Prediction
from models.networks.kernels import torchs_own_kernels
from training import exporting
from utils.errors import InputError

onnx, *_ = (
    pytest.importorskip(package, reason="the export needs requirements-export.txt")
    for package in ("onnx", "onnxscript", "onnxruntime")
)
SHRUNK = ("--covariance", "ledoit-wolf")  # few images: a singular covariance would magnify rounding
TRAININGS = {  # a network of each kind
    "train_ma_clu": ("--weights", "random", "--backbone", "test_vit", "--image-size", 64, *SHRUNK),
    "train_ma2patch": ("--weights", "random", "--backbone", "test_resnet", "--image-size", 96, *SHRUNK),
    "train_pc": ("--weights", "demo", "--image-size", 64, "--tiles", 2),
}
SIDE = 112  # of the largest frame: 2 tiles of 64 pixels that overlap by a quarter


def flags(root: Path) -> list:
    return ["--data-root", root / "data", "--models-dir", root / "models", "--category", "belt"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with data/belt, models/belt (standardized, with a region of interest and thresholds), and belt.onnx."""
    root = tmp_path_factory.mktemp("exported")
    draw_category(root / "data" / "belt")
    roi = np.zeros((56, 72), np.uint8)
    roi[:, 9:] = 255
    Image.fromarray(roi).save(root / "roi.png")
    training = [*small_flags(root, "train_any"), "--roi", root / "roi.png", "--holdout-ratio", 0.5, "--no-eval"]
    for script, network in TRAININGS.items():
        end_well(script, *training, *network)
    succeed(root, "test_fusion", "--fusion", "standardized", "--false-alarm-rate", 0.3, "--no-images")
    finished = end_well("export_onnx", *flags(root), "--out", root / "belt.onnx")
    assert "4 held-out and 4 training frames (fewer than 64" in finished.out
    return root


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """Frames that no model has seen, some with something bright."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng()
    for index in range(6):
        frame = draw_frame(rng, 120, 90)
        if index % 2:
            frame[40:60, 50:80] = rng.integers(150, 255, 3)
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def test_rows_and_pictures_are_those_of_predict(home, frames, tmp_path):
    ours, torchs = tmp_path / "ours", tmp_path / "torchs"
    end_well("predict", frames, *flags(home)[2:], "--out", torchs)
    end_well("predict_onnx", home / "belt.onnx", frames, "--out", ours)
    for own, other in zip(read_rows(ours / "predictions.csv"), read_rows(torchs / "predictions.csv"), strict=True):
        assert float(own.pop("score")) == pytest.approx(float(other.pop("score")), rel=1e-4)
        assert own == other
    assert any(row["boxes"] != "[]" for row in read_rows(ours / "predictions.csv"))
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (ours, torchs)]
    assert names[0] == names[1] and Path("report.html") in names[0]
    scripts = [read_json(folder / "config.json")["script"] for folder in (ours, torchs)]
    assert scripts == ["predict_onnx.py", "predict.py"]


def test_any_number_of_frames_at_a_time(home):
    usad, model = USAD.load(home / "models" / "belt"), OnnxModel.load(home / "belt.onnx")
    assert model.roi == usad.roi and model.operating_point.fusion == usad.settings()
    for count in (1, 3):
        images = torch.rand(count, 3, usad.image_size, usad.image_size)
        parts = usad.predict_parts(normalised(images))
        names = OnnxModel.output_names(list(parts))
        found = dict(zip(names, model.session.run(names, {"images": images.numpy()}), strict=True))
        assert names[:4] == ["score", "map", "ma_clu_score", "ma_clu_map"]
        for part, prefix in zip(parts.values(), ("", "ma_clu_", "ma2patch_", "pc_"), strict=True):
            np.testing.assert_allclose(found[f"{prefix}score"], part.scores, rtol=1e-4)
            span = part.maps.amax((1, 2), keepdim=True) - part.maps.amin((1, 2), keepdim=True)
            assert (np.abs(found[f"{prefix}map"] - part.maps.numpy()) <= 1e-3 * span.numpy()).all()


def test_what_is_traced_is_the_same_by_any_rule(home):
    folder, rng = home / "models" / "belt", np.random.default_rng(4)
    images = torch.from_numpy(as_input([Image.fromarray(draw_frame(rng, 120, 90)) for _ in range(2)], SIDE))
    with torchs_own_kernels():
        expected = USAD.load(folder, fusion="paper").predict_parts(normalised(images))
    with torchs_own_kernels(), operators.WithOperatorsOfONNX(), torch.no_grad():
        found = Exportable(USAD.load(folder, fusion="paper"))(images)
    for part, score, maps in zip(expected.values(), found[::2], found[1::2], strict=True):
        # A covariance of a few images magnifies rounding a thousandfold.
        torch.testing.assert_close(score, part.scores.double(), rtol=1e-2, atol=0)
        torch.testing.assert_close(maps, part.maps, rtol=0, atol=1e-2 * float(part.maps.max()))


def test_half_the_size(home, tmp_path):
    path = Path(shutil.copy(home / "belt.onnx", tmp_path / "belt.onnx"))
    pictures = [Image.open(file) for file in sorted((home / "data" / "belt" / "train" / "good").iterdir())]
    halve_weights(path)
    assert path.stat().st_size < 0.9 * (home / "belt.onnx").stat().st_size
    expected, found = (OnnxModel.load(file)(pictures) for file in (home / "belt.onnx", path))
    scores = [[[score for score, _ in one.branches.values()] for one in every] for every in (expected, found)]
    assert scores[0] != scores[1]
    np.testing.assert_allclose(scores[1], scores[0], rtol=exporting.TOLERANCES["fp16"].score)


def test_integers_are_refused(home, tmp_path):
    said = refusal("export_onnx", *flags(home), "--out", tmp_path / "belt.onnx", "--precision", "int8")
    assert "take fp32 or fp16" in said


def test_without_pytorch(home, frames, tmp_path):
    """In an environment of requirements-edge.txt alone, as far as imports can tell."""
    listed = {"torch", "torchvision", "timm", "scipy", "sklearn", "safetensors", "matplotlib", "onnx", "onnxscript"}
    code = "import sys, runpy; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(','))); "
    code += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script = [sys.executable, "-c", code, ",".join(listed), ROOT / "predict_onnx.py"]
    arguments = [home / "belt.onnx", frames, "--out", tmp_path / "out"]
    finished = subprocess.run(
        [*script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert len(read_rows(tmp_path / "out" / "predictions.csv")) == 6 and (tmp_path / "out" / "report.html").is_file()


def test_a_graph_that_computes_something_else_gets_no_name(home, tmp_path, monkeypatch):
    def tampered(_, path):
        model = onnx.load(home / "belt.onnx")
        weights = next(tensor for tensor in model.graph.initializer if "qkv.weight" in tensor.name)
        weights.raw_data = (1.01 * onnx.numpy_helper.to_array(weights)).astype(np.float32).tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(exporting, "write_graph", tampered)
    said = refusal("export_onnx", *flags(home), "--out", tmp_path / "belt.onnx")
    assert "does not agree" in said and "train/good/00" in said.replace("\\", "/")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["belt.txt", "belt.onnx"])
def test_files_of_others_stay(home, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    assert str(tmp_path / name) in refusal("export_onnx", *flags(home), "--out", tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_missing_package_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "installed_version", lambda name: None if name == "onnxscript" else "1")
    said = refusal("export_onnx", *flags(home), "--out", tmp_path / "belt.onnx")
    assert "pip install -r requirements-export.txt" in said


def onnx_file(change):
    """Damage to a file: `change` is called with the loaded one."""

    def spoil(path):
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)

    return spoil


def described(change):
    """Damage to a file's metadata: `change` is called with them."""

    def spoil(model):
        (entry,) = model.metadata_props
        description = json.loads(entry.value)
        change(description)
        entry.value = json.dumps(description)

    return onnx_file(spoil)


def point(name, value):
    return described(lambda description: description["operating_point"].update({name: value}))


SPOILT = {
    "absent": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "foreign": onnx_file(lambda model: model.metadata_props.pop()),
    "nested": onnx_file(lambda model: setattr(model.metadata_props[0], "value", "[" * 100_000)),
    "no size": described(lambda description: description.pop("image_size")),
    "another size": described(lambda description: description.update(image_size=SIDE // 2)),
    "another branch": described(lambda description: description["branches"].update(other={})),
    "no such bit depth": described(lambda description: description.update(bit_depth=3)),
    "no threshold": point("threshold", float("nan")),  # above which no score would lie
    "a threshold of the map without end": point("pixel_threshold", float("inf")),
    "a threshold in quotes": point("threshold", "2.5"),
    "half an interval": point("interval", [0.1]),
    "no rule": point("fusion", None),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_files_that_are_no_models(home, frames, tmp_path, kind):
    path = shutil.copy(home / "belt.onnx", tmp_path / "belt.onnx")
    SPOILT[kind](path)
    assert str(path) in refusal("predict_onnx", path, frames, "--out", tmp_path / "out")


class Answers:
    """A model that gives stored scores."""

    def __init__(self, scores, threshold):
        self.scores, self.operating_point = iter(scores), None
        self.threshold = self.pixel_threshold = threshold

    def __call__(self, images):
        score = next(self.scores)
        return [Prediction(score, np.float32([[0, score]]), {})]


FRAME = types.SimpleNamespace(path="frame.png", read=lambda: None)  # a sample without a file


def test_thresholds_stay_above_the_frames_they_came_from():
    """The frame of score 2 has one a bit higher in a batch of another size: the threshold came from 1.99999."""
    limit = 1.99999
    original, exported = Answers([1.0, 2.0, 3.0], limit), Answers([1.0, 2.00001, 3.0], limit)
    proof = prove(original, exported, [FRAME] * 3, Tolerance(1e-4, 1e-3, 1e-3))
    settle_thresholds(original, exported, proof, 1e-4)
    assert 2.00001 < exported.threshold < 2.0001 and 2.00001 < exported.pixel_threshold < 2.0001
    with pytest.raises(InputError, match="about an alarm"):
        both = (2.1, 1.9), (2.1, 1.9)
        settle_thresholds(original, exported, [Compared(FRAME, *both, Tolerance(0, 0, 0), (0, 0))], 1e-4)


def test_operators():
    x = torch.cat([torch.linspace(-40, 10, 501), -torch.logspace(1, 5, 20)]).double()
    torch.testing.assert_close(operators.log_ndtr(x), torch.special.log_ndtr(x), rtol=1e-11, atol=1e-15)
    images = torch.rand(2, 3, 90, 90)
    for size in (31, 64):
        torch.testing.assert_close(operators.resize_antialiased(images, (size, size)), resize_images(images, size))
    for values in (torch.rand(3, 9), torch.rand(3, 8)):
        for k in (1, 2, 8):
            torch.testing.assert_close(operators.kth_smallest(values, k), tuple(values.kthvalue(k)))
        torch.testing.assert_close(operators.median(values, 1), tuple(values.median(1)))
