"""What every training worker runs: load, wrap, step, report, save. Ray Train starts one process a rank."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effir_ray.cluster.probe import everywhere
from effir_ray.compression.sparsity.sparsify import mask_gradients
from effir_ray.config import parse
from effir_ray.data.datasets import Dataset
from effir_ray.errors import InputError, TrialFailure
from effir_ray.hardware import cpu_precision, detect
from effir_ray.leases import Lease
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.projection import projection_of
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.stages import StageStore
from effir_ray.storage import upload
from effir_ray.training.config import TrainConfig
from effir_ray.training.run import fault_tolerance
from effir_ray.training.run.monitoring import CollapseDetector, DevScore, Utilization
from effir_ray.training.step.batches import Batches
from effir_ray.training.step.elastic import ElasticStep, choose
from effir_ray.training.step.engine import Engine, build_engine, learning_rate, rank, total, world_size
from effir_ray.training.step.gradcache import ContrastiveStep, StepOutcome
from effir_ray.training.step.lora import add_lora, plain_weights
from effir_ray.training.step.losses import build_objective
from effir_ray.training.step.text_encoder import without_dropout
from effir_ray.training.supervision.distillation import TeacherEmbeddings, embeddings_for
from effir_ray.training.supervision.training_data import dev_dataset, training_pairs


def train_worker(job: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's ``train_loop_per_worker``.

    ``job``: model, config (JSON), pairs and split (their source), held_out (questions no pair may ask),
    survey (of a stream), shared (what every node must see, or None), begun (the state of a shorter run to go
    on from, or None), out (the output folder, which other machines may not see), run (folder or URI of the
    run's state), saved (where the trained checkpoint goes), stages, teacher_dtype, lease (to be held for the
    run's folder, or None).
    Returns {"engine", "step"}, or {"error", "message"} for an end that no restart would change.
    """
    try:
        with everywhere(job["shared"]):
            return Worker(job).train()
    except (InputError, TrialFailure) as error:
        return {"error": type(error).__name__, "message": str(error)}


