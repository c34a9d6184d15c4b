"""What lies between the matrix products of a pass, as one kernel each on GPUs.

The products themselves stay with cuBLAS; what compiling a whole block would gain is that the steps between
them read and write their activations once instead of three to six times.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Pointwise = Callable[..., Tensor]


class Fused:
    """``function`` compiled by torch, at its first call, for tensors on a GPU where there is a compiler;
    ``otherwise`` everywhere else.
    """

    def __init__(self, function: Pointwise, *, otherwise: Pointwise) -> None:
        self._function, self._otherwise = function, otherwise
        self._compiled: Pointwise | None = None
        self._works = True

    def __call__(self, *tensors: Tensor) -> Tensor:
        if not tensors[0].is_cuda or not self._works:
            return self._otherwise(*tensors)
        return self.compiled(*tensors)

    def compiled(self, *tensors: Tensor) -> Tensor:
        """The compiled ``function``, whatever the device."""
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=True)
        try:
            return self._compiled(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._works = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"torch.compile does not work here: {reason}", RuntimeWarning, stacklevel=2)
            return self._otherwise(*tensors)


def _rotate(x_tnd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_tnd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotate_in_passes(x_tnd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pass writes where the result lies."""
    first, second = x_tnd.chunk(2, dim=-1)
    rotated = torch.empty(x_tnd.shape, dtype=x_tnd.dtype, device=x_tnd.device)
    low, high = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return rotated


def _gate(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=1)
    return F.silu(gate) * up


def _gate_in_passes(gate_and_up: Tensor) -> Tensor:
    """Uses up its argument."""
    gate, up = gate_and_up.chunk(2, dim=1)
    return F.silu(gate, inplace=True).mul_(up)


rotate = Fused(_rotate, otherwise=_rotate_in_passes)
"""(t, n, d) turned by cos and sin (t, 1, d / 2): rotary positions (arXiv 2104.09864), Hugging Face's layout,
where channel c turns with channel c + d / 2."""

gated = Fused(_gate, otherwise=_gate_in_passes)
"""(t, 2 o) -> (t, o): silu of the first half times the second half (arXiv 2002.05202). Uses up its
argument."""
