"""Pruning off the shelf: quality without any recovery as attention, MLP or block sublayers go.

    python benchmarks/off_the_shelf.py --data DATA/nfcorpus --data DATA/scifact --calibration passages.jsonl
    python benchmarks/off_the_shelf.py --data DATA/scifact --calibration passages.jsonl --sample 100 1000

The table of the paper's section on off-the-shelf pruning, for any backbone: A, M and B at every k, least
important sublayers first by the paper's cosine importance on calibration passages (a JSONL file with
``text``). One row a variant and data set is appended to OUT/rows as soon as it is known, and rows that are
there are not computed again. Two cores, MiniLM-L6, both data sets, 128 tokens: about an hour, with
--max-length 64 a third of that; the second command (100 queries over at least 1,000 documents): minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rows import known, measure_once

from effir_ray.compression.depth.importance import measure_importance
from effir_ray.compression.planning import ImportanceScores, make_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import Evaluation, evaluate
from effir_ray.models.retriever import load_retriever
from effir_ray.progress import show_progress

UNITS = {"A": "drop_attention", "M": "drop_mlp", "B": "drop_block"}


def main() -> None:
    options = arguments()
    texts = [json.loads(line)["text"] for line in options.calibration.open(encoding="utf-8")]
    datasets = [load_dataset(folder) for folder in options.data]
    if options.sample:
        queries, documents = options.sample
        datasets = [dataset.sample("test", queries=queries, documents=documents) for dataset in datasets]
    retriever = load_retriever(options.model)
    scores = measure_importance(retriever, texts, criterion="cosine", max_length=options.max_length)
    with show_progress():
        for schedule in schedules(len(scores.block)):
            for dataset in datasets:
                measure(options, schedule, scores, dataset)
    draw(known(options.out), options.model, options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--data", action="append", required=True, help="a BEIR folder; may be given again")
    parser.add_argument("--calibration", type=Path, required=True, help="JSONL file of passages")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument(
        "--sample",
        type=int,
        nargs=2,
        metavar=("QUERIES", "DOCUMENTS"),
        help="a fixed sample of the test queries over their documents and distractors",
    )
    parser.add_argument("--out", type=Path, default=Path("results/off_the_shelf"))
    return parser.parse_args()


def schedules(layers: int) -> list[Schedule]:
    """The full model, then every unit at k = 1, then at k = 2, ..."""
    return [Schedule()] + [Schedule(**{field: k}) for k in range(1, layers + 1) for field in UNITS.values()]


def measure(
    options: argparse.Namespace, schedule: Schedule, scores: ImportanceScores, dataset: Dataset
) -> None:
    plan = make_plan(schedule, len(scores.block), scores)
    settings = {
        "benchmark": "off-the-shelf",
        "backbone": options.model,
        "schedule": schedule.model_dump(),
        "calibration_sha256": hashlib.sha256(options.calibration.read_bytes()).hexdigest(),
        "document_length": options.max_length,
        "data_fingerprint": dataset.fingerprint,
    }

    def score() -> Evaluation:
        print(f"{schedule.name} on {dataset.name}", file=sys.stderr)
        model = apply_plan(load_retriever(options.model), plan)
        length = options.max_length
        return evaluate(model, dataset, query_max_length=length, document_max_length=length)

    measure_once(
        options.out,
        settings,
        score,
        backbone=options.model,
        dataset=dataset,
        split="test",
        schedule=schedule,
        plan=plan,
    )


def draw(all_rows: list[dict[str, Any]], model: str, out: Path) -> None:
    """nDCG@10 of ``model`` against k, a line a unit and a panel a data set: OUT/off_the_shelf.svg."""
    from matplotlib.figure import Figure

    rows = [row for row in all_rows if row["backbone"] == model]
    names = sorted({row["dataset"] for row in rows})
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        points = {row["schedule"]: 100 * row["ndcg_at_10"] for row in rows if row["dataset"] == name}
        for (unit, field), marker in zip(UNITS.items(), "osD", strict=True):
            curve = [points["full"]]
            while f"{len(curve)}{unit}" in points:
                curve.append(points[f"{len(curve)}{unit}"])
            panel.plot(range(len(curve)), curve, marker=marker, label=field.removeprefix("drop_"))
        panel.set(title=name, xlabel="sublayers dropped, least important first", ylim=(0, None))
    panels[0].set_ylabel("nDCG@10 × 100")
    panels[0].legend(frameon=False)
    figure.savefig(out / "off_the_shelf.svg", metadata={"Date": None})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"off_the_shelf: {error}")
