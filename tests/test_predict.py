"""predict.py: frames from files and cameras in, rows, pictures and videos out."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from machine import resident, wait_until
from PIL import Image
from scipy import ndimage
from stub_camera import Capture, StubCamera, jpeg, write_video
from stub_model import RedModel
from tiny import contents, end_well, read_json, read_rows, refusal, run_apart, run_in_process

from datasets import connection
from datasets.loading import IMAGENET_MEAN, IMAGENET_STD, to_tensor
from datasets.sources import Camera, Images, Video, find_sources
from models import USAD, Branch, Part
from models.fusion.prediction import regions
from prediction import recorder
from prediction.options import PredictionSettings
from prediction.recorder import Alarm
from prediction.run import predict
from reporting.gallery import Gallery
from utils.errors import InputError
from utils.safe_text import redact, safe_cell
from utils.signals import Terminated

SECRET = "Gr3n:zw@ll"
THRESHOLDS = ("--threshold", "1.0", "--pixel-threshold", "0.5")


class RedBranch(Branch):
    """A branch whose map is the image's red channel in [0, 1], and whose score is its maximum."""

    name = "red"

    def __init__(self):
        super().__init__(image_size=96)
        self.before = lambda: None

    def fit(self, loader):
        """It knows what red is."""

    def predict(self, images):
        self.before()
        maps = images[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
        return Part(maps.amax((1, 2)), maps)


def usad_with_thresholds():
    usad = USAD([RedBranch()])
    usad.threshold, usad.pixel_threshold = 1.0, 0.5
    return usad


@pytest.fixture(autouse=True)
def stand_in_model(monkeypatch):
    """USAD.load gives the red branch; returns a function that sets what is done before each prediction."""
    branch = RedBranch()
    monkeypatch.setattr(USAD, "load", lambda *_, **__: USAD([branch]))

    def before(function):
        branch.before = function

    return before


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def look(out, *arguments, code=0):
    """Run predict.py with thresholds; it must end with this code."""
    finished = run_in_process("predict", *arguments, "--out", out, *THRESHOLDS)
    assert finished.code == code, finished
    return finished


def frame(rng, red=True, size=(120, 300), place=(30, 60, 200, 240)):
    """A dull frame [H, W, 3], optionally with a red object at rows, columns `place`."""
    image = rng.integers(20, 60, (*size, 3), dtype=np.uint8)
    if red:
        top, bottom, left, right = place
        image[top:bottom, left:right, 0] = 250
    return image


def photos(folder, reds):
    """A file for each of `reds`, with or without a red object."""
    rng = np.random.default_rng(11)
    folder.mkdir(exist_ok=True)
    for index, red in enumerate(reds):
        Image.fromarray(frame(rng, red)).save(folder / f"{index}.png")
    return folder


def film(path, reds, **options):
    """The same as a video."""
    rng = np.random.default_rng(9)
    write_video(path, [frame(rng, red, **options) for red in reds])
    return path


def video_frames(path):
    capture = cv2.VideoCapture(str(path))
    images = []
    while (read := capture.read())[0]:
        images.append(read[1])
    return images, capture.get(cv2.CAP_PROP_FPS)


def rows(folder):
    return read_rows(folder / "predictions.csv")


# One call in Python


def test_call_takes_paths_images_and_arrays(tmp_path):
    image = frame(np.random.default_rng(1))
    Image.fromarray(image).save(tmp_path / "a.png")
    usad = usad_with_thresholds()
    results = usad([tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), image])
    alone = usad(tmp_path / "a.png")
    assert len(results) == 4 and len(alone) == 1
    for result in results:
        assert result.score == alone[0].score and result.boxes == alone[0].boxes
        assert result.map.shape == image.shape[:2] and result.map.dtype == np.float32
    scores, maps, *_ = usad.predict(to_tensor(Image.fromarray(image), 96, "bicubic")[None])
    assert alone[0].score == float(scores[0])
    assert np.array_equal(alone[0].map, cv2.resize(maps[0].numpy(), (300, 120)))
    assert alone[0].branches["red"][1].shape == (96, 96)


