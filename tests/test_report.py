"""The report: its figures, its pictures, its texts under hostile names, and the page in a browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Category
from evaluation.evaluate import evaluate
from metrics import protocols
from reporting import report as report_module
from reporting.cards import KINDS, Threshold, card
from reporting.charts import Bars, Line, curve_chart, histogram_chart, ticks
from reporting.gallery import Entry, Gallery, Pictures, SmallMap, encode, outline
from reporting.report import write_report
from tests.chromium import BINARY, Browser
from utils.timing import Stopwatch

PARTS = ("fusion", "ma_clu", "ma2patch", "pc")
HOSTILE = (
    "<script>alert(1)</script>.png",
    "\"><img src=x onerror='alert(1)'>.png",
    "line\nbreak & quote\" ' `.png",
    "Ünïcødé \u202egnp.exe 煤.png",
    "not utf-8 \udcff.png",
    "</article></main></style>${title} $cards.png",
)


class Page(HTMLParser):
    """Tags with their attributes, and the text in them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.source = path.read_text(encoding="utf-8")
        self._rows: list[list[str | None]] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags:
            self.words.setdefault(self.tags[-1][0], []).append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and all(attrs.get(k) == v for k, v in wanted.items())]

    @property
    def cards(self) -> list[dict[str, str | None]]:
        return self.all("article")


class FakeModel:
    """Gives maps and scores drawn from a seed; a "branch" of several parts."""

    device = "cpu"
    branches = ()

    def __init__(self, anomalous: list[int], side: int = 48) -> None:
        self.anomalous, self.side = iter(anomalous), side
        self.rng = np.random.default_rng(5)

    def stopwatches(self):
        return {part: Stopwatch() for part in PARTS}

    def predict_parts(self, images):
        labels = np.array([next(self.anomalous) for _ in images])
        parts = {}
        for part in PARTS:
            maps = self.rng.random((len(images), self.side, self.side)).astype(np.float32)
            maps[:, 10:20, 10:20] += 0.5 * labels[:, None, None]
            scores = self.rng.normal(labels * 1.5, 1.0)
            parts[part] = torch.from_numpy(scores), torch.from_numpy(maps)
        return parts


class OneBranch(FakeModel):
    branches = property()  # has no branches: hasattr is False

    def predict_parts(self, images):
        return {"pc": super().predict_parts(images)["pc"]}


