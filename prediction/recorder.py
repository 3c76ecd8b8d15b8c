"""What predict.py writes: a row for each frame, pictures of alarms, annotated videos."""

import errno
import itertools
import json
import os
import re
import sys
import time
import unicodedata
from collections import deque
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from datasets.camera import Camera
from datasets.frames import Frame
from datasets.images import Picture
from datasets.incoming import Incoming
from datasets.sources import Source, Video
from models.fusion.prediction import Model, Prediction
from prediction.options import PredictionSettings
from prediction.table import Table, row
from prediction.webhook import Webhook
from reporting.gallery import Entry, Gallery, Pictures
from reporting.pictures import write_picture
from reporting.report import Threshold, write_report
from utils.command_line import warn_once
from utils.errors import InputError
from utils.files import check_writable, is_foreign, read_json

SCRIPTS = ("predict.py", "predict_onnx.py")  # the marks by which a later run knows its own folder
ENDLESS = (Camera, Incoming)  # sources that a signal ends
TABLE, REPORT, OVERLAYS, VIDEOS = "predictions.csv", "report.html", "overlays", "videos"
CONTOUR, BOX, QUIET = (255, 0, 0), (255, 220, 0), (80, 200, 80)
NAME_BYTES = 120  # of a source's name within a file name; file systems take 143 to 255
AVI_BYTES = 2 << 30  # then an AVI is closed and another one begun: it cannot grow beyond 4 GB
TIMED = 100_000  # frames, the latest, whose latency counts


