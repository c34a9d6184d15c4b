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
from effir_ray.training.engine import PlainEngine, TextEncoder
from effir_ray.training.gradcache import ContrastiveStep
from effir_ray.training.losses import build_objective
from effir_ray.training.pairs import Pair

BATCHES = (32, 64, 128, 256, 512)
WIDTH, HEIGHT, MARGIN = 560, 320, 56


def peak(model: str, batch_size: int, budget: int | None) -> float:
    """MiB that one step needs above what was there before."""
    config = TrainConfig(
        dataset="in memory", batch_size=batch_size, hard_negatives=1, steps=2, lora=None, token_budget=budget
    )
    retriever = load_retriever(model)
    engine = PlainEngine(TextEncoder(retriever), config, torch.device("cpu"), False)

    def tokenize(texts: Any, kind: Any) -> list[list[int]]:
        return retriever.tokenize(texts, kind, max_length=24)

    step = ContrastiveStep(
        engine, build_objective(config, has_teacher_scores=False), pad_token=0, token_budget=budget
    )
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


def figure(series: dict[str, list[float]]) -> str:
    """A line a series over the batch size, both axes logarithmic, as SVG."""
    highest = max(max(values) for values in series.values())
    lowest = max(1.0, min(min(values) for values in series.values()))

    def x(index: int) -> float:
        return MARGIN + index * (WIDTH - 2 * MARGIN) / (len(BATCHES) - 1)

    def y(value: float) -> float:
        share = torch.log(torch.tensor(max(value, 1.0) / lowest)) / torch.log(torch.tensor(highest / lowest))
        return HEIGHT - MARGIN - float(share) * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
    ]
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    for index, size in enumerate(BATCHES):
        parts.append(
            f'<text x="{x(index):.0f}" y="{HEIGHT - 32}" font-size="12" text-anchor="middle">{size}</text>'
        )
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" font-size="13" text-anchor="middle">queries a step</text>'
    )
    for colour, (name, values) in zip(("#c0392b", "#1f6f8b"), series.items(), strict=True):
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for index, value in enumerate(values):
            label = f'<text x="{x(index):.0f}" y="{y(value) - 8:.0f}" font-size="11" text-anchor="middle"'
            parts.append(f'{label} fill="{colour}">{value:.0f}</text>')
        height = 20 if colour == "#c0392b" else 38
        parts.append(f'<text x="{MARGIN}" y="{height}" font-size="13" fill="{colour}">{name} (MiB)</text>')
    return "\n".join([*parts, "</svg>", ""])


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
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(figure(series), encoding="utf-8")


if __name__ == "__main__":
    main()
