"""Networks from timm and torchvision, cut after the last layer in use, and their weights put in place."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence

import timm
import torch
import torchvision
from timm.models import Eva, VisionTransformer
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from models.networks.weights import StateDict, fingerprint, reason
from utils.errors import InputError

COUNTER = "num_batches_tracked"  # a batch norm counts its training steps; nothing computed here depends on it
FILTERS = (
    "checkpoint_filter_fn",
    "_filter_fn",
    "_filter_torchvision_pretrained",
)  # timm's names for one thing


def check_name(name: str) -> None:
    """Raise InputError, with close matches, unless timm or torchvision knows a network of this name."""
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise InputError(f"--backbone {name}: {base} has no weights '{tag}'; known: {', '.join(tags) or 'none'}")
    elif name not in torchvision.models.list_models(torchvision.models):
        known = timm.list_models() + timm.list_pretrained() + torchvision.models.list_models(torchvision.models)
        close = difflib.get_close_matches(name, known, n=4)
        hint = f"did you mean {', '.join(dict.fromkeys(close))}?" if close else "see timm.list_models()"
        raise InputError(f"--backbone {name}: timm and torchvision know no such network; {hint}")


@functools.cache
def is_vit(name: str) -> bool:
    """Whether `name` is a ViT whose tokens are class token, registers, then the patches row by row."""
    if not timm.is_model(name):
        return False
    net = outline(name)
    return isinstance(net, VisionTransformer | Eva) and hasattr(net.patch_embed, "set_input_size")


def full_network(name: str) -> nn.Module:
    """The uncut network at its own input size, with the libraries' random initial values."""
    if timm.is_model(name):
        return timm.create_model(name, num_classes=0)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra)


def outline(name: str) -> nn.Module:
    """The uncut network without memory for its weights: for shapes and names."""
    return _without_memory(functools.partial(full_network, name))


def vit(name: str, position_size: int) -> nn.Module:
    """ViT with position embeddings for `position_size` pixels, no head, no pooling; weights not yet loaded.

    Raises InputError where the patch size does not divide `position_size`.
    """
    check_divisible(name, position_size, "--position-size")

    def make() -> nn.Module:
        net = timm.create_model(name, num_classes=0, img_size=position_size, dynamic_img_size=False)
        net.fc_norm = nn.Identity()  # belongs to the pooled head
        if hasattr(net, "attn_pool"):
            net.attn_pool = None
        return net

    return _without_memory(make)


def check_divisible(name: str, size: int, flag: str) -> None:
    """Raise InputError, with the nearest sizes, unless ViT `name` can cut `size` pixels into patches."""
    patch = max(outline(name).patch_embed.patch_size)
    if size % patch or size < patch:
        below = size // patch * patch
        nearest = " or ".join(str(fit) for fit in (below, below + patch) if fit > 0)
        raise InputError(f"{flag} {size} is not a multiple of the patch size {patch} of {name}; nearest: {nearest}")


def cnn(name: str, strides: Sequence[int] | None) -> nn.Module:
    """Network for `maps`, without anything that comes after the last one; weights not yet loaded.

    The maps are those of the given strides, or with None the last one of stride 16 or less. Raises InputError
    where the network has no such maps.
    """
    if not timm.is_model(name):
        return _torchvision_cnn(name, strides)

    def make(indices: Sequence[int] | None = None) -> nn.Module:
        return timm.create_model(name, features_only=True, feature_cls="getter", out_indices=indices)

    try:
        with torch.device("meta"):
            info = make().feature_info
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"--backbone {name}: no feature maps can be had of it ({reason(error)})") from None
    chosen = _choose(name, info.reduction(), strides)
    return _without_memory(functools.partial(make, [info.out_indices[index] for index in chosen]))


def maps(net: nn.Module, images: Tensor) -> list[Tensor]:
    """Feature maps [B, C, h, w] of a network made by `cnn`."""
    found = net(images)
    return list(found.values()) if isinstance(found, dict) else found


def map_shapes(net: nn.Module, image_size: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) of a `cnn`'s maps. Raises InputError where it does not take such images."""
    image = torch.empty(1, 3, image_size, image_size, device=next(net.parameters()).device)
    try:
        with torch.no_grad():
            return [tuple(found.shape[1:]) for found in maps(net.eval(), image)]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"--image-size {image_size} does not suit this network ({reason(error)})") from None


