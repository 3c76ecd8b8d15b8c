"""Scripts killed, interrupted and terminated at random moments: what is on disk then, and after the next run."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from published_files import Published
from tiny import SMALL_NETWORKS, contents, draw_category, small_flags

from utils.command_line import run

SECONDS = 10  # after which an interrupted script has ended
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = {signal.SIGINT: "error: interrupted", signal.SIGTERM: "error: terminated"}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def commands(root: Path, seed: int) -> dict[str, list]:
    """The command line of every script on tiny data; the seed decides what they write."""
    run = ["--workers", 1, "--save-maps"]
    trained = {
        script: [*small_flags(root, script), "--seed", seed, "--holdout-ratio", 0.25, *run] for script in SMALL_NETWORKS
    }
    looked = ["--models-dir", root / "models", "--category", "belt", "--device", "cpu", "--out", root / "predictions"]
    frames = root / "data" / "belt" / "test"
    drawn = ["--train", 3, "--good", 1, "--anomalous", 2, "--size", 64, "--workers", 2, "--seed", seed]
    networks = [text for name in ("ma-clu", "ma2patch", "pc") for text in (f"--{name}-weights", "random")]
    return {
        **trained,
        "test_fusion": [*small_flags(root, "test_fusion"), "--lambda-obj", seed / 100, *run],
        "predict": [*looked, frames, "--threshold", seed, "--pixel-threshold", 0.1, "--overlays", "all"],
        "make_demo_data": ["--data-root", root / "data", "--category", "demo", *drawn],
        "convert_published": [root / f"published {seed}", "--models-dir", root / "converted", *networks],
    }


class Script(multiprocessing.get_context("fork").Process):
    """A script in a process of its own, forked after the imports and at the head of its own process group.

    `end_at` kills it just before the file operation of that number; `<log>.count` holds how many there were.
    """

    def __init__(self, name: str, flags: list, log: Path, end_at: int | None = None) -> None:
        super().__init__()
        self.script, self.flags, self.log, self.end_at = name, flags, log, end_at

    def run(self) -> None:
        os.setsid()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [f"{self.script}.py", *map(str, self.flags)]
        count, script = 0, os.getpid()

        def note(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in FILE_EVENTS and os.getpid() == script:
                count += 1
                if count == self.end_at:
                    os.kill(script, signal.SIGKILL)

        sys.addaudithook(note)
        try:
            run(import_module(self.script).main)
        finally:
            Path(f"{self.log}.count").write_text(str(count))

    def signal(self, number: int, group: bool) -> None:
        """Send a signal to the script, or to all its processes, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number) if group else os.kill(self.pid, number)


