"""What effir-ray writes, read by a Python that has transformers and sentence-transformers and not effir-ray.

`make test` builds two such environments: with the oldest and with the newest transformers that are allowed.
One process an environment embeds with every export; here each is compared with effir-ray's own embeddings.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beir.retrieval.evaluation import EvaluateRetrieval
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, get_peft_model

from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.data.datasets import load_dataset
from effir_ray.encoding.encoder import Encoder
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.names import resolve
from effir_ray.models.onnx_file import write_onnx
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.random_models import RANDOM_MODELS
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.search.candidates import Candidate
from effir_ray.search.model_stages import CHECKPOINT
from effir_ray.search.space import SearchSpace
from effir_ray.search.trial import StageRunner, sources_of
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore
from effir_ray.training.config import LoraConfig as OurLoraConfig
from effir_ray.training.config import TrainConfig
from effir_ray.training.run.launcher import train
from effir_ray.training.step.elastic import extract, prepare_elastic
from effir_ray.training.step.ladder import Rung
from tests.helpers.beir_folders import write_folder
from tests.helpers.real_data import real_data

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ("oldest", "newest")
GONE, NARROW = LayerPlan(attention=False, mlp=False), tuple(range(1, 128, 2))
MIXED = Plan(
    layers=(LayerPlan(mlp=False), LayerPlan(neurons=NARROW), GONE, LayerPlan(attention=False, neurons=NARROW))
)
BLOCKS = Plan(layers=(LayerPlan(neurons=NARROW), GONE, LayerPlan(neurons=NARROW), LayerPlan(neurons=NARROW)))
TEXTS = [
    "the function of the cell",
    "data",
    "Ünïcödé: a list of values (1, 2, 3) which may be used in other studies than these two, e.g. in [5]",
    "more than a model takes at once, " * 200,
]


@dataclass(frozen=True, kw_only=True)
class Export:
    """``ordinary``: a plain checkpoint, read without trust_remote_code."""

    folder: Path
    ordinary: bool = False


def family(kind: str, plan: Plan, place: Path, *, ordinary: bool) -> Export:
    """Saved to a folder and read back, as real models come, then cut."""
    save_checkpoint(load_retriever(f"random:{kind}:3"), place / "full")
    retriever = apply_plan(load_retriever(place / "full"), plan)
    prompts = {"query_prompt": "the query is ", "document_prompt": "in data: ", "max_length": 40}
    retriever.spec = retriever.spec.model_copy(update=prompts)
    assert save_checkpoint(retriever, place / "export").ordinary == ordinary
    return Export(folder=place / "export", ordinary=ordinary)


def compressed(backbone: str, place: Path, schedule: Schedule, **options: Any) -> Export:
    data = write_folder(place / "data")
    calibration = Calibration(dataset=str(data))
    made = compress(backbone, schedule, place / "export", calibration=calibration, **options)
    assert made.layout is not None
    return Export(folder=place / "export", ordinary=made.layout.ordinary)


def twice(place: Path) -> Export:
    """A compressed model, read back, compressed and exported again: first by blocks, then by MLPs."""
    first = compressed("minilm-l6", place / "first", Schedule(drop_block=(1,)))
    again = compressed(str(first.folder), place / "second", Schedule(drop_mlp=(4,)))
    assert (first.ordinary, again.ordinary) == (True, False)
    kept = load_retriever(again.folder).plan.layers
    assert [layer.attention for layer in kept] == [True, False, True, True, True, True]
    assert [layer.mlp for layer in kept] == [True, False, True, True, False, True]
    return again


def elastic(place: Path) -> Export:
    random = np.random.default_rng(0)
    scores = {layer: random.random(1536) for layer in range(6)}
    prepared = prepare_elastic("minilm-l6", scores, place / "elastic")
    folder = extract(prepared, Rung(drop_mlp=(1, 4), width=0.5), place / "export")
    return Export(folder=folder)


def elastic_blocks(place: Path) -> Export:
    """A rung that is a plain BERT."""
    scores = {layer: np.arange(1536.0) for layer in range(6)}
    prepared = prepare_elastic("minilm-l6", scores, place / "elastic")
    rung = Rung(drop_mlp=(2,), drop_attention=(2,), width=0.5)
    return Export(folder=extract(prepared, rung, place / "export"), ordinary=True)


def adapter(place: Path) -> Export:
    """A PEFT adapter on a compressed checkpoint, merged by loading it."""
    base = family("llama", MIXED, place / "base", ordinary=False).folder
    model = load_retriever(base).model
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(place / "adapter")
    file = place / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))
    save_checkpoint(load_retriever(place / "adapter"), place / "export")
    return Export(folder=place / "export")


def trained(place: Path) -> Export:
    """A cut BERT, trained with LoRA by the launcher, which merges it."""
    base = family("bert", MIXED, place / "base", ordinary=False).folder
    config = TrainConfig(
        dataset=str(write_folder(place / "data")),
        steps=2,
        batch_size=4,
        learning_rate=1e-2,
        lora=OurLoraConfig(r=2),
    )
    return Export(folder=Path(train(base, config, place / "run").checkpoint))


def searched(place: Path) -> Export:
    """The checkpoint of a trial of a study, from the packaged model's folder."""
    space = SearchSpace(name="outside", backbone="minilm-l6", dataset=str(write_folder(place / "data")))
    config = space.trial(Candidate(drop_mlp=(1,), drop_block=(3,)))
    runner = StageRunner(config, "dev", StageStore(place / "stages"), lambda stage: None)
    (pruned,) = (stage for stage in trial_stages(config, sources_of(config), "dev") if stage.name == "pruned")
    return Export(folder=runner.make(pruned) / CHECKPOINT)


