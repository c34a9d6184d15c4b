"""Widths by budget: a solver's choice for every layer, beside a global ranking and whole blocks.

    python benchmarks/budget.py --data DATA --texts DATA/c4_calibration/passages.jsonl

MiniLM, untrained, with as many block parameters as 5, 4 and 3 of its 6 blocks have, so that every way of
cutting makes a model of one size: without the blocks that ``pooled`` finds; with neurons ranked over all
layers (``width_reduction``); with equal widths; and as the solver chooses by losses of single layers: widths
alone, widths and whole sublayers, or widths of what is left when ``pooled`` took fewer blocks. Everything is
chosen on one half of ``--texts``; how far embeddings moved (1 - cos) is the mean over the other half. Scored
on dev samples (this is a choice of method, so never on test) of SciFact and NFCorpus. One row a score in
OUT/rows, and a table a width method in OUT; losses lie in WORK, and a run that was stopped goes on. Two
cores: a quarter of an hour.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rows import known, measure_once

from effir_ray.compression.budget import Replacements, choose_within, layer_options
from effir_ray.compression.calibration import draw_examples
from effir_ray.compression.depth.importance import measure_importance
from effir_ray.compression.pipeline import depth_plan
from effir_ray.compression.planning import NeuronScores, narrow_plan
from effir_ray.compression.replacements import measure_replacements
from effir_ray.compression.schedule import Schedule, WidthMethod
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.width.reduction import rank_neurons
from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.data.pairs import Pair
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import Evaluation, evaluate
from effir_ray.models.accounting import anatomy_of, count_block_parameters
from effir_ray.models.plan import Plan
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.progress import progress, show_progress

SETS = ("scifact", "nfcorpus")
QUERY_LENGTH, DOCUMENT_LENGTH = 64, 128
MULTIPLE = 8
EIGHTHS = tuple(eighth / 8 for eighth in range(7, 0, -1))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """``way``: how it was chosen; ``blocks``: as many parameters as these have; ``predicted``: how far it
    moves embeddings by the sum of single losses, of a solver's choice."""

    way: str
    blocks: int
    schedule: Schedule
    plan: Plan
    predicted: float | None = None