class Bench:
    """A folder as an earlier run left it, as each undisturbed script leaves it, and a copy in which to disturb them."""

    def __init__(self, folder: Path) -> None:
        self.work, self.before, self.log = folder / "work", folder / "before", folder / "log"
        self.after: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        self.events: dict[str, int] = {}
        draw_category(self.work / "data" / "belt")
        for seed in (5, 22):
            Published(384, 768, 1536, seed=seed).write(self.work / f"published {seed}")
        for name in commands(self.work, 5):
            self.finish(name, seed=5)
        shutil.copytree(self.work, self.before)
        for name in commands(self.work, 22):
            self.lay()
            start = time.monotonic()
            self.finish(name)
            self.seconds[name] = time.monotonic() - start
            self.events[name] = int(Path(f"{self.log}.count").read_text())
            self.after[name] = shutil.copytree(self.work, folder / f"after {name}")

    def lay(self) -> None:
        """Restore what the earlier run left."""
        shutil.rmtree(self.work)
        shutil.copytree(self.before, self.work)

    def begin(self, name: str, seed: int = 22, end_at: int | None = None) -> Script:
        """Start a script."""
        process = Script(name, commands(self.work, seed)[name], self.log, end_at)
        process.start()
        return process

    def finish(self, name: str, seed: int = 22) -> list[str]:
        """Run a script to its end; returns what went wrong."""
        process = self.begin(name, seed)
        process.join()
        return [] if process.exitcode == 0 else [f"exit code {process.exitcode}: {self.log.read_text()[-300:]}"]

    def disturb(self, numbers: Sequence[int], count: int, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
        """Send the scripts in turn a signal, half of the SIGKILLs at a file operation; returns what went wrong."""
        for case in range(count):
            name, number = list(self.after)[case % len(self.after)], rng.choice(numbers)
            self.lay()
            end_at = rng.randint(1, self.events[name]) if number == signal.SIGKILL and rng.random() < 0.5 else None
            process = self.begin(name, end_at=end_at)
            if end_at is None:
                handled = 0 if number == signal.SIGKILL else 0.05  # seconds until its handlers are in place
                time.sleep(handled + rng.uniform(0, self.seconds[name]))
                process.signal(number, group=rng.random() < 0.5)
            start = time.monotonic()
            process.join(60 if end_at is None else None)
            took, log, wrong = time.monotonic() - start, self.log.read_text(errors="replace"), []
            if process.exitcode not in (0, CODES[number]) or (end_at is None and took > SECONDS):
                wrong.append(f"exit code {process.exitcode} after {took:.1f} s: {log[-600:]}")
            elif process.exitcode and number in SAID:
                said = [line for line in log.splitlines() if "error" in line.lower() or "  File" in line]
                wrong += [] if said == [SAID[number]] else [f"said {log[-600:]}"]
            yield name, wrong + self.state(name) + self.rerun(name) + orphans(process.pid)

    def state(self, name: str) -> list[str]:
        """What is wrong on disk after a disturbed run: every file must be whole, the old one or the new one."""
        wrong = []
        known = {place: read_all(place) for place in (self.before, self.after[name])}
        found = read_all(self.work)
        for path, content in found.items():
            if any(content == files.get(path) for files in known.values()) or is_whole(self.work / path, content):
                continue
            if name == "predict" and path.name == "predictions.csv":  # rows of a run that says it is not finished
                unfinished = not json.loads((self.work / "predictions/config.json").read_text())["finished"]
                if unfinished and known[self.after[name]][path].startswith(content):
                    continue
            wrong.append(f"{path} is neither the old nor the new one")
        for path in known[self.before]:
            swapped = path.parts[:2] == ("data", "demo") and (self.work / "data" / ".demo.replaced").exists()
            cleared = name == "predict" and path.parts[0] == "predictions"
            if path not in found and not swapped and not cleared:
                wrong.append(f"{path} is gone")
        return wrong

    def rerun(self, name: str) -> list[str]:
        """What is wrong after running the command again: everything must be as after an undisturbed run."""
        wrong = self.finish(name)
        expected, found = read_all(self.after[name]), read_all(self.work)
        for path, content in expected.items():
            if found.get(path) != content and not is_whole(self.work / path, found.get(path, b"")):
                wrong.append(f"{path} differs after another run")
        wrong += [f"{path} is left over" for path in found.keys() - expected.keys()]
        hidden = [path for path in self.work.rglob(".*") if path.name != ".usad_demo.json"]
        return wrong + [f"{path.name} is left over" for path in hidden]


def read_all(root: Path) -> dict[Path, bytes]:
    """All files that are not hidden."""
    found = {Path(name): content for name, content in contents(root).items()}
    return {name: content for name, content in found.items() if not any(part[0] == "." for part in name.parts)}


def is_whole(path: Path, content: bytes) -> bool:
    """Whether a file that holds times is complete."""
    if path.name == "config.json":
        return isinstance(json.loads(content), dict)
    return path.name == "report.html" and content.rstrip().endswith(b"</html>")


def orphans(group: int) -> list[str]:
    """Processes of the script's group that are still running."""
    for _ in range(10 * SECONDS):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return []
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return ["processes live on"]
