"""Metrics against scikit-learn, plain loops over thresholds, and the published program's golden figure."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
from tiny import golden

from datasets.mvtec import Sample
from evaluation.results import Results
from metrics import pixel
from metrics.image import ImageMetrics
from metrics.pixel import PixelMetrics
from models.branches.part import Part
from utils.errors import InputError

PIXEL_KEYS = {"pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "pro_as_published"}
EIGHT_CONNECTED = np.ones((3, 3))


def draw(seed: int, n: int = 7, size: tuple[int, int] = (23, 31), levels: int | None = None):
    """Maps [n, H, W], masks and labels: normal images, defects of several regions, one with an empty mask."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3 > 0
    maps = rng.normal(size=(n, *size)).astype(np.float32)
    masks = np.zeros((n, *size), bool)
    for i in np.flatnonzero(labels)[:-1]:
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 6)
            masks[i, y : y + rng.integers(1, 6), x : x + rng.integers(1, 6)] = True
    diagonal = np.flatnonzero(labels)[0]
    masks[diagonal, :8, :8] |= np.eye(8, dtype=bool)  # one region only to 8-connectivity
    maps += masks
    if levels is not None:
        maps = np.round(maps * levels / 8).astype(np.float32)
    return maps, masks, labels


def compute(maps, masks, labels, batch_size: int = 3) -> dict[str, float | None]:
    pixels = PixelMetrics()
    for start in range(0, len(maps), batch_size):
        batch = slice(start, start + batch_size)
        pixels.update(maps[batch], masks[batch], labels[batch])
    return pixels.compute()


def image_metrics(scores, labels) -> dict[str, float | None]:
    images = ImageMetrics()
    images.merge({"scores": scores, "labels": labels})
    return images.compute()


def f1_max(labels, scores) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)))


def regions_of(masks) -> list[tuple[int, np.ndarray]]:
    found = []
    for i, mask in enumerate(masks):
        numbered, n = ndimage.label(mask, structure=EIGHT_CONNECTED)
        found += [(i, numbered == k) for k in range(1, n + 1)]
    return found


def naive_aupro(maps, masks, limit: float = 0.3) -> float:
    """Apply every distinct score to every image; area under the polyline up to the limit."""
    regions, fpr, pro = regions_of(masks), [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        predicted = maps >= threshold
        fpr.append(predicted[~masks].mean())
        pro.append(np.mean([predicted[i][region].mean() for i, region in regions]))
    fpr, pro = np.array(fpr), np.array(pro)
    below = fpr < limit
    return auc([*fpr[below], limit], [*pro[below], np.interp(limit, fpr, pro)]) / limit


def naive_published_pro(maps, masks) -> float:
    """The published protocol literally, over maps of anomalous images."""
    levels = []
    for scores in maps.astype(np.float64):
        scaled = (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
        levels.append(np.floor(255 * scaled) / 255)
    levels, regions, points = np.stack(levels), regions_of(masks), []
    for threshold in np.linspace(levels.min(), levels.max(), 200, endpoint=False):
        predicted = levels > threshold
        fpr = predicted[~masks].mean()
        if fpr < 0.3:
            points.append((fpr, np.mean([predicted[i][region].mean() for i, region in regions])))
    fpr, pro = np.array(points[::-1]).T
    return float(np.sum(np.diff(fpr / fpr[-1]) * (pro[1:] + pro[:-1]) / 2))


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-30, 1e30])
@pytest.mark.parametrize("levels", [None, 8])
def test_image_metrics_agree_with_sklearn(scale, levels):
    rng = np.random.default_rng(3)
    labels = rng.random(200) < 0.3
    scores = rng.normal(size=200) + labels
    scores = (scores if levels is None else np.round(scores * levels / 8)) * scale
    found = image_metrics(scores, labels)
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert found["image_f1_max"] == pytest.approx(f1_max(labels, scores), abs=1e-12)


