"""Runs that end early, or side by side: signals between batches, one run a folder, leftovers cleared."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from machine import PATIENCE, wait_until
from tiny import ROOT, draw_category, end_well, handlers_kept, refusal, small_flags, succeed
from torch.utils.data import DataLoader

from datasets.loading import ImageDataset, ImageLoader
from models import PatchCore
from utils import signals
from utils.errors import InputError
from utils.files import atomic_write
from utils.locks import file_lock, folder_lock

posix = pytest.mark.skipif(os.name != "posix", reason="no such signals here")


# Signals


@pytest.fixture
def watched():
    """Installs the script's signal handlers for the test."""
    with handlers_kept():
        signals.watch_signals()
        yield
        signals.leave_signals()


@posix
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)])
def test_the_batch_in_hand_is_finished(watched, number, kind):
    finished = []
    with pytest.raises(kind):
        for batch in signals.stoppable(range(5)):
            if batch == 2:
                signal.raise_signal(number)
            finished.append(batch)
    assert finished == [0, 1, 2]


@posix
def test_a_signal_while_a_batch_is_awaited(watched):
    def batches():
        yield 0
        signal.raise_signal(signal.SIGTERM)
        yield 1

    finished = []
    with pytest.raises(signals.Terminated):
        finished.extend(signals.stoppable(batches()))
    assert finished == [0]


@posix
def test_a_signal_while_the_readers_begin(watched, monkeypatch):
    """A torch iterator that is half made would complain on stderr as it ends."""
    made = []

    def begin(loader):
        signal.raise_signal(signal.SIGTERM)
        made.append(loader)
        return iter([None])

    monkeypatch.setattr(DataLoader, "__iter__", begin)
    with pytest.raises(signals.Terminated):
        list(ImageLoader(ImageDataset([], 16, "bicubic"), 1, 0, "test"))
    assert made


@posix
def test_a_batch_that_takes_too_long_is_broken_off(watched, monkeypatch):
    monkeypatch.setattr(signals, "GRACE", 0.2)
    with pytest.raises(signals.Terminated):
        for _ in signals.stoppable(range(5)):
            signal.raise_signal(signal.SIGTERM)
            wait_until(lambda: False)


