"""Look for foreign objects in your own frames: images, folders, patterns, video files, a camera.

python predict.py belt/*.jpg                                    # saved_models/coal_ad -> predictions/
python predict.py belt.mp4 --category coal_demo --every 5 --smooth 3
python predict.py rtsp://user:password@camera/stream --json-lines | my_alarm    # until Ctrl-C
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets.sources import Camera, Frame, Source, find_sources
from evaluation.evaluate import environment
from evaluation.predictions import SCRIPT, Recorder, check_output, clear_output
from evaluation.result_files import PROGRAM
from models import BRANCHES, USAD
from utils.command_line import (
    Parser,
    add_device_flags,
    add_weights_flags,
    category_name,
    choose_device,
    default_batch_size,
    number,
    run,
    warn,
    weights_by_branch,
)
from utils.errors import InputError
from utils.files import write_json
from utils.locks import folder_lock
from utils.redact import redact
from utils.signals import stoppable


def main() -> None:
    args = parse_args()
    sources = find_sources(args.sources)
    check_output(args.out, sources)
    device = choose_device(args.device, args.precision)
    camera = next((source for source in sources if isinstance(source, Camera)), None)
    if camera and args.batch_size:
        raise InputError("--batch-size has no effect with a camera, whose frames go one by one; leave it out")
    with folder_lock(args.out):
        if camera is None:
            return look(args, device, sources, args.batch_size or default_batch_size(device))
        try:
            camera.open(args.every)
            look(args, device, [camera], 1)
        finally:
            camera.close()


def look(args: argparse.Namespace, device: str, sources: list[Source], batch_size: int) -> None:
    """Load the model, run it over the sources and write the results."""
    usad = load(args, device)
    config = {"program": PROGRAM, "script": SCRIPT, "finished": False, "settings": settings(args)}
    write_json(args.out / "config.json", config)
    clear_output(args.out)
    start = time.perf_counter()
    with Recorder(args.out, usad, args.smooth, args.overlays, sys.stdout if args.json_lines else None) as recorder:
        try:
            for source in sources:
                recorder.start(source, args.every)
                predict(usad, source, args.every, batch_size, recorder, quiet=args.json_lines)
        except KeyboardInterrupt:
            if not isinstance(sources[0], Camera):
                raise
        except BrokenPipeError:  # who read the JSON lines has gone; Python would complain once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
    problems = [problem for source in sources for problem in source.problems]
    config |= {
        "finished": True,
        "frames": recorder.table.rows,
        "anomalous": None if usad.threshold is None else recorder.table.alarms,
        "dropped": sum(source.dropped for source in sources),
        "unreadable": problems,
        "operating_point": usad.operating_point and usad.operating_point.figures(),
        **environment(usad),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_json(args.out / "config.json", config)
    if not args.no_images:
        recorder.write_report(config)
    summarize(args, config)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="image, folder, pattern, video file, camera number or address (rtsp://…, http://…)",
    )
    parser.add_argument("--models-dir", type=Path, default=Path("saved_models"), help="default: saved_models")
    parser.add_argument("--category", type=category_name, default="coal_ad", help="default: coal_ad")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="default: predictions")
    group = parser.add_argument_group("frames and alarms")
    group.add_argument("--every", type=number(int, 1), default=1, help="look at every so many-th frame (default: 1)")
    group.add_argument(
        "--smooth",
        type=number(int, 1),
        default=1,
        help="frames in a row that turn the alarm on, or off again (default: 1)",
    )
    group.add_argument("--threshold", type=number(float, float("-inf")), help="of the score (default: usad.json's)")
    group.add_argument("--pixel-threshold", type=number(float, float("-inf")), help="of the map (default: usad.json's)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--overlays",
        choices=("anomalous", "all", "none"),
        help="frames drawn with contours and boxes (default: anomalous)",
    )
    group.add_argument("--json-lines", action="store_true", help="each row on stdout as JSON as well")
    group.add_argument("--no-images", action="store_true", help="the table alone: no overlays, video or report")
    add_weights_flags(parser, BRANCHES)
    add_device_flags(parser)
    args = parser.parse_args()
    if args.no_images and args.overlays:
        parser.error("--overlays has no effect with --no-images; drop one of them")
    args.overlays = None if args.no_images else args.overlays or "anomalous"
    return args


def load(args: argparse.Namespace, device: str) -> USAD:
    """The model with the thresholds in force; says so where there are none."""
    folder = args.models_dir / args.category
    usad = USAD.load(folder, device, args.precision, weights=weights_by_branch(args, BRANCHES))
    if args.threshold is not None:
        usad.threshold = args.threshold
    if args.pixel_threshold is not None:
        usad.pixel_threshold = args.pixel_threshold
    if usad.threshold is None:
        if args.smooth > 1:
            raise InputError("--smooth has no effect without a threshold; give --threshold, or leave it out")
        warn(
            f"{folder} has no operating point: scores only. Thresholds come from test_fusion.py --false-alarm-rate "
            "0.01 (checkpoints trained with --holdout-ratio), or from --threshold and --pixel-threshold"
        )
    return usad


def predict(usad: USAD, source: Source, every: int, batch_size: int, recorder: Recorder, quiet: bool) -> None:
    """All frames of one source, in order."""
    with tqdm(desc=source.name, unit="frame", leave=False, disable=quiet or None) as progress:
        for frames in stoppable(batches(source.frames(every), batch_size)):
            predictions = usad([frame.image for frame in frames], batch_size)
            for frame, prediction in zip(frames, predictions, strict=True):
                recorder.add(frame, prediction)
            progress.update(len(frames))


def batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Lists of `size` frames, the last one shorter."""
    frames = iter(frames)
    while batch := list(itertools.islice(frames, size)):
        yield batch


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON values, without any camera's password."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {**values, "sources": [redact(source) for source in args.sources]}


def summarize(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """The last line; raises InputError if some files could not be read."""
    line = f"{config['frames']} frames"
    if config["anomalous"] is not None:
        line += f", {config['anomalous']} anomalous"
    if config["dropped"]:
        line += f", {config['dropped']} dropped because they came faster than they could be looked at"
    print(f"{line}; results in {args.out}", file=sys.stderr if args.json_lines else sys.stdout, flush=True)
    problems = config["unreadable"]
    for problem in problems:
        print(f"unreadable: {problem}", file=sys.stderr)
    if problems:
        raise InputError(f"{len(problems)} file(s), listed above, could not be read; the others are in {args.out}")


if __name__ == "__main__":
    run(main)
