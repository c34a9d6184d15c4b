"""Does a criterion find the right cut? Each one's choice beside every cut of that size.

    python benchmarks/cuts.py --data DATA --texts DATA/c4_calibration/passages.jsonl

MiniLM without any two and any three of its blocks, and without any two of its attention and MLP sublayers:
all cuts, untrained, scored on dev samples (this is a choice of method, so never on test) of SciFact and
NFCorpus. Criteria see ``--texts`` alone; dev-loss the dev pairs of NFCorpus, whose queries it is then scored
on too. One row a score in OUT/rows; a run that was stopped goes on. Two cores: about forty minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import known, measure_once

from effir_ray.compression.pipeline import depth_plan, importance_scores
from effir_ray.compression.schedule import Calibration, Criterion, Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import Evaluation, evaluate
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.progress import progress, show_progress

SETS = ("scifact", "nfcorpus")
QUERY_LENGTH, DOCUMENT_LENGTH = 64, 128
CRITERIA: tuple[Criterion, ...] = ("cosine", "pooled", "dev-loss")


def main() -> None:
    options = arguments()
    sampled = {
        name: load_dataset(str(options.data / name)).sample(
            "dev", queries=options.queries, documents=options.documents
        )
        for name in SETS
    }
    full = load_retriever(options.model).plan
    with show_progress():
        cuts = list(all_cuts(len(full.layers)))
        with progress("Cuts", total=len(cuts) * len(SETS), unit="scores") as bar:
            for schedule, (name, dev) in itertools.product([Schedule(), *cuts], sampled.items()):
                score(options, name, dev, schedule, depth_plan(schedule, full, None))
                bar.advance()
        for group, asked in (("2 blocks", {"drop_block": 2}), ("3 blocks", {"drop_block": 3})):
            report(options, group, {name: chosen(options, name, asked, full) for name in CRITERIA})
        pairs = {name: chosen_pair(options, name, full) for name in CRITERIA}
        report(options, "2 sublayers", pairs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--texts", required=True, help="what the criteria see: files of texts, or a corpus")
    parser.add_argument("--queries", type=int, default=75)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/cuts"))
    return parser.parse_args()


def all_cuts(blocks: int) -> Iterator[Schedule]:
    for count in (2, 3):
        for layers in itertools.combinations(range(blocks), count):
            yield Schedule(drop_block=layers)
    sublayers = [(unit, layer) for unit in ("attention", "mlp") for layer in range(blocks)]
    for pair in itertools.combinations(sublayers, 2):
        dropped = {
            unit: tuple(layer for other, layer in pair if other == unit) for unit in ("attention", "mlp")
        }
        yield Schedule(drop_attention=dropped["attention"], drop_mlp=dropped["mlp"])


def score(options: argparse.Namespace, name: str, dev: Dataset, schedule: Schedule, plan: Plan) -> None:
    settings: dict[str, Any] = {
        "benchmark": "cuts",
        "backbone": options.model,
        "plan": plan.model_dump(mode="json"),
        "data": dev.fingerprint,
        "query_length": QUERY_LENGTH,
        "document_length": DOCUMENT_LENGTH,
    }

    def measured() -> Evaluation:
        retriever = apply_plan(load_retriever(options.model), plan)
        return evaluate(
            retriever, dev, split="dev", query_max_length=QUERY_LENGTH, document_max_length=DOCUMENT_LENGTH
        )

    measure_once(
        options.out,
        settings,
        measured,
        backbone=options.model,
        dataset=dev,
        split="dev",
        schedule=schedule,
        plan=plan,
    )


def calibration(options: argparse.Namespace) -> Calibration:
    dataset = str(options.data / "nfcorpus")
    return Calibration(dataset=dataset, texts=96, texts_from=options.texts, max_length=DOCUMENT_LENGTH)


def chosen(options: argparse.Namespace, criterion: Criterion, asked: dict[str, int], full: Plan) -> Plan:
    schedule = Schedule(importance=criterion, **asked)
    model = load_retriever(options.model)
    return depth_plan(schedule, full, importance_scores(model, schedule, calibration(options), {"block"}))


def chosen_pair(options: argparse.Namespace, criterion: Criterion, full: Plan) -> Plan:
    """The two least important sublayers, of whichever unit: counts of each unit whose scores are least."""
    schedule = Schedule(importance=criterion, drop_attention=1, drop_mlp=1)
    scores = importance_scores(
        load_retriever(options.model), schedule, calibration(options), {"attention", "mlp"}
    )
    ranked = sorted(
        [(value, "attention", layer) for layer, value in enumerate(scores.attention)]
        + [(value, "mlp", layer) for layer, value in enumerate(scores.mlp)]
    )[:2]
    dropped = {
        unit: tuple(layer for _, other, layer in ranked if other == unit) for unit in ("attention", "mlp")
    }
    return depth_plan(Schedule(drop_attention=dropped["attention"], drop_mlp=dropped["mlp"]), full, None)


def report(options: argparse.Namespace, group: str, choices: dict[str, Plan]) -> None:
    """Mean nDCG@10 over the data sets of all cuts of a size, and where each criterion's choice stands."""
    scores: dict[str, list[float]] = {}
    for row in known(options.out):
        scores.setdefault(json.dumps(json.loads(row["trial"])["plan"], sort_keys=True), []).append(
            row["ndcg_at_10"]
        )
    means = {key: statistics.mean(values) for key, values in scores.items()}
    size = cut_size(next(iter(choices.values())))
    rivals = sorted(
        (value for key, value in means.items() if cut_size(Plan.model_validate_json(key)) == size)
    )
    full = max(means, key=lambda key: cut_size(Plan.model_validate_json(key)) == 0)
    print(
        f"{group}: {len(rivals)} cuts, best {rivals[-1]:.4f}, median {statistics.median(rivals):.4f}, "
        f"worst {rivals[0]:.4f}; full model {means[full]:.4f}"
    )
    for name, plan in choices.items():
        value = means[json.dumps(plan.model_dump(mode="json"), sort_keys=True)]
        rank = 1 + sum(other > value for other in rivals)
        kept = [index for index, layer in enumerate(plan.layers) if layer.attention and layer.mlp]
        print(f"  {name:9} {value:.4f}  rank {rank} of {len(rivals)}  whole blocks {kept}")


def cut_size(plan: Plan) -> int:
    """Sublayers that are gone; four or six only where two or three blocks are."""
    return sum((not layer.attention) + (not layer.mlp) for layer in plan.layers)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"cuts: {error}")
