"""Hostile files, read one after the other in watched processes: time, memory, writes, connections, programs.

Whatever the file, its reader must return or raise InputError. `campaign` counts the cases in which it does not.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hardness import corpus
from hardness.mutations import Mutation, of_bytes, of_json, of_png, of_safetensors, of_tar, of_zip
from published_files import Published

from datasets.images import Decoding, read_mask, read_picture
from models import BRANCHES
from models.fusion.operating_point import OperatingPoint
from models.published.checkpoints import FILES, KMEANS_FILE, read_published
from utils.errors import InputError

SECONDS, BYTES = 10, 2 << 30  # limits: processor time, and memory beyond that of a clean run
CHUNK = 250  # cases a process; a crash costs the rest of one
PROGRAMS = re.compile(r"subprocess\.Popen|os\.(system|exec|spawn|posix_spawn|fork)|pty\.spawn|pickle\.find_class")
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.rmtree"}
NO_MEMORY = re.compile(r"MemoryError|allocate|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A kind of file: good examples, how they are damaged, and their reader."""

    seeds: list[Path]
    mutations: list[Mutation]
    read: Callable[[Path], object]


def targets(folder: Path, models: Path) -> dict[str, Target]:
    """All kinds; good files are made in `folder`, those of the three branches lie in `models`."""
    branches = dict(BRANCHES)
    published = Published(6, 8, 10).write(folder / "published")
    network = corpus.weights(folder / "weights")
    return {
        "checkpoints": Target(
            [models / f"{name}.safetensors" for name in branches],
            [of_bytes, of_safetensors, of_safetensors],
            lambda path: corpus.load_and_predict(branches[path.stem], path),
        ),
        "operating points": Target(
            [corpus.operating_point(folder / "usad.json")],
            [of_bytes, of_json],
            lambda path: OperatingPoint.read(path.parent),
        ),
        "published tensors": Target(
            [published / name for name in FILES if name != KMEANS_FILE],
            [of_bytes, of_zip],
            lambda path: read_published(path.parent),
        ),
        "published k-means": Target([published / KMEANS_FILE], [of_bytes], lambda path: read_published(path.parent)),
        "weights (.pth)": Target([network[0]], [of_bytes, of_zip], corpus.read_weights),
        "weights (.safetensors)": Target([network[1]], [of_bytes, of_safetensors], corpus.read_weights),
        "archives": Target(corpus.archives(folder / "archives"), [of_bytes, of_tar], corpus.unpack),
        "images": Target(corpus.images(folder / "images"), [of_bytes, of_png], read_both),
        "masks": Target(corpus.images(folder / "masks"), [of_bytes, of_png], lambda path: read_mask([path])),
    }


def read_both(path: Path) -> None:
    """Read an image, and read it as a 12-bit camera's, which takes another decoder."""
    read_picture(path)
    read_picture(path, Decoding(bit_depth=12))


class Watch:
    """Records, by Python's audit events, whatever a case does that reading a file never needs."""

    def __init__(self) -> None:
        self.folder: str | None = None  # where a case may write; None: nothing is watched
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in ("socket.connect", "socket.getaddrinfo") or PROGRAMS.match(event):
            self.seen.append(f"{event} {arguments}"[:200])
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and set(mode) & set("wxa+")
            if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                self._check(event, path)
        elif event in CHANGES:
            path, place = arguments[0], arguments[-1]  # relative to an open folder, if that is a number above 0
            self._check(event, f"/proc/self/fd/{place}/{path}" if isinstance(place, int) and place > 0 else path)

    def _check(self, event: str, path: object) -> None:
        inside = isinstance(path, str | os.PathLike) and Path(os.path.realpath(path)).is_relative_to(self.folder)
        if not inside and path != os.devnull:
            self.seen.append(f"{event} {path!r} outside of its folder")

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        """Watch during the block; gives what was seen."""
        self.folder, self.seen = os.path.realpath(folder), []
        yield self.seen
        self.folder = None


def try_case(watch: Watch, target: Target, seed: Path, data: bytes, folder: Path) -> list[str]:
    """What goes wrong when `data` is read in place of the good file `seed`; [] if nothing does."""
    for neighbour in seed.parent.iterdir() if len(target.seeds) < 9 else ():  # the published files are read together
        if not (folder / neighbour.name).exists():
            (folder / neighbour.name).symlink_to(neighbour)
    path = folder / seed.name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    wrong = []
    signal.alarm(6 * SECONDS)  # a reader that waits for ever ends the process
    with watch.over(folder) as seen:
        try:
            target.read(path)
        except InputError as error:
            if NO_MEMORY.search(str(error)):
                wrong.append(f"message {str(error)!r}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"{type(error).__name__}: {str(error)[:120]} ({Path(where.filename).name}:{where.lineno})")
    signal.alarm(0)
    if time.process_time() - start > SECONDS:
        wrong.append(f"took {time.process_time() - start:.0f} s")
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 > BYTES:
        wrong.append("took over 2 GB")
    path.unlink()
    return wrong + seen


def _process(target: Target, seed: int, folder: Path) -> None:
    """Run CHUNK cases; `case` is the present one, `log` has a line for each that is finished."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # progress bars, and what C libraries print
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2 * BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng, watch, inside = random.Random(seed), Watch(), folder / "inside"
    inside.mkdir()
    with open(folder / "log", "a", buffering=1) as log:
        for number in range(CHUNK):
            good = rng.choice(target.seeds)
            data = rng.choice(target.mutations)(rng, good.read_bytes())
            (folder / "case").write_bytes(data)
            if wrong := try_case(watch, target, good, data, inside):
                (folder / f"finding {number}").write_bytes(data)
            log.write(json.dumps(wrong) + "\n")


def campaign(target: Target, cases: int, seed: int, folder: Path) -> Iterator[list[str]]:
    """What went wrong with each of about `cases` cases; those that did are kept in `folder`, for a test."""
    for number in range(-(-cases // CHUNK)):
        place = folder / f"chunk {number}"
        place.mkdir(parents=True)
        arguments = target, hash((seed, number)), place
        process = multiprocessing.get_context("fork").Process(target=_process, args=arguments, daemon=True)
        process.start()
        process.join()
        yield from map(json.loads, (place / "log").read_text().splitlines())
        if process.exitcode:
            (place / "case").rename(place / "finding at the end")
            yield [f"the process ended with {process.exitcode}"]
