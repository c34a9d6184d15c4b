"""Names, folders and GGUF files become retrievers; what is wrong with them is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from effir_ray.errors import InputError
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.known_configs import KNOWN_CONFIGS
from effir_ray.models.loading import load_config
from effir_ray.models.names import backbone_fingerprint
from effir_ray.models.retriever import Retriever, load_retriever


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(load_retriever("random:llama"), tmp_path / "model")
    return tmp_path / "model"


def embed(retriever: Retriever, text: str) -> torch.Tensor:
    ids = torch.tensor(retriever.tokenize([text], "document"))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        return retriever.pool(retriever.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)[0]


def test_the_tokenizer_of_another_model_is_named_when_a_text_needs_it(folder: Path) -> None:
    """Not when loading: tokenizers of real models list tokens that no text becomes."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = load_retriever(folder).model.config.vocab_size
    vocabulary["z"] = known + 7
    file.write_text(json.dumps(tokenizer))
    retriever = load_retriever(folder)
    retriever.tokenize(["abc"], "query")
    with pytest.raises(
        InputError, match=rf"token {known + 7}, .* embeddings of {known}; expected the tokenizer"
    ):
        retriever.tokenize(["abc", "xyz"], "query")


@pytest.mark.integration
def test_random_models_are_the_same_everywhere() -> None:
    """Also in another process, and without touching the caller's random state."""
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    vector = embed(load_retriever("random:llama:5"), "the protein of a cell")
    assert torch.equal(torch.rand(1), expected)
    script = (
        "import torch; from effir_ray.models.retriever import load_retriever;"
        "r = load_retriever('random:llama:5');"
        "ids = torch.tensor(r.tokenize(['the protein of a cell'], 'document'));"
        "print(r.model(ids).last_hidden_state[0, -1].tolist())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    other = torch.nn.functional.normalize(torch.tensor(json.loads(run.stdout)), dim=-1)
    assert torch.allclose(other, vector, atol=1e-6)
    assert not torch.allclose(
        embed(load_retriever("random:llama:6"), "the protein of a cell"), vector, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "bert", "modernbert"])
