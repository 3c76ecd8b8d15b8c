"""Thresholds from held-out normal images: the rule against naive computation, and the files it leaves."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import SMALL_NETWORKS, draw_category, end_well, read_json, read_rows, refusal, run_in_process, small_flags

import training.testing
from datasets.loading import ImageDataset
from datasets.mvtec import Category
from models import USAD
from models.fusion.operating_point import OperatingPoint, exceedance, images_to_promise, quantile, rank
from utils.errors import InputError

HELD = 12  # of 24


def point(**values):
    standard = {
        "threshold": 1.5,
        "pixel_threshold": 0.5,
        "false_alarm_rate": 0.1,
        "images": 20,
        "expected_rate": 0.09,
        "interval": (0.01, 0.2),
        "fusion": {"score_weights": {}, "lambda_map": 1.0, "fusion": "paper"},
        "checkpoints": {},
    }
    return OperatingPoint(**standard | values)


# The rule


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 1 / 3, 0.5])
def test_threshold_is_the_lowest_whose_expected_rate_is_small_enough(rate):
    rng = np.random.default_rng(1)
    for count in (1, 2, 5, 19, 20, 99, 100, 250):
        values = rng.standard_normal(count)
        # The new value ranks like any of count + 1 equals, hence exceeds v with probability (those above + 1) / all.
        allowed = [v for v in values if ((values > v).sum() + 1) / (count + 1) <= rate + 1e-12]
        expected = min(allowed) if allowed else values.max()
        threshold = quantile(values, rate)
        assert expected < threshold <= np.nextafter(expected, np.inf)
        above = (values >= threshold).sum()
        assert exceedance(count, rate)[0] == pytest.approx((above + 1) / (count + 1))


def test_expected_rate_and_interval_by_simulation():
    rng = np.random.default_rng(2)
    count, rate = 60, 0.1
    draws = rng.random((20_000, count))  # uniform: the true rate above t is 1 - t
    rates = 1 - np.sort(draws, axis=1)[:, rank(count, rate) - 1]
    expected, (low, high) = exceedance(count, rate)
    assert rates.mean() == pytest.approx(expected, abs=0.002) and expected <= rate
    assert ((rates >= low) & (rates <= high)).mean() == pytest.approx(0.95, abs=0.01)
    above = count - rank(count, rate)
    assert (low, high) == pytest.approx(stats.beta(above + 1, count - above).interval(0.95))


def test_too_few_images_are_said_so():
    values = np.random.default_rng(3).random(30)
    assert quantile(values, 0.01) > values.max()
    expected, interval = exceedance(30, 0.01)
    line = point(false_alarm_rate=0.01, images=30, expected_rate=expected, interval=interval).shortfall
    assert "30 held-out images" in line and "highest values" in line and f"{1 / 31:.3g}" in line
    expected, interval = exceedance(99, 0.01)
    assert expected <= 0.01 + 1e-12
    line = point(false_alarm_rate=0.01, images=99, expected_rate=expected, interval=interval).shortfall
    assert "99 held-out images" in line and "highest values" not in line


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05])
def test_enough_images_keep_the_promise(rate):
    count = images_to_promise(rate)
    assert str(count) in point(false_alarm_rate=rate, images=20, interval=exceedance(20, rate)[1]).shortfall
    assert point(false_alarm_rate=rate, images=count, interval=exceedance(count, rate)[1]).shortfall is None
    rng = np.random.default_rng(9)
    true = [1 - quantile(rng.random(count), rate) for _ in range(4000)]  # uniform: the true rate above t is 1 - t
    assert np.mean([(rate / 2 <= value <= 1.5 * rate) for value in true]) > 0.94


def test_float32_values_stay_below_their_threshold():
    values = np.random.default_rng(4).random(50).astype(np.float32)
    assert (values >= np.float32(quantile(values, 0.02))).sum() == 0


def test_figures_on_the_test_set():
    rng = np.random.default_rng(5)
    scores, labels = rng.normal(1.2, 1, 200), rng.integers(0, 2, 200)
    figures = point().on_test(scores, labels)
    hits = sum(1 for s, y in zip(scores, labels, strict=True) if y and s >= 1.5)
    false = sum(1 for s, y in zip(scores, labels, strict=True) if not y and s >= 1.5)
    assert figures["recall"] == hits / labels.sum() and figures["missed"] == labels.sum() - hits
    assert figures["false_alarms"] == false
    assert figures["measured_false_alarm_rate"] == false / (200 - labels.sum())
    json.dumps(figures, allow_nan=False)
    assert point().on_test(scores, np.zeros(200, int))["recall"] is None
    assert point().on_test(scores, np.ones(200, int))["measured_false_alarm_rate"] is None


# The file


def test_file_round_trip(tmp_path):
    stored = point(threshold=0.1 + 0.2, checkpoints={"pc.safetensors": "ab"})
    stored.write(tmp_path)
    assert OperatingPoint.read(tmp_path) == stored
    assert OperatingPoint.read(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "not json",
        lambda content: "[" * 100_000,
        lambda content: [1],
        lambda content: {**content, "format": "other"},
        lambda content: {**content, "threshold": float("nan")},
        lambda content: {**content, "threshold": "1"},
        lambda content: {**content, "threshold": 10**400},
        lambda content: {**content, "interval": [1]},
        lambda content: {**content, "fusion": 3},
        lambda content: {**content, "fusion": {"lambda_map": "x"}},
        lambda content: {**content, "more": 1},
        lambda content: {key: content[key] for key in content if key != "images"},
    ],
)
def test_other_files_are_refused(tmp_path, change):
    point().write(tmp_path)
    path = tmp_path / "usad.json"
    content = change(read_json(path))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=r"usad\.json"):
        OperatingPoint.read(tmp_path)


# The scripts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A drawn category, and its three small branches trained with half of the images held out."""
    root = tmp_path_factory.mktemp("operating_point")
    draw_category(root / "data" / "belt", train=2 * HELD, good=8, anomalous=6)
    for script in SMALL_NETWORKS:
        train(root, script, root / "models", "--holdout-ratio", 0.5)
    return root


