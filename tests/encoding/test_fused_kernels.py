"""The compiled kernels, here for the CPU, compute what the plain passes do."""

from __future__ import annotations

import shutil

import pytest
import torch

from effir_ray.encoding import fused_kernels
from effir_ray.encoding.fused_kernels import Fused

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@compiler
@pytest.mark.integration
def test_rotation() -> None:
    cos, sin = torch.rand(7, 1, 4), torch.rand(7, 1, 4)
    for heads in (3, 5):
        x = torch.randn(7, heads, 8)
        expected = fused_kernels.rotate(x, cos, sin)
        torch.testing.assert_close(fused_kernels.rotate.compiled(x, cos, sin), expected)


@compiler
@pytest.mark.integration
def test_gate() -> None:
    for tokens in (5, 9):
        x = torch.randn(tokens, 12)
        found = fused_kernels.gated.compiled(x)
        torch.testing.assert_close(found, torch.nn.functional.silu(x[:, :6]) * x[:, 6:])
        torch.testing.assert_close(fused_kernels.gated(x.clone()), found)


def test_without_a_compiler_the_plain_function_is_used_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nat length")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: broken)
    fused = Fused(torch.neg, otherwise=torch.neg)
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here: no compiler$"):
        assert fused.compiled(torch.ones(2)).tolist() == [-1, -1]
    assert not fused._works


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_kernels_are_near_the_plain_passes(recwarn: pytest.WarningsRecorder) -> None:
    with torch.inference_mode():
        for tokens in (1, 7, 300):
            both = torch.randn(tokens, 9, 16, device="cuda", dtype=torch.bfloat16)
            cos, sin = torch.rand(2, tokens, 1, 8, device="cuda", dtype=torch.bfloat16)
            found = fused_kernels.rotate(both[:, 2:5], cos, sin)
            expected = fused_kernels.rotate._otherwise(both[:, 2:5], cos, sin)
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
            halves = torch.randn(tokens, 12, device="cuda", dtype=torch.bfloat16)
            found = fused_kernels.gated(halves.clone())
            expected = fused_kernels.gated._otherwise(halves)
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
    assert not [warning for warning in recwarn if "torch.compile" in str(warning.message)]
