"""Matrix products of passes on CPUs, in float32, bfloat16 and bytes.

Shapes: t tokens, i inputs and o outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from effir_ray.encoding.cpu_kernels import Activation, Kernels, Rows, weights_of
from effir_ray.encoding.sublayers import Gate
from effir_ray.hardware import cpu_features

IN_ONE = 4  # inputs that products take in one go at most, of bytes


class Product(Protocol):
    bytes: int  # of the weights, in the form they are kept in

    def __call__(self, x: Rows) -> Tensor:
        """activation(x W^T + b), (t, o), or (t, o / 2) of a gated one."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What a product computes. ``weight`` (o, i) and ``bias`` (o,) float32; of a gated one the first half is
    activated. ``lowest``: what is multiplied is never further below zero. ``times`` (i,): what its channels
    are multiplied by before they become bytes."""

    weight: Tensor
    bias: Tensor | None = None
    then: Gate | None = None
    lowest: float = 0.0
    times: Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.then is not None and self.then.gated

    def bytes(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Weights as signed bytes, what a unit of them is worth (o,), the bias with what ``lowest`` adds, and
        the byte that stands for 0 on the left."""
        weight = self.weight if self.times is None else self.weight / self.times
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
        rounded = (weight / scale[:, None]).round()
        if not self.lowest:
            return rounded.to(torch.int8), scale, self.bias, 128
        # W x = W / times (s b) - lowest * W 1, of which the last part is the same for all x.
        held = rounded * scale[:, None]
        constant = -self.lowest * (held if self.times is None else held * self.times).sum(dim=1)
        return rounded.to(torch.int8), scale, constant if self.bias is None else self.bias + constant, 0


class PanelProduct:
    """By the compiled kernels, for hundreds of tokens as fast as oneDNN, for a query's few up to three times
    faster: no weights are laid out anew, and nothing is looked up."""

    def __init__(self, linear: Linear, kernels: Kernels, computes: torch.dtype, quantized: bool) -> None:
        self._kernels, self._computes = kernels, computes
        weight, bias = linear.weight, linear.bias
        scale = zero = None
        if quantized:
            weight, scale, bias, zero_byte = linear.bytes()
            zero = zero_byte * weight.sum(dim=1, dtype=torch.int32)
        else:
            weight = weight.to(computes)
        halves = 2 if linear.gated else 1
        # Inner neurons as the second product takes them; those that are filled in are zero.
        width = _rounded_up(len(weight) // halves, IN_ONE) if linear.then else len(weight)
        inputs = _rounded_up(weight.shape[1], IN_ONE)
        weight = F.pad(weight, (0, inputs - weight.shape[1]))
        panels = self._in_panels(weight, halves)  # (columns, inputs)
        together = 4 // weight.itemsize
        lying = panels.view(-1, kernels.panel, inputs // together, together).transpose(1, 2)
        bias, scale, zero = (None if x is None else self._in_panels(x, halves) for x in (bias, scale, zero))
        activation = None if linear.then is None else linear.then.activation
        lying = lying.contiguous().flatten(2)
        self.weights = weights_of(lying, bias, scale, zero, activation, gated=linear.gated, width=width)
        self._kept = lying, bias, scale, zero
        self.bytes = lying.nbytes

    def _in_panels(self, x: Tensor, halves: int) -> Tensor:
        """(o, ...) in the order of panels, each with its part of both halves; filled up with zeros."""
        part = self._kernels.panel // halves
        split = x.view(halves, len(x) // halves, *x.shape[1:])
        missing = -split.shape[1] % part
        filled = torch.cat([split, split.new_zeros(halves, missing, *x.shape[1:])], dim=1)
        turned = filled.view(halves, -1, part, *x.shape[1:]).transpose(0, 1)
        return turned.reshape(-1, *x.shape[1:]).contiguous()

    def __call__(self, x: Rows) -> Tensor:
        return self._kernels.multiply(x, self.weights, self._computes)


class AmxProduct:
    """By oneDNN, which knows AMX: tiles of products that a compiler's vectors are no match for."""

    def __init__(self, linear: Linear, computes: torch.dtype, quantized: bool) -> None:
        self._computes, self._then, self._quantized = computes, linear.then, quantized
        if quantized:
            weight, self._scale, self._bias, self._zero = linear.bytes()
            self._zeros = torch.zeros(len(weight), dtype=torch.int64)
            self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        else:
            weight, self._bias = linear.weight.to(computes), linear.bias
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bytes = weight.nbytes

    def __call__(self, x: Rows) -> Tensor:
        if x.scale_t is None:
            left = (x.values, self._weight, self._bias)
            y: Tensor = torch.ops.mkldnn._linear_pointwise(*left, "none", [], "none")
        else:
            bytes_ = (x.values, 1.0, self._zero, self._weight, self._scale, self._zeros)
            y = torch.ops.onednn.qlinear_pointwise(*bytes_, None, 1.0, 0, torch.float32, "none", [], "none")
            y = y.mul_(x.scale_t[:, None])
            y = y if self._bias is None else y.add_(self._bias)
        if self._then is None:
            return y.to(self._computes)
        gate, up = y.chunk(2, dim=1) if self._then.gated else (y, None)
        activated = _IN_TORCH[self._then.activation](gate)
        return (activated if up is None else activated * up).to(self._computes).contiguous()


_IN_TORCH: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def make_product(linear: Linear, kernels: Kernels, computes: torch.dtype, *, quantized: bool) -> Product:
    amx = "amx_int8" if quantized else "amx_bf16"
    if amx in cpu_features() and (quantized or computes == torch.bfloat16):
        return AmxProduct(linear, computes, quantized)
    return PanelProduct(linear, kernels, computes, quantized)


def _rounded_up(n: int, step: int) -> int:
    return -(-n // step) * step
