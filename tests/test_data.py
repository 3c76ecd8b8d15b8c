"""Reading images, masks and folders."""

import random
import re
import shutil
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pictures import IMAGES, png_chunk, turned
from PIL import Image
from tiny import SMALL_NETWORKS, draw_category, draw_frame, read_json, read_rows, run_in_process, small_flags, succeed

from datasets.images import Decoding, Note, find_files, read_mask, read_picture
from datasets.loading import ImageDataset, ImageLoader, mask_to_tensor, to_tensor
from datasets.mvtec import Category, Sample, default_holdout, defects_without_masks, find_categories, split_training
from datasets.sources import Images
from metrics import protocols
from models import USAD
from utils.errors import InputError, UnreadableError


def with_orientation(png: bytes, orientation: int) -> bytes:
    """A PNG file as OpenCV writes it, which cannot write EXIF data."""
    exif = turned(orientation).tobytes().removeprefix(b"Exif\0\0")
    return png[:33] + png_chunk(b"eXIf", exif) + png[33:]  # behind the header


# Image kinds


@pytest.mark.parametrize(("name", "image", "options", "expected"), IMAGES, ids=[name for name, *_ in IMAGES])
def test_image_kinds(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(read_picture(tmp_path / name).image, int)
    if "quality" in options:  # JPEG
        assert np.abs(found - expected).mean() < 3
    else:
        np.testing.assert_array_equal(found, expected)


# Bit depth and size


def camera_values(bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """What a camera of so many bits gives, its extremes included."""
    values = np.random.default_rng(bits).integers(0, 2**bits, shape, dtype=np.uint16)
    values.flat[:2] = 0, 2**bits - 1
    return values


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "rgb.png", "rgb.tif", "rgba.png"])
def test_bit_depth(tmp_path, bits, kind):
    channels = {"grey": (), "rgb": (3,), "rgba": (4,)}[kind.split(".")[0]]
    values = camera_values(bits, (9, 14, *channels))
    cv2.imwrite(str(tmp_path / kind), values)  # blue, green, red
    picture = read_picture(tmp_path / kind, Decoding(bit_depth=bits))
    expected = (values / (2**bits - 1) * 255).round() if bits < 16 or not channels else values // 256
    expected = np.dstack([expected] * 3) if not channels else expected[..., 2::-1]
    np.testing.assert_array_equal(picture.image, expected)
    assert not picture.notes
    assert read_picture(tmp_path / kind).notes == (Note.DIM if bits < 14 else Note(0))


def test_bit_depth_of_a_turned_image(tmp_path):
    values = camera_values(12, (9, 14, 3))
    (tmp_path / "a.png").write_bytes(with_orientation(cv2.imencode(".png", values)[1].tobytes(), 6))
    expected = np.rot90((values[..., ::-1] / 4095 * 255).round(), -1)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", Decoding(bit_depth=12)).image, expected)


@pytest.mark.parametrize(("bits", "brightest", "remedy"), [(10, 1024, 11), (12, 65535, 16), (8, 300, 9)])
def test_values_beyond_the_bit_depth_are_refused(tmp_path, bits, brightest, remedy):
    for name, shape in (("grey.png", (4, 4)), ("rgb.png", (4, 4, 3))):
        values = np.zeros(shape, np.uint16)
        values[2, 3] = brightest
        cv2.imwrite(str(tmp_path / name), values)
        with pytest.raises(InputError, match=f"{name} holds values from 0 to {brightest}, .*--bit-depth {remedy}$"):
            read_picture(tmp_path / name, Decoding(bit_depth=bits))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("seed", range(3))