class Worker:
    """One rank's part of one run."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.config = config = parse(job["config"], TrainConfig, source="training settings")
        self.run, self.saved = str(job["run"]), str(job["saved"])
        self.lease: Lease | None = job["lease"]
        self.staging = fault_tolerance.staging(self.run, job["out"])
        stages = StageStore(Path(job["stages"]), job["remote_stages"])
        self.begun = job["begun"] and stages.local(job["begun"])
        device, bfloat16 = _device(config)
        # Frozen weights need no float32 copy; trained ones do, DeepSpeed keeps it.
        dtype = "bfloat16" if bfloat16 and config.lora is not None else "float32"
        self.retriever = load_retriever(stages.local(job["model"]), dtype=dtype, device=device)
        self.retriever.spec = self.retriever.spec.with_prompts(config.prompts)
        self.skeleton = hollow(self.retriever)
        projection = projection_of(self.retriever.model)
        self.projection = None if projection is None else projection.weight.detach().float().clone()
        self.utilization = Utilization(
            self.retriever,
            device,
            torch.bfloat16 if bfloat16 else torch.float32,
            frozen=config.lora is not None,
        )
        self.engine = prepare(self.retriever, config, device, bfloat16=bfloat16)
        dev = dev_dataset(config)
        pairs, self.left_out = training_pairs(
            stages.local(job["pairs"]), job["split"], job["held_out"], survey=job["survey"]
        )
        self.batches = Batches(pairs, config, self._tokenize, rank=rank(), world=world_size())
        self.halved = fault_tolerance.halved_budget(self.run)
        teacher = embeddings_for(config, pairs, stages, job["teacher_dtype"])
        self.step = self._step(teacher)
        self.dev_score = self._dev(dev)

    def _step(self, teacher: TeacherEmbeddings | None) -> ContrastiveStep | ElasticStep:
        config, budget = self.config, self.halved or self.config.token_budget
        objective = build_objective(
            config, has_teacher_scores=self.batches.has_teacher_scores, projection=self.projection
        )
        if config.elastic:
            return ElasticStep(
                self.engine,
                self.retriever,
                objective,
                config,
                token_budget=budget,
                teacher=teacher,
            )
        return ContrastiveStep(self.engine, objective, token_budget=budget, teacher=teacher)

    def _tokenize(self, texts: Any, kind: Any) -> list[list[int]]:
        limit = self.config.query_max_length if kind == "query" else self.config.document_max_length
        return self.retriever.tokenize(texts, kind, max_length=limit)

    def _dev(self, dataset: Dataset | None) -> DevScore | None:
        dev = self.config.dev
        if dev is None or dataset is None:
            return None
        return DevScore(
            self.engine,
            self._tokenize,
            dataset,
            dev,
            seed=self.config.seed,
            token_budget=self.step.token_budget,
        )

    def train(self) -> dict[str, Any]:
        reporter = fault_tolerance.StepReports(self.engine, self.config, self.run, self.staging, self.lease)
        step = start = reporter.restore(self.begun)
        detector = CollapseDetector(
            candidates=self.config.batch_size * (1 + self.batches.negatives),
            grace=start + max(10, int(self.config.warmup * self.batches.steps)),
        )
        for row in self._rows(start):
            detector.on_row(row)
            reporter(row)
            step = row["step"]
        if self.dev_score is not None:
            step = fault_tolerance.restore_best(self.engine, self.run, self.staging) or step
        write_checkpoint(self.engine, self.skeleton, self.saved, self.staging)
        fault_tolerance.leave_staging(self.staging)
        return {"engine": self.engine.name, "step": step}

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        """One row a step; ``step`` counts the finished ones."""
        steps, config = self.batches.steps, self.config
        began = time.monotonic()  # a step that waits for its batch is as slow as that
        for done, batch in enumerate(self.batches.run(start), start=start):
            rate = learning_rate(
                done, total=steps, peak=config.learning_rate, warmup=config.warmup, schedule=config.schedule
            )
            torch.manual_seed(config.seed + 1 + rank() + world_size() * done)  # dropout, also after a restart
            budget = self.step.token_budget or batch.n_tokens
            with fault_tolerance.halving(self.run, budget):
                outcome = self.step(batch)
                norm = self.engine.step(rate)
            seconds = time.monotonic() - began
            row = self._row(done + 1, outcome, rate, norm, seconds)
            rungs = choose(config.elastic, config.seed, batch.number) if config.elastic else ()
            row["mfu"] = self.utilization([len(tokens) for tokens in batch.tokens], seconds, rungs)
            if done == start and (note := self._note()):
                row["note"] = note
            dev = config.dev
            if self.dev_score is not None and dev and ((done + 1) % dev.every == 0 or done + 1 == steps):
                with fault_tolerance.halving(self.run, budget):
                    row[fault_tolerance.DEV_SCORE] = self.dev_score()
            yield row
            began = time.monotonic()

    def _note(self) -> str:
        """What is said once, with the first row."""
        notes = []
        if self.left_out:
            notes.append(f"{self.left_out} pairs left out: they ask what dev or test queries ask")
        if self.batches.note:
            notes.append(self.batches.note)
        if self.halved is not None:
            notes.append(f"out of memory: token budget halved to {self.halved}")
        return "; ".join(notes)

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
            "workers": world_size(),
            "mean_cosine": outcome.mean_cosine,
            "engine": self.engine.name,
        }


def prepare(retriever: Retriever, config: TrainConfig, device: torch.device, *, bfloat16: bool) -> Engine:
    """Adapters and engine around a loaded model, which from here on is in training mode."""
    model = retriever.model
    model.train()
    if not config.info_nce:
        without_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(config.seed)  # every rank draws the same adapters
    if config.keep_zeros:
        mask_gradients(retriever)
    if config.lora is not None:
        add_lora(retriever, config.lora)
    return build_engine(retriever, config, device, bfloat16=bfloat16)


def write_checkpoint(engine: Engine, skeleton: Retriever, target: str, place: Path) -> None:
    """Rank 0 writes the trained model as an ordinary checkpoint: adapters merged, partitions gathered.

    Every rank calls it. ``skeleton`` is the ``hollow`` copy of the model; it is given the trained parameters.
    ``place``: where it is put together on its way to an object store.
    """
    weights = plain_weights(engine.encoder.model, engine.whole, keep=rank() == 0)
    if rank() == 0:
        skeleton.model.load_state_dict(weights, strict=False, assign=True)
        aside = fault_tolerance.own_staging(place)
        upload(target, lambda folder: save_checkpoint(skeleton, folder), aside)


def _device(config: TrainConfig) -> tuple[torch.device, bool]:
    """This worker's device, and whether to compute in bfloat16 there.

    CUDA only where Ray assigned a GPU: one that is merely visible may be in use by others. And only where
    torch has it: a GPU of Ray's is a number that somebody gave.
    """
    import ray

    if ray.get_gpu_ids() and torch.cuda.is_available():
        from ray.train.torch import get_device

        wanted = detect().precision if config.precision == "auto" else config.precision
        return get_device(), wanted == "bfloat16"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise probes for accelerators at import
    torch.set_num_threads(max(1, round(config.cpus_per_worker)))
    wanted = cpu_precision()[0] if config.precision == "auto" else config.precision
    return torch.device("cpu"), wanted == "bfloat16"


def hollow(retriever: Retriever) -> Retriever:
    """The retriever with empty parameters: trained weights are put into it for saving, whatever adapters and
    engines have done to the original by then.
    """
    empty = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        for parameter in retriever.model.parameters()
    }
    return replace(retriever, model=copy.deepcopy(retriever.model, empty))
