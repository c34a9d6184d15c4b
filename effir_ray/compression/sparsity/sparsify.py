"""Unstructured and n:m sparsity of a whole retriever: what the paper compares EffiR with.

Both orders work: prune a fine-tuned model, or prune first and fine-tune with
``TrainConfig(keep_zeros=True)`` (``mask_gradients`` in a loop of one's own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effir_ray.compression.calibration import make_batches
from effir_ray.compression.depth.masking import masked, resumed
from effir_ray.compression.schedule import Unit
from effir_ray.compression.sparsity.methods import (
    Hessian,
    InputNorms,
    Pattern,
    magnitude,
    sparsegpt,
    wanda,
)
from effir_ray.encoding.padded import PaddedTexts, hidden_states
from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever
from effir_ray.progress import progress

SparsityMethod = Literal["magnitude", "wanda", "sparsegpt"]


@torch.no_grad()
def sparsify(
    retriever: Retriever,
    method: SparsityMethod,
    pattern: Pattern,
    texts: Sequence[str] = (),
    *,
    token_budget: int = 4096,
    max_length: int | None = None,
) -> float:
    """Set weights of every Linear inside the blocks to zero, in place; returns the fraction that is zero.

    ``wanda`` and ``sparsegpt`` calibrate on ``texts`` (the papers take 128 C4 passages), block after block,
    each on the outputs of the pruned blocks before it, as the authors' code does. The hidden states of all
    texts are held: tokens * hidden * 4 bytes. ``magnitude`` needs no texts; its unstructured comparison
    group is one matrix.
    Raises InputError without texts, or when a weight's width does not fit an n:m pattern.
    """
    linears = [module for _, module in retriever.family.linears(retriever.model)]
    if method == "magnitude":
        for linear in linears:
            linear.weight.copy_(magnitude(linear.weight, pattern))
    else:
        batches = list(make_batches(retriever, texts, token_budget=token_budget, max_length=max_length))
        if not batches:
            raise InputError(f"sparsity by '{method}' needs calibration texts; found none")
        _prune_blocks(retriever, method, pattern, batches)
    return zero_fraction(retriever)


def zero_fraction(retriever: Retriever) -> float:
    """Zero weights of all Linears inside the blocks over all their weights."""
    weights = [module.weight for _, module in retriever.family.linears(retriever.model)]
    return sum(int((weight == 0).sum()) for weight in weights) / max(
        1, sum(weight.numel() for weight in weights)
    )


def mask_gradients(retriever: Retriever) -> list[Any]:
    """From now on block weights that are zero get no gradient: AdamW, whose moments of them then are zero as
    well, leaves them exactly zero, whatever its weight decay. Returns the handles of the hooks.

    Called before an engine takes the model over it holds at every ZeRO stage: gradients are masked where they
    are whole, before they are summed and partitioned. A mask costs a byte a weight on every rank.
    """

    def hook(kept: Tensor) -> Any:
        return lambda gradient: gradient * kept

    return [
        module.weight.register_hook(hook(module.weight != 0))  # type: ignore[no-untyped-call]  # torch's
        for _, module in retriever.family.linears(retriever.model)
    ]


def _prune_blocks(
    retriever: Retriever, method: SparsityMethod, pattern: Pattern, batches: list[PaddedTexts]
) -> None:
    layers = retriever.family.layers(retriever.model)
    hidden: list[Tensor | None] = [None] * len(batches)  # what enters the block, (batch, tokens, hidden)
    with progress(f"Pruning ({method})", total=len(layers), unit="blocks") as bar:
        for index, layer in enumerate(layers):
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            statistics = [_statistic(method, linear) for linear in linears]
            for batch, inputs in zip(batches, hidden, strict=True):
                with _collected(linears, statistics, batch.attention_mask.bool()):
                    _run_block(retriever, index, batch, inputs)
            for linear, statistic in zip(linears, statistics, strict=True):
                linear.weight.copy_(_pruned(linear.weight, statistic, pattern))
            hidden = [
                _run_block(retriever, index, batch, inputs)
                for batch, inputs in zip(batches, hidden, strict=True)
            ]
            bar.advance()


def _statistic(method: SparsityMethod, linear: nn.Linear) -> InputNorms | Hessian:
    kind = InputNorms if method == "wanda" else Hessian
    return kind(linear.in_features, linear.weight.device)


def _pruned(weight: Tensor, statistic: InputNorms | Hessian, pattern: Pattern) -> Tensor:
    if isinstance(statistic, InputNorms):
        return wanda(weight, statistic.norms(), pattern)
    return sparsegpt(weight, statistic.matrix(), pattern)


@contextmanager
def _collected(
    linears: list[nn.Linear], statistics: list[InputNorms | Hessian], real: Tensor
) -> Iterator[None]:
    """Inside, every Linear adds its inputs at real tokens to its statistic. real: bool (batch, tokens)."""

    def hook(statistic: InputNorms | Hessian) -> Any:
        return lambda module, args: statistic.add(args[0][real.to(args[0].device)])

    with ExitStack() as stack:
        for linear, statistic in zip(linears, statistics, strict=True):
            stack.callback(linear.register_forward_pre_hook(hook(statistic)).remove)
        yield


def _run_block(retriever: Retriever, index: int, batch: PaddedTexts, inputs: Tensor | None) -> Tensor:
    """Output of one block, (batch, tokens, hidden); ``inputs`` None starts from the embeddings (block 0)."""
    last = len(retriever.family.layers(retriever.model))
    outputs: list[Tensor] = []

    def keep(layer: int, unit: Unit, before: Tensor, after: Tensor) -> None:
        if unit == "block" and layer == index:
            outputs.append(after)

    with ExitStack() as stack:
        if inputs is not None:
            stack.enter_context(resumed(retriever, index, inputs))
        stack.enter_context(masked(retriever, [("block", later) for later in range(index + 1, last)]))
        stack.enter_context(retriever.family.watch(retriever.model, keep))
        hidden_states(retriever, batch)
    return outputs[0]
