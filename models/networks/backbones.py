"""Frozen networks as feature extractors: tokens for MACLU and MA2Patch, layer maps for PatchCore."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.loading import IMAGENET_MEAN, IMAGENET_STD
from models.networks import DEMO_NETWORK
from models.networks.cuda import use_cuda_kernels
from models.networks.folding import fold_batch_norms, fold_layer_scales, fuse_gelus
from models.networks.kernels import GELULinear, OneDNN, onednn_gains
from models.networks.spec import HALF, BackboneSpec, resolve_precision
from models.networks.wavelets import COPIED, SIZE_STEP, STRIDE, WaveletPyramid, class_token, patch_tokens
from models.networks.weights import fingerprint, imagenet_file
from utils.errors import InputError
from utils.gpu import CapturedPasses

SMALLEST_MAP = 3  # PatchCore pools 3 x 3 without padding


class Backbone(nn.Module):
    """A frozen network in evaluation mode: no gradients, outputs always float32.

    In half precision the weights are rounded once, after loading; normalisations and softmax still compute in float32.
    "tf32" is a global switch of torch and not set here.

    A subclass's `extract` gives, in any precision, what `forward` returns, from images normalised for the network.
    """

    def __init__(self, net: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.dtype = torch.float32
        self.register_buffer("finite", torch.tensor(True), persistent=False)  # whether all outputs so far were
        normalizations = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "own_mean": spec.mean, "own_std": spec.std}
        for name, values in normalizations.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.passes: Callable[[Tensor], tuple[Tensor, ...]] = self._pass
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.finite.device

    def train(self, mode: bool = True) -> Backbone:
        """Does nothing: the network stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of images [B, 3, S, S], normalised as ImageNet's, where S is the spec's image size.

        On a CPU the outputs are checked for values that are not finite. On a GPU the caller does it by `check_finite`,
        because checking each batch would wait for the device.
        """
        if images.shape[-2:] != (self.spec.image_size,) * 2:
            raise ValueError(f"images are {tuple(images.shape[-2:])}, the backbone takes {self.spec.image_size}")
        with torch.no_grad():
            outputs = self.passes(images)
        if self.device.type == "cpu":
            self.check_finite()
        return outputs

    def features(self, images: Tensor, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, ...]:
        if self.spec.normalize_contrast:  # each image minus its mean colour, over the deviation of its grey values
            pixels = self.pixels(images)
            pixels = pixels - pixels.mean((2, 3), keepdim=True)
            images = pixels / pixels.mean(1, keepdim=True).std((2, 3), keepdim=True).clamp(min=1e-3)
        elif (self.spec.mean, self.spec.std) != (IMAGENET_MEAN, IMAGENET_STD):
            images = (self.pixels(images) - self.own_mean) / self.own_std
        images = images.to(self.dtype, memory_format=layout)
        return tuple(output.float() for output in self.extract(images))

    def _pass(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.features(images, torch.channels_last)
        for output in outputs:
            self.finite.logical_and_(torch.linalg.vector_norm(output, torch.inf).isfinite())
        return outputs

    def check_finite(self) -> None:
        """Raise InputError if any output so far was not finite; waits for the device."""
        if not self.finite:
            raise InputError(
                f"{self.spec.name} with weights {self.spec.source} gives values that are not finite numbers; check the "
                "weights, or give --precision fp32"
            )

    def pixels(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], normalised as ImageNet's -> the pixels before, 0 to 1."""
        return images * self.std + self.mean

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] of 0 to 1 -> images normalised as ImageNet's."""
        return (pixels - self.mean) / self.std

    def finish(self, device: str, precision: str) -> None:
        """Done once the weights are loaded: rounding, memory layout, and the kernels of the device."""
        self.to(device)  # a GPU folds and rounds them much faster
        if self.spec.weights != "demo":
            fold_batch_norms(self.net)
            fold_layer_scales(self.net)
        self.dtype = HALF.get(precision, torch.float32)
        self.net.to(self.dtype, memory_format=torch.channels_last)
        if self.device.type == "cuda":
            if any(type(module) is nn.ReLU for module in self.net.modules()):
                # cuDNN's fused ones may make 0 of what is no number: a spoilt network shows now.
                torch.backends.cudnn.benchmark = False  # not for one image
                self(torch.randn(1, 3, *[self.spec.image_size] * 2, device=device))
                self.check_finite()
            torch.backends.cudnn.benchmark = True  # shapes are few and fixed
            self.net = use_cuda_kernels(self.net, self.dtype, self.device)
            self.passes = CapturedPasses(self._pass)
        elif self.device.type == "cpu" and self.spec.weights != "demo" and onednn_gains(self.dtype):
            fuse_gelus(self.net, GELULinear)
            self.passes = OneDNN()(self._pass)


