"""The scripts through their command lines on tiny drawn data: what is on disk when they have ended."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny import (
    NAMES,
    ROOT,
    SMALL_NETWORKS,
    contents,
    draw_category,
    read_json,
    read_rows,
    run_apart,
    run_in_process,
    saved_maps,
    succeed,
)

from models import USAD
from utils.checkpoint import load_checkpoint

FIGURES = [
    *("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max"),
    *("aupro", "pro_as_published", "n_images", "n_anomalous"),
]
BRANCH_OF = dict(zip(SMALL_NETWORKS, NAMES, strict=True))
PARTS = (*NAMES, "fusion")
IMAGE_SIZE = dict(zip(PARTS, (64, 96, 64, 96), strict=True))
FRAMES = [*(f"good/{index:03d}" for index in range(3)), *(f"rope/{index:03d}" for index in range(4))]


@pytest.fixture(scope="module")
def fused(trained, tmp_path_factory) -> Path:
    """A copy of the trained folder after test_fusion.py --save-maps."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("fused") / "belt of coal 煤")
    succeed(root, "test_fusion", "--save-maps")
    return root


def read_scores(root: Path, part: str, category: str = "belt") -> list[dict[str, str]]:
    return read_rows(root / "result" / category / part / "scores.csv")


def figures_of(root: Path, part: str, category: str = "belt") -> dict:
    return read_json(root / "result" / category / part / "metrics.json")


# What a run leaves behind


@pytest.mark.parametrize("part", PARTS)
def test_files(fused, part):
    folder = fused / "result" / "belt" / part
    expected = {"metrics.json", "scores.csv", "config.json"}
    expected |= {f"anomaly_maps/{name}.tiff" for name in FRAMES} | {f"heatmaps/{name}.png" for name in FRAMES}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == expected | ({"report.html", "sheet.jpg"} if part == "fusion" else set())


def test_files_of_an_image_whose_suffix_changes_stay(fused, tmp_path):
    root = shutil.copytree(fused, tmp_path / "copy")
    image = root / "data/belt/test/rope/000.png"
    Image.open(image).save(image.with_suffix(".bmp"))
    image.unlink()
    succeed(root, "test_fusion", "--save-maps")
    for name in ("heatmaps/rope/000.png", "anomaly_maps/rope/000.tiff"):
        assert (root / "result/belt/fusion" / name).is_file()


def test_files_of_images_that_are_gone_go_too(fused, tmp_path):
    root = shutil.copytree(fused, tmp_path / "copy")
    folder, images = root / "result/belt/fusion", root / "data/belt"
    for part, end in (("test", ".png"), ("ground_truth", "_mask.png")):
        (images / part / f"rope/000{end}").rename(images / part / f"rope/new{end}")
    succeed(root, "test_fusion", "--save-maps")
    names = sorted({*FRAMES, "rope/new"} - {"rope/000"})
    for kind in ("anomaly_maps", "heatmaps"):
        found = (path.relative_to(folder / kind).with_suffix("") for path in (folder / kind).rglob("*.*"))
        assert sorted(name.as_posix() for name in found) == names


@pytest.mark.parametrize("part", PARTS)
def test_metrics(fused, part):
    metrics, rows = figures_of(fused, part), read_scores(fused, part)
    assert list(metrics) == [*FIGURES, "branches" if part == "fusion" else "as_published"]
    assert (metrics["n_images"], metrics["n_anomalous"]) == (7, 4)
    for columns, figures in [("score", metrics), *metrics.get("branches", {}).items()]:
        labels, scores = [int(row["label"]) for row in rows], [float(row[columns]) for row in rows]
        assert figures["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert figures["image_ap"] == pytest.approx(average_precision_score(labels, scores))
        assert list(figures)[: len(FIGURES)] == FIGURES and all(0 <= figures[key] <= 1 for key in FIGURES[:-2])
    if part == "fusion":
        assert list(metrics["branches"]) == list(NAMES)


@pytest.mark.parametrize("part", PARTS)
def test_saved_maps_are_those_that_were_measured(fused, part):
    maps, masks = saved_maps(fused, part)
    assert maps.dtype == np.float32 and maps.shape == (len(FRAMES), IMAGE_SIZE[part], IMAGE_SIZE[part])
    maps, masks = np.ravel(maps), np.ravel(masks)
    metrics = figures_of(fused, part)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks, maps), abs=1e-6)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(masks, maps), abs=1e-6)
    if part == "ma2patch":  # the paper does not scale its maps
        assert metrics["as_published"] == {key: metrics[key] for key in metrics["as_published"]}