@posix
@pytest.mark.parametrize(("number", "code"), [(None, 1), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_worker_that_a_signal_killed_is_no_error_of_its_own(number, code):
    """A signal to the whole group can reach a worker before it leaves signals to the script."""

    def main():
        for _ in signals.stoppable(range(5)):
            if number:
                signal.raise_signal(number)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    refusal(main, code=code)


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("explicit", [True, False])
def test_a_signal_that_becomes_another_error_is_a_signal(number, code, explicit):
    """Python before 3.12 wraps what is raised while a class is made, as importing timm does a thousand times."""

    def main():
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise RuntimeError("Error calling __set_name__") from (error if explicit else None)

    refusal(main, code=code)


@posix
def test_a_second_signal_does_not_wait(watched):
    with pytest.raises(KeyboardInterrupt):
        for _ in signals.stoppable(range(5)):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the batch went on")


@posix
def test_outside_of_batches_a_signal_takes_effect_at_once(watched):
    assert list(signals.stoppable(range(3))) == [0, 1, 2]
    with pytest.raises(signals.Terminated):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")


@posix
@pytest.mark.parametrize(
    ("number", "code", "send"),
    [(signal.SIGINT, 130, "killpg"), (signal.SIGTERM, 143, "killpg"), (signal.SIGTERM, 143, "kill")],
)
def test_signals(tmp_path, number, code, send):
    """Ctrl-C reaches the whole group of processes; a service manager's SIGTERM reaches the first one or all."""
    draw_category(tmp_path / "data" / "a")
    good = draw_category(tmp_path / "data" / "b") / "train" / "good"
    for index in range(3000):
        os.link(good / "000.png", good / f"copy {index}.png")
    flags = [*small_flags(tmp_path, "train_pc", "a", "b"), "--workers", 1, "--batch-size", 2, "--no-eval"]
    command = [sys.executable, str(ROOT / "train_pc.py"), *map(str, flags)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert "wrote" in process.stdout.readline()
        time.sleep(0.3)
        getattr(os, send)(process.pid, number)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == code
    assert err.splitlines() == ["error: interrupted" if code == 130 else "error: terminated"]
    written = [path.relative_to(tmp_path) for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert written == [Path("models/a/pc.safetensors")]
    PatchCore.load(tmp_path / written[0])


# Locks


HOLD = """
import os, pathlib, sys, utils.locks
with utils.locks.{kind}_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    if {fork} and os.fork() == 0:
        print("forked", flush=True)
    sys.stdin.read()
"""


def hold(kind: str, path: Path, fork: bool = False) -> subprocess.Popen:
    """A process that holds the lock until its input ends; with `fork` its child waits for that, too."""
    code = HOLD.format(kind=kind, fork=fork)
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


SCRIPTS = {
    "result/belt/pc": ("folder", "train_pc", ()),
    "models/belt/pc.safetensors": ("file", "train_pc", ("--no-eval",)),
    "data/belt": ("file", "make_demo_data", ("--train", 1, "--good", 0, "--anomalous", 0, "--size", 64)),
}


@pytest.mark.parametrize("target", SCRIPTS)
def test_the_second_run_says_so_and_a_third_after_the_end_works(tmp_path, target):
    kind, script, flags = SCRIPTS[target]
    if script == "train_pc":
        draw_category(tmp_path / "data" / "belt")
        flags = [*small_flags(tmp_path, script), *flags]
    else:
        flags = ["--data-root", tmp_path / "data", "--category", "belt", *flags]
    first = hold(kind, tmp_path / target)
    before = sorted(tmp_path.rglob("*"))
    said = refusal(script, *flags)
    assert "another run is writing" in said and target in said
    assert sorted(tmp_path.rglob("*")) == before
    first.communicate("")
    end_well(script, *flags)
    assert not [path for path in tmp_path.rglob("*") if "lock" in path.name]


@posix
def test_a_lock_ends_with_its_process_though_workers_live_on(tmp_path):
    first = hold("folder", tmp_path / "result", fork=True)
    first.stdout.readline()
    first.kill()  # its child goes on until the pipe closes
    os.waitpid(first.pid, 0)
    assert (tmp_path / "result" / ".lock").exists()
    with folder_lock(tmp_path / "result"):
        pass
    assert not (tmp_path / "result" / ".lock").exists()
    first.stdin.close()


def test_a_lock_leaves_nothing_and_frees_at_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "a" / "b" / "pc.safetensors"):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())
    with folder_lock(tmp_path / "a"), pytest.raises(InputError, match="another run"), folder_lock(tmp_path / "a"):
        pass


@pytest.mark.parametrize("at", ["unlink", "rmdir"])
def test_a_lock_leaves_nothing_when_a_signal_comes_as_a_failed_run_tidies_up(tmp_path, monkeypatch, at):
    """As torchrun sends one to the others when the first process fails."""
    original, calls = getattr(Path, at), []

    def interrupted(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 1:
            raise signals.Terminated
        return original(path, *args, **kwargs)

    with pytest.raises(signals.Terminated), folder_lock(tmp_path / "a" / "b"):
        monkeypatch.setattr(Path, at, interrupted)
        raise ZeroDivisionError
    assert len(calls) > 1 and not list(tmp_path.iterdir())


def test_a_lock_is_lifted_where_open_files_cannot_be_removed(tmp_path, monkeypatch):
    def unlink(path, missing_ok=False):
        raise PermissionError(13, "in use by a process", str(path))

    for _ in range(2):
        with monkeypatch.context() as windows, folder_lock(tmp_path / "a"):
            windows.setattr(Path, "unlink", unlink)
            assert (tmp_path / "a" / ".lock").exists()


# Leftovers


def leave_unfinished(path: Path) -> Path:
    """What a run leaves that is killed while it writes `path`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        os.link(temporary, path.parent / "kept")
    path.unlink()
    return (path.parent / "kept").rename(temporary)


def test_leftovers_of_a_killed_run_are_cleared_and_nothing_else(tmp_path):
    draw_category(tmp_path / "data" / "belt")
    succeed(tmp_path, "train_pc")
    names = [*("models/belt/pc.safetensors", "result/belt/pc/metrics.json"), "result/belt/pc/heatmaps/good/x y.png"]
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    cleared = [leave_unfinished(tmp_path / f"{name}x") for name in names[1:]]
    kept = [leave_unfinished(tmp_path / "models/belt/ma_clu.safetensors")]  # a run of another branch may be writing it
    kept += [tmp_path / "result/belt/pc/.notes.tmp.txt", tmp_path / "models/belt/.pc.0.tmp"]
    for path in kept[1:]:
        path.write_text("mine")
    content = (tmp_path / names[0]).read_bytes()
    cleared.append(leave_unfinished(tmp_path / names[0]))
    (tmp_path / names[0]).write_bytes(content)
    succeed(tmp_path, "train_pc")
    assert not [path for path in cleared if path.exists()]
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before | {
        path.relative_to(tmp_path) for path in kept
    }