def train(root, script, models, *flags):
    end_well(script, *small_flags(root, script), "--models-dir", models, "--no-eval", *flags)


def fuse(root, models, results, *flags, run=end_well):
    places = ("--models-dir", models, "--results-dir", results)
    return run("test_fusion", *small_flags(root, "test_fusion"), *places, "--no-images", *flags)


def predict(models, source, out, *flags, run=end_well):
    places = ("--models-dir", models, "--category", "belt", "--device", "cpu", "--out", out)
    return run("predict", source, *places, *flags)


@pytest.fixture
def models(root, tmp_path):
    """A copy of the trained models, for tests that change them."""
    return shutil.copytree(root / "models", tmp_path / "models")


@pytest.mark.parametrize("fusion", ["paper", "standardized"])
def test_thresholds_come_from_the_held_out_images_alone(root, models, tmp_path, fusion):
    fuse(root, models, tmp_path, "--fusion", fusion, "--false-alarm-rate", "0.2")
    stored = OperatingPoint.read(models / "belt")
    usad = USAD.load(models / "belt")
    assert usad.rule.name == fusion and usad.threshold == stored.threshold
    names = sorted(path.name for path in (root / "data/belt/train/good").iterdir())
    held = sorted(random.Random("holdout 22").sample(range(2 * HELD), HELD))
    results = usad([root / "data/belt/train/good" / names[index] for index in held])
    scores = np.array([result.score for result in results])
    allowed = int(0.2 * (HELD + 1)) - 1  # of the held-out images above the threshold
    assert stored.images == HELD and (scores >= stored.threshold).sum() == allowed
    assert np.sort(scores)[-allowed - 1] == pytest.approx(stored.threshold)
    dataset = ImageDataset(Category(root / "data", "belt").train_samples(), usad.image_size, "bicubic")
    images = torch.stack([dataset[index]["image"] for index in held])
    peaks = usad.predict(images)[1].amax((1, 2)).sort().values
    assert float(peaks[-allowed - 1]) == pytest.approx(stored.pixel_threshold, rel=1e-5)


def test_thresholds_need_no_test_images(root, models, tmp_path):
    shutil.copytree(root / "data/belt/train", tmp_path / "data/belt/train")
    alone = ("--data-root", tmp_path / "data")
    said = fuse(root, models, tmp_path / "alone", "--false-alarm-rate", "0.2", *alone, run=run_in_process).out
    assert said.splitlines()[-1] == "belt: no folder test, so there is nothing to test"
    assert not (tmp_path / "alone").exists()
    found = OperatingPoint.read(models / "belt")
    fuse(root, models, tmp_path / "tested", "--false-alarm-rate", "0.2")
    assert OperatingPoint.read(models / "belt") == found
    assert "--false-alarm-rate" in fuse(root, models, tmp_path / "alone", *alone, run=refusal)