class TokenBackbone(Backbone):
    """Images [B, 3, S, S] -> CLS [B, E], patch tokens [B, N, D] row by row: `grid` h * w = N, `dim` D, `cls_dim` E."""

    grid: tuple[int, int]
    dim: int

    @property
    def cls_dim(self) -> int:
        return self.dim


class ViTTokens(TokenBackbone):
    """A ViT's tokens after its final norm, without registers. If it has no class token, CLS is the patches' mean.

    ViTs that normalise only after pooling (timm's "gap" family) give tokens as they come from the last block.
    """

    def __init__(self, net: nn.Module, spec: BackboneSpec) -> None:
        super().__init__(net, spec)
        self.grid = net.patch_embed.grid_size
        self.dim = net.embed_dim

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.net.forward_features(images)
        patches = tokens[:, self.net.num_prefix_tokens :]
        cls = patches.mean(1) if self.net.cls_token is None else tokens[:, 0]
        return cls, patches


class CNNTokens(TokenBackbone):
    """A CNN's last map of stride 16 or less as patch tokens, its global average as CLS token."""

    def __init__(self, net: nn.Module, spec: BackboneSpec) -> None:
        super().__init__(net, spec)
        ((self.dim, *grid),) = net.shapes
        self.grid = tuple(grid)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        (last,) = self.net(images)
        return last.mean((2, 3)), last.flatten(2).transpose(1, 2)


