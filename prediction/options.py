"""The flags of predict.py that do not depend on the model, and the settings made from them."""

import argparse
import dataclasses
from pathlib import Path

from datasets import MAX_MEGAPIXELS
from utils.command_line import Parser, add_size_flag, number


@dataclasses.dataclass(frozen=True)
class PredictionSettings:
    sources: tuple[str, ...]
    out: Path
    max_megapixels: float = MAX_MEGAPIXELS  # of an image file
    every: int = 1  # 2 looks at every second frame
    smooth: int = 1  # frames in a row that switch the alarm
    threshold: float | None = None  # of the score; None: the model's own
    pixel_threshold: float | None = None  # of the map; None: the model's own
    min_area: int = 0  # pixels that a region needs to count
    overlays: str | None = "anomalous"  # or "all" or "none"; None: no pictures at all
    json_lines: bool = False
    freeze: float | None = None  # seconds with nothing new after which a camera's connection is broken
    give_up: float | None = None  # seconds without a picture after which a camera's run ends; None: never
    watch: bool = False  # the source is a folder that receives new files
    webhook: str | None = None  # where alarms are sent


def add_prediction_flags(parser: Parser) -> None:
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="image, folder, pattern, video file, camera number or address (rtsp://…, http://…)",
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="default: predictions")
    group = parser.add_argument_group("frames and alarms")
    add_size_flag(group, MAX_MEGAPIXELS)
    group.add_argument("--every", type=number(int, 1), default=1, help="look at every N-th frame (default: 1)")
    group.add_argument(
        "--smooth", type=number(int, 1), default=1, help="frames in a row that turn the alarm on, or off (default: 1)"
    )
    group.add_argument("--threshold", type=number(float, float("-inf")), help="of the score (default: the model's own)")
    text = "of the map (default: the model's own)"
    group.add_argument("--pixel-threshold", type=number(float, float("-inf")), help=text)
    group.add_argument(
        "--min-area", type=number(int, 0), default=0, help="pixels that a region needs to count (default: 0)"
    )
    group = parser.add_argument_group("on the line")
    text = "look at each file of a folder that receives new files, until Ctrl-C"
    group.add_argument("--watch", action="store_true", help=text)
    group.add_argument("--webhook", metavar="URL", help="POST the row as JSON whenever the alarm turns on")
    group.add_argument(
        "--freeze",
        type=number(float, 0, above=True),
        metavar="SECONDS",
        help="a camera: reconnect when the picture has been the same, or none has come, for so long (default: 10)",
    )
    group.add_argument(
        "--give-up",
        type=number(float, 0),
        metavar="SECONDS",
        help="a camera: end with exit code 1 after so long without a picture (default: never)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--overlays",
        choices=("anomalous", "all", "none"),
        help="frames drawn with contours and boxes (default: anomalous)",
    )
    group.add_argument("--json-lines", action="store_true", help="each row on stdout as JSON as well")
    group.add_argument("--no-images", action="store_true", help="the table alone: no overlays, video or report")


def prediction_settings(parser: Parser, args: argparse.Namespace) -> PredictionSettings:
    if not all(args.sources):
        parser.error("SOURCE is empty, perhaps of a variable that is not set; give an image, a folder or an address")
    if args.no_images and args.overlays:
        parser.error("--overlays has no effect with --no-images; drop one of them")
    if args.watch and args.every > 1:
        parser.error("--every has no effect with --watch, which looks at every file; drop one of them")
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(PredictionSettings)}
    settings["sources"] = tuple(args.sources)
    settings["overlays"] = None if args.no_images else args.overlays or "anomalous"
    return PredictionSettings(**settings)