def test_metrics_at_the_point_and_predict_agree_with_the_scores(root, models, tmp_path):
    fuse(root, models, tmp_path, "--false-alarm-rate", "0.1")
    metrics = read_json(tmp_path / "belt/fusion/metrics.json")["operating_point"]
    table = read_rows(tmp_path / "belt/fusion/scores.csv")
    above = [float(row["score"]) >= metrics["threshold"] for row in table]
    labels = [row["label"] == "1" for row in table]
    assert metrics["false_alarms"] == sum(a and not y for a, y in zip(above, labels, strict=True))
    assert metrics["recall"] == sum(a and y for a, y in zip(above, labels, strict=True)) / 6
    assert metrics["images"] == HELD

    out = tmp_path / "predictions"
    predict(models, root / "data/belt/test", out, "--no-images")
    rows = read_rows(out / "predictions.csv")
    assert [row["source"].endswith(t["path"]) for row, t in zip(rows, table, strict=True)] == [True] * 14
    for row, expected, alarm in zip(rows, table, above, strict=True):
        assert float(row["score"]) == pytest.approx(float(expected["score"]), rel=1e-5)
        assert row["anomalous"] == str(int(alarm))
    stored = read_json(out / "config.json")["operating_point"]
    assert stored["threshold"] == metrics["threshold"] and stored["false_alarm_rate"] == 0.1


def test_given_thresholds_take_the_place_of_the_stored_point(root, models, tmp_path):
    fuse(root, models, tmp_path, "--false-alarm-rate", "0.1")
    stored = OperatingPoint.read(models / "belt")
    for threshold, pixel_threshold in ((400.0, 60.0), (400.0, None), (None, 60.0), (-1.5, 0.0)):
        given = {"threshold": threshold, "pixel_threshold": pixel_threshold}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        out = tmp_path / "out"
        predict(models, root / "data/belt/test/good/000.png", out, *flags)
        expected = {key: getattr(stored, key) if value is None else value for key, value in given.items()}
        assert read_json(out / "config.json")["operating_point"] == expected
        report = (out / "report.html").read_text()
        assert "--threshold" in report and "held-out normal images: expected" not in report


def test_a_stored_point_serves_later_tests_with_the_same_settings(root, models, tmp_path):
    fuse(root, models, tmp_path, "--false-alarm-rate", "0.1")
    first = (tmp_path / "belt/fusion/metrics.json").read_text()
    fuse(root, models, tmp_path)
    assert (tmp_path / "belt/fusion/metrics.json").read_text() == first
    said = fuse(root, models, tmp_path, "--lambda-map", "2", run=run_in_process).err
    assert "operating_point" not in read_json(tmp_path / "belt/fusion/metrics.json")
    assert said.startswith("warning: ") and "usad.json is for another fusion, which predict.py goes by" in said


def test_checkpoints_that_change_meanwhile_get_no_thresholds(root, models, tmp_path, monkeypatch):
    """They would be those of the former ones."""
    gather, path = training.testing.all_rows, models / "belt/pc.safetensors"

    def changed(rows):
        train(root, "train_pc", models, "--holdout-ratio", 0.5, "--neighbors", 2)
        return gather(rows)

    monkeypatch.setattr(training.testing, "all_rows", changed)
    before = path.read_bytes()
    assert "just been changed" in fuse(root, models, tmp_path, "--false-alarm-rate", "0.1", run=refusal)
    assert path.read_bytes() != before and not (models / "belt/usad.json").exists()


def test_other_checkpoints_are_noticed(root, models, tmp_path):
    fuse(root, models, tmp_path, "--false-alarm-rate", "0.1")
    train(root, "train_pc", models, "--holdout-ratio", 0.5, "--neighbors", 2)
    source, out = root / "data/belt/test/good/000.png", tmp_path / "out"
    assert "--false-alarm-rate" in predict(models, source, out, run=refusal)
    fuse(root, models, tmp_path, "--false-alarm-rate", "0.1")
    predict(models, source, out, "--no-images")


def test_images_that_were_not_held_out_by_all(root, models, tmp_path):
    for flags, told in (((), "--holdout-ratio"), (("--holdout-ratio", 0.25), "same images")):
        train(root, "train_pc", models, *flags)
        refused = fuse(root, models, tmp_path, "--false-alarm-rate", "0.1", run=run_in_process)
        assert refused.code == 2 and told in refused.err
    assert not (models / "belt/usad.json").exists()


def test_held_out_images_that_are_gone_are_noticed(root, models, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    held = random.Random("holdout 22").sample(range(2 * HELD), HELD)[0]
    good = tmp_path / "data/belt/train/good"
    (good / f"{held:03d}.png").rename(good / "zzz.png")
    assert "training images" in fuse(tmp_path, models, tmp_path / "r", "--false-alarm-rate", "0.1", run=refusal)


def test_a_foreign_file_is_left_alone(root, models, tmp_path):
    (models / "belt/usad.json").write_text('{"mine": 1}')
    fuse(root, models, tmp_path, "--false-alarm-rate", "0.1", run=refusal)
    assert (models / "belt/usad.json").read_text() == '{"mine": 1}'
