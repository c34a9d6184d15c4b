"""Runs every combination of the equality test inside one long-lived group of processes.

Started by ``test_equality.py``: ``python equality_worker.py RANK RANKS PORT OUT``. Rank 0 writes OUT, a
``torch.save`` of {combination: what ``steps`` returns}, and a checkpoint beside it.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effir_ray.compression.sparsity.methods import parse_pattern
from effir_ray.compression.sparsity.sparsify import sparsify
from effir_ray.data.pairs import Pair
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.training.config import LoraConfig, TrainConfig
from effir_ray.training.run.loop import hollow, prepare, write_checkpoint
from effir_ray.training.step.batches import Batches
from effir_ray.training.step.elastic import ElasticStep
from effir_ray.training.step.engine import Engine, learning_rate
from effir_ray.training.step.gradcache import ContrastiveStep, encode_rows
from effir_ray.training.step.ladder import make_ladder
from effir_ray.training.step.losses import build_objective

MODEL = "random:llama:3"
STEPS = 3
SENTENCE = "a sentence that no training pair holds"
BUDGET = 64  # tokens: with GradCache each rank needs several passes a step
# Every rung skips layer 2's MLP: only the last network of a step has a gradient for it.
LADDER = make_ladder([(1, 1.0), (2, 0.5), (3, 0.25)], mlp_order=[2, 1], attention_order=[3])


@dataclass(frozen=True)
class Combination:
    ranks: int
    zero: int
    lora: bool
    grad_cache: bool
    negatives: int
    elastic: bool = False
    bfloat16: bool = False

    def __str__(self) -> str:
        kind = "lora" if self.lora else "full"
        cache = "gradcache" if self.grad_cache else "plain"
        kinds = "-elastic" * self.elastic + "-bfloat16" * self.bfloat16
        return f"{self.ranks}rank-zero{self.zero}-{kind}-{cache}-{self.negatives}neg{kinds}"


def combinations(ranks: int) -> list[Combination]:
    axes = itertools.product(range(4), (True, False), (True, False), (1, 3))
    return [Combination(ranks, *axis) for axis in axes]


def elastic(ranks: int) -> list[Combination]:
    return [Combination(ranks, zero, False, False, 1, elastic=True) for zero in range(4)]


def bfloat16(ranks: int) -> list[Combination]:
    return [Combination(ranks, zero, False, True, 3, bfloat16=True) for zero in range(4)]


def training_config(combination: Combination) -> TrainConfig:
    return TrainConfig(
        dataset="pairs in memory",
        hard_negatives=combination.negatives,
        steps=STEPS,
        batch_size=8,
        workers=combination.ranks,
        zero_stage=combination.zero,
        lora=LoraConfig(r=4, alpha=8) if combination.lora else None,
        token_budget=BUDGET if combination.grad_cache else None,
        warmup=0.34,
        elastic=LADDER if combination.elastic else (),
    )


def training_pairs() -> list[Pair]:
    """24 pairs of uneven length; some share a positive, by id or as a copy under another id, which then must
    not count as a negative.
    """
    pairs = []
    for number in range(24):
        topic = number // 2 if number % 4 < 2 else number
        positive = f"entry {topic}: " + " ".join(f"word{topic + i}" for i in range(1 + topic % 6))
        negatives = tuple(f"entry {topic + 30 + i} " + "and more " * (i * topic % 5) for i in range(3))
        pairs.append(
            Pair(
                query_id=str(number),
                query=f"which entry is about {'the ' * (number % 3)}word{topic}?",
                positives=(positive,),
                negatives=negatives,
                teacher_scores=(5.0, *(2.0 - i * topic % 3 for i in range(3))),
                positive_ids=(f"d{topic}" if topic % 4 else f"copy{number}",),
                negative_ids=tuple(f"n{topic}-{i}" for i in range(3)),
            )
        )
    return pairs


def run(combination: Combination, rank: int) -> dict[str, Any]:
    config = training_config(combination)
    retriever = load_retriever(MODEL)
    engine = prepare(retriever, config, torch.device("cpu"), bfloat16=combination.bfloat16)
    return steps(retriever, engine, config, rank)


def steps(retriever: Retriever, engine: Engine, config: TrainConfig, rank: int = 0) -> dict[str, Any]:
    """Three steps; loss and norm of each, the gradients of the first, the weights after the last."""

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=64)

    batches = Batches(training_pairs(), config, tokenize, rank=rank, world=config.workers)
    objective = build_objective(config, has_teacher_scores=True)
    step: ContrastiveStep | ElasticStep = ContrastiveStep(engine, objective, token_budget=config.token_budget)
    if config.elastic:
        step = ElasticStep(engine, retriever, objective, config, token_budget=config.token_budget)
    losses, norms, gradients = [], [], {}
    for done, batch in enumerate(batches.run()):
        outcome = step(batch)
        losses.append(outcome.loss)
        if config.token_budget:
            assert outcome.computed > outcome.tokens, "the budget was meant to force recomputation"
        if done == 0:
            gradients = trained(engine, engine.gradient)
        rate = learning_rate(done, total=STEPS, peak=1e-3, warmup=config.warmup, schedule="linear")
        norms.append(engine.step(rate))
    weights = trained(engine, lambda value: value)
    found = {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}
    return {**found, "engine": engine.name}


def save(ranks: int, rank: int, folder: Path) -> dict[str, Any]:
    """Train ZeRO-3 with LoRA for a step at a high rate; the checkpoint and an embedding from memory."""
    config = training_config(Combination(ranks, 3, True, False, 1))
    retriever = load_retriever(MODEL)
    skeleton = hollow(retriever)
    engine = prepare(retriever, config, torch.device("cpu"), bfloat16=False)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=64)

    batches = Batches(training_pairs(), config, tokenize, rank=rank, world=ranks)
    step = ContrastiveStep(engine, build_objective(config, has_teacher_scores=False))
    step(next(batches.run()))
    engine.step(1e-2)
    with torch.no_grad():
        embedding = encode_rows(engine, tokenize([SENTENCE], "document"))
    write_checkpoint(engine, skeleton, str(folder), folder)
    return {"folder": str(folder), "embedding": embedding}


def sparse(ranks: int, rank: int, zero: int) -> dict[str, torch.Tensor]:
    """Three steps on a 2:4 model with ``keep_zeros``; the weight of one projection before and after."""
    config = training_config(Combination(ranks, zero, False, False, 1))
    config = config.model_copy(update={"keep_zeros": True, "weight_decay": 0.1})
    retriever = load_retriever(MODEL)
    sparsify(retriever, "magnitude", parse_pattern("2:4"))
    weight = retriever.model.get_submodule("layers.0.mlp.up_proj").weight
    before = weight.detach().clone()
    engine = prepare(retriever, config, torch.device("cpu"), bfloat16=False)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=64)

    step = ContrastiveStep(engine, build_objective(config, has_teacher_scores=False))
    for batch in Batches(training_pairs(), config, tokenize, rank=rank, world=ranks).run():
        step(batch)
        engine.step(1e-3)
    with engine.whole([weight]):
        return {"before": before, "after": weight.detach().clone()}


def resized(ranks: int, rank: int, state: Path, first: int, last: int) -> dict[str, Any]:
    """Steps ``first`` to ``last`` of a run whose number of workers may change, from where its ``state`` was
    left; the losses, and the weights after them."""
    config = TrainConfig.model_validate(
        training_config(Combination(1, 0, True, True, 3)).model_dump() | {"workers": (1, 2)}
    )
    retriever = load_retriever(MODEL)
    engine = prepare(retriever, config, torch.device("cpu"), bfloat16=False)
    if first:
        engine.load(state)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=64)

    batches = Batches(training_pairs(), config, tokenize, rank=rank, world=ranks)
    objective = build_objective(config, has_teacher_scores=True)
    step = ContrastiveStep(engine, objective, token_budget=config.token_budget)
    losses = []
    for done, batch in zip(range(first, last), batches.run(first), strict=False):
        losses.append(step(batch).loss)
        engine.step(learning_rate(done, total=STEPS, peak=1e-3, warmup=config.warmup, schedule="linear"))
    engine.save(state)
    return {"losses": losses, "weights": trained(engine, lambda value: value), "engine": engine.name}


def resized_in_group(ranks: int, rank: int, state: Path, last: int) -> None:
    """The beginning of such a run in a group of ``ranks``, which meet at a file beside ``state``."""
    torch.set_num_threads(1)
    place = state.with_name("rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks)
    resized(ranks, rank, state, 0, last)
    dist.barrier()
    dist.destroy_process_group()


def trained(engine: Engine, read: Any) -> dict[str, torch.Tensor]:
    result = {}
    for name, parameter in engine.encoder.model.named_parameters():
        if parameter.requires_grad:
            with engine.whole([parameter]):
                result[name] = read(parameter).detach().clone().reshape(parameter.shape)
    return result


def main() -> None:
    rank, ranks, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    every = [*combinations(ranks), *elastic(ranks), *bfloat16(ranks)]
    results = {str(combination): run(combination, rank) for combination in every}
    saved = save(ranks, rank, out.with_suffix(""))
    zeros = {f"sparse-{ranks}-{zero}": sparse(ranks, rank, zero) for zero in range(4)}
    if rank == 0:
        torch.save({**results, f"saved-{ranks}": saved, **zeros}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
