"""Linear layers as the packed forward passes use them: fused, norm weights folded in, float or int8.

Weights are copies: the model they come from stays as it is.

Shapes: t tokens, i inputs, o outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effir_ray.encoding.fused_kernels import gated

Activation = Literal["none", "gelu", "silu"]
Quantize = Literal["int8"] | None


class NotPlainError(TypeError):
    """A layer that computes more than its weight says: wrapped by an adapter, or quantised."""


class Projection(Protocol):
    bytes: int  # of the weight, in the form it is kept in

    def project(self, x_ti: Tensor, then: Activation = "none") -> Tensor:
        """then(x W^T + b), (t, o)."""

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> Tensor:
        """stream + project(x); both arguments are used up."""


def fuse(
    linears: Sequence[nn.Linear], *, scale: Tensor | None = None, quantize: Quantize = None
) -> Projection:
    """One projection whose outputs are those of ``linears`` side by side.

    ``scale`` (i,) multiplies the inputs: the weight of the norm before. W diag(g) computes the same as a
    norm with weight g followed by W, without touching the activations once more. Raises NotPlainError for
    what is no ``nn.Linear`` itself.
    """
    check_plain(*linears)
    weight = torch.cat([linear.weight.detach() for linear in linears])  # (o, i)
    if scale is not None:
        weight = (weight.float() * scale.detach().float()).to(weight.dtype)
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias.detach() for linear in linears])  # (o,)
    if quantize:
        return Int8Projection(weight, bias)
    return OneDnnProjection(weight, bias) if has_one_dnn(weight) else FloatProjection(weight, bias)


class GatedProjection:
    """silu(gate(x)) * up(x): the first half of a gated MLP."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, scale: Tensor, quantize: Quantize) -> None:
        check_plain(gate, up)
        self._both: Projection | None = None
        if quantize or not has_one_dnn(gate.weight):
            self._both = fuse([gate, up], scale=scale, quantize=quantize)
            self.bytes = self._both.bytes
            return
        gate_projection, up_projection = fuse([gate], scale=scale), fuse([up], scale=scale)
        assert isinstance(gate_projection, OneDnnProjection)
        assert isinstance(up_projection, OneDnnProjection)
        self._gate, self._up = gate_projection, up_projection
        self.bytes = gate_projection.bytes + up_projection.bytes

    def __call__(self, x_ti: Tensor) -> Tensor:
        if self._both is None:
            return self._up.multiply_by(self._gate.project(x_ti, "silu"), x_ti)
        return gated(self._both.project(x_ti))


def check_plain(*linears: nn.Module) -> None:
    """Raises NotPlainError unless all are ``nn.Linear`` itself."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise NotPlainError(f"{type(linear).__name__} instead of Linear")


def has_one_dnn(weight: Tensor) -> bool:
    """Whether ``OneDnnProjection`` works with weights like this one."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _activate(x_to: Tensor, then: Activation) -> Tensor:
    if then == "gelu":
        return F.gelu(x_to)
    return F.silu(x_to, inplace=True) if then == "silu" else x_to


class OneDnnProjection:
    """float32 on CPUs: weights in oneDNN's own layout, activation or sum computed while a tile is in cache.

    A tenth to a sixth faster than torch's addmm for hundreds of tokens, up to three times for a few.
    """

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_oi.contiguous())
        self.bytes = weight_oi.nbytes
        self._bias = bias_o

    def project(self, x_ti: Tensor, then: Activation = "none") -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_ti, self._weight, self._bias, "swish" if then == "silu" else then, [], "none"
        )
        return product

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> Tensor:
        return self._with(stream_to, x_ti, "add")

    def multiply_by(self, other_to: Tensor, x_ti: Tensor) -> Tensor:
        """other * project(x), (t, o)."""
        return self._with(other_to, x_ti, "mul")

    def _with(self, other_to: Tensor, x_ti: Tensor, how: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x_ti, other_to, self._weight, self._bias, how
        )
        return result


class FloatProjection:
    """Any device and type. Keeps W^T row by row, the faster way round for few tokens."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        self._weight = weight_oi.t().contiguous()  # (i, o)
        self.bytes = weight_oi.nbytes
        self._bias = bias_o

    def project(self, x_ti: Tensor, then: Activation = "none") -> Tensor:
        product = x_ti @ self._weight if self._bias is None else torch.addmm(self._bias, x_ti, self._weight)
        return _activate(product, then)

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> Tensor:
        stream_to.addmm_(x_ti, self._weight)
        return stream_to if self._bias is None else stream_to.add_(self._bias)


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
        self.bytes = weight_oi.numel()
        self._bias = bias_o

    def project(self, x_ti: Tensor, then: Activation = "none") -> Tensor:
        largest = _largest(x_ti)
        product = self._product(x_ti / largest).mul_(largest)
        return _activate(product if self._bias is None else product.add_(self._bias), then)

    def add_to(self, stream_to: Tensor, x_ti: Tensor) -> Tensor:
        largest = _largest(x_ti)
        stream_to.addcmul_(self._product(x_ti.div_(largest)), largest)
        return stream_to if self._bias is None else stream_to.add_(self._bias)

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
