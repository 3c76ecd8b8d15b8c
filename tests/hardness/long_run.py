"""predict.py over many frames: memory, open files and the time a frame takes must not grow."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from machine import resident
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
WARM = 500  # frames after which nothing may grow
WINDOW = 500  # frames over which the time of one is taken
PICTURES = 100


@dataclass(frozen=True)
class Sample:
    """The process after a number of frames."""

    frame: int
    megabytes: float
    files: int
    seconds: float


def lay_frames(folder: Path, count: int) -> Path:
    """`count` names for 100 drawn frames."""
    from make_demo_data import Settings, make

    make(folder / "drawn", Settings(256, 1, PICTURES // 2, PICTURES // 2, 22), workers=2)
    drawn = sorted((folder / "drawn" / "test").glob("*/*.png"))
    frames = folder / "frames"
    frames.mkdir()
    for index in range(count):
        os.link(drawn[index % len(drawn)], frames / f"{index:06d}.png")
    return frames


def measure(folder: Path, models: Path, count: int) -> list[Sample]:
    """Samples of predict.py's process every WINDOW frames; raises RuntimeError where it fails."""
    frames = lay_frames(folder, count)
    flags = ["--models-dir", models, "--category", "belt", "--device", "cpu", "--out", folder / "predictions"]
    command = [sys.executable, ROOT / "predict.py", frames, *flags, "--threshold", 1e9, "--json-lines"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    samples, start = [], time.monotonic()
    for number, _ in enumerate(tqdm(process.stdout, total=count, desc="frames", disable=None), 1):
        if number % WINDOW == 0:
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
            samples.append(Sample(number, resident(process.pid), files, time.monotonic() - start))
            start = time.monotonic()
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return samples


def verdict(samples: list[Sample]) -> tuple[str, list[str]]:
    """What was measured, for people, and what is wrong with it."""
    warm = next(sample for sample in samples if sample.frame >= WARM)
    last = samples[-1]
    early, late = min(sample.seconds for sample in samples[1:5]), min(sample.seconds for sample in samples[-4:])
    words = (
        f"{warm.megabytes:.1f} MB at frame {warm.frame}, {last.megabytes:.1f} MB at frame {last.frame}; "
        f"{warm.files} and {last.files} open files; {early / WINDOW * 1e3:.2f} and {late / WINDOW * 1e3:.2f} ms a frame"
    )
    wrong = []
    if last.megabytes > 1.05 * warm.megabytes:
        wrong.append("memory grows")
    if last.files > warm.files:
        wrong.append("files stay open")
    if late > 1.2 * early:
        wrong.append("frames take longer")
    return words, wrong
