"""What makes inference fast, compared with the plain way to compute the same."""

import contextlib
import random
import types
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from stand_in import noise
from timm.layers import LayerScale
from torch import nn

from models import Part
from models.networks import backbones, kernels, libraries
from models.networks.backbones import BackboneSpec, build_backbone
from models.networks.folding import fold_batch_norms, fold_layer_scales, fuse_relus
from models.networks.kernels import OneDNN, onednn_gains
from utils.gpu import CapturedPasses, Graph
from utils.timing import Lap, Stopwatch

attention = F.scaled_dot_product_attention
TOKENS = 137
works = pytest.mark.skipif(not onednn_gains(torch.float32), reason="oneDNN is not made for this CPU")


def tokens():
    """Queries, keys and values [2, 3, 137, 16] as a ViT's layer cuts them out of one tensor."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, TOKENS, 3, 3, 16, generator=generator).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_equals_attention_in_double_precision(threads, mode):
    query, key, value = tokens()
    with mode(), OneDNN():
        result = attention(query, key, value, dropout_p=0.0, attn_mask=None, is_causal=False)
    expected = attention(query.double(), key.double(), value.double())
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 2e-6
    assert torch.get_num_threads() == threads


def test_attention_in_half_precision_keeps_its_scores_in_float32():
    query, key, value = (10 * part for part in tokens())  # scores near 100: rounded, they would be wrong by a half
    halves = [part.bfloat16() for part in (query, key, value)]
    with OneDNN():
        result = attention(*halves)
    expected = attention(*(half.double() for half in halves))
    assert result.dtype == torch.bfloat16
    assert (result - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.ones(TOKENS, TOKENS).tril() > 0}, {"scale": 0.3}], ids=str
)
def test_leaves_other_attention_to_torch(options):
    with OneDNN():
        result = attention(*tokens(), **options)
    assert torch.equal(result, attention(*tokens(), **options))
    assert (result - attention(*tokens())).abs().max() > 1e-3


@works
def test_networks_go_through_it(monkeypatch):
    calls = Counter()
    for name in ("_linear", "_conv2d", "_attention"):
        ours = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, ours=ours: calls.update([name]) or ours(*a))
    vit = build_backbone(BackboneSpec("tokens", "test_vit", 192, weights="random"))
    vit(torch.zeros(1, 3, 192, 192))
    blocks = len(vit.net.blocks)
    heads = vit.net.blocks[0].attn.num_heads
    assert calls == {"_linear": (4 + 2 * heads) * blocks, "_conv2d": 1, "_attention": blocks}
    calls.clear()
    resnet = build_backbone(BackboneSpec("maps", "resnet18", 64, weights="random"))
    resnet(torch.zeros(1, 3, 64, 64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in resnet.modules())
    assert calls == {"_conv2d": 15}


def missing(*arguments):
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def with_another_signature(*arguments):
    raise RuntimeError("_linear_pointwise() is missing value for argument 'scratchpad'")


def wrong(x, weight, bias, activation="none"):
    return F.linear(x, weight, bias) * 1.01


@works
@pytest.mark.parametrize("kernel", [missing, with_another_signature, wrong])
def test_kernels_that_are_not_what_they_were_are_refused(monkeypatch, kernel):
    assert kernels.onednn_pays.__wrapped__(torch.float32)
    monkeypatch.setattr(kernels, "_linear", kernel)
    assert not kernels.onednn_pays.__wrapped__(torch.float32)


@pytest.mark.parametrize(("slowdown", "gains"), [(0.5, True), (1.2, True), (2.0, False)])
def test_the_probe_takes_onednn_unless_it_is_clearly_slower(monkeypatch, slowdown, gains):
    """On a busy machine some turns take three times as long; they must not decide."""
    busy = random.Random(5)
    seconds = [time * busy.choice([1.0, 1.0, 3.0]) for _ in range(kernels.TURNS) for time in (slowdown, 1.0)]
    assert {slowdown, 1.0} <= set(seconds) and max(seconds) > 2
    turns = iter(seconds)
    monkeypatch.setattr(kernels, "timeit", lambda work, number: next(turns))
    assert kernels.onednn_pays.__wrapped__(torch.float32) == gains


NETWORKS = [
    ("tokens", "test_vit", 192),
    ("tokens", "regnetx_002", 64),
    ("maps", "test_resnet", 64),
    ("maps", "resnet18", 64),
]


@pytest.mark.parametrize(("kind", "name", "size"), NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_and_without_onednn(monkeypatch, kind, name, size, precision):
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    images = noise(size)
    found = []
    for gains in (True, False):
        monkeypatch.setattr(backbones, "onednn_gains", lambda dtype, gains=gains: gains)
        found.append(build_backbone(BackboneSpec(kind, name, size, weights="random"), precision=precision)(images))
    limit = {"fp32": 1e-5, "bf16": 0.03}[precision]
    for one, other in zip(*found, strict=True):
        assert (one - other).square().mean().sqrt() <= limit * other.square().mean().sqrt()


# Folding


def test_layer_scales_are_folded_into_the_weights():
    net = timm.create_model("test_vit", img_size=64, init_values=0.3, num_classes=0).eval().requires_grad_(False)
    images = noise(64)
    for block in net.blocks:
        block.ls1.gamma.uniform_(0.1, 2)
    before = net.forward_features(images)
    fold_layer_scales(net)
    assert not any(isinstance(module, LayerScale) for module in net.modules())
    assert (net.forward_features(images) - before).abs().max() < 1e-5 * before.abs().max()


class PlainFused(nn.Module):
    """What a kernel of the device computes, in torch's own words."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, added=None):
        return F.relu(self.conv(x) if added is None else self.conv(x) + added)


