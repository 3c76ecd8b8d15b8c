"""Disks that are full or read-only: one line, exit code 1, and only complete files, old or new."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stub_camera import write_video
from tiny import contents, end_well, refusal, run_in_process, small_files, small_flags

from datasets.coalad import extract
from utils.files import atomic_write, write_text


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A separate disk of 24 MB; only root can mount one."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    path = tmp_path_factory.mktemp("disk")
    options = ["-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def copied(trained, disk):
    """The trained folder on that disk, which is emptied afterwards."""
    root = disk / "work"
    shutil.copytree(trained, root)
    try:
        yield root
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def place(trained, disk):
    with copied(trained, disk) as root:
        yield root


def leave_free(disk, kilobytes: int) -> None:
    """Fill the disk except for that many kilobytes."""
    gc.collect()  # a file that an earlier run still maps would free its place later
    usage = shutil.disk_usage(disk)
    (disk / "filler").write_bytes(bytes(max(usage.free - 1024 * kilobytes, 0)))


def command(root, script: str) -> list:
    """A script's command line on the place, none of whose files the earlier runs wrote in the same way."""
    if script == "predict":
        flags = ["--models-dir", root / "models", "--category", "belt", "--device", "cpu", "--threshold", -1e9]
        frames = [root / "data" / "belt" / "test", *sorted(root.glob("*.avi"))]
        return [script, *frames, *flags, "--pixel-threshold", 0, "--out", root / "predictions"]
    if script == "make_demo_data":
        size = ("--train", 4, "--good", 2, "--anomalous", 2, "--size", 128, "--workers", 1)
        return [script, "--data-root", root / "data", "--category", "demo", *size]
    flags = small_flags(root, script)
    if script == "test_fusion":
        flags += ["--false-alarm-rate", 0.4]
    else:
        flags += ["--holdout-ratio", 0.25, "--seed", 5]
    return [script, *flags, "--save-maps"]


FULL = {  # free kilobytes, and the kinds of files that the errors then name
    "train_pc": ((0, 12, 100, 250), {".safetensors", ".png"}),
    "test_fusion": ((0, 8, 250, 700), {".tiff"}),
    "predict": ((0, 4, 30, 120), {".json", ".jpg", ".html"}),
    "make_demo_data": ((0, 30, 60), set()),
}


@pytest.mark.parametrize("script", FULL)
def test_full_disk(trained, disk, script):
    """Where the disk is full in the middle of the run: whatever there is, is whole."""
    sizes, kinds = FULL[script]
    named = set()
    for kilobytes in sizes:
        with copied(trained, disk) as place:
            error = fill_and_run(place, disk, script, kilobytes)
        named.update(re.findall(r"(\.\w+): (?:No space|the video)", error))
    assert named >= kinds


def fill_and_run(place, disk, script: str, kilobytes: int) -> str:
    """The last line that the script says on the full disk."""
    if script == "predict":
        write_video(place / "belt.avi", [np.full((56, 72, 3), value, np.uint8) for value in (60, 90, 120)], fps=5)
    before = contents(place)
    leave_free(disk, kilobytes)
    finished = run_in_process(*command(place, script))
    assert finished.code == 1, finished
    *_, last = finished.err.splitlines()
    assert last.startswith("error: ") and re.search("No space left on device|is the disk full", last), finished.err
    assert "Traceback" not in finished.err and len(finished.err.splitlines()) <= 2  # a warning may stand before it
    found = contents(place)
    assert not list((place / "data").glob("*demo*"))  # nor an empty folder
    if kilobytes == 0:
        assert found == before
    (disk / "filler").unlink()
    end_well(*command(place, script))
    after = contents(place)
    for name, content in found.items():
        whole = content in (before.get(name), after.get(name)) or (
            name.endswith("report.html") and b"</html>" in content
        )
        if name.endswith("config.json"):
            whole = isinstance(json.loads(content), dict)
        if name.endswith("predictions.csv"):  # rows of a run that says it is not finished
            unfinished = b'"finished": false' in found[name.replace("predictions.csv", "config.json")]
            whole = content == after[name] or (unfinished and after[name].startswith(content))
        assert whole, name
    assert before.keys() <= found.keys()
    hidden = {Path(name).name for name in after if Path(name).name.startswith(".")}
    assert hidden <= {".usad_demo.json"}
    return last


def test_read_only_disk(place, disk):
    before = contents(place)
    gc.collect()  # a file that an earlier run still writes to keeps the disk writable
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for script in FULL:
        assert re.search("cannot be written|Read-only", refusal(*command(place, script), code=1))
    assert contents(place) == before


def test_unpacking_onto_a_full_disk(place, disk, tmp_path):
    from hardness import corpus

    (disk / "data set").mkdir()
    archive = corpus.archives(tmp_path / "archives")[0]
    leave_free(disk, 0)
    with pytest.raises(OSError, match="No space") as error:
        extract(archive, disk / "data set")
    assert error.value.errno == errno.ENOSPC


def test_no_file_may_grow(tmp_path):
    """Where no disk can be mounted, a limit on the size of files stands in for a full one."""
    path = tmp_path / "metrics.json"
    write_text(path, "whole")
    with small_files(2000), pytest.raises(OSError, match="File too large") as error:
        write_text(path, "x" * 3000)
    assert error.value.filename == str(path)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_the_disk_is_told_to_keep_it_before_the_name_changes(tmp_path, monkeypatch):
    """After a power cut there is the old file or the new one: the content is on the disk before the name."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a)))
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert done == ["fsync", "replace"]