class Alarm:
    """Turns on after `frames` anomalous frames in a row, and off after as many normal ones."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.on = False
        self._contrary = 0

    def update(self, anomalous: bool) -> bool:
        """Count one frame; returns whether the alarm is on."""
        self._contrary = self._contrary + 1 if anomalous != self.on else 0
        if self._contrary == self.frames:
            self.on, self._contrary = anomalous, 0
        return self.on


def draw(image: np.ndarray, prediction: Prediction, alarm: bool | None, pixel_threshold: float | None) -> np.ndarray:
    """The frame (RGB [H, W, 3]) with contours, boxes and score."""
    canvas = image.copy()
    if canvas.shape[:2] != prediction.map.shape:  # decoded at a reduced scale
        canvas = cv2.resize(canvas, prediction.map.shape[::-1])
    line = max(1, round(min(canvas.shape[:2]) / 320))
    if pixel_threshold is not None:
        mask = (prediction.map >= pixel_threshold).astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, CONTOUR, line)
        for x, y, width, height in prediction.boxes:
            cv2.rectangle(canvas, (x, y), (x + width - 1, y + height - 1), BOX, line)
    text = f"{'ALARM ' if alarm else ''}{prediction.score:.4g}"
    font, scale, pad = cv2.FONT_HERSHEY_SIMPLEX, 0.45 * line, 4 * line
    (width, height), below = cv2.getTextSize(text, font, scale, line)
    cv2.rectangle(canvas, (0, 0), (width + 2 * pad, height + below + pad), (24, 24, 24), cv2.FILLED)
    color = CONTOUR if alarm else QUIET
    return cv2.putText(canvas, text, (pad, height + pad // 2), font, scale, color, line, cv2.LINE_AA)


def safe_name(source: str) -> str:
    """The stem of a path or an address, in any script, without characters that some file system refuses."""
    stem = unicodedata.normalize("NFC", Path(source).stem)
    stem = "".join(char if char.isprintable() and char not in '<>:"/\\|?*' else "\0" for char in stem)
    stem = re.sub("\0+", "_", stem).encode()[:NAME_BYTES].decode(errors="ignore")
    return stem.strip(" .") or "frame"


class VideoFile:
    """An annotated video, all of one size (width, height). It gets its name when it is closed, and so is complete."""

    def __init__(self, stem: Path, fps: float, size: tuple[int, int]) -> None:
        self.frames, self.size = 0, size
        odd = any(side % 2 for side in size)  # FFmpeg's encoders, behind OpenCV, cut odd sizes
        backend, codec, suffix = (cv2.CAP_OPENCV_MJPEG, "MJPG", ".avi") if odd else (cv2.CAP_ANY, "mp4v", ".mp4")
        self.path = stem.with_name(stem.name + suffix)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(f".video.partial{suffix}")  # ASCII, which encoders take everywhere
        code = cv2.VideoWriter_fourcc(*codec)
        self._writer = cv2.VideoWriter(str(self._partial), backend, code, fps, size)
        if not self._writer.isOpened():
            raise InputError(f"this OpenCV writes no {suffix}; pass --no-images for the table alone")

    def add(self, picture: np.ndarray) -> bool:
        """Append a frame [H, W, 3]; returns whether the file is full, an AVI of the largest size."""
        picture = picture if picture.shape[1::-1] == self.size else cv2.resize(picture, self.size)
        self._writer.write(picture[..., ::-1])
        self.frames += 1
        return self.path.suffix == ".avi" and self._partial.stat().st_size > AVI_BYTES

    def close(self) -> None:
        """Finish the file; raises OSError if it could not be written completely."""
        self._writer.release()
        check = cv2.VideoCapture(str(self._partial))
        whole = check.isOpened() and check.get(cv2.CAP_PROP_FRAME_COUNT) >= self.frames
        check.release()
        if not whole:
            self._partial.unlink(missing_ok=True)
            raise OSError(None, "the video could not be written whole; is the disk full?", str(self.path))
        os.replace(self._partial, self.path)


class Recorder:
    """Takes frames and their predictions, and writes all files; only the report's gallery stays in memory."""

    def __init__(self, settings: PredictionSettings, model: Model, webhook: Webhook | None, former_rows: int) -> None:
        self.settings = settings
        self.model = model
        self.webhook = webhook
        self.table = Table(settings.out / TABLE, former_rows)
        self.gallery = Gallery()
        self.frames = 0  # that were looked at
        self._seconds: deque[float] = deque(maxlen=TIMED)  # from reading a frame to its row
        self._video: VideoFile | None = None
        self._names: set[str] = set()

    def close(self) -> None:
        """Close the files, and leave the waiting alarms some time."""
        try:
            self.table.close()
            self._close_video()
        finally:
            if self.webhook:
                self.webhook.close()

    def start(self, source: Source | Incoming) -> None:
        """Begin a source: the next frames are its."""
        self._close_video()
        self._source, self._alarm = source, Alarm(self.settings.smooth)

    def add(self, frame: Frame, prediction: Prediction | None) -> None:
        """Send the alarm of one frame, write its pictures, if asked for, and its row; None for one without a picture.

        The alarm goes first, and without pictures a camera or a watched folder goes on: a full disk loses no alarm.
        """
        was_on, alarm = self._alarm.on, None
        if prediction and prediction.anomalous is not None:
            alarm = self._alarm.update(prediction.anomalous)
        values = row(frame, prediction, alarm)
        if self.webhook and alarm and not was_on:
            self.webhook.send(values)
        if prediction and self.settings.overlays:
            try:
                self._add_pictures(frame, prediction, alarm)
            except OSError as error:
                if not isinstance(self._source, ENDLESS):
                    raise
                warn_once("pictures", f"{error.filename}: {error.strerror}; rows and alarms go on without pictures")
        self.table.add(values)
        if prediction:
            self.frames += 1
            self._seconds.append(time.perf_counter() - frame.read)
        if self.settings.json_lines:
            self._print(values)

    def _print(self, values: dict[str, Any]) -> None:
        try:
            print(json.dumps(values), flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # at its exit Python would complain again
            raise BrokenPipeError(errno.EPIPE, "the program that reads --json-lines has ended") from None

    def latency(self) -> dict[str, float] | None:
        """Median and 99th percentile in milliseconds; None without frames."""
        if not self._seconds:
            return None
        median, high = np.percentile(1000 * np.array(self._seconds), (50, 99)).round(3).tolist()
        return {"p50": median, "p99": high}

    def _add_pictures(self, frame: Frame, prediction: Prediction, alarm: bool | None) -> None:
        wanted = self.settings.overlays == "all" or (self.settings.overlays == "anomalous" and alarm)
        image, is_video = frame.pixels, isinstance(self._source, Video)
        if wanted or is_video:
            picture = draw(image, prediction, alarm, self.model.pixel_threshold)
        if wanted:
            name = f"{self.table.rows + 1:06d}_{safe_name(frame.source)}.jpg"
            write_picture(self.settings.out / OVERLAYS / name, picture)
        if is_video:
            self._video = self._video or self._new_video(frame, picture)
            if self._video.add(picture):
                self._close_video()
        parts = {self.model.name: (prediction.score, prediction.map), **prediction.branches}
        self.gallery.add(
            Entry(
                name=frame.source if isinstance(frame.image, Picture) else f"{frame.source} #{frame.number}",
                scores={name: score for name, (score, _) in parts.items()},
                group=self._source.name,
                alarm=alarm,
                note=frame.time if isinstance(frame.time, str) else f"{frame.time:.2f} s",
            ),
            lambda: Pictures(image, {name: part_map for name, (_, part_map) in parts.items()}),
        )

    def _new_video(self, frame: Frame, picture: np.ndarray) -> VideoFile:
        stem = safe_name(frame.source)
        names = (f"{stem}_{index}" if index > 1 else stem for index in itertools.count(1))
        name = next(name for name in names if name.casefold() not in self._names)  # some disks ignore case
        self._names.add(name.casefold())
        fps = max(self._source.fps / self.settings.every, 1.0)
        return VideoFile(self.settings.out / VIDEOS / name, fps, picture.shape[1::-1])

    def _close_video(self) -> None:
        video, self._video = self._video, None
        if video:
            video.close()

    def write_report(self, config: dict[str, Any]) -> None:
        """report.html over all frames."""
        threshold = None
        if self.model.threshold is not None:
            point = self.model.operating_point
            source = point.source if point else "--threshold or --pixel-threshold"
            threshold = Threshold(self.model.threshold, self.model.pixel_threshold, source, on_test_set=False)
        facts = {key: str(config[key]) for key in ("frames", "anomalous", "dropped") if config[key] is not None}
        if config["latency_ms"]:
            facts["latency"] = latency_words(config["latency_ms"])
        path = self.settings.out / REPORT
        write_report(path, "Predictions", self.gallery, threshold=threshold, config=config, facts=facts)


def latency_words(latency: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g} ms" for name, value in latency.items())


def check_output(settings: PredictionSettings, sources: list[Source] | list[Incoming]) -> None:
    """Raise InputError if --out lies in a source, or holds one, other programs' files, or rows that are to stay."""
    folder = settings.out
    check_writable(folder)
    out = folder.resolve()
    for text in filter(os.path.isdir, settings.sources):
        if Path(text).resolve() in (out, *out.parents):  # the next run would look at our own pictures
            raise InputError(f"--out {folder} lies in SOURCE {text}; choose another folder for the results")
    for path in (path for source in sources for path in source.paths):
        if out in path.resolve().parents:
            raise InputError(f"SOURCE {path} lies in --out {folder}; choose another folder for the results")
    if is_foreign(folder, "script", SCRIPTS):
        raise InputError(f"--out {folder} holds files that {SCRIPTS[0]} did not make; choose another folder")
    if goes_on(folder) and not settings.watch:
        raise InputError(f"{folder} has the rows of a watched folder; give --watch, or choose another --out")


def goes_on(folder: Path) -> bool:
    """Whether `folder` has the rows of an earlier run that watched a folder."""
    table, former = folder / TABLE, read_json(folder / "config.json").get("settings", {})
    return bool(former.get("watch")) and table.is_file() and table.stat().st_size > 0


def clear_output(folder: Path) -> None:
    """Remove what an earlier run left in `folder`."""
    for pattern in (REPORT, TABLE, f"{OVERLAYS}/*.jpg", f"{VIDEOS}/*.mp4", f"{VIDEOS}/*.avi", "**/.*.partial.*"):
        for stale in folder.glob(pattern):
            stale.unlink()
