"""Two processes under torchrun do what one does; an error in one ends both."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from machine import PATIENCE
from PIL import Image
from stand_in import close
from tiny import ROOT, draw_category, read_json, refusal, run_in_process, small_flags

from utils import distributed, gather
from utils.checkpoint import load_checkpoint
from utils.errors import InputError

PARTS = ("ma_clu", "ma2patch", "pc", "fusion")
FLAGS = {
    "train_ma_clu": ("--holdout-ratio", 0.2, "--patch-budget", 1e-5),
    "train_ma2patch": ("--holdout-ratio", 0.2, "--covariance", "ledoit-wolf"),
    "train_pc": ("--holdout-ratio", 0.2, "--patch-budget", 1e-4),
    "test_fusion": ("--fusion", "standardized", "--false-alarm-rate", 0.4, "--save-maps"),
}


def flags_of(root: Path, script: str) -> list:
    """Small batches, so that both processes have images, except of the held-out ones."""
    return [*small_flags(root, script), *FLAGS[script], "--batch-size", 2, "--skip-unreadable"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """The folders of one process and of two that ran all four scripts on the same data, and how the two ended.

    At last they come to a file that cannot be read.
    """
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    belt = draw_category(one / "data" / "belt", train=13)
    for part in ("train", "test"):
        (belt / part / "good" / "002.png").write_bytes(b"no picture")
    shutil.copytree(one / "data", two / "data")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        finished = [run_in_process(script, *flags_of(one, script)) for script in FLAGS]
    finally:
        torch.set_num_threads(threads)
    assert not any(run.code for run in finished), finished
    spoilt = draw_category(two / "data" / "spoilt") / "train" / "good" / "007.png"  # the last one
    spoilt.write_bytes(spoilt.read_bytes()[:100])
    commands = [[ROOT / f"{script}.py", *flags_of(two, script)] for script in FLAGS]
    flags = [*small_flags(two, "train_pc", "spoilt"), "--train-ratio", 1, "--batch-size", 2, "--no-eval"]
    commands = json.dumps([list(map(str, command)) for command in (*commands, [ROOT / "train_pc.py", *flags])])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    both = subprocess.run(
        [sys.executable, *launcher, ROOT / "tests" / "in_turn.py", commands],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    printed = "".join(run.out for run in finished)
    assert both.stdout == printed.replace(str(one), str(two)), both.stderr  # the second process says nothing
    return one, two, both


@pytest.fixture
def roots(runs) -> tuple[Path, Path]:
    return runs[:2]


@pytest.mark.parametrize("branch", PARTS[:3])
def test_checkpoints(roots, branch):
    (one, first), (two, second) = (
        load_checkpoint(root / "models" / "belt" / f"{branch}.safetensors") for root in roots
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert close(two[name], tensor, 1e-6), name
    if branch == "pc":
        assert torch.equal(one["bank"], two["bank"])  # the same patches in the same order
    statistics = [part.pop("calibration") for part in (first, second)]
    assert statistics[0].keys() == statistics[1].keys()
    for name, value in statistics[0].items():
        assert statistics[1][name] == pytest.approx(value, rel=1e-6), name
    assert second == first


def numbers(value, path=""):
    """The figures of nested dictionaries by path."""
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in numbers(entry, f"{path}/{key}").items()}
    return {path: value}


@pytest.mark.parametrize("part", PARTS)
def test_results(roots, part):
    folders = [root / "result" / "belt" / part for root in roots]
    one, two = (numbers(read_json(folder / "metrics.json")) for folder in folders)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (value if isinstance(value, list | str | None) else pytest.approx(value, rel=1e-9)), name
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in folders]
    assert files[0] == files[1]
    rows = [list(csv.reader((folder / "scores.csv").read_text(encoding="utf-8").splitlines())) for folder in folders]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    scores = [[list(map(float, row[2:])) for row in table[1:]] for table in rows]
    assert close(scores[1], scores[0], 1e-9)
    for strip in sorted(folders[0].glob("heatmaps/*/*.png")):
        pictures = [np.asarray(Image.open(f / strip.relative_to(folders[0]))).astype(int) for f in folders]
        assert np.abs(pictures[0] - pictures[1]).max() <= 40 and (pictures[0] != pictures[1]).mean() < 1e-3


def test_processes_are_in_the_configuration(roots):
    configs = [read_json(root / "result/belt/fusion/config.json") for root in roots]
    assert [config["processes"] for config in configs] == [1, 2]
    assert configs[0]["left_out"].keys() == configs[1]["left_out"].keys() == {"test/good/002.png", "train/good/002.png"}


def test_report_and_operating_point(roots):
    one, two = ((root / "result/belt/fusion/report.html").read_text(encoding="utf-8") for root in roots)
    assert one.count("<article") == two.count("<article") == 6
    assert one.count("data:image/webp") == two.count("data:image/webp")
    points = [numbers(read_json(root / "models/belt/usad.json")) for root in roots]
    for name in ("/threshold", "/pixel_threshold", "/expected_rate"):
        assert points[1][name] == pytest.approx(points[0][name], rel=1e-6)


def test_an_unreadable_file_of_the_second_process_ends_both_with_one_line(runs):
    _, two, both = runs
    errors = [line for line in both.stderr.splitlines() if line.startswith("error: ")]
    assert both.returncode not in (0, -9) and len(errors) == 1 and "007.png" in errors[0]
    assert not (two / "models" / "spoilt").exists()


def test_a_script_for_one_process_says_so(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert "start it with python, not torchrun" in refusal("predict", "frames")


@pytest.mark.parametrize(
    ("count", "batch_size", "processes"), [(13, 3, 2), (12, 4, 5), (1, 32, 8), (0, 4, 2), (64, 1, 3)]
)
def test_shards_are_whole_batches_in_order(monkeypatch, count, batch_size, processes):
    monkeypatch.setattr(distributed, "size", lambda: processes)
    shards = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shards.append(distributed.shard(count, batch_size))
    assert [index for shard in shards for index in shard] == list(range(count))
    assert all(len(shard) % batch_size == 0 or shard.stop == count for shard in shards)
    batches = [-(-len(shard) // batch_size) for shard in shards]
    assert max(batches) - min(batches) <= 1 and len(shards[0]) >= min(count, batch_size)


def test_every_process_gets_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(gather, "local_rank", lambda: 1)
    monkeypatch.setattr(gather, "local_size", lambda: 2)
    assert gather.own_gpu("cuda") == "cuda:1" and chosen == [1]
    with pytest.raises(InputError, match="use auto"):
        gather.own_gpu("cuda:0")
    monkeypatch.setattr(gather, "local_size", lambda: 3)
    with pytest.raises(InputError, match="3 processes for 2 GPUs"):
        gather.own_gpu("cuda")


def test_machines_with_different_images_are_refused(monkeypatch):
    monkeypatch.setattr(gather, "size", lambda: 2)
    monkeypatch.setattr(gather, "gathered", lambda mark: [mark, "another"])
    with pytest.raises(InputError, match="the machines do not have the same images"):
        gather.require_same("images", lambda: ["good/000.png"])
    monkeypatch.setattr(gather, "gathered", lambda mark: [mark, mark])
    gather.require_same("images", lambda: ["good/000.png"])
