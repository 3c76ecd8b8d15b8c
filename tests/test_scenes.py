"""Drawn scenes and the data set of them: determinism, masks, layout, nothing foreign overwritten."""

import cv2
import numpy as np
import pytest
from tiny import contents, end_well, read_json, refusal

import make_demo_data
from scenes.defects import DEFECTS, along
from scenes.drawing import Canvas, OutOfFrame, lump
from scenes.scenes import LEAST_VISIBLE, Scene, draw_scene

SMALL = ("--size", 96, "--train", 4, "--good", 2, "--anomalous", 4, "--seed", 5, "--workers", 1)


def make(root, *flags):
    return end_well("make_demo_data", "--data-root", root, *SMALL, *flags)


def refused(root, *flags):
    return refusal("make_demo_data", "--data-root", root, *SMALL, *flags)


def test_a_seed_gives_one_frame_and_another_seed_another():
    first, mask = draw_scene((3, 2, 1), 128, "rope")
    again, same_mask = draw_scene((3, 2, 1), 128, "rope")
    other, _ = draw_scene((3, 2, 2), 128, "rope")
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(mask, same_mask)
    assert np.mean(first != other) > 0.5


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("index", range(6))
def test_the_mask_is_exactly_what_the_defect_changes(kind, index):
    seed = (11, index)
    with_defect, without = Scene(seed, 256).build(kind), Scene(seed, 256).build(None)
    mask = with_defect.mask
    assert not without.mask.any()
    for name in ("height", "albedo", "gloss", "support"):
        changed = getattr(with_defect, name) != getattr(without, name)
        changed = changed.any(axis=2) if changed.ndim == 3 else changed
        assert not (changed & ~mask).any(), name
    unchanged = (with_defect.height == without.height) & (with_defect.albedo == without.albedo).all(axis=2)
    assert (unchanged & mask).sum() <= 0.01 * mask.sum()
    assert LEAST_VISIBLE <= mask.mean() < 0.35


def test_a_defect_lies_now_above_and_now_below_the_coal():
    buried = on_coal = 0
    for index in range(12):
        relief, bare = (Scene((4, index), 128).build(kind) for kind in ("bag", None))
        on_coal += (relief.mask & (bare.support > 0)).any()
        edge = cv2.dilate(relief.mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > relief.mask
        buried += (edge & (relief.support > 0)).sum() > 0.1 * edge.sum()
    assert on_coal >= 3
    assert buried >= 3


def test_frames_look_like_a_belt_dark_desaturated_and_varied():
    frames = [draw_scene((0, index), 128)[0] for index in range(16)]
    grey = np.array([cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY).mean() for frame in frames])
    assert 55 < grey.mean() < 95
    assert 4 < grey.std() < 25
    colour = np.mean([frame.reshape(-1, 3).mean(axis=0) for frame in frames], axis=0)
    assert np.ptp(colour) < 20
    assert colour[0] == colour.min()


def test_the_camera_knows_nothing_of_the_mask():
    scenes = [Scene((8, 0), 128) for _ in range(2)]
    reliefs = [scene.build("stick") for scene in scenes]
    reliefs[1].mask[:] = False
    pictures = [scene.photograph(relief) for scene, relief in zip(scenes, reliefs, strict=True)]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("size", [64, 100, 333])
def test_any_size(size):
    for kind in DEFECTS:
        frame, mask = draw_scene((1, size), size, kind)
        assert frame.shape == (size, size, 3)
        assert frame.dtype == mask.dtype == np.uint8
        assert mask.shape == (size, size)
        assert set(np.unique(mask)) == {0, 255}


def test_a_lump_outside_the_frame_is_nothing():
    rng = np.random.default_rng(0)
    with pytest.raises(OutOfFrame):
        lump(rng, Canvas(rng, 64), (-500.0, 20.0), 30.0, 0.3, 0.1)


def test_along_a_straight_path_gives_its_axes():
    x, y = np.meshgrid(np.arange(-20, 21, dtype=np.float32), np.arange(-10, 11, dtype=np.float32))
    points = np.stack([np.arange(-15.0, 16.0), np.zeros(31)], axis=1)
    arc, across = along(points, x, y)
    np.testing.assert_allclose(arc, x + 15, atol=1e-4)
    np.testing.assert_allclose(across, y, atol=1e-4)


