"""The three branches and their fusion in the plain, published way: one image at a time, float32, nothing shared.

Written from the paper's formulas, without any of the project's modules for them; the network's weights and the
fitted statistics are handed in, so that both programs must give the same numbers.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from models.networks import libraries
from models.networks.spec import BackboneSpec
from models.networks.weights import state_dict_of
from utils.checkpoint import load_checkpoint

BRANCHES = {"ma_clu", "ma2patch", "pc"}
LAMBDA_OBJECT, LAMBDA_MAP, COAL = 0.01, 1.0, 1.14


def whole_network(spec: BackboneSpec) -> nn.Module:
    """The network of `spec` in float32: a ViT of timm, or a CNN with all its layers, of torchvision if it has that."""
    if spec.kind == "tokens":
        net = timm.create_model(spec.name, num_classes=0, img_size=spec.image_size)
        libraries.load_weights(net, spec)
        return net.eval()
    known = spec.name in torchvision.models.list_models()
    net = torchvision.models.get_model(spec.name, weights=None) if known else timm.create_model(spec.name)
    state = state_dict_of(spec, lambda: libraries.full_network(spec.name), "--weights")
    net.load_state_dict(state, strict=False)
    return net.eval()


def layer_maps(net: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """layer2 and layer3 [1, C, h, w] by hooks, the network running to its end."""
    kept = []
    hooks = [layer[-1].register_forward_hook(lambda *call: kept.append(call[2])) for layer in (net.layer2, net.layer3)]
    with torch.no_grad():
        net(image)
    for hook in hooks:
        hook.remove()
    return tuple(kept)


def vit_tokens(net: nn.Module, image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """CLS token [D] and patch tokens [N, D] of one image [1, 3, S, S]."""
    with torch.no_grad():
        tokens = net.forward_features(image)[0]
    return tokens[0].cpu().numpy(), tokens[net.num_prefix_tokens :].cpu().numpy()


def mahalanobis(vector: np.ndarray, mean: np.ndarray, inverse: np.ndarray) -> float:
    deviation = vector.astype(np.float64) - mean
    return float(np.sqrt(max(deviation @ inverse @ deviation, 0) + 1e-12))


def ma_clu(cls: np.ndarray, tokens: np.ndarray, state: dict[str, np.ndarray], size: int) -> tuple[float, np.ndarray]:
    """Score and map [size, size] of MACLU."""
    to_coal, to_belt = (np.sqrt(((tokens - center) ** 2).sum(1)) for center in state["centers"])
    confidence = to_belt / (to_coal + 1e-8)
    belt = to_belt < to_coal
    if belt.any():
        confidence = np.where(confidence > COAL, confidence[belt].mean(), confidence)
    small = confidence.reshape((round(len(confidence) ** 0.5),) * 2).astype(np.float32)
    whole = cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR)
    whole = (whole - whole.min()) / np.ptp(whole) if np.ptp(whole) > 1e-8 else np.zeros_like(whole)
    return mahalanobis(cls, state["mean"], state["inverse"]), gaussian_filter(whole, 4)


def ma2patch(tokens: np.ndarray, state: dict[str, np.ndarray], size: int) -> tuple[float, np.ndarray]:
    """Score and map [size, size] of MA2Patch: the distance taken anew with each patch left out."""
    tokens = tokens.astype(np.float64)
    count, total = len(tokens), tokens.sum(0)
    whole = mahalanobis(total / count, state["mean"], state["inverse"])
    without = (total - tokens) / (count - 1) - state["mean"]
    distances = np.sqrt(np.maximum(((without @ state["inverse"]) * without).sum(1), 0) + 1e-12)
    small = np.abs(whole - distances).reshape((round(count**0.5),) * 2).astype(np.float32)
    return whole, gaussian_filter(cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR), 4)


def patch_features(fine: Tensor, coarse: Tensor) -> Tensor:
    """Layer maps of one image -> patch features [h*w, D]."""
    grid = fine.shape[-2:]
    parts = [F.adaptive_avg_pool2d(F.avg_pool2d(part, 3, 1), grid)[0] for part in (fine, coarse)]
    return torch.cat(parts).reshape(-1, grid[0] * grid[1]).T


def nearest(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and index of the nearest bank row, by the whole matrix of distances."""
    return torch.cdist(queries, bank).min(1)