def test_white_stored_as_zero(tmp_path, dtype, seed):
    values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (6, 8), dtype, endpoint=True)
    Image.fromarray(values).save(tmp_path / "plain.tif")
    photometric, content = struct.pack("<HHIH", 262, 3, 1, 1), (tmp_path / "plain.tif").read_bytes()
    assert content.count(photometric) == 1
    (tmp_path / "inverted.tif").write_bytes(content.replace(photometric, struct.pack("<HHIH", 262, 3, 1, 0)))
    plain, inverted = (np.asarray(read_picture(tmp_path / f"{name}.tif").image, int) for name in ("plain", "inverted"))
    np.testing.assert_array_equal(inverted, 255 - plain)
    marked, notes = read_mask([tmp_path / "inverted.tif"])
    np.testing.assert_array_equal(marked, values <= np.iinfo(dtype).max // 2)
    assert notes == (Note.FAINT if marked.mean() < 0.5 else Note(0))


@pytest.mark.parametrize("brightest", [0, 1023, 4095, 8191, 8192])
def test_dim_images_are_noted(tmp_path, brightest):
    for name, shape in (("grey.png", (4, 4)), ("rgb.tif", (4, 4, 3))):
        cv2.imwrite(str(tmp_path / name), np.full(shape, brightest, np.uint16))
        assert read_picture(tmp_path / name).notes == (Note.DIM if brightest < 8192 else Note(0))


@pytest.mark.parametrize("pages", [1, 3])
def test_further_pages_are_noted(tmp_path, capsys, pages):
    images = [Image.new("RGB", (8, 6), (60 * page, 0, 0)) for page in range(pages)]
    images[0].save(tmp_path / "stack.tif", save_all=True, append_images=images[1:])
    (found,) = Images([tmp_path / "stack.tif"]).frames(1)
    assert found.image.notes == (Note.PAGES if pages > 1 else Note(0)) and not found.pixels.any()
    assert ("stack.tif: of several pages only the first" in capsys.readouterr().err) == (pages > 1)
    mask = tmp_path / "mask.tif"
    images[-1].save(mask, save_all=True, append_images=images[1:])
    dataset = ImageDataset([Sample(tmp_path / "stack.tif", "test/rope/stack.tif", 1, (mask,))], 8, "bicubic")
    assert len(list(ImageLoader(dataset, 1, 0, "test"))) == 1
    said = capsys.readouterr().err
    assert (f"1 files, for instance {mask}: of masks of several pages only the first counts" in said) == (pages > 1)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "progressive.jpg", "far.jpg"])
