"""--watch: a folder that receives new files, over restarts."""

import dataclasses
import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from machine import wait_until
from PIL import Image
from stub_camera import write_video
from stub_model import RedModel
from tiny import read_json, read_rows

from datasets import incoming
from prediction import recorder
from prediction.options import PredictionSettings
from prediction.run import predict
from prediction.table import COLUMNS, read_former
from utils.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """An empty one, which is watched."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def in_short(monkeypatch):
    """Limits that a test can wait for."""
    monkeypatch.setattr(incoming, "POLL", 0.01)
    for name in ("SETTLED", "VIDEO_SETTLED"):
        monkeypatch.setattr(incoming, name, 0.2)
    monkeypatch.setattr(incoming, "PATIENCE", 0.5)


SETTINGS = PredictionSettings((), Path(), overlays=None, watch=True)


class Ended(RedModel):
    """Raises KeyboardInterrupt in place of the frame `at`, which has then been read and not looked at."""

    def __init__(self, at):
        self.left = at

    def look(self, picture):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().look(picture)


def watch(folder, out, count, **changes):
    """Watch `folder` until `count` frames were looked at and one more came; returns the table's rows."""
    settings = dataclasses.replace(SETTINGS, sources=(str(folder),), out=out, **changes)
    predict(settings, lambda: Ended(count), None, {"watch": True})
    return rows(out)


def rows(out):
    return [(Path(row["source"]).name, row["frame"], row["status"]) for row in read_rows(out / "predictions.csv")]


def add(path, red=0, age=0.0):
    """A new image, written `age` seconds ago."""
    image = np.full((20, 30, 3), (red, 40, 40), np.uint8)
    Image.fromarray(image).save(path)
    os.utime(path, (time.time() - age,) * 2)


def test_each_file_once_in_order_over_restarts(folder, out):
    for name, age in (("c", 30), ("a", 20), ("b", 10), ("last", 0)):
        add(folder / f"{name}.png", 250, age)
    assert watch(folder, out, 3, overlays="anomalous") == [
        (f"{name}.png", str(index), "ok") for index, name in enumerate("cab")
    ]
    config = read_json(out / "config.json")
    assert config["finished"] and config["statuses"] == {"ok": 3} and (out / "report.html").exists()
    add(folder / "later.png", 0)
    assert [name for name, *_ in watch(folder, out, 1, overlays="anomalous")] == ["c.png", "a.png", "b.png", "last.png"]
    add(folder / "a.png", 0, age=-5)  # another picture of the same name
    (folder / "b.png").unlink()
    add(folder / "end.png", 0, age=-9)
    relative = Path(os.path.relpath(folder))  # the same folder
    assert [name for name, *_ in watch(relative, out, 2)][4:] == ["later.png", "a.png"]
    assert sorted(path.name for path in (out / "overlays").iterdir()) == [
        *("000001_c.jpg", "000002_a.jpg", "000003_b.jpg", "000004_last.jpg")
    ]


def test_other_thresholds_in_one_table_are_told(folder, out, capsys):
    for name, age in (("a", 9), ("b", 8), ("c", 7)):
        add(folder / f"{name}.png", age=age)
    for threshold, told in ((None, 0), (None, 0), (0.5, 1)):
        watch(folder, out, 1 if threshold is None else 0, threshold=threshold)
        assert capsys.readouterr().err.count("go on with other thresholds") == told


def test_without_room_for_pictures_rows_and_alarms_go_on(folder, out, monkeypatch, capsys):
    def full(path, picture):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(recorder, "write_picture", full)
    for name, age in (("a", 9), ("b", 8), ("c", 7)):
        add(folder / f"{name}.png", 250, age)
    assert len(watch(folder, out, 2, overlays="anomalous")) == 2
    assert capsys.readouterr().err.count("000001_a.jpg: No space left on device; rows and alarms go on") == 1
    settings = dataclasses.replace(SETTINGS, sources=(str(folder),), out=out / "plain", overlays="all", watch=False)
    with pytest.raises(OSError, match="No space left"):
        predict(settings, RedModel, None, {"watch": False})


def test_the_rows_of_a_watched_folder_stay_when_the_flag_is_forgotten(folder, out):
    add(folder / "a.png", age=9)
    add(folder / "b.png", age=8)
    found = watch(folder, out, 1)
    settings = dataclasses.replace(SETTINGS, sources=(str(folder / "a.png"),), out=out, watch=False)
    with pytest.raises(InputError, match="give --watch, or choose another --out"):
        predict(settings, RedModel, None, {"watch": False})
    assert rows(out) == found


