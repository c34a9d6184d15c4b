"""Peak memory of a training step by batch size, with and without a token budget (GradCache).

    python benchmarks/gradcache_memory.py --out docs/gradcache_memory.svg       # 2 cores: a minute

Memory is the growth of the process's peak resident size (Linux VmHWM, reset before each step) over its size
before the step. Engine: plain data parallelism in one process; optimizer state is excluded by design.
"""

from __future__ import annotations

import argparse
import gc
import re
from pathlib import Path
from typing import Any

import torch

from effir_ray.backbones.retriever import load_retriever
from effir_ray.training.batches import Batches
from effir_ray.training.config import TrainConfig
from effir_ray.training.engine import PlainEngine
from effir_ray.training.gradcache import ContrastiveStep
from effir_ray.training.losses import build_objective
from effir_ray.training.pairs import Pair
from effir_ray.training.text_encoder import TextEncoder

BATCHES = (32, 64, 128, 256, 512)


def peak(model: str, batch_size: int, budget: int | None) -> float:
    """MiB that one step needs above what was there before."""
    config = TrainConfig(
        dataset="in memory", batch_size=batch_size, hard_negatives=1, steps=2, lora=None, token_budget=budget
    )
    retriever = load_retriever(model)
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=24)

    step = ContrastiveStep(engine, build_objective(config, has_teacher_scores=False), token_budget=budget)
    batches = Batches([pair(number) for number in range(2 * batch_size)], config, tokenize).run()
    step(next(batches))  # gradients exist from here on
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    step(next(batches))
    return status("VmHWM") - before


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
    for (name, values), colour in zip(series.items(), ("#1f6f8b", "#c0392b"), strict=True):
        axes.plot(BATCHES, values, marker="o", color=colour, label=name)
        for size, value in zip(BATCHES, values, strict=True):
            axes.annotate(f"{value:.0f}", (size, value), (0, 6), textcoords="offset points", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="queries a step", ylabel="peak memory of a step, MiB")
    axes.set_xticks(BATCHES, [str(size) for size in BATCHES])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="random:llama")
    parser.add_argument("--budget", type=int, default=2048, help="tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    series = {
        f"token budget {options.budget}": [peak(options.model, size, options.budget) for size in BATCHES],
        "everything kept": [peak(options.model, size, None) for size in BATCHES],
    }
    for name, values in series.items():
        row = "  ".join(f"{size}: {value:.0f}" for size, value in zip(BATCHES, values, strict=True))
        print(f"{name:20} MiB by batch size   {row}")
    if options.out is not None:
        draw(series, options.out)


if __name__ == "__main__":
    main()
