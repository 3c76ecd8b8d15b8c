"""Checkpoints that take in new frames: as if fitted on all, whatever happens on the way, and back to the byte."""

from __future__ import annotations

import json
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SMALL_NETWORKS, draw_category, run_in_process

from datasets.mvtec import Category
from models import MACLU, MA2Patch, PatchCore
from models.branches.frames import TrainingFrames, mark
from training import training
from training.settings import SplitSettings
from training.update import Present, portion, replace, roll_back
from utils.checkpoint import load_checkpoint, save_checkpoint

SCRIPTS = {script: script.removeprefix("train_") for script in SMALL_NETWORKS}


def call(root: Path, script: str, *flags, category: str = "belt"):
    """A training script with only the places and the run given."""
    places = ("--data-root", root / "data", "--models-dir", root / "models", "--category", category)
    run = () if "--rollback" in flags else ("--results-dir", root / "result", "--device", "cpu", "--workers", 0)
    return run_in_process(script, *places, *run, *flags)


def checkpoint(root: Path, script: str) -> Path:
    return root / "models" / "belt" / f"{SCRIPTS[script]}.safetensors"


def add_frames(root: Path, count: int, seed: int = 7) -> list[str]:
    """New frames beside the others; their names."""
    drawn = draw_category(root / "drawn" / str(seed), train=count, good=0, anomalous=0, seed=seed)
    names = [f"new {seed} {path.name}" for path in sorted((drawn / "train/good").iterdir())]
    for path, name in zip(sorted((drawn / "train/good").iterdir()), names, strict=True):
        shutil.move(path, root / "data/belt/train/good" / name)
    return [f"train/good/{name}" for name in names]


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "models/belt").iterdir()}


# What is learned


class Loader(list):
    """Batches of 3 of stored features [n, ...] in the place of images."""

    def __init__(self, features: torch.Tensor) -> None:
        index = torch.arange(len(features)).split(3)
        super().__init__({"image": features[part], "index": part} for part in index)
        self.dataset = features