@pytest.mark.parametrize("size, place", [((120, 300), (30, 60, 200, 240)), ((400, 90), (300, 350, 10, 40))])
def test_boxes_lie_on_the_object_in_source_pixels(size, place):
    (result,) = usad_with_thresholds()(frame(np.random.default_rng(2), True, size, place))
    ((x, y, width, height),) = result.boxes
    top, bottom, left, right = place
    step = max(size) / 96 + 1
    assert np.allclose([y, y + height, x, x + width], place, atol=step)
    assert result.anomalous and result.area == pytest.approx((bottom - top) * (right - left), rel=0.25)


def test_call_in_batches_and_without_thresholds():
    rng = np.random.default_rng(3)
    images = [frame(rng, red=index % 2) for index in range(5)]
    usad = usad_with_thresholds()
    assert [r.score for r in usad(images, batch_size=2)] == [usad(image)[0].score for image in images]
    assert len(usad(images, batch_size=np.int64(2))) == 5
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(InputError, match="batch_size"):
            usad(images, batch_size=wrong)
    (result,) = USAD([RedBranch()])(images[1])
    assert result.anomalous is None and result.boxes is None and result.area is None


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("RGB", "tif"), ("P", "png"), ("LA", "png")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_pil_image_is_read_like_its_file(tmp_path, mode, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(frame(np.random.default_rng(4))).convert(mode).save(path, exif=exif)
    with Image.open(path) as given:
        size = given.size
        by_path, by_image, copied = usad_with_thresholds()([path, given, given.convert("RGB")])
        assert given.size == size  # it is the caller's
    for found in (by_image, copied):
        assert np.array_equal(by_path.map, found.map) and by_path.boxes == found.boxes
    assert by_path.map.shape == ((300, 120) if orientation == 6 else (120, 300))


def test_other_images_are_refused(tmp_path):
    usad_of_12_bits = usad_with_thresholds()
    usad_of_12_bits.bit_depth = 12
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4, 3), 4095, np.uint16))
    assert usad_of_12_bits(tmp_path / "deep.png")
    arrays = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)
    empty = np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (0, 4))
    for image in (*arrays, *empty, *(Image.new(mode, (4, 4)) for mode in ("I", "I;16", "F")), 7):
        with pytest.raises(InputError):
            usad_with_thresholds()([image])
    with pytest.raises(InputError, match="PIL image of mode La cannot be made RGB"):
        usad_with_thresholds()(Image.new("La", (4, 4)))
    with pytest.raises(InputError, match=r"Pillow drops half of a picture's 12 bits of colour; give its path"):
        usad_of_12_bits(Image.open(tmp_path / "deep.png"))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        usad_with_thresholds()(["gone.png"])


def test_scores_that_are_not_finite_are_refused():
    usad = usad_with_thresholds()
    usad.branches[0].predict = lambda images: Part(torch.full((1,), torch.nan), images[:, 0])
    with pytest.raises(InputError, match="not finite"):
        usad(frame(np.random.default_rng(5)))


def test_regions_against_scipy():
    rng = np.random.default_rng(6)
    for _ in range(20):
        values = ndimage.gaussian_filter(rng.standard_normal((40, 70)), 2).astype(np.float32)
        threshold = float(np.quantile(values, rng.uniform(0.7, 0.99), method="nearest"))
        labels, _ = ndimage.label(values >= threshold, np.ones((3, 3)))
        areas, slices = np.bincount(labels.ravel())[1:], ndimage.find_objects(labels)
        places = [(c.start, r.start, c.stop - c.start, r.stop - r.start) for r, c in slices]
        for least in (0, *areas, max(areas) + 1):  # of so many pixels a region counts
            expected = {place: area for place, area in zip(places, areas, strict=True) if area >= least}
            boxes, area = regions(values, threshold, least)
            assert [expected[box] for box in boxes] == sorted(expected.values(), reverse=True)
            assert set(boxes) == expected.keys() and area == sum(expected.values())


