"""A camera that misbehaves: what is noticed, what is told, and how soon its pictures are back."""

import itertools
import threading
import time

import numpy as np
import pytest
from hardness import camera as campaign
from machine import resident, wait_until
from stub_camera import COLOR, Capture, StubCamera

from datasets import connection
from datasets.camera import Camera, CameraLost, as_rgb, is_grey
from datasets.frames import GREY, LOST, OK, RESIZED
from datasets.images import Decoding

FREEZE = 0.6  # seconds


class Watch:
    """Takes a camera's frames in a thread, and notes when each came."""

    def __init__(self, camera: Camera) -> None:
        self.camera, self.frames, self.error = camera, [], None
        self._stop = False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        try:
            for frame in self.camera.frames(1):
                if frame is not None:
                    self.frames.append((time.monotonic(), frame))
                if self._stop:
                    return
        except CameraLost as error:
            self.error = error

    def statuses(self, since: int = 0) -> list[str]:
        """Without repetitions."""
        found = [frame.status for _, frame in self.frames[since:]]
        return [status for index, status in enumerate(found) if index == 0 or found[index - 1] != status]

    def __enter__(self):
        self._thread.start()
        wait_until(lambda: self.frames or self.error)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        self.camera.close()


FAULTS = campaign.FAULTS | {"large": (RESIZED, OK, RESIZED)}  # of another size, until it is well again


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_the_pictures_come_back(fault, capsys):
    """All from a fault to the recovery, and colours as before."""
    with StubCamera() as stub, Watch(Camera(stub.address, freeze=FREEZE)) as watch:
        wait_until(lambda: len(watch.frames) > 5)
        first, start = len(watch.frames), time.monotonic()
        stub.disturb(fault)
        wait_until(lambda: set(FAULTS[fault]) <= set(watch.statuses(first)))
        noticed = time.monotonic() - start
        stub.recover(fault)
        back = time.monotonic()
        wait_until(lambda: sum(frame.status == OK for seen, frame in watch.frames if seen > back) > 5)
    told = [status for status in watch.statuses(first) if status != OK]
    assert [*dict.fromkeys(told)] == [*dict.fromkeys(status for status in FAULTS[fault] if status != OK)]
    recovered = next(seen for seen, frame in watch.frames if seen > back and frame.status == OK)
    assert noticed < FREEZE + 5 and recovered - back < 10  # on a busy machine; else a third of it
    assert all(
        np.allclose(frame.image.mean((0, 1)), COLOR, atol=3)
        for _, frame in watch.frames
        if frame.image is not None and frame.status == OK
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"warning: {stub.address}: ") and lines[-1].partition(" after")[0].endswith("again")
    assert len(lines) <= 4


@pytest.mark.parametrize(("fault", "status"), [("large", RESIZED), ("grey", GREY)])
def test_what_changes_before_the_first_frame_is_looked_at_is_told(fault, status):
    with StubCamera() as stub:
        camera = Camera(stub.address)
        camera.open(1)  # then the model is loaded
        stub.disturb(fault)
        sent = stub.sent
        wait_until(lambda: stub.sent > sent + 20)
        with Watch(camera) as watch:
            wait_until(lambda: status in watch.statuses())
    assert watch.statuses()[0] == status


def test_a_camera_that_stays_away_is_given_up():
    with StubCamera() as stub, Watch(Camera(stub.address, freeze=FREEZE, give_up=1.5)) as watch:
        stub.down()
        gone = time.monotonic()
        wait_until(lambda: watch.error)
        assert 1 < time.monotonic() - gone < 10 and "--give-up" in str(watch.error)
        stub.up()
    assert watch.statuses() == [OK, LOST]


def noise(top: int = 255, kind: type = np.uint8, shape: tuple[int, ...] = (8, 8, 3)):
    """A function that gives another picture of noise each time."""
    rng = np.random.default_rng(0)
    return lambda: rng.integers(0, top, shape, dtype=kind)


def test_pauses_grow(monkeypatch):
    pauses, counts = [], iter([3])
    monkeypatch.setattr(connection.Connection, "_wait", lambda self: pauses.append(self.pause))
    monkeypatch.setattr(connection, "_open_capture", lambda _: Capture(next(counts, 0), picture=noise()))
    with Watch(Camera("rtsp://somewhere")) as watch:
        wait_until(lambda: len(pauses) > 14)
    assert pauses[:15] == [0, *np.minimum(0.5 * 1.5 ** np.arange(14), 30)]
    assert watch.statuses() == [OK, LOST]


def test_a_pause_ends_once_the_source_can_be_reached(monkeypatch):
    answers = iter([True, False, False, True])
    monkeypatch.setattr(connection, "_is_reachable", lambda _: next(answers))
    waiting = connection.Connection("rtsp://somewhere", 1, itertools.count(), pause=600)
    waiting._wait()
    assert next(answers, None) is None


def test_hung_threads_do_not_pile_up(monkeypatch):
    released = threading.Event()

    class Hanging(Capture):
        """Never returns after the first picture."""

        def grab(self):
            return super().grab() or released.wait(60)

    monkeypatch.setattr(connection, "_open_capture", lambda _: Hanging(1, picture=noise()))
    monkeypatch.setattr(connection, "TICK", 0.02)
    before = threading.active_count()
    with Watch(Camera("0", freeze=0.02)):
        time.sleep(3)
        hung = threading.active_count() - before
        released.set()
    assert 2 < hung < 8


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
@pytest.mark.parametrize("kind, bit_depth", [(np.uint8, 16), (np.uint16, 16), (np.uint16, 12)])
def test_every_kind_of_picture_becomes_rgb(channels, kind, bit_depth):
    top = 255 if kind is np.uint8 else 2**bit_depth - 1
    image = np.random.default_rng(0).integers(0, top + 1, (6, 9, *channels)).astype(kind)
    found = as_rgb(image, bit_depth)
    expected = np.round(
        image.reshape(6, 9, -1)[..., [2, 1, 0] if channels in ((3,), (4,)) else [0, 0, 0]] * (255 / top)
    )
    assert found.dtype == np.uint8 and np.abs(found - expected).max() == 0
    assert is_grey(image) == (channels in ((), (1,)))
    assert as_rgb(image.astype(np.float32), 16) is None


def test_a_mono_camera_of_16_bits_is_no_colour_camera_turned_grey(monkeypatch):
    pictures = noise(4096, np.uint16, (8, 8))
    monkeypatch.setattr(connection, "_open_capture", lambda _: Capture(10**6, picture=pictures))
    camera = Camera("0")
    frames = list(itertools.islice(filter(None, camera.frames(1, Decoding(bit_depth=12))), 3))
    camera.close()
    assert {frame.status for frame in frames} == {OK} and max(frame.image.max() for frame in frames) > 200


def test_the_campaign_in_short(tmp_path):
    """All of it, with 100,000 frames and every fault, is tests/hardness/run.py."""
    resident()  # or there is nothing to measure
    measured = campaign.watch(tmp_path / "out", 600, ("freeze",), give_up=None)
    assert measured.wrong == [] and measured.frames >= 600 and measured.megabytes[1] > 0