def test_first_blocks_are_the_first_blocks(kind: str, tmp_path: Path) -> None:
    save_checkpoint(load_retriever(f"random:{kind}:2"), tmp_path / "model")
    whole, cut = load_retriever(tmp_path / "model"), load_retriever(tmp_path / "model", first_blocks=2)
    assert len(cut.plan.layers) == len(cut.family.layers(cut.model)) == 2
    assert load_config(tmp_path / "model", first_blocks=2).num_hidden_layers == 2
    weights = whole.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in cut.model.state_dict().items())
    with pytest.raises(InputError, match="first_blocks is 5; the backbone has 4 blocks"):
        load_retriever(tmp_path / "model", first_blocks=5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:gpt2", "is not a random model; expected one of random:llama"),
        ("random:llama:x", "is not a random model"),
        ("./no/such/folder", "no such folder or .gguf file"),
        ("/no/such/folder", "no such folder or .gguf file"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_retriever(name)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    script = (
        "from effir_ray.models.names import resolve\n"
        "from effir_ray.errors import InputError\n"
        "try: resolve('nobody/nothing')\n"
        "except InputError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'nobody/nothing' is no local model and cannot be fetched from the hub" in run.stdout


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "config.json: no such file"),
        ("model.safetensors", "cannot load weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_incomplete_folders(missing: str, message: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match=message):
        load_retriever(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors only"):
        load_retriever(folder)


def test_unsupported_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(InputError, match=r"'gpt2' is not supported; supported: llama, mistral.* To add one"):
        load_retriever(folder)


def test_missing_and_left_over_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mlp.extra.weight"] = tensors.pop("layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: layers.0.mlp.up_proj.*unexpected: layers.0.mlp.extra"):
        load_retriever(folder)


def test_a_language_model_head_is_left_out(folder: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = torch.zeros(512, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(embed(load_retriever(folder), "data"), embed(load_retriever("random:llama"), "data"))


def test_pooling_and_prompts_of_sentence_transformers_folders(folder: Path) -> None:
    (folder / "effir.json").unlink()
    settings = {"prompts": {"query": "ask: ", "passage": "read: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    pooling = {
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_lasttoken": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    spec = load_retriever(folder).spec
    assert (spec.pooling, spec.append_eos, spec.query_prompt, spec.document_prompt) == (
        "mean",
        False,
        "ask: ",
        "read: ",
    )
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="expected one of cls, mean and last-token pooling"):
        load_retriever(folder)


def test_tokens_are_cut_before_the_eos() -> None:
    retriever = load_retriever("random:llama")
    retriever.spec = retriever.spec.model_copy(update={"query_prompt": "the query "})
    (long,) = retriever.tokenize(["cell " * 100], "document", max_length=7)
    assert len(long) == 7
    assert (long[0], long[-1]) == (0, 1)
    query, document = (
        retriever.tokenize(["cell"], "query")[0],
        retriever.tokenize(["the query cell"], "document")[0],
    )
    assert query == document
    assert retriever.tokenize([""], "document") == [[0, 1]]
    assert retriever.tokenize([], "document") == []


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooling_on_either_side(pooling: str) -> None:
    retriever = load_retriever("random:llama")
    retriever.spec = retriever.spec.model_copy(update={"pooling": pooling, "normalize": False})
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expected = {
        "last": (hidden[0, 3], hidden[0, 1], hidden[1, 3]),
        "cls": (hidden[0, 2], hidden[0, 0], hidden[1, 0]),
        "mean": (hidden[0, 2:].mean(0), hidden[0, :2].mean(0), hidden[1].mean(0)),
    }[pooling]
    assert torch.equal(retriever.pool(hidden, left), torch.stack([expected[0], expected[2]]))
    assert torch.equal(retriever.pool(hidden, right), torch.stack([expected[1], expected[2]]))


def test_fingerprints_follow_the_content(folder: Path, tmp_path: Path) -> None:
    before = backbone_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert backbone_fingerprint(tmp_path / "copy") == before
    (folder / "effir.json").write_text((folder / "effir.json").read_text().replace('"last"', '"mean"'))
    assert backbone_fingerprint(folder) != before
    assert backbone_fingerprint("random:llama:1") != backbone_fingerprint("random:llama:2")


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_known_configurations_need_no_network(name: str) -> None:
    config = load_config(name)
    assert load_config(name, first_blocks=3).num_hidden_layers == 3 < config.num_hidden_layers


@pytest.mark.integration
@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6"])
def test_packaged_backbones_are_what_their_known_configuration_says(name: str) -> None:
    retriever, known = load_retriever(name), load_config(name)
    loaded = retriever.model.config
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ):
        assert getattr(known, field) == getattr(loaded, field), field
    assert known.max_position_embeddings == loaded.max_position_embeddings
    if name == "smollm2-135m":
        assert np.isclose(known.rms_norm_eps, loaded.rms_norm_eps, rtol=1e-5)
        assert known.rope_parameters == loaded.rope_parameters
    near = embed(retriever, "How do I sort a list in Python?") @ embed(
        retriever, "sorted() returns a new sorted list"
    )
    far = embed(retriever, "How do I sort a list in Python?") @ embed(
        retriever, "The cell membrane is a lipid bilayer"
    )
    assert near > far


@pytest.mark.integration
def test_minilm_equals_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    from effir_ray.models.names import resolve

    text = "Aspirin inhibits the production of prostaglandins."
    reference = SentenceTransformer(str(resolve("minilm-l6").path), device="cpu").encode(
        text, convert_to_tensor=True
    )
    assert (embed(load_retriever("minilm-l6"), text) - reference).abs().max() < 1e-6