def test_alarm_against_its_definition():
    rng = np.random.default_rng(7)
    for length in (1, 2, 3, 5):
        raw = (rng.random(300) < 0.5).tolist()
        alarm, on = Alarm(length), False
        for index in range(len(raw)):
            last = raw[max(0, index + 1 - length) : index + 1]
            if len(last) == length and all(value != on for value in last):
                on = not on
            assert alarm.update(raw[index]) == on


# Where frames come from


def test_folder_gives_images_and_videos_folder_by_folder(tmp_path):
    for name in ["b.png", "a.jpg", "sub/z.png", "c.png", ".hidden.png", ".trash/x.png", "notes.txt", "b.mp4"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_sources([str(tmp_path)])
    names = [[path.name for path in source.paths] for source in found]
    assert names == [["a.jpg", "b.png", "c.png"], ["b.mp4"], ["z.png"]]
    assert [type(source) for source in found] == [Images, Video, Images]
    pattern = find_sources([str(tmp_path / "**" / "*.png")])
    assert [path.name for source in pattern for path in source.paths] == ["b.png", "c.png", "z.png"]


@pytest.mark.parametrize("argument", ["gone", "*.png", "notes.txt", ".", "ftp://host/x", "file:///etc/passwd"])
def test_what_cannot_be_looked_at_is_refused(argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    with pytest.raises(InputError):
        find_sources([argument])


@pytest.mark.parametrize("flag", ["--threshold", "--pixel-threshold"])
@pytest.mark.parametrize("value", ["-inf", "inf", "nan", "x"])
def test_a_threshold_is_a_finite_number(flag, value, tmp_path):
    said = refusal("predict", tmp_path, f"{flag}={value}", "--out", tmp_path / "out")
    assert said == f"error: predict.py: argument {flag}: '{value}' is not a number\n"


def test_camera_must_be_alone():
    with pytest.raises(InputError) as error:
        find_sources([f"rtsp://admin:{SECRET}@10.0.0.1/live", "x.png"])
    assert SECRET not in str(error.value)
    assert isinstance(find_sources(["0"])[0], Camera)


@pytest.mark.parametrize("every", [1, 3])
def test_video_frames(tmp_path, every):
    rng = np.random.default_rng(8)
    images = [np.full((48, 64, 3), 10 * index + 20, np.uint8) for index in range(10)]
    write_video(tmp_path / "v.avi", images, fps=8)
    video = Video(tmp_path / "v.avi")
    frames = list(video.frames(every))
    assert [found.number for found in frames] == list(range(0, 10, every))
    assert [found.time for found in frames] == pytest.approx([n / 8 for n in range(0, 10, every)], abs=2e-3)
    for found in frames:
        assert abs(int(found.image[tuple(rng.integers(0, 48, 2))][0]) - images[found.number].item(0)) < 8
    assert not video.problems


@pytest.mark.parametrize("every", [1, 3])
def test_a_hole_in_a_video_is_not_its_end(tmp_path, capsys, every):
    path, rng = tmp_path / "v.mp4", np.random.default_rng(8)
    write_video(path, [rng.integers(0, 255, (256, 256, 3), np.uint8) for _ in range(60)], 25, "mp4v")
    content = bytearray(path.read_bytes())
    start, stop = len(content) // 3, len(content) // 2
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    video = Video(path)
    frames = list(video.frames(every))
    assert len(frames) < 60 / every and frames[-1].number == 60 - every and not video.problems
    assert [found.time for found in frames] == pytest.approx([found.number / 25 for found in frames], abs=2e-3)
    assert "announces 60 frames, " in capsys.readouterr().err


# The script on files


def test_video_in_rows_and_frames_out(tmp_path, out):
    red = [0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1]
    said = look(out, film(tmp_path / "belt.avi", red)).out
    assert "12 frames, 5 anomalous" in said and ", p99 " in said
    table = rows(out)
    assert [row["anomalous"] for row in table] == [str(value) for value in red]
    assert [int(row["frame"]) for row in table] == list(range(12))
    for row, value in zip(table, red, strict=True):
        assert len(json.loads(row["boxes"])) == value and (int(row["area"]) > 0) == value
    annotated, fps = video_frames(out / "videos/belt.mp4")
    assert len(annotated) == 12 and fps == 10 and annotated[0].shape == (120, 300, 3)
    assert len(list((out / "overlays").glob("*.jpg"))) == 5
    config = read_json(out / "config.json")
    assert config["finished"] and config["statuses"] == {"ok": 12}
    assert 0 < config["latency_ms"]["p50"] <= config["latency_ms"]["p99"]
    assert "latency" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [(120, 301), (121, 300), (77, 333), (120, 300)])
def test_annotated_videos_keep_the_size(tmp_path, out, size):
    image = frame(np.random.default_rng(22), False, size)
    image[:, -1], image[-1] = 250, 250
    write_video(tmp_path / "belt.avi", [image] * 3)
    end_well("predict", tmp_path / "belt.avi", "--out", out, "--overlays", "none")
    (path,) = (out / "videos").iterdir()
    annotated, _ = video_frames(path)
    assert [found.shape[:2] for found in annotated] == [size] * 3
    assert annotated[0][:, -1].mean() > 180 and annotated[0][-1].mean() > 180


def test_an_avi_that_grows_too_large_is_continued_in_another(tmp_path, out, monkeypatch):
    rng = np.random.default_rng(23)
    write_video(tmp_path / "belt.avi", [frame(rng, size=(121, 301)) for _ in range(40)])
    monkeypatch.setattr(recorder, "AVI_BYTES", 100_000)
    look(out, tmp_path / "belt.avi", "--overlays", "none")
    paths = sorted((out / "videos").iterdir(), key=lambda path: (len(path.name), path.name))
    assert [path.name for path in paths[:3]] == ["belt.avi", "belt_2.avi", "belt_3.avi"]
    assert sum(len(video_frames(path)[0]) for path in paths) == 40


KEPT = ("煤流", "皮带 2", "Förderband é", "конвейер.v2", "कोयला", "🪨 rocks")
NAMES = {**dict(zip(KEPT, KEPT, strict=True)), 'a<b>:"c"|?*\nd': "a_b_c_d", "...": "frame", "煤" * 80: "煤" * 40}


def test_names_are_kept_where_disks_take_them(tmp_path, out):
    film(tmp_path / "x.avi", [1])
    for name in (*NAMES, "X"):
        shutil.copy(tmp_path / "x.avi", tmp_path / f"{name}.avi")
    look(out, *(tmp_path / f"{name}.avi" for name in (*NAMES, "x", "X")))
    assert {path.stem for path in (out / "videos").iterdir()} == {*NAMES.values(), "x", "X_2"}
    overlays = sorted(path.stem for path in (out / "overlays").iterdir())
    assert overlays == [f"{row:06d}_{name}" for row, name in enumerate([*NAMES.values(), "x", "X"], 1)]


def test_every_and_smooth(tmp_path, out):
    video = film(tmp_path / "belt.avi", [0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0])
    look(out, video, "--smooth", 2)
    assert [int(row["anomalous"]) for row in rows(out)] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    look(out, video, "--every", 5)
    assert [int(row["frame"]) for row in rows(out)] == [0, 5, 10]
    annotated, fps = video_frames(out / "videos/belt.mp4")
    assert len(annotated) == 3 and fps == 2


@pytest.mark.parametrize("overlays, expected", [("anomalous", 2), ("all", 4), ("none", 0)])
def test_overlays_at_source_resolution_have_boxes_around_the_objects(tmp_path, out, overlays, expected):
    look(out, photos(tmp_path / "in", [0, 1, 0, 1]), "--overlays", overlays)
    written = sorted((out / "overlays").glob("*.jpg"))
    assert len(written) == expected
    for path in written:
        picture = np.asarray(Image.open(path)).astype(int)
        assert picture.shape == (120, 300, 3)
        yellow = (picture[..., 0] > 180) & (picture[..., 1] > 150) & (picture[..., 2] < 110)
        y, x = np.nonzero(yellow[24:])  # below the caption
        if int(path.stem[-1]) % 2:
            assert np.allclose([y.min() + 24, y.max() + 24, x.min(), x.max()], [30, 60, 200, 240], atol=6)
        else:
            assert not len(y)


def test_json_lines_are_the_rows(tmp_path, out):
    said = look(out, photos(tmp_path / "in", [0, 1, 0]), "--json-lines", "--no-images").out
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == 3
    for line, row in zip(lines, rows(out), strict=True):
        assert list(line) == list(row) and line["source"] == row["source"]
        assert line["score"] == float(row["score"]) and line["anomalous"] is (row["anomalous"] == "1")
        assert line["boxes"] == json.loads(row["boxes"])
    assert not (out / "report.html").exists()


def test_an_empty_source_is_refused(out):
    assert "SOURCE is empty" in refusal("predict", "", "--out", out)


def test_a_reader_that_ends_is_named(tmp_path, out, monkeypatch):
    settings = PredictionSettings((str(photos(tmp_path / "in", [0, 1, 0])),), out, overlays=None, json_lines=True)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, pytest.raises(BrokenPipeError, match="reads --json-lines has ended"):
        monkeypatch.setattr("sys.stdout", pipe)
        predict(settings, RedModel, None, {})
    assert len(rows(out)) == 1


def test_without_thresholds_scores_only(tmp_path, out):
    source = photos(tmp_path / "in", [1])
    assert "--false-alarm-rate" in end_well("predict", source, "--out", out).err
    (row,) = rows(out)
    assert float(row["score"]) > 1 and row["anomalous"] == row["area"] == row["boxes"] == ""
    refusal("predict", source, "--out", out, "--smooth", 3)


def test_unreadable_files_are_listed_and_the_rest_is_done(tmp_path):
    photos(tmp_path, [1] * 4)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:1000])
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "9.mp4").write_bytes(b"no video")
    said = look(tmp_path.parent / "results", tmp_path, code=2).err
    assert "3 file(s)" in said.splitlines()[-1]
    assert all(name in said for name in ("1.png", "2.png", "9.mp4"))
    assert [Path(row["source"]).name for row in rows(tmp_path.parent / "results")] == ["0.png", "3.png"]


