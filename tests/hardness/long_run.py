"""Many frames of a folder, or of a camera with faults: memory, open files and the time a frame takes must not grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from stub_camera import FAULTS, StubCamera
from stub_model import RedModel
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
WINDOW = 500  # frames after which nothing may grow, and over which the time of one is taken
LASTS = 4.0  # seconds of a fault
FREEZE = 1.0
PICTURES = 100


class Sample(NamedTuple):
    """The process after a number of frames."""

    frame: int
    megabytes: float
    files: int
    seconds: float  # for the last WINDOW frames


def of_folder(folder: Path, models: Path, count: int) -> tuple[str, list[str]]:
    """predict.py over `count` names of 100 drawn frames: what was measured, and what is wrong with it. Linux."""
    from make_demo_data import Settings, make

    make(folder / "drawn", Settings(256, 1, PICTURES // 2, PICTURES // 2, 22), workers=2)
    drawn = sorted((folder / "drawn" / "test").glob("*/*.png"))
    frames = folder / "frames"
    frames.mkdir()
    for index in range(count):
        os.link(drawn[index % len(drawn)], frames / f"{index:06d}.png")
    flags = ["--models-dir", models, "--category", "belt", "--device", "cpu", "--out", folder / "predictions"]
    samples = measure(
        [ROOT / "predict.py", frames, *flags, "--threshold", 1e9, "--json-lines"], lambda row: row == count
    )
    words, wrong = verdict(samples)
    early, late = (min(sample.seconds for sample in part) for part in (samples[1:5], samples[-4:]))
    words += f"; {early / WINDOW * 1e3:.2f} and {late / WINDOW * 1e3:.2f} ms a frame"
    return words, wrong + ["frames take longer"] * (late > 1.2 * early)


def of_camera(out: Path, count: int) -> tuple[str, list[str]]:
    """The same for `count` rows or more of a camera that has every fault in turn, and a model without a network."""
    waiting, calm = list(FAULTS), 0.0

    def enough(row: int) -> bool:
        nonlocal calm
        over = time.monotonic() > calm
        if waiting and over and row >= count * (1 - len(waiting) / (len(FAULTS) + 1)):
            stub.suffer(waiting.pop(0))
            threading.Timer(LASTS, stub.recover).start()
            calm = time.monotonic() + 2 * LASTS
        return row >= count and over and not waiting

    with StubCamera(0.001) as stub:
        words, wrong = verdict(measure([__file__, stub.address, out], enough))
    statuses = json.loads((out / "config.json").read_text())["statuses"]
    missing = {status for told in FAULTS.values() for status in told} - set(statuses)
    return f"{words}; rows {statuses}", wrong + [f"{status} is not told" for status in missing]


def measure(command: list, enough: Callable[[int], bool]) -> list[Sample]:
    """Samples of a Python process that writes a line a frame; raises RuntimeError where it fails.

    It gets Ctrl-C when `enough`, which is asked after each line, says so.
    """
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    samples, start = [], time.monotonic()
    proc = Path("/proc") / str(process.pid)
    is_enough = False
    for number, _ in enumerate(tqdm(process.stdout, desc="frames", disable=None), 1):
        if number % WINDOW == 0:
            pages = int((proc / "statm").read_text().split()[1])
            megabytes = pages * os.sysconf("SC_PAGESIZE") / 1e6
            samples.append(Sample(number, megabytes, len(list((proc / "fd").iterdir())), time.monotonic() - start))
            start = time.monotonic()
        if not is_enough and enough(number):
            is_enough = True
            process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    if process.returncode not in (0, 130):
        raise RuntimeError(errors)
    return samples


def verdict(samples: list[Sample]) -> tuple[str, list[str]]:
    """What was measured, for people, and what is wrong with it."""
    first, last = samples[0], samples[-1]
    words = (
        f"{first.megabytes:.1f} MB at frame {first.frame}, {last.megabytes:.1f} MB at frame {last.frame}; "
        f"{first.files} and {last.files} open files"
    )
    wrong = ["memory grows"] if last.megabytes > max(1.05 * first.megabytes, first.megabytes + 20) else []
    return words, wrong + ["files stay open"] * (last.files > first.files)


def main(address: str, out: str) -> None:
    """The process that looks at a camera."""
    from prediction.options import PredictionSettings
    from prediction.run import predict

    shown = "anomalous", True, FREEZE, None, False, None
    predict(PredictionSettings((address,), Path(out), 90, 1, 1, None, None, 0, *shown), RedModel, None, {})


if __name__ == "__main__":
    from utils.command_line import run

    run(lambda: main(*sys.argv[1:]))
