"""The bundled network, what small data sets need beside it, and what `--weights demo` makes of the scripts."""

import sys

import numpy as np
import pytest
import scipy.signal
import torch
from stand_in import Batches, normalised
from tiny import SMALL_NETWORKS, draw_category, end_well, read_json, refusal, small_flags

from models.branches.neighbors import NearestNeighbors
from models.branches.patchcore import PatchCore, means_around
from models.branches.whitening import FLOOR, Whitening
from models.networks import DEMO_NETWORK as NAME
from models.networks.backbones import BackboneSpec, build_backbone
from models.networks.wavelets import ORIENTATIONS, SCALES, WaveletPyramid, brightness_and_colour
from models.networks.weights import fingerprint
from training.options import parse_training, training_parser


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def backbone(kind: str):
    return build_backbone(BackboneSpec(kind, NAME, 96, weights="demo"))


def test_the_filters_are_the_same_to_the_last_bit_everywhere():
    marks = [fingerprint(WaveletPyramid(second_order).state_dict())[:16] for second_order in (True, False)]
    assert marks == ["b2054bdcc76dfed2", "cda3f0435407bc2e"]


def test_moduli_against_a_plain_convolution():
    net = WaveletPyramid(second_order=False)
    image = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    padded = np.pad(image[0, 0].numpy(), 3, mode="reflect")
    for index in range(ORIENTATIONS):
        wave = (net.filters[index, 0] + 1j * net.filters[index + ORIENTATIONS, 0]).numpy()
        assert abs(wave.sum()) < 1e-4
        expected = np.abs(scipy.signal.correlate2d(padded, wave.conj(), mode="valid"))[::2, ::2]
        np.testing.assert_allclose(net.moduli(image)[0, index], expected, atol=2e-6)


def test_the_widths_are_those_of_the_maps():
    for second_order in (False, True):
        net = WaveletPyramid(second_order)
        maps = net(torch.rand(2, 3, 96, 96))
        assert [tuple(layer.shape) for layer in maps] == [(2, width, 12, 12) for width in net.widths]
    assert net.widths[-1] == SCALES * (SCALES - 1) // 2 * ORIENTATIONS**2