class Twice(nn.Module):
    """A convolution whose result is used twice, one called twice, and a sum with a number."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.first(x)
        y = self.relu(y) + y
        z = self.relu(self.again(y)) + self.again(x)
        return self.relu(self.last(z) + 1)


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])
def test_relus_are_fused_with_the_convolutions_before_them(name):
    net = libraries.cnn(name, (8, 16), 64)
    libraries.load_weights(net, BackboneSpec("maps", name, 64, weights="random"))
    fold_batch_norms(net)
    images = noise(64)
    before = net(images)
    fused = fuse_relus(net, PlainFused)
    kinds = {type(module) for module in fused.modules()}
    assert PlainFused in kinds and nn.ReLU not in kinds
    for one, other in zip(fused(images), before, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_fused_stays():
    net, images = Twice().eval().requires_grad_(False), torch.randn(2, 3, 5, 5)
    before = net(images)
    fused = fuse_relus(net, PlainFused)
    assert torch.equal(fused(images), before)
    assert not any(isinstance(module, PlainFused) for module in fused.modules())


# CUDA graphs, without a GPU


@pytest.fixture
def passes(monkeypatch):
    """Captured passes of a function that notes the sizes it was called with, and what replays a graph on the CPU."""
    called = []

    def double(images):
        called.append(len(images))
        return (2 * images,)

    passes = CapturedPasses(double)

    def capture(images):
        inputs, outputs = images.clone(), double(images)
        replay = types.SimpleNamespace(replay=lambda: outputs[0].copy_(2 * inputs))
        return Graph(replay, inputs, outputs, [])

    monkeypatch.setattr(passes, "_capture", capture)
    passes.called = called
    return passes


def test_a_batch_size_is_captured_when_it_comes_again(passes):
    batches = [torch.randn(count, 3, 4, 4) for count in (8, 8, 8, 5, 8, 3, 3, 1)]
    results = [passes(batch) for batch in batches]
    for batch, (result,) in zip(batches, results, strict=True):
        assert torch.equal(result, 2 * batch)
    assert passes.called == [8, 8, 3, 3, 1]  # as usual, captured; five of eight filled up; three as usual, captured
    assert sorted(passes.graphs) == [3, 8]


def test_a_replay_keeps_the_shape_of_the_result_and_the_stopwatches(monkeypatch):
    """Parts by name, of which a filled-up batch gives the first rows; the captured laps count once a replay."""
    watch = Stopwatch()
    passes = CapturedPasses(lambda batch: {"pc": Part(batch[:, 0], batch)}, [watch])
    lap = Lap("score", *(types.SimpleNamespace(synchronize=int, elapsed_time=lambda end: 500.0) for _ in range(2)))

    def capture(batch):
        inputs = batch.clone()
        return Graph(types.SimpleNamespace(replay=int), inputs, passes.compute(inputs), [[lap]])

    monkeypatch.setattr(passes, "_capture", capture)
    for rows in (3, 3, 2):
        batch = torch.randn(rows, 4)
        part = passes(batch)["pc"]
        assert torch.equal(part.maps, batch) and torch.equal(part.scores, batch[:, 0]) and part.low is None
    assert watch.seconds == {"score": 1.0}  # two replays of half a second


def test_what_cannot_be_captured_runs_as_usual(passes, monkeypatch):
    def refuse(images):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(passes, "_capture", refuse)
    batch = torch.randn(2, 3, 4, 4)
    for _ in range(3):
        assert torch.equal(passes(batch)[0], 2 * batch)
    assert not passes.graphs and passes.called == [2, 2, 2] and "not permitted" in passes.obstacle


# A GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("kind", "name", "size"), NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_against_cpu(kind, name, size, precision):
    """The first pass, the captured ones and a filled-up one."""
    spec = BackboneSpec(kind, name, size, weights="random")
    images = noise(size, 4)
    gpu, cpu = build_backbone(spec, "cuda", precision=precision), build_backbone(spec)(images)
    limit = {"fp32": 1e-3, "bf16": 0.03, "fp16": 0.03}[precision]
    for count in (4, 4, 4, 3):
        for one, other in zip(gpu(images[:count].cuda()), cpu, strict=True):
            error = one.cpu() - other[:count]
            assert one.dtype == torch.float32
            assert error.square().mean().sqrt() <= limit * other.square().mean().sqrt()
    assert sorted(gpu.passes.graphs) == [4]
