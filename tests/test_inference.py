"""Attention by oneDNN against torch's own in double precision."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from models.networks.kernels import OneDNNAttention, onednn_available

attention = F.scaled_dot_product_attention


def tokens():
    """Queries, keys and values [2, 3, 37, 16] as a ViT's layer cuts them out of one tensor."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 37, 3, 3, 16, generator=generator).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_equals_attention_in_double_precision(threads, mode):
    query, key, value = tokens()
    with mode(), OneDNNAttention():
        result = attention(query, key, value, dropout_p=0.0, attn_mask=None, is_causal=False)
    expected = attention(query.double(), key.double(), value.double())
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 2e-6
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.ones(37, 37).tril() > 0}, {"scale": 0.3}], ids=str
)
def test_leaves_other_attention_to_torch(options):
    with OneDNNAttention():
        result = attention(*tokens(), **options)
    assert torch.equal(result, attention(*tokens(), **options))
    assert (result - attention(*tokens())).abs().max() > 1e-3


@pytest.mark.skipif(not onednn_available(), reason="this CPU has no AVX-512")
def test_a_vit_goes_through_it(monkeypatch):
    import models.networks.kernels
    from models.networks.backbones import BackboneSpec, build_backbone

    calls = []
    ours = models.networks.kernels._attention
    monkeypatch.setattr(models.networks.kernels, "_attention", lambda *heads: calls.append(1) or ours(*heads))
    backbone = build_backbone(BackboneSpec("tokens", "test_vit", 64, weights="random"))
    backbone(torch.zeros(1, 3, 64, 64))
    assert len(calls) == len(backbone.net.blocks)