def test_images_that_are_too_large_are_refused(tmp_path, name):
    limit, pillow = Decoding(max_megapixels=0.0001 if name == "far.jpg" else 0.01), Image.MAX_IMAGE_PIXELS
    Image.new("RGB", (160, 90)).save(tmp_path / name, progressive=name == "progressive.jpg")
    for read in (read_picture, lambda path, decoding: read_mask([path], None, decoding)):
        with pytest.raises(UnreadableError, match=f"{name} is 160x90.* 0.0 megapixels.* limit.* --max-megapixels") as e:
            read(tmp_path / name, limit)
        assert "repair" not in str(e.value)
    assert read_picture(tmp_path / name, Decoding(max_megapixels=0.0145)).image.size == (160, 90)
    assert pillow == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(("limit", "scale"), [(0.48, 1), (0.3, 2), (0.03, 4), (0.0075, 8)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_at_a_reduced_scale(tmp_path, limit, scale, orientation):
    ramp = Image.fromarray(np.stack(np.broadcast_arrays(*np.ogrid[20:200:600j, 0:250:800j], 60), 2).astype(np.uint8))
    ramp.save(tmp_path / "a.jpg", quality=95, exif=turned(orientation))
    whole = read_picture(tmp_path / "a.jpg")
    picture = read_picture(tmp_path / "a.jpg", Decoding(max_megapixels=limit))
    assert picture.size == whole.size == ((800, 600) if orientation == 1 else (600, 800))
    assert picture.image.size == tuple(side // scale for side in whole.size)
    assert picture.notes == (Note.REDUCED if scale > 1 else Note(0))
    expected = np.asarray(whole.image.resize(picture.image.size, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(picture.image) - expected).max() <= 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    contents = {"empty.png": b"", "text.jpg": b"not an image", "zeros.bmp": bytes(500)}
    for path in (tmp_path / name for name in ("a.png", "a.jpg", "a.bmp", "a.tif")):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
        contents[path.name] = path.read_bytes()[: path.stat().st_size // 2]
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (read_picture, lambda path: read_mask([path], (40, 40))):
            with warnings.catch_warnings(), pytest.raises(InputError) as error:
                warnings.simplefilter("error")
                read(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_picture(tmp_path / "none.png")


# Tensors and masks


def test_any_aspect_is_stretched_to_the_square(tmp_path):
    image = Image.fromarray(draw_frame(np.random.default_rng(0), 90, 40))
    tensor = to_tensor(image, 32, "bicubic")
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(tensor, expected.transpose(2, 0, 1), atol=1e-5)
    assert not torch.allclose(tensor, to_tensor(image, 32, "bilinear"), atol=1e-2)


def test_a_mask_is_resized_to_the_nearest_pixels():
    big = np.random.default_rng(1).random((30, 50)) < 0.5
    rows, columns = ((np.arange(20) + 0.5) * length / 20 for length in big.shape)
    np.testing.assert_array_equal(mask_to_tensor(big, 20), big[rows.astype(int)[:, None], columns.astype(int)])


TRUTH = np.zeros((6, 8), bool)
TRUTH[2:4, 3:7] = True


def levels(*values: int, kind: type = np.uint8) -> Image.Image:
    """A mask of these values: the first outside of TRUTH, the others in its columns by turns."""
    chosen = np.where(TRUTH, np.arange(8) % max(1, len(values) - 1) + 1, 0)
    return Image.fromarray(np.array(values, kind)[chosen])


def indexed(*colors: tuple[int, int, int], first: int = 0) -> Image.Image:
    """An indexed mask: the background has number `first`, TRUTH the others."""
    image = levels(*((number + first) % len(colors) for number in range(len(colors))))
    image.putpalette([channel for color in colors for channel in color])
    return image


BLACK, WHITE, RED, DARK_RED, DARK_GREEN = (0, 0, 0), (255, 255, 255), (255, 0, 0), (128, 0, 0), (0, 64, 0)
BRIGHT_MASKS = {
    "grey": levels(0, 255),
    "rgb": levels(0, 255).convert("RGB"),
    "rgba": levels(0, 255).convert("RGBA"),
    "pure blue": Image.merge("RGB", [levels(0, 0), levels(0, 0), levels(0, 255)]),
    "1 bit": Image.fromarray(TRUTH),
    "16 bits": levels(0, 65535, kind=np.uint16),
    "grey ramp as palette": levels(0, 200).convert("P"),
    "black and white": indexed(BLACK, WHITE),
    "white and black": indexed(WHITE, BLACK, first=1),
}
LABEL_MASKS = {
    "0 and 1": levels(0, 1),
    "0 to 3": levels(0, 1, 2, 3),
    "0 and 127": levels(0, 127),
    "0 and 1 in RGB": levels(0, 1).convert("RGB"),
    "dark red in RGB": Image.merge("RGB", [levels(0, 100), levels(0, 0), levels(0, 0)]),
    "0 and 1 of 16 bits": levels(0, 1, kind=np.uint16),
    "0 and 255 of 16 bits": levels(0, 255, kind=np.uint16),
    "instances, 16 bits": levels(0, 7, 300, 1000, kind=np.uint16),
    "0 and 1 of 32 bits": levels(0, 1, kind=np.int32),
    "0 and 1, floats": levels(0, 1, kind=np.float32),
    "0 and 1 as palette": levels(0, 1).convert("P"),
    "red": indexed(BLACK, RED),
    "labelme": indexed(BLACK, DARK_RED),
    "labelme, two classes": indexed(BLACK, DARK_RED, DARK_GREEN),
    "a bright class among them": indexed(BLACK, DARK_RED, WHITE),
    "grey classes": indexed(BLACK, (85,) * 3, (170,) * 3, WHITE),
    "black comes last": indexed(DARK_RED, BLACK, first=1),
    "no black": indexed(WHITE, DARK_GREEN),
    "all colours black": indexed(BLACK, BLACK),
}


EMPTY_MASKS = {
    "black": levels(0, 0),
    "black, 16 bits": levels(0, 0, kind=np.uint16),
    "black as palette": levels(0, 0).convert("P"),
    "black, 1 bit": levels(0, 0).convert("1"),
}
FAINT_MASKS = {
    "half": levels(127, 128),
    "16 bits, half": levels(32767, 32768, kind=np.uint16),
    "grey ramp with a soft edge": levels(90, 200).convert("P"),
}
FULL_MASKS = {
    "white": Image.new("L", (8, 6), "white"),
    "white in RGB": Image.new("RGB", (8, 6), "white"),
    "white under what is transparent": Image.new("RGBA", (8, 6), (255, 255, 255, 0)),  # as editors leave it
}
MASKS = {  # what is noted of them, and what is marked
    **{name: (image, Note(0), TRUTH) for name, image in BRIGHT_MASKS.items()},
    **{name: (image, Note.LABELS, TRUTH) for name, image in LABEL_MASKS.items()},
    **{name: (image, Note.EMPTY, TRUTH & False) for name, image in EMPTY_MASKS.items()},
    **{name: (image, Note.FAINT, TRUTH) for name, image in FAINT_MASKS.items()},
    "labels and 255 for what does not count": (levels(0, 1, 2, 3, 255), Note.FAINT, TRUTH & (np.arange(8) == 3)),
    **{name: (image, Note.FULL, TRUTH | True) for name, image in FULL_MASKS.items()},
}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_kinds(tmp_path, kind):
    image, notes, marked = MASKS[kind]
    path = tmp_path / ("m.png" if image.mode in ("1", "L", "P", "RGB", "RGBA", "I;16") else "m.tif")
    image.save(path)
    found, said = read_mask([path], (8, 6))
    np.testing.assert_array_equal(found, marked)
    assert said == notes


@pytest.mark.parametrize(
    ("marked", "notes"), [(1, Note.LABELS), (255, Note.LABELS), (40000, Note(0)), (65535, Note(0))]
)
def test_masks_of_16_bit_colour(tmp_path, marked, notes):
    values = np.zeros((*TRUTH.shape, 3), np.uint16)
    values[TRUTH, 2] = marked
    cv2.imwrite(str(tmp_path / "m.png"), values)
    found, said = read_mask([tmp_path / "m.png"])
    np.testing.assert_array_equal(found, TRUTH)
    assert said == notes
    content = (tmp_path / "m.png").read_bytes()
    for orientation, quarters in ((3, 2), (6, -1)):
        (tmp_path / "m.png").write_bytes(with_orientation(content, orientation))
        np.testing.assert_array_equal(read_mask([tmp_path / "m.png"])[0], np.rot90(TRUTH, quarters))


def test_jpeg_masks_have_no_labels(tmp_path):
    """What is dark in them is noise."""
    big = Image.fromarray(TRUTH.astype(np.uint8).repeat(16, 0).repeat(16, 1))
    for name, level, notes in (("a.jpg", 255, Note(0)), ("b.jpg", 3, Note.EMPTY), ("c.tif", 3, Note.EMPTY)):
        options = {"compression": "jpeg"} if name == "c.tif" else {}
        big.point(lambda value, level=level: value * level).save(tmp_path / name, **options)
        found, said = read_mask([tmp_path / name])
        assert (found == (np.asarray(big) > 0)).mean() > (0.95 if level == 255 else 0.8) and said == notes


def test_several_masks_are_joined(tmp_path):
    left, right = np.zeros((2, 6, 8), np.uint8)
    left[:, :2], right[3] = 1, 255
    for name, mask in (("a.png", left), ("b.png", right)):
        Image.fromarray(mask).save(tmp_path / name)
    found, said = read_mask([tmp_path / "a.png", tmp_path / "b.png"], (8, 6))
    np.testing.assert_array_equal(found, (left > 0) | (right > 0))
    assert said == Note.LABELS


def test_other_files_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif holds floating-point values"):
        read_picture(tmp_path / "a.tif")
    for height in (6, 7):
        Image.new("L", (8, height)).save(tmp_path / f"{height}.png")
    with pytest.raises(InputError, match=r"7\.png is 8x7"):
        read_mask([tmp_path / "6.png", tmp_path / "7.png"])
    with pytest.raises(InputError, match=r"6\.png is 8x6 but its image is 6x8"):
        read_mask([tmp_path / "6.png"], (6, 8))


def test_mask_follows_an_image_turned_by_exif(tmp_path):
    folder = draw_category(tmp_path / "belt", 1, 1, 1)
    path = folder / "test/rope/000.png"
    Image.open(path).rotate(90, expand=True).save(path, exif=turned(6))
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


def touch(folder: Path, *names: str) -> Category:
    """Empty files in the folder `belt`."""
    for name in names:
        (folder / "belt" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "belt" / name).touch()
    return Category(folder, "belt")


LAYOUTS = {  # images below test/ with their masks below ground_truth/
    "sub-folders": {"rope/a/0.png": ["rope/a/0_mask.png"], "rope/b/0.png": ["rope/b/0_mask.png"], "good/a/0.png": []},
    "deep sub-folders": {"rope/day 1/煤/cam.2/0.png": ["rope/day 1/煤/cam.2/0.png"], "rope/0.png": ["rope/0.png"]},
    "images sorted into sub-folders, masks not": {"rope/a/0.png": ["rope/0_mask.png"], "rope/b/1.png": ["rope/1.png"]},
    "suffixes in any case": {"rope/0.Png": ["rope/0_mask.pNG"], "rope/1.JPg": ["rope/1_MASK.TiF"]},
    "several masks": {"rope/0.png": ["rope/0/000.png", "rope/0/001.png"], "rope/1.png": ["rope/1/000.png"]},
    "several masks in sub-folders": {
        "rope/a/0.png": ["rope/a/0/x.BMP", "rope/a/0/y.png"],
        "rope/0.png": ["rope/0.png"],
    },
    "a defect without masks": {"rope/0.png": ["rope/0_mask.png"], "wood/0.png": [], "wood/a/0.png": []},
    "names of all kinds": {
        "good/b.PNG": [],
        "crack/1.bmp": ["crack/1_mask.png"],
        "crack/2.Tif": ["crack/2_mask.TIF"],
        "a b/é煤.JPG": ["a b/é煤.png"],
        "good/a.jpeg": [],
    },
    "no masks": {"rope/0.png": [], "wood/a/0.png": [], "good/0.png": []},
}


IGNORED = "test/good/.hidden.png", "test/good/notes.txt", "test/.cache/x.png", "test/stray.png", "test/good/x.npy"


def test_masks_in_a_sub_folder_are_not_those_of_an_image_of_its_name(tmp_path):
    category = touch(tmp_path, "test/rope/0.png", "test/rope/0/1.png", "ground_truth/rope/0/1_mask.png")
    with pytest.raises(InputError, match=r"no mask .*0_mask\.png"):
        category.test_samples()
    touch(tmp_path, "ground_truth/rope/0.png")  # named after the image, as ever
    truth = category.folder / "ground_truth/rope"
    assert [sample.masks for sample in category.test_samples()] == [(truth / "0.png",), (truth / "0/1_mask.png",)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    images, category = LAYOUTS[layout], touch(tmp_path, *IGNORED)
    (category.folder / "test/good/folder.png").mkdir()
    for name, masks in images.items():
        touch(tmp_path, f"test/{name}", f"train/good/{name}", *(f"ground_truth/{mask}" for mask in masks))
    samples = category.test_samples()
    truth = category.folder / "ground_truth"
    assert [(sample.name, sample.masks) for sample in samples] == [
        (f"test/{name}", tuple(truth / mask for mask in masks)) for name, masks in sorted(images.items())
    ]
    assert [sample.name for sample in category.train_samples()] == sorted(f"train/good/{name}" for name in images)
    assert all(sample.label == (sample.kind != "good") for sample in samples)
    bare = {name.split("/")[0] for name, masks in images.items() if not masks} - {"good"}
    assert defects_without_masks(samples) == sorted(bare)


@pytest.mark.parametrize("bare", ["001.png", "a/000.png", "a/b/001.png"])
def test_missing_masks_are_named(tmp_path, bare):
    names = {"000.png", "a/001.png", "a/b/000.png", bare}
    masks = (f"ground_truth/rope/{name}" for name in names - {bare})
    category = touch(tmp_path, *(f"test/rope/{name}" for name in names), *masks)
    mask = bare.replace(".png", "_mask.png")
    with pytest.raises(InputError, match=f"no mask .*rope/{mask} for .*test/rope/{bare}; add it") as error:
        category.test_samples()
    assert "test/good" not in str(error.value)


def test_images_outside_of_the_folders_are_named(tmp_path, capsys):
    names = "train/good/0.png", "train/bad/1.png", "train/2.png", "test/good/0.png", "test/3.png"
    category = touch(tmp_path, *names)
    for _ in range(2):
        assert [sample.name for sample in category.train_samples()] == ["train/good/0.png"]
        assert [sample.name for sample in category.test_samples()] == ["test/good/0.png"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"warning: 2 images, for instance {tmp_path / 'belt/train/2.png'}, lie outside of train/good"
    )
    assert second.startswith(f"warning: 1 images, for instance {tmp_path / 'belt/test/3.png'}")


def test_links_are_followed_but_not_in_circles(tmp_path):
    category = touch(tmp_path, "train/good/1.png", "../disk/0.png")
    for link, target in (("far", tmp_path / "disk"), ("near", tmp_path / "disk"), ("circle", "../../train")):
        (tmp_path / "belt/train/good" / link).symlink_to(target)
    (tmp_path / "disk/back").symlink_to(tmp_path / "belt/train/good")
    assert [sample.name for sample in category.train_samples()] == [
        "train/good/1.png",
        "train/good/far/0.png",
        "train/good/near/0.png",
    ]


def test_images_that_share_a_stem_are_refused(tmp_path):
    with pytest.raises(InputError, match="extension"):
        touch(tmp_path, "test/good/a.png", "test/good/a.jpg").test_samples()


def test_all_categories(tmp_path):
    for name in ("b", "a", ".hidden", "煤 belt"):
        (tmp_path / name / "train" / "good").mkdir(parents=True)
    (tmp_path / "no_images" / "train").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
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


@pytest.mark.parametrize(
    ("count", "train", "held"),
    [
        *((21, 0.04, 0), (21, 1, 0.02), (21, 1, 0.06), (21, 0.04, 0.5), (8, 1, 0.1), (6, 0.5, 0.2), (4, 1, 0.2)),
        *((3, 1, 0.2), (3, 1, 0.9), (2, 0.3, 0), (2, 1, 0.2), (2, 1, 0.5), (2, 1, 0.9), (1, 0.5, 0), (1, 1, 0.9)),
    ],
)
def test_parts_that_are_too_small_are_refused_with_a_remedy_that_works(count, train, held):
    with pytest.raises(InputError, match="--holdout-ratio") as error:
        split_training(ITEMS[:count], train, held, 22)
    offered = re.findall(r"give (--train-ratio )?([\d.]+)(?: or ([\d.]+))?", str(error.value))
    ((of_train, *values),) = offered
    for value in map(float, filter(None, values)):
        train, held = (value, held) if of_train else (1, value)
        fitted, out = split_training(ITEMS[:count], train, held, 22)
        assert fitted and (len(out) >= 2 if held else not out)


def test_default_holdout_gives_way_where_images_are_few():
    held = [len(split_training(ITEMS[:n], 1, default_holdout(0.2, n), 22)[1]) for n in range(1, 22)]
    assert held == [0] * 4 + [2] * 8 + [3] * 5 + [4] * 4
    assert default_holdout(0.0, 3) == default_holdout(0.0, 30) == 0


# The scripts


def figures(folder: Path) -> dict:
    return read_json(folder / "metrics.json")


def scores(table: Path) -> list[float]:
    return [float(row["score"]) for row in read_rows(table)]


def test_images_of_one_name_in_several_sub_folders(tmp_path):
    belt = draw_category(tmp_path / "data/belt", 8, 2, 4)
    for part in ("train/good", "test/good", "test/rope", "ground_truth/rope"):
        for index, path in enumerate(sorted((belt / part).iterdir())):
            target = path.with_name(f"cam{index % 2}") / path.name.replace(f"{index:03d}", f"{index // 2:03d}")
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
    assert succeed(tmp_path, "train_pc", "--save-maps", "--train-ratio", 1).err == ""
    folder = tmp_path / "result/belt/pc"
    expected = [
        f"{kind}/cam{c}/00{i}" for kind, count in (("good", 1), ("rope", 2)) for c in range(2) for i in range(count)
    ]
    assert [row["path"] for row in read_rows(folder / "scores.csv")] == [f"test/{name}.png" for name in expected]
    for part, suffix in (("anomaly_maps", ".tiff"), ("heatmaps", ".png")):
        written = {path.relative_to(folder / part).as_posix(): path.read_bytes() for path in find_files(folder / part)}
        assert sorted(written) == sorted(f"{name}{suffix}" for name in expected)
        assert len(set(written.values())) == len(expected)
    assert figures(folder)["n_anomalous"] == 4 and figures(folder)["pixel_auroc"] is not None


@pytest.mark.parametrize("masked", [True, False])
def test_without_masks_the_figures_of_pixels_are_null(workplace, masked):
    """Of all defects, or of one alone: its pixels would count as normal."""
    belt = workplace / "data/belt"
    draw_category(workplace / "other", 1, 1, 2, seed=1)
    if masked:
        (workplace / "other/test/rope").rename(belt / "test/wood")
    else:
        shutil.rmtree(belt / "ground_truth")
    kind = "wood" if masked else "rope"
    (line,) = succeed(workplace, "test_fusion", "--save-maps").err.splitlines()
    assert line.startswith(f"warning: no masks of {kind} (for instance ground_truth/{kind}/000_mask.png): ")
    folder = workplace / "result/belt/fusion"
    for found in (figures(folder), figures(folder)["branches"]["pc"]):
        missing = {key for key, value in found.items() if value is None}
        assert missing == set(protocols()) - {"image_auroc", "image_ap", "image_f1_max"}
    for name in (f"heatmaps/{kind}/000.png", f"anomaly_maps/{kind}/000.tiff", "report.html"):
        assert (folder / name).stat().st_size > 1000
    succeed(workplace, "reproduce_tables", "--tables", "ablation")
    for row in read_rows(workplace / "result/belt/tables/ablation.csv"):
        assert row["image_auroc"] and not row["pixel_auroc"] + row["aupro"]


def test_what_is_said_of_masks_is_said_once(workplace):
    truth = workplace / "data/belt/ground_truth/rope"
    for name in ("000", "001", "003"):
        mask = np.asarray(Image.open(truth / f"{name}_mask.png"))
        Image.fromarray((mask > 0).astype(np.uint8) if name != "003" else mask * 0).save(truth / f"{name}_mask.png")
    before = figures(workplace / "result/belt/pc")
    labels, empty = succeed(workplace, "train_pc", "--skip-unreadable", "--workers", 1).err.splitlines()
    assert labels.startswith(f"warning: 2 files, for instance {truth / '000_mask.png'}: the masks hold labels")
    assert empty.startswith(f"warning: 1 files, for instance {truth / '003_mask.png'}: the masks mark nothing")
    after = figures(workplace / "result/belt/pc")
    assert after["pixel_auroc"] is not None and after["pixel_auroc"] != before["pixel_auroc"]


def test_a_12_bit_camera_is_kept_in_mind_from_training_to_prediction(workplace):
    """The same frames, stored as 12 of 16 bits, give the same scores."""
    tables = [workplace / f"result/belt/{part}/scores.csv" for part in ("pc", "fusion")]
    succeed(workplace, "test_fusion", "--no-images")
    before = [scores(table) for table in tables]
    for path in find_files(workplace / "data/belt"):
        if "ground_truth" not in path.parts:
            cv2.imwrite(str(path), (cv2.imread(str(path)) / 255 * 4095).round().astype(np.uint16))
    (line,) = succeed(workplace, "test_fusion", "--no-images").err.splitlines()
    assert line.startswith("warning: 7 files, for instance ") and "--bit-depth" in line
    for script in SMALL_NETWORKS:
        finished = succeed(workplace, script, "--holdout-ratio", 0.25, "--bit-depth", 12, "--no-images")
        assert "--bit-depth" not in finished.err
    succeed(workplace, "test_fusion", "--no-images")
    assert [scores(table) for table in tables] == before
    (found,) = USAD.load(workplace / "models/belt")(workplace / "data/belt/test/good/000.png")
    assert found.score == pytest.approx(before[1][0], rel=1e-6)
    flags = ["--category", "belt", "--models-dir", workplace / "models", "--device", "cpu", "--no-images"]
    finished = run_in_process("predict", workplace / "data/belt/test/good", *flags, "--out", workplace / "out")
    assert finished.code == 0 and "--bit-depth" not in finished.err
    assert scores(workplace / "out/predictions.csv") == pytest.approx(before[1][:3], rel=1e-6)

    said = succeed(workplace, "train_pc", "--train-ratio", 1, "--no-eval").err
    assert said.startswith("warning: 8 files, ") and said.count("\n") == 1
    finished = run_in_process("test_fusion", *small_flags(workplace, "test_fusion"))
    assert finished.code == 2 and "--bit-depth" in finished.err


def test_the_limit_of_the_size_is_a_flag(tmp_path):
    belt = draw_category(tmp_path / "data/belt", 4, 1, 1)
    flags = "--train-ratio", 1, "--no-eval", "--max-megapixels", 0.004
    finished = run_in_process("train_pc", *small_flags(tmp_path, "train_pc"), *flags)
    assert finished.code == 2 and "72x56" in finished.err and finished.err.count("raise it with --max-megapixels") == 4
    assert "repair" not in finished.err
    for path in (belt / "train/good").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    assert succeed(tmp_path, "train_pc", *flags).err.startswith("warning: 4 files, for instance ")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_training_images_with_the_demo_network(tmp_path, count):
    """Its default holds images out where there are enough; thresholds and the standardized fusion need them."""
    draw_category(tmp_path / "data/belt", count, 2, 2)
    flags = small_flags(tmp_path, "test_fusion")
    for script in SMALL_NETWORKS:
        finished = run_in_process(script, *flags, "--weights", "demo", "--image-size", 96, "--no-eval")
        said = finished.err.splitlines()
        if count == 1 and script != "train_pc":
            assert finished.code == 2 and said[-1].startswith("error: belt: 1 training image(s): ")
            assert "add images to train/good" in said[-1]
            continue
        assert finished.code == 0, finished.err
        expected = "2 are held out" if count == 7 else "none are held out: no thresholds"
        assert said[0].startswith(f"warning: belt: of only {count} training images {expected}")
    if count > 1:
        said = run_in_process("test_fusion", *flags, "--pc-weights", "other.pth").err
        assert "--pc-weights other.pth has no effect" in said
        succeed(tmp_path, "test_fusion", "--no-images")
        settings = read_json(tmp_path / "result/belt/fusion/config.json")["settings"]
        assert settings["fusion"] == ("standardized" if count == 7 else "paper")
        finished = run_in_process("test_fusion", *flags, "--no-images", "--false-alarm-rate", 0.3)
        assert finished.code == (0 if count == 7 else 2)
