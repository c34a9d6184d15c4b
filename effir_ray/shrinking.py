"""One call for someone who has an embedder and text: cut whole blocks, distil, compare, write the model.

    texts -> cut (the blocks that move final vectors least) -> pace (steps that fit the time)
          -> distilled (the full model's embeddings) -> comparison -> OUT

Everything lies in ``OUT.work`` until OUT is complete, and a stopped call goes on from there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effir_ray import hardware
from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.depth.importance import measure_importance
from effir_ray.compression.pipeline import cut, load_to_measure
from effir_ray.compression.planning import make_plan, within
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.vocabulary import check_size, choose_tokens, cut_vocabulary, token_counts
from effir_ray.config import Config, parse
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pair_stream import source_fingerprint
from effir_ray.data.pairs import Pair, write_pairs
from effir_ray.encoding.encoder import Encoder
from effir_ray.encoding.padded import PaddedTexts, embed, pad
from effir_ray.errors import InputError
from effir_ray.evaluation.bm25 import bm25_scores
from effir_ray.evaluation.efficiency import MARGIN, measure_efficiency
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.evaluation.index import exact_search
from effir_ray.files import write_whole
from effir_ray.models.accounting import count_parameters, flops
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_config, load_present, load_text_side
from effir_ray.models.names import backbone_fingerprint
from effir_ray.models.ordinary import choose_layout, kept_blocks
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.progress import progress
from effir_ray.readers import read_json_object
from effir_ray.results.significance import Interval, bootstrap_interval, differences
from effir_ray.stages import StageStore
from effir_ray.training.config import DistillationConfig, TrainConfig
from effir_ray.training.run.launcher import train

RECORD = "shrink.json"
"""In OUT: what was asked, done and measured."""

_MOST_TEXTS = 200_000  # pairs of a text and something like a query about it
_HELD_OUT = 0.1  # of the texts, at most
_MOST_HELD_OUT = 500
_CALIBRATION = 64  # texts that choose the cut
_CALIBRATION_TOKENS = 128
_LONGEST = 256  # tokens of a text in distillation
_BATCH = 32
_RATE = 2e-4  # of AdamW, falling linearly; for the {0, 4, 5} of MiniLM 1e-4 learns half as fast
_MOST_EPOCHS = 20
_FEWEST_STEPS = 20
_START_SECONDS = 30.0  # of Ray and its workers
_LOOKED_AT = 512  # texts whose lengths say how long texts are
_NEAREST = 10
_MOST_ROUNDS = 15  # of measuring speed
_TIMED = 64  # texts that speed is measured on


class Comparison(Config):
    """What was lost and won, beside the full model on the same texts.

    scores: name -> score of ``full``, ``small`` and, where there are judgements, ``bm25``: nDCG@10 on the
    test queries of a data set, or else, on held-out texts, the share of the full model's ten nearest texts
    that the small one's ten have (overlap@10) and the mean cosine between their embeddings.
    lost: what the small model lacks of the full one, over queries, with its 95 % interval.
    *_speedup: of the full model's time, in the same run.
    """

    measure: str
    scores: dict[str, dict[str, float]]
    lost: Interval
    parameters: int
    full_parameters: int
    flops_ratio: float
    document_speedup: float
    document_speedup_interval: tuple[float, float]
    query_speedup: float
    hardware: str


class Shrunk(Config):
    """``checkpoint``: an ordinary one where the architecture allows (``ordinary``), see ``compress``."""

    checkpoint: Path
    model: str
    kept_blocks: tuple[int, ...]
    blocks: int
    steps: int
    texts: int
    ordinary: bool
    comparison: Comparison


class _Pace(Config):
    steps: int
    texts: int
    query_tokens: int
    document_tokens: int


def shrink(
    model: str | Path,
    out: Path,
    *,
    keep: float = 0.5,
    dataset: str | None = None,
    texts: str | None = None,
    vocabulary: int = 0,
    minutes: float = 60.0,
    seed: int = 0,
    address: str | None = None,
) -> Shrunk:
    """Write to ``out`` the model with ``keep`` of its blocks that stays nearest to ``model``.

    Which blocks go is decided by how far the final vectors of texts and queries move (criterion ``pooled``);
    the rest then learns the full model's embeddings (2 - 2 cos, no labels) for as many steps as fit into
    about ``minutes`` on this machine, texts encoded by the full model included.

    texts: a corpus, or files of texts or pairs (JSONL, Parquet, a folder of them); the documents of
    ``dataset`` when left out. A tenth of them (at most 500) is held out. vocabulary: how many tokens stay,
    those that the texts need most; 0 keeps all. dataset: whose test queries both
    models and BM25 are scored on; neither its queries nor its judgements are learned from.

    The same call goes on after a stop, or returns at once when ``out`` is there.
    Raises InputError for settings or data that cannot work, and for an ``out`` of other settings.
    """
    if not 0 < keep < 1:
        raise InputError(f"keep is {keep:g}; expected the share of blocks that stays, between 0 and 1")
    if not 0 < minutes <= 10**6:
        raise InputError(f"minutes is {minutes:g}; expected a positive number")
    source = texts or dataset
    if source is None:
        raise InputError("shrink learns from text: give a data set (its documents), or texts (files)")
    asked: dict[str, Any] = {
        "model": backbone_fingerprint(str(model)),
        "keep": keep,
        "texts": source_fingerprint(source),
        "dataset": None if dataset is None else load_dataset(dataset).fingerprint,
        "minutes": minutes,
        "seed": seed,
        **({"vocabulary": vocabulary} if vocabulary else {}),
    }
    if (found := _finished(out, asked)) is not None:
        return found
    run = _Run(
        model=str(model),
        source=source,
        dataset=dataset,
        keep=keep,
        vocabulary=vocabulary,
        minutes=minutes,
        seed=seed,
        work=out.with_name(f"{out.name}.work"),
        address=address,
    )
    run.check()
    texts_read = run.read_texts()
    _claim(run.work, asked)
    return run.finish(out, asked, *texts_read)


def _finished(out: Path, asked: dict[str, Any]) -> Shrunk | None:
    """The result where ``out`` holds it. Raises InputError where it holds anything else."""
    record = out / RECORD
    if record.is_file():
        before = read_json_object(record)
        _check_same(before.get("asked", {}), asked, out)
        return parse(before.get("result", {}), Shrunk, source=str(record))
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out}: is there already, and not written by shrink; choose another folder")
    return None


def _claim(work: Path, asked: dict[str, Any]) -> None:
    """The work folder is this call's, or that of the same call before."""
    settings = work / "settings.json"
    if settings.is_file():
        _check_same(read_json_object(settings), asked, work)
    work.mkdir(parents=True, exist_ok=True)
    write_whole(settings, json.dumps(asked, indent=1))