def test_image_scores_keep_double_precision_and_need_both_classes():
    """Scores that float32 cannot tell apart still rank."""
    scores = 1.0 + np.arange(4) * 1e-12
    assert image_metrics(scores, [0, 0, 1, 1])["image_auroc"] == 1.0
    for label in (0, 1):
        assert image_metrics(scores, [label] * 4) == {"image_auroc": None, "image_ap": None, "image_f1_max": None}


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-30, 1e30])
@pytest.mark.parametrize("levels, chunk", [(None, 1 << 18), (None, 5), (8, 5), (40, 5), (40, 1 << 18)])
def test_pixel_metrics_agree_with_sklearn_and_plain_loops(monkeypatch, scale, levels, chunk):
    monkeypatch.setattr(pixel, "CHUNK", chunk)
    maps, masks, labels = draw(seed=11, levels=levels)
    maps = maps * np.float32(scale)
    found = compute(maps, masks, labels)
    flat, scores = masks.ravel(), maps.ravel().astype(np.float64)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(flat, scores), abs=1e-12)
    assert found["pixel_ap"] == pytest.approx(average_precision_score(flat, scores), abs=1e-12)
    assert found["pixel_f1_max"] == pytest.approx(f1_max(flat, scores), abs=1e-12)
    assert found["aupro"] == pytest.approx(naive_aupro(maps, masks), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_published_pro_agrees_with_a_rescan_of_the_images(seed):
    maps, masks, labels = draw(seed, n=9)
    found = compute(maps, masks, labels)["pro_as_published"]
    assert found == pytest.approx(naive_published_pro(maps[labels], masks[labels]), abs=1e-12)


def test_published_pro_does_not_depend_on_the_unit_or_on_normal_images():
    maps, masks, labels = draw(seed=4)
    reference = compute(maps, masks, labels)["pro_as_published"]
    for scale in (2.0**-90, 2.0**90):
        assert compute(maps * np.float32(scale), masks, labels)["pro_as_published"] == reference
    assert compute(maps[labels], masks[labels], labels[labels])["pro_as_published"] == reference


def test_golden_published_pro():
    data = golden("fusion")
    found = compute(data["fused_map"], data["mask"] > 0, np.arange(6) >= 3)
    assert found["pro_as_published"] == pytest.approx(float(data["pro_as_published"]), abs=1e-6)


def test_perfect_inverted_constant_and_binary_maps():
    maps, masks, labels = draw(seed=6)
    found = compute(maps + 100 * masks, masks, labels)
    assert [found[key] for key in ("pixel_auroc", "pixel_ap", "pixel_f1_max")] == [1.0, 1.0, 1.0]
    assert found["aupro"] == pytest.approx(1.0, abs=1e-12)
    inverted = compute(maps - 100 * masks, masks, labels)
    assert (inverted["pixel_auroc"], inverted["aupro"]) == (0.0, 0.0)
    constant = compute(np.full_like(maps, -0.25), masks, labels)
    assert constant["pixel_auroc"] == 0.5 and constant["pro_as_published"] is None
    assert constant["aupro"] == pytest.approx(0.15, abs=1e-12)  # the straight line to (1, 1), cut at 0.3
    binary = masks.astype(np.float32)
    assert compute(binary, masks, labels)["pro_as_published"] is None  # no false positive at any threshold
    assert compute(1 - binary, masks, labels)["pro_as_published"] is None  # FPR above 0.3 at every threshold


def test_negative_zero_ties_with_zero():
    maps = np.array([[[0.0, -0.0, -0.0, 0.0]]], np.float32)
    masks = np.array([[[True, True, False, False]]])
    assert compute(maps, masks, np.array([True]))["pixel_auroc"] == 0.5


def test_figures_do_not_depend_on_batches_or_type():
    maps, masks, labels = draw(seed=8, n=10, levels=30)
    expected = compute(maps, masks, labels)
    for batch_size in (1, 10):
        assert compute(maps, masks, labels, batch_size) == expected
    tensors = torch.from_numpy(maps), torch.from_numpy(masks), torch.from_numpy(labels)
    assert compute(*tensors) == expected
    strided = torch.from_numpy(np.ascontiguousarray(maps.transpose(2, 1, 0))).permute(2, 1, 0)
    assert compute(strided, masks, labels) == expected
    assert all(type(value) is float for value in expected.values())


def test_update_after_compute_and_merge_of_shards():
    maps, masks, labels = draw(seed=9, n=12)
    first, second = PixelMetrics(), PixelMetrics()
    first.update(maps[:3], masks[:3], labels[:3])
    first.compute()
    first.curves()
    first.update(maps[3:5], masks[3:5], labels[3:5])
    assert first.compute() == compute(maps[:5], masks[:5], labels[:5])
    second.update(maps[5:], masks[5:], labels[5:])
    first.merge(second.state())
    expected = compute(maps, masks, labels)
    assert first.compute() == pytest.approx(expected, abs=1e-12)


def test_images_of_several_sizes():
    small, large = draw(seed=1, size=(16, 16)), draw(seed=2, size=(24, 40))
    pixels = PixelMetrics()
    pixels.update(*small)
    pixels.update(*large)
    flat = np.concatenate([small[1].ravel(), large[1].ravel()])
    scores = np.concatenate([small[0].ravel(), large[0].ravel()])
    assert pixels.compute()["pixel_auroc"] == pytest.approx(roc_auc_score(flat, scores), abs=1e-12)


def test_pixel_metrics_of_one_class_or_of_nothing_are_undefined():
    maps, masks, _ = draw(seed=5)
    for fill in (None, False, True):
        pixels = PixelMetrics()
        if fill is not None:
            pixels.update(maps, np.full_like(masks, fill), np.ones(len(maps), bool))
        assert pixels.compute() == dict.fromkeys(PIXEL_KEYS) and pixels.curves() == {}


def test_an_empty_mask_on_an_anomalous_image_is_background():
    maps, masks, labels = draw(seed=13)
    empty = np.flatnonzero(labels)[-1]
    assert not masks[empty].any()
    relabelled = labels.copy()
    relabelled[empty] = False
    with_it, without_it = compute(maps, masks, labels), compute(maps, masks, relabelled)
    assert with_it["aupro"] == without_it["aupro"]
    assert with_it["pro_as_published"] != without_it["pro_as_published"]


def test_shapes_must_fit():
    maps, masks, labels = draw(seed=16)
    for bad in ((maps[0], masks[0], labels), (maps, masks[:, 1:], labels), (maps, masks, labels[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            PixelMetrics().update(*bad)


def test_curves_are_exact_and_keep_their_ends():
    maps, masks, labels = draw(seed=17, levels=60)
    pixels = PixelMetrics()
    pixels.update(maps, masks, labels)
    full, thin = (
        {name: np.stack(curve, axis=1) for name, curve in pixels.curves(points).items()} for points in (10**6, 20)
    )
    figures = pixels.compute()
    assert full.keys() == thin.keys() == {"pixel_roc", "pixel_pr", "pixel_pro"}
    for name, every in full.items():
        some = thin[name]
        assert 5 < len(some) <= 21 < len(every)
        assert max(np.abs(every - point).max(1).min() for point in some) < 1e-12
        np.testing.assert_array_equal(some[-1], every[-1])
        assert np.all(np.diff(some[:, 0]) >= 0)
    for name in ("pixel_roc", "pixel_pro"):
        assert thin[name][[0, -1]] == pytest.approx(np.array([[0, 0], [1, 1]]), abs=1e-12)
    recall, precision = full["pixel_pr"].T
    assert recall[-1] == 1.0 and recall[0] == 0.0 and precision[0] == precision[1]
    assert auc(*full["pixel_roc"].T) == pytest.approx(figures["pixel_auroc"], abs=1e-12)
    assert np.max(2 / (1 / recall[1:] + 1 / precision[1:])) == pytest.approx(figures["pixel_f1_max"], abs=1e-12)
    regions = regions_of(masks)
    for threshold in np.unique(maps)[::5]:  # every point of the PRO curve is one of plain counting
        predicted = maps >= threshold
        point = predicted[~masks].mean(), np.mean([predicted[i][region].mean() for i, region in regions])
        assert np.abs(full["pixel_pro"] - point).max(1).min() < 1e-12


def test_memory_stays_near_four_bytes_a_pixel(monkeypatch):
    monkeypatch.setattr(pixel, "CHUNK", 1 << 13)
    rng = np.random.default_rng(18)
    masks = np.zeros((8, 200, 200), bool)
    masks[4:, 20:60, 30:90] = True
    labels = np.arange(8) >= 4
    pixels, n_batches = PixelMetrics(), 25
    tracemalloc.start()
    try:
        for _ in range(n_batches):
            pixels.update(rng.random((8, 200, 200), np.float32), masks, labels)
        pixels.compute()
        pixels.curves()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    n_pixels = n_batches * masks.size
    stored = 4 * n_pixels + 8 * n_batches * masks.sum()
    assert peak < 1.25 * stored + 6e6  # the buffers grow by a quarter; a batch and a chunk of the ranking


@pytest.mark.parametrize("levels", [None, 12])
def test_f1_thresholds_reach_the_best_f1(levels):
    maps, masks, labels = draw(11, n=9, levels=levels)
    pixels, images = PixelMetrics(), ImageMetrics()
    scores = maps.max((1, 2))
    for metric in (pixels, images):
        metric.update(maps, masks, labels, scores)
    for metric, values, truth in ((pixels, maps.ravel(), masks.ravel()), (images, scores, labels)):
        predicted = values >= metric.f1_threshold()
        f1 = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
        assert f1 == pytest.approx(f1_max(truth, values), rel=1e-12)
        assert type(metric)().f1_threshold() is None


@pytest.mark.parametrize("levels", [None, 4])
def test_shards_of_image_metrics_and_curves_that_enclose_their_figures(levels):
    rng = np.random.default_rng(9)
    scores, labels = rng.normal(size=40), rng.integers(0, 2, 40).astype(bool)
    if levels:
        scores = np.round(scores * levels)
    parts = [ImageMetrics() for _ in range(3)]
    for part, rows in zip(parts, np.array_split(np.arange(40), 3), strict=True):
        part.update(np.zeros((len(rows), 2, 2)), np.zeros((len(rows), 2, 2), bool), labels[rows], scores[rows])
    for part in parts[1:]:
        parts[0].merge(part.state())
    assert parts[0].compute() == image_metrics(scores, labels)
    (fpr, tpr), (recall, precision) = parts[0].curves().values()
    assert auc(fpr, tpr) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    ap = np.sum(np.diff(recall, prepend=0) * precision)
    assert ap == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1], recall[-1]) == (0, 0, 1, 1, 1)
    assert ImageMetrics().curves() == {}


@pytest.mark.parametrize("part", ["scores", "maps"])
def test_what_is_not_finite_is_refused_with_the_name_of_its_image(part):
    samples = [Sample(Path(f"{index}.png"), f"test/good/{index}.png") for index in range(3)]
    numbers = {"scores": torch.zeros(3), "maps": torch.zeros(3, 4, 4)}
    numbers[part].view(3, -1)[1, 0] = torch.nan
    batch = {"index": torch.arange(3), "mask": torch.zeros(3, 4, 4, dtype=torch.bool), "label": torch.zeros(3)}
    with pytest.raises(InputError, match=r"pc gives a score or map that is not finite on 1\.png"):
        Results(samples, ["pc"]).add({"pc": Part(**numbers)}, batch)