@pytest.mark.parametrize("part", PARTS)
def test_scores(fused, part):
    rows = read_scores(fused, part)
    branches = list(NAMES) if part == "fusion" else []
    assert list(rows[0]) == ["path", "label", "score", *branches]
    assert [row["path"] for row in rows] == [f"test/{name}.png" for name in FRAMES]
    assert [row["label"] for row in rows] == ["0"] * 3 + ["1"] * 4
    for row in rows:
        for column in ("score", *branches):
            assert repr(float(row[column])) == row[column]  # all digits of a double


def test_fused_score_is_made_of_the_columns_and_the_maps(fused):
    maps = fused / "result" / "belt" / "fusion" / "anomaly_maps"
    for row in read_scores(fused, "fusion"):
        rest = float(row["score"]) - 0.01 * float(row["ma_clu"]) - float(row["pc"])
        highest = np.asarray(Image.open(maps / row["path"].removeprefix("test/").replace(".png", ".tiff"))).max()
        assert highest <= rest + 1e-9 < 2 * highest  # the maximum is taken before the last blur


def test_heat_maps(fused):
    for part in ("ma_clu", "fusion"):
        with Image.open(fused / "result" / "belt" / part / "heatmaps" / "rope" / "000.png") as strip:
            assert strip.mode == "RGB" and strip.width > 4 * strip.height * 72 / 56 * 0.8
            pixels = np.asarray(strip)
        assert (pixels == 255).all(2).sum() > 100  # the region in the panel of the ground truth


def test_config(fused):
    for part in ("ma_clu", "ma2patch", "pc"):
        config = read_json(fused / "result" / "belt" / part / "config.json")
        settings = config["settings"]
        assert settings["seed"] == 22 and settings["image_size"] == IMAGE_SIZE[part]
        assert settings["batch_size"] == 4 and settings["workers"] == 0 and settings["device"] == "cpu"
        assert settings["holdout_ratio"] == 0.25 and settings["category"] == "belt"
        assert settings["train_ratio"] == (0.5 if part == "pc" else 1)
        assert config["backbone"]["precision"] == "fp32" and len(config["backbone"]["fingerprint"]) == 64
        assert {"python", "torch", "torchvision", "timm", "numpy"} <= set(config["versions"])
        assert config["device"].startswith("cpu") and config["peak_memory_mb"]["host"] > 50
        assert all(config["seconds"][stage] > 0 for stage in ("load", "extract", "score", "total"))
    config = read_json(fused / "result/belt/fusion/config.json")
    assert config["settings"]["lambda_obj"] == 0.01 and config["settings"]["fusion"] == "paper"
    assert set(config["branches"]) == {"ma_clu", "ma2patch", "pc"}
    assert config["branches"]["ma_clu"]["training"]["images"] == 6
    assert config["branches"]["pc"]["training"]["images"] == 3
    assert set(config["seconds"]["branches"]) == {"fusion", "ma_clu", "ma2patch", "pc"}


def test_the_report_says_that_the_networks_are_untrained(fused):
    assert "untrained" in (fused / "result/belt/fusion/report.html").read_text(encoding="utf-8")


def test_checkpoints_hold_tensors_and_json(trained):
    for script, branch in BRANCH_OF.items():
        path = trained / "models" / "belt" / f"{branch}.safetensors"
        with safe_open(path, "pt") as file:
            (content,) = map(json.loads, file.metadata().values())
        assert content["branch"] == branch and content["training"]["images"] == (3 if branch == "pc" else 6)
        assert content["calibration"]["images"] == 2
        assert content["backbone"]["image_size"] == SMALL_NETWORKS[script][3]
        assert content["backbone"]["mean"] == [0.485, 0.456, 0.406]
        if os.name == "posix":
            mask = os.umask(0)
            os.umask(mask)
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_same_seed_same_files_with_any_number_of_workers(fused, tmp_path):
    shutil.copytree(fused / "data", tmp_path / "data")
    for script in SMALL_NETWORKS:
        succeed(tmp_path, script, "--holdout-ratio", 0.25, "--batch-size", 4, "--workers", 3, "--save-maps")
    succeed(tmp_path, "test_fusion", "--workers", 3, "--save-maps")
    first, second = contents(fused), contents(tmp_path)
    for name in [name for name in first if name.endswith(("config.json", "report.html"))]:  # which tell the time
        del first[name], second[name]
    assert first == second and len(first) > 60


