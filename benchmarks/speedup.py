"""How much faster compressed Mistral-7B encodes: the paper's speed-up table (table 3), measured.

    python benchmarks/speedup.py DATA --shrink 4     a CPU: the same 32 layers, every width a quarter
    python benchmarks/speedup.py DATA                a GPU with 80 GB: the whole shape, bfloat16

Weights are random: speed does not depend on them. Every schedule runs beside the full model, in turn within
each round, on the first documents and queries of DATA (a BEIR folder), with effir-ray's encoder for both.
The FLOP bound is the ratio of the two models' FLOPs on these texts; which MLPs go makes no difference but for
the last layer's, which a last-token model computes for one token a text: it stays. The table goes to
results/speedup/, named after the hardware; a plot goes beside it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effir_ray.errors import InputError

BACKBONE = "mistralai/Mistral-7B-v0.1"
SCHEDULES = {
    "drop-8A": ("attention", 8, 0.0),
    "drop-16A": ("attention", 16, 0.0),
    "drop-8M": ("mlp", 8, 0.0),
    "drop-16M": ("mlp", 16, 0.0),
    "drop-20M": ("mlp", 20, 0.0),
    "EffiR-16M-width-30": ("mlp", 16, 0.3),
}
"""Name in the paper -> what is dropped, of how many layers, and the part of the remaining neurons removed."""


def random_backbone(shrink: int):
    """The shape of Mistral-7B, every width divided by ``shrink``, as a last-token retriever."""
    import torch

    from effir_ray.hardware import detect
    from effir_ray.models.architecture import build_model
    from effir_ray.models.loading import load_config
    from effir_ray.models.plan import Plan
    from effir_ray.models.retriever import Retriever, RetrieverSpec, load_retriever

    config = load_config(BACKBONE)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) // shrink)
    tokenizer = load_retriever("smollm2-135m").tokenizer  # a real one: lengths are those of real text
    config.vocab_size, config.head_dim = len(tokenizer), 128
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.dtype = getattr(torch, detect().dtype)
    with torch.device(detect().device):
        model = build_model(config).to(config.dtype).eval()
    plan = Plan.full(config.num_hidden_layers)
    return Retriever(model, tokenizer, RetrieverSpec(pooling="last", append_eos=True), plan, BACKBONE)


def compressed(retriever, unit: str, dropped: int, width_reduction: float):
    """A model cut to one schedule that shares all weights that are whole with ``retriever``'s."""
    from effir_ray.compression.planning import uniform_width
    from effir_ray.compression.surgery import apply_plan
    from effir_ray.models.plan import Plan

    layers, last = list(retriever.plan.layers), len(retriever.plan.layers) - 1
    for index in range(last - dropped, last):
        layers[index] = layers[index].model_copy(update={unit: False})
    plan = Plan(layers=tuple(layers))
    if width_reduction:
        plan = uniform_width(retriever.model.config, plan, width_reduction, None)
    shared = {id(parameter): parameter for parameter in retriever.model.parameters()}
    variant = copy.copy(retriever)
    variant.model = copy.deepcopy(retriever.model, shared)
    return apply_plan(variant, plan)


def measure(
    retriever, name: str, queries: Sequence[str], documents: Sequence[str], rounds: int, precision: str
) -> dict[str, Any]:
    """The row of one schedule: speed-ups over the full model, their ranges over rounds, the FLOP bounds."""
    from effir_ray.encoding.encoder import Encoder
    from effir_ray.evaluation.efficiency import measure_efficiency

    variant = compressed(retriever, *SCHEDULES[name])
    # Random weights are no measure of how close a type stays: on CPUs it is asked for.
    asked = precision if retriever.model.device.type == "cpu" else None
    models = {
        label: Encoder(model, precision=asked) for label, model in (("full", retriever), (name, variant))
    }
    found = measure_efficiency(models, queries, documents, rounds=rounds, reference="full")
    row: dict[str, Any] = {"variant": name}
    for kind, texts in (("query", queries), ("document", documents)):
        low, high = getattr(found[name], f"{kind}_speedup_interval")
        row |= {
            f"{kind}_speedup": round(getattr(found[name], f"{kind}_speedup"), 3),
            f"{kind}_speedup_lowest": round(low, 3),
            f"{kind}_speedup_highest": round(high, 3),
            f"{kind}_flop_bound": round(work(retriever, texts, kind) / work(variant, texts, kind), 3),
        }
    return row | {
        "tokens_per_s": round(found[name].tokens_per_s, 1),
        "full_tokens_per_s": round(found["full"].tokens_per_s, 1),
    }


