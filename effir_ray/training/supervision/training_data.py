"""What a run learns from: pairs, with mined negatives and a teacher's embeddings where settings ask for them.

Dev and test stay held out however pairs are given: none of them asks what a query there asks. Data sets keep
these queries out of ``train`` themselves; files of pairs and other data sets know nothing of them.
"""

from __future__ import annotations

from typing import Any

from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pair_layouts import normalised
from effir_ray.data.pair_stream import PairStream, Survey, is_stream
from effir_ray.data.pairs import Pair, check_split, held_out_questions, load_pairs
from effir_ray.stages import StageStore
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import check_labels
from effir_ray.training.supervision import resumable
from effir_ray.training.supervision.distillation import embeddings_for
from effir_ray.training.supervision.negatives import mine


def prepare(config: TrainConfig, stages: StageStore) -> dict[str, Any]:
    """Mine negatives and run the teacher where the settings ask for it; workers then only read files.

    The part of a worker's job (see ``loop.train_worker``) that says where its data lie.
    """
    if config.distillation.teacher is not None:
        stages.local(config.distillation.teacher)
    held_out, dtype = held_out_by(config), resumable.encoder_dtype()
    pairs, split = config.dataset, config.split
    if config.negatives != "given" and config.hard_negatives:
        count = config.hard_negatives
        mined = mine(config.dataset, by=config.negatives, stages=stages, split=split, negatives=count)
        pairs, split = str(mined), "train"  # all of it, whatever split it was made from
    if config.distillation.teacher is not None:
        found, _ = training_pairs(pairs, split, held_out)
        check_labels(config, found)
        embeddings_for(config, found, stages, dtype)
    return {
        "pairs": pairs,
        "split": split,
        "held_out": held_out,
        "survey": survey_stream(pairs, held_out),
        "stages": str(stages.root),
        "remote_stages": stages.remote,
        "teacher_dtype": dtype,
    }


def needs_model(config: TrainConfig) -> bool:
    """Whether ``prepare`` encodes texts: for a teacher, or negatives that are mined by a model."""
    mines = config.hard_negatives > 0 and config.negatives not in ("given", "bm25")
    return config.distillation.teacher is not None or mines


def dev_dataset(config: TrainConfig) -> Dataset | None:
    """The data set whose dev split chooses the weights; None where none does."""
    return None if config.dev is None else load_dataset(config.dev.dataset or config.dataset)


def held_out_by(config: TrainConfig) -> frozenset[str]:
    """The dev and test questions (as ``normalised`` writes them) of what ``dev`` and ``held_out`` name."""
    dev = None if config.dev is None else config.dev.dataset or config.dataset
    names = {*config.held_out_names, *([] if dev is None else [dev])}
    return frozenset().union(*(held_out_questions(load_dataset(name)) for name in names))


def training_pairs(
    source: str, split: str, held_out: frozenset[str], *, survey: Survey | None = None
) -> tuple[list[Pair] | PairStream, int]:
    """The pairs of ``source`` that ask no question of ``held_out``, and how many do.

    ``survey``: of a stream, what ``survey_stream`` said.
    """
    if is_stream(source):
        check_split(source, split)
        stream = PairStream(source, held_out=held_out, survey=survey)
        return stream, stream.survey.left_out
    pairs = load_pairs(source, split=split, texts=True)
    kept = [pair for pair in pairs if normalised(pair.query) not in held_out]
    return kept, len(pairs) - len(kept)


def survey_stream(source: str, held_out: frozenset[str]) -> Survey | None:
    """What workers need to know of a stream, found once; None of what is no stream."""
    return PairStream(source, held_out=held_out).survey if is_stream(source) else None
