"""From frames to rows and alarms, with any model that gives scores and maps."""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets.camera import Camera, CameraLost
from datasets.frames import Frame
from datasets.images import Decoding
from datasets.incoming import Incoming
from datasets.sources import Source, find_sources
from models.fusion.prediction import Model
from prediction.options import PredictionSettings
from prediction.recorder import ENDLESS, SCRIPTS, TABLE, Recorder, check_output, clear_output, goes_on, latency_words
from prediction.table import read_former
from prediction.webhook import Webhook
from utils.command_line import warn
from utils.errors import InputError
from utils.files import PROGRAM, read_json, write_json
from utils.locks import folder_lock
from utils.machine import environment
from utils.safe_text import redact
from utils.signals import Terminated, stoppable


def predict(
    settings: PredictionSettings,
    load: Callable[[], Model],
    batch_size: int | None,
    flags: dict[str, Any],
    script: str = SCRIPTS[0],
) -> None:
    """Look at all sources, which are known to exist when `load` gives the model, and write the results.

    `batch_size` None leaves the number of frames at a time to the model; `flags` go into config.json.
    """
    webhook = None if settings.webhook is None else Webhook(settings.webhook)
    limits = settings.freeze, settings.give_up
    if settings.watch and (len(settings.sources) > 1 or not os.path.isdir(settings.sources[0])):
        raise InputError("--watch takes one SOURCE, a folder that exists")
    sources = [Incoming(Path(settings.sources[0]))] if settings.watch else find_sources(settings.sources, *limits)
    check_output(settings, sources)
    if isinstance(sources[0], ENDLESS):
        if batch_size:
            raise InputError("--batch-size has no effect here: frames go one by one, as they come; leave it out")
        batch_size = 1
    camera = sources[0] if isinstance(sources[0], Camera) else None
    if camera is None and limits != (None, None):
        raise InputError("--freeze and --give-up have an effect with a camera only; leave them out")
    with folder_lock(settings.out), contextlib.closing(camera) if camera else contextlib.nullcontext():
        if camera:
            camera.open(settings.every)
        model = load()
        take_thresholds(model, settings)
        shown = {"sources": [redact(source) for source in settings.sources], "webhook": webhook and webhook.name}
        former = read_former(settings.out / TABLE) if settings.watch and goes_on(settings.out) else None
        config = {"program": PROGRAM, "script": script, "finished": False, "settings": {**flags, **shown}}
        point = config["operating_point"] = point_in_force(model)
        if former and read_json(settings.out / "config.json").get("operating_point", point) != point:
            warn(f"the rows in {settings.out} go on with other thresholds; another --out keeps them apart")
        write_json(settings.out / "config.json", config)
        if former:
            sources[0].skip(former.files, former.last)
        else:
            clear_output(settings.out)
        start = time.perf_counter()
        with contextlib.closing(Recorder(settings, model, webhook, former.rows if former else 0)) as recorder:
            end = look(sources, batch_size or model.batch_size, recorder)
        config |= {
            "finished": not isinstance(end, CameraLost),
            "frames": recorder.frames,
            "anomalous": None if model.threshold is None else recorder.table.alarms,
            "dropped": sum(source.dropped for source in sources),
            "statuses": dict(recorder.table.statuses),
            "latency_ms": recorder.latency(),
            "webhook": webhook and {"sent": webhook.sent, "given_up": webhook.given_up},
            "unreadable": [problem for source in sources for problem in source.problems],
            **environment(model.device),
            "seconds": round(time.perf_counter() - start, 3),
        }
        write_json(settings.out / "config.json", config)
        if settings.overlays:
            recorder.write_report(config)
        summarize(settings, config)
    if isinstance(end, Terminated | CameraLost):
        raise end


def look(sources: list[Source] | list[Incoming], batch_size: int, recorder: Recorder) -> BaseException | None:
    """All frames of the sources, in order; returns what ended a camera or a watched folder, often a signal."""
    settings, model = recorder.settings, recorder.model
    decoding = Decoding(settings.max_megapixels, model.bit_depth)
    try:
        for source in sources:
            recorder.start(source)
            with tqdm(desc=source.name, unit="frame", leave=False, disable=settings.json_lines or None) as progress:
                for frames in stoppable(batches(source.frames(settings.every, decoding), batch_size)):
                    images = [frame.image for frame in frames if frame.image is not None]
                    predictions = iter(model(images, batch_size) if images else ())
                    for frame in frames:
                        recorder.add(frame, None if frame.image is None else next(predictions))
                    progress.update(len(images))
    except (KeyboardInterrupt, Terminated, CameraLost) as error:
        if not isinstance(sources[0], ENDLESS):
            raise
        return error
    return None


def take_thresholds(model: Model, settings: PredictionSettings) -> None:
    """Let the given thresholds replace the stored operating point; warns if there are none."""
    if (settings.threshold, settings.pixel_threshold) != (None, None):
        model.operating_point = None
    if settings.threshold is not None:
        model.threshold = settings.threshold
    if settings.pixel_threshold is not None:
        model.pixel_threshold = settings.pixel_threshold
    if settings.min_area and model.pixel_threshold is None:
        raise InputError("--min-area has no effect without a threshold of the map; give --pixel-threshold too")
    model.min_area = settings.min_area
    if model.threshold is None:
        for flag, is_given in (("--smooth", settings.smooth > 1), ("--webhook", settings.webhook is not None)):
            if is_given:
                raise InputError(f"{flag} has no effect without a threshold; give --threshold, or leave it out")
        warn(
            "the model has no operating point: scores only. Thresholds come from test_fusion.py --false-alarm-rate "
            "0.01 (checkpoints trained with --holdout-ratio), or from --threshold and --pixel-threshold"
        )


def point_in_force(model: Model) -> dict[str, Any] | None:
    """The thresholds in force: the stored operating point with all its figures, or the two that were given."""
    if model.operating_point:
        return model.operating_point.figures()
    given = {"threshold": model.threshold, "pixel_threshold": model.pixel_threshold}
    return None if model.threshold is model.pixel_threshold is None else given


def batches(frames: Iterator[Frame | None], size: int) -> Iterator[list[Frame]]:
    """Lists of `size` frames, the last one shorter; where a source gives None for want of frames, shorter ones."""
    while batch := list(itertools.islice(frames, size)):
        yield [frame for frame in batch if frame is not None]


def summarize(settings: PredictionSettings, config: dict[str, Any]) -> None:
    """Print the last line; raises InputError if some files could not be read."""
    line = f"{config['frames']} frames"
    if config["anomalous"] is not None:
        line += f", {config['anomalous']} anomalous"
    if config["dropped"]:
        line += f", {config['dropped']} dropped because they came faster than they could be looked at"
    if config["webhook"]:
        line += f", {config['webhook']['sent']} alarms sent and {config['webhook']['given_up']} given up"
    if config["latency_ms"]:
        line += f", {latency_words(config['latency_ms'])} from frame to row"
    print(f"{line}; results in {settings.out}", file=sys.stderr if settings.json_lines else sys.stdout, flush=True)
    problems = config["unreadable"]
    for problem in problems:
        print(f"unreadable: {problem}", file=sys.stderr)
    if problems:
        raise InputError(f"{len(problems)} file(s), listed above, could not be read; the others are in {settings.out}")