class Demo(Backbone):
    """The bundled network. Half precision applies to its filters only; everything after them stays float32."""

    def __init__(self, net: WaveletPyramid, spec: BackboneSpec) -> None:
        super().__init__(net, spec)
        self.grid = (spec.image_size // STRIDE,) * 2
        self.widths = net.widths

    def finish(self, device: str, precision: str) -> None:
        super().finish(device, "fp32")
        if precision in HALF:
            self.passes = torch.autocast(self.device.type, HALF[precision])(self.passes)


class DemoTokens(Demo, TokenBackbone):
    """The bundled network: a patch token tells how unusual its place is in the image, CLS what the image is like."""

    @property
    def dim(self) -> int:
        *first, second = self.widths
        return 2 * sum(first) + second

    @property
    def cls_dim(self) -> int:
        return 2 * self.dim  # mean and deviation, low and high, where a patch token has one

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        *first, second = self.net(self.pixels(images))
        first = torch.cat(first, 1)
        return class_token(first, second), patch_tokens(first, second)


class MapBackbone(Backbone):
    """Images [B, 3, S, S] -> maps [B, C, h, w], the finest first."""

    grid: tuple[int, int]  # of the finest map
    widths: list[int]  # channels of the maps; `dim` is all of them together
    neighborhood: int  # side of the square over which PatchCore averages a map

    @property
    def dim(self) -> int:
        return sum(self.widths)


class DemoMaps(Demo, MapBackbone):
    """The bundled network without its second order; its maps are local averages already.

    The outermost places, whose wavelets see the frame's mirror image, have the values of those next to them.
    """

    neighborhood = 1

    def extract(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.net(self.pixels(images))
        inner = slice(COPIED, -COPIED)
        return tuple(F.pad(layer[..., inner, inner], [COPIED] * 4, mode="replicate") for layer in maps)


class CNNMaps(MapBackbone):
    """A CNN's maps of stride 8 and 16 (a ResNet's layer2 and layer3)."""

    neighborhood = 3

    def __init__(self, net: nn.Module, spec: BackboneSpec) -> None:
        super().__init__(net, spec)
        self.grid = net.shapes[0][1:]
        self.widths = [channels for channels, *_ in net.shapes]
        if min(net.shapes[-1][1:]) < SMALLEST_MAP:
            raise InputError(
                f"--image-size {spec.image_size} is too small for {spec.name}: its coarser map must have "
                f"{SMALLEST_MAP} x {SMALLEST_MAP} places or more; take at least {16 * SMALLEST_MAP}"
            )

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self.net(images))


def build_backbone(
    spec: BackboneSpec,
    device: str = "cpu",
    weights: str | None = None,
    precision: str = "auto",
    flag: str = "--weights",
) -> TokenBackbone | MapBackbone:
    """Build the network of `spec`, load its weights and move it to `device`.

    `weights` overrides where the weights come from. `precision` "auto" is fp32 on a CPU; on a GPU the spec's,
    or the best there is if the spec has none. Raises InputError: unknown network, a size that does not suit
    it, weights that cannot be had or do not fit, or other weights than those of the spec's fingerprint.
    """
    if weights is not None:
        if spec.weights == "demo" != weights:
            raise InputError(f"{flag} {weights} has no effect with {spec.name}, the bundled network; leave it out")
        spec = spec.with_weights(weights)
    backbone = empty_backbone(spec)
    if spec.weights == "demo":
        mark = fingerprint(backbone.net.state_dict())
    else:
        from models.networks import libraries

        mark = libraries.load_weights(backbone.net, spec, flag)
    if spec.fingerprint not in (None, mark):
        remedy = "train again" if spec.weights == "demo" else f"give the right file with {flag}, or train again"
        raise InputError(
            f"fitted with weights {spec.fingerprint[:12]} of {spec.name}, but {spec.source} has {mark[:12]}; {remedy}"
        )
    precision = resolve_precision(spec.precision, precision, device)
    backbone.spec = dataclasses.replace(spec, fingerprint=mark, precision=precision)
    backbone.finish(device, precision)
    return backbone


def empty_backbone(spec: BackboneSpec) -> TokenBackbone | MapBackbone:
    """The network of `spec` without weights, or memory for them: nothing is downloaded. Raises InputError as above."""
    backbone = _demo_backbone(spec) if spec.weights == "demo" else _library_backbone(spec)
    if spec.position_size is not None and getattr(backbone.net, "pos_embed", None) is None:
        raise InputError(f"--position-size has no effect with {spec.name}, a network without position embeddings")
    return backbone


def _library_backbone(spec: BackboneSpec) -> ViTTokens | CNNTokens | CNNMaps:
    from models.networks import libraries  # not at the top: the bundled network need not wait for timm and torchvision

    libraries.check_name(spec.name)
    if spec.weights == "imagenet":
        imagenet_file(spec.name)  # a missing package is an error now, not after the images were looked at
    if spec.kind == "tokens" and libraries.patch_side(spec.name):
        libraries.check_divisible(spec.name, spec.image_size, "--image-size")
        if spec.position_size is not None:
            libraries.check_divisible(spec.name, spec.position_size, "--position-size")
        return ViTTokens(libraries.vit(spec.name, spec.image_size), spec)
    if spec.kind == "tokens":
        return CNNTokens(libraries.cnn(spec.name, None, spec.image_size), spec)
    return CNNMaps(libraries.cnn(spec.name, (8, 16), spec.image_size), spec)


def _demo_backbone(spec: BackboneSpec) -> DemoTokens | DemoMaps:
    if spec.name != DEMO_NETWORK:
        raise InputError(
            f"the demo network is {DEMO_NETWORK}, not {spec.name}; leave out --backbone, or take other weights"
        )
    if spec.normalize_contrast:
        raise InputError(
            f"--normalize-contrast has no effect with {spec.name}, which normalises each image itself; train without it"
        )
    if spec.image_size % SIZE_STEP or spec.image_size < 4 * SIZE_STEP:
        raise InputError(f"--image-size {spec.image_size}: the demo network takes {4 * SIZE_STEP}, {5 * SIZE_STEP} …")
    tokens = spec.kind == "tokens"
    return (DemoTokens if tokens else DemoMaps)(WaveletPyramid(second_order=tokens), spec)