def draw_category(root: Path, good: int = 9, bad: int = 12, size: tuple[int, int] = (96, 64)) -> Category:
    rng = np.random.default_rng(1)
    kinds = ["good"] * good + ["rope", "<b>stick&"] * (bad // 2)
    for index, kind in enumerate(kinds):
        path = root / "belt" / "test" / kind / f"{index:02d} <i>'\"é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        if kind != "good":
            mask = np.zeros(size[::-1], np.uint8)
            mask[16:28, 20:40] = 255
            target = root / "belt" / "ground_truth" / kind / f"{path.stem}_mask.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)
    return Category(root, "belt")


def run_evaluation(category: Category, folder: Path, model: type[FakeModel] = FakeModel, **options) -> dict:
    items = category.test_samples()
    loader = ImageLoader(ImageDataset(items, 48, "bicubic"), 4, 0, "test")
    config = {
        "settings": {"category": "belt <1>", "fusion": "paper"},
        "note": "</pre><script>alert(1)</script>",
    }
    return evaluate(model([item.label for item in items]), loader, folder, config, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of results with its report, from 21 images."""
    folder = tmp_path_factory.mktemp("run")
    run_evaluation(draw_category(folder / "data"), folder / "fusion")
    return folder / "fusion"


def entry(index: int, score: float, label: int | None = None, **more) -> Entry:
    return Entry(more.pop("name", f"{index}.png"), dict.fromkeys(PARTS, score), label, **more)


def pictures(seed: int = 0, size: tuple[int, int] = (40, 30), truth: bool = False) -> Pictures:
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    maps = {part: rng.random((16, 16)).astype(np.float32) for part in PARTS}
    return Pictures(frame, maps, rng.random((size[1], size[0])) > 0.9 if truth else None)


def small_gallery(labels: list[int | None], **options) -> Gallery:
    gallery = Gallery(**options)
    for index, label in enumerate(labels):
        gallery.add(entry(index, float(index), label), lambda index=index: pictures(index))
    return gallery


# Figures


def table_rows(page: Page) -> dict[str, list[float | None]]:
    rows: dict[str, list[float | None]] = {}
    for tag, attrs in page.tags:
        if tag == "tr" and "data-key" in attrs:
            row = rows.setdefault(attrs["data-key"], [])
        elif rows and tag == "data":
            row.append(float(attrs["value"]))
        elif rows and tag == "span" and attrs.get("title", "").startswith("undefined"):
            row.append(None)
    return rows


def test_figures_are_those_of_metrics_json(run):
    metrics = json.loads((run / "metrics.json").read_text())
    columns = [metrics, *(metrics["branches"][part] for part in PARTS[1:])]
    assert table_rows(Page(run / "report.html")) == {key: [part[key] for part in columns] for key in protocols()}


def test_cards_follow_the_scores_and_the_threshold(run):
    page = Page(run / "report.html")
    threshold = float(re.search(r"<b>Threshold ([-\d.e]+)</b>", page.source)[1])
    with (run / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["score"]))
    assert [attrs["data-name"] for attrs in page.cards] == [row["path"] for row in rows]
    kinds = {(1, True): "hits", (1, False): "misses", (0, True): "false-alarms", (0, False): "normal"}
    expected = [kinds[int(row["label"]), float(row["score"]) >= threshold - 5e-4] for row in rows]
    assert [attrs["data-kind"] for attrs in page.cards] == expected
    assert {attrs["data-group"] for attrs in page.cards} == {"good", "rope", "<b>stick&"}
    hits, misses = expected.count("hits"), expected.count("misses")
    assert f"{hits}<small> of {hits + misses}</small>" in page.source
    assert "chosen on the test set, for orientation only" in page.source


def test_threshold_of_the_highest_f1_maximises_f1_of_the_test_images(run):
    threshold = float(re.search(r"<b>Threshold ([-\d.e]+)</b>", Page(run / "report.html").source)[1])
    with (run / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = [(float(row["score"]), int(row["label"])) for row in csv.DictReader(file)]

    def f1(at: float) -> float:
        found = sum(label for score, label in rows if score >= at)
        return 2 * found / (sum(score >= at for score, _ in rows) + sum(label for _, label in rows))

    best = max((score for score, _ in rows), key=f1)
    assert threshold == float(f"{best:.4g}")
    assert f1(best) == pytest.approx(json.loads((run / "metrics.json").read_text())["image_f1_max"])


def test_given_threshold_is_not_called_orientation(tmp_path):
    gallery = small_gallery([0, 0, 1, 1])
    write_report(tmp_path / "r.html", "t", gallery, threshold=Threshold(1.0, None, "32 held-out images"))
    page = Page(tmp_path / "r.html")
    assert "32 held-out images" in page.source and "orientation" not in page.source
    # at the threshold counts as an alarm
    assert [attrs["data-kind"] for attrs in page.cards] == ["hits", "hits", "false-alarms", "normal"]


@pytest.mark.parametrize("score, labels", [(2.5, [0, 0, 1, 1]), (9.0, [0, 0, 1, 1]), (2.5, [0, 0, 0, 0])])
def test_filters_for_false_alarms_and_misses_are_always_there(tmp_path, score, labels):
    write_report(tmp_path / "r.html", "t", small_gallery(labels), threshold=Threshold(score, None, "given"))
    page = Page(tmp_path / "r.html")
    kinds = [attrs["data-kind"] for attrs in page.cards]
    counts = dict(re.findall(r'data-filter="([a-z-]+)"[^>]*>[^<]*<b>(\d+)</b>', page.source))
    judged = set(kinds) & {"hits", "misses", "false-alarms"}
    assert counts.keys() >= ({"false-alarms", "misses"} if judged else set())
    assert counts == {kind: str(kinds.count(kind)) for kind in counts}


def test_only_normal_images_give_undefined_figures_and_no_threshold(tmp_path):
    category = draw_category(tmp_path / "data", good=4, bad=0)
    run_evaluation(category, tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert all(row == [None] * 4 for row in table_rows(page).values())
    assert "Threshold" not in page.source.split("<main>")[1].split("How to read")[0]
    assert [attrs["data-kind"] for attrs in page.cards] == ["normal"] * 4


@pytest.mark.parametrize("threshold", [None, Threshold(1.5, 0.5, "given")])
def test_frames_without_labels(tmp_path, threshold):
    gallery = small_gallery([None] * 4)
    gallery.add(entry(4, 0.0, alarm=True), lambda: pictures(4))  # smoothing may decide otherwise than the threshold
    write_report(tmp_path / "r.html", "belt.mp4", gallery, threshold=threshold)
    page = Page(tmp_path / "r.html")
    kinds = [attrs["data-kind"] for attrs in page.cards]
    assert kinds == (["alarms", "alarms", "quiet"] if threshold else ["unrated"] * 3) + kinds[3:]
    assert sorted(kinds[3:]) == (["alarms", "quiet"] if threshold else ["alarms", "unrated"])
    assert not page.all("polyline") and not table_rows(page) and not page.all("svg", **{"class": "region"})


def test_report_without_any_entry(tmp_path):
    write_report(tmp_path / "r.html", "nothing", Gallery(), threshold=Threshold(1.0, 1.0, "given"))
    assert not Page(tmp_path / "r.html").cards


def test_no_report_for_a_branch_and_none_left_over_without_images(tmp_path):
    category = draw_category(tmp_path / "data")
    run_evaluation(category, tmp_path / "branch", OneBranch)
    assert not (tmp_path / "branch" / "report.html").exists()
    run_evaluation(category, tmp_path / "fusion")
    run_evaluation(category, tmp_path / "fusion", images=False)
    assert not (tmp_path / "fusion" / "report.html").exists()


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    write_report(path, "first", small_gallery([0, 1]))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report_module, "card", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "second", small_gallery([0, 1]))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Texts


def hostile_report(path: Path) -> Path:
    gallery = Gallery()
    for index, name in enumerate(HOSTILE):
        gallery.add(entry(index, float(index), 1, name=name, group=name, note=name), lambda: pictures())
    config = {name: [name, "</script><script>alert(1)</script>"] for name in HOSTILE}
    threshold = Threshold(2.0, 0.5, HOSTILE[0])
    write_report(path, HOSTILE[0], gallery, threshold=threshold, config=config, facts={HOSTILE[1]: HOSTILE[0]})
    return path


def test_names_are_text_and_nothing_else(tmp_path):
    hostile, tame = Page(hostile_report(tmp_path / "r.html")), Gallery()
    shown = [name.replace("\udcff", "?") for name in reversed(HOSTILE)]
    assert [attrs["data-name"] for attrs in hostile.cards] == shown
    assert [attrs["data-group"] for attrs in hostile.cards] == shown
    for index in range(len(HOSTILE)):
        tame.add(entry(index, float(index), 1, group=str(index), note="n"), lambda: pictures())
    write_report(tmp_path / "t.html", "t", tame, threshold=Threshold(2.0, 0.5, "s"), config={"k": 1}, facts={"a": "b"})
    tags = [[tag for tag, _ in page.tags] for page in (hostile, Page(tmp_path / "t.html"))]
    assert tags[0] == tags[1]  # names add no element
    keys = [{key for _, attrs in page.tags for key in attrs} for page in (hostile, Page(tmp_path / "t.html"))]
    assert keys[0] == keys[1]  # nor an attribute


def test_page_allows_its_own_script_only_and_refers_to_nothing(run):
    page = Page(run / "report.html")
    (policy,) = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = page.words[tag][:1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|innerHTML|eval", text)
    for _, attrs in page.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("style", "srcset", "action")]
        for key in ("src", "href"):
            assert attrs.get(key, "#").startswith(("data:", "#"))


# Pictures


def test_gallery_keeps_the_highest_and_a_sample_of_the_rest():
    rng = np.random.default_rng(7)
    calls, gallery = [], Gallery(limit=20, highest=8)
    scores = rng.permutation(np.repeat(np.arange(150.0), 2))  # with ties

    def load(index):
        calls.append(index)
        return pictures()

    for index, score in enumerate(scores):
        gallery.add(entry(index, score), lambda index=index: load(index))
    kept = [float(item.entry.score) for item in gallery.by_score()]
    assert kept == sorted(kept, reverse=True) and len(kept) == 20
    assert kept[:8] == sorted(scores, reverse=True)[:8]
    assert len({item.entry.name for item in gallery.by_score()}) == 20
    assert len(gallery) == 300 and sorted(gallery.scores) == sorted(scores)
    assert len(calls) == len(set(calls)) < 150  # pictures are asked for only where they may be shown


def test_galleries_of_two_processes_choose_what_one_chooses():
    rng = np.random.default_rng(8)
    scores = rng.integers(0, 40, 90).astype(float)  # with ties

    def filled(gallery, numbers):
        for number in numbers:
            alarm = [None, True, False][number % 3]
            given = entry(number, scores[number], number % 2, note=HOSTILE[0], alarm=alarm)
            gallery.add(given, lambda number=number: pictures(number, truth=True))
        return gallery

    one = filled(Gallery(limit=20, highest=8), range(90))
    first, second, third = (Gallery(limit=20, highest=8, first=start) for start in (0, 37, 90))
    filled(first, range(37)), filled(second, range(37, 90))
    for other in (second, third):
        first.merge({name: torch.from_numpy(values) for name, values in other.state().items()})
    assert (first.scores, first.labels, first.alarms) == (one.scores, one.labels, one.alarms)
    for ours, theirs in zip(first.by_score(), one.by_score(), strict=True):
        assert ours.entry == theirs.entry and ours.frame == theirs.frame
        assert (ours.size, ours.truth) == (theirs.size, theirs.truth)
        assert all(np.array_equal(ours.maps[part].values(), theirs.maps[part].values()) for part in theirs.maps)


def test_sample_of_the_rest_is_uniform_and_decided_by_the_seed():
    scores = np.random.default_rng(3).permutation(60).astype(float)
    picture, counts = pictures(), np.zeros(60)

    def choose(seed):
        gallery = Gallery(limit=20, highest=5, seed=seed)
        gallery._shrink = lambda entry, _: type("Small", (), {"entry": entry})
        for index, score in enumerate(scores):
            gallery.add(entry(index, score), lambda: picture)
        return [int(item.entry.score) for item in gallery.by_score()]

    assert choose(1) == choose(1) != choose(2)
    for seed in range(600):
        counts[choose(seed)] += 1
    assert (counts[55:] == 600).all()
    expected = 600 * 15 / 55
    chi_square = ((counts[:55] - expected) ** 2 / expected).sum() / (1 - 15 / 55)
    assert 25 < chi_square < 95  # 54 degrees of freedom: outside with a probability of 1e-3


def test_all_images_are_shown_up_to_the_limit_and_a_sample_is_stated(tmp_path):
    gallery = small_gallery([0] * 20, limit=20, highest=8)
    write_report(tmp_path / "r.html", "t", gallery)
    assert len(Page(tmp_path / "r.html").cards) == 20 and "drawn at random" not in Page(tmp_path / "r.html").source
    gallery = small_gallery([0] * 50, limit=20, highest=8)
    write_report(tmp_path / "r.html", "t", gallery)
    page = Page(tmp_path / "r.html")
    assert len(page.cards) == 20
    assert "the 8 highest scores and 12 of the other 42 images, drawn at random with seed 22" in page.source


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        Gallery().add(entry(0, float("nan")), pictures)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_small_maps_keep_16_bits_of_any_range(scale):
    values = np.random.default_rng(2).normal(5, 1, (20, 30)).astype(np.float32) * np.float32(scale)
    small = SmallMap.pack(values, 64)
    assert np.abs(small.values() - values).max() <= np.ptp(values) / 65535
    constant = SmallMap.pack(np.full((4, 4), scale, np.float32), 64)
    np.testing.assert_allclose(constant.values(), scale, rtol=1e-6)


def test_500_images_of_noise_stay_under_30_mb():
    rng, gallery = np.random.default_rng(4), Gallery()
    noise = rng.integers(0, 255, (700, 900, 3), dtype=np.uint8)
    maps = {part: rng.random((256, 256)).astype(np.float32) for part in PARTS}
    gallery.add(entry(0, 1.0, 1), lambda: Pictures(noise, maps, rng.random((700, 900)) > 0.5))
    (kept,) = gallery.by_score()
    scales = dict.fromkeys(PARTS, (0.0, 1.0))
    text = "".join(card(1, kept, KINDS[1, True], scales, Threshold(1.0, 0.5, "s")))
    assert 500 * len(text) < 29e6
    assert len(encode(noise, 2000)) <= 2000


def shoelace(path: str) -> float:
    """Area that an SVG path encloses, of a loop and holes in it."""
    areas = []
    for loop in path.split("Z")[:-1]:
        x, y = np.array([point.split() for point in loop[1:].split("L")], float).T
        areas.append(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)
    return max(areas) - (sum(areas) - max(areas))


def test_outline_lies_on_the_region_at_the_frames_own_scale():
    region = np.zeros((100, 300), bool)
    region[20:60, 200:280] = True
    points = np.array(re.findall(r"([\d.]+) ([\d.]+)", outline(region, (600, 150))), float)
    np.testing.assert_allclose(points.min(0), [400, 30], atol=1.5)
    np.testing.assert_allclose(points.max(0), [560, 90], atol=1.5)
    region[30:50, 220:260] = False  # a hole
    assert shoelace(outline(region, (300, 100))) == pytest.approx(region.sum(), rel=0.12)
    assert outline(np.zeros((5, 5), bool), (5, 5)) == ""


def test_pictures_show_the_frame_and_the_maps_on_one_scale(tmp_path):
    frame = np.zeros((30, 60, 3), np.uint8)
    frame[:, 30:] = (200, 40, 40)
    ramp = np.linspace(0, 1, 32, dtype=np.float32)[None].repeat(32, 0)
    gallery = Gallery()
    gallery.add(Entry("low", {"fusion": 1.0}, 0), lambda: Pictures(frame, {"fusion": ramp}))
    gallery.add(Entry("high", {"fusion": 2.0}, 0), lambda: Pictures(frame, {"fusion": ramp * 4}))
    write_report(tmp_path / "r.html", "t", gallery)
    images = [image for image in Page(tmp_path / "r.html").all("img") if image["alt"] == ""]
    decoded = [
        cv2.imdecode(np.frombuffer(base64.b64decode(image["src"].split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        for image in images
    ]
    high_frame, high, _, low = decoded
    assert high_frame.shape == (30, 60, 3) and images[0]["width"] == "60"
    assert np.abs(high_frame[15, 50].astype(int) - (40, 40, 200)).max() < 25
    # The same value has the same colour: the low map's right end is a quarter along the high map.
    assert high.shape == low.shape == (30, 60, 3)  # a map covers the frame
    assert np.abs(low[16, 58].astype(int) - high[16, 15]).max() < 30
    assert high[16, 58].astype(int).sum() > low[16, 58].astype(int).sum() + 100


# Charts


def test_curve_points_can_be_read_back_from_the_chart():
    x = np.array([0.0, 0.0, 0.1, 0.25, 0.6, 1.0])
    y = np.array([0.0, 0.4, 0.4, 0.7, 0.9, 1.0])
    text = curve_chart("ROC", "fpr", "tpr", [Line("a<b", "s0", x, y)], x_limit=0.3)
    assert "a&lt;b" in text
    points = np.array(re.findall(r"([\d.]+),([\d.]+)", re.search(r'points="([^"]+)"', text)[1]), float)
    shown = (points - [46, 238]) / [320, -224] * [0.3, 1]
    expected = [*zip(x[:4], y[:4], strict=True), (0.3, np.interp(0.3, x, y))]
    np.testing.assert_allclose(shown, expected, atol=1e-4)


@pytest.mark.parametrize("spread", ["narrow", "wide", "constant", "negative"])
def test_histogram_counts_every_image_once(spread):
    rng = np.random.default_rng(6)
    draw = {
        "narrow": lambda n: rng.normal(5, 1, n),
        "wide": lambda n: rng.lognormal(0, 3, n),
        "constant": lambda n: np.full(n, 3.0),
        "negative": lambda n: rng.normal(-50, 1, n),
    }[spread]
    normal, anomalous = draw(40), draw(25)
    threshold = float(np.median(normal))
    groups = [Bars("normal", "normal", normal), Bars("anomalous", "anomalous", anomalous)]
    text = histogram_chart("scores", "score", groups, threshold)
    counts = np.array(re.findall(r": (\d+) normal, (\d+) anomalous</title>", text), int)
    assert counts.sum(0).tolist() == [40, 25]
    assert ("log scale" in text) == (spread == "wide") and f"threshold {threshold:.4g}" in text


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.3), (-3.2, 8.1), (1e-9, 3e-9), (0, 1), (0, 12345)])
def test_ticks_are_round_and_inside(low, high):
    marks = ticks(low, high, 5)
    assert 3 <= len(marks) <= 11 and low - 1e-12 <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-2)


# In the browser


@pytest.fixture(scope="module")
def browser():
    if BINARY is None:
        pytest.skip("no Chromium or Chrome on this machine (for instance apt-get install chromium)")
    with Browser() as opened:
        yield opened


VISIBLE = "[...document.querySelectorAll('.card')].filter((c) => c.offsetParent).map((c) => c.dataset.%s)"


def visible(browser: Browser, key: str = "name") -> list[str]:
    return browser.run(VISIBLE % key)


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_page_opens_without_requests_or_messages(browser, run, width, dark):
    browser.dark(dark)
    browser.open(run / "report.html", width=width)
    browser.run("Promise.all([...document.images].map((i) => {i.loading = 'eager'; return i.decode()}))")
    asked = [address for address in browser.requests if not address.startswith("data:")]
    assert asked == [(run / "report.html").resolve().as_uri()] and browser.messages == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    back = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == dark


def test_filters_by_address_and_by_hand(browser, run):
    all_names, all_kinds = (
        [attrs[key] for attrs in Page(run / "report.html").cards] for key in ("data-name", "data-kind")
    )
    assert {"hits", "false-alarms", "normal"} <= set(all_kinds)
    for kind in ("false-alarms", "misses", "hits", "normal"):
        browser.open(run / "report.html", f"#filter={kind}")
        expected = [name for name, own in zip(all_names, all_kinds, strict=True) if own == kind]
        assert visible(browser) == expected
        assert browser.run("document.querySelector('#count').textContent").startswith(f"{len(expected)} of ")
        assert browser.run("document.querySelector('[aria-pressed=true]').dataset.filter") == kind
    browser.run("document.querySelector('[data-filter=hits]').click()")
    assert set(visible(browser, "kind")) == {"hits"} and browser.run("location.hash") == "#filter=hits"
    browser.run("document.querySelector('[data-filter=\"\"]').click()")
    assert visible(browser) == all_names
    browser.run(
        "{const g = document.querySelector('#group'); g.value = '<b>stick&';g.dispatchEvent(new Event('change'))}"
    )
    assert set(visible(browser, "group")) == {"<b>stick&"}
    browser.open(run / "report.html", "#query=ROPE")
    assert visible(browser) == [name for name in all_names if "rope" in name]
    browser.open(run / "report.html", "#query=nothing")
    assert visible(browser) == [] and browser.run("!document.querySelector('#none').hidden")


def test_keys_open_turn_and_close(browser, run):
    names = [attrs["data-name"] for attrs in Page(run / "report.html").cards]
    title = "document.querySelector('#viewer').open && document.querySelector('#viewer-title').textContent"
    focused = "document.activeElement.closest('.card')?.dataset.name"
    browser.open(run / "report.html")
    browser.run("document.querySelector('.open').focus()")
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert browser.run(focused) == names[1]
    columns = browser.run("getComputedStyle(document.querySelector('.cards')).gridTemplateColumns.split(' ').length")
    assert columns > 1
    browser.press("ArrowDown")
    assert browser.run(focused) == names[1 + columns]
    browser.press("ArrowUp", "Enter")
    assert browser.run(title) == names[1]
    assert browser.run("document.querySelectorAll('#viewer-body .panel').length") >= 6
    browser.press("ArrowRight")
    assert browser.run(title) == names[2] and browser.run("location.hash") == "#open=3"
    browser.press("Escape")
    assert not browser.run(title) and browser.run(focused) == names[2]
    browser.open(run / "report.html", "#open=4")
    assert browser.run(title) == names[3]
    assert browser.messages == []


def test_theme_contours_and_hints_on_curves(browser, run):
    browser.dark(False)
    browser.open(run / "report.html")
    browser.run("document.querySelector('#theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    browser.run("document.querySelector('#contours').click()")
    assert browser.run("getComputedStyle(document.querySelector('.outlines')).visibility") == "hidden"
    corner = browser.run(
        "(() => {const box = document.querySelector('[data-x-limit] .plot').getBoundingClientRect();"
        "return [box.right, box.top]})()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=corner[0] - 2, y=corner[1] + 1)
    tip = browser.run("document.querySelector('.tip')?.textContent")
    assert tip and tip.endswith("false positive rate 1.000, true positive rate 1.000")
    assert browser.messages == []


def test_hostile_names_stay_text_in_the_browser(browser, tmp_path):
    path = hostile_report(tmp_path / "r.html")
    browser.open(path, "#open=1")
    assert visible(browser) == [name.replace("\udcff", "?") for name in reversed(HOSTILE)]
    assert browser.run("document.title").startswith(HOSTILE[0])
    assert browser.run("document.scripts.length") == 1
    for _ in HOSTILE:
        browser.press("ArrowRight")
    assert browser.run("document.querySelector('#viewer-title').textContent") == HOSTILE[0]
    assert browser.messages == [] and [a for a in browser.requests if not a.startswith(("data:", "file:"))] == []
