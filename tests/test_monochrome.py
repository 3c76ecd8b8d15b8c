"""Monochrome and infrared cameras: a codec's colours are no alarm, and a coloured object marks itself alone."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import Batches
from stub_camera import write_video

from datasets.loading import to_tensor
from models import MACLU, USAD, MA2Patch, PatchCore
from models.branches.calibration import calibrate
from models.branches.monochrome import FRAMES, QUALITY, TINT, CodecNoise, coded_frame, is_colourless
from models.networks import DEMO_NETWORK
from models.networks.backbones import BackboneSpec, build_backbone

SIZE = 128
NETWORK = build_backbone(BackboneSpec("tokens", DEMO_NETWORK, SIZE, weights="demo"))
SAME = 1.5  # factor between the scores of one scene


def stones(rng: np.random.Generator) -> np.ndarray:
    """Pebbles on a belt, with the sensor's noise."""
    grey = np.full((SIZE, SIZE), 45.0)
    for _ in range(60):
        centre, radius = rng.integers(0, SIZE, 2).tolist(), int(rng.integers(4, 12))
        cv2.circle(grey, centre, radius, float(rng.uniform(40, 110)), -1)
    return cv2.GaussianBlur(grey, (0, 0), 1.0) + rng.normal(0, 1.5, grey.shape)


def warmth(rng: np.random.Generator) -> np.ndarray:
    """Soft blobs of an infrared camera, almost without noise."""
    soft = cv2.GaussianBlur(rng.normal(0, 1, (SIZE, SIZE)), (0, 0), 7)
    return 100 + 30 * soft / soft.std() + rng.normal(0, 1, soft.shape)


def weave(rng: np.random.Generator) -> np.ndarray:
    """A dirty woven belt that runs past under uneven light."""
    down, across = np.mgrid[:SIZE, :SIZE] + rng.uniform(0, 20, (2, 1, 1))
    light = 1 + 0.3 * np.sin(2 * np.pi * (across / SIZE + rng.uniform()))
    dirt = cv2.GaussianBlur(rng.normal(0, 1, light.shape), (0, 0), 10)
    light = light * (1 + 0.15 * dirt / dirt.std())
    return light * (90 + 25 * np.sin(down / 2.5) * np.sin(across / 3.5)) + rng.normal(0, 4, light.shape)


SCENES = {
    "stones": (stones, (1, 1, 1)),
    "warmth": (warmth, (1, 1, 1)),
    "weave": (weave, (1, 1, 1)),
    "stones in sepia": (stones, (1.08, 1, 0.86)),
}


def frame(scene: str, seed: int, coloured_object: bool = False) -> np.ndarray:
    draw, tint = SCENES[scene]
    pixels = draw(np.random.default_rng(seed))[..., None] * tint
    if coloured_object:
        pixels[OBJECT] = (190, 120, 60)
    return pixels.round().clip(0, 255).astype(np.uint8)


OBJECT = np.s_[48:76, 40:80]
FAR = np.ones((SIZE, SIZE), bool)
FAR[24:100, 16:104] = False


def jpeg(frames: list[np.ndarray], quality: int) -> list[np.ndarray]:
    decoded = []
    for pixels in frames:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        decoded.append(np.array(Image.open(file).convert("RGB")))
    return decoded


def motion_jpeg(frames: list[np.ndarray], path: Path) -> list[np.ndarray]:
    write_video(path, frames, 25, "MJPG")
    video = cv2.VideoCapture(str(path))
    return [np.ascontiguousarray(video.read()[1][..., ::-1]) for _ in frames]


def one_level_more(frames: list[np.ndarray], colours: list[int]) -> list[np.ndarray]:
    shifted = np.array(frames).astype(int)
    shifted[..., colours] += 1
    return list(shifted.clip(0, 255).astype(np.uint8))