def test_another_seed_another_bank(workplace):
    path = workplace / "models" / "belt" / "pc.safetensors"
    before = load_checkpoint(path)[0]["bank"]
    succeed(workplace, "train_pc", "--holdout-ratio", 0.25, "--seed", 23, "--no-eval")
    assert (load_checkpoint(path)[0]["bank"] != before).any()


def test_what_is_printed(workplace):
    finished = succeed(workplace, "train_pc")
    for line in ("wrote", "image AUROC", "pixel AUROC", "AUPRO", "authors' protocol", "7 images, 4 anomalous"):
        assert line in finished.out
    assert str(workplace / "result" / "belt" / "pc") in finished.out


def test_standardized_fusion_and_factors(workplace):
    succeed(workplace, "test_fusion", "--fusion", "standardized", "--no-images")
    folder = workplace / "result" / "belt" / "fusion"
    assert not (folder / "heatmaps").exists() and not (folder / "report.html").exists()
    usad = USAD.load(workplace / "models" / "belt", fusion="standardized")
    for row in read_scores(workplace, "fusion"):
        (prediction,) = usad(workplace / "data" / "belt" / row["path"])
        assert float(row["score"]) == pytest.approx(prediction.score, rel=1e-4)
    succeed(workplace, "test_fusion", "--lambda-obj", 0, "--lambda-map", 0, "--no-images")
    for row in read_scores(workplace, "fusion"):
        assert float(row["score"]) == pytest.approx(float(row["pc"]), rel=1e-12)


def test_several_categories_and_their_average(workplace):
    draw_category(workplace / "data" / "second", seed=5, size=(40, 64))
    draw_category(workplace / "data" / "third", seed=6, anomalous=0)
    for script in (*SMALL_NETWORKS, "test_fusion"):
        categories = ("belt", "second", "third") if script == "test_fusion" else ("all",)
        assert "average of 3 categories" in succeed(workplace, script, "--no-images", categories=categories).out
    for part in (*BRANCH_OF.values(), "fusion"):
        average = read_json(workplace / "result" / f"average_{part}.json")
        metrics = [figures_of(workplace, part, name) for name in ("belt", "second", "third")]
        for key in FIGURES[:-2]:
            values = [figures[key] for figures in metrics if figures[key] is not None]
            assert len(values) == 2 and average[key] == pytest.approx(np.mean(values))
        assert average["n_images"] == 17 and list(average["categories"]) == ["belt", "second", "third"]


def test_without_anomalous_images_figures_are_null(workplace):
    for folder in ("test/rope", "ground_truth"):
        shutil.rmtree(workplace / "data" / "belt" / folder)
    succeed(workplace, "test_fusion")
    metrics = figures_of(workplace, "fusion")
    for figures in (metrics, *metrics["branches"].values()):
        assert [figures[key] for key in FIGURES] == [None] * 8 + [3, 0]
    assert len(read_scores(workplace, "fusion")) == 3


def test_only_anomalous_images(workplace):
    shutil.rmtree(workplace / "data" / "belt" / "test" / "good")
    succeed(workplace, "test_fusion")
    metrics = figures_of(workplace, "fusion")
    assert metrics["image_auroc"] is None and metrics["pixel_auroc"] is not None
    assert (metrics["n_images"], metrics["n_anomalous"]) == (4, 4)


def test_different_training_files_are_noticed(workplace):
    assert "different" not in succeed(workplace, "test_fusion", "--no-images").err
    (workplace / "data/belt/train/good/000.png").unlink()
    succeed(workplace, "train_pc", "--holdout-ratio", 0.25, "--no-eval")
    (line,) = succeed(workplace, "test_fusion", "--no-images").err.splitlines()
    assert line.startswith("warning:") and "different lists of files" in line


def test_fewer_images_than_channels_is_one_line_of_warning(workplace):
    (line,) = succeed(workplace, "train_ma_clu", "--no-eval").err.splitlines()
    assert line.startswith("warning: 8 training images for 64 channels") and "ledoit-wolf" in line
    assert succeed(workplace, "train_ma_clu", "--no-eval", "--covariance", "ledoit-wolf").err == ""


