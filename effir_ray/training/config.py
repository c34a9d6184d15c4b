"""What one fine-tuning run is. Every default is the paper's (section 4) unless its comment says otherwise."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from effir_ray.config import Config, Length, Place, Prompts, Seed, says_nothing
from effir_ray.training.step.ladder import Ladder, check_ladder

Dimension = Annotated[int, Field(ge=1, le=2**16)]
Workers = Annotated[int, Field(ge=1, le=65536)]

_WORKERS: TypeAdapter[int] = TypeAdapter(Workers)


def _number_or_range(value: Any) -> int | tuple[int, int]:
    """One error where a union would report one for each of its types."""
    try:
        if not isinstance(value, list | tuple):
            return _WORKERS.validate_python(value)
        numbers = tuple(_WORKERS.validate_python(number) for number in value)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise ValueError("expected a number of workers, or two: the fewest and the most, as in [1, 8]")
    return numbers[0], numbers[1]


class LoraConfig(Config):
    """Low-rank adapters on every Linear of every block: the seven projections of a gated decoder block."""

    r: int = Field(default=32, ge=1, le=2**14)
    alpha: float = Field(default=64.0, gt=0, le=1e6)


STATE = "state"
"""The folder of a run that ``stop_after`` ended from which one of more steps goes on."""

STUDY_TEACHER = "base"
"""A teacher's name inside a study: its own full model, fine-tuned where the study does that."""


class DistillationConfig(Config):
    """Weights of the terms beside InfoNCE; a term with weight 0 is not computed.

    scores: KL divergence to the softmax of a reranker's scores, used for the queries that carry them;
    ``temperature`` divides these scores.
    teacher: an uncompressed model that encodes the training texts once; ``base`` in a study's recovery is the
    study's own full model.
    embedding: every text's embedding is drawn to the teacher's, by ``distance``: 2 - 2 cos, or the length of
    the difference of unit vectors (l2, whose pull does not fade as they come near). Summed over a query's own
    texts: MiniLM without blocks 1, 2 and 3 has on 32 SciFact pairs 0.6 times the gradient of InfoNCE.
    similarity: KL divergence to the teacher's ranking of the batch, cosines over ``similarity_temperature``.
    InfoNCE's 0.02 leaves a good teacher one-hot. The entropy of MiniLM's ranking of 32 documents, median over
    queries in nats, at 0.02 / 0.05 / 0.07 / 0.1: SciFact 0.0001 / 0.13 / 0.53 / 1.42, SQuAD 0.0000 / 0.009 /
    0.09 / 0.54. The elastic ladder's own distillation has this temperature too.
    """

    scores: float = Field(default=1.0, ge=0, le=1e6)
    temperature: float = Field(default=1.0, ge=1e-4, le=1e4)
    teacher: Place | None = None
    embedding: float = Field(default=0.0, ge=0, le=1e6)
    distance: Literal["cosine", "l2"] = "cosine"
    similarity: float = Field(default=0.0, ge=0, le=1e6)
    similarity_temperature: float = Field(default=0.1, ge=1e-4, le=1e4)

    @model_validator(mode="after")
    def _teacher_is_used(self) -> DistillationConfig:
        weighted = self.embedding > 0 or self.similarity > 0
        if weighted and self.teacher is None:
            raise ValueError("embedding and similarity need a teacher: name a model, or set both to 0")
        if self.teacher is not None and not weighted:
            raise ValueError("a teacher needs a positive embedding or similarity weight")
        return self


class DevConfig(Config):
    """Dev nDCG@10 on a fixed sample every ``every`` steps; the weights with the best one are the result.

    ``dataset``: None takes the one that is trained on.
    """

    every: int = Field(ge=1, le=10**9)
    dataset: Place | None = None
    queries: int = Field(default=100, ge=1, le=10**9)
    documents: int = Field(default=1000, ge=1, le=10**9)


