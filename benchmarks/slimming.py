"""Which neurons to remove: self-slimming against training-free rankings at equal width, by dev loss.

    python benchmarks/slimming.py --data DATA/squad --first-blocks 6 --steps 100
    python benchmarks/slimming.py --backbone random:llama --data stdlib --steps 5 --dev-pairs 64

Neurons are ranked on training pairs, the lowest share goes for good (physical narrowing, the paper's global
ranking), and InfoNCE is measured on dev pairs without any training: over fixed batches of 32 in-batch
negatives, the same for every method. Rows are appended to OUT/slimming.csv; those that are there are not
computed again. Two cores, 6 blocks of SmolLM2-135M, 100 steps, three seeds: about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch

from effir_ray.compression.calibration import make_pair_batches, pair_loss
from effir_ray.compression.planning import narrow_plan
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.width.reduction import rank_neurons
from effir_ray.data.pairs import Pair, load_pairs, shuffled
from effir_ray.encoding.padded import embed
from effir_ray.errors import InputError
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.progress import show_progress

SEEDED = (
    "self-slimming",
    "random",
    "taylor",
    "activation",
    "gate-activation",
)  # taylor etc.: the pairs differ
IDENTITY = (
    "backbone",
    "first_blocks",
    "data",
    "method",
    "seed",
    "reduction",
    "steps",
    "max_length",
    "dev_pairs",
)
FIELDS = (*IDENTITY, "dev_loss", "full_loss", "seconds")
BATCH = 16


def main() -> None:
    options = arguments()
    train, dev = load_pairs(options.data), load_pairs(options.data, split="dev")
    dev = shuffled(dev, seed=0)[: options.dev_pairs]
    file = options.out / "slimming.csv"
    full = dev_loss(load(options), dev, options.max_length)
    print(f"full model: dev loss {full:.4f}", file=sys.stderr)
    with show_progress():
        for seed in range(options.seeds):
            for method in options.methods:
                if method == "magnitude" and seed:  # depends on the weights only
                    continue
                if identity(options, method, seed) not in done(file):
                    append(file, measure(options, method, seed, train, dev) | {"full_loss": round(full, 5)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--backbone", default="smollm2-135m", help="best one that was fine-tuned for retrieval"
    )
    parser.add_argument("--first-blocks", type=int, help="use only so many blocks of it")
    parser.add_argument("--data", required=True, help="a BEIR folder with train queries, or 'stdlib'")
    parser.add_argument("--methods", nargs="+", default=["self-slimming", "magnitude", "random"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="gate training steps of self-slimming")
    parser.add_argument("--reduction", type=float, default=0.3, help="share of neurons removed")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--dev-pairs", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("results/slimming"))
    return parser.parse_args()


def load(options: argparse.Namespace) -> Retriever:
    return load_retriever(options.backbone, first_blocks=options.first_blocks)


def measure(
    options: argparse.Namespace, method: str, seed: int, train: list[Pair], dev: list[Pair]
) -> dict[str, object]:
    started = time.perf_counter()
    retriever = load(options)
    pairs = shuffled(train, seed=seed)[: options.steps * BATCH]
    if method not in ("self-slimming", "random"):
        pairs = pairs[:512]
    scores = rank_neurons(
        retriever,
        method,
        pairs,
        steps=options.steps,
        seed=seed,
        batch_size=BATCH,
        max_length=options.max_length,
    )
    schedule = Schedule(width_reduction=options.reduction, width_method=method)
    apply_plan(retriever, narrow_plan(retriever.plan, schedule, scores))
    return identity(options, method, seed) | {
        "dev_loss": round(dev_loss(retriever, dev, options.max_length), 5),
        "seconds": round(time.perf_counter() - started, 1),
    }


def identity(options: argparse.Namespace, method: str, seed: int) -> dict[str, object]:
    """All that determines a row, as the table has it."""
    settings = vars(options) | {
        "first_blocks": options.first_blocks or "all",
        "data": Path(options.data).name,
        "method": method,
        "seed": seed,
        "steps": options.steps if method == "self-slimming" else 0,
    }
    return {name: str(settings[name]) for name in IDENTITY}


@torch.inference_mode()
def dev_loss(retriever: Retriever, dev: list[Pair], max_length: int) -> float:
    """Mean InfoNCE over the dev pairs, batches of 32."""
    losses = []
    for batch in make_pair_batches(retriever, dev, batch_size=32, max_length=max_length):
        queries, documents = embed(retriever, batch.queries), embed(retriever, batch.documents)
        losses.append(pair_loss(queries, documents, batch.allowed).item())
    return float(np.mean(losses))


def done(file: Path) -> list[dict[str, str]]:
    """The identities of the rows that are there."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return [{name: row[name] for name in IDENTITY} for row in csv.DictReader(stream)]


def append(file: Path, row: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"slimming: {error}")
