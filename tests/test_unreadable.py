"""Broken images in a data set: one list of all, or a run on the rest that says what it left out."""

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import SMALL_NETWORKS, draw_category, read_json, refusal, run_in_process, small_flags, succeed

from datasets.mvtec import Category
from models import BRANCHES
from utils.checkpoint import load_checkpoint

HELD = ("--holdout-ratio", 0.25, "--train-ratio", 1)


def break_some(belt, train: int, good: int, masks: int) -> set[str]:
    """Spoil images and masks, each in another way; returns the names of the items that they make unusable."""
    spoilt = set()
    for part, count in (("train/good", train), ("test/good", good), ("ground_truth/rope", masks)):
        for index, path in enumerate(sorted((belt / part).iterdir())[1 : 1 + count]):
            content = path.read_bytes()
            path.write_bytes((content[: len(content) // 2], b"", b"GIF89a" + content, b"text")[index % 4])
            image = path.name.replace("_mask", "")
            spoilt.add(f"{part.replace('ground_truth', 'test')}/{image}")
    return spoilt


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A category with 30 broken files, and the names of their items."""
    root = tmp_path_factory.mktemp("spoilt")
    belt = draw_category(root / "data" / "belt", train=24, good=12, anomalous=14)
    return root, break_some(belt, train=12, good=8, masks=10)


@pytest.fixture(scope="module")
def skipped(spoilt):
    """The same after three trainings with --skip-unreadable."""
    root, broken = spoilt
    for script in SMALL_NETWORKS:
        said = succeed(root, script, *HELD, "--skip-unreadable").err
        assert "belt: 30 of 50 images cannot be read and are left out" in said
    return root, broken


@pytest.mark.parametrize("workers", [0, 2])
def test_one_list_of_thirty(spoilt, workers):
    root, broken = spoilt
    flags = [*small_flags(root, "train_pc"), *HELD, "--models-dir", root / "none", "--workers", workers]
    finished = run_in_process("train_pc", *flags)
    *listed, last = finished.err.splitlines()
    assert finished.code == 2 and last.startswith("error: 30 images, listed above") and "--skip-unreadable" in last
    assert len(listed) == 30 and not (root / "none").exists()
    named = "\n".join(listed).replace("_mask.png", ".png").replace("ground_truth", "test")
    assert all(f"{root / 'data' / 'belt' / name} " in named for name in broken)


def test_what_was_left_out_is_recorded(skipped):
    root, broken = skipped
    for branch in BRANCHES.values():
        config = read_json(root / "result/belt" / branch.name / "config.json")
        assert set(config["left_out"]) == broken and all(config["left_out"].values())
        assert config["settings"]["skip_unreadable"] is True
        figures = read_json(root / "result/belt" / branch.name / "metrics.json")
        assert (figures["n_images"], figures["n_anomalous"]) == (8, 4)
        _, metadata = load_checkpoint(root / f"models/belt/{branch.name}.safetensors")
        assert metadata["training"]["left_out"] == sorted(name for name in broken if name.startswith("train"))
        assert metadata["training"]["images"] + metadata["calibration"]["images"] == 12


def test_the_rest_is_trained_as_if_the_broken_files_were_not_there(skipped, tmp_path):
    root, broken = skipped
    belt = tmp_path / "data" / "belt"
    draw_category(belt, train=24, good=12, anomalous=14)
    for name in broken:
        (belt / name).unlink()
    succeed(tmp_path, "train_pc", *HELD)
    ours, other = (load_file(where / "models/belt/pc.safetensors") for where in (root, tmp_path))
    assert all((ours[name] == other[name]).all() for name in ours)
    result = "result/belt/pc/scores.csv"
    assert (root / result).read_text() == (tmp_path / result).read_text()


def test_held_out_images_are_found_again(skipped):
    root, broken = skipped
    flags = "--no-images", "--false-alarm-rate", 0.25
    succeed(root, "test_fusion", *flags, "--fusion", "standardized", "--skip-unreadable")
    point = read_json(root / "models/belt/usad.json")
    assert point["images"] == 3
    config = read_json(root / "result/belt/fusion/config.json")
    assert set(config["left_out"]) == set(broken)  # the training images, too, which the thresholds take
    finished = run_in_process("test_fusion", *small_flags(root, "test_fusion"), *flags)
    assert finished.code == 2 and len(finished.err.splitlines()) == 32  # without the flag; one warns of few images


def test_files_are_read_with_the_checkpoints_bit_depth(tmp_path):
    """A frame beyond it is left out by whatever follows the checkpoints, too."""
    belt = draw_category(tmp_path / "data" / "belt")
    frames = [path for part in ("train/good", "test/good", "test/rope") for path in (belt / part).iterdir()]
    for path in frames:
        cv2.imwrite(str(path), (cv2.imread(str(path)) / 255 * 4095).round().astype(np.uint16))
    bright = np.full((56, 72), 60_000, np.uint16)
    cv2.imwrite(str(belt / "test/good/000.png"), bright)
    skip = ("--skip-unreadable",)
    for script in SMALL_NETWORKS:
        succeed(tmp_path, script, *HELD, "--bit-depth", 12, "--no-images", *skip)
    cv2.imwrite(str(belt / "train/good/new.png"), bright)
    succeed(tmp_path, "test_fusion", "--no-images", *skip)
    succeed(tmp_path, "reproduce_tables", "--tables", "ablation", *skip)
    said = succeed(tmp_path, "train_pc", "--update", "--no-eval", *skip)
    assert "1 of 3 images cannot be read" in said.err and "no new frames" in said.out


def test_nothing_readable_is_left(tmp_path):
    belt = draw_category(tmp_path / "data" / "belt")
    for path in (belt / "train" / "good").iterdir():
        path.write_bytes(b"")
    finished = run_in_process("train_pc", *small_flags(tmp_path, "train_pc"), "--skip-unreadable")
    assert finished.code == 2 and "no readable images" in finished.err.splitlines()[-1]


def test_a_file_that_vanishes_ends_the_run_with_1(tmp_path, monkeypatch):
    """It was there when the files were listed: not the user's mistake, and not to be skipped silently."""
    belt = draw_category(tmp_path / "data" / "belt")
    items = Category(tmp_path / "data", "belt").train_samples()
    monkeypatch.setattr(Category, "train_samples", lambda self: items)
    gone = belt / "train" / "good" / "003.png"
    gone.unlink()
    for workers in (0, 1):
        flags = [*small_flags(tmp_path, "train_pc"), "--train-ratio", 1, "--no-eval", "--workers", workers]
        assert refusal("train_pc", *flags, code=1) == f"error: {gone}: No such file or directory\n"
    assert not (tmp_path / "models").exists()
