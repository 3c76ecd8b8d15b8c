"""reproduce_tables.py: every cell against direct computation, what is cached, and the baselines' processes."""

import dataclasses
import itertools
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from machine import wait_until
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score
from tiny import NAMES, ROOT, SMALL_NETWORKS, read_json, read_rows, refusal, run_in_process, small_flags, succeed

from datasets.loading import ImageDataset
from datasets.mvtec import Category
from experiments import BASELINES, baselines, fusions, measurements, speed
from experiments.variants import Variant
from models import BRANCHES, MACLU, USAD, PatchCore
from models.branches.postprocess import resize_images, resize_maps
from models.networks.backbones import BackboneSpec
from training.settings import SplitSettings
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.locks import folder_lock

ALL = " + ".join(NAMES)
FIGURES = list(fusions.FIGURES)
WEIGHTS = {"ma_clu": 0.01, "ma2patch": 0.0, "pc": 1.0}


def reproduce(root: Path, *flags, category: str = "belt"):
    return succeed(root, "reproduce_tables", *flags, categories=[category])


def refused(root: Path, *flags) -> str:
    return refusal("reproduce_tables", *small_flags(root, "reproduce_tables"), *flags)


def rows_of(root: Path, table: str, section: int = 0, category: str = "belt") -> dict[str, dict]:
    """A table's rows by their label."""
    content = read_json(root / "result" / category / "tables" / f"{table}.json")
    return {row["label"]: row for row in content["sections"][section]["rows"]}


def means(row: dict, names=None) -> dict[str, float]:
    return {name: row["figures"][name]["mean"] for name in names or row["figures"]}


def fused(root: Path, *flags, models: str = "models") -> dict[str, float]:
    """The figures that test_fusion.py gives."""
    succeed(root, "test_fusion", "--models-dir", root / models, *flags, "--no-images")
    metrics = read_json(root / "result/belt/fusion/metrics.json")
    return {name: metrics[name] for name in FIGURES}


def train(root: Path, models: str, script: str, *flags) -> None:
    succeed(root, script, "--models-dir", root / models, "--holdout-ratio", 0.25, "--no-eval", *flags)


@pytest.fixture(scope="module")
def ablated(trained, tmp_path_factory) -> Path:
    """A copy of the trained folder with its ablation table."""
    root = shutil.copytree(trained, tmp_path_factory.mktemp("ablated") / "root")
    reproduce(root, "--tables", "ablation")
    return root


@pytest.fixture
def place(ablated, tmp_path) -> Path:
    return shutil.copytree(ablated, tmp_path / "place")


@pytest.fixture(scope="module")
def direct(trained):
    """Labels, masks, and every branch's scores, maps and scaled maps at 96 px, one image at a time."""
    branches = [BRANCHES[name].load(trained / f"models/belt/{name}.safetensors") for name in NAMES]
    found = {name: ([], [], []) for name in NAMES}
    samples = list(ImageDataset(Category(trained / "data", "belt").test_samples(), 96, "bicubic"))
    for sample, branch in itertools.product(samples, branches):
        part = branch.predict(resize_images(sample["image"][None], branch.image_size))
        maps = (resize_maps(part.maps, 96)[0].numpy(), resize_maps(part.scaled(), 96)[0].numpy())
        for values, value in zip(found[branch.name], (float(part.scores[0]), *maps), strict=True):
            values.append(value)
    labels, masks = [sample["label"] for sample in samples], np.stack([sample["mask"].numpy() for sample in samples])
    return labels, masks, {name: tuple(map(np.stack, values)) for name, values in found.items()}


# Cells against direct computation