def patchcore(features: Tensor, bank: Tensor, size: int, neighbors: int = 3) -> tuple[float, np.ndarray]:
    """Score and map [size, size] of PatchCore for the features [N, D] of one image."""
    distances, entries = nearest(features, bank)
    strangest = int(distances.argmax())
    largest, entry = distances[strangest], bank[entries[strangest]]
    around = torch.cdist(entry[None], bank)[0].topk(neighbors, largest=False).indices[1:]
    scale = features.shape[1] ** 0.5
    reach = torch.exp((features[strangest] - bank[around]).norm(dim=1) / scale).sum()
    score = float((1 - torch.exp(largest / scale) / reach) * largest)
    small = distances.reshape((round(len(distances) ** 0.5),) * 2)
    small = (small - small.min()) / (small.max() - small.min() + 1e-8)
    whole = F.interpolate(small[None, None], (size, size), mode="bilinear")[0, 0].cpu().numpy()
    return score, gaussian_filter(whole, 4)


def sampled(patches: Tensor, size: int) -> list[int]:
    """Plain greedy k-centre: at each step the difference of every patch to the centre chosen last."""
    chosen, distances = [0], torch.full((len(patches),), torch.inf, device=patches.device)
    while len(chosen) < size:
        difference = patches - patches[chosen[-1]]
        distances = torch.minimum(distances, difference.square().sum(1))
        chosen.append(int(distances.argmax()))
    return chosen


class PublishedLoop:
    """One image [1, 3, S, S] -> scores and maps by part; networks and statistics are handed in."""

    def __init__(self, nets: dict[str, nn.Module], states: dict[str, dict[str, Tensor]], sizes: dict[str, int]) -> None:
        self.nets, self.sizes = nets, sizes
        self.states = {
            name: {key: value.double().cpu().numpy() for key, value in state.items()} for name, state in states.items()
        }
        self.bank = states["pc"]["bank"]

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> PublishedLoop:
        """The three branches of the checkpoints in `folder`."""
        nets, states, sizes = {}, {}, {}
        for name in sorted(BRANCHES):
            states[name], metadata = load_checkpoint(folder / f"{name}.safetensors")
            spec = BackboneSpec.from_dict(metadata["backbone"])
            nets[name], sizes[name] = whole_network(spec).to(device), spec.image_size
        states["pc"]["bank"] = states["pc"]["bank"].to(device)
        return cls(nets, states, sizes)

    def __call__(self, image: Tensor) -> dict[str, tuple[float, np.ndarray]]:
        inputs = {}
        for name, size in self.sizes.items():
            same = image.shape[-1] == size
            inputs[name] = image if same else F.interpolate(image, (size, size), mode="bilinear", antialias=True)
        cls, tokens = vit_tokens(self.nets["ma_clu"], inputs["ma_clu"])
        parts = {"ma_clu": ma_clu(cls, tokens, self.states["ma_clu"], self.sizes["ma_clu"])}
        tokens = vit_tokens(self.nets["ma2patch"], inputs["ma2patch"])[1]
        parts["ma2patch"] = ma2patch(tokens, self.states["ma2patch"], self.sizes["ma2patch"])
        features = patch_features(*layer_maps(self.nets["pc"], inputs["pc"]))
        parts["pc"] = patchcore(features, self.bank, self.sizes["pc"])
        size = max(self.sizes.values())
        product = np.ones((size, size), np.float32)
        for _, part in parts.values():
            product *= cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
        score = LAMBDA_OBJECT * parts["ma_clu"][0] + parts["pc"][0] + LAMBDA_MAP * float(product.max())
        return {"fusion": (score, cv2.GaussianBlur(product, (5, 5), 1)), **parts}
