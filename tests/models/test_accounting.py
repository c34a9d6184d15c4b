"""Sizes and FLOPs from configurations: against real models, PyTorch's counter and the paper."""

import csv
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effir_ray.compression.planning import make_plan, uniform_width
from effir_ray.compression.schedule import Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models import family
from effir_ray.models.accounting import count_block_parameters, count_parameters, flops, model_bytes
from effir_ray.models.loading import load_config
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import load_retriever

PLAN = Plan(
    layers=(
        LayerPlan(mlp=False),
        LayerPlan(attention=False),
        LayerPlan(neurons=tuple(range(0, 128, 2))),
        LayerPlan(attention=False, mlp=False),
    )
)
PUBLISHED = Path(__file__).parents[2] / "effir_ray" / "results" / "reference" / "effir_beir_ndcg10.csv"
HUB_NAMES = {
    "E5-Mistral-7B": "intfloat/e5-mistral-7b-instruct",
    "Mistral-7B-v0.1": "mistralai/Mistral-7B-v0.1",
    "Llama-2-7B": "meta-llama/Llama-2-7b-hf",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    "Gemma-2-2B": "google/gemma-2-2b",
    "Qwen1.5-4B": "Qwen/Qwen1.5-4B",
    "Sheared-LLaMA-2.7B": "princeton-nlp/Sheared-LLaMA-2.7B",
}


def billions(name: str, schedule: Schedule) -> float:
    config = load_config(name)
    plan = make_plan(schedule, config.num_hidden_layers, None)
    if schedule.width_reduction:
        plan = uniform_width(config, plan, schedule.width_reduction, schedule.width_multiple)
    return count_parameters(config, plan) / 1e9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), 7.11),
        (Schedule(drop_mlp=tuple(range(8))), 5.70),
        (Schedule(drop_mlp=tuple(range(16))), 4.29),
        (Schedule(drop_mlp=tuple(range(16)), width_reduction=0.3), 3.45),
    ],
)
def test_mistral_7b(schedule: Schedule, expected: float) -> None:
    assert round(billions("mistralai/Mistral-7B-v0.1", schedule), 2) == expected


def published_counts() -> list[tuple[str, str, float]]:
    with PUBLISHED.open() as file:
        rows = {
            (row["backbone"], row["variant"], float(row["params_billion"]))
            for row in csv.DictReader(file)
            if row["params_billion"]
        }
    return sorted(rows)


def to_schedule(variant: str) -> Schedule:
    """``drop-16M8A``, ``EffiR-16M-width-30``, ``drop-last-16B``, ``full nf4``; any layers will do."""
    counts = {unit: int(count) for count, unit in re.findall(r"(\d+)([AMB])(?![a-z])", variant)}
    width = re.search(r"width-(\d+)", variant)
    return Schedule(
        drop_attention=tuple(range(counts.get("A", 0))),
        drop_mlp=tuple(range(counts.get("M", 0))),
        drop_last_blocks=counts.get("B", 0),
        width_reduction=int(width.group(1)) / 100 if width else 0.0,
    )


def test_every_published_count_agrees_to_the_printed_digit() -> None:
    counts = published_counts()
    assert len(counts) == 36
    wrong = {
        (backbone, variant): (printed, billions(HUB_NAMES[backbone], to_schedule(variant)))
        for backbone, variant, printed in counts
        if round(billions(HUB_NAMES[backbone], to_schedule(variant)), 1) != printed
    }
    assert not wrong


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_parameters_of_a_cut_model(kind: str) -> None:
    retriever = load_retriever(f"random:{kind}")
    config = load_config(f"random:{kind}")
    assert count_parameters(config, Plan.full(4)) == sum(p.numel() for p in retriever.model.parameters())
    apply_plan(retriever, PLAN)
    assert count_parameters(config, PLAN) == sum(p.numel() for p in retriever.model.parameters())
    blocks = family.get(retriever.model.config.model_type).layers(retriever.model)
    assert count_block_parameters(config, PLAN) == sum(p.numel() for p in blocks.parameters())
    assert count_parameters(retriever.model.config, PLAN) == count_parameters(config, PLAN)
    stored = sum(parameter.nbytes for parameter in retriever.model.parameters())
    assert model_bytes(config, PLAN) == stored == 2 * model_bytes(config, PLAN, "bfloat16")
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert model_bytes(config, PLAN, "int8") == stored - 3 * matrices


@pytest.mark.parametrize("kind", RANDOM_MODELS)
@pytest.mark.parametrize("plan", [Plan.full(4), PLAN], ids=["full", "cut"])
def test_flops_agree_with_pytorch(kind: str, plan: Plan) -> None:
    """Within the window all pairs of tokens are computed, so a short text counts the same everywhere."""
    retriever = apply_plan(load_retriever(f"random:{kind}"), plan)
    tokens = 12
    ids = torch.arange(3, 3 + tokens).unsqueeze(0)
    retriever.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        retriever.model(input_ids=ids)
    assert flops(load_config(f"random:{kind}"), plan, tokens) == counter.get_total_flops()


def test_windows_bound_attention() -> None:
    config, longer = load_config("random:mistral"), load_config("random:llama")
    per_token = [flops(config, Plan.full(4), n) / n for n in (16, 64, 256)]
    assert per_token[0] == per_token[1] == per_token[2]
    assert flops(longer, Plan.full(4), 256) / 256 > flops(longer, Plan.full(4), 16) / 16


def test_wrong_depth_and_dtype() -> None:
    config = load_config("random:llama")
    with pytest.raises(InputError, match="the plan has 3 layers; the backbone has 4"):
        count_parameters(config, Plan.full(3))
    with pytest.raises(InputError, match="dtype 'int3' is unknown"):
        model_bytes(config, Plan.full(4), "int3")
