"""Peak memory of a training step by batch size, with and without a token budget (GradCache).

    python benchmarks/gradcache_memory.py --out docs/gradcache_memory.svg       # 2 cores: a minute

Each measurement has a process of its own: memory is the growth of its peak resident size (Linux VmHWM) over
its size before the step. Engine: plain data parallelism; optimizer state is excluded by design.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from effir_ray.data.pairs import Pair
from effir_ray.models.retriever import load_retriever
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.batches import Batch, Batches
from effir_ray.training.step.engine import PlainEngine
from effir_ray.training.step.gradcache import ContrastiveStep
from effir_ray.training.step.losses import build_objective
from effir_ray.training.step.text_encoder import TextEncoder

BATCHES = (32, 64, 128, 256, 512)


def peak(model: str, batch_size: int, budget: int | None) -> float:
    """MiB that one step of this process needs above what was there before it."""
    config = TrainConfig(
        dataset="in memory", batch_size=batch_size, hard_negatives=1, steps=1, lora=None, token_budget=budget
    )
    retriever = load_retriever(model)
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=24)

    def batch(size: int) -> Batch:
        small = config.model_copy(update={"batch_size": size})
        return next(Batches([pair(number) for number in range(size)], small, tokenize).run())

    objective = build_objective(config, has_teacher_scores=False)
    step = ContrastiveStep(engine, objective, token_budget=budget)
    step(batch(2))  # gradients exist from here on
    whole = batch(batch_size)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    step(whole)
    return status("VmHWM") - before


def in_own_process(model: str, batch_size: int, budget: int | None) -> float:
    """What was freed stays with a process: a second measurement there would find less."""
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--one", str(batch_size), str(budget or 0)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(done.stdout)


def pair(number: int) -> Pair:
    text = " ".join(f"word{number + i}" for i in range(12))
    return Pair(
        query_id=str(number),
        query=f"query {text[:60]}",
        positives=(f"positive {text}",),
        negatives=(f"negative {text}",),
        positive_ids=(f"p{number}",),
        negative_ids=(f"n{number}",),
    )


def status(field: str) -> float:
    """A size of this process in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")
    return int(found[1]) / 1024


def draw(series: dict[str, list[float]], file: Path) -> None:
    """A line a series over the batch size, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    styles = (("#1f6f8b", -12), ("#c0392b", 6))  # labels below the lower line, above the upper one
    for (name, values), (colour, above) in zip(series.items(), styles, strict=True):
        axes.plot(BATCHES, values, marker="o", color=colour, label=name)
        for size, value in zip(BATCHES, values, strict=True):
            axes.annotate(f"{value:.0f}", (size, value), (0, above), textcoords="offset points", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="queries a step", ylabel="peak memory of a step, MiB")
    axes.set_xticks(BATCHES, [str(size) for size in BATCHES])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.15)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="random:llama")
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(peak(options.model, options.one[0], options.one[1] or None))
        return
    series = {
        name: [in_own_process(options.model, size, budget) for size in BATCHES]
        for name, budget in ((f"token budget {options.budget}", options.budget), ("everything kept", None))
    }
    for name, values in series.items():
        row = "  ".join(f"{size}: {value:.0f}" for size, value in zip(BATCHES, values, strict=True))
        print(f"{name:20} MiB by batch size   {row}")
    if options.out is not None:
        draw(series, options.out)


if __name__ == "__main__":
    main()