def test_ablation_of_branches(ablated, direct):
    labels, masks, parts = direct
    rows = rows_of(ablated, "ablation")
    for subset in fusions.subsets(NAMES):
        scores, maps, _ = parts[subset[0]]
        if len(subset) > 1:
            product = np.prod([parts[name][2] for name in subset], axis=0)
            scores = sum(WEIGHTS[name] * parts[name][0] for name in subset) + product.max((1, 2))
            maps = np.stack([cv2.GaussianBlur(image, (5, 5), 1) for image in product])
        row = means(rows.pop(" + ".join(subset)))
        assert list(row)[:8] == FIGURES
        assert row["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert row["image_ap"] == pytest.approx(average_precision_score(labels, scores))
        assert row["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-5)
        assert row["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-4)
    assert rows == {}


def test_ablation_agrees_with_the_fusions_own_run(ablated):
    rows = rows_of(ablated, "ablation")
    assert means(rows[ALL], FIGURES) == pytest.approx(fused(ablated), abs=1e-6)
    metrics = read_json(ablated / "result/belt/fusion/metrics.json")
    for name, own in metrics["branches"].items():
        assert means(rows[name], FIGURES) == pytest.approx({key: own[key] for key in FIGURES}, abs=1e-6)


def test_ablation_of_score_terms(ablated, direct):
    labels, _, parts = direct
    terms = {
        "0.01 · score of ma_clu": 0.01 * parts["ma_clu"][0],
        "1 · score of pc": parts["pc"][0],
        "1 · maximum of the map": np.prod([scaled for *_, scaled in parts.values()], axis=0).max((1, 2)),
    }
    rows = rows_of(ablated, "ablation", section=1)
    subsets = fusions.subsets(list(terms))
    assert list(rows) == [" + ".join(subset) for subset in subsets] and len(rows) == 7
    for subset in subsets:
        expected = roc_auc_score(labels, sum(terms[term] for term in subset))
        assert means(rows[" + ".join(subset)])["image_auroc"] == pytest.approx(expected)
    pixel = {means(row)["pixel_auroc"] for row in rows.values()}
    assert pixel == {means(rows_of(ablated, "ablation")[ALL])["pixel_auroc"]}


def test_markdown_and_csv_hold_the_same(ablated):
    folder = ablated / "result/belt/tables"
    lines = read_rows(folder / "ablation.csv")
    rows = [*rows_of(ablated, "ablation").values(), *rows_of(ablated, "ablation", 1).values()]
    text = (folder / "ablation.md").read_text(encoding="utf-8")
    assert len(lines) == len(rows) == 14
    for line, row in zip(lines, rows, strict=True):
        for name in FIGURES:
            assert float(line[name]) == row["figures"][name]["mean"] and line[f"{name}_sd"] == ""
        cells = " | ".join(f"{means(row)[name]:.4f}" for name in FIGURES)
        assert f"| {line['row']} | {cells} |" in text


def test_sweeps_without_a_fit(place, direct, monkeypatch):
    """Thresholds and factors cost no network pass: the networks cannot even be built."""
    sweeps = ("threshold", "lambda_obj", "lambda_map")
    with monkeypatch.context() as patch:
        patch.setattr(measurements, "make_loader", None)
        patch.setattr("models.branches.branch.build_backbone", None)
        reproduce(place, "--tables", "sensitivity", "--sweeps", ",".join(sweeps))
    labels, masks, parts = direct
    peak = np.prod([scaled for *_, scaled in parts.values()], axis=0).max((1, 2))
    for section in (1, 2):
        for value, row in rows_of(place, "sensitivity", section).items():
            obj, top = (float(value), 1.0) if section == 1 else (0.01, float(value))
            expected = roc_auc_score(labels, obj * parts["ma_clu"][0] + parts["pc"][0] + top * peak)
            assert means(row)["image_auroc"] == pytest.approx(expected)
    branch = MACLU.load(place / "models/belt/ma_clu.safetensors")
    dataset = ImageDataset(Category(place / "data", "belt").test_samples(), 96, "bicubic")
    images, distinct = torch.stack([sample["image"] for sample in dataset]), set()
    for value, row in rows_of(place, "sensitivity").items():
        branch.threshold = float(value)
        maps = resize_maps(branch.predict(resize_images(images, 64)).scaled(), 96).numpy()
        product = maps * parts["ma2patch"][2] * parts["pc"][2]
        blurred = np.stack([cv2.GaussianBlur(image, (5, 5), 1) for image in product])
        assert means(row)["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), blurred.ravel()), abs=1e-5)
        distinct.add(means(row)["pixel_auroc"])
    assert len(distinct) > 2
    for name in sweeps:
        with Image.open(place / f"result/belt/tables/sensitivity_{name}.png") as plot:
            assert plot.format == "PNG" and len(plot.convert("RGB").getcolors(1 << 20)) > 10


def test_refitted_rows_are_what_the_scripts_give(place, monkeypatch):
    values = {"coreset_ratio": [0.03], "train_ratio": [0.1, 0.5], "image_size": [1.2]}
    sweeps = {name: fusions.SWEEPS[name]._replace(values=few) for name, few in values.items()}
    monkeypatch.setattr(fusions, "SWEEPS", fusions.SWEEPS | sweeps)
    before = {path: path.read_bytes() for path in (place / "models").rglob("*.safetensors")}
    reproduce(place, "--tables", "sensitivity", "--sweeps", "coreset_ratio,covariance,train_ratio,image_size")
    changes = [
        (0, "0.03", {"train_pc": ("--coreset-ratio", 0.03)}),
        (1, "ledoit-wolf", dict.fromkeys(("train_ma_clu", "train_ma2patch"), ("--covariance", "ledoit-wolf"))),
        (2, "0.5", dict.fromkeys(SMALL_NETWORKS, ("--train-ratio", 0.5))),
        (4, "112", {"train_ma2patch": ("--image-size", 112)}),
    ]
    for section, value, flags in changes:
        models = f"models_{section}"
        shutil.copytree(place / "models", place / models)
        for script, more in flags.items():
            train(place, models, script, *more)
        row = means(rows_of(place, "sensitivity", section)[value], FIGURES)
        assert row == pytest.approx(fused(place, models=models), abs=1e-5)
    too_few = rows_of(place, "sensitivity", 2)["0.1"]
    assert too_few["figures"] == {} and "train" in too_few["note"]
    assert rows_of(place, "sensitivity", 0)["0.1"]["note"] == "the value in force"
    assert {path: path.read_bytes() for path in (place / "models").rglob("*.safetensors")} == before
    assert not (place / "result/belt/tables/measured/fitted").exists()


@pytest.mark.parametrize(
    ("branch", "weights", "split", "depends"),
    [
        (MACLU, "pretrained", {}, False),
        (MACLU, "file", {}, False),
        (MACLU, "pretrained", {"train_ratio": 0.5}, True),
        (MACLU, "pretrained", {"holdout_ratio": 0.1}, True),
        (MACLU, "random", {}, True),
        (PatchCore, "pretrained", {}, True),
    ],
)
def test_only_what_depends_on_the_seed_is_fitted_again(branch, weights, split, depends):
    spec = BackboneSpec(branch.backbone_kind, "a network", 64, weights=weights, fingerprint="mark")
    split = SplitSettings(**{"train_ratio": 1.0, "holdout_ratio": 0.0, "seed": 22} | split)
    settings = {"seed": 22} if branch is PatchCore else {}
    variant = Variant(branch, spec, settings, split, checkpoint=Path("here"), checkpoint_digest="mark")
    assert variant.changed("seed", 22) == variant
    other = variant.changed("seed", 7)
    assert (other.fit_needs() != variant.fit_needs()) == depends == (other.checkpoint is None)


def test_a_checkpoint_that_changes_meanwhile_is_not_measured(place, monkeypatch):
    """Its figures would be kept under the former one's digest."""
    shutil.rmtree(place / "result/belt/tables")
    load = MACLU.load

    def changed(path, *arguments, **options):
        branch = load(path, *arguments, **options)
        train(place, "models", "train_ma_clu", "--seed", 7)
        return branch

    monkeypatch.setattr(MACLU, "load", changed)
    assert "ma_clu.safetensors has just been changed by another run" in refused(place, "--tables", "ablation")
    assert not list(place.glob("result/belt/tables/measured/*.safetensors"))


def test_seeds(place):
    reproduce(place, "--tables", "ablation", "--seeds", 7, 22)
    assert len(list(place.glob("result/belt/tables/measured/*.safetensors"))) == 6  # 22 is the checkpoints' own
    shutil.copytree(place / "models", place / "models_7")
    for script in SMALL_NETWORKS:
        train(place, "models_7", script, "--seed", 7)
    expected = [fused(place, models="models_7"), fused(place)]
    figures = rows_of(place, "ablation")[ALL]["figures"]
    for name in FIGURES:
        values = [part[name] for part in expected]
        assert figures[name]["values"] == pytest.approx(values, abs=1e-5)
        assert figures[name]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        assert figures[name]["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    assert " ± " in (place / "result/belt/tables/ablation.md").read_text(encoding="utf-8")


def test_standardized(place):
    reproduce(place, "--tables", "ablation", "--fusion", "standardized")
    content = read_json(place / "result/belt/tables/ablation.json")
    assert [section["title"] for section in content["sections"]] == ["Branches"]
    row = means(rows_of(place, "ablation")[ALL], FIGURES)
    assert row == pytest.approx(fused(place, "--fusion", "standardized"), abs=1e-6)
    reproduce(place, "--tables", "sensitivity", "--sweeps", "threshold", "--fusion", "standardized")
    train(place, "other", "train_ma_clu", "--threshold", 1.0)
    for name in ("ma2patch", "pc"):
        shutil.copy(place / f"models/belt/{name}.safetensors", place / "other/belt")
    row = means(rows_of(place, "sensitivity")["1"], FIGURES)  # with held-out statistics of this threshold
    assert row == pytest.approx(fused(place, "--fusion", "standardized", models="other"), abs=1e-6)


@pytest.mark.parametrize("fusion", ["paper", "standardized"])
def test_with_a_region_of_interest(workplace, fusion):
    """Maps are those of test_fusion.py, in which nothing outside counts at the branch's size either."""
    inside = np.zeros((56, 72), np.uint8)
    inside[10:48, 8:] = 255
    Image.fromarray(inside).save(workplace / "roi.png")
    for script in SMALL_NETWORKS:
        train(workplace, "models", script, "--roi", workplace / "roi.png")
    reproduce(workplace, "--tables", "ablation", "--fusion", fusion)
    row = means(rows_of(workplace, "ablation")[ALL], FIGURES)
    assert row == pytest.approx(fused(workplace, "--fusion", fusion), abs=1e-6)


def test_without_anomalous_images_figures_are_null(workplace):
    for folder in ("test/rope", "ground_truth"):
        shutil.rmtree(workplace / "data/belt" / folder)
    flags = ("--tables", "ablation,sensitivity", "--sweeps", "covariance,train_ratio")
    told = reproduce(workplace, *flags).err.splitlines()
    assert [line.split(":")[3] for line in told] == [" nothing for 0.1", " nothing for 0.25"]  # too few to fit on
    row = rows_of(workplace, "ablation")["pc"]["figures"]
    assert [row[name]["mean"] for name in FIGURES] == [None] * 8 and row["n_images"]["mean"] == 3


# What is kept


def kept(root: Path) -> dict[str, int]:
    folder = root / "result/belt/tables"
    files = [*folder.glob("cells/[!.]*"), *folder.glob("measured/[!.]*")]
    return {path.name: path.stat().st_mtime_ns for path in files}


def test_goes_on_after_a_kill(trained, ablated, tmp_path):
    root = shutil.copytree(trained, tmp_path / "root")
    flags = map(str, [*small_flags(root, "reproduce_tables"), "--tables", "ablation"])
    command = [sys.executable, ROOT / "reproduce_tables.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = root / "result/belt/tables/cells"
    wait_until(lambda: len(list(cells.glob("[!.]*.json"))) >= 3 or process.poll() is not None)
    process.kill()
    process.wait()
    before = kept(root)
    assert 3 <= len([name for name in before if name.endswith(".json")]) < 14
    reproduce(root, "--tables", "ablation")
    assert before.items() <= kept(root).items()  # none was written again
    for section in (0, 1):
        assert rows_of(root, "ablation", section) == rows_of(ablated, "ablation", section)


def test_cells_are_computed_once_and_anew_for_other_images_or_checkpoints(place):
    before = kept(place)
    reproduce(place, "--tables", "ablation")
    assert kept(place) == before
    reproduce(place, "--tables", "ablation", "--max-megapixels", 9)  # JPEGs would be smaller
    assert len(kept(place)) == 2 * len(before)
    image = place / "data/belt/test/rope/000.png"
    Image.open(place / "data/belt/test/rope/001.png").rotate(180).save(image)
    reproduce(place, "--tables", "ablation")
    assert len(kept(place)) == 3 * len(before)
    train(place, "models", "train_pc", "--coreset-ratio", 0.02)
    reproduce(place, "--tables", "ablation")
    assert means(rows_of(place, "ablation")[ALL], FIGURES) == pytest.approx(fused(place), abs=1e-6)
    assert len([name for name in kept(place) if name.endswith(".safetensors")]) == 10


def test_damaged_cells_and_measurements_are_made_again(place):
    expected = rows_of(place, "ablation")
    folder = place / "result/belt/tables"
    for path in [*folder.glob("cells/*"), *folder.glob("measured/*")]:
        path.write_bytes(path.read_bytes()[:20])
    reproduce(place, "--tables", "ablation")
    assert rows_of(place, "ablation") == expected


def test_broken_images_are_named_or_left_out(workplace):
    for name in ("test/good/001.png", "train/good/001.png"):
        (workplace / "data/belt" / name).write_bytes(b"broken")
    flags = ["--tables", "ablation", "--seeds", 7]
    finished = run_in_process("reproduce_tables", *small_flags(workplace, "reproduce_tables"), *flags)
    assert finished.code == 2 and "2 images" in finished.err and "train/good/001.png" in finished.err
    reproduce(workplace, *flags, "--skip-unreadable")
    assert rows_of(workplace, "ablation")["pc"]["figures"]["n_images"]["values"] == [6]
    config = read_json(workplace / "result/belt/tables/config.json")
    assert sorted(config["left_out"]) == ["test/good/001.png", "train/good/001.png"]


# What is refused


def test_one_run_at_a_time_and_no_strangers_folder(workplace):
    with folder_lock(workplace / "result/belt/tables"):
        assert "another run" in refused(workplace)
    stranger = workplace / "result/belt/tables/ablation.md"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("mine", encoding="utf-8")
    assert "tables" in refused(workplace) and stranger.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--tables", "ablation,figures"), "figures"),
        (("--tables", "ablation", "--sweeps", "threshold"), "--sweeps has no effect"),
        (("--tables", "speed", "--seeds", 1), "--seeds has no effect"),
        (("--tables", "ablation", "--baselines", "padim"), "--baselines has no effect"),
        (("--sweeps", "size"), "size"),
        (("--fusion", "standardized", "--lambda-map", 2), "--lambda-map has no effect"),
        (("--baselines-python", "/no/python"), "anomalib"),
        (("--fusion", "standardized", "--sweeps", "lambda_map"), "--sweeps lambda_map has no effect"),
        (("--save-maps",), "--save-maps"),
    ],
)
def test_bad_flags(trained, flags, said):
    assert said in refused(trained, *flags)
    assert not (trained / "result/belt/tables").exists()


def test_checkpoints_of_another_kind_or_without_statistics_are_refused(workplace):
    succeed(workplace, "train_pc", "--no-eval")
    said = refused(workplace, "--tables", "ablation", "--fusion", "standardized")
    assert "--holdout-ratio" in said and not (workplace / "result/belt/tables").exists()
    folder = workplace / "models/belt"
    shutil.copy(folder / "ma_clu.safetensors", folder / "pc.safetensors")
    assert "not of 'pc'" in refused(workplace)
    tensors, metadata = load_checkpoint(folder / "ma_clu.safetensors")
    for change in ({"settings": {"depth": 3}}, {"training": {"train_ratio": "all"}}, {"backbone": None}):
        save_checkpoint(folder / "ma_clu.safetensors", tensors, metadata | change)
        assert "ma_clu.safetensors: its metadata" in refused(workplace)


# Baselines and speed

STUB = """#!{python}
import json, sys, pathlib
import numpy as np
if sys.argv[1] == "-c":
    print("9.9.9")
    sys.exit()
assert sys.argv[1:3] == ["-m", "tools.anomalib_baseline"], sys.argv
job = json.loads(pathlib.Path(sys.argv[3]).read_text())
out = pathlib.Path(job["out"])
if job["model"] == "stfpm":
    sys.exit("URLError: no route")
elif job["model"] == "dinomaly":
    sys.exit("something broke")
else:
    rng = np.random.default_rng(job["seed"])
    np.save(out / "scores.npy", 100 * rng.standard_normal(len(job["test"])))
    np.save(out / "maps.npy", 50 * rng.standard_normal((len(job["test"]), 24, 24)).astype(np.float32))
    setting = "stub of %d and %d at %d" % (len(job["train"]), len(job["test"]), job["network"]["image_size"])
    answer = pathlib.Path(sys.argv[3]).with_name("answer.json")
    answer.write_text(json.dumps({{"result": setting, "memory": {{}}}}))
"""


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a shebang")
def test_baselines_are_measured_by_our_metrics(place, tmp_path, direct):
    labels, masks, _ = direct
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable), encoding="utf-8")
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    (place / "data/belt").rename(place / "data/coal_ad")
    (place / "models/belt").rename(place / "models/coal_ad")
    flags = ["--tables", "comparison", "--baselines-python", stub, "--baselines", "padim,stfpm,dinomaly"]
    reproduce(place, *flags, category="coal_ad")
    rows = rows_of(place, "comparison", category="coal_ad")
    rng = np.random.default_rng(22)
    scores, maps = rng.standard_normal(7), rng.standard_normal((7, 24, 24)).astype(np.float32)
    maps = resize_maps(torch.from_numpy(maps), 96).numpy()
    row = rows["PaDiM (anomalib)"]
    assert means(row)["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert means(row)["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-5)
    assert row["note"] == "stub of 3 and 7 at 64, anomalib 9.9.9"  # as PatchCore: half of what is not held out
    failed = {name: (row["figures"], row["note"]) for name, row in rows.items() if not row["figures"]}
    assert failed == {"STFPM (anomalib)": ({}, "URLError: no route"), "Dinomaly (anomalib)": ({}, "something broke")}
    assert "untrained" in rows["USAD"]["note"] and means(rows["its PatchCore alone"]) != means(rows["USAD"])
    assert means(rows["USAD, as reported"]) == baselines.REPORTED
    folder = place / "result/coal_ad/tables"
    assert len(list((folder / "cells").iterdir())) == 4  # what failed is tried again
    assert sorted(path.suffix for path in (folder / "measured").iterdir()) == [".safetensors"] * 3


def test_without_anomalib_the_rows_say_how_to_get_it(place, monkeypatch):
    monkeypatch.setattr(baselines, "ENVIRONMENT", Path("no such environment"))
    reproduce(place, "--tables", "comparison")
    rows = rows_of(place, "comparison")
    assert list(rows)[2:] == [f"{name} (anomalib)" for name in BASELINES.values()]
    assert all("requirements-baselines.txt" in row["note"] for row in list(rows.values())[2:])


def test_baselines_share_the_network_of_patchcore(trained, tmp_path):
    variant = Variant.of_checkpoint("pc", trained / "models/belt/pc.safetensors")
    shared = baselines.shared_network(variant.network, None, tmp_path)
    theirs = timm.create_model(shared["name"], features_only=True, out_indices=[2, 3]).eval()
    theirs.load_state_dict(load_file(shared["weights"]))
    branch = PatchCore.load(trained / "models/belt/pc.safetensors")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for ours, other in zip(branch.backbone(images), theirs(images), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("USAD_BASELINES_PYTHON" not in os.environ, reason="it names no Python that has anomalib")
@pytest.mark.parametrize("name", ["padim", "patchcore"])
def test_anomalib_for_real(trained, tmp_path, name):
    """Raw maps and scores, of the right images: a permuted list gives permuted results."""
    category = Category(trained / "data", "belt")
    network = Variant.of_checkpoint("pc", trained / "models/belt/pc.safetensors").network
    job = {"model": name, "seed": 3, "coreset_ratio": 0.01, "neighbors": 3, "out": str(tmp_path)}
    job |= {"network": baselines.shared_network(network, None, tmp_path), "decoding": {}}
    job |= {"run": {"device": "cpu", "batch_size": 4, "workers": 0}}
    train, test = ([str(item.path) for item in part()] for part in (category.train_samples, category.test_samples))
    results = []
    for order in (1, -1):
        given = {**job, "train": train, "test": test[::order]}
        said = baselines.run_module("tools.anomalib_baseline", given, os.environ["USAD_BASELINES_PYTHON"])
        assert "64 x 64 px" in said.result
        results.append([np.load(tmp_path / file)[::order] for file in ("scores.npy", "maps.npy")])
    (scores, maps), (scores_back, maps_back) = results
    assert maps.dtype == np.float32 and maps.shape == (7, 64, 64)
    assert np.allclose(maps, maps_back, rtol=1e-3, atol=1e-5) and np.allclose(scores, scores_back, rtol=1e-3)
    if name == "padim":
        assert np.allclose(scores, maps.max((1, 2))) and scores.max() > 1  # neither rescaled nor clamped


def test_speed_is_measured_apart(trained):
    category = Category(trained / "data", "belt")
    job = {
        "part": "pc",
        "models": str(trained / "models/belt"),
        "run": {"device": "cpu", "precision": "auto", "batch_size": 3, "workers": 0},
        "weights": {},
        "fusion": {"fusion": "paper"},
        "images": [str(item.path) for item in category.test_samples()],
        "decoding": dataclasses.asdict(category.decoding),
    }
    ballast = np.ones(1 << 27)  # 1 GB, none of which the other process holds
    figures, fusion = speed.measure_apart(job), speed.measure({**job, "part": USAD.name})
    assert 100 < figures["memory"] < ballast.nbytes / 1e6
    sizes = [(trained / f"models/belt/{name}.safetensors").stat().st_size / 1e6 for name in NAMES]
    assert figures["checkpoint"] == sizes[2] and fusion["checkpoint"] == pytest.approx(sum(sizes))
    for part in (figures, fusion):
        stages = [part[stage] for stage in ("load", "extract", "score")]
        assert min(stages) > 0 and 0.5 / part["images_per_second"] < sum(stages) <= 1 / part["images_per_second"]


def test_speed_table(place, monkeypatch):
    monkeypatch.setattr(speed, "measure_apart", lambda job: {"images_per_second": len(job["part"]) + 0.5})
    reproduce(place, "--tables", "ablation,speed", "--seeds", 22)
    text = (place / "result/belt/tables/speed.md").read_text(encoding="utf-8")
    assert "the checkpoints as they are" in text and "seed" not in text
    found = {name: means(row)["images_per_second"] for name, row in rows_of(place, "speed").items()}
    assert found == {name: len(name) + 0.5 for name in (*NAMES, "fusion")}
