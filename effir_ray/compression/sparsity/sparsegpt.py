"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates (Frantar and Alistarh, ICML 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from effir_ray.compression.sparsity.patterns import (
    Pattern,
    SemiStructured,
    Unstructured,
    group_mask,
    matrix_mask,
)

BLOCK = 128  # columns per lazy update and per mask choice: the paper's blocksize B = B_s = 128
DAMPING = 0.01  # of the mean diagonal of H, the authors' --percdamp


class Hessian:
    """Streams H = 2 X X^T / tokens, the Hessian of the layer's squared reconstruction error."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, dtype=torch.float32, device=device)  # (in, in)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: (tokens, in), real tokens only."""
        inputs = inputs.float()
        self.total += inputs.T @ inputs
        self.tokens += inputs.shape[0]

    def matrix(self) -> Tensor:
        """(in, in) float32."""
        return 2.0 * self.total / max(self.tokens, 1)


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Prune ``weight`` and let the kept weights make up for it (algorithm 1).

    Columns are handled from left to right. Pruning column j costs w_j^2 / [H_F^-1]_jj, where F are the
    columns from j on, and the optimal update of the columns still to come is -w_j / [H_F^-1]_jj *
    [H_F^-1]_j,: . Row j of the upper Cholesky factor U of H^-1 holds exactly that row, divided by the
    square root of its first entry, so U_jj^2 = [H_F^-1]_jj (section 3.3).

    weight: (out, in); hessian: (in, in). Returns (out, in) in the weight's dtype.
    """
    pruned = weight.float().clone()
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0  # inputs that never fire: their weights have no effect
    hessian[dead, dead] = 1.0
    pruned[:, dead] = 0.0
    factor = inverse_factor(hessian)
    columns = pruned.shape[1]
    width = (
        BLOCK - BLOCK % pattern.m if isinstance(pattern, SemiStructured) else BLOCK
    )  # whole groups a block
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        kept, errors = _prune_block(pruned[:, start:stop], factor[start:stop, start:stop], pattern)
        pruned[:, start:stop] = kept
        pruned[:, stop:] -= errors @ factor[start:stop, stop:]
    return pruned.to(weight.dtype)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped ``hessian``, (in, in).

    A calibration set with fewer tokens than inputs leaves H singular; the damping makes it invertible.
    """
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _prune_block(block: Tensor, factor: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """One block of columns. block: (out, b); factor: (b, b). Returns weights and scaled errors, (out, b)."""
    block = block.clone()
    diagonal = factor.diagonal()
    errors = torch.zeros_like(block)
    mask = torch.zeros_like(block, dtype=torch.bool)
    if isinstance(pattern, Unstructured):
        mask = matrix_mask((block / diagonal).square(), pattern.sparsity)
    for column in range(block.shape[1]):
        if isinstance(pattern, SemiStructured) and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            mask[:, group] = group_mask((block[:, group] / diagonal[group]).square(), pattern)
        current = block[:, column]
        kept = current.masked_fill(mask[:, column], 0.0)
        error = (current - kept) / diagonal[column]
        block[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
        block[:, column] = kept
        errors[:, column] = error
    return block, errors
