"""Checkpoints that take in new frames: as if fitted on all, whatever happens on the way, and back to the byte."""

import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import Batches, StandIn
from tiny import SMALL_NETWORKS, contents, draw_category, end_well, read_json, refusal, run_in_process, succeed

from datasets.mvtec import Category
from models import MACLU, MA2Patch, PatchCore
from models.branches.frames import TrainingFrames, mark
from training import training
from training.settings import SplitSettings
from training.update import Present, portion, replace, roll_back
from utils.checkpoint import load_checkpoint, save_checkpoint


def call(root: Path, script: str, *flags, category: str = "belt", run=end_well):
    """A script with only the places and the run given."""
    places = ("--data-root", root / "data", "--models-dir", root / "models", "--category", category)
    where = () if "--rollback" in flags else ("--results-dir", root / "result", "--device", "cpu", "--workers", 0)
    return run(script, *places, *where, *flags)


def update(root: Path, script: str, *flags, **options):
    return call(root, script, "--update", "--no-eval", *flags, **options)


def checkpoint(root: Path, script: str) -> Path:
    return root / "models" / "belt" / f"{script.removeprefix('train_')}.safetensors"


def add_frames(root: Path, count: int, seed: int = 7) -> list[str]:
    """New frames beside the others; their names."""
    drawn = draw_category(root / "drawn" / str(seed), train=count, good=0, anomalous=0, seed=seed)
    names = [f"new {seed} {path.name}" for path in sorted((drawn / "train/good").iterdir())]
    for path, name in zip(sorted((drawn / "train/good").iterdir()), names, strict=True):
        shutil.move(path, root / "data/belt/train/good" / name)
    return [f"train/good/{name}" for name in names]


# What is learned