class TrainConfig(Config):
    """``batch_size`` counts the queries of one optimizer step over all workers; every query meets the
    documents of all the others as negatives, however the batch is cut into micro-batches.

    dataset: ``stdlib``, a BEIR folder or name, files of pairs, or, with ``info_nce: 0``, a corpus: files of
    texts without queries.
    prompts: before queries and documents, in the place of the model's own; the trained model keeps them.
    negatives: ``given`` (those in the data), ``bm25``, or the name or path of a model that mines them.
    token_budget: tokens whose activations may be in memory at once; what does not fit is computed twice
    (GradCache). None keeps everything.
    held_out: a data set, or several, whose dev and test queries are asked by no training pair; a study names
    its own, and ``dev``'s is one.
    info_nce: weight of the contrastive term. 0 learns from ``distillation`` alone: queries then need no
    relevant documents, ``dataset`` may be texts without queries, and dropout, which only blurs what is to be
    matched, is off.
    elastic: sub-networks trained together with the model, the last a part of all others (see ``elastic``).
    keep_zeros: weights of the blocks that are zero at the start stay zero (a model pruned to sparsity).
    workers: how many; or the fewest and the most, ``[1, 8]``, where nodes come and go: the run then goes on
    with as many as there is room for, among the numbers that divide ``batch_size``.
    zero_stage: DeepSpeed's; 0 in bfloat16 runs as 1, which sums gradients in float32.
    checkpoint_every: steps from one checkpoint to the next; None takes a tenth of the run, and at least five
    minutes.
    stop_after: ends after so many of its ``steps``, at the learning rate that has there, and leaves what a
    run that goes further begins with: a rung of a search. 0 stands there for a model that has yet to begin.
    """

    model: Place | None = Field(default=None, exclude=True)  # of `effir-ray train` alone; see --model
    dataset: Place
    prompts: Prompts | None = Field(default=None, exclude_if=says_nothing)
    split: str = "train"
    held_out: Place | tuple[Place, ...] | None = None
    negatives: Place = "given"  # MS MARCO's come with its triples; data here has none: see `Batches.note`
    hard_negatives: int = Field(default=7, ge=0, le=10**4)
    epochs: float = Field(default=1.0, gt=0, le=1e5)
    steps: int | None = Field(default=None, ge=1, le=10**9)
    stop_after: int | None = Field(default=None, ge=0, le=10**9, exclude_if=lambda value: value is None)
    batch_size: int = Field(default=128, ge=2, le=2**20)  # not stated in the paper; RepLLaMA's
    query_max_length: Length = 512
    document_max_length: Length = 512

    learning_rate: float = Field(default=1e-4, gt=0, le=1e3)
    schedule: Literal["linear", "cosine"] = "linear"  # not stated; the Hugging Face default
    warmup: float = Field(default=0.1, ge=0, lt=1)  # fraction of the steps
    weight_decay: float = Field(default=0.0, ge=0, le=1e3)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    seed: Seed = 0

    info_nce: float = Field(default=1.0, ge=0, le=1e6)
    temperature: float = Field(default=0.02, ge=1e-4, le=1e4)
    distillation: DistillationConfig = DistillationConfig()
    matryoshka: tuple[Dimension, ...] = Field(default=(), max_length=64)
    elastic: Annotated[Ladder, AfterValidator(check_ladder)] = ()
    lora: LoraConfig | None = LoraConfig()
    keep_zeros: bool = False

    workers: Annotated[Workers | tuple[Workers, Workers], BeforeValidator(_number_or_range)] = 1
    cpus_per_worker: float = Field(default=1.0, gt=0, le=4096)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    token_budget: int | None = Field(default=None, ge=1, le=2**31)
    gradient_checkpointing: bool = False

    dev: DevConfig | None = None
    checkpoint_every: int | None = Field(default=None, ge=1, le=10**9)
    keep_checkpoints: int = Field(
        default=1, ge=1, le=10**4
    )  # the best by dev score, or the newest; and the newest
    max_failures: int = Field(default=2, ge=0, le=10**4)
    storage_path: Place | None = None  # a folder or s3://...; None keeps checkpoints in the output folder

    @property
    def held_out_names(self) -> tuple[str, ...]:
        return (self.held_out,) if isinstance(self.held_out, str) else self.held_out or ()

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def numbers_of_workers(self) -> tuple[int, ...]:
        """Those that may run, from few to many: each worker has an equal share of every batch."""
        possible = range(self.fewest_workers, min(self.most_workers, self.batch_size) + 1)
        return tuple(number for number in possible if self.batch_size % number == 0)

    @model_validator(mode="after")
    def _parts_agree(self) -> TrainConfig:
        if self.keep_zeros and self.lora is not None:
            raise ValueError("keep_zeros needs lora: null; merged adapters would fill the zeros")
        if self.split != "train" and (self.dev is not None or self.held_out is not None):
            raise ValueError(
                f"split is '{self.split}': dev and test queries are held out (of a study always, else by "
                "dev and held_out), so train on split 'train'"
            )
        return self

    @model_validator(mode="after")
    def _something_is_learnt(self) -> TrainConfig:
        if not self.info_nce and not self.distillation.scores and self.distillation.teacher is None:
            raise ValueError(
                "info_nce is 0 and nothing takes its place: give distillation a teacher and its weight"
            )
        return self

    @model_validator(mode="after")
    def _stops_on_the_way(self) -> TrainConfig:
        if self.stop_after is None:
            return self
        if self.steps is None or self.stop_after >= self.steps:
            raise ValueError("stop_after is fewer than steps, which must be given too")
        if self.dev is not None:
            raise ValueError(
                "stop_after and dev do not go together: the best weights of the part left are not known"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> TrainConfig:
        for number in (self.fewest_workers, self.most_workers):
            if self.batch_size % number:
                raise ValueError(
                    f"batch_size {self.batch_size} does not split evenly over {number} workers; "
                    f"use a multiple of {number}"
                )
        if isinstance(self.workers, tuple) and self.zero_stage:
            raise ValueError(
                f"workers from {self.workers[0]} to {self.workers[1]} need zero_stage: 0; at stage "
                f"{self.zero_stage} each worker saves its own part of the optimizer's state, which another "
                "number of workers cannot go on from"
            )
        if any(dimension < 1 for dimension in self.matryoshka):
            raise ValueError("matryoshka lists embedding dimensions, all at least 1")
        return self
