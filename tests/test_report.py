"""The report: its figures, its pictures, its texts under hostile names, and the page in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from machine import PATIENCE
from matplotlib.figure import Figure
from tiny import read_json, read_rows, run_apart, succeed

from metrics import protocols
from reporting import charts
from reporting.gallery import Entry, Gallery, Pictures
from reporting.heatmaps import Thumbnails
from reporting.pictures import HEADER, encode, outline, text_line
from reporting.report import Threshold, write_report
from reporting.sheet import HEIGHT, MOST, TRUTH, chosen, heading, write_sheet

PARTS = ("fusion", "ma_clu", "ma2patch", "pc")
HOSTILE = (
    "<script>alert(1)</script>.png",
    "\"><img src=x onerror='alert(1)'>.png",
    "line\nbreak & quote\" ' `.png",
    "Ünïcødé \u202egnp.exe 煤.png",
    "not utf-8 \udcff.png",
    "</article></main></style>{{ title }} {% include 'x' %}.png",
)
KINDS = FALSE_ALARM, MISS, HIT, NORMAL = "▲ false alarm", "○ miss", "● hit", "– normal"


class Page(HTMLParser):
    """Tags with their attributes, and the text in them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags:
            self.words.setdefault(self.tags[-1][0], []).append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and all(attrs.get(k) == v for k, v in wanted.items())]

    def cards(self, key: str = "name") -> list[str]:
        return [attrs[f"data-{key}"] for attrs in self.all("article")]

    def figures(self) -> dict[str, list[float | None]]:
        rows: dict[str, list[float | None]] = {}
        for tag, attrs in self.tags:
            if "data-key" in attrs:
                row = rows.setdefault(attrs["data-key"], [])
            elif tag == "data":
                row.append(float(attrs["value"]))
            elif attrs.get("title", "").startswith("undefined"):
                row.append(None)
        return rows


def entry(index: int, score: float, label: int | None = None, name: str | None = None, **more) -> Entry:
    return Entry(name or f"{index}.png", dict.fromkeys(PARTS, score), label, **more)


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


