"""Draw a data set of coal-belt scenes, for trying everything without a download.

python make_demo_data.py          # data/coal_demo: 160 training, 60 good and 90 anomalous test frames
python make_demo_data.py --category small_demo --size 256 --train 40 --good 20 --anomalous 21

Writes <data-root>/<category> in MVTec layout: train/good, test/{good,stick,rope,bag} and ground_truth.
The same settings give the same files, however many threads draw them.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
from tqdm import tqdm

from scenes.defects import DEFECTS
from scenes.scenes import draw_scene
from utils.command_line import Parser, category_name, number, run
from utils.errors import InputError
from utils.files import read_json, write_json
from utils.locks import file_lock

MARKER = ".usad_demo.json"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of the files. `version` goes up when the drawing changes."""

    size: int
    train: int
    good: int
    anomalous: int
    seed: int
    version: int = 2


class Frame(NamedTuple):
    """One frame to draw: its seed and file and, if it has a defect, the kind and the file of the mask."""

    seed: tuple[int, int, int]
    file: str
    kind: str | None = None
    mask: str | None = None


def frames(settings: Settings) -> Iterator[Frame]:
    """All frames of the data set. The kinds of defect take turns."""
    for index in range(settings.train):
        yield Frame((settings.seed, 0, index), f"train/good/{index:03d}.png")
    for index in range(settings.good):
        yield Frame((settings.seed, 1, index), f"test/good/{index:03d}.png")
    kinds = list(DEFECTS)
    for index in range(settings.anomalous):
        kind, name = kinds[index % len(kinds)], f"{index // len(kinds):03d}"
        yield Frame((settings.seed, 2, index), f"test/{kind}/{name}.png", kind, f"ground_truth/{kind}/{name}_mask.png")


def file_names(settings: Settings) -> set[str]:
    """Every file of the data set but the marker, relative to the category."""
    return {name for frame in frames(settings) for name in (frame.file, frame.mask) if name}


def draw(folder: Path, size: int, frame: Frame) -> None:
    """Draw one frame and write it, with its mask if it has a defect."""
    for name, image in zip((frame.file, frame.mask), draw_scene(frame.seed, size, frame.kind), strict=True):
        if name:
            (folder / name).write_bytes(cv2.imencode(".png", image)[1].tobytes())


def is_drawn(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds the whole data set.

    Raises InputError if the folder, or a file in it, was not made by this program.
    """
    if not folder.exists():
        return False
    try:
        former = Settings(**read_json(folder / MARKER))
    except TypeError:
        raise InputError(f"{folder} exists and was not drawn by this program; choose another --category") from None
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MARKER}
    if foreign := sorted(present - file_names(former)):
        raise InputError(f"{folder / foreign[0]} was not drawn by this program; move it, or choose another --category")
    return former == settings and present == file_names(settings)


def beside(folder: Path) -> tuple[Path, Path]:
    """Where a data set is drawn, and where the one that it replaces is moved to."""
    return folder.with_name(f".{folder.name}.drawing"), folder.with_name(f".{folder.name}.replaced")


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run has left beside `folder`."""
    for leftover in beside(folder):
        shutil.rmtree(leftover, ignore_errors=True)


def make(folder: Path, settings: Settings, workers: int) -> None:
    """Draw the data set beside `folder`, then let it replace what is there in one step."""
    drawing, replaced = beside(folder)
    for name in file_names(settings):
        (drawing / name).parent.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)  # the frames share the cores already
    pool = ThreadPoolExecutor(workers)  # NumPy and OpenCV let other threads run
    try:
        todo = list(frames(settings))
        drawn = pool.map(lambda frame: draw(drawing, settings.size, frame), todo)
        for _ in tqdm(drawn, total=len(todo), desc="drawing", unit="frame", disable=None):
            pass
        write_json(drawing / MARKER, asdict(settings))
        if folder.exists():
            folder.rename(replaced)
        drawing.rename(folder)
    finally:
        pool.shutdown(cancel_futures=True)
        clear_leftovers(folder)


def main() -> None:
    parser = Parser(__doc__)
    count = number(int, 0, 99_999)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--category", type=category_name, default="coal_demo", help="default: coal_demo")
    parser.add_argument(
        "--size", type=number(int, 64, 2048), default=512, help="side of a frame in pixels (default: 512)"
    )
    parser.add_argument("--train", type=number(int, 1, 99_999), default=160, help="training frames (default: 160)")
    parser.add_argument("--good", type=count, default=60, help="test frames without a defect (default: 60)")
    parser.add_argument("--anomalous", type=count, default=90, help="test frames with a defect (default: 90)")
    parser.add_argument("--seed", type=number(int, 0, 2**63), default=22, help="default: 22")
    parser.add_argument("--workers", type=number(int, 1, 256), help="threads (default: one per core, at most 16)")
    args = parser.parse_args()
    if args.data_root.exists() and not args.data_root.is_dir():
        raise InputError(f"--data-root {args.data_root} is a file; give a folder")

    folder = args.data_root / args.category
    settings = Settings(args.size, args.train, args.good, args.anomalous, args.seed)
    with file_lock(folder):
        clear_leftovers(folder)
        if is_drawn(folder, settings):
            print(f"{folder} is already drawn with these settings")
            return
        make(folder, settings, args.workers or min(os.cpu_count() or 1, 16))
    print(f"{folder}: {args.train} training, {args.good} good and {args.anomalous} anomalous test frames")


if __name__ == "__main__":
    run(main)