def tokens(count: int, seed: int) -> torch.Tensor:
    """CLS and patch tokens [n, 1 + 16, 6] of belts: a third of the patches are coal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 17, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 20
    drawn[:, 1:6] += 15
    return drawn


@pytest.mark.parametrize("covariance", ["empirical", "ledoit-wolf"])
@pytest.mark.parametrize("branch_class", [MACLU, MA2Patch])
def test_a_gaussian_is_that_of_all_frames(stand_in, branch_class, covariance):
    def branch():
        made = branch_class(stand_in(16, (4, 4), 6), covariance=covariance)
        made.backbone.cls_dim = 6
        made.backbone.forward = lambda features: (features[:, 0], features[:, 1:])
        return made

    first, second, third = tokens(9, 1), tokens(8, 1)[1:] + 1, tokens(11, 2)
    whole, updated = branch(), branch()
    whole.fit(Loader(torch.cat([first, second, third])))
    updated.fit(Loader(first))
    for part in (second, third):
        stored = {name: tensor.clone() for name, tensor in updated.state().items()}
        updated = branch()
        updated.load_state(stored)
        updated.update(Loader(part))
    assert updated.state().keys() == whole.state().keys()
    for name, tensor in whole.state().items():
        np.testing.assert_allclose(updated.state()[name], tensor, rtol=1e-5 if name == "centers" else 1e-9, atol=1e-11)


def patchcore(stand_in, **settings) -> PatchCore:
    branch = PatchCore(stand_in(16, (2, 3), 5), coreset_ratio=0.25, **settings)
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
def test_a_bank_keeps_its_size_and_covers_old_and_new_patches(stand_in, settings):
    old, new = patches(8, 11, seed=1), patches(7, 12, seed=2)  # one kind is new
    everything = torch.cat([old, new])
    branch = patchcore(stand_in, **settings)
    branch.fit(Loader(old))
    assert len(branch.memory_bank.rows) == 12 and branch.patch_scores(new)[1].max() > 0.1
    stored = branch.state()
    branch = patchcore(stand_in, **settings)
    branch.load_state(stored)
    branch.update(Loader(new))
    assert len(branch.memory_bank.rows) == 12 and branch.patch_scores(everything)[1].max() < 1e-2
    if not settings:
        return
    whole = patchcore(stand_in, **settings)
    whole.fit(Loader(everything))
    for name, moment in whole.whitening.state().items():
        torch.testing.assert_close(branch.whitening.state()[name], moment, rtol=1e-4, atol=1e-4)
    assert branch.counts.sum() == 15 * 6
    mean = branch.counts @ branch.memory_bank.rows.double() / branch.counts.sum()
    torch.testing.assert_close(mean, branch.whitening(everything).double().mean((0, 1)), rtol=1e-4, atol=1e-4)


# The scripts


def test_three_branches_and_their_thresholds(workplace):
    def fuse():
        return call(workplace, "test_fusion", "--false-alarm-rate", 0.4, "--no-images").code

    assert fuse() == 0
    known = load_checkpoint(checkpoint(workplace, "train_pc"))[0]["frames"].tolist()
    names, results = add_frames(workplace, 12), workplace / "result/belt/pc/config.json"
    for script in SMALL_NETWORKS:
        eval_pc = ("--no-images",) if script == "train_pc" else ("--no-eval",)
        finished = call(workplace, script, "--update", *SMALL_NETWORKS[script][:2], "--weights", "random", *eval_pc)
        assert finished.code == 0 and "usad.json" in finished.out and "--false-alarm-rate" in finished.out
        tensors, metadata = load_checkpoint(checkpoint(workplace, script))
        assert set(tensors["frames"].tolist()) == {*known, *map(mark, names)}
        held = [name for name in names if mark(name) in tensors["frames_held_out"]]
        assert 0 < len(held) < 12 and metadata["calibration"]["images"] == 2 + len(held)
        if script != "train_ma2patch":
            assert fuse() == (0 if script == "train_pc" else 2)  # 2: they do not hold out the same frames yet
    settings = json.loads(results.read_text(encoding="utf-8"))["settings"]
    assert settings["update"] and (settings["image_size"], settings["coreset_ratio"], settings["seed"]) == (64, 0.1, 22)
    point = json.loads((workplace / "models/belt/usad.json").read_text(encoding="utf-8"))
    assert point["images"] == 2 + len(held)


def test_rollback(workplace):
    path, before = checkpoint(workplace, "train_pc"), contents(workplace)
    nothing = call(workplace, "train_pc", "--update", "--no-eval")
    assert nothing.code == 0 and "no new frames" in nothing.out and contents(workplace) == before
    for seed in (7, 8):
        once = path.read_bytes()
        add_frames(workplace, 4, seed)
        assert call(workplace, "train_pc", "--update", "--no-eval").code == 0
        assert len(contents(workplace)) == 4 and path.read_bytes() != once  # one former checkpoint is kept
    assert call(workplace, "train_pc", "--rollback").code == 0
    assert contents(workplace) == before | {path.name: once}
    again = call(workplace, "train_pc", "--rollback")
    assert again.code == 2 and "gone" in again.err


def test_an_update_beside_another_learns_no_frame_twice(workplace, monkeypatch):
    path, read, after = checkpoint(workplace, "train_pc"), training.present_checkpoint, []
    add_frames(workplace, 4)

    def read_before_another(*args):
        present = read(*args)
        monkeypatch.setattr(training, "present_checkpoint", read)
        assert call(workplace, "train_pc", "--update", "--no-eval").code == 0
        add_frames(workplace, 4, seed=8)
        after.append(path.read_bytes())
        return present

    monkeypatch.setattr(training, "present_checkpoint", read_before_another)
    finished = call(workplace, "train_pc", "--update", "--no-eval")
    assert finished.code == 2 and f"{path} has just been changed" in finished.err
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
    lone = call(workplace, "train_ma2patch", "--update", "--no-eval")  # this frame is fitted on
    assert lone.code == 2 and "1 of the 2 held-out images" in lone.err
    add_frames(workplace, 12, seed=8)
    finished = call(workplace, "train_ma2patch", "--update", "--no-eval")
    assert finished.code == 0 and "warning: 1 of the 2 held-out images" in finished.err


def test_a_checkpoint_of_another_category(workplace):
    for place in ("data", "models"):
        (workplace / place / "belt").rename(workplace / place / "other")
    finished = call(workplace, "train_pc", "--update", "--no-eval", category="other")
    assert finished.code == 0 and "is of category 'belt'" in finished.err and "no new frames" in finished.out


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
    before = contents(trained)
    finished = call(trained, script, *flags.split())
    assert finished.code == 2 and len(finished.err.splitlines()) == 1
    for word in words.split():
        assert word in finished.err
    assert contents(trained) == before


def test_checkpoints_that_cannot_be_updated(workplace):
    path = checkpoint(workplace, "train_pc")
    tensors, metadata = load_checkpoint(path)
    save_checkpoint(path, {name: value for name, value in tensors.items() if "frames" not in name}, metadata)
    finished = call(workplace, "train_pc", "--update")
    assert finished.code == 2 and "earlier version" in finished.err
    path.unlink()
    for flag in ("--update", "--rollback"):
        finished = call(workplace, "train_pc", flag)
        assert finished.code == 2 and "no checkpoint" in finished.err


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