def test_no_eval_writes_the_checkpoint_only(workplace):
    shutil.rmtree(workplace / "result")
    shutil.rmtree(workplace / "data" / "belt" / "test")
    succeed(workplace, "train_pc", "--no-eval")
    assert not (workplace / "result").exists()


def test_a_second_run_replaces_the_first_ones_results_only(workplace):
    folder = workplace / "result" / "belt" / "pc"
    note = folder / "heatmaps" / "good" / "my notes.png"
    note.write_bytes(b"mine")
    before = (folder / "config.json").read_bytes()
    succeed(workplace, "train_pc")
    assert note.read_bytes() == b"mine" and (folder / "config.json").read_bytes() != before


def test_names_of_any_kind(tmp_path):
    root = tmp_path / "a folder, of coal 煤"
    folder = draw_category(root / "data" / "皮带 no. 1")
    long = "长" * 80 + ".png"
    (folder / "test/good/000.png").rename(folder / "test/good" / long)
    succeed(root, "train_pc", "--save-maps", categories=["皮带 no. 1"])
    assert f"test/good/{long}" in [row["path"] for row in read_scores(root, "pc", "皮带 no. 1")]
    assert (root / "result/皮带 no. 1/pc/anomaly_maps/good" / long).with_suffix(".tiff").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
def test_file_names_that_are_not_text(tmp_path):
    folder = draw_category(tmp_path / "data" / "belt")
    source = folder / "test/good/000.png"
    try:
        source.rename(os.fsdecode(os.fsencode(folder) + b"/test/good/\xff\xfe.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    succeed(tmp_path, "train_pc")
    assert len(read_scores(tmp_path, "pc")) == 7


# Each script as a process of its own


@pytest.mark.parametrize("script", [*BRANCH_OF, "test_fusion"])
def test_defaults_below_the_current_folder(workplace, tmp_path, monkeypatch, script):
    """With workers; a process of its own, in a terminal's environment, shows that one script is none of pytest's."""
    flags = ["--category", "belt", "--device", "cpu", "--batch-size", "3", "--workers", "1", "--no-images"]
    shutil.copytree(workplace / "models", tmp_path / "trained_models")
    shutil.copytree(workplace / "models", tmp_path / "saved_models")
    shutil.copytree(workplace / "data", tmp_path / "data")
    if script in BRANCH_OF:
        flags += ["--weights", "random", "--holdout-ratio", "0.25", *map(str, SMALL_NETWORKS[script])]
    if script == "train_pc":
        code, _, err = run_apart(ROOT / f"{script}.py", *flags, folder=tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        code, _, err = run_in_process(script, *flags)
    assert code == 0, err
    assert "Traceback" not in err and len(err.splitlines()) <= 1  # a warning at most
    part = BRANCH_OF.get(script, "fusion")
    assert set(figures_of(tmp_path, part)) >= set(FIGURES)
    if script in BRANCH_OF:
        name = f"belt/{part}.safetensors"
        saved = (root / name for root in (tmp_path / "trained_models", tmp_path / "saved_models"))
        first, second = (load_checkpoint(path)[0] for path in saved)
        assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in second.items()}


@pytest.mark.parametrize(
    "script", [*BRANCH_OF, "test_fusion", "reproduce_tables", "convert_published", "make_demo_data"]
)
def test_help_from_anywhere(tmp_path, script):
    code, out, err = run_apart(ROOT / f"{script}.py", "--help", folder=tmp_path)
    assert code == 0 and "--category" in out and err == ""


TALKS = """
import os, sys
from utils.command_line import run, warn
def main():
    warn("doubtful 煤")
    print("done", file=sys.stdout)
    with open("results", "w") as file:
        os.write(2, b"from a C library")
run(main)
"""


@pytest.mark.skipif(os.name != "posix", reason="no shell that closes streams")
@pytest.mark.parametrize(("closed", "left"), [("2>&-", "done\n"), (">&-", ""), ("<&- >&- 2>&-", "")])
def test_closed_streams(tmp_path, closed, left):
    """Messages stay out of the results, on stdout and in files."""
    command = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, TALKS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0 and finished.stdout == left
    assert (tmp_path / "results").read_bytes() == b""