def test_what_a_kill_cut_off_is_looked_at_again(folder, out):
    for index in range(4):
        add(folder / f"{index}.png", age=9 - index)
    watch(folder, out, 3)
    whole = (out / "predictions.csv").read_bytes()
    for cut in (1, 2, 8, 30):
        (out / "predictions.csv").write_bytes(whole[:-cut])
        shutil.rmtree(out / "overlays", ignore_errors=True)
        found = watch(folder, out, 1 if cut > 1 else 0)
        assert found == [(f"{index}.png", str(index), "ok") for index in range(3)], cut
    (out / "predictions.csv").write_text("other,columns\n1,2\n")
    with pytest.raises(InputError, match="another version"):
        watch(folder, out, 1)
    assert (out / "predictions.csv").read_text() == "other,columns\n1,2\n"


def test_tables_that_were_cut_within_a_letter_or_have_long_cells(tmp_path):
    table, row = tmp_path / "predictions.csv", "/煤/{}.png,0,2026-11-28T03:00:00+00:00,3.0,1,5,{},ok\n"
    whole = ",".join(COLUMNS) + "\n" + row.format(1, "[]") + row.format("带" * 9, f'"{[[1000, 1000, 20, 20]] * 9000}"')
    for saved in (whole, "\ufeff" + whole):  # Excel's mark
        table.write_text(saved, encoding="utf-8", newline="")
        assert read_former(table).rows == 2 and table.read_text(encoding="utf-8") == whole
    start = whole.encode().index("带".encode())
    for cut in range(start, start + 4):
        table.write_bytes(whole.encode()[:cut])
        assert read_former(table).rows == 1
    for name in ("带", "é"):  # saved by a spreadsheet
        table.write_bytes((",".join(COLUMNS) + "\n" + row.format(name, "[]")).replace("煤", "").encode("gbk"))
        before = table.read_bytes()
        with pytest.raises(InputError, match="UTF-8"):
            read_former(table)
        assert table.read_bytes() == before


def test_a_file_that_grows_is_not_looked_at_before_it_is_complete(tmp_path, folder, out):
    add(tmp_path / "whole.png", 250)
    data = (tmp_path / "whole.png").read_bytes()

    def fill():
        with open(folder / "slow.png", "wb") as file:
            for byte in range(0, len(data), 10):
                file.write(data[byte : byte + 10])
                file.flush()
                time.sleep(0.05)
            grown.append(len((out / "predictions.csv").read_text().splitlines()))
        (folder / "broken.png").write_bytes(data[:-30])
        (folder / "empty.png").touch()
        wait_until(lambda: "empty" in (out / "predictions.csv").read_text())
        add(folder / "z.png")

    grown = []
    thread = threading.Thread(target=fill)
    thread.start()
    found = watch(folder, out, 1)
    thread.join()
    assert grown[0] <= 1  # not even the header is written before the first row
    assert found[0] == ("slow.png", "0", "ok")
    assert sorted(found[1:]) == [("broken.png", "1", "unreadable"), ("empty.png", "2", "unreadable")]


def test_a_video_goes_on_where_it_was_left(folder, out):
    images = [np.full((24, 32, 3), 20 * index, np.uint8) for index in range(6)]
    write_video(folder / "belt.avi", images)
    first = watch(folder, out, 4)
    assert first == [("belt.avi", str(index), "ok") for index in range(4)]
    add(folder / "z.png")
    found = watch(folder, out, 2)
    assert found == [*[("belt.avi", str(index), "ok") for index in range(6)], ("belt.avi", "5", "done")]


def test_a_folder_that_goes_and_comes_back(tmp_path, folder, out, capsys):
    add(folder / "a.png", age=9)

    def move():
        wait_until(lambda: (out / "predictions.csv").exists() and "a.png" in (out / "predictions.csv").read_text())
        folder.rename(tmp_path / "away")
        wait_until(lambda: "cannot be read" in said())
        (tmp_path / "away").rename(folder)
        add(folder / "b.png")

    lines = []

    def said():
        lines.append(capsys.readouterr().err)
        return "".join(lines)

    thread = threading.Thread(target=move)
    thread.start()
    assert watch(folder, out, 1) == [("a.png", "0", "ok")]
    thread.join()
    assert "can be read again" in said()


@pytest.mark.parametrize(
    "sources, out", [(["in", "in"], "out"), (["in/a.png"], "out"), (["in"], "in/out"), (["0"], "o")]
)
def test_what_cannot_be_watched_is_refused(tmp_path, monkeypatch, sources, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    add(tmp_path / "in/a.png")
    settings = dataclasses.replace(SETTINGS, sources=tuple(sources), out=Path(out))
    with pytest.raises(InputError):
        predict(settings, RedModel, None, {})
    assert not (tmp_path / out).exists()
