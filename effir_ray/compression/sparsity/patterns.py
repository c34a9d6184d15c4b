"""Which weights of a matrix a sparsity pattern removes, given a score for every weight."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from effir_ray.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SemiStructured:
    """n:m sparsity: ``n`` weights of every ``m`` consecutive inputs of a row are zero (GPUs run 2:4)."""

    n: int
    m: int


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """``sparsity``: the fraction of weights removed, anywhere."""

    sparsity: float


Pattern = SemiStructured | Unstructured


def parse_pattern(text: str) -> Pattern:
    """``"2:4"`` or a fraction such as ``"0.5"``."""
    group = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if group:
        n, m = int(group[1]), int(group[2])
        if 0 < n < m:
            return SemiStructured(n=n, m=m)
    else:
        try:
            sparsity = float(text)
        except ValueError:
            sparsity = -1.0
        if 0 < sparsity < 1:
            return Unstructured(sparsity=sparsity)
    raise InputError(
        f"sparsity pattern {text!r}; expected n:m with 0 < n < m (2:4) or a fraction between 0 and 1"
    )


def group_mask(scores: Tensor, pattern: SemiStructured) -> Tensor:
    """True where a weight goes: the ``n`` lowest of each group of ``m``.

    scores: (out, in), ``in`` a multiple of ``m``. Returns bool (out, in).
    """
    rows, columns = scores.shape
    if columns % pattern.m:
        raise InputError(
            f"a weight with {columns} inputs has no {pattern.n}:{pattern.m} pattern; "
            f"expected a multiple of {pattern.m}"
        )
    groups = scores.reshape(rows, columns // pattern.m, pattern.m)
    lowest = groups.topk(pattern.n, dim=-1, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).reshape(rows, columns)


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True for the lowest ``sparsity`` of every row: weights compared an output neuron (Wanda, section 3).

    scores: (out, in). Returns bool (out, in).
    """
    count = int(scores.shape[1] * sparsity)
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def matrix_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True for the lowest ``sparsity`` of the whole matrix (magnitude pruning's comparison group)."""
    count = int(scores.numel() * sparsity)
    lowest = scores.flatten().argsort(stable=True)[:count]
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[lowest] = True
    return mask.reshape(scores.shape)