def tokens(count: int, seed: int) -> torch.Tensor:
    """CLS and patch tokens [n, 1 + 16, 6] of belts: a third of the patches are coal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 17, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 20
    drawn[:, 1:6] += 15
    return drawn


@pytest.mark.parametrize("covariance", ["empirical", "ledoit-wolf"])
@pytest.mark.parametrize("branch_class", [MACLU, MA2Patch])
def test_a_gaussian_is_that_of_all_frames(branch_class, covariance):
    def branch():
        made = branch_class(StandIn(16, (4, 4), 6), covariance=covariance)
        made.backbone.cls_dim = 6
        made.backbone.forward = lambda features: (features[:, 0], features[:, 1:])
        return made

    first, second, third = tokens(9, 1), tokens(8, 1)[1:] + 1, tokens(11, 2)
    whole, updated = branch(), branch()
    whole.fit(Batches.of(torch.cat([first, second, third]), 3))
    updated.fit(Batches.of(first, 3))
    for part in (second, third):
        stored = {name: tensor.clone() for name, tensor in updated.state().items()}
        updated = branch()
        updated.load_state(stored)
        updated.update(Batches.of(part, 3))
    assert updated.state().keys() == whole.state().keys()
    for name, tensor in whole.state().items():
        np.testing.assert_allclose(updated.state()[name], tensor, rtol=1e-5 if name == "centers" else 1e-9, atol=1e-11)


def patchcore(**settings) -> PatchCore:
    branch = PatchCore(StandIn(16, (2, 3), 5), coreset_ratio=0.25, **settings)
    branch.backbone.widths = [2, 3]
    branch.extract = lambda features: features
    return branch


def patches(count: int, kinds: int, seed: int) -> torch.Tensor:
    """Patches [n, 6, 5] of `count` images, each of one of so many kinds."""
    drawn = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2, 5)
    generator = torch.Generator().manual_seed(seed)
    rounding = 1e-4 * torch.randn(count, 6, 5, generator=generator)
    return drawn[torch.randint(kinds, (count, 6), generator=generator)] + rounding


@pytest.mark.parametrize("settings", [{}, {"whiten": True, "average_bank": True}])
def test_a_bank_keeps_its_size_and_covers_old_and_new_patches(settings):
    old, new = patches(8, 11, seed=1), patches(7, 12, seed=2)  # one kind is new
    everything = torch.cat([old, new])
    branch = patchcore(**settings)
    branch.fit(Batches.of(old, 3))
    assert len(branch.memory_bank.rows) == 12 and branch.patch_scores(new)[1].max() > 0.1
    stored = branch.state()
    branch = patchcore(**settings)
    branch.load_state(stored)
    branch.update(Batches.of(new, 3))
    assert len(branch.memory_bank.rows) == 12 and branch.patch_scores(everything)[1].max() < 1e-2
    if not settings:
        return
    whole = patchcore(**settings)
    whole.fit(Batches.of(everything, 3))
    for name, moment in whole.whitening.state().items():
        torch.testing.assert_close(branch.whitening.state()[name], moment, rtol=1e-4, atol=1e-4)
    assert branch.counts.sum() == 15 * 6
    mean = branch.counts @ branch.memory_bank.rows.double() / branch.counts.sum()
    torch.testing.assert_close(mean, branch.whitening(everything).double().mean((0, 1)), rtol=1e-4, atol=1e-4)


# The scripts


def test_three_branches_and_their_thresholds(workplace):
    def fuse():
        return call(workplace, "test_fusion", "--false-alarm-rate", 0.4, "--no-images", run=run_in_process).code

    assert fuse() == 0
    known = load_checkpoint(checkpoint(workplace, "train_pc"))[0]["frames"].tolist()
    names, results = add_frames(workplace, 12), workplace / "result/belt/pc/config.json"
    for script in SMALL_NETWORKS:
        eval_pc = ("--no-images",) if script == "train_pc" else ("--no-eval",)
        finished = call(workplace, script, "--update", *SMALL_NETWORKS[script][:2], "--weights", "random", *eval_pc)
        assert "usad.json" in finished.out and "--false-alarm-rate" in finished.out
        tensors, metadata = load_checkpoint(checkpoint(workplace, script))
        assert set(tensors["frames"].tolist()) == {*known, *map(mark, names)}
        held = [name for name in names if mark(name) in tensors["frames_held_out"]]
        assert 0 < len(held) < 12 and metadata["calibration"]["images"] == 2 + len(held)
        if script != "train_ma2patch":
            assert fuse() == (0 if script == "train_pc" else 2)  # 2: they do not hold out the same frames yet
    settings = read_json(results)["settings"]
    assert settings["update"] and (settings["image_size"], settings["coreset_ratio"], settings["seed"]) == (64, 0.1, 22)
    point = read_json(workplace / "models/belt/usad.json")
    assert point["images"] == 2 + len(held)


def test_thresholds_after_a_rollback(workplace):
    call(workplace, "test_fusion", "--false-alarm-rate", 0.4, "--no-images")
    add_frames(workplace, 2)
    scripts = ("train_ma_clu", "train_ma2patch")
    for script in scripts:
        update(workplace, script)
    assert "usad.json was made for other checkpoints" in call(workplace, "test_fusion", "--no-images").err
    first = call(workplace, scripts[0], "--rollback").out.splitlines()[-1]
    second = call(workplace, scripts[1], "--rollback", "--category", "all").out.splitlines()[-1]
    assert "usad.json has thresholds for other checkpoints" in first and "they are valid again" in second


def test_rollback(workplace):
    path, before = checkpoint(workplace, "train_pc"), contents(workplace / "models")
    assert "no new frames" in update(workplace, "train_pc").out and contents(workplace / "models") == before
    for seed in (7, 8):
        once = path.read_bytes()
        add_frames(workplace, 4, seed)
        update(workplace, "train_pc")
        assert len(contents(workplace / "models")) == 4 and path.read_bytes() != once  # one former checkpoint is kept
    (workplace / "data").rename(workplace / "elsewhere")
    assert "usad.json" not in call(workplace, "train_pc", "--rollback").out
    assert contents(workplace / "models") == before | {"belt/pc.safetensors": once}
    assert "gone" in call(workplace, "train_pc", "--rollback", run=refusal)


def test_an_update_beside_another_learns_no_frame_twice(workplace, monkeypatch):
    path, read, after = checkpoint(workplace, "train_pc"), training.present_checkpoint, []
    add_frames(workplace, 4)

    def read_before_another(*args):
        present = read(*args)
        monkeypatch.setattr(training, "present_checkpoint", read)
        update(workplace, "train_pc")
        add_frames(workplace, 4, seed=8)
        after.append(path.read_bytes())
        return present

    monkeypatch.setattr(training, "present_checkpoint", read_before_another)
    assert f"{path} has just been changed" in update(workplace, "train_pc", run=refusal)
    assert path.read_bytes() == after[0]


def test_portions_do_not_matter_to_what_is_held_out(tmp_path):
    category = Category(draw_category(tmp_path / "data" / "belt").parent, "belt")
    nothing = Present(TrainingFrames(), SplitSettings(0.5, 0.25, 22), 16, "fp32", 0, [])
    fitted, known = [], nothing.frames
    for seed in (7, 8):
        add_frames(tmp_path, 20, seed)
        part = portion(category, nothing._replace(frames=known))
        fitted, known = fitted + part.fitted, part.frames
    whole = portion(category, nothing)
    assert whole.frames == known and set(whole.fitted) == set(fitted)
    assert 3 < len(whole.held_out) < 25 and 5 < len(fitted) < 35 and not set(fitted) & set(whole.held_out)


def test_held_out_frames_that_are_gone(workplace):
    held = load_checkpoint(checkpoint(workplace, "train_pc"))[0]["frames_held_out"].tolist()
    frames = [f for f in (workplace / "data/belt/train/good").iterdir() if mark(f"train/good/{f.name}") in held]
    frames[0].unlink()
    add_frames(workplace, 1)
    said = update(workplace, "train_ma2patch", run=refusal)  # this frame is fitted on
    assert "1 of the 2 held-out images" in said
    add_frames(workplace, 12, seed=8)
    assert "warning: 1 of the 2 held-out images" in update(workplace, "train_ma2patch").err


def test_a_checkpoint_of_another_category(workplace):
    for place in ("data", "models"):
        (workplace / place / "belt").rename(workplace / place / "other")
    told = succeed(workplace, "test_fusion", "--no-images", categories=["other"]).err
    assert "other were trained on category belt" in told
    finished = update(workplace, "train_pc", category="other")
    assert "is of category 'belt'" in finished.err and "no new frames" in finished.out


WRONG = [
    ("train_pc", "--update --image-size 96", "--image-size 96 64"),
    ("train_pc", "--update --weights demo", "--weights demo random"),
    ("train_pc", "--update --backbone resnet18", "--backbone resnet18 test_resnet"),
    ("train_pc", "--update --coreset-ratio 0.2", "--coreset-ratio 0.2 0.1"),
    ("train_pc", "--update --whiten", "--whiten False"),
    ("train_pc", "--update --holdout-ratio 0.5", "--holdout-ratio 0.5 0.25"),
    ("train_pc", "--update --bit-depth 12", "--bit-depth 12 16"),
    ("train_pc", "--update --roi data/belt/test/good/000.png", "--roi region"),
    ("train_ma_clu", "--update --position-size 48", "--position-size 48 64"),
    ("train_pc", "--update --rollback", "--update --rollback"),
    ("train_pc", "--rollback --no-eval", "--no-eval --rollback"),
    ("train_pc", "--rollback", "pc.safetensors not updated"),
]


@pytest.mark.parametrize(("script", "flags", "words"), WRONG)
def test_flags_that_contradict_the_checkpoint(trained, monkeypatch, script, flags, words):
    monkeypatch.chdir(trained)
    before = contents(trained / "models")
    said = call(trained, script, *flags.split(), run=refusal)
    assert all(word in said for word in words.split()), said
    assert contents(trained / "models") == before


def test_checkpoints_that_cannot_be_updated(workplace):
    path = checkpoint(workplace, "train_pc")
    tensors, metadata = load_checkpoint(path)
    save_checkpoint(path, {name: value for name, value in tensors.items() if "frames" not in name}, metadata)
    assert "earlier version" in call(workplace, "train_pc", "--update", run=refusal)
    path.unlink()
    for flag in ("--update", "--rollback"):
        assert "no checkpoint" in call(workplace, "train_pc", flag, run=refusal)


# Ends in between


@pytest.mark.skipif(os.name != "posix", reason="no fork here")
@pytest.mark.parametrize("step", ["replace", "unlink"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_kill_between_two_steps_loses_nothing(tmp_path, monkeypatch, step, count):
    """The process ends at the n-th renaming or removal; old or new checkpoint is there, and what was before it, too."""
    path = tmp_path / "pc.safetensors"
    versions = [{"version": torch.tensor([number])} for number in range(3)]
    branch = types.SimpleNamespace(training={"category": "belt"})

    def write(number: int) -> bytes:
        branch.save = lambda place: save_checkpoint(place, versions[number], {"training": branch.training})
        branch.save(path) if number == 0 else replace(branch, path)
        return path.read_bytes()

    written = [write(0), write(1)]
    if os.fork() == 0:
        name, left, original = step, [count], getattr(os, step)

        def end(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return original(*args, **kwargs)

        setattr(os, name, end)
        Path.unlink = lambda self, missing_ok=False: end(self) if self.exists() else None
        write(2)
        os._exit(0)
    os.wait()
    present = path.read_bytes()
    version = int(load_checkpoint(path)[0]["version"])
    assert version in (1, 2) and (version == 2 or present == written[1])
    roll_back([path])
    assert path.read_bytes() == written[version - 1]