def test_brightness_and_colour_pixel_by_pixel():
    pixels = torch.rand(1, 3, 5, 7)
    found = brightness_and_colour(pixels)[0].numpy()
    image = pixels[0].double().numpy() / pixels.double().mean().item()
    expected = np.zeros((3, 5, 7))
    for row, column in np.ndindex(5, 7):
        red, green, blue = image[:, row, column]
        light = (red + green + blue) / 3 + 0.2
        expected[:, row, column] = np.log(light), 8 * (red - green) / light, 8 * (blue - (red + green) / 2) / light
    expected -= expected.mean((1, 2), keepdims=True)
    expected[0] /= expected[0].std(ddof=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_exposure_does_not_matter_and_shading_hardly_changes_a_colour():
    pixels = 0.2 + 0.2 * torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(brightness_and_colour(0.4 * pixels), brightness_and_colour(pixels), atol=1e-4, rtol=1e-4)
    stone = torch.tensor([0.50, 0.42, 0.34])[:, None, None]
    shading = torch.linspace(0.6, 1.4, 64)
    flat, shaded = (brightness_and_colour((stone * light).expand(1, 3, 64, 64))[0] for light in (1.0, shading))
    assert flat[1:].abs().max() < 1e-4
    linear = 8 * (0.50 - 0.42) / 0.42 * (shading.max() - shading.min())  # its range, were it not over the brightness
    assert shaded[1].max() - shaded[1].min() < 0.25 * linear


def test_a_coloured_object_leaves_the_colours_around_it():
    net = WaveletPyramid(second_order=False)
    pixels = 0.3 + 0.1 * torch.rand(1, 3, 96, 96)
    with_object = pixels.clone()
    with_object[..., 32:64, 32:64] *= torch.tensor([1.3, 1.0, 0.7])[:, None, None]
    plain, changed = (net(image)[0][0, 1:] for image in (pixels, with_object))
    difference = (changed - plain).abs()
    assert difference[:, 5:7, 5:7].min() > 1
    difference[:, 4:8, 4:8] = 0
    assert difference.max() < 0.1  # their mean over the image moves by more


def test_a_flat_frames_noise_is_not_blown_up_to_texture():
    noise = torch.randint(-1, 2, (1, 1, 64, 64)) / 255
    brightness = brightness_and_colour((0.5 + 0.3 * noise).expand(1, 3, 64, 64))[:, 0]
    assert brightness.std() < 0.5
    assert brightness_and_colour((0.5 + 10 * noise).expand(1, 3, 64, 64))[:, 0].std() == pytest.approx(1, rel=1e-3)


def test_tokens_against_numpy():
    tokens = backbone("tokens")
    pixels = torch.rand(2, 3, 96, 96)
    cls, patches = tokens(normalised(pixels))
    assert patches.shape == (2, 12 * 12, tokens.dim) and cls.shape == (2, tokens.cls_dim) and tokens.grid == (12, 12)
    *first, second = (layer.flatten(2).double().numpy() for layer in tokens.net(pixels))
    first = np.concatenate(first, 1)
    for image in range(2):
        low = [np.sort(channel)[0] for channel in first[image]]  # of 144 places the half per cent is one
        high = [np.sort(channel)[-1] for channel in first[image]]
        row, columns = [], []
        for maps, weight, share in ((first[image], 1.0, 0.3), (second[image], 0.3, 0.1)):
            row += [weight * maps.mean(1), weight * np.log(maps.std(1) + 1e-3)]
            columns.append(share * np.abs(maps - maps.mean(1, keepdims=True)))
        unusual = np.abs(first[image] - first[image].mean(1, keepdims=True)) / (first[image].std(1)[:, None] + 1e-3)
        columns.insert(1, np.maximum(unusual - 1.5, 0))
        np.testing.assert_allclose(cls[image], np.concatenate([*row, low, high]), atol=2e-4)
        np.testing.assert_allclose(patches[image], np.concatenate(columns).T, atol=2e-4)


def test_an_averaged_bank_against_a_loop():
    patches, entries = torch.randn(300, 5), torch.randn(20, 5)
    entries[7] += 100  # nearest to none
    weights = torch.rand(300, dtype=torch.float64)
    sums, counts = np.zeros((20, 5)), np.zeros(20)
    for patch, weight in zip(patches.numpy(), weights.numpy(), strict=True):
        nearest = np.argmin(((entries.numpy() - patch) ** 2).sum(1))
        sums[nearest] += weight * patch
        counts[nearest] += weight
    assert counts[7] == 0
    expected = (sums[counts > 0] / counts[counts > 0, None]), counts[counts > 0]
    for ours, theirs in zip(means_around(NearestNeighbors(entries), patches, weights), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    kept = NearestNeighbors(torch.cat([patches[:9], entries]))
    for known, searched in zip(
        means_around(kept, patches, weights, 9), means_around(kept, patches, weights), strict=True
    ):
        np.testing.assert_allclose(known, searched, atol=1e-6)


def test_whitening_gives_each_map_the_same_share():
    mixing = torch.eye(9, dtype=torch.float64) + 0.3 * torch.randn(9, 9, dtype=torch.float64)  # well conditioned
    scales = torch.cat([torch.logspace(-2, -1.5, 2), torch.logspace(1, 2, 7)])
    patches = (torch.randn(20_000, 9, dtype=torch.float64) @ mixing * scales).float()
    whitened = Whitening.fit(patches, [2, 7])(patches).double()
    for block, width in ((slice(0, 2), 2), (slice(2, 9), 7)):
        correlation = np.corrcoef(patches[:, block].double().T)
        values = np.linalg.eigvalsh(correlation)
        expected = np.sort(values / (values + FLOOR)) * 9 / (2 * width)
        found = np.linalg.eigvalsh(np.cov(whitened[:, block].T, bias=True))
        np.testing.assert_allclose(found, expected, rtol=1e-2)
        total = whitened[:, block].var(0).sum().item()
        assert total == pytest.approx(9 / 2, rel=0.1)


def test_the_rounding_of_a_grey_cameras_colours_is_not_whitened_up():
    features = torch.randn(5_000, 6)
    features[:, 3:] = 1e-7 * torch.randn(5_000, 3)
    whitened = Whitening.fit(features, [3, 3])(features)
    assert whitened[:, :3].var(0).mean() == pytest.approx(1, rel=0.05)
    assert whitened[:, 3:].var(0).max() < 0.02


@pytest.mark.parametrize("excited", [0, 1, 5])
def test_a_channel_that_is_mostly_silent_does_not_outweigh_the_others(excited):
    """Untrained networks have many. Divided by next to nothing, one excited patch would be the only finding."""
    features = torch.randn(5_000, 6)
    features[:, 5] = 0
    features[:excited, 5] = 1e-3
    whitening = Whitening.fit(features, [3, 3])
    new = torch.zeros(2, 6)
    new[1, 5] = 0.1
    assert (whitening(new[1]) - whitening(new[0])).norm() < 6


def test_constants_are_part_of_the_fingerprint(monkeypatch):
    mark = fingerprint(WaveletPyramid(second_order=True).state_dict())
    monkeypatch.setattr("models.networks.wavelets.CONSTANTS", (1.0,))
    assert fingerprint(WaveletPyramid(second_order=True).state_dict()) != mark


def test_a_whitened_bank_survives_the_checkpoint(tmp_path):
    images = normalised(torch.rand(4, 3, 96, 96))
    branch = PatchCore(backbone("maps"), coreset_ratio=0.2, whiten=True, average_bank=True)
    branch.fit(Batches.of(images))
    branch.save(tmp_path / "pc.safetensors")
    again = PatchCore.load(tmp_path / "pc.safetensors")
    for expected, found in zip(branch.predict(images), again.predict(images), strict=True):
        assert torch.equal(expected, found)
    plain = PatchCore(backbone("maps"), coreset_ratio=0.2)
    plain.fit(Batches.of(images))
    assert not torch.allclose(plain.memory_bank.rows, branch.memory_bank.rows)


def test_beyond_the_patch_budget_the_bank_stays_as_large():
    images = normalised(torch.rand(12, 3, 96, 96))

    def entries(count):
        branch = PatchCore(backbone("maps"), coreset_ratio=0.2, patch_budget=5e-5, whiten=True, average_bank=True)
        branch.fit(Batches.of(images[:count], count))
        return len(branch.memory_bank.rows)

    budgeted = int(0.2 * int(5e4 / (4 * 39)))
    assert entries(1) < budgeted and entries(6) == entries(12) == budgeted


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The three branches trained with `--weights demo` on tiny frames."""
    folder = tmp_path_factory.mktemp("demo")
    draw_category(folder / "data" / "belt", train=12, good=4, anomalous=6, size=(120, 96))
    for script in SMALL_NETWORKS:
        end_well(script, *flags(folder, "--weights", "demo", "--image-size", 96, "--batch-size", 4))
    return folder


def flags(folder, *more):
    return *small_flags(folder, "test_fusion"), "--no-images", *more


def with_demo(folder, *more):
    return flags(folder, "--models-dir", folder / "other", "--weights", "demo", *more)


def test_the_defaults_are_said_and_a_flag_overrides_them(trained):
    done = end_well("train_pc", *with_demo(trained, "--image-size", 96, "--coreset-ratio", 0.2, "--no-whiten"))
    said = ("image-size 96", "coreset-ratio 0.2", "whiten False", "holdout-ratio 0.2", "patch-budget 0.1")
    for words in ("with --weights demo:", f"backbone {NAME}", *said):
        assert words in done.out.splitlines()[0]
    settings = read_json(trained / "result/belt/pc/config.json")["settings"]
    assert (settings["coreset_ratio"], settings["whiten"], settings["average_bank"]) == (0.2, False, True)


def test_the_network_of_a_package_brings_defaults_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_pc.py", "--weights", "imagenet", "--seed", "3"])
    args = parse_training(training_parser("", "wide_resnet50_2", 238, 0.5), train_ratio=1.0)
    assert (args.backbone, args.image_size, args.holdout_ratio) == ("tf_efficientnet_lite2", 256, 0.2)
    assert (args.train_ratio, args.seed) == (1.0, 3)
    assert "with --weights imagenet: backbone tf_efficientnet_lite2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--backbone", "resnet18"), [NAME, "resnet18", "--backbone"]),
        (("--image-size", 100), ["--image-size 100", "64"]),
        (("--image-size", 48), ["--image-size 48", "64"]),
        (("--normalize-contrast",), ["--normalize-contrast", NAME]),
    ],
)
def test_what_does_not_go_with_the_demo_network(tmp_path, more, words):
    draw_category(tmp_path / "data" / "belt")
    said = refusal("train_pc", *with_demo(tmp_path, *more))
    assert all(word in said for word in words)
    assert "--position-size" in refusal("train_ma_clu", *with_demo(tmp_path, "--position-size", 96))


def test_the_fusion_follows_the_checkpoints(trained):
    run, folder = ("test_fusion", *flags(trained)), trained / "result/belt/fusion"
    end_well(*run)
    assert read_json(folder / "config.json")["settings"]["fusion"] == "standardized"
    assert read_json(folder / "metrics.json")["branches"]["pc"]["image_auroc"] > 0.9
    end_well(*run, "--fusion", "paper")
    assert read_json(folder / "config.json")["settings"]["fusion"] == "paper"
    said = refusal(*run, "--lambda-map", 2)
    assert "--lambda-map" in said and "standardized" in said


def test_it_finds_what_it_has_never_seen(tmp_path):
    """Drawn scenes of another seed than the demo's, few and small: far above chance, at images and at pixels."""
    size = ("--size", 256, "--train", 30, "--good", 12, "--anomalous", 18)
    end_well(
        "make_demo_data", "--data-root", tmp_path / "data", "--category", "belt", *size, "--seed", 5, "--workers", 2
    )
    end_well("train_pc", *with_demo(tmp_path, "--image-size", 256))
    metrics = read_json(tmp_path / "result/belt/pc/metrics.json")
    assert metrics["image_auroc"] > 0.8 and metrics["pixel_auroc"] > 0.95
