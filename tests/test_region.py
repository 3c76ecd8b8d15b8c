"""Where branches look: a region of interest, outside of which nothing changes a result, and tiles."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NAMES, draw_frame, end_well, read_json, refusal, saved_maps, small_flags, succeed

from datasets.region import MAX_SIDE, RegionOfInterest
from metrics.pixel import PixelMetrics
from models import BRANCHES, USAD
from models.branches.branch import tiles_in
from models.branches.part import Part, pixels_inside
from models.branches.patchcore import PatchCore
from models.branches.tiling import Tiling
from models.networks import DEMO_NETWORK
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import InputError

SHAPES = {
    "left half": lambda y, x: x < 0.5,
    "a strip aslant": lambda y, x: abs(y - 0.3 - 0.4 * x) < 0.25,
    "two islands": lambda y, x: (np.hypot(y - 0.25, x - 0.3) < 0.2) | (np.hypot(y - 0.7, x - 0.75) < 0.2),
    "a corner": lambda y, x: (y > 0.6) & (x > 0.55),
}
WHOLE = {"train_ma_clu": 1, "train_ma2patch": 1, "train_pc": 1}
TILES = {"train_ma_clu": 2, "train_ma2patch": 1, "train_pc": 3}


def drawn(shape: str, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return SHAPES[shape]((y + 0.5) / height, (x + 0.5) / width)


def save(inside: np.ndarray, path):
    Image.fromarray((inside * 255).astype(np.uint8)).save(path)
    return path


def trained_with_region(trained, root, tiles):
    """A copy of `trained` whose branches, trained with --roi, look at the left half."""
    shutil.copytree(trained, root)
    roi = save(drawn("left half", 36, 28), root / "roi.png")  # half the frames' size
    for script, count in tiles.items():
        succeed(root, script, "--holdout-ratio", 0.25, "--no-eval", "--tiles", count, "--roi", roi)
    return root


@pytest.fixture(scope="module")
def with_region(trained, tmp_path_factory):
    return trained_with_region(trained, tmp_path_factory.mktemp("region") / "root", WHOLE)


@pytest.fixture(scope="module", params=[WHOLE, TILES], ids=["whole", "tiles"])
def maybe_tiled(request, trained, tmp_path_factory):
    if request.param is WHOLE:
        return request.getfixturevalue("with_region"), WHOLE
    return trained_with_region(trained, tmp_path_factory.mktemp("tiled") / "root", TILES), TILES


def test_a_region_of_less_than_a_pixel_or_patch_is_one():
    dot = np.zeros((500, 500), bool)
    dot[199, 352] = True  # not where the nearest pixel is taken
    region = RegionOfInterest(dot)
    assert np.argwhere(region.at(20, 10)).tolist() == [[3, 14]]
    assert np.argwhere(region.on_grid(5, 5)).tolist() == [[1, 3]]


@pytest.mark.parametrize("fusion", ["paper", "standardized"])
def test_pixels_outside_change_nothing(maybe_tiled, fusion):
    root, _ = maybe_tiled
    usad = USAD.load(root / "models/belt", fusion=fusion)
    usad.threshold, usad.pixel_threshold = 1.0, 0.1
    rng = np.random.default_rng(4)
    frames = [np.asarray(Image.open(path)) for path in sorted((root / "data/belt/test/rope").glob("*.png"))]
    for frame in [*frames, rng.integers(0, 256, (61, 83, 3), np.uint8)]:
        outside = ~usad.roi.at(frame.shape[1], frame.shape[0])
        other = frame.copy()
        other[outside] = rng.integers(0, 256, (outside.sum(), 3), np.uint8)
        first, second = usad([frame, other])
        assert first.score == second.score and np.array_equal(first.map, second.map)
        assert (first.boxes, first.area, first.anomalous) == (second.boxes, second.area, second.anomalous)
        for name, (score, anomaly_map) in first.branches.items():
            assert score == second.branches[name][0] and np.array_equal(anomaly_map, second.branches[name][1])
        inside = usad.roi.at(*first.map.shape[::-1])
        far = np.zeros_like(inside)
        far[:, inside.shape[1] // 2 + 4 :] = True
        assert (first.map[far] == first.map.min()).all()


def test_training_does_not_see_what_lies_outside(maybe_tiled, tmp_path):
    before, tiles = maybe_tiled
    root = shutil.copytree(before, tmp_path / "root")
    rng = np.random.default_rng(5)
    for path in (root / "data/belt/train/good").glob("*.png"):
        frame = np.array(Image.open(path))
        outside = ~RegionOfInterest.read(root / "roi.png").at(frame.shape[1], frame.shape[0])
        frame[outside] = rng.integers(0, 256, (outside.sum(), 3), np.uint8)
        Image.fromarray(frame).save(path)
    for script, count in tiles.items():
        checkpoint = root / f"models/belt/{script.removeprefix('train_')}.safetensors"
        before = checkpoint.read_bytes()
        flags = ("--holdout-ratio", 0.25, "--no-eval", "--tiles", count)
        succeed(root, script, *flags, "--roi", root / "roi.png")
        assert checkpoint.read_bytes() == before
        succeed(root, script, *flags)
        assert checkpoint.read_bytes() != before


def test_figures_of_pixels_inside_alone(with_region):
    succeed(with_region, "test_fusion", "--save-maps")
    folder = with_region / "result/belt/fusion"
    metrics = read_json(folder / "metrics.json")
    expected, inside = PixelMetrics(), RegionOfInterest.read(with_region / "roi.png").at(96, 96)
    columns = slice(0, 48)
    assert inside[:, columns].all() and not inside[:, 48:].any()
    maps, masks = saved_maps(with_region, "fusion")
    expected.update(maps[:, :, columns], masks[:, :, columns], masks.any((1, 2)))
    found = expected.compute()
    assert {key: metrics[key] for key in found} == pytest.approx(found)
    assert "50% of the frame" in (folder / "report.html").read_text(encoding="utf-8")


def test_branches_of_different_regions_are_refused(with_region, trained, tmp_path):
    folder = shutil.copytree(with_region / "models/belt", tmp_path / "belt")
    shutil.copy(trained / "models/belt/pc.safetensors", folder)
    with pytest.raises(InputError, match="--roi"):
        USAD.load(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_to_any_frame(shape, tmp_path):
    region = RegionOfInterest.read(save(drawn(shape, 640, 480), tmp_path / "roi.png"))
    for width, height in ((640, 480), (64, 48), (321, 97), (1280, 1000)):
        assert (region.at(width, height) == drawn(shape, width, height)).mean() > 0.97
    cells = region.on_grid(12, 16)
    share = drawn(shape, 640, 480).reshape(12, 40, 16, 40).mean((1, 3))
    assert (cells[share > 0.6]).all() and not (cells[share < 0.4]).any()
    assert RegionOfInterest.from_text(region.to_text()) == region
    assert RegionOfInterest(~region.inside) != region


@pytest.mark.parametrize("shape", SHAPES)
def test_outside_is_filled_with_the_colour_of_the_inside(shape):
    rng = np.random.default_rng(6)
    frame = rng.integers(0, 256, (50, 70, 3), np.uint8)
    region = RegionOfInterest(drawn(shape, 35, 25))
    inside = region.at(70, 50)
    seen = np.asarray(region.apply(Image.fromarray(frame)))
    assert np.array_equal(seen[inside], frame[inside])
    assert (seen[~inside] == frame[inside].mean(0).round()).all()
    maps = torch.rand(2, 40, 40)
    part = Part(torch.zeros(2), maps).inside(region)
    within = pixels_inside(region, 40, maps.device)
    assert torch.equal(part.maps[:, within], maps[:, within])
    assert (part.maps[:, ~within] == maps.amin((1, 2))[:, None]).all()


def test_other_regions_are_refused(trained, tmp_path):
    save(np.zeros((8, 8), bool), tmp_path / "black.png")
    (tmp_path / "no_picture.png").write_text("white")
    for name in ("black.png", "no_picture.png", "gone.png"):
        path = tmp_path / name
        assert str(path) in refusal("train_pc", *small_flags(trained, "train_pc"), "--no-eval", "--roi", path)
    for text in ("", "AAAA", 3, RegionOfInterest(np.ones((MAX_SIDE + 1, 1), bool)).to_text()):
        with pytest.raises((ValueError, InputError)):
            RegionOfInterest.from_text(text)


@pytest.mark.parametrize("thickness", [1, 2, 3])
def test_a_thin_region_of_a_large_picture_stays(tmp_path, thickness):
    content = np.zeros((40, 4 * MAX_SIDE), np.uint8)
    content[:, 101 : 101 + thickness] = 255
    Image.fromarray(content).save(tmp_path / "roi.png")
    assert 0 < RegionOfInterest.read(tmp_path / "roi.png").share < 2 / MAX_SIDE


@pytest.mark.parametrize("outside", [0, 255])
def test_a_region_that_is_the_whole_frame_is_warned_of(tmp_path, capsys, outside):
    """An editor may leave white under what it shows as transparent."""
    content = np.full((8, 8, 4), 255, np.uint8)
    content[:, 4:] = [outside, outside, outside, 0]
    Image.fromarray(content).save(tmp_path / "roi.png")
    assert RegionOfInterest.read(tmp_path / "roi.png").share == (1 if outside else 0.5)
    assert ("roi.png marks the whole frame" in capsys.readouterr().err) == (outside == 255)


def test_every_branch_takes_a_region(with_region):
    for name in NAMES:
        branch = BRANCHES[name].load(with_region / f"models/belt/{name}.safetensors")
        assert branch.roi.share == 0.5
        images = torch.rand(2, 3, branch.image_size, branch.image_size)
        features = branch.extract(images)
        patches = features[1] if name == "ma_clu" else features
        assert patches.shape[1] == branch.roi.on_grid(*branch.backbone.grid).sum() < np.prod(branch.backbone.grid)


# Tiles


LEFT = RegionOfInterest(np.arange(100) < np.full((100, 1), 45))


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
    whole, half = Tiling(3, 40).views(LEFT)  # at 0, 30 and 60 of 100 pixels
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
    tiling = Tiling(3, 40)
    views = tiling.views(LEFT)
    joined = tiling.joined([5 + torch.rand(6, 40, 40), 5 + torch.rand(6, 40, 40)], views)
    assert (joined[:, :, 70:] == joined[:, :, :70].amin((1, 2), keepdim=True)).all() and joined.min() >= 5


@pytest.fixture(scope="module")
def tiled(trained, tmp_path_factory):
    """Branches of 1, 2 and 3 tiles a side."""
    root = tmp_path_factory.mktemp("tiled")
    shutil.copytree(trained / "data", root / "data")
    demo = ("--weights", "demo", "--backbone", DEMO_NETWORK)
    for script, *flags in (("train_ma_clu", 1), ("train_ma2patch", 2), ("train_pc", 3, *demo)):
        succeed(root, script, "--holdout-ratio", 0.25, "--tiles", *flags)
    return root


def test_branches_may_differ_in_their_tiles(tiled):
    usad = USAD.load(tiled / "models/belt", fusion="standardized")
    assert [branch.tiles for branch in usad.branches] == [1, 2, 3]
    assert usad.image_size == 168 == 96 + 72 and usad.batch_size == 1
    succeed(tiled, "test_fusion", "--no-images")
    config = read_json(tiled / "result/belt/fusion/config.json")
    assert config["branches"]["pc"]["tiles"] == 3
    assert read_json(tiled / "result/belt/pc/config.json")["settings"]["tiles"] == 3


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
    assert "--tiles" in refusal("train_pc", *small_flags(tiled, "train_pc"), "--tiles", value)


def test_a_frame_that_would_be_too_large(tiled, tmp_path):
    said = refusal("train_pc", *small_flags(tiled, "train_pc"), "--image-size", 1024, "--tiles", 16)
    assert "--tiles 16" in said and "12544" in said
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
    assert "--tiles 2" in refusal("train_pc", *flags, "--tiles", 2)
    end_well("train_pc", *flags)
    assert USAD.load(tiled / "models/belt").branches[2].tiles == 3
