"""What every training worker runs: load, wrap, step, report, save. Ray Train starts one process a rank."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from effir_ray.backbones.retriever import Retriever, load_retriever
from effir_ray.compression.checkpoint import save_checkpoint
from effir_ray.config import parse
from effir_ray.errors import InputError, TrialFailure
from effir_ray.training.batches import Batches
from effir_ray.training.config import TrainConfig
from effir_ray.training.distributed import rank, total, world_size
from effir_ray.training.engine import Engine, build_engine
from effir_ray.training.gradcache import ContrastiveStep, StepOutcome
from effir_ray.training.lora import add_lora, plain_weights
from effir_ray.training.losses import build_objective
from effir_ray.training.optim import learning_rate
from effir_ray.training.pairs import load_pairs
from effir_ray.training.storage import upload
from effir_ray.training.survival import Reporter, restore


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's ``train_loop_per_worker``.

    ``job``: model, config (JSON), pairs (their source), saved (where the trained checkpoint goes). Returns
    {"engine", "steps"}, or {"error", "message"} for an end that no restart would change.
    """
    try:
        return Run(job).train()
    except (InputError, TrialFailure) as error:
        return {"error": type(error).__name__, "message": str(error)}


class Run:
    """One rank's part of one run."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.config = config = parse(job["config"], TrainConfig, source="training settings")
        self.saved = str(job["saved"])
        device, bfloat16 = _device(config)
        dtype = "bfloat16" if bfloat16 and config.lora is not None else "float32"
        self.retriever = load_retriever(job["model"], dtype=dtype, device=device)
        self.skeleton = _skeleton(self.retriever)
        self.engine = prepare(self.retriever, config, device, bfloat16=bfloat16)
        pairs = load_pairs(job["pairs"], split=config.split, hard_negatives=None)
        self.batches = Batches(pairs, config, self._tokenize, rank=rank(), world=world_size())
        self.step = ContrastiveStep(
            self.engine,
            build_objective(config, has_teacher_scores=self.batches.has_teacher_scores),
            pad_token=self.retriever.tokenizer.pad_token_id or 0,
            token_budget=config.token_budget,
        )

    def _tokenize(self, texts: Any, kind: Any) -> list[list[int]]:
        limit = self.config.query_max_length if kind == "query" else self.config.document_max_length
        return self.retriever.tokenize(texts, kind, max_length=limit)

    def train(self) -> dict[str, Any]:
        reporter = Reporter(self.engine, self.config)
        start = restore(self.engine)
        for row in self._rows(start):
            check(row)
            reporter(row, last=row["step"] == self.batches.steps)
        self._save()
        return {"engine": self.engine.name, "steps": self.batches.steps}

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        """One row a step; ``step`` counts the finished ones."""
        steps, config = self.batches.steps, self.config
        began = time.monotonic()
        for done, batch in enumerate(self.batches.run(start), start=start):
            rate = learning_rate(
                done, total=steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule
            )
            outcome = self.step(batch)
            norm = self.engine.step(rate)
            now = time.monotonic()
            yield self._row(done + 1, outcome, rate, norm, now - began)
            began = time.monotonic()

    def _row(
        self, step: int, outcome: StepOutcome, rate: float, norm: float, seconds: float
    ) -> dict[str, Any]:
        return {
            "step": step,
            "steps": self.batches.steps,
            "epoch": step / self.batches.epoch_steps,
            "loss": outcome.loss,
            **{f"loss_{name}": value for name, value in outcome.terms.items()},
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_s": total(outcome.tokens, self.engine.device) / seconds,
            "seconds": seconds,
            "mean_cosine": outcome.mean_cosine,
            "engine": self.engine.name,
        }

    def _save(self) -> None:
        """Rank 0 writes the trained model as an ordinary checkpoint: adapters merged, partitions gathered."""
        weights = plain_weights(self.engine.encoder.model, self.engine.whole)
        if rank() == 0:
            self.skeleton.model.load_state_dict(weights, strict=False, assign=True)
            upload(self.saved, lambda folder: save_checkpoint(self.skeleton, folder))


def prepare(retriever: Retriever, config: TrainConfig, device: torch.device, *, bfloat16: bool) -> Engine:
    """Adapters and engine around a loaded model, which from here on is in training mode."""
    model = retriever.model
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(config.seed)  # every rank draws the same adapters
    if config.lora is not None:
        add_lora(retriever, config.lora)
    engine = build_engine(retriever, config, device, bfloat16=bfloat16)
    torch.manual_seed(config.seed + 1 + rank())  # and its own dropout
    return engine


def check(row: dict[str, Any]) -> None:
    """Raises TrialFailure for a step after which no weight can be trusted."""
    if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
        raise TrialFailure(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; "
            "try a lower learning_rate or precision float32"
        )


def _device(config: TrainConfig) -> tuple[torch.device, bool]:
    """This worker's device, and whether to compute in bfloat16 there."""
    from effir_ray.hardware import detect

    hardware = detect()
    wanted = hardware.dtype if config.precision == "auto" else config.precision
    if hardware.device == "cuda":
        from ray.train.torch import get_device

        return get_device(), wanted == "bfloat16"
    torch.set_num_threads(max(1, round(config.cpus_per_worker)))
    return torch.device("cpu"), wanted == "bfloat16"


def _skeleton(retriever: Retriever) -> Retriever:
    """The retriever with empty parameters: what the trained weights are put into for saving, whatever
    adapters and engines have done to the original by then."""
    hollow = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        for parameter in retriever.model.parameters()
    }
    return replace(retriever, model=copy.deepcopy(retriever.model, hollow))
