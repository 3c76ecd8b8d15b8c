"""The benchmark: its plain reference agrees with the project on fresh data, and a quick run leaves sane figures."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import run_in_process, small_flags

from benchmarks import plain_fusion, reference, reference_metrics
from benchmarks.bench import Bench
from benchmarks.stages import drawn_maps
from metrics.pixel import PixelMetrics
from models.branches.coreset import greedy_k_center
from models.branches.neighbors import NearestNeighbors
from models.branches.patchcore import patch_features


def test_the_published_program_gives_what_test_fusion_gives(workplace):
    finished = run_in_process("test_fusion", *small_flags(workplace, "test_fusion"), "--no-images")
    assert finished.code == 0, finished.err
    plain_fusion.main(workplace / "models" / "belt", workplace / "data" / "belt", workplace / "plain.json")
    plain = json.loads((workplace / "plain.json").read_text())
    folder = workplace / "result" / "belt" / "fusion"
    with open(folder / "scores.csv", newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(scores, plain["scores"], rtol=1e-3)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["image_auroc"] == pytest.approx(plain["metrics"]["image_auroc"])
    assert metrics["pixel_auroc"] == pytest.approx(plain["metrics"]["pixel_auroc"], abs=1e-4)
    assert metrics["pro_as_published"] == pytest.approx(plain["metrics"]["pro_as_published"], abs=5e-3)


def test_plain_metrics_agree():
    maps, masks = drawn_maps(4, 80)
    metrics = PixelMetrics()
    metrics.update(maps, masks, np.ones(4, bool))
    found = metrics.compute()
    assert found["pixel_auroc"] == pytest.approx(reference_metrics.pixel_auroc(maps, masks), abs=1e-12)
    assert found["pro_as_published"] == pytest.approx(reference_metrics.pro_as_published(maps, masks), abs=1e-9)
    assert found["aupro"] == pytest.approx(reference_metrics.aupro(maps, masks), abs=2e-3)


def test_plain_coreset_neighbours_and_features_agree():
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(2000, 12, generator=generator)
    assert greedy_k_center(patches, 40, progress=False).tolist() == reference.sampled(patches, 40)
    distances, indices = NearestNeighbors(patches[:300]).search(patches, 1)
    expected, rows = reference.nearest(patches.double(), patches[:300].double())
    assert torch.equal(indices[:, 0], rows)
    torch.testing.assert_close(distances[:, 0].double(), expected, atol=1e-6, rtol=1e-5)
    fine, coarse = torch.randn(1, 6, 10, 10, generator=generator), torch.randn(1, 9, 5, 5, generator=generator)
    torch.testing.assert_close(patch_features([fine, coarse])[0], reference.patch_features(fine, coarse))


def test_a_quick_run_leaves_sane_figures(tmp_path):
    stages, sizes = "extract,coreset,neighbors,pixels", ["pixels=3", "coreset=300"]
    flags = ["--quick", "--stages", stages, "--sizes", *sizes, "--device", "cpu"]
    finished = run_in_process("benchmarks.run", *flags, "--out", tmp_path)
    assert finished.code == 0, finished.err
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["skipped"] == {}
    assert torch.__version__.startswith(report["machine"]["torch"])
    assert all(rate > 0 for rate in report["product_gflop_per_second"].values())
    found = {row["stage"].split()[0] for row in report["rows"]}
    assert {"extract", "coreset", "neighbours", "pro_as_published", "aupro,", "pixel_auroc,"} <= found
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(row["reference"] / row["ours"])
    extracted = [row for row in report["rows"] if row["stage"].startswith("extract")]
    shares = [re.search(r"(\d+)% of the product rate", row["remark"]).group(1) for row in extracted]
    assert all(0 < int(share) < 120 for share in shares)
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n|") == len(report["rows"]) + 2
    assert report["machine"]["device"] in table


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stages", "speed"], "--stages: 'speed' is not one of"),
        (["--stages", "coreset", "--sizes", "coreset=many"], "--sizes coreset=many: write STAGE=SIZE"),
        (["--stages", "coreset", "--sizes", "pixels=3"], "with a stage that is run (coreset)"),
        (["--category", "nowhere"], "--category nowhere is no folder in MVTec layout"),
        (["--category", str(Path(__file__).parent / "hardness")], "hardness is no folder in MVTec layout"),
        (["--anomalib-python", "nowhere"], "--anomalib-python nowhere is no file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_flags_are_one_line(flags, said, tmp_path):
    finished = run_in_process("benchmarks.run", "--quick", "--out", tmp_path, *flags)
    assert finished.code == 2
    assert said in finished.err
    assert len(finished.err.splitlines()) == 1


def test_pairs_are_warmed_up_and_run_in_turn(tmp_path):
    calls, bench = [], Bench("cpu", "fp32", True, tmp_path)
    ours, plain, first, second = bench.pair(lambda: calls.append("a") or 1, lambda: calls.append("b") or 2, rounds=2)
    assert calls == ["a", "b"] * 3
    assert (first, second) == (1, 2)
    assert ours >= 0 and plain >= 0
