"""Frames cut into tiles: geometry, training and prediction, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import draw_frame, run_in_process, small_flags

from datasets.region import RegionOfInterest
from models import USAD
from models.branches.branch import tiles_in
from models.branches.patchcore import PatchCore
from models.branches.tiling import Tiling
from models.networks import DEMO_NETWORK
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import InputError


@pytest.mark.parametrize("count, side", [(2, 64), (3, 50), (5, 21)])
def test_tiles_cover_the_frame_and_join_to_it(count, side):
    tiling = Tiling(count, side)
    frames = torch.rand(2, 3, tiling.frame_side, tiling.frame_side)
    (view,) = tiling.views(None)
    tiles = tiling.cut(frames, view)
    assert tiles.shape == (2 * count**2, 3, side, side)
    assert torch.equal(tiles[0], frames[0, :, :side, :side]) and torch.equal(tiles[-1], frames[1, :, -side:, -side:])
    torch.testing.assert_close(tiling.joined([tiles[:, 0]], [view]), frames[:, 0])


def test_neighbours_are_blended_without_an_edge():
    tiling = Tiling(2, 40)
    (view,) = tiling.views(None)
    flat = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None].expand(4, 40, 40)  # left, right, left, right
    row = tiling.joined([flat], [view])[0, 35]
    assert (row[:30] == 0).all() and (row[40:] == 1).all()
    assert (row.diff() >= 0).all() and row.diff().max() < 0.15


def test_tiles_outside_the_region_are_left_out():
    inside = np.zeros((100, 100), bool)
    inside[:, :45] = True
    tiling = Tiling(3, 40)  # at 0, 30 and 60 of 100 pixels
    whole, half = tiling.views(RegionOfInterest(inside))
    assert whole.roi is None and whole.corners == ((0, 0), (30, 0), (60, 0))
    assert half.corners == ((0, 30), (30, 30), (60, 30)) and half.roi.share == pytest.approx(15 / 40)


def test_many_tiles_pass_in_portions():
    tiling = Tiling(6, 20)
    frames = torch.rand(2, 3, tiling.frame_side, tiling.frame_side)
    views = tiling.views(None)
    assert [len(view.corners) for view in views] == [32, 4]
    tiles = [tiling.cut(frames, view)[:, 0] for view in views]
    torch.testing.assert_close(tiling.joined(tiles, views), frames[:, 0])


def test_where_no_tile_is_a_map_has_its_lowest_value():
    inside = np.zeros((100, 100), bool)
    inside[:, :45] = True
    tiling = Tiling(3, 40)
    views = tiling.views(RegionOfInterest(inside))
    joined = tiling.joined([5 + torch.rand(6, 40, 40), 5 + torch.rand(6, 40, 40)], views)
    assert (joined[:, :, 70:] == joined[:, :, :70].amin((1, 2), keepdim=True)).all() and joined.min() >= 5


@pytest.fixture(scope="module")
def tiled(trained, tmp_path_factory):
    """Branches of 1, 2 and 3 tiles a side."""
    root = tmp_path_factory.mktemp("tiled")
    shutil.copytree(trained / "data", root / "data")
    demo = ("--weights", "demo", "--backbone", DEMO_NETWORK)
    for script, *flags in (("train_ma_clu", 1), ("train_ma2patch", 2), ("train_pc", 3, *demo)):
        finished = run_in_process(script, *small_flags(root, script), "--holdout-ratio", 0.25, "--tiles", *flags)
        assert finished.code == 0, finished.err
    return root


def test_branches_may_differ_in_their_tiles(tiled):
    usad = USAD.load(tiled / "models/belt", fusion="standardized")
    assert [branch.tiles for branch in usad.branches] == [1, 2, 3]
    assert usad.image_size == 168 == 96 + 72 and usad.batch_size == 1
    finished = run_in_process("test_fusion", *small_flags(tiled, "test_fusion"), "--no-images")
    assert finished.code == 0, finished.err
    config = json.loads((tiled / "result/belt/fusion/config.json").read_text())
    assert config["branches"]["pc"]["tiles"] == 3
    assert json.loads((tiled / "result/belt/pc/config.json").read_text())["settings"]["tiles"] == 3


def test_a_small_object_is_found_at_its_place(tiled):
    usad = USAD.load(tiled / "models/belt")
    frame = draw_frame(np.random.default_rng(), 320, 320)
    frame[200:212, 90:102] = 220, 130, 40
    _, anomaly_map = usad(frame)[0].branches["pc"]
    y, x = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    scale = 320 / len(anomaly_map)
    assert abs(scale * y - 206) < 20 and abs(scale * x - 96) < 20


def test_each_tile_is_scored_as_an_image_of_its_own(tiled):
    branch = USAD.load(tiled / "models/belt").branches[2]
    frames = torch.randn(2, 3, branch.image_size, branch.image_size)
    found = branch.predict(frames)
    (view,) = branch.tiling.views(None)
    own = branch.score(branch.extract(branch.tiling.cut(frames, view)))
    torch.testing.assert_close(found.scores, own.scores.view(2, 9).amax(1))
    torch.testing.assert_close(found.low.flatten(), own.low.view(2, 9).amin(1))
    torch.testing.assert_close((found.low + found.span).flatten(), (own.low + own.span).view(2, 9).amax(1))


@pytest.mark.parametrize("value", ["0", "17", "2.5"])
def test_no_such_number(tiled, value):
    finished = run_in_process("train_pc", *small_flags(tiled, "train_pc"), "--tiles", value)
    assert finished.code == 2 and "--tiles" in finished.err


def test_a_frame_that_would_be_too_large(tiled, tmp_path):
    flags = small_flags(tiled, "train_pc")
    finished = run_in_process("train_pc", *flags, "--image-size", 1024, "--tiles", 16)
    assert finished.code == 2 and "--tiles 16" in finished.err and "12544" in finished.err
    tensors, metadata = load_checkpoint(tiled / "models/belt/pc.safetensors")
    metadata["backbone"]["image_size"], metadata["tiles"] = 4096, 16
    save_checkpoint(tmp_path / "pc.safetensors", tensors, metadata)
    with pytest.raises(InputError, match="frame of 50176"):
        PatchCore.load(tmp_path / "pc.safetensors")


@pytest.mark.parametrize("value", [0, 17, "2", None, [2]])
def test_a_checkpoint_with_no_such_number(value):
    with pytest.raises(ValueError, match=r"^tiles "):
        tiles_in({"tiles": value})


def test_an_update_keeps_the_tiles(tiled):
    Image.fromarray(draw_frame(np.random.default_rng(), 72, 56)).save(tiled / "data/belt/train/good/new.png")
    flags = [*small_flags(tiled, "train_test")[:-2], "--update", "--no-eval"]
    refused = run_in_process("train_pc", *flags, "--tiles", 2)
    assert refused.code == 2 and "--tiles 2" in refused.err
    assert run_in_process("train_pc", *flags).code == 0
    assert USAD.load(tiled / "models/belt").branches[2].tiles == 3