def written(path: Path, gallery: Gallery, **options) -> Page:
    write_report(path / "r.html", options.pop("title", "t"), gallery, **options)
    return Page(path / "r.html")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of 21 images in three folders, some of them found, some missed, some false alarms."""
    rng, gallery = np.random.default_rng(5), Gallery()
    for index in range(21):
        group, label = (("good", 0), ("rope", 1), ("<b>stick&", 1))[index % 3]
        given = entry(index, rng.normal(1.5 * label), label, name=f"{group}/{index} <i>'\"é.png", group=group)
        gallery.add(given, lambda index=index, label=label: pictures(index, truth=label == 1))
    metrics = dict.fromkeys(protocols(), 0.5)
    curves = {part: {"image_roc": (np.array([0, 0.2, 1]), np.array([0, 0.1 * x, 1]))} for x, part in enumerate(PARTS)}
    options = {"metrics": {**metrics, "branches": dict.fromkeys(PARTS[1:], metrics)}, "curves": curves}
    return written(tmp_path_factory.mktemp("report"), gallery, threshold=Threshold(0.8, 0.9, "given"), **options)


# Figures


def test_report_of_a_test_run(workplace):
    succeed(workplace, "test_fusion")
    folder = workplace / "result" / "belt" / "fusion"
    page = Page(folder / "report.html")
    metrics = read_json(folder / "metrics.json")
    columns = [metrics, *(metrics["branches"][part] for part in PARTS[1:])]
    assert page.figures() == {key: [part[key] for part in columns] for key in protocols()}
    rows = sorted(read_rows(folder / "scores.csv"), key=lambda row: -float(row["score"]))
    assert page.cards() == [row["path"] for row in rows]
    assert page.cards("group") == [Path(row["path"]).parent.name for row in rows]
    # The threshold is that of the highest F1 on these test images, and the page says so.
    scores, labels = (np.array([float(row[key]) for row in rows]) for key in ("score", "label"))
    f1 = {at: 2 * labels[scores >= at].sum() / ((scores >= at).sum() + labels.sum()) for at in scores}
    best = max(f1, key=f1.get)
    assert f1[best] == pytest.approx(metrics["image_f1_max"])
    assert f"<b>Threshold {best:.4g}</b>" in page.source
    assert "chosen on the test set, for orientation only" in page.source
    kinds = {(1, True): HIT, (1, False): MISS, (0, True): FALSE_ALARM, (0, False): NORMAL}
    assert page.cards("kind") == [kinds[pair] for pair in zip(labels, scores >= best, strict=True)]
    assert f"<b>{page.cards('kind').count(HIT)}</b> of {int(labels.sum())}" in page.source
    # A branch has no report, nor a run without images: an earlier run's would be taken for its own.
    names = {"report.html", "sheet.jpg"}
    assert names <= {path.name for path in folder.iterdir()}
    assert not names & {path.name for path in (workplace / "result" / "belt" / "pc").iterdir()}
    succeed(workplace, "test_fusion", "--save-maps")
    assert list(folder.rglob("heatmaps/*/*.png")) and list(folder.rglob("anomaly_maps/*/*.tiff"))
    succeed(workplace, "test_fusion", "--no-images")
    assert not names & {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.png")) and not list(folder.rglob("*.tiff"))


def test_given_threshold_is_not_called_orientation(tmp_path):
    page = written(tmp_path, small_gallery([0, 0, 1, 1]), threshold=Threshold(1.0, None, "32 held-out images"))
    assert "32 held-out images" in page.source and "orientation" not in page.source
    assert page.cards("kind") == [HIT, HIT, FALSE_ALARM, NORMAL]  # at the threshold counts as an alarm
    assert not written(tmp_path, Gallery(), threshold=Threshold(1.0, 1.0, "given")).cards()


@pytest.mark.parametrize("score, labels", [(2.5, [0, 0, 1, 1]), (9.0, [0, 0, 1, 1]), (2.5, [0, 0, 0, 0])])
def test_filters_for_false_alarms_and_misses_are_always_there(tmp_path, score, labels):
    page = written(tmp_path, small_gallery(labels), threshold=Threshold(score, None, "given"))
    kinds = page.cards("kind")
    counts = dict(re.findall(r'name="kind" value="([^"]+)">[^<]*<b>(\d+)</b>', page.source))
    assert counts.keys() >= ({FALSE_ALARM, MISS} if {HIT, MISS, FALSE_ALARM} & set(kinds) else set(kinds))
    assert counts == {kind: str(kinds.count(kind)) for kind in counts}


def test_undefined_figures_and_no_threshold(tmp_path):
    undefined = dict.fromkeys(protocols())
    metrics = {**undefined, "branches": dict.fromkeys(PARTS[1:], undefined)}
    page = written(tmp_path, small_gallery([0] * 4), metrics=metrics, curves={part: {} for part in PARTS})
    assert page.figures() == {key: [None] * 4 for key in protocols()}
    assert "<b>Threshold" not in page.source and page.cards("kind") == [NORMAL] * 4


def test_truth_is_shown_where_it_is_known(tmp_path):
    gallery = Gallery()
    for label, truth in ((0, False), (1, True), (1, False), (None, False)):  # the third: a defect without masks
        gallery.add(entry(len(gallery), -len(gallery), label), lambda truth=truth: pictures(truth=truth))
    panels = written(tmp_path, gallery).all("use")
    assert [attrs["href"] for attrs in panels] == ["#truth-1", "#truth-2"]


@pytest.mark.parametrize("threshold", [None, Threshold(1.5, 0.5, "given")])
def test_frames_without_labels(tmp_path, threshold):
    gallery = small_gallery([None] * 4)
    gallery.add(entry(4, 0.0, alarm=True), lambda: pictures(4))  # smoothing may decide otherwise than the threshold
    page = written(tmp_path, gallery, threshold=threshold)
    kinds, quiet = page.cards("kind"), "– no alarm" if threshold else "– not rated"
    assert kinds[:3] == (["▲ alarm", "▲ alarm", quiet] if threshold else [quiet] * 3)
    assert sorted(kinds[3:]) == sorted(["▲ alarm", quiet])
    assert "false positive" not in page.source and not page.figures() and not page.all("svg", **{"class": "region"})


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    before = written(tmp_path, small_gallery([0, 1])).source

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("reporting.gallery.outline", fail)  # the last cards' contours
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, small_gallery([0, 1]), threshold=Threshold(0.5, 0.5, "given"))
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == [before]


def test_reporting_waits_with_its_large_imports():
    modules = "reporting.report, reporting.charts, reporting.sheet, reporting.heatmaps"
    large = "{'torch', 'matplotlib', 'jinja2', 'scipy'}"
    assert run_apart("-c", f"import sys, {modules}; assert not {large} & set(sys.modules)").code == 0


# Texts


def hostile_report(folder: Path) -> Page:
    gallery = Gallery()
    for index, name in enumerate(HOSTILE):
        gallery.add(entry(index, float(index), 1, name=name, group=name, note=name), pictures)
    config = {name: [name, "</script><script>alert(1)</script>"] for name in HOSTILE}
    options = {"config": config, "facts": {HOSTILE[1]: HOSTILE[0]}, "title": HOSTILE[0]}
    return written(folder, gallery, threshold=Threshold(2.0, 0.5, HOSTILE[0]), **options)


def test_names_are_text_and_nothing_else(tmp_path):
    hostile, gallery = hostile_report(tmp_path), Gallery()
    shown = [name.replace("\udcff", "?") for name in reversed(HOSTILE)]
    assert hostile.cards() == hostile.cards("group") == shown
    for index in range(len(HOSTILE)):
        gallery.add(entry(index, float(index), 1, group=str(index), note="n"), pictures)
    tame = written(tmp_path, gallery, threshold=Threshold(2.0, 0.5, "s"), config={"k": 1}, facts={"a": "b"})
    # Names add no element, nor an attribute.
    assert [(tag, list(attrs)) for tag, attrs in hostile.tags] == [(tag, list(attrs)) for tag, attrs in tame.tags]


def test_page_allows_its_own_script_only_and_refers_to_nothing(report):
    (policy,) = [attrs["content"] for attrs in report.all("meta") if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = report.words[tag][:1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not re.search(r"url\(|@import|https?:|fetch|XMLHttpRequest|innerHTML|eval", text)
    for _, attrs in report.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("style", "srcset", "action")]
        for key in ("src", "href"):
            assert attrs.get(key, "#").startswith(("data:", "#"))


# Pictures


def test_gallery_keeps_what_may_be_mistaken_and_a_sample_of_the_rest():
    calls, gallery = [], Gallery(limit=20, extreme=8)
    scores = np.random.default_rng(7).permutation(np.repeat(np.arange(150.0), 2))  # with ties

    def load(index):
        calls.append(index)
        return pictures()

    for index, score in enumerate(scores):
        gallery.add(entry(index, score, index % 2), lambda index=index: load(index))
    kept = [item.entry for item in gallery.by_score()]
    assert [e.score for e in kept] == sorted([e.score for e in kept], reverse=True) and len(kept) == 20
    assert [e.score for e in kept if e.label == 0][:8] == sorted(scores[::2], reverse=True)[:8]
    assert [e.score for e in kept if e.label == 1][-8:] == sorted(scores[1::2], reverse=True)[-8:]
    assert len({item.entry.name for item in gallery.by_score()}) == 20
    assert len(gallery) == 300 and sorted(gallery.scores) == sorted(scores)
    assert len(calls) == len(set(calls)) < 150  # pictures are asked for only where they may be shown


def test_galleries_of_two_processes_choose_what_one_chooses():
    scores = np.random.default_rng(8).integers(0, 40, 90).astype(float)  # with ties

    def filled(gallery, numbers):
        for number in numbers:
            alarm = [None, True, False][number % 3]
            given = entry(number, scores[number], number % 2, note=HOSTILE[0], alarm=alarm)
            gallery.add(given, lambda number=number: pictures(number, truth=True))
        return gallery

    one = filled(Gallery(limit=20, extreme=8), range(90))
    first, second, third = (Gallery(limit=20, extreme=8, first=start) for start in (0, 37, 90))
    filled(first, range(37)), filled(second, range(37, 90))
    for other in (second, third):
        first.merge({name: torch.from_numpy(values) for name, values in other.state().items()})
    assert (first.scores, first.labels, first.alarms) == (one.scores, one.labels, one.alarms)
    for ours, theirs in zip(first.by_score(), one.by_score(), strict=True):
        assert ours.entry == theirs.entry and ours.frame == theirs.frame
        assert (ours.size, ours.truth) == (theirs.size, theirs.truth)
        assert all(np.array_equal(ours.maps[part], theirs.maps[part]) for part in theirs.maps)


def test_sample_of_the_rest_is_uniform_and_decided_by_the_seed():
    scores = np.random.default_rng(3).permutation(60).astype(float)
    picture, counts = pictures(), np.zeros(60)

    def choose(seed):
        gallery = Gallery(limit=20, extreme=5, seed=seed)
        gallery._shrink = lambda entry, _: type("Small", (), {"entry": entry})
        for index, score in enumerate(scores):
            gallery.add(entry(index, score), lambda: picture)
        return [int(item.entry.score) for item in gallery.by_score()]

    assert choose(1) == choose(1) != choose(2)
    for seed in range(300):
        counts[choose(seed)] += 1
    assert (counts[55:] == 300).all()
    expected = 300 * 15 / 55
    chi_square = ((counts[:55] - expected) ** 2 / expected).sum() / (1 - 15 / 55)
    assert 25 < chi_square < 95  # 54 degrees of freedom: outside with a probability of 1e-3


def test_all_images_are_shown_up_to_the_limit_and_a_sample_is_stated(tmp_path):
    page = written(tmp_path, small_gallery([0] * 20, limit=20, extreme=8))
    assert len(page.cards()) == 20 and "drawn at random" not in page.source
    page = written(tmp_path, small_gallery([0] * 50, limit=20, extreme=8))
    assert len(page.cards()) == 20
    words = " ".join(page.source.split())
    assert "20 of 50 images. These are the 8 highest scores, and others drawn at random with seed 22" in words


def test_500_images_of_noise_stay_under_30_mb(tmp_path):
    rng, gallery = np.random.default_rng(4), Gallery()
    noise = rng.integers(0, 255, (700, 900, 3), dtype=np.uint8)
    maps = {part: rng.random((256, 256)).astype(np.float32) for part in PARTS}
    sizes = []
    for index in range(2):
        gallery.add(entry(index, 1.0, 1), lambda: Pictures(noise, maps, rng.random((700, 900)) > 0.5))
        sizes.append(len(written(tmp_path, gallery, threshold=Threshold(1.0, 0.5, "s")).source))
    assert 500 * (sizes[1] - sizes[0]) < 29e6
    assert len(encode(noise, 2000)) <= 2000


def test_outline_lies_on_the_region_at_the_frames_own_scale():
    region = np.zeros((100, 300), np.uint8)
    region[20:60, 200:280] = 1
    for hole in (slice(0), slice(220, 260)):
        region[30:50, hole] = 0
        loops = outline(region > 0, (600, 150))
        drawn = cv2.fillPoly(np.zeros((150, 600), np.uint8), [np.array(x, float).astype(int) for x in loops], 1)
        assert (drawn != cv2.resize(region, (600, 150), interpolation=cv2.INTER_NEAREST)).sum() < 0.12 * drawn.sum()
    assert outline(np.zeros((5, 5), bool), (5, 5)) == []


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_pictures_show_the_frame_and_the_maps_on_one_scale(tmp_path, scale):
    frame = np.zeros((30, 60, 3), np.uint8)
    frame[:, 30:] = (200, 40, 40)
    ramp = np.linspace(0, scale, 32, dtype=np.float32)[None].repeat(32, 0)
    gallery = Gallery()
    gallery.add(Entry("low", {"fusion": 1.0}, 0), lambda: Pictures(frame, {"fusion": ramp}))
    gallery.add(Entry("high", {"fusion": 2.0}, 0), lambda: Pictures(frame, {"fusion": ramp * 4}))
    page = written(tmp_path, gallery, threshold=Threshold(0.0, 2 * scale, "given"))
    images = [image for image in page.all("img", alt="") if "src" in image]
    high_frame, high, _, low = (
        cv2.imdecode(np.frombuffer(base64.b64decode(image["src"].split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        for image in images
    )
    assert high_frame.shape == (30, 60, 3) and images[0]["width"] == "60"
    assert np.abs(high_frame[15, 50].astype(int) - (40, 40, 200)).max() < 25
    # The same value has the same colour: the low map's right end is a quarter along the high map.
    assert high.shape == low.shape == (30, 60, 3)  # a map covers the frame
    assert np.abs(low[16, 58].astype(int) - high[16, 15]).max() < 30
    assert high[16, 58].astype(int).sum() > low[16, 58].astype(int).sum() + 100
    # The contour of the high map begins in its middle; the low map reaches the threshold nowhere.
    paths = [attrs["d"] for attrs in page.all("path") if "id" not in attrs]
    assert min(float(x) for x in re.findall(r"[ML]([\d.]+)", paths[0])) == pytest.approx(30, abs=1.5) and not paths[1]


# The sheet


def test_sheet_shows_the_worst_first(tmp_path):
    gallery = Gallery()
    for index in range(60):
        label = int(index % 4 > 0)
        name = HOSTILE[index % len(HOSTILE)]
        gallery.add(entry(index, float(index), label, name=name), lambda label=label: pictures(truth=label == 1))
    threshold = Threshold(29.5, 0.9, "given", on_test_set=True)
    scores = {kind: [] for kind in MOST}
    for kind, item in chosen(gallery.by_score(), threshold):
        scores[kind].append(item.entry.score)
    assert list(scores) == ["miss", "false alarm", "hit"]
    assert scores["miss"] == [1, 2, 3, 5, 6, 7, 9, 10] and scores["false alarm"] == [56, 52, 48, 44, 40, 36, 32]
    assert len(scores["hit"]) == 4 and scores["hit"][0] == 30 and scores["hit"][-1] == 59
    first, second, _ = heading("belt", gallery, threshold)
    assert first == "belt: 22 of 45 anomalous images missed, 7 false alarms among 15 normal images"
    assert second == "Threshold 29.5: given, on these test images"
    write_sheet(tmp_path / "sheet.jpg", "belt", gallery, threshold)
    sheet = cv2.imread(str(tmp_path / "sheet.jpg"))[..., ::-1]
    rows = sum(map(len, scores.values()))
    assert sheet.shape[0] == 3 * HEADER + rows * (2 * HEADER + HEIGHT + 2)
    frame = sheet[5 * HEADER : 5 * HEADER + HEIGHT, 2:200].astype(int)  # of the worst miss, with its outline
    assert (np.abs(frame - TRUTH).max(-1) < 40).any()


def test_names_on_the_sheet_are_in_their_own_script():
    """With the fonts of OpenCV 5; older ones have none for them."""
    name, escaped = (text_line(text, 200) for text in ("煤流 é", "\\u7164\\u6d41 \\xe9"))
    assert np.array_equal(name, escaped) != hasattr(cv2, "FontFace")
    assert np.array_equal(text_line("\udcff", 200), text_line("\\udcff", 200))  # a byte that is not UTF-8


def test_thumbnails_close_their_file(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        thumbnails = Thumbnails(tmp_path, 1)
        thumbnails.add(np.zeros((4, 4)))
        del thumbnails
    assert not said


@pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
def test_sheet_of_a_test_without_mistakes(tmp_path, labels):
    gallery = small_gallery(labels)
    write_sheet(tmp_path / "sheet.jpg", "belt", gallery, Threshold(2.0 * (1 - labels[0]), None, "given"))
    assert cv2.imread(str(tmp_path / "sheet.jpg")) is not None


# Charts


def test_any_number_of_branches_gets_a_title_and_a_look_of_its_own(tmp_path):
    x, y = np.array([0.0, 0.0, 0.1, 0.25, 0.6, 1.0]), np.array([0.0, 0.4, 0.4, 0.7, 0.9, 1.0])
    parts = [*PARTS, "my_branch", "a<b $x$", "x", "y", "z"]
    own = dict.fromkeys(protocols(), 0.25)
    metrics = {**own, "branches": dict.fromkeys(parts[1:], own)}
    curves = {part: {"pixel_pro": (x, y)} for part in parts}
    page = written(tmp_path, small_gallery([0]), metrics=metrics, curves=curves)
    titles = ["Fused", "MACLU", "MA2Patch", "PatchCore", "My branch", "A<b $x$", "X", "Y", "Z"]
    assert [word for word in page.words["th"] if word in titles] == titles
    (image,) = [image for image in page.all("img") if image["alt"].startswith("Fused")]
    assert image["alt"] == ", ".join(f"{title} 0.250" for title in titles)
    drawn = ElementTree.fromstring(base64.b64decode(image["src"].split(",")[1]))
    assert {f"{title} 0.250" for title in titles} <= {text for element in drawn.iter() for text in element.itertext()}
    axes = Figure().add_subplot()
    charts.curves(axes, dict.fromkeys(parts, (x, y)), x_limit=0.3, chance=False)
    for line in axes.lines:
        np.testing.assert_array_equal(line.get_xydata(), np.stack([x, y], axis=1))
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(parts)
    assert axes.get_xlim() == (0, 0.3)


def test_the_same_numbers_give_the_same_report(tmp_path):
    pages = [written(tmp_path, small_gallery([0, 1, 1]), threshold=Threshold(1.5, 0.5, "given")) for _ in range(2)]
    assert pages[0].source == pages[1].source


@pytest.mark.parametrize("spread", ["narrow", "wide", "constant", "rounding", "negative"])
def test_histogram_counts_every_image_once(spread):
    rng = np.random.default_rng(6)
    draw = {
        "narrow": lambda n: rng.normal(5, 1, n),
        "wide": lambda n: rng.lognormal(0, 3, n),
        "constant": lambda n: np.full(n, 3.0),
        "rounding": lambda n: 3.0 + 1e-15 * rng.integers(0, 2, n),
        "negative": lambda n: rng.normal(-50, 1, n),
    }[spread]
    normal, anomalous = draw(40), draw(25)
    threshold = float(np.median(normal))
    axes = Figure().add_subplot()
    charts.histogram(axes, {"normal": normal, "anomalous": anomalous}, threshold)
    for values, bars in zip((normal, anomalous), axes.patches, strict=True):
        counts, edges, _ = bars.get_data()
        middle = len(edges) // 2
        assert counts.sum() == values.size and counts[:middle].sum() == (values < edges[middle]).sum()
    assert (axes.get_xscale() == "log") == (spread == "wide")
    (line,) = axes.lines
    assert line.get_xdata() == [threshold] * 2 and line.get_label() == f"threshold {threshold:.4g}"


# In the browser


def probe(page: Page, script: str, width: int = 1280, dark: bool = False) -> Any:
    """What `script`, the body of an asynchronous function, returns in a headless Chromium that shows the page.

    The page must log nothing: no error, no breach of its policy.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on this machine (for instance apt-get install chromium)")
    frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(page.source)}"></iframe>'
    wrapper = f"""<html>{frame}<script>
    const probe = async (document) => {{ {script} }};
    onload = () => probe(document.querySelector("iframe").contentDocument).then((value) => {{
      document.documentElement.dataset.value = JSON.stringify(value);
    }});
    </script></html>"""
    page.path.with_name("probe.html").write_text(wrapper, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=20000", f"--blink-settings=preferredColorScheme={int(not dark)}", "--dump-dom"]
    command = [browser, *flags, page.path.with_name("probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE)
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(re.search(r'<html data-value="([^"]*)"', done.stdout)[1]))


# Chooses in the form, and tells which images are shown then.
CHOOSE = """
const form = document.querySelector("form");
const images = [...document.querySelectorAll("article")];
const choose = (name, value) => {
  const field = form.querySelector(`[name=${name}][value="${CSS.escape(value)}"]`) ?? form.elements[name];
  if (field.type === "radio" || field.type === "checkbox") field.click();
  else { field.value = value; field.dispatchEvent(new Event("input", { bubbles: true })); }
  return images.filter((image) => image.checkVisibility()).map((image) => image.dataset.name);
};
"""


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_page_in_light_and_dark_wide_and_narrow(report, width, dark):
    script = """
    const images = [...document.images].filter((image) => image.src);
    for (const image of images) {
      image.loading = "eager";
      if (!image.complete) await new Promise((done) => image.addEventListener("load", done));
    }
    const canvas = new OffscreenCanvas(400, 300).getContext("2d");
    canvas.drawImage(document.querySelector(".charts img"), 0, 0, 400, 300);
    const asked = document.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name);
    const style = (selector) => getComputedStyle(document.querySelector(selector));
    return [asked.filter((name) => !name.startsWith("data:")), document.documentElement.scrollWidth,
      style("body").backgroundColor, style(".charts img").filter, [...canvas.getImageData(0, 0, 400, 300).data]];
    """
    asked, widest, background, inverted, pixels = probe(report, script, width, dark)
    assert asked == [] and widest <= width
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark == (inverted != "none")
    # The policy, which forbids styles in the page, leaves the curves theirs: mostly empty, a black and a blue line.
    opaque = [tuple(pixels[i : i + 3]) for i in range(0, len(pixels), 4) if pixels[i + 3] == 255]
    assert {(0x1A, 0x20, 0x26), (0, 0x72, 0xB2)} <= set(opaque) and len(opaque) < 30_000


def test_choices_and_an_image_enlarged_and_every_control_takes_the_focus(report):
    script = """
    const controls = [...document.querySelectorAll("input, select, summary")];
    const focused = controls.filter((control) => { control.focus(); return control === document.activeElement; });
    const image = images[3];
    const box = image.querySelector("input[type=checkbox]");
    const look = () => [image.offsetWidth, getComputedStyle(image.querySelector("figcaption b")).display];
    const looks = [1, 2, 3].map(() => { const now = look(); box.click(); return now; });
    const display = (selector) => getComputedStyle(document.querySelector(selector)).display;
    const kinds = ["▲ false alarm", "○ miss", "● hit", "– normal", ""].map((kind) => choose("kind", kind));
    const groups = ["<b>stick&", ""].map((group) => choose("group", group));
    const names = ["ROPE", "nothing", ""].map((name) => choose("name", name));
    const maps = ["pc", ""].map((map) => {
      choose("map", map);
      const [over, own] = [".overlay", "[data-part=pc]"].map((selector) => images[0].querySelector(selector).src);
      return [display(".overlay"), over === own];
    });
    choose("contours", "");
    const count = document.querySelector("output").value;
    return [controls.length - focused.length, looks, kinds, groups, names, maps, display(".outlines"), count];
    """
    unreached, looks, kinds, groups, names, maps, outlines, count = probe(report, CHOOSE + script)
    (small, hidden), (large, shown), again = looks
    assert unreached == 0 and large > 2 * small and (hidden, shown) == ("none", "block") and again == [small, hidden]
    everything = report.cards()
    cards = list(zip(everything, report.cards("kind"), strict=True))
    assert kinds == [*([name for name, own in cards if own == kind] for kind in KINDS), everything] and all(kinds)
    assert groups == [[name for name in everything if name.startswith("<b>")], everything]
    assert names == [[name for name in everything if name.startswith("rope")], [], everything]
    assert maps == [["block", True], ["none", True]] and outlines == "none" and count == "21 of 21 shown"


def test_hostile_names_stay_text_in_the_browser(tmp_path):
    page = hostile_report(tmp_path)
    script = "return [document.title, document.scripts.length, images.map((i) => choose('group', i.dataset.group))]"
    title, scripts, groups = probe(page, CHOOSE + script)
    assert title.startswith(HOSTILE[0]) and scripts == 1
    assert groups == [[name] for name in page.cards()]