def _choose(name: str, available: Sequence[int], strides: Sequence[int] | None) -> list[int]:
    """Positions in `available` of the last map of each stride asked for, or of the last of at most 16."""
    if strides is None:
        fine = [index for index, stride in enumerate(available) if stride <= 16]
        chosen = fine[-1:]
    else:
        last = {stride: index for index, stride in enumerate(available)}
        chosen = [last[stride] for stride in strides if stride in last]
    if len(chosen) < len(strides or (16,)):
        asked = " and ".join(map(str, strides)) if strides else "16 or less"
        raise InputError(
            f"--backbone {name} has no maps of stride {asked} (it has {sorted(set(available))}); "
            "take a CNN such as wide_resnet50_2 or resnet18"
        )
    return chosen


def _torchvision_cnn(name: str, strides: Sequence[int] | None) -> nn.Module:
    """`cnn` for names that only torchvision has: maps are outputs of modules at most two names deep."""
    size = 512
    found: dict[str, int] = {}

    def note(module: nn.Module, inputs: tuple, output: object, path: str) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            found.pop(path, None)
            found[path] = 2 ** round(math.log2(size / output.shape[-1]))  # without padding it is not a whole number

    net = outline(name).eval()
    for path, module in net.named_modules():
        if 0 < len(path.split(".")) <= 2 and not path.startswith("classifier"):
            module.register_forward_hook(functools.partial(note, path=path))
    try:
        with torch.no_grad():
            net(torch.empty(1, 3, size, size, device=next(net.parameters()).device))
        chosen = [list(found)[index] for index in _choose(name, list(found.values()), strides)]
        return create_feature_extractor(outline(name).eval(), chosen)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"--backbone {name}: no feature maps can be had of it ({reason(error)})") from None


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """The network on the meta device, unless it computes with values that no file of weights has."""
    try:
        with torch.device("meta"):
            net = make()
        saved = net.state_dict().keys()
        complete = all(name in saved for name, _ in net.named_buffers())  # rotary embeddings are not saved
    except NotImplementedError:  # its constructor reads values of tensors
        complete = False
    if not complete:
        with torch.random.fork_rng(devices=[]):
            net = make()
    return net


def load_weights(net: nn.Module, name: str, state: StateDict, source: str) -> str:
    """Put `state`, laid out as timm, torchvision or the authors publish, into `net`; returns a fingerprint.

    The fingerprint is that of the tensors in use as published: it does not depend on the kind of file, on an
    unused classifier or on the input size. Raises InputError that names what is missing or has another shape.
    """
    target = net.model if isinstance(net, FeatureGetterNet) else net
    needed = {key: value for key, value in target.state_dict().items() if not key.endswith(COUNTER)}
    try:
        state = _in_timm_layout(name, state, outline(name), keep_positions=True)
    except Exception as error:  # timm's converters trust their input; a foreign file may break them anywhere
        raise InputError(f"weights {source} are not those of {name} ({reason(error)})") from None
    missing = [key for key in needed if key not in state]
    if missing:
        raise InputError(
            f"weights {source} do not fit {name}: {len(missing)} of {len(needed)} missing: {_few(missing)}"
        )
    used = {key: state[key] for key in needed}
    mark = fingerprint(used)
    used = {key: value.float() if value.is_floating_point() else value for key, value in used.items()}
    try:
        placed = _in_timm_layout(name, used, target, keep_positions=False)
    except (RuntimeError, IndexError, AssertionError):
        placed = used  # position embeddings that cannot be resampled fail the next check
    wrong = [
        f"{key} {list(placed[key].shape)}, expected {list(value.shape)}"
        for key, value in needed.items()
        if placed[key].shape != value.shape
    ]
    if wrong:
        raise InputError(f"weights {source} do not fit {name}: {len(wrong)} of another shape: {_few(wrong)}")
    counters = {key: torch.zeros((), dtype=torch.long) for key in target.state_dict() if key.endswith(COUNTER)}
    target.load_state_dict(placed | counters, assign=True)
    net.requires_grad_(False).eval()
    return mark


def _in_timm_layout(name: str, state: StateDict, net: nn.Module, keep_positions: bool) -> StateDict:
    """What timm's own loader makes of a published state dict; with `keep_positions` without resampling."""
    if not timm.is_model(name):
        return state
    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    convert = next((getattr(module, known) for known in FILTERS if hasattr(module, known)), None)
    if convert is None:
        return state
    if keep_positions and getattr(net, "pos_embed", None) is not None:
        net.pos_embed = None  # the converters then leave the file's embeddings alone
    arguments = (dict(state), net)[: len(inspect.signature(convert).parameters)]
    return convert(*arguments)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
