"""Checkpoints in the layouts of LLM-Drop and of the released EffiR adapters, made here from tiny models."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralForCausalLM

from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.names import backbone_fingerprint
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import Retriever, load_retriever

IDS = torch.tensor([[0, 30, 200, 401, 77, 1]])
DROPPED = Plan(
    layers=(
        LayerPlan(),
        LayerPlan(mlp=False),
        LayerPlan(attention=False),
        LayerPlan(attention=False, mlp=False),
    )
)
LISTS = {"drop_attn_list": [3, 2], "drop_mlp_list": [1, 3]}
FLAGS = {"drop_attn_list": [False, False, True, True], "drop_mlp_list": [False, True, False, True]}


def output(retriever: Retriever) -> torch.Tensor:
    with torch.inference_mode():
        return retriever.model(input_ids=IDS).last_hidden_state


def language_model(folder: Path, lists: dict[str, list[int]] | dict[str, list[bool]]) -> Retriever:
    """A whole Mistral with its head, as LLM-Drop leaves it: only config.json knows what is dropped."""
    retriever = load_retriever("random:mistral:4")
    model = MistralForCausalLM(retriever.model.config)
    model.model.load_state_dict(retriever.model.state_dict())
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    auto_map = {"AutoModelForCausalLM": "modeling_dropped_mistral.MistralForCausalLM"}
    settings = {**retriever.model.config.to_dict(), **lists, "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(settings))
    retriever.tokenizer.save_pretrained(folder)
    return retriever


@pytest.mark.parametrize("lists", [LISTS, FLAGS], ids=["indices", "flags"])
@pytest.mark.parametrize("with_dropped_weights", [True, False])
def test_llm_drop(lists: dict[str, list[int]], with_dropped_weights: bool, tmp_path: Path) -> None:
    expected = apply_plan(language_model(tmp_path / "model", lists), DROPPED)
    if not with_dropped_weights:
        kept = expected.model.state_dict()
        file = tmp_path / "model" / "model.safetensors"
        tensors = {
            name: tensor for name, tensor in load_file(file).items() if name.removeprefix("model.") in kept
        }
        save_file(tensors, file, metadata={"format": "pt"})
    found = load_retriever(tmp_path / "model")
    assert found.plan == DROPPED
    assert torch.equal(output(found), output(expected))
    save_checkpoint(found, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "drop_mlp_list" not in config
    assert torch.equal(output(load_retriever(tmp_path / "ours")), output(expected))


def test_the_lists_excuse_no_other_tensor(tmp_path: Path) -> None:
    language_model(tmp_path / "model", LISTS)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.bonus.weight"] = torch.zeros(1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: layers.2.mlp.up_proj.*unexpected: .*layers.0.mlp.bonus"):
        load_retriever(tmp_path / "model")


@pytest.mark.parametrize("bad", [[4], [-1], ["1"], [True, False]])
def test_lists_that_name_no_layers(bad: list[int], tmp_path: Path) -> None:
    language_model(tmp_path / "model", {**LISTS, "drop_mlp_list": bad})
    with pytest.raises(InputError, match=r"drop_mlp_list is .*expected layer indices below 4"):
        load_retriever(tmp_path / "model")


def effir_release(tmp_path: Path, *, rows: int = 512) -> tuple[Path, torch.Tensor]:
    """The authors' layout: base with drop lists, PEFT adapter of the language model, pickled input embedding.

    Returns the adapter folder and what the released model computes on ``IDS``, by PEFT itself.
    """
    base = apply_plan(language_model(tmp_path / "base", LISTS), DROPPED)
    whole = MistralForCausalLM(load_retriever("random:mistral:4").model.config)
    whole.model = base.model
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(whole, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapter = tmp_path / "adapter"
    tuned.save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../base"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    embedding = torch.nn.Embedding(rows, 64)
    (adapter / "embedding").mkdir()
    torch.save(embedding, adapter / "embedding" / "input_emb.pth")
    merged = tuned.merge_and_unload()
    merged.set_input_embeddings(embedding)
    with torch.inference_mode():
        return adapter, merged.model(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("rows", [512, 514])
def test_effir_release(rows: int, tmp_path: Path) -> None:
    """Also with the vocabulary extended by the two markers of the query prompt."""
    adapter, expected = effir_release(tmp_path, rows=rows)
    found = load_retriever(adapter)
    assert found.plan == DROPPED
    assert (output(found) - expected).abs().max() < 1e-5
    assert found.spec.query_prompt.startswith("<instruct>Given a query, retrieve relevant passages")
    assert found.tokenize(["cell"], "document")[0][-1] == found.tokenizer.eos_token_id
    save_checkpoint(found, tmp_path / "ours")
    assert torch.equal(output(load_retriever(tmp_path / "ours")), output(found))


def test_alpha_patterns_match_as_in_peft(tmp_path: Path) -> None:
    """Parts of a name from its end, or a regular expression."""
    base = load_retriever("random:mistral:4")
    save_checkpoint(base, tmp_path / "base")
    whole = MistralForCausalLM(base.model.config)
    whole.model = base.model
    pattern = {
        "down_proj": 32,
        r"layers\.[01]\.self_attn\.q_proj": 3,
        "model.layers.2.mlp.up_proj": 5,
    }
    config = LoraConfig(
        r=4, lora_alpha=8, alpha_pattern=pattern, target_modules=["q_proj", "down_proj", "up_proj"]
    )
    tuned = get_peft_model(whole, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = {**json.loads(file.read_text()), "base_model_name_or_path": "../base"}
    file.write_text(json.dumps(settings))
    with torch.inference_mode():
        expected = tuned.merge_and_unload().model(input_ids=IDS).last_hidden_state
    assert (output(load_retriever(tmp_path / "adapter")) - expected).abs().max() < 1e-5


def test_an_adapters_fingerprint_follows_its_base(tmp_path: Path) -> None:
    adapter, _ = effir_release(tmp_path)
    before = backbone_fingerprint(adapter)
    assert backbone_fingerprint(adapter) == before
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert backbone_fingerprint(adapter) != before


class Payload:
    """Unpickled without care, this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch executed",)


def test_a_malicious_embedding_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, _ = effir_release(tmp_path)
    torch.save(Payload(), adapter / "embedding" / "input_emb.pth")
    with pytest.raises(InputError, match="not a plain embedding"):
        load_retriever(adapter)
    assert not (tmp_path / "executed").exists()


def test_an_adapter_for_what_is_dropped(tmp_path: Path) -> None:
    adapter, _ = effir_release(tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    for side in "AB":
        tensors[name.format(1, side)] = tensors[name.format(0, side)].clone()
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"adapts layers.1.mlp.up_proj, which the base model has not got"):
        load_retriever(adapter)


def test_an_adapter_with_other_tensors(tmp_path: Path) -> None:
    adapter, _ = effir_release(tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.score.weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"unexpected tensor base_model.model.score.weight"):
        load_retriever(adapter)
