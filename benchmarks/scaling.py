"""What a 7B retriever and a study of it need on GPUs, from rates measured on CPUs and named assumptions.

    python benchmarks/scaling.py

Prints the tables of docs/scaling.md. Nothing is run: FLOPs are those of `effir-ray search --dry-run`,
rates from results/. Nobody has run it on GPUs.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from effir_ray.config import load_yaml
from effir_ray.data.download import BEIR_SETS
from effir_ray.models import accounting
from effir_ray.search.dry_run import StudyPreview, dry_run, expected_plan, load_backbones
from effir_ray.search.space import SearchSpace
from effir_ray.search.work import BFLOAT16_PEAKS, REACHED

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "search_spaces" / "mistral-7b.yaml"

PEAKS = {f"{name} 80 GB": peak for name, peak in BFLOAT16_PEAKS.items()}
UTILISATION = REACHED
"""Assumption: the part of the peak that encoding and training reach on a GPU."""
TRAINING_PASSES = 3
"""Assumption: a LoRA step with gradient checkpointing is forward, forward again, and backward without
gradients of the frozen weights, each as dear as a forward pass. All texts of a worker's share of a batch fit
the token budget, so nothing is computed once more."""
FRONT = 8
"""Assumption: models of the front, which are scored on test queries as well."""
TRAIN_QUERIES = 502_939
"""Questions of MS MARCO's training set that have a relevant passage."""
HARD_NEGATIVES = 7  # the paper's, and the default

WORDS = {
    "arguana": 167,
    "climate-fever": 85,
    "dbpedia-entity": 50,
    "fever": 85,
    "fiqa": 132,
    "hotpotqa": 46,
    "msmarco": 56,
    "nfcorpus": 232,
    "nq": 79,
    "quora": 11,
    "scidocs": 176,
    "scifact": 214,
    "trec-covid": 161,
    "webis-touche2020": 292,
}
"""Mean words of a document, from table 1 of BEIR (arXiv 2104.08663)."""
QUERY_WORDS = 6  # of MS MARCO, same table


@dataclass(frozen=True)
class Rates:
    """Measured: tokens a word, and parts of a bound that encoding reached."""

    hardware: str
    tokens_a_word: float
    of_peak: float
    of_bound: float


@cache
def measured() -> Rates:
    """Rates from results/: encoding (SmolLM2-135M on SciFact) and the speed-up of compressed models."""
    (file,) = (ROOT / "results" / "encoding").glob("smollm2-135m-*.parquet")
    rounds = [
        row
        for row in pq.read_table(file).to_pylist()
        if row["contestant"] == "effir-ray float32" and row["kind"] == "document"
    ]
    with next((ROOT / "results" / "speedup").glob("*-float32.csv")).open() as table:
        compressed = next(row for row in csv.DictReader(table) if row["variant"] == "EffiR-16M-width-30")
    return Rates(
        hardware=rounds[0]["hardware"],
        tokens_a_word=rounds[0]["tokens"] / rounds[0]["texts"] / WORDS["scifact"],
        of_peak=statistics.median(row["flops"] / row["wall_seconds"] / row["gemm_peak"] for row in rounds),
        of_bound=float(compressed["document_speedup"]) / float(compressed["document_flop_bound"]),
    )


@cache
def study() -> tuple[SearchSpace, StudyPreview]:
    space = load_yaml(SPACE, SearchSpace)
    return space, dry_run(space)


def forward(schedule: str, tokens: float) -> float:
    """FLOPs of one text of ``tokens`` tokens through the model that ``schedule`` names in the study."""
    space, _ = study()
    backbones = load_backbones(space)
    trial = next(
        config
        for config in (space.trial(candidate) for candidate in space.listed())
        if config.name == schedule
    )
    return accounting.flops(backbones[trial.backbone], expected_plan(trial, backbones), round(tokens))


def slowdown(schedule: str) -> float:
    """How much longer a compressed model takes than its FLOPs say; measured for one of them."""
    return 1.0 if schedule.startswith("full") else 1 / measured().of_bound


def corpus_flops(schedule: str, names: Iterable[str]) -> float:
    tokens = measured().tokens_a_word
    return slowdown(schedule) * sum(
        BEIR_SETS[name].documents * forward(schedule, WORDS[name] * tokens) for name in names
    )


def in_paper() -> list[str]:
    return [name for name, dataset in BEIR_SETS.items() if dataset.in_paper]


def gpu_hours(flops: float, gpu: str) -> float:
    return flops / (PEAKS[gpu] * UTILISATION) / 3600


def encoding_rows() -> list[list[str]]:
    rows = []
    for schedule in ("full", "16M+ft", "16M-w30+ft"):
        flops = corpus_flops(schedule, in_paper())
        for gpu in PEAKS:
            hours = gpu_hours(flops, gpu)
            rows.append(
                [schedule.removesuffix("+ft"), gpu, *(f"{hours / count:.2g}" for count in (1, 8, 64))]
            )
    return rows


def study_flops() -> dict[str, float]:
    """FLOPs of each kind of stage of the whole study that costs more than a thousandth of it."""
    space, preview = study()
    tokens = measured().tokens_a_word
    passage, question = WORDS["msmarco"] * tokens, QUERY_WORDS * tokens
    names = [trial.schedule for trial in preview.trials]

    def encoded(schedules: Sequence[str], documents: int) -> float:
        return sum(slowdown(name) * forward(name, passage) * documents for name in schedules)

    def trained(name: str) -> float:
        a_query = forward(name, question) + (1 + HARD_NEGATIVES) * forward(name, passage)
        return slowdown(name) * TRAIN_QUERIES * TRAINING_PASSES * a_query

    return {
        f"{len(names)} times {space.dev.documents:,} documents for dev": encoded(names, space.dev.documents),
        f"{FRONT} times {space.test.documents:,} documents for test": FRONT
        * encoded(["full"], space.test.documents),
        f"{sum('+ft' in name for name in names)} trainings": sum(
            trained(name) for name in names if name.endswith("+ft")
        ),
    }


def study_rows() -> list[list[str]]:
    parts = study_flops()
    parts["together"] = sum(parts.values())
    rows = []
    for what, flops in parts.items():
        hours = [gpu_hours(flops, gpu) for gpu in PEAKS]
        rows.append([what, *(f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in hours)])
    return rows


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    rates = measured()
    documents = sum(BEIR_SETS[name].documents for name in in_paper())
    print(
        f"measured on {rates.hardware}: {rates.of_peak:.0%} of peak, {rates.of_bound:.0%} of the FLOP bound,"
    )
    print(f"{rates.tokens_a_word:.2f} tokens a word; {len(in_paper())} sets, {documents:,} documents\n")
    print(table(["model", "GPU", "1 GPU, hours", "8 GPUs", "64 GPUs"], encoding_rows()))
    print(table(["stages", *(f"{gpu}, GPU hours" for gpu in PEAKS)], study_rows()))


if __name__ == "__main__":
    main()