def tensors(frames: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([to_tensor(Image.fromarray(pixels), SIZE, "bicubic") for pixels in frames])


def trained(scene: str, network: str, covariance: str) -> tuple[USAD, float]:
    """The fusion, trained on the scene, and the highest value in the maps of frames held out."""
    weights = "demo" if network == DEMO_NETWORK else "random"
    tokens = build_backbone(BackboneSpec("tokens", network, SIZE, weights=weights))
    maps = build_backbone(BackboneSpec("maps", DEMO_NETWORK, SIZE, weights="demo"))
    branches = [
        MACLU(tokens, covariance=covariance),
        MA2Patch(tokens, covariance=covariance),
        PatchCore(maps, coreset_ratio=0.05, whiten=True, average_bank=True),
    ]
    count = 16 if covariance == "ledoit-wolf" else 80  # more images than the network has channels
    fitted, held_out = ([frame(scene, seed) for seed in range(*seeds)] for seeds in ((0, count), (300, 312)))
    for branch in branches:
        branch.fit(Batches.of(tensors(fitted)))
        branch.calibration = calibrate(branch, *(Batches.of(tensors(frames)) for frames in (held_out, fitted[:20])))
    usad = USAD(branches, fusion="standardized")
    return usad, float(usad.predict(tensors(held_out)).maps.max())


@pytest.mark.parametrize(
    ("scene", "network", "covariance"),
    [
        *((scene, DEMO_NETWORK, "ledoit-wolf") for scene in SCENES),
        ("stones", "test_vit", "ledoit-wolf"),
        ("warmth", "test_vit", "empirical"),
    ],
)
def test_codecs_do_not_move_the_scores_of_a_monochrome_camera(tmp_path, scene, network, covariance):
    usad, highest = trained(scene, network, covariance)
    frames = [frame(scene, seed) for seed in range(100, 108)]
    plain = {name: part.scores.numpy() for name, part in usad.predict_parts(tensors(frames)).items()}
    coded = {
        "JPEG 75": jpeg(frames, 75),
        "JPEG 90": jpeg(frames, 90),
        "Motion JPEG": motion_jpeg(frames, tmp_path / "camera.avi"),
        "more blue": one_level_more(frames, [2]),
        "more red and blue": one_level_more(frames, [0, 2]),
    }
    for name, pictures in coded.items():
        for part, found in usad.predict_parts(tensors(pictures)).items():
            found, expected = found.scores.numpy(), plain[part]
            if part == usad.name:  # near zero where a frame is ordinary in all respects: a factor means little there
                found, expected = found.mean(), expected.mean()
            assert np.maximum(found / expected, expected / found).max() < SAME, (name, part, found, expected)

    maps = usad.predict(tensors([frame(scene, seed, coloured_object=True) for seed in range(200, 206)])).maps.numpy()
    marked = maps >= highest
    assert marked[(slice(None), *OBJECT)].mean() > 0.9
    assert marked[:, FAR].mean() < 0.01


def pixels_of(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).float()


def test_only_frames_without_colour_are_found_colourless():
    rng = np.random.default_rng(0)
    assert all(is_colourless(pixels_of(frame(scene, 0))) for scene in SCENES)
    tinted = frame("stones", 0)
    tinted[::2, ::2, 0] += 3
    noisy = (frame("stones", 0) + rng.normal(0, 1.5, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
    for picture in (tinted, noisy, frame("warmth", 0, coloured_object=True)):
        assert not is_colourless(pixels_of(picture))


def test_errors_in_colour_leave_a_frame_as_bright_as_the_codec_does():
    picture = frame("stones", 0)
    coded = coded_frame(pixels_of(picture), seed=3).numpy().transpose(1, 2, 0)
    decoded = jpeg([picture], QUALITY)[0].astype(float)
    assert np.abs(coded.mean(2) - decoded.mean(2)).max() <= 1.5  # two decoders round differently
    strays = (coded - decoded) - (coded - decoded).mean(2, keepdims=True)
    assert TINT / 2 < strays.std() < TINT


def test_frames_with_colour_add_nothing():
    noise = CodecNoise(lambda images: images.mean((2, 3)), NETWORK)
    images = torch.rand(3, 3, SIZE, SIZE)
    noise.update(images, torch.arange(3), images.mean((2, 3)))
    assert noise.covariance() == 0.0


def test_the_noise_is_the_second_moment_of_the_changes_whoever_saw_the_frames():
    def vectors(images):
        return images[..., :2, :2].flatten(1)

    grey = tensors([frame("warmth", seed) for seed in range(5)])
    index, before = torch.arange(5), vectors(grey)
    pixels = 255 * NETWORK.pixels(grey)
    coded = torch.stack([coded_frame(frame, number) for number, frame in enumerate(pixels)])
    changes = vectors(NETWORK.normalized(coded / 255) - grey).numpy()
    expected = changes.T @ changes / 5
    expected = (expected + np.diag(np.diag(expected))) / 2

    one, other, late = (CodecNoise(vectors, NETWORK) for _ in range(3))
    one.update(grey[:2], index[:2], before[:2])
    other.update(grey[2:], index[2:], before[2:])
    one.merge(other.state())
    np.testing.assert_allclose(one.covariance(), expected, atol=1e-5)
    late.update(grey, index + FRAMES, before)
    assert late.covariance() == 0.0