def test_the_limit_of_the_size_is_a_flag(tmp_path, out):
    """A JPEG above it is decoded at half its scale; what is said of it is in its own pixels."""
    image = Image.fromarray(frame(np.random.default_rng(25), size=(480, 1200), place=(120, 240, 800, 960)))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg")
    said = look(out, tmp_path / "a.png", tmp_path / "b.jpg", "--max-megapixels", 0.5, code=2).err
    assert "a.png is 1200x480" in said and "raise it with --max-megapixels" in said
    assert f"warning: 1 files, for instance {tmp_path / 'b.jpg'}: larger than --max-megapixels" in said
    (row,) = rows(out)
    ((x, y, width, height),) = json.loads(row["boxes"])
    assert np.allclose([x, y, x + width, y + height], (800, 120, 960, 240), atol=14)
    assert Image.open(next((out / "overlays").iterdir())).size == (1200, 480)
    look(out, tmp_path / "a.png", tmp_path / "b.jpg", "--max-megapixels", 0.6)
    (box,) = next(json.loads(row["boxes"]) for row in rows(out))
    assert box == pytest.approx([x, y, width, height], abs=14)


def test_output_folder_of_others_is_left_alone(tmp_path, out):
    source = photos(tmp_path / "in", [1])
    out.mkdir()
    (out / "predictions.csv").write_text("mine")
    refusal("predict", source, "--out", out)
    assert (out / "predictions.csv").read_text() == "mine" and len(list(out.iterdir())) == 1
    refusal("predict", source, "--out", tmp_path)  # would hold the source
    said = refusal("predict", source, "--out", source / "results")  # its pictures would be frames of the next run
    assert "lies in SOURCE" in said and len(list(source.iterdir())) == 1