def _check_same(before: dict[str, Any], asked: dict[str, Any], place: Path) -> None:
    differing = [name for name, value in asked.items() if before.get(name) != value]
    if differing:
        raise InputError(
            f"{place}: made with other settings or data ({', '.join(differing)}); choose another --out, or "
            "delete it"
        )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call's work, stage by stage; ``source``: where the texts come from."""

    model: str
    source: str
    dataset: str | None
    keep: float
    vocabulary: int
    minutes: float
    seed: int
    work: Path
    address: str | None
    began: float = field(default_factory=time.monotonic)

    @property
    def store(self) -> StageStore:
        return StageStore(self.work / "stages")

    def finish(
        self, out: Path, asked: dict[str, Any], learnt: Sequence[Pair], held: Sequence[Pair]
    ) -> Shrunk:
        cut_model = self._stage("cut", partial(self._cut, learnt))
        paced = self._stage("pace", partial(self._pace, learnt, cut_model))
        pace = _Pace(**read_json_object(paced / "pace.json"))
        small = self._distil(cut_model, learnt, pace)
        compared = self._stage("comparison", partial(self._compare, small, held), version=2)
        result = self._result(out, pace, Comparison(**read_json_object(compared / "comparison.json")))
        record = {"asked": asked, "result": json.loads(result.model_dump_json())}
        _deliver(small, record, out)
        shutil.rmtree(self.work, ignore_errors=True)
        return result

    def check(self) -> None:
        """What needs no time: the model has enough blocks, the data set can be scored."""
        blocks = len(kept_blocks(self._present))
        if round(self.keep * blocks) in (0, blocks):
            raise InputError(
                f"{self.model} has {blocks} whole blocks; keep {self.keep:g} of them leaves "
                f"{round(self.keep * blocks)}: choose another share"
            )
        if self.vocabulary:
            check_size(load_text_side(self.model)[0], self.vocabulary)
        if self.dataset is not None:
            load_dataset(self.dataset).qrels("test")

    @property
    def _present(self) -> Plan:
        return load_present(self.model)

    def _stage(self, name: str, build: Callable[[Path], None], *, version: int = 1) -> Path:
        return self.store.run(name, {}, build, version=version)

    def read_texts(self) -> tuple[list[Pair], list[Pair]]:
        """What is learned from and what is held out, in the order of a hash."""
        with progress("Reading texts"):
            found = draw_examples(self.source, _MOST_TEXTS, self.seed)
        held = min(_MOST_HELD_OUT, int(_HELD_OUT * len(found)))
        if held < 2:
            raise InputError(f"{self.source}: {len(found)} texts; learning takes at least 20")
        return found[held:], found[:held]

    def _cut(self, learnt: Sequence[Pair], folder: Path) -> None:
        """Whole blocks go; no text that the result is compared on has a say in which."""
        present, chosen = self._present, learnt[:_CALIBRATION]
        gone = len(present.layers) - round(self.keep * len(kept_blocks(present)))
        scores = measure_importance(
            load_to_measure(self.model),
            [pair.positives[0] for pair in chosen],
            criterion="pooled",
            queries=[pair.query for pair in chosen],
            max_length=_CALIBRATION_TOKENS,
            seed=self.seed,
            units={"block"},
        )
        plan = make_plan(Schedule(drop_block=gone, importance="pooled"), len(present.layers), scores)
        small = cut(self.model, within(plan, present))
        if self.vocabulary:
            counts = token_counts(small.tokenizer, small.spec, learnt, max_length=_LONGEST)
            cut_vocabulary(small, choose_tokens(small.tokenizer, counts, self.vocabulary))
        save_checkpoint(small, folder / "checkpoint")

    def _pace(self, learnt: Sequence[Pair], small: Path, folder: Path) -> None:
        """How many steps fit into the time that is left, and on how many texts."""
        full = load_to_measure(self.model)
        queries, documents = [pair.query for pair in learnt], [pair.positives[0] for pair in learnt]
        query_tokens = _common_length(full.tokenize(queries[:_LOOKED_AT], "query"))
        document_tokens = _common_length(full.tokenize(documents[:_LOOKED_AT], "document"))
        encoder = Encoder(full)

        def taught() -> None:
            encoder.encode(queries[:_BATCH], "query", max_length=query_tokens)
            encoder.encode(documents[:_BATCH], "document", max_length=document_tokens)

        student = load_retriever(small / "checkpoint", dtype="float32", device=full.model.device.type)
        batches = [
            pad(student.tokenize(queries[:_BATCH], "query", query_tokens)),
            pad(student.tokenize(documents[:_BATCH], "document", document_tokens)),
        ]
        teach, step = _seconds(taught) / _BATCH, _seconds(partial(_learn_once, student, batches))
        left = 60 * self.minutes - (time.monotonic() - self.began) - _START_SECONDS
        left = max(left - self._comparison_seconds(teach), 0.25 * 60 * self.minutes)
        steps = min(int(left / (step + _BATCH * teach)), len(learnt) // _BATCH)
        if steps == len(learnt) // _BATCH:  # every text is encoded once, the rest of the time is learning
            steps = int(min(_MOST_EPOCHS * len(learnt) / _BATCH, (left - len(learnt) * teach) / step))
        steps = max(steps, _FEWEST_STEPS)
        pace = _Pace(
            steps=steps,
            texts=min(len(learnt), steps * _BATCH),
            query_tokens=query_tokens,
            document_tokens=document_tokens,
        )
        (folder / "pace.json").write_text(pace.model_dump_json())

    def _comparison_seconds(self, teach: float) -> float:
        if self.dataset is None:
            return 0.0
        return 1.5 * teach * len(load_dataset(self.dataset).corpus)

    def _distil(self, small: Path, learnt: Sequence[Pair], pace: _Pace) -> Path:
        here = hardware.detect()
        settings = TrainConfig(
            dataset=str(self.work / "texts.jsonl"),
            info_nce=0.0,
            hard_negatives=0,
            distillation=DistillationConfig(teacher=self.model, embedding=1.0),
            lora=None,
            zero_stage=0,
            steps=pace.steps,
            batch_size=_BATCH,
            learning_rate=_RATE,
            query_max_length=pace.query_tokens,
            document_max_length=pace.document_tokens,
            cpus_per_worker=1 if here.device == "cuda" else here.threads,
            seed=self.seed,
        )
        texts = self.work / "texts.jsonl"
        if not texts.is_file():
            aside = texts.with_suffix(".tmp")
            write_pairs(learnt[: pace.texts], aside)
            aside.rename(texts)
        return train(
            small / "checkpoint", settings, self.work / "distilled", stages=self.store, address=self.address
        ).checkpoint

    def _compare(self, small: Path, held: Sequence[Pair], folder: Path) -> None:
        full, student = Encoder(load_to_measure(self.model)), Encoder(load_to_measure(small))
        if self.dataset is not None:
            measured = _scored(full, student, load_dataset(self.dataset))
        else:
            measured = _agreement(full, student, held)
        config = full.retriever.model.config
        speed = measure_efficiency(
            {"full": full, "small": student},
            [pair.query for pair in held[:_TIMED]],
            [pair.positives[0] for pair in held[:_TIMED]],
            rounds=_MOST_ROUNDS,
            margin=MARGIN,
            reference="full",
        )["small"]
        plans = full.retriever.plan, student.retriever.plan
        compared = Comparison(
            **measured,
            parameters=count_parameters(student.retriever.model.config, plans[1]),
            full_parameters=count_parameters(config, plans[0]),
            flops_ratio=flops(student.retriever.model.config, plans[1], _CALIBRATION_TOKENS)
            / flops(config, plans[0], _CALIBRATION_TOKENS),
            document_speedup=speed.document_speedup,
            document_speedup_interval=speed.document_speedup_interval,
            query_speedup=speed.query_speedup,
            hardware=hardware.detect().name,
        )
        (folder / "comparison.json").write_text(compared.model_dump_json())

    def _result(self, out: Path, pace: _Pace, comparison: Comparison) -> Shrunk:
        small = load_retriever(self.work / "distilled" / "checkpoint")
        config = load_config(self.model)
        return Shrunk(
            checkpoint=out,
            model=self.model,
            kept_blocks=tuple(kept_blocks(small.plan)),
            blocks=config.num_hidden_layers,
            steps=pace.steps,
            texts=pace.texts,
            ordinary=choose_layout(config, small.plan).ordinary,
            comparison=comparison,
        )


def _common_length(tokens: Sequence[Sequence[int]]) -> int:
    """Tokens that 95 of 100 texts do not pass, in eights, at most ``_LONGEST``."""
    usual = float(np.quantile([len(text) for text in tokens], 0.95))
    return int(min(_LONGEST, 8 * np.ceil(usual / 8)))


def _seconds(work: Callable[[], None]) -> float:
    """Of the second and third call, the mean: the first one loads and allocates."""
    work()
    began = time.perf_counter()
    for _ in range(2):
        work()
    return (time.perf_counter() - began) / 2


def _learn_once(student: Retriever, batches: Sequence[PaddedTexts]) -> None:
    """As much work as one step of training, in the type that it will choose."""
    student.model.zero_grad()
    device, faster = student.model.device.type, hardware.detect().precision == "bfloat16"
    with torch.autocast(device, torch.bfloat16, enabled=faster):
        for batch in batches:
            embed(student, batch).sum().backward()  # type: ignore[no-untyped-call]


def _scored(full: Encoder, small: Encoder, dataset: Dataset) -> dict[str, Any]:
    """nDCG@10 of both and of BM25 on the test queries."""
    metric = "ndcg@10"
    found = {name: evaluate(encoder, dataset).scores for name, encoder in (("full", full), ("small", small))}
    found["bm25"] = bm25_scores(dataset, "test")
    by_query = {
        name: {query: row[metric] for query, row in scores.per_query.items()}
        for name, scores in found.items()
    }
    return {
        "measure": f"nDCG@10 on {dataset.name} test",
        "scores": {name: {metric: scores.mean[metric]} for name, scores in found.items()},
        "lost": bootstrap_interval(differences(by_query["small"], by_query["full"])),
    }


def _agreement(full: Encoder, small: Encoder, held: Sequence[Pair]) -> dict[str, Any]:
    """How alike the two models rank and embed texts that nothing was learned from."""
    queries, documents = [pair.query for pair in held], [pair.positives[0] for pair in held]
    vectors = {
        name: (encoder.encode(queries, "query"), encoder.encode(documents, "document"))
        for name, encoder in (("full", full), ("small", small))
    }
    nearest = {
        name: exact_search(*both, k=min(_NEAREST, len(documents)))[1] for name, both in vectors.items()
    }
    shared = [
        len(set(ours) & set(theirs)) / len(theirs)
        for ours, theirs in zip(nearest["small"].tolist(), nearest["full"].tolist(), strict=True)
    ]
    cosine = float(np.mean([_cosines(*pair) for pair in zip(*vectors.values(), strict=True)]))
    return {
        "measure": f"agreement on {len(held)} held-out texts",
        "scores": {
            "full": {"overlap@10": 1.0, "cosine": 1.0},
            "small": {"overlap@10": float(np.mean(shared)), "cosine": cosine},
        },
        "lost": bootstrap_interval(1.0 - np.array(shared)),
    }


def _cosines(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n, d), (n, d) -> (n,)"""
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: npt.NDArray[np.float32] = (first * second).sum(axis=1) / lengths
    return cosines


def _deliver(small: Path, record: dict[str, Any], out: Path) -> None:
    """The model and its record in ``out``: all of it or nothing."""
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(small, aside)
    (aside / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if out.exists():
        out.rmdir()  # empty, see ``_claim``
    aside.rename(out)
