"""Training steps against sentence-transformers' trainer: same model, data, batches and optimizer, in turns.

    python benchmarks/train.py --dataset DATA/squad --blocks 8 --steps 5 --rounds 3  # 2 cores, ten minutes
    python benchmarks/train.py --dataset stdlib --blocks 6 --steps 3 --rounds 2      # a few minutes
    python benchmarks/train.py --dataset DATA/squad --blocks 4 --steps 80 --curves 3 # bfloat16 beside float32

Systems: InfoNCE over the whole batch (ours, also in bfloat16 where the processor has it;
MultipleNegativesRankingLoss) and with a bound on memory (ours with a token budget,
CachedMultipleNegativesRankingLoss). A round runs every system once, from the same weights and over the same
batches; the median step of each round is kept. Losses are compared step by step. ``--curves N`` trains with N
seeds in both types instead and compares whole learning curves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist

from effir_ray.data.pairs import Pair, load_pairs
from effir_ray.hardware import detect
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.run.loop import prepare
from effir_ray.training.step.batches import Batches
from effir_ray.training.step.gradcache import ContrastiveStep
from effir_ray.training.step.losses import build_objective

RATE = 5e-5
BUDGET = 2048  # tokens whose activations are held at once by the bounded systems

BFLOAT16 = "effir-ray, bfloat16"

Step = tuple[float, float]  # seconds, loss


def ours(model: Path, pairs: list[Pair], options: argparse.Namespace, budget: int | None) -> list[Step]:
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    group = f"file://{model.parent}/group-{os.getpid()}"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=group)
    config = train_config(options, budget)
    retriever = load_retriever(model)
    engine = prepare(retriever, config, torch.device("cpu"), bfloat16=options.bfloat16)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=options.max_length)

    step = ContrastiveStep(engine, build_objective(config, has_teacher_scores=False), token_budget=budget)
    steps = []
    began = time.perf_counter()
    for batch in Batches(pairs, config, tokenize).run():
        outcome = step(batch)
        engine.step(RATE)
        now = time.perf_counter()
        steps.append((now - began, outcome.loss))
        began = now
    return steps


def train_config(options: argparse.Namespace, budget: int | None) -> TrainConfig:
    return TrainConfig(
        dataset=options.dataset,
        hard_negatives=0,
        steps=options.steps,
        batch_size=options.batch,
        zero_stage=2,
        lora=None,
        token_budget=budget,
        seed=options.seed,
        precision="bfloat16" if options.bfloat16 else "float32",
    )


def sentence_transformers(
    model: Path, pairs: list[Pair], options: argparse.Namespace, budget: int | None
) -> list[Step]:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from transformers import TrainerCallback

    encoder = SentenceTransformer(str(model), device="cpu")
    encoder.max_seq_length = options.max_length
    if budget is None:
        loss = losses.MultipleNegativesRankingLoss(encoder, scale=50.0)
    else:
        rows = max(1, budget // options.max_length)
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, scale=50.0, mini_batch_size=rows)

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.values: list[float] = []
            self.began = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.began)
            self.began = now

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                self.values.append(logs["loss"])

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            batch_sampler=in_order,
        )
        ordered = [pair for batch in our_order(pairs, options) for pair in batch]
        data = Dataset.from_dict(
            {"anchor": [query for query, _ in ordered], "positive": [text for _, text in ordered]}
        )
        SentenceTransformerTrainer(
            model=encoder, args=arguments, train_dataset=data, loss=loss, callbacks=[clock]
        ).train()
    return list(zip(clock.seconds, clock.values, strict=True))


def in_order(dataset: Any, batch_size: int, drop_last: bool, **options: Any) -> Any:
    from sentence_transformers.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def our_order(pairs: list[Pair], options: argparse.Namespace) -> Iterator[list[tuple[str, str]]]:
    """(query, positive) of every step as ``Batches`` gives them."""

    def no_tokens(texts: Any, kind: Any) -> list[list[int]]:
        return [[0] for _ in texts]

    for batch in Batches(pairs, train_config(options, None), no_tokens).run():
        b = batch.n_queries
        yield list(zip(batch.texts[:b], batch.texts[b:], strict=True))


SYSTEMS: dict[str, tuple[Callable[..., list[Step]], int | None]] = {
    "effir-ray": (ours, None),
    BFLOAT16: (ours, None),
    "MNRL": (sentence_transformers, None),
    "effir-ray, token budget": (ours, BUDGET),
    "CachedMNRL": (sentence_transformers, BUDGET),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, default=None, help="only the first blocks")
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256, dest="max_length")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curves", type=int, metavar="SEEDS", help="learning curves of both types instead")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.bfloat16 = options.system == BFLOAT16
    if options.system is not None:
        system, budget = SYSTEMS[options.system]
        pairs = distinct(load_pairs(options.dataset))
        options.out.write_text(json.dumps(system(options.model, pairs, options, budget)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        save_checkpoint(load_retriever(options.backbone, first_blocks=options.blocks), model)
        if options.curves is not None:
            curves(model, Path(scratch) / "steps.json", options)
            return
        systems = [name for name in SYSTEMS if name != BFLOAT16 or detect().precision == "bfloat16"]
        runs: dict[str, list[list[Step]]] = {name: [] for name in systems}
        for _ in range(options.rounds):
            for name in systems:
                runs[name].append(in_own_process(name, model, Path(scratch) / "steps.json"))
    report(runs, options)


def curves(model: Path, scratch: Path, options: argparse.Namespace) -> None:
    """Losses of every step in both types, a seed after the other; the table goes to ``--out``."""
    rows = []
    for seed in range(options.curves):
        for system in ("effir-ray", BFLOAT16):
            for step, (seconds, loss) in enumerate(in_own_process(system, model, scratch, seed)):
                row = {"seed": seed, "precision": "bfloat16" if system == BFLOAT16 else "float32"}
                rows.append(row | {"step": step, "seconds": round(seconds, 3), "loss": round(loss, 4)})
            last = [row["loss"] for row in rows[-10:]]
            print(
                f"seed {seed}, {system}: mean loss of the last ten steps {statistics.mean(last):.4f}",
                flush=True,
            )
    settings = {
        name: getattr(options, name) for name in ("backbone", "blocks", "dataset", "batch", "max_length")
    }
    about = {"hardware": detect().name, **settings, "dataset": Path(options.dataset).name}
    out = options.out or Path(f"results/training/precision-{options.backbone}-{options.blocks}-blocks.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "steps": rows}, indent=1) + "\n", encoding="utf-8")


def in_own_process(system: str, model: Path, out: Path, seed: int = 0) -> list[Step]:
    """Steps of one system, started afresh with this script's own options."""
    own = ["--system", system, "--model", model, "--out", out, "--seed", seed]
    command = [sys.executable, __file__, *sys.argv[1:], *own]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{system} failed:\n{done.stderr[-3000:]}")
    return [tuple(step) for step in json.loads(out.read_text(encoding="utf-8"))]