def drop_lists(place: Path) -> Export:
    """LLM-Drop's marks on a full checkpoint."""
    folder = place / "marked"
    save_checkpoint(load_retriever("random:mistral:3"), folder)
    (folder / "effir.json").unlink()
    file = folder / "config.json"
    lists = {"drop_attn_list": [2], "drop_mlp_list": [1]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **lists}))
    save_checkpoint(load_retriever(folder), place / "export")
    return Export(folder=place / "export")


_HALF = {"width_reduction": 0.5, "width_method": "magnitude"}
EXPORTS: dict[str, Callable[[Path], Export]] = {
    **{
        f"{kind}-mixed": lambda place, k=kind: family(k, MIXED, place, ordinary=False)
        for kind in RANDOM_MODELS
    },
    **{
        f"{kind}-blocks": lambda place, k=kind: family(k, BLOCKS, place, ordinary=True)
        for kind in RANDOM_MODELS
    },
    "minilm": lambda place: compressed("minilm-l6", place, Schedule(drop_mlp=(2, 4), **_HALF)),
    "minilm-counted": lambda place: compressed("minilm-l6", place, Schedule(drop_attention=1)),
    "minilm-blocks": lambda place: compressed("minilm-l6", place, Schedule(drop_block=(1, 4))),
    "minilm-uniform": lambda place: compressed(
        "minilm-l6", place, Schedule(drop_mlp=2, **_HALF), uniform=True
    ),
    "minilm-sparse": lambda place: compressed(
        "minilm-l6", place, Schedule(drop_mlp=(1,)), sparsity="2:4", sparsity_method="magnitude"
    ),
    "minilm-tokens": lambda place: compressed("minilm-l6", place, Schedule(drop_mlp=(2,), vocabulary=2500)),
    "minilm-shorter": lambda place: compressed("minilm-l6", place, Schedule(drop_block=(2,), dimension=64)),
    "smollm2-tokens": lambda place: compressed(
        "smollm2-135m", place, Schedule(drop_last_blocks=26, vocabulary=1000)
    ),
    "smollm2": lambda place: compressed("smollm2-135m", place, Schedule(drop_mlp=(1,)), first_blocks=4),
    "smollm2-blocks": lambda place: compressed(
        "smollm2-135m", place, Schedule(drop_block=(1, 3), drop_last_blocks=22)
    ),
    "gguf": lambda place: compressed(
        str(resolve("smollm2-135m").path), place, Schedule(drop_attention=(2,)), first_blocks=4
    ),
    "twice": twice,
    "elastic": elastic,
    "elastic-blocks": elastic_blocks,
    "adapter": adapter,
    "trained": trained,
    "searched": searched,
    "drop-lists": drop_lists,
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    place = tmp_path_factory.mktemp("exports")
    return {name: make(place / name) for name, make in EXPORTS.items()}


def embed_outside(environment: str, tasks: list[dict[str, object]], place: Path) -> None:
    """Run ``embed.py`` in an environment: its own modules cache, no network, no path to effir-ray."""
    python = ROOT / f".venv-outside-{environment}" / "bin" / "python"
    if not python.is_file():
        pytest.fail(f"{python.parents[1]} is not there; make outside builds it")
    (place / "tasks.json").write_text(json.dumps(tasks))
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [python, Path(__file__).with_name("embed.py"), place / "tasks.json"],
        cwd=place,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def outside(
    request: pytest.FixtureRequest, exports: dict[str, Export], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Name of an export -> the file with what the environment made of it."""
    place = tmp_path_factory.mktemp(request.param)
    found = {name: place / f"{name}.npz" for name in exports}
    tasks: list[dict[str, object]] = [
        {
            "folder": str(export.folder),
            "out": str(found[name]),
            "texts": {"query": TEXTS, "document": TEXTS},
            "remote_code": not export.ordinary,
        }
        for name, export in exports.items()
    ]
    embed_outside(request.param, tasks, place)
    return found


def hidden(retriever: Retriever, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        output = retriever.model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return output.last_hidden_state.numpy()


@pytest.mark.parametrize("name", EXPORTS)
def test_the_same_embeddings_outside(name: str, outside: dict[str, Path], exports: dict[str, Export]) -> None:
    export, found = exports[name], np.load(outside[name])
    assert (export.folder / "modeling_effir.py").exists() != export.ordinary
    retriever = load_retriever(export.folder)
    tokens = retriever.tokenizer(TEXTS, truncation=True, max_length=24)["input_ids"]
    real = found["mask"].astype(bool)
    assert [row[kept].tolist() for row, kept in zip(found["ids"], real, strict=True)] == tokens
    expected = hidden(retriever, found["ids"], found["mask"])
    scale = max(1.0, float(np.abs(expected[real]).max()))
    assert np.abs(found["hidden"] - expected)[real].max() < 1e-5 * scale
    encoder = Encoder(retriever)
    for kind in ("query", "document"):
        ours = encoder.encode(TEXTS, kind)  # type: ignore[arg-type]
        assert np.abs(found[kind] - ours).max() < 1e-5


def test_scifact_scored_by_beir_and_mteb(tmp_path: Path) -> None:
    """A sample of SciFact and a MiniLM without two MLPs in sentence-transformers: beir's nDCG@10 and mteb's
    are that of ``effir-ray evaluate``, and onnxruntime's embeddings are sentence-transformers'."""
    dataset = load_dataset(real_data("scifact")).sample("test", queries=40, documents=160)
    export = compressed("minilm-l6", tmp_path / "model", Schedule(drop_mlp=(1, 3)))
    queries, documents = dataset.queries("test"), list(dataset.corpus.iter_documents())
    task: dict[str, object] = {
        "folder": str(export.folder),
        "out": str(tmp_path / "scifact.npz"),
        "texts": {"query": list(queries.values()), "document": [d.document_text for d in documents]},
        "remote_code": True,
        "only": "sentences",
        "onnx": str(write_onnx(export.folder)),
        "judged": {
            "corpus": {d.id: {"title": d.title, "text": d.text} for d in documents},
            "queries": queries,
            "qrels": dataset.qrels("test"),
        },
    }
    embed_outside("newest", [task], tmp_path)
    found = np.load(tmp_path / "scifact.npz")
    for kind in ("query", "document"):
        assert np.abs(found[f"onnx_{kind}"] - found[kind]).max() < 1e-4
    scores = found["query"] @ found["document"].T
    run = {
        query_id: {d.id: float(score) for d, score in zip(documents, row, strict=True)}
        for query_id, row in zip(queries, scores, strict=True)
    }
    ndcg, *_ = EvaluateRetrieval.evaluate(dataset.qrels("test"), run, [10])
    ours = evaluate(export.folder, dataset).scores.mean["ndcg@10"]
    assert 0.3 < ours < 1.0  # neither broken nor trivial
    assert ndcg["NDCG@10"] == pytest.approx(ours, abs=1e-4)
    assert float(found["ndcg_at_10"]) == pytest.approx(ours, abs=1e-4)


def pinned(file: str, name: str) -> Version:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    (version,) = (line.split("==")[1] for line in lines if line.startswith(f"{name}=="))
    return Version(version)


def test_the_environments_span_what_is_allowed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = map(Requirement, project["dependencies"])
    (allowed,) = (needed.specifier for needed in requirements if needed.name == "transformers")
    oldest, newest = (pinned(f"constraints-outside-{name}.txt", "transformers") for name in ENVIRONMENTS)
    assert str(allowed) == f">={oldest.major}.{oldest.minor}"
    assert newest in allowed and newest >= pinned("constraints.txt", "transformers")
