"""Linear layers as the packed forward passes use them: fused, norm weights folded in, float or int8.

Both kinds offer ``project(x)`` = x W^T + b and ``add_to(stream, x)``, which adds that to the residual stream
in place. Weights are copies: the model they come from stays as it is.

Shapes: t tokens, i inputs, o outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn


class Projection(Protocol):
    def project(self, x_ti: Tensor) -> Tensor:
        """(t, i) -> (t, o)."""

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> None:
        """stream += project(x), in place; ``x_ti`` is used up."""


def fuse(
    linears: Sequence[nn.Linear], *, scale: Tensor | None = None, quantize: Literal["int8"] | None = None
) -> Projection:
    """One projection whose outputs are those of ``linears`` side by side.

    ``scale`` (i,) multiplies the inputs: the weight of the norm before. W diag(g) computes the same as a
    norm with weight g followed by W, without touching the activations once more.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])  # (o, i)
    if scale is not None:
        weight = (weight.float() * scale.detach().float()).to(weight.dtype)
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears])  # (o,)
    return Int8Projection(weight, bias) if quantize else FloatProjection(weight, bias)


class FloatProjection:
    """Keeps W^T row by row: on CPUs a product with few tokens is two to three times faster that way round."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        self._weight = weight_oi.t().contiguous()  # (i, o)
        self._bias = bias_o

    def project(self, x_ti: Tensor) -> Tensor:
        if self._bias is None:
            return x_ti @ self._weight
        return torch.addmm(self._bias, x_ti, self._weight)

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> None:
        stream_to.addmm_(x_ti, self._weight)
        if self._bias is not None:
            stream_to += self._bias


class Int8Projection:
    """8-bit activations with one scale a token, 7-bit weights with one scale an output. CPU only.

    One scale a token keeps an embedding independent of the texts beside it, and keeps the huge activations of
    a first token from coarsening all others. Weights have 7 bits because processors without VNNI add pairs of
    products in 16 bits: 255 * 63 * 2 fits, 255 * 127 * 2 does not.
    """

    _STEP = 1 / 127  # of activations that were divided by their largest magnitude
    _ZERO_POINT = 128

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        weight = weight_oi.float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 63
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # torch announces that quantised dtypes will move to another package; these kernels are faster.
            warnings.simplefilter("ignore", UserWarning)
            rows = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
            self._weight = torch.ops.quantized.linear_prepack(rows, None)
        self._bias = bias_o

    def project(self, x_ti: Tensor) -> Tensor:
        largest = _largest(x_ti)
        product = self._product(x_ti / largest)
        product *= largest
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> None:
        largest = _largest(x_ti)
        stream_to.addcmul_(self._product(x_ti.div_(largest)), largest)
        if self._bias is not None:
            stream_to += self._bias

    def _product(self, scaled_ti: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            scaled_ti, self._STEP, self._ZERO_POINT, self._weight
        )
        return product


def _largest(x_ti: Tensor) -> Tensor:
    """Largest magnitude of each row, (t, 1); several times faster than torch's (scalar) infinity norm."""
    return torch.maximum(x_ti.amax(dim=1, keepdim=True), x_ti.amin(dim=1, keepdim=True).neg_()).clamp_(
        min=1e-12
    )
