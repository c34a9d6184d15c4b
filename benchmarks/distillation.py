"""Does a teacher help recovery? A pruned model trained by InfoNCE alone, and with a teacher.

    python benchmarks/distillation.py --data DATA/scifact
    python benchmarks/distillation.py --data DATA/scifact --model random:bert --steps 4 --seeds 1    # minutes

The last blocks of the model are dropped; what remains is trained on the data set's train questions with
in-batch negatives, once by InfoNCE alone and once with embedding and similarity distillation from the
uncompressed model on top, for every seed, and scored on dev (never on test: this is a choice of method). One
row a run in OUT/rows; the means are printed, whichever wins. Two cores, MiniLM-L6: about 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rows import known, measure_once

from effir_ray.compression.planning import make_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import Evaluation, evaluate
from effir_ray.hardware import detect
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.progress import show_progress
from effir_ray.stages import StageStore
from effir_ray.training.config import DistillationConfig, TrainConfig
from effir_ray.training.run.launcher import train

QUERY_LENGTH, DOCUMENT_LENGTH = 64, 128


def main() -> None:
    options = arguments()
    dev = load_dataset(options.data).sample("dev", queries=options.queries, documents=options.documents)
    schedule = Schedule(drop_last_blocks=options.drop)
    pruned = prune(options.model, schedule, options.work / "pruned")
    stages = StageStore(options.work / "stages")
    with show_progress():
        measure(options, "pruned", pruned, schedule, dev, None)
        for seed in range(options.seeds):
            for method in ("info_nce", "distilled"):
                config = settings(options, method, seed)
                result = train(pruned, config, options.work / f"{method}-{seed}", stages=stages)
                measure(options, method, result.checkpoint, schedule, dev, config)
    report(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6", help="teacher, and what the student is cut from")
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder with train questions")
    parser.add_argument("--drop", type=int, default=2, help="last blocks dropped")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=75, help="dev queries")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--out", type=Path, default=Path("results/distillation"))
    return parser.parse_args()


def prune(model: str, schedule: Schedule, out: Path) -> Path:
    retriever = load_retriever(model)
    apply_plan(retriever, make_plan(schedule, len(retriever.plan.layers), None))
    save_checkpoint(retriever, out)
    return out


def settings(options: argparse.Namespace, method: str, seed: int) -> TrainConfig:
    teacher = DistillationConfig(teacher=options.model, embedding=1.0, similarity=1.0)
    return TrainConfig(
        dataset=str(options.data),
        steps=options.steps,
        batch_size=32,
        hard_negatives=0,
        learning_rate=5e-5,
        lora=None,
        zero_stage=0,
        cpus_per_worker=detect().threads,
        precision="float32",
        seed=seed,
        distillation=teacher if method == "distilled" else DistillationConfig(),
        query_max_length=QUERY_LENGTH,
        document_max_length=DOCUMENT_LENGTH,
    )


def measure(
    options: argparse.Namespace,
    method: str,
    model: Path,
    schedule: Schedule,
    dev: Dataset,
    config: TrainConfig | None,
) -> None:
    settings: dict[str, Any] = {
        "benchmark": "distillation",
        "method": method,
        "backbone": options.model,
        "schedule": schedule.model_dump(),
        "training": config and config.model_dump(mode="json", exclude={"dataset"}),
        "data_fingerprint": dev.fingerprint,
        "document_length": DOCUMENT_LENGTH,
    }

    def score() -> Evaluation:
        return evaluate(
            model,
            dev,
            split="dev",
            query_max_length=QUERY_LENGTH,
            document_max_length=DOCUMENT_LENGTH,
        )

    measure_once(
        options.out,
        settings,
        score,
        backbone=options.model,
        dataset=dev,
        split="dev",
        schedule=schedule,
        plan=make_plan(schedule, len(load_retriever(options.model).plan.layers), None),
        seed=0 if config is None else config.seed,
        recovered=config is not None,
    )


def report(options: argparse.Namespace) -> None:
    """Mean and standard deviation over seeds of every method."""
    scores: dict[str, list[float]] = {}
    for row in (row for row in known(options.out) if row["backbone"] == options.model):
        scores.setdefault(json.loads(row["trial"])["method"], []).append(row["ndcg_at_10"])
    for method, values in scores.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{method:10} nDCG@10 {statistics.mean(values):.4f} +- {spread:.4f} ({len(values)} runs)")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"distillation: {error}")
