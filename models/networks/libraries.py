"""Networks from timm and torchvision, cut after the last layer in use, and their weights put in place.

Only public names of the two libraries are used. Importing them takes seconds: import this module where it is needed.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.networks.spec import BackboneSpec
from models.networks.weights import StateDict, fingerprint, reason, state_dict_of
from utils.errors import InputError
from utils.packages import importing

with importing():
    import timm
    import torchvision
    from timm.layers import PatchEmbed, resample_abs_pos_embed
    from timm.models import Eva, VisionTransformer, create_feature_extractor

COUNTER = "num_batches_tracked"  # a batch norm counts its training steps; nothing computed here depends on it
logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of each tensor that a file has beyond those in use


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
def patch_side(name: str) -> int | None:
    """Pixels along a patch of ViT `name` (tokens: class, registers, patches row by row); None for other networks."""
    if not timm.is_model(name):
        return None
    net = outline(name)
    is_vit = isinstance(net, VisionTransformer | Eva) and isinstance(net.patch_embed, PatchEmbed)
    return max(net.patch_embed.patch_size) if is_vit else None


def full_network(name: str) -> nn.Module:
    """The uncut network at its own input size, with the libraries' random initial values."""
    if timm.is_model(name):
        return timm.create_model(name, num_classes=0)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra)


def outline(name: str) -> nn.Module:
    """The uncut network without memory for its weights: for shapes and names."""
    return _without_memory(lambda: full_network(name))


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """The network on the meta device, unless it computes with values that no file of weights has."""
    try:
        with torch.device("meta"):
            net = make()
        saved = net.state_dict().keys()
        complete = all(name in saved for name, _ in net.named_buffers())  # rotary embeddings are not saved
    except RuntimeError:  # its constructor reads values of tensors, as most did in older releases of timm
        complete = False
    if not complete:
        with torch.random.fork_rng(devices=[]):
            net = make()
    return net


def vit(name: str, image_size: int) -> nn.Module:
    """ViT for images of this size, no head, no pooling; weights not yet loaded."""
    options = {"num_classes": 0, "img_size": image_size, "dynamic_img_size": False}
    net = _without_memory(lambda: timm.create_model(name, **options))
    net.attn_pool, net.fc_norm = None, nn.Identity()  # the pooled head's
    return net


def check_divisible(name: str, size: int, flag: str) -> None:
    """Raise InputError, with the nearest sizes, unless ViT `name` can cut `size` pixels into patches."""
    patch = patch_side(name)
    if size % patch or size < patch:
        below = size // patch * patch
        nearest = " or ".join(str(fit) for fit in (below, below + patch) if fit > 0)
        raise InputError(f"{flag} {size} is not a multiple of the patch size {patch} of {name}; nearest: {nearest}")


class FeatureMaps(nn.Module):
    """Images [B, 3, S, S] -> feature maps [B, C, h, w] of `net`, which is cut after the last of them.

    `stages` are the maps' numbers among those of a timm network; None for an extractor, which knows its own.
    """

    shapes: list[tuple[int, int, int]]  # of the maps: C, h, w

    def __init__(self, net: nn.Module, stages: Sequence[int] | None) -> None:
        super().__init__()
        self.stages = None if stages is None else net.prune_intermediate_layers(list(stages))
        self.net = net

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.stages is None:
            return list(self.net(images).values())
        return self.net.forward_intermediates(images, indices=self.stages, intermediates_only=True)

    def drop_unused(self, image_size: int) -> FeatureMaps:
        """Take out the parts that no map depends on: what pruning leaves differs between timm's releases."""
        parameters = [value for value in self.parameters() if value.requires_grad]
        total = sum(found.sum() for found in self(_blank(self, image_size)))
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        unused = {id(value) for value, gradient in zip(parameters, gradients, strict=True) if gradient is None}
        for name, part in list(self.net.named_children()):
            own = {id(value) for value in part.parameters()}
            if own and own <= unused and not isinstance(part, nn.ModuleList):  # a pass goes through the lists
                setattr(self.net, name, nn.Identity())
        return self


def _blank(net: nn.Module, image_size: int) -> Tensor:
    return torch.zeros(1, 3, image_size, image_size, device=next(net.parameters()).device)


def cnn(name: str, strides: tuple[int, ...] | None, image_size: int) -> FeatureMaps:
    """Network for maps of the given strides, or with None for the last one of stride 16 or less; weights not loaded.

    Raises InputError where the network has no such maps, or does not take images of this size.
    """
    maps = _feature_maps(name, strides).eval()
    try:
        with torch.no_grad():
            maps.shapes = [tuple(found.shape[1:]) for found in maps(_blank(maps, image_size))]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"--image-size {image_size} does not suit this network ({reason(error)})") from None
    return maps


@torch.inference_mode(False)  # gradients tell what is not used, whatever the caller computes without
@torch.enable_grad()
def _feature_maps(name: str, strides: tuple[int, ...] | None) -> FeatureMaps:
    net = outline(name).eval()
    size = timm.data.resolve_model_data_config(net)["input_size"][-1] if timm.is_model(name) else 512
    try:
        if hasattr(net, "forward_intermediates"):
            with torch.no_grad():
                found = net.forward_intermediates(_blank(net, size), intermediates_only=True)
            chosen = _choose(name, [_stride(size, stage) for stage in found], strides)
            return FeatureMaps(net, chosen).drop_unused(size)
        if timm.is_model(name):
            available = {stage["module"]: stage["reduction"] for stage in net.feature_info}
        else:
            available = _strides_of_modules(outline(name).eval(), size)
        chosen = _choose(name, list(available.values()), strides)
        return FeatureMaps(create_feature_extractor(net, [list(available)[index] for index in chosen]), None)
    except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as error:
        raise InputError(f"--backbone {name}: no feature maps can be had of it ({reason(error)})") from None


