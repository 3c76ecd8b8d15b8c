"""Tiny drawn data, and the scripts' command lines on it."""

import contextlib
import csv
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
from machine import PATIENCE
from PIL import Image

from utils.command_line import run
from utils.signals import SIGNALS

ROOT = Path(__file__).parents[1]  # of the project
NAMES = ("ma_clu", "ma2patch", "pc")  # of the branches


class Finished(NamedTuple):
    """How a script ended."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def handlers_kept():
    """Afterwards pytest's handlers of the signals are installed again."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_in_process(script: str | Callable[[], None], *arguments) -> Finished:
    """Run a script's command line in this process, which saves the seconds that importing torch takes.

    A function stands for a script's `main`. Packages are not looked up each time; tests/test_packages.py has that done.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        handlers_kept(),
        mock.patch.object(sys, "argv", [f"{script}.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("utils.command_line.check_packages"),
        pytest.raises(SystemExit) as end,
    ):
        run(script if callable(script) else importlib.import_module(script).main)
    return Finished(end.value.code, out.getvalue(), err.getvalue())


def run_apart(*words, folder: Path = ROOT, **environment) -> Finished:
    """Run Python with these words in a process of its own."""
    command, env = [sys.executable, *map(str, words)], {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    return Finished(done.returncode, done.stdout, done.stderr)


def end_well(script: str, *arguments) -> Finished:
    """Run a script that must succeed."""
    finished = run_in_process(script, *arguments)
    assert finished.code == 0, finished.err
    return finished


def refusal(script: str | Callable[[], None], *arguments, code: int = 2) -> str:
    """Run a script that must end with this code and one line; returns the line."""
    finished = run_in_process(script, *arguments)
    assert finished.code == code and len(finished.err.splitlines()) == 1, finished
    return finished.err


def pretend(folder: Path, name: str, version: str) -> Path:
    """Make a package look installed in `folder`; returns the folder that says so."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return information


def golden(name: str):
    """Stored numbers of the authors' program."""
    return np.load(ROOT / f"tests/data/{name}.npz")


def draw_frame(rng, width: int, height: int) -> np.ndarray:
    """A grey belt with dark lumps, RGB uint8 [height, width, 3]."""
    frame = rng.normal(95, 9, (height, width))
    for _ in range(5):
        x, y = rng.integers(0, width - 12), rng.integers(0, height - 12)
        frame[y : y + 12, x : x + 12] = rng.normal(30, 6, (12, 12))
    return np.repeat(frame.clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def draw_category(folder: Path, train=8, good=3, anomalous=4, size=(72, 56), seed=0) -> Path:
    """Write a tiny data set in MVTec layout; anomalous frames, `rope`, hold a bright patch."""
    rng = np.random.default_rng(seed)
    for part, count in (("train/good", train), ("test/good", good), ("test/rope", anomalous)):
        (folder / part).mkdir(parents=True)
        for index in range(count):
            frame = draw_frame(rng, *size)
            if part == "test/rope":
                mask = np.zeros(frame.shape[:2], np.uint8)
                x, y = rng.integers(0, size[0] - 10), rng.integers(0, size[1] - 10)
                mask[y : y + 10, x : x + 10] = 255
                frame[mask > 0] = 220, 130, 40
                truth = folder / "ground_truth" / "rope"
                truth.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(truth / f"{index:03d}_mask.png")
            Image.fromarray(frame).save(folder / part / f"{index:03d}.png")
    return folder


SMALL_NETWORKS = {
    "train_ma_clu": ("--backbone", "test_vit", "--image-size", 64),
    "train_ma2patch": ("--backbone", "test_vit", "--image-size", 96),
    "train_pc": ("--backbone", "test_resnet", "--image-size", 64, "--coreset-ratio", 0.1),
}


def small_flags(root: Path, script: str, *categories: str) -> list:
    """Flags with which a script takes a second; everything is read and written below `root`."""
    trained = script in SMALL_NETWORKS
    return [
        *("--data-root", root / "data", "--models-dir", root / "models", "--results-dir", root / "result"),
        *("--category", *(categories or ("belt",)), "--device", "cpu", "--workers", 0),
        *(("--weights", "random", *SMALL_NETWORKS[script]) if trained else ()),
    ]


def succeed(root: Path, script: str, *flags, categories=()) -> Finished:
    """Run a script with its small flags and others; it must end well."""
    return end_well(script, *small_flags(root, script, *categories), *flags)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def small_files(most: int):
    """No file may grow beyond so many bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def saved_maps(root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The anomaly maps that --save-maps has written, and the masks at their size, [N, S, S]."""
    maps, masks = [], []
    for path in sorted((root / "result" / "belt" / part / "anomaly_maps").rglob("*.tiff")):
        maps.append(np.asarray(Image.open(path)))
        mask = root / "data" / "belt" / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        mask = Image.open(mask) if mask.exists() else Image.new("L", (72, 56))
        masks.append(np.asarray(mask.resize(maps[-1].shape, Image.Resampling.NEAREST)) >= 128)
    return np.stack(maps), np.stack(masks)