class Chooser:
    """Everything that is measured on the texts ``seen`` of one model, once."""

    def __init__(self, model: str, seen: list[Pair], width_method: WidthMethod, work: Path) -> None:
        self.model, self.seen, self.width_method, self.work = model, seen, width_method, work
        retriever = self.load()
        self.config, self.full = retriever.model.config, retriever.plan
        self.texts = [example.positives[0] for example in seen]
        self.queries = [example.query for example in seen]

    def load(self) -> Retriever:
        return load_retriever(self.model)

    @functools.cache  # noqa: B019  # there is one
    def scores(self, plan: Plan) -> NeuronScores:
        """Of the neurons of what depth leaves, as ``compress`` ranks them."""
        return rank_neurons(
            apply_plan(self.load(), plan), self.width_method, self.seen, max_length=DOCUMENT_LENGTH
        )

    @functools.cache  # noqa: B019  # there is one
    def worst_blocks(self, count: int) -> tuple[int, ...]:
        found = measure_importance(
            self.load(),
            self.texts,
            criterion="pooled",
            queries=self.queries,
            max_length=DOCUMENT_LENGTH,
            units={"block"},
        )
        return next(blocks for blocks in found.best["block"] if len(blocks) == count)

    def losses(self, plan: Plan, *, whole_sublayers: bool) -> Replacements:
        """Of the full model every option is measured once; widths alone are some of them."""
        everything = whole_sublayers or plan == self.full
        levels = (*EIGHTHS, 0.0) if everything else EIGHTHS
        options = layer_options(self.config, plan, levels, attention=everything)
        settings = [self.model, self.width_method, digest(self.seen), plan.model_dump_json(), str(options)]
        file = self.work / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.json"
        if not file.is_file():
            measured = measure_replacements(
                self.load(),
                self.texts,
                options,
                self.scores(plan),
                plan=plan,
                queries=self.queries,
                max_length=DOCUMENT_LENGTH,
            )
            file.write_text(measured.model_dump_json())
        found = Replacements.model_validate_json(file.read_text())
        return found if whole_sublayers else widths_alone(found)

    def depth(self, schedule: Schedule) -> Plan:
        return depth_plan(schedule, self.full, None)

    def cut(self, way: str, blocks: int, predicted: float | None = None, **settings: Any) -> Cut:
        schedule = Schedule(**{"width_method": self.width_method, "width_multiple": MULTIPLE} | settings)
        depth = self.depth(schedule)
        plan = narrow_plan(depth, schedule, self.scores(depth) if schedule.narrows else {})
        return Cut(way=way, blocks=blocks, schedule=schedule, plan=plan, predicted=predicted)

    def solved(self, way: str, blocks: int, plan: Plan, *, whole_sublayers: bool = False) -> Cut:
        measured = self.losses(plan, whole_sublayers=whole_sublayers)
        like = Schedule(width_method=self.width_method, width_multiple=MULTIPLE)
        (choice,) = choose_within(self.config, measured, [blocks / len(plan.layers)], like=like)
        return self.cut(f"solver: {way}", blocks, choice.loss, **choice.schedule.model_dump())

    def cuts(self, blocks: int) -> list[Cut]:
        """Every way of cutting to as many block parameters as ``blocks`` blocks have."""
        depth, parts = len(self.full.layers), anatomy_of(self.config).layers
        whole = count_block_parameters(self.config, self.full)
        budget = whole * blocks // depth
        neurons = sum(each.width for each in parts)
        gone = -(-(whole - budget) // (parts[0].parameters_a_neuron * MULTIPLE)) * MULTIPLE
        even = (neurons - gone) // (depth * MULTIPLE) * MULTIPLE
        found = [
            self.cut("whole blocks", blocks, drop_block=self.worst_blocks(depth - blocks)),
            self.cut("global ranking", blocks, width_reduction=gone / neurons),
            self.cut("equal widths", blocks, layer_widths=(even,) * depth),
            self.solved("widths", blocks, self.full),
            self.solved("widths and sublayers", blocks, self.full, whole_sublayers=True),
        ]
        for fewer in range(1, depth - blocks):
            left = self.depth(Schedule(drop_block=self.worst_blocks(fewer)))
            found.append(self.solved(f"widths, {fewer} blocks gone", blocks, left))
        for cut in found:
            assert count_block_parameters(self.config, cut.plan) <= budget, cut
        return found


def widths_alone(measured: Replacements) -> Replacements:
    """Without the options that drop what ``plan`` still has."""
    layers = [
        [
            (option, loss)
            for option, loss in zip(options, losses, strict=True)
            if option.attention == kept.attention and (option.width > 0) == kept.mlp
        ]
        for options, losses, kept in zip(measured.options, measured.losses, measured.plan.layers, strict=True)
    ]
    return Replacements(
        plan=measured.plan,
        loss=measured.loss,
        options=tuple(tuple(option for option, _ in layer) for layer in layers),
        losses=tuple(tuple(loss for _, loss in layer) for layer in layers),
    )


def digest(examples: list[Pair]) -> str:
    texts = json.dumps([[example.query, *example.positives] for example in examples])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    examples = draw_examples(options.texts, 2 * options.calibration, 0)
    seen, others = examples[: options.calibration], examples[options.calibration :]
    sampled = [
        load_dataset(str(options.data / name)).sample(
            "dev", queries=options.queries, documents=options.documents
        )
        for name in SETS
    ]
    with show_progress():
        chooser = Chooser(options.model, seen, options.width_method, options.work)
        cuts = [
            Cut(way="full model", blocks=len(chooser.full.layers), schedule=Schedule(), plan=chooser.full)
        ]
        for blocks in options.blocks:
            cuts += chooser.cuts(blocks)
        with progress("Cuts", total=len(cuts) * len(SETS), unit="scores") as bar:
            for cut, dev in itertools.product(cuts, sampled):
                score(options, dev, cut, seen)
                bar.advance()
        moved = distances(chooser, cuts, others)
    report(options, cuts, moved, seen)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--texts", required=True, help="what cuts are chosen on: files of texts, or a corpus")
    parser.add_argument("--calibration", type=int, default=48, help="texts of each half")
    parser.add_argument("--width-method", default="taylor", help="one that needs no training")
    parser.add_argument("--blocks", nargs="+", type=int, default=[5, 4, 3], help="budgets, in whole blocks")
    parser.add_argument("--queries", type=int, default=75)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("runs/budget"))
    parser.add_argument("--out", type=Path, default=Path("results/budget"))
    return parser.parse_args()


