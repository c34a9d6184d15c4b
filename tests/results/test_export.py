"""A model out of a study: the files are the study's, the card says what the rows say."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from effir_ray.compression.dimension import shorten
from effir_ray.compression.pipeline import compress
from effir_ray.compression.schedule import Calibration, Schedule
from effir_ray.compression.surgery import apply_plan
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.onnx_file import ONNX, check_onnx
from effir_ray.models.plan import LayerPlan, Plan
from effir_ray.models.retriever import load_retriever
from effir_ray.results import store
from effir_ray.results.export import export
from effir_ray.results.schema import TrialRow
from tests.helpers.search_examples import write_corpus

MODEL = "stages/pruned/0123/checkpoint"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The full model and one without an MLP, whose checkpoint is there."""
    folder = tmp_path / "study"
    (folder / MODEL).parent.mkdir(parents=True)
    compress("random:llama", Schedule(drop_mlp=(2,)), folder / MODEL)
    base = {
        "study": "s",
        "trial": json.dumps({"schedule": {"drop_mlp": 1}}),
        "backbone": "random:llama",
        "dataset": "/data/scifact",
        "n_queries": 300,
        "bm25_ndcg_at_10": 0.6617,
        "hardware": "2 x CPU",
    }
    small = {"trial_id": "aa11", "schedule": "1M", "plan": '{"2": {"skip": ["mlp"]}}', "model": MODEL}
    rows = [
        TrialRow(**base, trial_id="ab22", schedule="full", split="dev", ndcg_at_10=0.6451, parameters=100),
        TrialRow(
            **base,
            **small,
            split="dev",
            ndcg_at_10=0.6234,
            ndcg_at_10_low=0.58,
            ndcg_at_10_high=0.66,
            parameters=80,
            parameter_ratio=0.8,
            document_speedup=1.25,
        ),
        TrialRow(**base, **small, split="test", ndcg_at_10=0.6111, parameters=80),
        TrialRow(**base, trial_id="ff33", schedule="2M", split="dev", status="failed", reason="NaN"),
    ]
    store.append(folder, rows)
    return folder


def test_the_model_is_the_study_s_and_its_card_says_what_the_rows_say(study: Path, tmp_path: Path) -> None:
    done = export(study, tmp_path / "out", trial="aa")
    assert (done.trial_id, done.schedule, done.remote_code) == ("aa11", "1M", True)
    texts = ["red car", "a much longer text about trees"]
    encoded = [
        Encoder(load_retriever(str(place))).encode(texts, "document") for place in (done.model, study / MODEL)
    ]
    np.testing.assert_array_equal(*encoded)

    card = ModelCard.load(done.model / "README.md")
    assert [
        (result.dataset_name, result.dataset_split, result.metric_value) for result in card.data.eval_results
    ] == [("scifact", "dev", 0.6234), ("scifact", "test", 0.6111)]
    lines = card.text.splitlines()
    assert "| 2 | kept | dropped |" in lines
    assert "| scifact | dev | 300 | 0.6234 (0.580-0.660) |" in card.text.replace("|  |", "|")
    for said in ("80.0% of the full model", "1.25 times as fast", "trust_remote_code=True", '"drop_mlp": 1'):
        assert said in card.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "study"]


def test_a_card_says_how_many_tokens_and_dimensions_are_left(study: Path, tmp_path: Path) -> None:
    place = "stages/pruned/0456/checkpoint"
    calibration = Calibration(dataset=str(write_corpus(tmp_path / "texts")))
    schedule = Schedule(vocabulary=300, dimension=16)
    compress("random:llama", schedule, study / place, calibration=calibration)
    (row, *_) = store.trial_rows(store.read([study]))
    served = {"schedule": schedule.model_dump(), "precision": "int8"}
    trial = {"trial": json.dumps(served), "trial_id": "cc44"}
    fewer = row.model_copy(update={**trial, "schedule": "v300", "model": place, "parameters": 90})
    means = fewer.model_copy(update={"dataset": "mean of /data/scifact, /data/nfcorpus"})
    store.append(study, [fewer, means])
    export(study, tmp_path / "fewer", trial="cc44")
    card = (tmp_path / "fewer" / "README.md").read_text()
    assert "300 tokens of the vocabulary" in card and "this is the full model" not in card
    assert "Embeddings have 16 dimensions" in card and "1_Pooling/, the projection in 2_Dense/\n```" in card
    assert "Scores and speed are those of int8" in card
    assert "| mean of scifact, nfcorpus | dev |" in card