def _stride(image_size: int, found: Tensor) -> int:
    return 2 ** round(math.log2(image_size / found.shape[-1]))  # without padding the quotient is no whole number


def _choose(name: str, available: Sequence[int], strides: Sequence[int] | None) -> list[int]:
    """Positions in `available` of the last map of each stride asked for, or of the coarsest of at most 16."""
    last = {stride: index for index, stride in enumerate(available)}
    strides = strides or [max((stride for stride in last if stride <= 16), default=16)]
    if not last.keys() >= set(strides):
        raise InputError(
            f"--backbone {name} has no maps of stride {' and '.join(map(str, strides))} (it has {sorted(last)}); "
            "take a CNN such as wide_resnet50_2 or resnet18"
        )
    return [last[stride] for stride in strides]


@torch.no_grad()
def _strides_of_modules(net: nn.Module, image_size: int) -> dict[str, int]:
    """The modules, at most two names deep, whose output is a map: in the order of a pass, with its stride."""
    strides: dict[str, int] = {}

    def note(module: nn.Module, inputs: tuple, output: object, path: str) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            strides.pop(path, None)
            strides[path] = _stride(image_size, output)

    for path, module in net.named_modules():
        if 0 < len(path.split(".")) <= 2 and not path.startswith("classifier"):
            module.register_forward_hook(functools.partial(note, path=path))
    net(_blank(net, image_size))
    return strides


def load_weights(net: nn.Module, spec: BackboneSpec, flag: str = "--weights") -> str:
    """Put the weights of `spec`, as timm, torchvision or the authors publish them, into `net`, its network.

    Returns the fingerprint of what is used. A ViT's position embeddings are resampled to the spec's position size, if
    it has one, then to the size of `net`. Raises InputError that names what is missing or has another shape or, with
    `flag`, weights that cannot be had.
    """
    name, source = spec.name, spec.source
    state = state_dict_of(spec, functools.partial(full_network, name), flag)
    target = net.net if isinstance(net, FeatureMaps) else net
    expected = target.state_dict()
    needed = [key for key in expected if not key.endswith(COUNTER)]
    if not state.keys() >= set(needed) and timm.is_model(name):
        state = state | _in_timm_layout(name, state)
    missing = [key for key in needed if key not in state]
    if missing:
        raise InputError(
            f"weights {source} do not fit {name}: {len(missing)} of {len(needed)} missing: {_few(missing)}"
        )
    used = {key: state[key] for key in needed}
    mark = fingerprint(used)
    used = {key: value.float() if value.is_floating_point() else value for key, value in used.items()}
    if "pos_embed" in used:
        used["pos_embed"] = _resample(used["pos_embed"], target, spec.position_size)
    wrong = [
        f"{key} {list(value.shape)}, expected {list(expected[key].shape)}"
        for key, value in used.items()
        if value.shape != expected[key].shape
    ]
    if wrong:
        raise InputError(f"weights {source} do not fit {name}: {len(wrong)} of another shape: {_few(wrong)}")
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected if key.endswith(COUNTER)}
    target.load_state_dict(used | counters, assign=True)
    net.requires_grad_(False).eval()
    return mark


def _in_timm_layout(name: str, state: StateDict) -> StateDict:
    """`state` under timm's names and in its shapes, as far as timm's own loader makes anything of it.

    timm does not say what the loader has found: that shows from what becomes of a file full of NaN.
    """
    if "_conv_stem.weight" in state:  # the names of EfficientNet-PyTorch, whose tensors come in timm's order
        return dict(zip(outline(name).state_dict(), state.values(), strict=False))
    positions = state.get("pos_embed", torch.empty(0))
    side = patch_side(name)
    # A ViT for images as large as the file's, so that nothing is resampled.
    size = {"img_size": math.isqrt(positions.shape[1]) * side} if side and positions.dim() == 3 else {}

    def load(values: StateDict) -> StateDict:
        # Another number of classes than the network's: the loader then minds neither missing nor further tensors.
        overlay = {"state_dict": values, "custom_load": False, "num_classes": 1}
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **size)
        return net.state_dict()

    blank = {key: torch.full_like(value, math.nan) for key, value in state.items() if value.is_floating_point()}
    try:
        with torch.random.fork_rng(devices=[]):
            found, marked = load(state), load(blank)
    except Exception:  # timm's converters trust their input; a foreign file may break them anywhere
        return {}
    return {key: value for key, value in found.items() if marked[key].isnan().all()}


def _resample(positions: Tensor, net: nn.Module, first_size: int | None) -> Tensor:
    """A file's position embeddings [1, P + n * n, D], of P prefix tokens, for `net`; as they are if that fails."""
    grid = net.patch_embed.grid_size
    prefix = net.pos_embed.shape[1] - grid[0] * grid[1]
    patch = net.patch_embed.patch_size
    grids = [[first_size // patch[0], first_size // patch[1]]] if first_size else []
    try:
        for rows, columns in [*grids, grid]:
            positions = resample_abs_pos_embed(positions, [rows, columns], num_prefix_tokens=prefix)
    except (RuntimeError, IndexError, AssertionError):
        pass
    return positions


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