@pytest.mark.parametrize("size", [(120, 300), (121, 300)])  # annotated as MP4, and as AVI
def test_a_second_run_leaves_nothing_of_the_first(tmp_path, out, size):
    source = photos(tmp_path / "in", [1])
    look(out, film(tmp_path / "b.avi", [1] * 3, size=size))
    assert len(list((out / "videos").iterdir())) == 1
    look(out, source)
    assert len(rows(out)) == 1 and len(list((out / "overlays").iterdir())) == 1
    assert not list((out / "videos").iterdir())
    for flags in ([tmp_path / "gone.png"], [source, "--smooth", 2]):
        refusal("predict", *flags, "--out", out)
    assert len(rows(out)) == 1  # a command that fails before it starts costs nothing


def test_interrupted_run_keeps_its_rows(tmp_path, out, stand_in_model):
    stand_in_model(interrupt_at(4))
    said = look(out, film(tmp_path / "belt.avi", [1] * 10), "--batch-size", 2, code=130).err
    assert said.strip().endswith("error: interrupted")
    assert len(rows(out)) == 6
    assert len(video_frames(next((out / "videos").iterdir()))[0]) == 6
    assert not read_json(out / "config.json")["finished"]


def interrupt_at(batch, error=KeyboardInterrupt):
    """A function that raises `error` in its call number `batch`."""
    calls = iter(range(1, 10**6))

    def before():
        if next(calls) == batch:
            raise error

    return before


