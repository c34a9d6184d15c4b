"""Compression in one call: what the dry run announces is what is written."""

from __future__ import annotations

import dataclasses
import json
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from effir_ray import hardware
from effir_ray.cli.models import compress as cli_compress
from effir_ray.compression import calibration, pipeline
from effir_ray.compression.depth.masking import masked
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, GateTraining, Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.compression.width.neurons import on_neurons
from effir_ray.compression.width.reduction import magnitude
from effir_ray.config import Prompts
from effir_ray.data.pairs import Pair, load_pairs
from effir_ray.errors import InputError
from effir_ray.hardware import Hardware
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.known_configs import KNOWN_CONFIGS
from effir_ray.models.ordinary import Layout
from effir_ray.models.retriever import Retriever, load_retriever
from effir_ray.search.space import SearchSpace
from tests.helpers.compression_examples import TEXTS, vectors


def test_prompts_are_measured_with_and_stay_with_the_checkpoint(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    scores = pipeline.importance_scores

    def noted(retriever: Retriever, *arguments: Any, **options: Any) -> Any:
        measured.append(retriever.spec.query_prompt)
        return scores(retriever, *arguments, **options)

    monkeypatch.setattr(pipeline, "importance_scores", noted)
    prompts, calibration = Prompts(query="find: "), Calibration(dataset=dataset, texts=4)
    schedule = Schedule(drop_mlp=1, importance="pooled")
    compress("random:llama", schedule, tmp_path / "out", prompts=prompts, calibration=calibration)
    found = load_retriever(tmp_path / "out")
    assert measured == [found.spec.query_prompt] == ["find: "] and found.spec.document_prompt == ""
    described = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert described["prompts"] == {"query": "find: ", "document": ""}
    compress(str(tmp_path / "out"), Schedule(drop_mlp=(2,)), tmp_path / "again")
    assert load_retriever(tmp_path / "again").spec == found.spec


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Twelve documents, each with a train query."""
    folder = tmp_path / "corpus"
    (folder / "qrels").mkdir(parents=True)
    ids = range(12)
    documents = [json.dumps({"_id": f"d{i}", "title": "", "text": f"text number {i}"}) for i in ids]
    queries = [json.dumps({"_id": f"q{i}", "text": f"find {i}"}) for i in ids]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    qrels = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in ids)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(qrels) + "\n")
    return str(folder)


def test_a_dry_run_has_the_size_of_the_checkpoint_and_the_checkpoint_that_of_its_plan(
    dataset: str, tmp_path: Path
) -> None:
    schedule = Schedule(drop_mlp=1, drop_attention=(2,), width_reduction=0.25)
    quick = Calibration(dataset=dataset, gates=GateTraining(steps=2), max_length=16)
    announced = compress("random:llama", schedule, None, calibration=quick)
    made = compress("random:llama", schedule, tmp_path / "small", calibration=quick)
    assert announced.checkpoint is None
    assert (announced.parameters, announced.schedule) == (made.parameters, "1MA[2]-w25")
    assert made.parameters < made.full_parameters
    loaded = load_retriever(str(tmp_path / "small"))
    assert loaded.plan == made.plan
    assert sum(p.numel() for p in loaded.model.parameters()) == made.parameters


def test_the_same_call_makes_the_same_plan(dataset: str, tmp_path: Path) -> None:
    schedule, out = Schedule(drop_block=2, importance="pooled"), tmp_path / "small"
    first, second = (
        compress("random:llama", schedule, out, calibration=Calibration(dataset=dataset, seed=3))
        for _ in range(2)
    )
    assert dataclasses.asdict(first) == dataclasses.asdict(second)


def test_too_much_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="drop_last_blocks is 5; the backbone has 4 blocks"):
        compress(
            "random:llama",
            Schedule(drop_last_blocks=5),
            tmp_path / "x",
            calibration=Calibration(dataset="absent"),
        )
    with pytest.raises(InputError, match="the backbone has 2 blocks"):
        compress("random:llama", Schedule(drop_last_blocks=3), tmp_path / "x", first_blocks=2)
    for schedule, message in (
        (Schedule(width_reduction=0.5, width_multiple=48), "48 does not divide the MLP width 128"),
        (Schedule(width_reduction=0.99), "leaves 8 neurons; 4 MLPs need 8 each"),
        (Schedule(drop_mlp=4, width_reduction=0.5), "the schedule drops every MLP"),
        (Schedule(layer_widths=(64, 64)), "has 2 widths; the backbone has 4 layers"),
        (Schedule(drop_mlp=1, layer_widths=(64, 64, 64, 0)), "drop_mlp only how many lose theirs"),
    ):
        for out in (tmp_path / "x", None):
            with pytest.raises(InputError, match=message):
                compress("random:llama", schedule, out, calibration=Calibration(dataset="absent"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_layers_of_different_widths(kind: str, dataset: str, tmp_path: Path) -> None:
    """What the checkpoint computes is what the full model does with those neurons silenced."""
    schedule = Schedule(drop_block=(1,), layer_widths="64,0,128,24", width_method="magnitude")
    quick = Calibration(dataset=dataset, max_length=16)
    announced = compress(f"random:{kind}", schedule, None, calibration=quick)
    made = compress(f"random:{kind}", schedule, tmp_path / "small", calibration=quick)
    assert announced.schedule == made.schedule == "B[1]-w[64,0,128,24]"
    sizes = (announced.parameters, announced.flops_per_document)
    assert sizes == (made.parameters, made.flops_per_document)
    small, full = load_retriever(tmp_path / "small"), load_retriever(f"random:{kind}")
    assert made.parameters == sum(p.numel() for p in small.model.parameters())
    assert made.layout is not None and "differ in width (24 to 128 neurons)" in made.layout.reason
    kept, scores = full.plan.layers, magnitude(full)
    assert made.plan is not None and made.plan.layers[2] == kept[2]

    def silence(layer: int, neurons: torch.Tensor) -> torch.Tensor:
        stay = torch.zeros(128)
        stay[np.argsort(-scores[layer], kind="stable")[: schedule.layer_widths[layer]].copy()] = 1
        return neurons * stay

    with masked(full, [("block", 1)]), on_neurons(full, silence):
        expected = vectors(full, TEXTS)
    torch.testing.assert_close(vectors(small, TEXTS), expected, atol=1e-5, rtol=0)


def test_a_width_that_a_compressed_checkpoint_has_no_room_for(dataset: str, tmp_path: Path) -> None:
    half = Schedule(width_reduction=0.5, width_method="magnitude")
    compress("random:llama", half, tmp_path / "half", calibration=Calibration(dataset=dataset))
    with pytest.raises(InputError, match="does not divide the MLP width"):
        again = half.model_copy(update={"width_multiple": 128})
        compress(str(tmp_path / "half"), again, None, calibration=Calibration(dataset="absent"))
    plan = load_retriever(tmp_path / "half").plan
    found = [len(layer.neurons or range(128)) for layer in plan.layers]
    wider = Schedule(layer_widths=(*found[:3], found[3] + 8))
    with pytest.raises(InputError, match=f"whose MLP has {found[3]} neurons; expected no more"):
        compress(str(tmp_path / "half"), wider, None, calibration=Calibration(dataset="absent"))
    same = compress(str(tmp_path / "half"), Schedule(layer_widths=tuple(found)), None)
    assert (
        same.plan is not None
        and same.parameters == compress(str(tmp_path / "half"), Schedule(), None).parameters
    )


def test_kept_weights_are_saved_as_they_were_stored(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever type the machine measures in."""
    schedule = Schedule(drop_mlp=(1,), width_reduction=0.5, width_method="magnitude")
    for stored, measured in (("float32", "bfloat16"), ("bfloat16", "float32")):
        original = load_retriever("random:llama", dtype=stored)
        save_checkpoint(original, tmp_path / stored)
        fake = Hardware(device="cpu", dtype=measured, precision="float32", threads=1, name="test")
        monkeypatch.setattr(hardware, "detect", lambda fake=fake: fake)
        made = compress(
            str(tmp_path / stored),
            schedule,
            tmp_path / f"small-{stored}",
            calibration=Calibration(dataset=dataset),
        )
        expected = apply_plan(original, made.plan).model.state_dict()
        found = load_retriever(tmp_path / f"small-{stored}", dtype="auto").model.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.dtype == getattr(torch, stored)
            assert torch.equal(found[name], value)


def test_the_dev_loss_is_measured_on_dev_pairs(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def draw(dataset: str, count: int, seed: int, *, split: str = "train") -> list[Pair]:
        drawn.append(split)
        return load_pairs(dataset)[:4]

    monkeypatch.setattr(calibration, "draw_pairs", draw)
    compress(
        "random:llama",
        Schedule(drop_mlp=1, importance="dev-loss"),
        tmp_path / "x",
        calibration=Calibration(dataset=dataset),
    )
    assert drawn == ["dev"]


def test_sparsity_comes_last_and_a_bad_pattern_first(dataset: str, tmp_path: Path) -> None:
    schedule = Schedule(drop_mlp=(1,))
    out = tmp_path / "sparse"
    result = compress(
        "random:llama",
        schedule,
        out,
        calibration=Calibration(dataset=dataset),
        sparsity="2:4",
        sparsity_method="sparsegpt",
    )
    retriever = load_retriever(out)
    assert result.zeros == pytest.approx(0.5, abs=0.01)
    assert retriever.plan == result.plan
    for _, linear in retriever.family.linears(retriever.model):
        assert ((linear.weight == 0).view(-1, 4).sum(dim=1) >= 2).all()
    with pytest.raises(InputError, match="sparsity pattern '5:4'"):
        compress(
            "random:llama",
            schedule,
            tmp_path / "bad",
            calibration=Calibration(dataset=dataset),
            sparsity="5:4",
        )
    assert not (tmp_path / "bad").exists()


def bare_config(folder: Path, name: str) -> str:
    """A folder with config.json alone: neither weights nor tokenizer."""
    folder.mkdir()
    config = AutoConfig.for_model(**KNOWN_CONFIGS[name])
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_dry_run_needs_the_configuration_only(uniform: bool, tmp_path: Path) -> None:
    """A 7B model's: counts of layers that are all alike; which ones go is left open."""
    folder = bare_config(tmp_path / "mistral", "mistralai/Mistral-7B-v0.1")
    schedule = Schedule(drop_mlp=16, width_reduction=0.3)
    result = compress(folder, schedule, None, calibration=Calibration(dataset="absent"), uniform=uniform)
    assert result.plan is None
    assert round(result.full_parameters / 1e9, 2) == 7.11
    assert result.parameters / 1e9 == pytest.approx(3.45, abs=0.01)
    named = compress(folder, Schedule(drop_mlp=(1, 2)), None, calibration=Calibration(dataset="absent"))
    assert named.plan is not None and not named.plan.layers[2].mlp


@pytest.mark.parametrize(("tokens", "alike"), [(16, True), (17, False)])
def test_weights_are_needed_only_where_layers_differ(
    tokens: int, alike: bool, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random:gemma2 every other layer sees no further than 16 tokens."""
    loaded: list[str] = []
    monkeypatch.setattr(
        pipeline,
        "load_retriever",
        lambda name, **options: loaded.append(name) or load_retriever(name, **options),
    )
    result = compress(
        "random:gemma2",
        Schedule(drop_attention=1),
        None,
        calibration=Calibration(dataset=dataset, max_length=tokens),
    )
    assert (result.plan is None, loaded == []) == (alike, alike)


def test_what_was_written_is_said(dataset: str, tmp_path: Path) -> None:
    blocks = compress(
        "random:bert", Schedule(drop_block=(1,)), tmp_path / "a", calibration=Calibration(dataset=dataset)
    )
    halves = compress(
        "random:bert", Schedule(drop_mlp=(1,)), tmp_path / "b", calibration=Calibration(dataset=dataset)
    )
    assert blocks.layout == Layout(ordinary=True, reason="3 of 4 blocks are left whole")
    assert halves.layout == Layout(ordinary=False, reason="layer 1 has attention and no MLP")


def test_the_command_python_and_a_study_have_one_set_of_defaults() -> None:
    command = {name: option.default for name, option in signature(cli_compress).parameters.items()}
    given = (command["dataset"], command["texts"], command["gate_steps"], command["seed"])
    defaults = Calibration()
    assert given == (defaults.dataset, defaults.texts, defaults.gates.steps, defaults.seed)
    assert signature(compress).parameters["calibration"].default == defaults
    study = SearchSpace(name="s", backbone="random:llama", dataset="stdlib")
    assert study.calibration == defaults
