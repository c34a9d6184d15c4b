"""Wanda: prune by weight times input norm (Sun et al., ICLR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from effir_ray.compression.sparsity.patterns import Pattern, SemiStructured, group_mask, row_mask


class InputNorms:
    """Streams ||X_j||_2, the norm of every input feature over all calibration tokens."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)  # (in,)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (tokens, in), real tokens only."""
        self.squares += inputs.double().square().sum(dim=0)
        self.tokens += inputs.shape[0]

    def norms(self) -> Tensor:
        """(in,) float32."""
        return self.squares.sqrt().float()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2 (equation 1). weight: (out, in); norms: (in,). Returns (out, in) float32."""
    return weight.float().abs() * norms


def wanda(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """The pruned weight; kept weights are not changed. weight: (out, in); norms: (in,)."""
    scores = wanda_scores(weight, norms)
    if isinstance(pattern, SemiStructured):
        mask = group_mask(scores, pattern)
    else:
        mask = row_mask(scores, pattern.sparsity)
    return weight.masked_fill(mask, 0.0)