def test_memory_stays_flat(tmp_path, out, stand_in_model, monkeypatch):
    monkeypatch.setattr(recorder, "Gallery", lambda: Gallery(limit=20, extreme=5))
    video = film(tmp_path / "belt.avi", [index % 7 == 0 for index in range(200)], size=(200, 270))
    megabytes = [resident()]
    stand_in_model(lambda: megabytes.append(resident()))
    look(out, video, "--overlays", "none")
    assert len(rows(out)) == 200
    assert megabytes[-1] - megabytes[len(megabytes) // 3] < 10  # the frames alone would take 21 MB


# The script on cameras


def test_slow_model_drops_and_counts(out, stand_in_model, monkeypatch):
    allowed = [1]
    capture = Capture(150, ready=lambda: capture.sent < allowed[0])
    monkeypatch.setattr(connection, "_open_capture", lambda _: capture)

    def fall_behind():
        """Four frames arrive meanwhile."""
        allowed[0] += 4
        wait_until(lambda: capture.sent >= min(allowed[0], capture.count + 1))

    stand_in_model(fall_behind)
    said = look(out, "0", "--no-images", "--give-up", 0, code=1).out
    numbers = [int(row["frame"]) for row in rows(out) if row["status"] == "ok"]
    dropped = read_json(out / "config.json")["dropped"]
    assert f"{dropped} dropped" in said and capture.released
    assert numbers == sorted(set(numbers)) and numbers[-1] == 149
    assert numbers[-1] - numbers[0] + 1 == len(numbers) + dropped  # each frame has a row or is counted
    assert dropped > 2 * len(numbers)


def test_fast_model_drops_nothing(out, stand_in_model, monkeypatch):
    looked_at = []
    capture = Capture(20, ready=lambda: capture.sent <= 2 * len(looked_at))  # the next once the last is done
    monkeypatch.setattr(connection, "_open_capture", lambda _: capture)
    stand_in_model(lambda: looked_at.append(1))
    look(out, "0", "--every", 2, "--no-images", "--give-up", 0, code=1)
    *looked, lost = rows(out)
    assert [int(row["frame"]) for row in looked] == list(range(0, 20, 2)) and lost["status"] == "lost"


@pytest.mark.parametrize("signal, expected", [(KeyboardInterrupt, 0), (Terminated, 143)])
def test_a_signal_is_a_cameras_normal_end(out, stand_in_model, monkeypatch, signal, expected):
    monkeypatch.setattr(connection, "_open_capture", lambda _: Capture(10**6))
    stand_in_model(interrupt_at(5, signal))
    assert look(out, "0", code=expected).out.startswith("4 frames") and len(rows(out)) == 4
    assert read_json(out / "config.json")["finished"]
    assert (out / "report.html").exists()


@pytest.mark.parametrize("scheme", ["rtsp", "http"])
def test_camera_that_does_not_answer(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, never says a word
        address = f"{scheme}://admin:{SECRET}@127.0.0.1:{server.getsockname()[1]}/live?token={SECRET}"
        start = time.perf_counter()
        said = refusal("predict", address, "--out", tmp_path / "out")
        assert time.perf_counter() - start < 25  # OpenCV's own limit is 30 s
    assert "no picture" in said and SECRET not in said and "zw" not in said


def test_camera_that_refuses_in_a_process_of_its_own(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"rtsp://admin:{SECRET}@127.0.0.1:{port}/live"
    code, said, err = run_apart("predict.py", address, "--out", tmp_path / "o")
    assert code == 2 and said == ""
    assert err.startswith("error: rtsp://***@127.0.0.1") and len(err.splitlines()) == 1


def test_network_camera_and_its_password(out, stand_in_model):
    looked_at = []

    def watch():
        """Red after 10 pictures; after 60 the camera is gone."""
        looked_at.append(1)
        camera.mode = "red" if len(looked_at) > 10 else "ok"
        if len(looked_at) == 60:
            camera.down()

    stand_in_model(watch)
    with StubCamera(0.01, password="Gr3nzwall") as camera:
        rng = np.random.default_rng(20)
        for mode, red in (("ok", False), ("red", True)):
            camera.files[mode] = [jpeg(frame(rng, red, (48, 64), (9, 30, 9, 30))) for _ in range(9)]
        address = camera.address.replace("//", "//admin:Gr3nzwall@") + "?pass=Gr3nzwall"
        _, stdout, stderr = look(out, address, "--json-lines", "--give-up", 0, code=1)
    assert stderr.splitlines()[-1].endswith("no picture for 0 s (--give-up)")
    *table, lost = rows(out)
    assert len(table) >= 60 and {row["anomalous"] for row in table} == {"0", "1"} and lost["status"] == "lost"
    assert table[0]["source"].startswith("http://***@127.0.0.1") and table[0]["time"].endswith("+00:00")
    written, names = b"".join(contents(out).values()), " ".join(str(path) for path in out.rglob("*"))
    for text in (stdout, stderr, names, written.decode("utf-8", "replace")):
        assert "Gr3nzwall" not in text and "admin" not in text


# What is written about sources


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rtsp://u:p@host/live", "rtsp://***@host/live"),
        ("rtsp://u:p@ss/w@rd@host:554/a?b=c", "rtsp://***@host:554/a?***"),
        ("http://host/x.cgi?user=a&pwd=b", "http://host/x.cgi?***"),
        ("rtsp://host/user=a&password=b&channel=1", "rtsp://host/user=***&password=***&channel=***"),
        ("cannot reach http://u:my pass@host now", "cannot reach http://***@host now"),
        ("rtsp://host:554/live", "rtsp://host:554/live"),
        ("mail a@b about 1=1", "mail a@b about 1=1"),
    ],
)
def test_redact(text, expected):
    assert redact(text) == expected


def test_an_address_in_the_wrong_place_is_not_printed():
    assert "zw" not in refusal("predict", "a.png", "--every", 2, f"rtsp://admin:{SECRET}@10.0.0.1/live")


def test_formulas_are_disarmed_and_plain_text_stays():
    for text in ("=1+1", "+1", "-1", "@x", "\t=1", "  =HYPERLINK(1)", "＝1"):
        assert safe_cell(text) == "'" + text
    assert safe_cell("test/good/000.png") == "test/good/000.png"
    assert safe_cell(b"a\xff.png".decode("utf-8", "surrogateescape")) == "a\\udcff.png"


def test_odd_file_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=cmd|' .png", "-x\n<script>.png", 'a "b",c.png', "http:a.png"]
    for name in names:
        Image.fromarray(frame(np.random.default_rng(21))).save(tmp_path / name)
    end_well("predict", "--out", "out", *THRESHOLDS, "--", *names)
    sources = [row["source"] for row in rows(Path("out"))]
    assert [source.lstrip("'") for source in sources] == names and sources[0].startswith("'=")
    assert len(list(Path("out/overlays").iterdir())) == 4
