"""Reading images, masks and folders."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import draw_category, draw_frame

from datasets.images import read_image, read_mask
from datasets.loading import ImageDataset, ImageLoader, mask_to_tensor, to_tensor
from datasets.mvtec import Category, Sample, find_categories, split_training
from utils.errors import InputError

RED_RAMP = np.stack(np.broadcast_arrays(*np.ogrid[20:200:12j, 0:250:10j], 60), 2).round().astype(np.uint8)


def saved(image: Image.Image, path: Path, **options) -> np.ndarray:
    image.save(path, **options)
    return np.asarray(read_image(path))


# Image kinds


def test_rgb_is_read_as_it_is(tmp_path):
    for name in ("a.png", "a.bmp", "a.tif", "a.TIFF", "a.PNG"):
        np.testing.assert_array_equal(saved(Image.fromarray(RED_RAMP), tmp_path / name), RED_RAMP)
    for name in ("a.jpg", "a.JPEG"):
        assert np.abs(saved(Image.fromarray(RED_RAMP), tmp_path / name, quality=98).astype(int) - RED_RAMP).mean() < 3


def test_grey_is_expanded(tmp_path):
    grey = RED_RAMP[..., 0]
    np.testing.assert_array_equal(saved(Image.fromarray(grey), tmp_path / "a.png"), np.dstack([grey] * 3))
    bits = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(saved(bits, tmp_path / "b.png")[..., 1], (grey > 100) * 255)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette_is_expanded_and_its_transparency_dropped(tmp_path, transparency):
    palette = Image.fromarray(RED_RAMP).quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(saved(palette, tmp_path / "a.png", **options), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped_not_blended(tmp_path, mode):
    image = Image.fromarray(RED_RAMP).convert(mode)
    image.putalpha(Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10)))
    expected = RED_RAMP if mode == "RGBA" else np.dstack([np.asarray(Image.fromarray(RED_RAMP).convert("L"))] * 3)
    np.testing.assert_array_equal(saved(image, tmp_path / "a.png"), expected)


def test_cmyk_is_converted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(saved(image, tmp_path / "a.jpg", quality=98).astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_become_eight(tmp_path, name):
    values = np.array([[0, 128, 257, 129 * 257, 65535, 65534, 300, 40000]], np.uint16)
    expected = (values / 257).round()
    np.testing.assert_array_equal(saved(Image.fromarray(values), tmp_path / name)[..., 2], expected)


def test_sixteen_bits_of_the_other_byte_order(tmp_path):
    image = Image.frombytes("I;16B", (2, 1), np.array([257, 40000], ">u2").tobytes())
    assert saved(image, tmp_path / "a.tif")[0, :, 0].tolist() == [1, 156]


def test_floats_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif holds floating-point values"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (8, np.rot90),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_exif_orientation_is_applied(tmp_path, orientation, turn, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(saved(Image.fromarray(RED_RAMP), tmp_path / name, exif=exif), turn(RED_RAMP))


def test_first_of_several_frames(tmp_path):
    first, second = Image.fromarray(RED_RAMP), Image.fromarray(255 - RED_RAMP)
    np.testing.assert_array_equal(saved(first, tmp_path / "a.tif", save_all=True, append_images=[second]), RED_RAMP)


def broken_files(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    paths = []
    for name, options in (("a.png", {}), ("a.jpg", {}), ("a.bmp", {}), ("a.tif", {})):
        image.save(folder / name, **options)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        paths.append(folder / name)
    for name, content in (("empty.png", b""), ("text.jpg", b"not an image"), ("zeros.bmp", bytes(500))):
        (folder / name).write_bytes(content)
        paths.append(folder / name)
    return paths


def test_files_that_cannot_be_read_are_named(tmp_path):
    for path in broken_files(tmp_path):
        for read in (read_image, lambda path: read_mask(path, (40, 40))):
            with warnings.catch_warnings(), pytest.raises(InputError) as error:
                warnings.simplefilter("error")
                read(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_never_raise_anything_else(tmp_path, seed):
    rng, path = np.random.default_rng(seed), tmp_path / "a.png"
    kinds = [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("GIF", "P"),
        ("WEBP", "RGB"),
    ]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind, mode in kinds:
        options = {"exif": exif} if kind in ("JPEG", "PNG") else {}
        Image.fromarray(RED_RAMP).convert(mode).save(path, kind, **options)
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content[: len(content) - rng.integers(0, 2) * rng.integers(0, len(content))])
            for place in rng.integers(0, max(min(len(damaged), 250), 1), rng.integers(1, 6)):
                damaged[place : place + 1] = bytes([rng.integers(0, 256)])
            path.write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    read_image(path)
                except InputError as error:
                    assert str(path) in str(error)


# Tensors and masks


def test_any_aspect_is_stretched_to_the_square(tmp_path):
    image = Image.fromarray(draw_frame(np.random.default_rng(0), 90, 40))
    tensor = to_tensor(image, 32, "bicubic")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(tensor, expected.transpose(2, 0, 1), atol=1e-5)
    assert not torch.allclose(tensor, to_tensor(image, 32, "bilinear"), atol=1e-2)


def test_mask_is_nearest_then_half(tmp_path):
    levels = np.array([[0, 127, 128, 255]], np.uint8).repeat(2, 0)
    Image.fromarray(levels).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", (4, 2))
    assert mask_to_tensor(mask, 4).tolist() == [[False, False, True, True]] * 4
    big = np.random.default_rng(1).integers(0, 256, (30, 50), dtype=np.uint8)
    found = mask_to_tensor(Image.fromarray(big), 20)
    rows, columns = ((np.arange(20) + 0.5) * length / 20 for length in big.shape)
    np.testing.assert_array_equal(found, big[rows.astype(int)[:, None], columns.astype(int)] >= 128)


@pytest.mark.parametrize("kind", ["L", "RGB", "1", "P", "I;16"])
def test_mask_kinds(tmp_path, kind):
    truth = np.zeros((6, 8), bool)
    truth[2:4, 3:7] = True
    image = {
        "I;16": lambda: Image.fromarray(truth.astype(np.uint16) * 65535),
        "1": lambda: Image.fromarray(truth),
    }.get(kind, lambda: Image.fromarray(truth.astype(np.uint8) * 255).convert(kind))()
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "m.png", (8, 6))) >= 128, truth)


def test_mask_of_another_size_is_refused(tmp_path):
    Image.new("L", (8, 6)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png is 8x6 but its image is 6x8"):
        read_mask(tmp_path / "m.png", (6, 8))


def test_mask_follows_an_image_turned_by_exif(tmp_path):
    folder = draw_category(tmp_path / "belt", 1, 1, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "test/rope/000.png").rotate(90, expand=True).save(folder / "test/rope/000.png", exif=exif)
    (sample,) = (sample for sample in Category(tmp_path, "belt").test_samples() if sample.label)
    (sample,) = ImageDataset([sample], 56, "bicubic")
    assert sample["mask"].any() and sample["image"].shape == (3, 56, 56)


def test_empty_mask_is_an_anomaly_without_a_region(tmp_path):
    folder = draw_category(tmp_path / "belt", 1, 1, 2)
    Image.new("L", (72, 56)).save(folder / "ground_truth/rope/001_mask.png")
    samples = list(ImageDataset(Category(tmp_path, "belt").test_samples(), 32, "bicubic"))
    assert [sample["label"] for sample in samples] == [0, 1, 1]
    assert [bool(sample["mask"].any()) for sample in samples] == [False, True, False]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_all_images_in_order_and_names_broken_ones(tmp_path, workers):
    draw_category(tmp_path / "belt", 1, 3, 4)
    samples = Category(tmp_path, "belt").test_samples()
    batches = list(ImageLoader(ImageDataset(samples, 16, "bicubic"), 3, workers, "test"))
    assert [len(batch["image"]) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(7))
    samples[4].path.write_bytes(samples[4].path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"rope.001\.png cannot be read"):
        list(ImageLoader(ImageDataset(samples, 16, "bicubic"), 3, workers, "test"))


# Folders


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_files_of_a_category(tmp_path):
    names = [
        "test/good/b.PNG",
        "test/good/a.jpeg",
        "test/crack/1.bmp",
        "test/crack/2.Tif",
        "test/a b/é煤.JPG",
    ]
    masks = ["ground_truth/crack/1_mask.png", "ground_truth/crack/2_mask.TIF", "ground_truth/a b/é煤.png"]
    ignored = [
        "test/good/.hidden.png",
        "test/good/notes.txt",
        "test/.cache/x.png",
        "test/stray.png",
        "test/good/x.npy",
    ]
    for name in [*names, *masks, *ignored]:
        touch(tmp_path / "belt" / name)
    (tmp_path / "belt/test/good/folder.png").mkdir()
    samples = Category(tmp_path, "belt").test_samples()
    assert [sample.name for sample in samples] == sorted(names)
    assert [sample.label for sample in samples] == [1, 1, 1, 0, 0]
    folder = tmp_path / "belt" / "ground_truth"
    assert [sample.mask for sample in samples[:3]] == [
        folder / "a b/é煤.png",
        folder / "crack/1_mask.png",
        folder / "crack/2_mask.TIF",
    ]


def test_missing_mask_is_named(tmp_path):
    folder = draw_category(tmp_path / "belt", 1, 1, 2)
    (folder / "ground_truth/rope/001_mask.png").unlink()
    with pytest.raises(InputError, match=r"no mask .*rope.001_mask\.png for .*test.rope.001\.png"):
        Category(tmp_path, "belt").test_samples()


def test_images_that_share_a_stem_are_refused(tmp_path):
    for name in ("a.png", "a.jpg"):
        touch(tmp_path / "belt/test/good" / name)
    with pytest.raises(InputError, match="extension"):
        Category(tmp_path, "belt").test_samples()


def test_all_categories(tmp_path):
    for name in ("b", "a", ".hidden", "煤 belt"):
        (tmp_path / name / "train" / "good").mkdir(parents=True)
    (tmp_path / "no_images" / "train").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    touch(tmp_path / "file")
    assert find_categories(tmp_path, ["all"]) == ["a", "b", "煤 belt"]
    assert find_categories(tmp_path, ["b", "a", "b", "coal_ad"]) == ["b", "a", "coal_ad"]
    with pytest.raises(InputError, match="no category folder"):
        find_categories(tmp_path, ["a", "c"])
    for root in (tmp_path / "folder", tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match="--data-root"):
            find_categories(root, ["all"])


ITEMS = [Sample(Path(f"{index:03d}.png"), f"train/good/{index:03d}.png") for index in range(21)]


def test_half_of_the_training_images_is_the_published_half():
    order = list(range(21))
    random.Random(22).shuffle(order)
    fitted, held = split_training(ITEMS, 0.5, 0, 22)
    assert fitted == [ITEMS[index] for index in order[:10]] and held == []
    assert split_training(ITEMS, 1, 0, 22) == (ITEMS, [])
    assert split_training(ITEMS, 0.5, 0, 23)[0] != fitted


def test_held_out_images_are_the_same_for_all_branches():
    whole, half = split_training(ITEMS, 1, 0.2, 22), split_training(ITEMS, 0.5, 0.2, 22)
    assert whole[1] == half[1] and len(whole[1]) == 4
    assert sorted(whole[0] + whole[1], key=lambda sample: sample.name) == ITEMS
    assert set(half[0]) < set(whole[0]) and len(half[0]) == 8
    assert split_training(ITEMS, 1, 0.2, 23)[1] != whole[1]


@pytest.mark.parametrize(("train", "held"), [(0.04, 0), (1, 0.02), (1, 0.06), (0.04, 0.5)])
def test_parts_that_are_too_small_are_refused(train, held):
    with pytest.raises(InputError, match="--holdout-ratio"):
        split_training(ITEMS, train, held, 22)
