"""save -> load is bit-equal: in effir-ray, and without it in transformers and sentence-transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from effir_ray.compression.quantization import quantize
from effir_ray.compression.surgery import apply_plan
from effir_ray.errors import InputError
from effir_ray.models import checkpoint
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever

PLAN = Plan(
    layers=(
        LayerPlan(mlp=False),
        LayerPlan(neurons=(*range(8), *range(64, 120))),
        LayerPlan(attention=False, mlp=False),
        LayerPlan(attention=False, neurons=tuple(range(1, 128, 2))),
    )
)
TEXTS = [
    "the function of the cell",
    "data",
    "a list of values which may be used in other studies than these two",
]


def pruned(kind: str) -> Retriever:
    return apply_plan(load_retriever(f"random:{kind}:3"), PLAN)


def padded(retriever: Retriever) -> tuple[torch.Tensor, torch.Tensor]:
    rows = retriever.tokenize(TEXTS, "document")
    longest = max(map(len, rows))
    ids = torch.tensor([row + [2] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def hidden(retriever: Retriever) -> torch.Tensor:
    ids, mask = padded(retriever)
    with torch.inference_mode():
        return retriever.model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("kind", RANDOM_MODELS)
def test_save_and_load_is_bit_equal(kind: str, tmp_path: Path) -> None:
    before = pruned(kind)
    before.spec = before.spec.model_copy(update={"query_prompt": "the query ", "max_length": 40})
    save_checkpoint(before, tmp_path / "model")
    after = load_retriever(tmp_path / "model")
    assert (after.plan, after.spec) == (before.plan, before.spec)
    assert after.tokenize(TEXTS, "query") == before.tokenize(TEXTS, "query")
    assert torch.equal(hidden(after), hidden(before))


def test_config_keeps_the_layer_numbers_of_the_backbone(tmp_path: Path) -> None:
    save_checkpoint(pruned("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["per_layer_config"] == {
        "0": {"skip": ["mlp"]},
        "1": {"intermediate_size": 64},
        "2": {"skip": ["attention", "mlp"]},
        "3": {"skip": ["attention"], "intermediate_size": 64},
    }
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert {int(name.split(".")[1]) for name in names if name.startswith("layers.")} == {0, 1, 3}


def test_a_full_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    from transformers import AutoModel

    retriever = load_retriever("random:qwen2", first_blocks=2)
    save_checkpoint(retriever, tmp_path / "model")
    assert not (tmp_path / "model" / "modeling_effir.py").exists()
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    ids, mask = padded(retriever)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, hidden(retriever))


@pytest.mark.parametrize("kind", ["mistral", "bert"])
def test_auto_model_loads_it_with_effir_ray_imported(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    retriever = pruned(kind)
    save_checkpoint(retriever, tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    ids, mask = padded(retriever)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, hidden(retriever))


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD", "200KB")
    before = pruned("llama")
    save_checkpoint(before, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert torch.equal(hidden(load_retriever(tmp_path / "model")), hidden(before))


def edit(folder: Path, change: str, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "remove":
        del tensors[name]
    elif change == "add":
        tensors[name] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ("remove", "layers.1.mlp.down_proj.weight", "1 missing: layers.1.mlp.down_proj.weight"),
        ("add", "layers.0.mlp.up_proj.weight", "1 unexpected: layers.0.mlp.up_proj.weight"),
        ("cut", "layers.3.mlp.up_proj.weight", "1 of another shape: layers.3.mlp.up_proj.weight"),
    ],
)
def test_every_tensor_must_fit(change: str, name: str, message: str, tmp_path: Path) -> None:
    save_checkpoint(pruned("llama"), tmp_path / "model")
    edit(tmp_path / "model", change, name)
    with pytest.raises(InputError, match=message):
        load_retriever(tmp_path / "model")


def test_neurons_that_do_not_fit_the_width(tmp_path: Path) -> None:
    save_checkpoint(pruned("llama"), tmp_path / "model")
    file = tmp_path / "model" / "effir.json"
    own = json.loads(file.read_text())
    own["neurons"]["1"] = [1, 2]
    file.write_text(json.dumps(own))
    with pytest.raises(InputError, match="layer 1 lists 2 neurons"):
        load_retriever(tmp_path / "model")


def test_saving_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    save_checkpoint(load_retriever("random:llama"), tmp_path / "model")
    loaded = load_retriever(tmp_path / "model")
    save_checkpoint(apply_plan(loaded, PLAN), tmp_path / "model")
    assert load_retriever(tmp_path / "model").plan == PLAN
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("the only copy")
    with pytest.raises(InputError, match="is not an effir-ray checkpoint"):
        save_checkpoint(loaded, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(pruned("llama"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


ELSEWHERE = """
import importlib.abc, json, sys
from pathlib import Path

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "effir_ray":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    inputs = torch.load(folder.parent / "inputs.pt")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    sentences = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    with torch.inference_mode():
        found = {
            "hidden": model(input_ids=inputs["ids"], attention_mask=inputs["mask"]).last_hidden_state,
            "query": sentences.encode_query(inputs["texts"], convert_to_tensor=True),
            "document": sentences.encode_document(inputs["texts"], convert_to_tensor=True),
        }
    torch.save(found, folder.parent / "found.pt")