def settings(options: argparse.Namespace, cut: Cut, seen: list[Pair]) -> dict[str, Any]:
    """What determines the model."""
    return {
        "benchmark": "budget",
        "backbone": options.model,
        "way": cut.way,
        "blocks": cut.blocks,
        "schedule": cut.schedule.model_dump(mode="json"),
        "texts": digest(seen),
        "query_length": QUERY_LENGTH,
        "document_length": DOCUMENT_LENGTH,
    }


def score(options: argparse.Namespace, dev: Dataset, cut: Cut, seen: list[Pair]) -> None:
    def measured() -> Evaluation:
        retriever = apply_plan(load_retriever(options.model), cut.plan)
        return evaluate(
            retriever, dev, split="dev", query_max_length=QUERY_LENGTH, document_max_length=DOCUMENT_LENGTH
        )

    measure_once(
        options.out,
        settings(options, cut, seen) | {"data": dev.fingerprint},
        measured,
        backbone=options.model,
        dataset=dev,
        split="dev",
        schedule=cut.schedule,
        plan=cut.plan,
    )


def distances(chooser: Chooser, cuts: list[Cut], others: list[Pair]) -> list[float]:
    """Of each cut the mean of 1 - cos to the full model's embeddings, over texts that no choice has seen."""

    def embedded(plan: Plan) -> NDArray[np.float32]:
        encoder = Encoder(apply_plan(chooser.load(), plan), precision="float32")
        documents = encoder.encode(
            [example.positives[0] for example in others], "document", max_length=DOCUMENT_LENGTH
        )
        queries = encoder.encode([example.query for example in others], "query", max_length=DOCUMENT_LENGTH)
        vectors = np.concatenate([documents, queries])
        unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit

    full = embedded(chooser.full)
    return [float(np.mean(1 - np.sum(full * embedded(cut.plan), axis=1))) for cut in cuts]


def report(options: argparse.Namespace, cuts: list[Cut], moved: list[float], seen: list[Pair]) -> None:
    """A line a cut, which is what OUT/table.md keeps beside the rows."""
    scores: dict[str, dict[str, float]] = {}
    for row in known(options.out):
        trial = json.loads(row["trial"])
        trial.pop("data")
        scores.setdefault(json.dumps(trial, sort_keys=True), {})[row["dataset"]] = row["ndcg_at_10"]
    names = ["as large as", "cut", *SETS, "mean", "1 - cos", "predicted", "shape"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for cut, distance in zip(cuts, moved, strict=True):
        found = scores[json.dumps(settings(options, cut, seen), sort_keys=True)]
        values = [next(value for name, value in found.items() if name.startswith(each)) for each in SETS]
        cells = [f"{cut.blocks} blocks", cut.way]
        cells += [f"{100 * value:.1f}" for value in (*values, statistics.mean(values))]
        cells += [f"{max(distance, 0.0):.4f}", "" if cut.predicted is None else f"{cut.predicted:.4f}"]
        lines.append(f"| {' | '.join([*cells, cut.schedule.name])} |")
    text = "\n".join(lines) + "\n"
    (options.out / f"{options.width_method}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"budget: {error}")
