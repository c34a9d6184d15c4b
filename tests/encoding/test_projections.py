"""Projections: every kind computes what the linear layers, norms and activations it replaces compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effir_ray.encoding import projections
from effir_ray.encoding.projections import FloatProjection, GatedProjection, OneDnnProjection, fuse

TOLERANCE = {"one_dnn": 1e-5, "float": 1e-5, "int8": 0.05}


@pytest.fixture(params=TOLERANCE)
def kind(request, monkeypatch):
    if request.param == "float":
        monkeypatch.setattr(projections, "has_one_dnn", lambda weight: False)
    return request.param


def layers(bias=True):
    torch.manual_seed(0)
    return [nn.Linear(24, outputs, bias=bias) for outputs in (16, 8)]


def quantize(kind):
    return "int8" if kind == "int8" else None


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_outputs_side_by_side_with_the_scale_of_a_norm(kind, tokens, bias):
    linears, scale, x = layers(bias), torch.rand(24) + 0.5, torch.randn(tokens, 24)
    expected = torch.cat([linear(x * scale) for linear in linears], dim=1)
    got = fuse(linears, scale=scale, quantize=quantize(kind)).project(x.clone())
    torch.testing.assert_close(got, expected, atol=TOLERANCE[kind], rtol=0)


@pytest.mark.parametrize(("then", "function"), [("gelu", F.gelu), ("silu", F.silu)])
@torch.no_grad()
def test_activations(kind, then, function):
    linears, x = layers(), torch.randn(5, 24)
    expected = function(torch.cat([linear(x) for linear in linears], dim=1))
    got = fuse(linears, quantize=quantize(kind)).project(x.clone(), then)
    torch.testing.assert_close(got, expected, atol=TOLERANCE[kind], rtol=0)


@torch.no_grad()
def test_sum_with_the_residual_stream(kind):
    linear, x, stream = layers()[0], torch.randn(5, 24), torch.randn(5, 16)
    expected = stream + linear(x)
    got = fuse([linear], quantize=quantize(kind)).add_to(stream.clone(), x.clone())
    torch.testing.assert_close(got, expected, atol=TOLERANCE[kind], rtol=0)


@torch.no_grad()
def test_gated(kind):
    torch.manual_seed(1)
    gate, up = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    scale, x = torch.rand(24) + 0.5, torch.randn(9, 24)
    expected = F.silu(gate(x * scale)) * up(x * scale)
    got = GatedProjection(gate, up, scale, quantize(kind))(x.clone())
    torch.testing.assert_close(got, expected, atol=TOLERANCE[kind], rtol=0)


def test_one_dnn_is_for_float32_on_cpus():
    linear = layers()[0]
    if torch.backends.mkldnn.is_available():
        assert isinstance(fuse([linear]), OneDnnProjection)
    assert isinstance(fuse([linear.to(torch.bfloat16)]), FloatProjection)
