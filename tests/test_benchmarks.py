"""The benchmark: its plain reference agrees with the project on fresh data, and a quick run leaves sane figures."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny import end_well, read_json, read_rows, refusal, succeed

from benchmarks import reference
from benchmarks.bench import Bench
from benchmarks.run import COLUMNS
from datasets.loading import ImageDataset
from datasets.mvtec import Category
from models.branches.neighbors import load_faiss


def test_the_published_program_gives_what_test_fusion_gives(workplace):
    succeed(workplace, "test_fusion", "--no-images")
    folder, loop = workplace / "result/belt/fusion", reference.PublishedLoop.load(workplace / "models/belt")
    samples = list(ImageDataset(Category(workplace / "data", "belt").test_samples(), 96, "bicubic"))
    scores, maps = zip(*(loop(sample["image"][None])["fusion"] for sample in samples), strict=True)
    found = [float(row["score"]) for row in read_rows(folder / "scores.csv")]
    np.testing.assert_allclose(found, scores, rtol=1e-3)
    metrics = read_json(folder / "metrics.json")
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score([sample["label"] for sample in samples], scores))
    masks = np.stack([sample["mask"] for sample in samples])
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), np.stack(maps).ravel()), abs=1e-4)


@pytest.mark.parametrize(
    ("script", "stages", "expected"),
    [("run", "extract,coreset,neighbors", 6), ("gpu", "fused,launches,precision", 3)],
)
def test_a_quick_run_leaves_sane_figures(script, stages, expected, tmp_path):
    expected += 2 * ("neighbors" in stages and load_faiss() is not None)  # for two sizes of a bank
    flags = ["--quick", "--stages", stages, "--device", "cpu", "--out", tmp_path]
    finished = end_well(f"benchmarks.{script}", *flags)
    report = read_json(tmp_path / "results.json")
    assert report["skipped"] == {} and len(report["rows"]) == expected
    assert torch.__version__.startswith(report["machine"]["torch"]) and report["product_gflop_per_second"] > 0
    for row in report["rows"]:
        if "ours" in row:
            assert row["ratio"] == pytest.approx(row["reference"] / row["ours"])
        if "share" in row:
            assert 0 < row["share"] < 1.2
        assert f"| {row['stage']} | {row['size']} |" in finished.out
    lines = read_rows(tmp_path / "table.csv")
    assert len(lines) == expected and tuple(lines[0]) == COLUMNS


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages", "speed"], "--stages: 'speed' is not one of"),
        (["--stages", "coreset", "--sizes", "coreset=many"], "--sizes coreset=many: write STAGE=SIZE"),
        (["--stages", "coreset", "--sizes", "fused=3"], "with a stage that is run (coreset)"),
    ],
)
def test_wrong_flags_are_one_line(flags, said, tmp_path):
    assert said in refusal("benchmarks.run", "--quick", "--out", tmp_path, *flags)


def test_pairs_are_warmed_up_and_run_in_turn(tmp_path):
    calls, bench = [], Bench("cpu", "fp32", True, tmp_path)
    pair = bench.pair(lambda: calls.append("a") or 1, lambda: calls.append("b") or 2)
    assert calls == ["a"] * 3 + ["b"] + ["a", "b"] * 3
    assert (pair.found, pair.expected) == (1, 2) and min(pair.ours, pair.plain) >= 0
