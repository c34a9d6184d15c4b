"""Real learning: a decoder language model becomes a retriever on SQuAD's training questions.

    D=DATA python benchmarks/squad_learning.py --squad $D/squad 100 200 \\
        --also $D/scifact 100 400 --also $D/nfcorpus 60 1800
    python benchmarks/squad_learning.py --squad DATA/squad 10 40 --steps 3    # a minute or two

The model is scored untrained and trained, on test questions of SQuAD and zero-shot on the other sets, over
the same samples (so many test queries; all their relevant documents and distractors up to so many documents).
Negatives are mined by BM25 from SQuAD's whole corpus. Writes OUT/rows (one row a model and data set),
OUT/history.jsonl (one line a step) and OUT/squad_learning.svg. Two cores with bfloat16
instructions, SmolLM2-135M: about 85 minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rows import known, measure_once

from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pairs import load_pairs, shuffled, write_pairs
from effir_ray.errors import InputError
from effir_ray.evaluation.bm25 import bm25_ranker
from effir_ray.evaluation.evaluate import Evaluation, evaluate
from effir_ray.hardware import detect
from effir_ray.progress import show_progress
from effir_ray.training.config import TrainConfig
from effir_ray.training.run.launcher import TrainResult, train
from effir_ray.training.supervision.negatives import DEPTH, collect, mine_pairs


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    squad = options.squad[0]
    samples = [
        load_dataset(folder).sample("test", queries=int(queries), documents=int(documents))
        for folder, queries, documents in (options.squad, *options.also)
    ]
    config = settings(options)
    with show_progress():
        mine_once(squad, options.steps * options.batch_size, config)
        score(options.model, samples, options, None)
        result = train(options.model, config, options.work / "training")
        score(result.checkpoint, samples, options, config)
    write_history(result, options.out / "history.jsonl")
    draw(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    sizes = ("FOLDER", "QUERIES", "DOCUMENTS")
    parser.add_argument("--squad", nargs=3, metavar=sizes, required=True, help="BEIR folder to train on")
    parser.add_argument("--also", nargs=3, metavar=sizes, action="append", default=[], help="zero-shot")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=24, help="questions a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a document")
    parser.add_argument(
        "--work", type=Path, default=Path("squad_learning"), help="folder for pairs and models"
    )
    parser.add_argument("--out", type=Path, default=Path("results/squad_learning"))
    return parser.parse_args()


def settings(options: argparse.Namespace) -> TrainConfig:
    """The paper's loss and temperature; one hard negative, short texts, few steps for two cores."""
    return TrainConfig(
        dataset=str((options.work / f"pairs-{options.steps}x{options.batch_size}.jsonl").absolute()),
        steps=options.steps,
        batch_size=options.batch_size,
        hard_negatives=1,
        query_max_length=40,
        document_max_length=options.max_length,
        warmup=0.15,
        lora=None,
        zero_stage=1,
        cpus_per_worker=detect().threads,
        precision="bfloat16",
        checkpoint_every=20,
    )


def mine_once(squad: str, wanted: int, config: TrainConfig) -> None:
    """Pairs for the steps to come, with BM25 negatives of SQuAD's whole corpus; kept for a second run."""
    file = Path(config.dataset)
    if file.exists():
        return
    pairs = shuffled(load_pairs(squad), seed=config.seed)[: wanted + wanted // 10 + config.batch_size]
    collection = collect(squad, pairs)
    rank = bm25_ranker([text for _, text in collection.documents()], DEPTH)
    mined = mine_pairs(pairs, rank=rank, collection=collection, negatives=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    write_pairs((pair for pair in mined if pair.negatives), unfinished)
    unfinished.rename(file)


def score(
    model: str | Path, samples: list[Dataset], options: argparse.Namespace, config: TrainConfig | None
) -> None:
    """A row a data set; ``config``: how ``model`` was trained, None before it was."""
    for dataset in samples:
        settings: dict[str, Any] = {
            "benchmark": "squad-learning",
            "backbone": options.model,
            "training": config and config.model_dump(mode="json", exclude={"dataset"}),
            "training_data": load_dataset(options.squad[0]).fingerprint,
            "data_fingerprint": dataset.fingerprint,
            "document_length": options.max_length,
        }

        def evaluation(dataset: Dataset = dataset) -> Evaluation:
            found = evaluate(model, dataset, query_max_length=64, document_max_length=options.max_length)
            name = "trained" if config else "untrained"
            print(f"{name} {dataset.name}: nDCG@10 {found.scores.mean['ndcg@10']:.4f}", file=sys.stderr)
            return found

        measure_once(
            options.out,
            settings,
            evaluation,
            backbone=options.model,
            dataset=dataset,
            split="test",
            recovered=config is not None,
        )


def write_history(result: TrainResult, file: Path) -> None:
    file.write_text("".join(json.dumps(step) + "\n" for step in result.history))


def draw(options: argparse.Namespace) -> None:
    """The loss at every step, and nDCG@10 before and after: OUT/squad_learning.svg."""
    from matplotlib.figure import Figure

    out = options.out
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    rows = [row for row in known(out) if row["backbone"] == options.model]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([step["step"] for step in history], [step["loss"] for step in history], color="black")
    left.set(xlabel="optimizer step", ylabel="InfoNCE", ylim=(0, None))
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    for offset, trained in ((-0.2, False), (0.2, True)):
        scores = {row["dataset"]: 100 * row["ndcg_at_10"] for row in rows if row["recovered"] == trained}
        bars = right.bar(
            [place + offset for place in range(len(names))],
            [scores[name] for name in names],
            width=0.4,
            label="trained" if trained else "untrained",
            color="#3b6ea5" if trained else "#c0c0c0",
        )
        right.bar_label(bars, fmt="%.1f")
    right.set_xticks(range(len(names)), [name.split("[")[0] for name in names])
    right.set(ylabel="nDCG@10 × 100", ylim=(0, 100))
    right.legend(frameon=False)
    figure.savefig(out / "squad_learning.svg", metadata={"Date": None})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"squad_learning: {error}")
