"""Wanda and SparseGPT against direct dense implementations of the papers' equations."""

import pytest
import torch

from effir_ray.compression.sparsity.methods import (
    DAMPING,
    Hessian,
    InputNorms,
    SemiStructured,
    Unstructured,
    parse_pattern,
    sparsegpt,
    wanda,
)
from effir_ray.errors import InputError

PATTERNS = [
    SemiStructured(n=2, m=4),
    SemiStructured(n=4, m=8),
    Unstructured(sparsity=0.5),
    Unstructured(sparsity=0.3),
]


def layer(columns: int = 24, rows: int = 10, tokens: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, columns) and correlated inputs (tokens, columns)."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing * torch.linspace(0.2, 3, columns)
    return torch.randn(rows, columns, generator=generator), inputs


def statistics(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    norms, hessian = InputNorms(inputs.shape[1], inputs.device), Hessian(inputs.shape[1], inputs.device)
    for part in inputs.split(17):
        norms.add(part)
        hessian.add(part)
    return norms.norms(), hessian.matrix()


def dense_wanda(
    weight: torch.Tensor, inputs: torch.Tensor, pattern: SemiStructured | Unstructured
) -> torch.Tensor:
    rows, columns = weight.shape
    result = weight.clone()
    for i in range(rows):
        scores = [abs(float(weight[i, j])) * float(torch.linalg.norm(inputs[:, j])) for j in range(columns)]
        if isinstance(pattern, SemiStructured):
            for start in range(0, columns, pattern.m):
                group = sorted(range(start, start + pattern.m), key=lambda j: scores[j])
                result[i, group[: pattern.n]] = 0
        else:
            result[i, sorted(range(columns), key=lambda j: scores[j])[: int(columns * pattern.sparsity)]] = 0
    return result


def dense_sparsegpt(
    weight: torch.Tensor, inputs: torch.Tensor, pattern: SemiStructured | Unstructured
) -> torch.Tensor:
    """Column by column with explicit inverses of the remaining Hessian, in float64."""
    rows, columns = weight.shape
    weight, inputs = weight.double().clone(), inputs.double()
    hessian = 2 * inputs.T @ inputs / len(inputs)
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [
        torch.linalg.inv(hessian[j:, j:]) for j in range(columns)
    ]  # H_F^-1 with F = columns from j on
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    remove = torch.zeros(rows, columns, dtype=torch.bool)
    if isinstance(pattern, Unstructured):
        order = (weight.square() / cost).flatten().argsort()
        remove.view(-1)[order[: int(weight.numel() * pattern.sparsity)]] = True
    for j in range(columns):
        if isinstance(pattern, SemiStructured) and j % pattern.m == 0:
            for i in range(rows):
                saliency = weight[i, j : j + pattern.m] ** 2 / cost[j : j + pattern.m]
                remove[i, j + saliency.argsort()[: pattern.n]] = True
        for i in range(rows):
            if remove[i, j]:
                weight[i, j:] -= weight[i, j] / inverses[j][0, 0] * inverses[j][0]
                weight[i, j] = 0
    return weight


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda_equals_the_paper(pattern: SemiStructured | Unstructured) -> None:
    weight, inputs = layer()
    norms, _ = statistics(inputs)
    assert torch.equal(wanda(weight, norms, pattern), dense_wanda(weight, inputs, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_equals_the_paper(pattern: SemiStructured | Unstructured) -> None:
    weight, inputs = layer()
    pruned = sparsegpt(weight, statistics(inputs)[1], pattern)
    reference = dense_sparsegpt(weight, inputs, pattern)
    assert torch.equal(pruned == 0, reference == 0)
    torch.testing.assert_close(pruned, reference.float(), atol=2e-4, rtol=2e-4)


def test_sparsegpt_handles_blocks_wider_than_one() -> None:
    weight, inputs = layer(columns=300, rows=6, tokens=900)
    pattern = SemiStructured(n=2, m=4)
    pruned = sparsegpt(weight, statistics(inputs)[1], pattern)
    reference = dense_sparsegpt(weight, inputs, pattern)
    agree = ((pruned == 0) == (reference == 0)).float().mean()
    assert agree > 0.999  # two nearly equal costs may change places in float32
    assert torch.equal((pruned == 0).reshape(6, 75, 4).sum(-1), torch.full((6, 75), 2))


def test_reconstruction_error_is_ordered_as_published() -> None:
    weight, inputs = layer(columns=64, rows=32, tokens=400)
    norms, hessian = statistics(inputs)
    pattern = SemiStructured(n=2, m=4)

    def error(pruned: torch.Tensor) -> float:
        return float((inputs @ (weight - pruned).T).square().sum())

    magnitude = error(wanda(weight, torch.ones_like(norms), pattern))
    by_wanda, by_sparsegpt = error(wanda(weight, norms, pattern)), error(sparsegpt(weight, hessian, pattern))
    assert by_sparsegpt < by_wanda < magnitude


def test_inputs_that_never_fire_lose_their_weights() -> None:
    weight, inputs = layer()
    inputs[:, 5] = 0
    pruned = sparsegpt(weight, statistics(inputs)[1], Unstructured(sparsity=0.25))
    assert torch.equal(pruned[:, 5], torch.zeros(len(weight)))
    assert pruned.isfinite().all()


@pytest.mark.parametrize("text", ["4:2", "0:4", "1.0", "0", "half", "2-4"])
def test_impossible_patterns_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="sparsity pattern"):
        parse_pattern(text)


def test_patterns_are_read() -> None:
    assert parse_pattern("2:4") == SemiStructured(n=2, m=4)
    assert parse_pattern("0.5") == Unstructured(sparsity=0.5)
    with pytest.raises(InputError, match="multiple of 4"):
        wanda(torch.ones(2, 6), torch.ones(6), SemiStructured(n=2, m=4))