def work(retriever, texts: Sequence[str], kind: str) -> int:
    from effir_ray.models.accounting import flops

    lengths = [len(ids) for ids in retriever.tokenize(texts, kind)]
    return sum(flops(retriever.model.config, retriever.plan, length) for length in lengths)


def published() -> dict[str, dict[str, str]]:
    """The paper's rows of this backbone, by variant."""
    from importlib.resources import files

    text = files("effir_ray.results").joinpath("reference/effir_speedup_h100.csv").read_text(encoding="utf-8")
    name = BACKBONE.partition("/")[2]
    return {row["variant"]: row for row in csv.DictReader(text.splitlines()) if row["backbone"] == name}


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    names = [row["variant"] for row in rows][::-1]
    for axes, kind in zip(panels, ("query", "document"), strict=True):
        series = {
            "FLOP bound": [row[f"{kind}_flop_bound"] for row in rows],
            "paper, H100": [row[f"paper_{kind}_speedup"] or float("nan") for row in rows],
            "measured": [row[f"{kind}_speedup"] for row in rows],
        }
        for place, ((label, values), color) in enumerate(
            zip(series.items(), ("#d9d9d9", "#8c8c8c", "#1f77b4"), strict=True)
        ):
            at = [index + 0.27 * (place - 1) for index in range(len(names))]
            bars = axes.barh(at, values[::-1], height=0.25, color=color, label=label)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.margins(x=0.12)
        axes.set_xlabel(f"{kind} encoding speed, full model = 1")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a BEIR folder")
    parser.add_argument("--shrink", type=int, default=1, choices=(1, 2, 4, 8), help="divides every width")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--out", type=Path, default=Path("results/speedup"))
    parser.add_argument("--precision", help="on CPUs; default: what the processor is fast in")
    arguments = parser.parse_args()

    import torch

    from effir_ray.data.datasets import load_dataset
    from effir_ray.hardware import detect

    hardware = detect()
    precision = arguments.precision or hardware.precision
    torch.set_num_threads(hardware.threads)
    dataset = load_dataset(arguments.data)
    documents = [d.document_text for d in dataset.corpus.iter_documents(0, arguments.documents)]
    queries = list(dataset.queries("test").values())[: arguments.queries]
    retriever, paper, rows = random_backbone(arguments.shrink), published(), []
    about = {
        "backbone": BACKBONE,
        "shrink": arguments.shrink,
        "hardware": hardware.name,
        "dtype": precision,
        "dataset": dataset.name,
        "documents": len(documents),
        "queries": len(queries),
        "rounds": arguments.rounds,
    }
    for name in arguments.only:
        row = measure(retriever, name, queries, documents, arguments.rounds, precision)
        for kind in ("query", "document"):
            row[f"paper_{kind}_speedup"] = float(paper[name][f"{kind}_speedup"]) if name in paper else None
        rows.append(row)
        print(
            f"{name:20} queries {row['query_speedup']:.2f}x (bound {row['query_flop_bound']:.2f}), documents "
            f"{row['document_speedup']:.2f}x (bound {row['document_flop_bound']:.2f})",
            flush=True,
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    shape = "Mistral-7B" + (
        f" shape, 1/{arguments.shrink} of its width" if arguments.shrink > 1 else " shape"
    )
    stem = arguments.out / re.sub(r"\W+", "-", f"{shape} {hardware.name} {precision}").strip("-").lower()
    with Path(f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=[*about, *rows[0]], lineterminator="\n")
        table.writeheader()
        table.writerows(about | row for row in rows)
    title = f"{shape}, random weights, {dataset.name}, {precision}, {hardware.name}"
    plot(rows, title, Path(f"{stem}.svg"))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"speedup: {error}")
