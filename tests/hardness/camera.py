"""A camera over many frames, with faults in between: what is told, how soon it is well again, what memory grows by.

A process of its own looks at a stub camera with a model without a network, so that a frame takes a millisecond.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from machine import resident
from stub_camera import COLOR, StubCamera
from stub_model import RedModel
from tqdm import tqdm

from datasets.frames import FROZEN, GREY, LOST, OK, RESIZED, SILENT, UNREADABLE

FAULTS = {  # what the camera does, and the statuses that tell of it
    "drop": (LOST,),
    "hang": (SILENT,),
    "freeze": (FROZEN,),
    "garbage": (UNREADABLE, SILENT),
    "cut": (UNREADABLE, SILENT),
    "large": (RESIZED,),
    "grey": (GREY,),
    "mono": (GREY,),
    "down": (LOST,),
}
FREEZE, GIVE_UP, LASTS = 1.0, 10.0, 2.0  # seconds: limits of the watch, and how long a fault goes on once it is noticed
WARM = 500  # frames after which memory may not grow
MOST_GROWTH = 20.0  # MB


@dataclasses.dataclass
class Measured:
    """A run of the watch."""

    frames: int = 0
    megabytes: tuple[float, float] = (0.0, 0.0)  # at frame WARM, and at the last
    noticed: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds from a fault to its first row
    recovered: dict[str, float] = dataclasses.field(default_factory=dict)  # from its end to the first good row
    wrong: list[str] = dataclasses.field(default_factory=list)
    latency_ms: dict[str, float] | None = None


def watch(out: Path, frames: int, faults: tuple[str, ...] = tuple(FAULTS), give_up: float | None = GIVE_UP) -> Measured:
    """Look at `frames` pictures, with the faults spread over them; at the end the camera goes. Linux.

    With `give_up` None Ctrl-C ends the run, else so many seconds without the camera.
    """
    measured = Measured()
    with StubCamera(0.001) as stub:
        command = [sys.executable, __file__, stub.address, str(out), str(give_up or "")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        rows = look_on(process, measured, frames)
        for index, fault in enumerate(faults, 1):
            while measured.frames < frames * index / (len(faults) + 1):
                next(rows)
            disturb(stub, fault, rows, measured)
        for _ in rows:
            if measured.frames >= frames and not measured.megabytes[1]:
                measured.megabytes = measured.megabytes[0], resident(process.pid)
                stub.down() if give_up else process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    config = json.loads((out / "config.json").read_text())
    measured.latency_ms = config["latency_ms"]
    end = process.returncode, config["finished"], "--give-up" in errors
    if end != ((1, False, True) if give_up else (0, True, False)):
        measured.wrong.append(f"it ends with {end}: {errors[-500:]}")
    if measured.megabytes[1] - measured.megabytes[0] > MOST_GROWTH:
        measured.wrong.append("memory grows")
    return measured


def look_on(process: subprocess.Popen, measured: Measured, frames: int) -> Iterator[dict]:
    """The rows that the process writes."""
    for line in tqdm(process.stdout, total=frames, desc="camera", disable=None):
        row = json.loads(line)
        if row["status"] == OK:
            measured.frames += 1
            if abs(row["score"] - (COLOR[0] + 20) / 255) > 0.1:  # of blue, it would be 0.5
                measured.wrong.append(f"frame {row['frame']} has other colours: {row}")
        if measured.frames == WARM and not measured.megabytes[0]:
            measured.megabytes = resident(process.pid), 0.0
        yield row


def disturb(stub: StubCamera, fault: str, rows: Iterator[dict], measured: Measured) -> None:
    """One fault, from its beginning to the first good row after its end."""
    start = time.time()
    stub.disturb(fault)
    told = set()
    while not told.issuperset(FAULTS[fault]):
        row = next(rows)
        told.add(row["status"])
    measured.noticed[fault] = moment(row) - start
    end = start if fault == "drop" else time.time() + LASTS
    while (left := end - time.time()) > 0:
        if fault in ("large", "grey", "mono"):  # rows go on
            next(rows)
        else:
            time.sleep(left)
    stub.recover(fault)
    well = max(end, moment(row))
    while fault == "large" and (row["status"] != RESIZED or moment(row) < well):  # good, but still large
        row = next(rows)
    while row["status"] != OK or moment(row) < well:
        row = next(rows)
    measured.recovered[fault] = moment(row) - well
    if told - {*FAULTS[fault], OK}:
        measured.wrong.append(f"{fault} is told as {told}")
    if measured.noticed[fault] > FREEZE + 2 or measured.recovered[fault] > 5:
        measured.wrong.append(
            f"{fault} is noticed after {measured.noticed[fault]:.1f} s, and well again after "
            f"{measured.recovered[fault]:.1f} s"
        )


def moment(row: dict) -> float:
    """When the row's picture was read, or what happened instead was noticed; seconds as of time.time()."""
    return datetime.fromisoformat(row["time"]).timestamp()


def words(measured: Measured) -> str:
    """What was measured, for people."""
    first, last = measured.megabytes
    times = ", ".join(
        f"{fault} {measured.noticed[fault]:.2f} and {measured.recovered[fault]:.2f}" for fault in measured.noticed
    )
    return (
        f"{measured.frames} frames of a camera: {first:.1f} MB at frame {WARM}, {last:.1f} MB at the last; latency "
        f"{measured.latency_ms}; seconds until a fault is noticed, and from its end to the next good row: {times}"
    )


def main(address: str, out: str, give_up: str) -> None:
    """The process that looks."""
    from prediction.options import PredictionSettings
    from prediction.run import predict

    limit = float(give_up) if give_up else None
    settings = PredictionSettings((address,), Path(out), json_lines=True, freeze=FREEZE, give_up=limit)
    predict(settings, RedModel, None, {})


if __name__ == "__main__":
    from utils.command_line import run

    run(lambda: main(*sys.argv[1:]))
