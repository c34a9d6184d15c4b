"""Which weights of one matrix go: patterns, and magnitude, Wanda and SparseGPT as functions of a matrix.

Wanda: Sun et al., ICLR 2024, weight times input norm. SparseGPT: Frantar and Alistarh, ICML 2023, one-shot
pruning with optimal-brain-surgeon updates.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from effir_ray.errors import InputError

BLOCK = 128  # SparseGPT: columns per lazy update and per mask choice: the paper's blocksize B = B_s = 128
DAMPING = 0.01  # of the mean diagonal of H, the authors' --percdamp


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


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """The pruned weight (out, in), by |W_ij|; without a pattern weights of the whole matrix are compared."""
    scores = weight.float().abs()
    if isinstance(pattern, SemiStructured):
        return weight.masked_fill(group_mask(scores, pattern), 0.0)
    return weight.masked_fill(matrix_mask(scores, pattern.sparsity), 0.0)


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


def wanda(weight: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """The pruned weight, by |W_ij| * ||X_j||_2 (equation 1); kept weights are not changed.

    weight: (out, in); norms: (in,).
    """
    scores = weight.float().abs() * norms
    if isinstance(pattern, SemiStructured):
        mask = group_mask(scores, pattern)
    else:
        mask = row_mask(scores, pattern.sparsity)
    return weight.masked_fill(mask, 0.0)


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
