"""Elastic training: one fine-tune whose every rung of a ladder is a usable retriever afterwards.

Every step trains the largest network, the smallest one and a few rungs between (the sandwich rule, Yu and
Huang 2019, arXiv 1903.05134). The smaller ones learn from the labels and from the largest one's ranking of
the batch (in-place distillation, there; KL to the full model in Starbucks, arXiv 2410.13230), or, where the
settings name a teacher, all of them from that one. Their gradients are averaged. A rung is the full model
with sublayers skipped and neurons beyond its width silenced, which is what physical surgery computes;
``extract`` performs that surgery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from effir_ray.compression.depth.masking import Sublayer, masked
from effir_ray.compression.planning import within
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.width.neurons import on_neurons, sort_neurons
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.training.step.batches import Batch
from effir_ray.training.step.engine import Passes
from effir_ray.training.step.gradcache import ContrastiveStep, StepOutcome, Teacher
from effir_ray.training.step.ladder import BETWEEN, Ladder, Rung
from effir_ray.training.step.losses import Objective, SimilarityDistillation

if TYPE_CHECKING:
    from effir_ray.training.config import TrainConfig


def prepare_elastic(
    model: str | Path, neuron_scores: Mapping[int, np.ndarray], out: Path, *, first_blocks: int | None = None
) -> Path:
    """The model with every MLP's neurons sorted by importance, best first, as a checkpoint in ``out``.

    What it computes is unchanged; a prefix of its neurons now is the best sub-network of that width. Train
    it with ``TrainConfig(elastic=ladder)``.
    """
    retriever = load_retriever(model, dtype="auto", first_blocks=first_blocks)
    sort_neurons(retriever, neuron_scores)
    save_checkpoint(retriever, out)
    return out


def extract(elastic: str | Path, rung: Rung, out: Path) -> Path:
    """The rung as an ordinary compressed checkpoint in ``out``, cut physically from the elastic one."""
    retriever = load_retriever(elastic)
    apply_plan(retriever, within(rung.plan(layer_widths(retriever)), retriever.plan))
    save_checkpoint(retriever, out)
    return out


def layer_widths(retriever: Retriever) -> list[int]:
    """Intermediate neurons of every layer; 0 where the MLP is gone."""
    return [retriever.family.width(layer) for layer in retriever.family.layers(retriever.model)]


@contextmanager
def selected(retriever: Retriever, rung: Rung) -> Iterator[None]:
    """Inside, the full model computes what the rung's extracted model does; gradients flow to its part only.

    Silenced neurons are still computed: a rung trains as fast as its depth allows.
    """
    dropped: list[Sublayer] = [("attention", layer) for layer in rung.drop_attention]
    dropped += [("mlp", layer) for layer in rung.drop_mlp]

    def silence(layer: int, neurons: Tensor) -> Tensor | None:
        width = neurons.shape[-1]
        kept = rung.kept(width)
        if kept == width:
            return None
        return neurons * (torch.arange(width, device=neurons.device) < kept)

    with masked(retriever, dropped), on_neurons(retriever, silence):
        yield


class ElasticStep:
    """Gradients of one batch for the largest network and some rungs; in place of ``ContrastiveStep``."""

    def __init__(
        self,
        engine: Passes,
        retriever: Retriever,
        objective: Objective,
        config: TrainConfig,
        *,
        token_budget: int | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """``teacher``: for terms of ``objective`` that need one. With one every network has the same terms;
        the smaller ones otherwise take the largest one for theirs, beside the labels."""
        self._retriever, self._ladder, self._seed = retriever, config.elastic, config.seed
        self.token_budget = token_budget
        self._passes = _Passes(engine)
        self._largest = ContrastiveStep(self._passes, objective, token_budget=token_budget, teacher=teacher)
        self._in_place = teacher is None
        if teacher is None:
            largest = SimilarityDistillation(config.distillation.similarity_temperature)
            objective = Objective({**objective.terms, "largest": (1.0, largest)})
            teacher = self._largest_says
        self._smaller = ContrastiveStep(self._passes, objective, token_budget=token_budget, teacher=teacher)

    def __call__(self, batch: Batch) -> StepOutcome:
        """The outcome of the largest network; ``terms`` also has the loss of every rung that was trained."""
        rungs = choose(self._ladder, self._seed, batch.number)
        if self._in_place:
            said = self._largest.embed(batch)
            self._said = (said[: batch.n_queries], said[batch.n_queries :])
        losses = {}
        self._passes.begin(1 + len(rungs))
        computed = 0
        for rung in rungs:
            with selected(self._retriever, rung):
                outcome = self._smaller(batch)
            losses[rung.name] = outcome.loss
            computed += outcome.computed
            self._passes.next()
        # The largest comes last: engines finish a step's gradients in its last pass, which has to reach all.
        outcome = self._largest(batch)
        return replace(outcome, terms={**outcome.terms, **losses}, computed=outcome.computed + computed)

    def _largest_says(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._said


def choose(ladder: Ladder, seed: int, step: int) -> list[Rung]:
    """The smallest rung and ``BETWEEN`` others, the same on every rank and after a restart."""
    *between, smallest = ladder
    order = np.random.default_rng((seed, 2, step)).permutation(len(between))[:BETWEEN]
    return [between[index] for index in sorted(order.tolist())] + [smallest]


class _Passes:
    """An engine that takes several networks' backward passes for one optimizer step, and averages them."""

    def __init__(self, engine: Passes) -> None:
        self._engine = engine
        self.device, self.padded = engine.device, engine.padded
        self._networks = self._left = 1

    def begin(self, networks: int) -> None:
        self._networks = self._left = networks

    def next(self) -> None:
        self._left -= 1

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self._engine(ids, lengths)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.backward(loss / self._networks, last=last and self._left == 1)