def test_layout_and_counts(tmp_path):
    make(tmp_path)
    files = set(contents(tmp_path / "coal_demo"))
    assert files == {
        ".usad_demo.json",
        *(f"train/good/00{index}.png" for index in range(4)),
        *(f"test/good/00{index}.png" for index in range(2)),
        *(f"test/{name}.png" for name in ("stick/000", "rope/000", "bag/000", "stick/001")),
        *(f"ground_truth/{name}_mask.png" for name in ("stick/000", "rope/000", "bag/000", "stick/001")),
    }
    image = cv2.imread(str(tmp_path / "coal_demo/test/bag/000.png"), cv2.IMREAD_UNCHANGED)
    mask = cv2.imread(str(tmp_path / "coal_demo/ground_truth/bag/000_mask.png"), cv2.IMREAD_UNCHANGED)
    expected = draw_scene((5, 2, 2), 96, "bag")
    np.testing.assert_array_equal(image, expected[0])
    np.testing.assert_array_equal(mask, expected[1])
    assert [path.name for path in tmp_path.iterdir()] == ["coal_demo"]


def test_defaults_are_the_documented_data_set():
    args = make_demo_data.Settings(size=512, train=160, good=60, anomalous=90, seed=22)
    names = make_demo_data.file_names(args)
    count = {part: sum(name.startswith(part) for name in names) for part in ("train/good/", "test/good/")}
    assert count == {"train/good/": 160, "test/good/": 60}
    for kind in DEFECTS:
        assert sum(name.startswith(f"test/{kind}/") for name in names) == 30
        assert sum(name.startswith(f"ground_truth/{kind}/") for name in names) == 30


def test_the_number_of_threads_does_not_matter(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "three", "--workers", 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_finished_data_set_is_kept_and_a_damaged_or_other_one_redrawn(tmp_path):
    make(tmp_path)
    folder = tmp_path / "coal_demo"
    first = contents(folder)
    stamp = (folder / "train/good/000.png").stat().st_mtime_ns
    assert "already drawn" in make(tmp_path).out
    assert (folder / "train/good/000.png").stat().st_mtime_ns == stamp

    (folder / "train/good/002.png").unlink()
    make(tmp_path)
    assert contents(folder) == first

    make(tmp_path, "--seed", 6, "--train", 3)
    assert read_json(folder / ".usad_demo.json")["seed"] == 6
    assert not (folder / "train/good/003.png").exists()
    assert contents(folder)["train/good/000.png"] != first["train/good/000.png"]


@pytest.mark.parametrize("foreign", ["train/good/mine.png", ".usad_demo.json"])
def test_a_foreign_folder_is_left_alone(tmp_path, foreign):
    path = tmp_path / "coal_demo" / foreign
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not yours")
    assert "--category" in refused(tmp_path)
    assert contents(tmp_path) == {f"coal_demo/{foreign}": b"not yours"}


def test_a_foreign_file_in_a_drawn_data_set_is_not_swept_away(tmp_path):
    make(tmp_path)
    (tmp_path / "coal_demo/test/good/mine.png").write_bytes(b"mine")
    before = contents(tmp_path)
    assert "mine.png" in refused(tmp_path, "--seed", 9)
    assert contents(tmp_path) == before


def test_an_interrupted_run_leaves_no_data_set_and_the_next_one_cleans_up(monkeypatch, tmp_path):
    draw = make_demo_data.draw_scene

    def interrupted(seed, size, kind):
        if seed[1:] == (1, 1):
            raise KeyboardInterrupt
        return draw(seed, size, kind)

    with monkeypatch.context() as patch:
        patch.setattr(make_demo_data, "draw_scene", interrupted)
        refusal("make_demo_data", "--data-root", tmp_path, *SMALL, code=130)
    assert list(tmp_path.iterdir()) == []

    leftover = tmp_path / ".coal_demo.drawing" / "train" / "good"  # of a run that was killed
    leftover.mkdir(parents=True)
    (leftover / "999.png").write_bytes(b"half")
    make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["coal_demo"]
    assert not (tmp_path / "coal_demo/train/good/999.png").exists()


BAD_FLAGS = [
    *("--category ../elsewhere", "--category a/b", "--category .."),
    *("--size 10", "--size many", "--train 0", "--good -1", "--seed -3", "--sizes 64"),
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_line_and_exit_code_2(tmp_path, flags):
    refused(tmp_path, *flags.split())
    assert list(tmp_path.iterdir()) == []


def test_a_data_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("")
    assert "--data-root" in refused(tmp_path / "data")