def test_an_ordinary_checkpoint_asks_for_no_code_of_ours(study: Path, tmp_path: Path) -> None:
    shutil.rmtree(study / MODEL)
    compress("random:llama", Schedule(drop_last_blocks=1), study / MODEL)
    done = export(study, tmp_path / "out", pick="parameters<=90")
    assert not done.remote_code and "trust_remote_code" not in (done.model / "README.md").read_text()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "needs one of --trial ID and --pick"),
        ({"trial": "aa", "pick": "knee"}, "needs one of --trial ID and --pick"),
        ({"trial": "zz"}, "no trial 'zz'"),
        ({"trial": "a"}, "fits 2 trials"),
        ({"trial": "ff"}, "failed: there is no model"),
        ({"trial": "ab"}, r"the model of trial ab22 is not there .* effir-ray repeat"),
        ({"pick": "parameters<=1"}, "no row of the front has"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    chosen: dict[str, str], message: str, study: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export(study, tmp_path / "out", **chosen)
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_nothing_is_written_over(study: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="there is something already"):
        export(study, tmp_path / "out", trial="aa")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.integration
def test_the_code_on_the_card_runs_the_onnx_file_to_the_same_embeddings(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention of one layer and neurons of another are gone, embeddings are projected: no ordinary model has
    this shape."""
    shutil.rmtree(study / MODEL)
    narrow = LayerPlan(attention=False, neurons=tuple(range(1, 128, 2)))
    plan = Plan(layers=(LayerPlan(), narrow, LayerPlan(mlp=False), LayerPlan()))
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0].astype(np.float32)
    model = shorten(apply_plan(load_retriever("random:gemma3"), plan), axes, 16)
    save_checkpoint(model, study / MODEL)
    done = export(study, tmp_path / "random-gemma3-1M", trial="aa", onnx=True)
    text = (done.model / "README.md").read_text(encoding="utf-8")
    code = next(part for part in text.split("```") if part.startswith("python\nimport numpy"))
    code = code.removeprefix("python\n").replace("random-llama-1M", "random-gemma3-1M")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)  # ours, and what a reader would do
    wanted = Encoder(load_retriever(done.model)).encode(["a text", "another one"], "document")
    assert wanted.shape == (2, 16)
    np.testing.assert_allclose(found["vectors"], wanted, atol=1e-4)

    other = load_retriever(done.model)
    other.model.get_input_embeddings().weight.data[:, 0] += 1
    with pytest.raises(InputError, match="from torch's, more than"):
        check_onnx(other, done.model / ONNX)


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's protocol that sending a small model takes; keeps what it is sent."""

    files: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        known = self.headers.get("authorization") == "Bearer hf_right"
        if self.path == "/api/whoami-v2":
            self.answer(200 if known else 401, {"name": "me"} if known else {"error": "Invalid token"})
        else:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer(200, {"url": f"http://{self.headers['host']}/me/small"})
        elif "/preupload/" in self.path:
            wanted = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": wanted})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['host']}/me/small/commit/0"
            self.answer(200, {"commitUrl": address, "commitOid": "0" * 40, "pullRequestUrl": None})
        else:
            self.answer(200, {})

    def answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Not into the tests' output."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.files, Hub.made = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()


def test_a_model_is_sent_to_a_new_private_repository(
    study: Path, tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    done = export(study, tmp_path / "out", trial="aa", repo="me/small")
    assert done.address == f"{hub}/me/small"
    assert Hub.made == [{"name": "small", "organization": "me", "visibility": "private"}]
    sent = {path.relative_to(done.model).as_posix() for path in done.model.rglob("*") if path.is_file()}
    assert Hub.files.keys() == sent
    assert Hub.files["README.md"] == (done.model / "README.md").read_bytes()


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("me/small/er", "hf_right", "--push me/small/er: Repo id must"),
        ("small", "hf_right", "expected OWNER/NAME"),
        ("me/small", "hf_wrong", "does not accept the token"),
        ("me/small", "", "no token of .*; hf auth login, or HF_TOKEN"),
    ],
)
def test_what_a_hub_refuses_is_said_before_anything_is_written(
    repo: str,
    token: str,
    message: str,
    study: Path,
    tmp_path: Path,
    hub: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match=message):
        export(study, tmp_path / "out", trial="aa", repo=repo)
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_a_hub_that_is_away_is_one_line(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 cannot be reached"):
        export(study, tmp_path / "out", trial="aa", repo="me/small")