def distinct(pairs: list[Pair]) -> list[Pair]:
    """One pair a positive: sentence-transformers would count a copy of the positive as a negative."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair.positive_ids[0], pair)
    return [pair for pair in first.values() if len(pair.positives) == 1]


def report(runs: dict[str, list[list[Step]]], options: argparse.Namespace) -> None:
    """Medians over rounds of each round's median step; the first step of a round, a warm-up, is left out."""
    seconds = {
        name: statistics.median(statistics.median(step[0] for step in round_[1:]) for round_ in rounds)
        for name, rounds in runs.items()
    }
    losses = {name: [step[1] for step in rounds[0]] for name, rounds in runs.items()}
    for name in runs:
        values = " ".join(f"{loss:.3f}" for loss in losses[name])
        print(f"{name:24} {seconds[name]:8.2f} s/step   losses {values}")
    speedup = {
        "over MNRL": seconds["MNRL"] / seconds["effir-ray"],
        "over CachedMNRL": seconds["CachedMNRL"] / seconds["effir-ray, token budget"],
    }
    if BFLOAT16 in seconds:
        speedup["bfloat16 over float32"] = seconds["effir-ray"] / seconds[BFLOAT16]
    result = {
        "hardware": detect().name,
        "settings": {
            "backbone": options.backbone,
            "blocks": options.blocks,
            "dataset": Path(options.dataset).name,
            "batch": options.batch,
            "max_length": options.max_length,
            "steps": options.steps,
            "rounds": options.rounds,
        },
        "seconds_per_step": seconds,
        "losses": losses,
        "speedup": speedup,
    }
    for name, ratio in speedup.items():
        print(f"{ratio:.2f}x {name}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