assert not any(name.split(".")[0] == "effir_ray" for name in sys.modules)
"""


@pytest.mark.integration
def test_without_effir_ray(tmp_path: Path) -> None:
    """Where effir_ray cannot be imported: AutoModel and SentenceTransformer give the same bits."""
    retrievers = {}
    for kind in RANDOM_MODELS:
        retriever = pruned(kind)
        retriever.spec = retriever.spec.model_copy(update={"query_prompt": "the query is "})
        save_checkpoint(retriever, tmp_path / kind / "model")
        ids, mask = padded(retriever)
        torch.save({"ids": ids, "mask": mask, "texts": TEXTS}, tmp_path / kind / "inputs.pt")
        retrievers[kind] = retriever
    folders = [str(tmp_path / kind / "model") for kind in retrievers]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *folders],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for kind, retriever in retrievers.items():
            found = torch.load(tmp_path / kind / "found.pt")
            assert torch.equal(found["hidden"], hidden(retriever)), kind
            for text_kind in ("query", "document"):
                for text, embedding in zip(TEXTS, found[text_kind], strict=True):
                    ids = torch.tensor(retriever.tokenize([text], text_kind))
                    mask = torch.ones_like(ids)
                    with torch.inference_mode():
                        output = retriever.model(ids, attention_mask=mask).last_hidden_state
                    expected = retriever.pool(output, mask)
                    assert (embedding - expected[0]).abs().max() < 1e-6, (kind, text_kind)
    finally:
        torch.set_num_threads(threads)


PEAK = """
import sys, threading, time
import torch
from effir_ray.models.retriever import load_retriever

def memory(field):
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def peak(dtype, field):
    start, seen, done = memory(field), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(memory(field))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    retriever = load_retriever(sys.argv[1], dtype=dtype)
    total = sum(float(parameter.sum()) for parameter in retriever.model.parameters())  # touches every page
    done.set()
    watcher.join()
    seen.append(memory(field))
    return (max(seen) - start) / sum(parameter.nbytes for parameter in retriever.model.parameters())

load_retriever("random:llama")  # what importing and a first load need by themselves
print(peak("float32", "Rss:"), peak("bfloat16", "Anonymous:"))
"""


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux memory accounting")
def test_loading_needs_the_memory_of_the_model_once(tmp_path: Path) -> None:
    """A 7B checkpoint scaled down in every dimension. Read in another precision, only memory of our own
    counts: the system gives pages of the mapped file back when something else needs them.
    """
    from transformers import AutoConfig

    from effir_ray.models.architecture import build_model

    retriever = load_retriever("random:mistral")
    config = AutoConfig.for_model(
        "mistral",
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4000,
    )
    retriever.model, retriever.plan = build_model(config), Plan.full(4)
    narrow = LayerPlan(neurons=tuple(range(2500)))
    apply_plan(retriever, Plan(layers=(LayerPlan(mlp=False), *(narrow,) * 3)))
    save_checkpoint(retriever, tmp_path / "model")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for ratio in map(float, run.stdout.split()):
        assert 0.9 < ratio < 1.2


def test_a_quantised_model_is_refused_in_one_line(tmp_path: Path) -> None:
    quantised = quantize(load_retriever("random:bert"), "int8")
    with pytest.raises(
        InputError, match="is quantised and cannot be saved as a checkpoint; save the model first"
    ):
        save_checkpoint(quantised, tmp_path / "model")
    assert not list(tmp_path.iterdir())
