"""Whole blocks gone or one width: an ordinary checkpoint outside, the backbone's layer numbers inside."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel

from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models.accounting import count_parameters
from effir_ray.models.architecture import full_config
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.loading import load_config
from effir_ray.models.ordinary import choose_layout
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever

GONE, NARROW = LayerPlan(attention=False, mlp=False), tuple(range(1, 128, 2))
FEWER = Plan(layers=(LayerPlan(), GONE, LayerPlan(), LayerPlan()))
NARROWER = Plan(layers=(LayerPlan(neurons=NARROW),) * 4)
BOTH = Plan(layers=(LayerPlan(neurons=NARROW), GONE, LayerPlan(neurons=NARROW), GONE))
IDS = torch.tensor([[3, 50, 400, 7, 1], [9, 8, 7, 1, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


def hidden(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK).last_hidden_state


def from_folder(kind: str, folder: Path) -> Retriever:
    """A model as real ones come: its configuration was read from a file."""
    save_checkpoint(load_retriever(f"random:{kind}"), folder)
    return load_retriever(folder)


@pytest.mark.parametrize("plan", [FEWER, NARROWER, BOTH], ids=["fewer", "narrower", "both"])
@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_a_plain_model_outside_and_the_same_plan_inside(kind: str, plan: Plan, tmp_path: Path) -> None:
    retriever = apply_plan(from_folder(kind, tmp_path / "full"), plan)
    layout = save_checkpoint(retriever, tmp_path / "small")
    assert layout.ordinary, layout.reason
    assert not (tmp_path / "small" / "modeling_effir.py").exists()
    settings = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "per_layer_config" not in settings
    assert settings["model_type"] == load_config(f"random:{kind}").model_type
    plain, report = AutoModel.from_pretrained(tmp_path / "small", output_loading_info=True)
    ours = {"missing_keys": set(), "unexpected_keys": set()}
    pooler = {key for key in report["missing_keys"] if key.startswith("pooler.")}
    assert {key: report[key] for key in ours} == {**ours, "missing_keys": pooler}
    assert torch.equal(hidden(plain.eval()), hidden(retriever.model))
    again = load_retriever(tmp_path / "small")
    assert (again.plan, again.spec) == (retriever.plan, retriever.spec)
    expected = retriever.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    assert again.model.state_dict().keys() == expected.keys()
    assert torch.equal(hidden(again.model), hidden(retriever.model))


@pytest.mark.parametrize("kind", ["gemma3", "bert"])
def test_it_can_be_cut_and_written_again(kind: str, tmp_path: Path) -> None:
    """The second time without a whole MLP, the third time down to one block, from either layout."""
    layers = (LayerPlan(neurons=NARROW), GONE, LayerPlan(mlp=False), GONE)
    once = apply_plan(from_folder(kind, tmp_path / "full"), BOTH)
    save_checkpoint(once, tmp_path / "once")
    twice = apply_plan(load_retriever(tmp_path / "once"), Plan(layers=layers))
    assert not save_checkpoint(twice, tmp_path / "twice").ordinary
    last = Plan(layers=(layers[0], GONE, GONE, GONE))
    thrice = apply_plan(load_retriever(tmp_path / "twice"), last)
    assert save_checkpoint(thrice, tmp_path / "thrice").ordinary
    assert AutoConfig.from_pretrained(tmp_path / "thrice").num_hidden_layers == 1
    direct = apply_plan(load_retriever(tmp_path / "full"), last)
    assert torch.equal(hidden(load_retriever(tmp_path / "thrice").model), hidden(direct.model))


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_the_first_blocks_of_an_ordinary_checkpoint(kind: str, tmp_path: Path) -> None:
    save_checkpoint(apply_plan(from_folder(kind, tmp_path / "full"), BOTH), tmp_path / "small")
    cut = load_retriever(tmp_path / "small", first_blocks=2)
    assert cut.plan.layers == BOTH.layers[:2]
    expected = apply_plan(load_retriever(tmp_path / "full", first_blocks=2), cut.plan)
    assert torch.equal(hidden(cut.model), hidden(expected.model))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((LayerPlan(), LayerPlan(mlp=False)), "layer 1 has attention and no MLP"),
        (
            (LayerPlan(attention=False), LayerPlan(mlp=False)),
            "layer 0 has MLP and no attention (and 1 more like it)",
        ),
        ((LayerPlan(), LayerPlan(neurons=NARROW)), "the MLPs differ in width (64 to 128 neurons)"),
        ((GONE, GONE), "no block is left"),
    ],
)
def test_other_shapes_bring_their_code(layers: tuple[LayerPlan, ...], reason: str) -> None:
    layout = choose_layout(load_config("random:llama", first_blocks=2), Plan(layers=layers))
    assert not layout.ordinary
    assert layout.reason == reason


def test_no_other_block_can_be_modernberts_first() -> None:
    plan = Plan(layers=(GONE, LayerPlan(), LayerPlan(), LayerPlan()))
    assert choose_layout(load_config("random:llama"), plan).ordinary
    layout = choose_layout(load_config("random:modernbert"), plan)
    assert (layout.ordinary, "the first block is gone" in layout.reason) == (False, True)


@pytest.mark.parametrize("plan", [FEWER, Plan(layers=(LayerPlan(mlp=False), *(LayerPlan(),) * 3))])
def test_the_backbones_configuration_is_found_again(plan: Plan, tmp_path: Path) -> None:
    """Of a model read from a folder, in memory and from either layout on disk."""
    retriever = from_folder("gemma2", tmp_path / "full")
    full = load_config(tmp_path / "full")
    apply_plan(retriever, plan)
    save_checkpoint(retriever, tmp_path / "small")
    stored = sum(parameter.numel() for parameter in retriever.model.parameters())
    for config in (retriever.model.config, load_config(tmp_path / "small")):
        found = full_config(config)
        assert (type(found), found.model_type) == (type(full), "gemma2")
        assert (found.layer_types, found.num_hidden_layers) == (full.layer_types, 4)
        assert count_parameters(config, plan) == stored


def test_an_adapter_counts_the_blocks_of_the_ordinary_checkpoint(tmp_path: Path) -> None:
    """Somebody else trains it with PEFT, to whom it is a model of three blocks."""
    save_checkpoint(apply_plan(from_folder("llama", tmp_path / "full"), FEWER), tmp_path / "small")
    tuned = get_peft_model(
        AutoModel.from_pretrained(tmp_path / "small"), LoraConfig(r=2, target_modules=["up_proj"])
    )
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    found = load_retriever(tmp_path / "adapter")
    assert found.plan == FEWER
    assert (hidden(found.model) - hidden(tuned.merge_and_unload().eval())).abs().max() < 1e-5


def test_a_checkpoint_that_another_program_changed(tmp_path: Path) -> None:
    save_checkpoint(apply_plan(from_folder("llama", tmp_path / "full"), FEWER), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 2}))
    with pytest.raises(
        InputError, match=r"effir.json: lists 3 layers, config.json says 2; delete effir.json"
    ):
        load_retriever(tmp_path / "small")
