"""encode_corpus on a private Ray instance: complete, resumable after kill -9, free when finished."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from effir_ray import leases
from effir_ray.data.datasets import load_dataset
from effir_ray.encoding import corpus_encoding
from effir_ray.encoding.corpus_encoding import _only_writer, _ShardEncoder, _task, encode_corpus
from effir_ray.encoding.embedding_shards import CorpusEmbeddings, Encoding, ShardFolder
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError, LostProcess
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.stages import StageStore
from tests.helpers.lost_node import lose_a_node

MODEL = "random:llama"
DOCUMENTS = 700


@pytest.fixture(scope="module")
def beir_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "study", "of", "cells", "protein", "results", "data", "search", "value", "text", "model"]
    draw = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(DOCUMENTS):
            text = " ".join(draw.choices(words, k=draw.randint(1, 60)))
            file.write(json.dumps({"_id": f"d{i}", "title": f"title {i}", "text": text}) + "\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "the study"}\n')
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(beir_folder, tmp_path_factory):
    """An encoding that nothing interrupted."""
    return encode_corpus(MODEL, str(beir_folder), tmp_path_factory.mktemp("whole"), shard_size=64)


def forbidden(*arguments, **options):
    raise AssertionError("a finished encoding must not start any work")


@pytest.fixture
def unpackable(tmp_path):
    """A model whose rotary angles depend on the longest text of a batch: it has its own forward alone."""
    retriever = load_retriever("random:llama")
    retriever.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    save_checkpoint(retriever, tmp_path / "unpackable")
    return tmp_path / "unpackable"


def test_a_worker_writes_its_shard_and_returns_what_is_wrong_as_a_value(
    beir_folder, tmp_path, unpackable, monkeypatch
):
    dataset, folder = load_dataset(beir_folder), ShardFolder(tmp_path)
    encoding = Encoding(
        model=MODEL,
        model_fingerprint="m",
        dataset=dataset.name,
        corpus_fingerprint=dataset.corpus.fingerprint,
        documents=DOCUMENTS,
        shard_size=50,
        max_length=20,
        dtype="float32",
        precision=None,
    )
    folder.write_header(encoding)
    task = _task(dataset.corpus, encoding.rows(2), 2)
    rows = {name: [value] for name, value in task.items()}
    figures = _ShardEncoder(folder, encoding, dataset.corpus.path, 1, None)(rows)
    assert figures["documents"] == [50] and figures["problem"] == [""] and folder.finished() == {2}
    ids, vectors = folder.read_shard(2)
    texts = dataset.corpus.texts(ids)
    assert ids == dataset.corpus.ids[100:150] and figures["tokens"][0] <= 50 * 20
    assert figures["flops"][0] > 0 and figures["gemm_peak"][0] > 0
    expected = Encoder(load_retriever(MODEL)).encode(texts, "document", max_length=20)
    np.testing.assert_array_equal(vectors, expected)

    unsuitable = encoding.model_copy(update={"model": str(unpackable), "precision": "int8"})
    figures = _ShardEncoder(folder, unsuitable, dataset.corpus.path, 1, None)(rows)
    assert "int8 is for" in figures["problem"][0]
    assert folder.record(2).computed_in == "float32"
    in_bytes = encoding.model_copy(update={"precision": "int8"})
    figures = _ShardEncoder(folder, in_bytes, dataset.corpus.path, 1, computed_in="float32")(rows)
    assert "were computed in float32, this worker" in figures["problem"][0]
    assert figures["error"] == ["InputError"]
    figures = _ShardEncoder(folder, encoding, dataset.corpus.path, 1, computed_in="int8")(rows)
    assert figures["precision"] == ["int8"]  # what was begun in one type goes on in it

    worker = _ShardEncoder(folder, encoding, dataset.corpus.path, 1, None)
    monkeypatch.setattr(worker._encoder, "_forward", no_memory)
    figures = worker(rows)
    assert figures["error"] == ["TrialFailure"] and "out of memory" in figures["problem"][0]


def no_memory(tokens):
    raise torch.OutOfMemoryError("CUDA out of memory")


no_memory.padded = True


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = ShardFolder(str(tmp_path / "embeddings"))
    refused = pytest.raises(
        InputError, match=rf"another run is writing here, on .* \(process {os.getpid()}\)"
    )
    with _only_writer(folder, None), refused, _only_writer(folder, None):
        pass
    with _only_writer(folder, None):
        pass
    assert [file.name for file in (tmp_path / "embeddings").iterdir()] == [".writer.2"]


def _encode_in_a_stage(root: Path, data: Path) -> CorpusEmbeddings:
    store = StageStore(root)

    def build(folder: Path) -> None:
        encode_corpus(MODEL, data, folder / "shards", shard_size=64, held=store.lease_of(folder))

    return CorpusEmbeddings(ShardFolder(store.run("embeddings", {}, build, resumable=True) / "shards"))


def _encode_until_stopped(root: Path, data: Path) -> None:
    """Waits in its third shard until it may go on."""
    encode, shards = Encoder.encode, itertools.count(1)

    def slowly(*arguments: Any, **options: Any) -> Any:
        if next(shards) == 3:
            (root / "begun").touch()
            while not (root / "go").exists():
                time.sleep(0.01)
        return encode(*arguments, **options)

    Encoder.encode = slowly  # type: ignore[method-assign]
    try:
        _encode_in_a_stage(root, data)
    except LostProcess as error:
        (root / "lost").write_text(str(error))


def test_a_stage_is_gone_on_with_while_the_run_that_began_it_is_stopped(
    beir_folder, tmp_path, monkeypatch
) -> None:
    """Which then writes no shard any more, and finishes nothing."""
    monkeypatch.setattr(leases, "EXPIRY", 1.0)
    spawn = multiprocessing.get_context("spawn")
    worker = spawn.Process(target=_encode_until_stopped, args=(tmp_path, beir_folder))
    worker.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert worker.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGSTOP)
    found = _encode_in_a_stage(tmp_path, beir_folder)
    files = sorted(found.folder.local.glob("shards/*"))
    before = [(file.name, file.stat().st_mtime_ns) for file in files]
    (tmp_path / "go").touch()
    os.kill(worker.pid, signal.SIGCONT)
    worker.join(60)
    assert "another process took this work over" in (tmp_path / "lost").read_text()
    again = sorted(found.folder.local.glob("shards/*"))
    assert [(file.name, file.stat().st_mtime_ns) for file in again] == before
    assert len(found) == DOCUMENTS
    assert len((tmp_path / "runs.log").read_text().splitlines()) == 1


@pytest.mark.integration
def test_equals_the_encoder_and_a_second_run_does_nothing(beir_folder, undisturbed, monkeypatch):
    dataset = load_dataset(beir_folder)
    texts = [document.document_text for document in dataset.corpus.iter_documents()]
    expected = Encoder(load_retriever(MODEL)).encode(texts, "document")
    assert undisturbed.ids == dataset.corpus.ids
    np.testing.assert_allclose(np.concatenate(list(undisturbed.shards())), expected, atol=1e-5, rtol=0)
    assert sum(record.documents for record in undisturbed.records()) == DOCUMENTS

    monkeypatch.setattr(corpus_encoding, "_encode_missing", forbidden)
    again = encode_corpus(MODEL, dataset, undisturbed.folder.location, shard_size=64)
    assert len(again) == DOCUMENTS


@pytest.mark.integration
@pytest.mark.parametrize("change", [{"model": "random:llama:1"}, {"dtype": "float16"}, {"max_length": 9}])
def test_folder_of_another_encoding_is_refused(beir_folder, undisturbed, change):
    arguments = {"model": MODEL, "shard_size": 64} | change
    with pytest.raises(InputError, match="choose another output folder"):
        encode_corpus(dataset=str(beir_folder), out=undisturbed.folder.location, **arguments)


@pytest.mark.integration
def test_only_the_missing_shards_are_encoded(beir_folder, undisturbed, tmp_path):
    out = encode_corpus(MODEL, str(beir_folder), f"file://{tmp_path}/out", shard_size=64, workers=2)
    shards = tmp_path / "out" / "shards"
    kept = (shards / "000000.parquet").stat().st_mtime_ns
    (shards / "000003.json").unlink()
    encode_corpus(MODEL, str(beir_folder), f"file://{tmp_path}/out", shard_size=64)
    assert (shards / "000000.parquet").stat().st_mtime_ns == kept
    for mine, theirs in zip(out.shards(), undisturbed.shards(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.integration
def test_an_object_store_holds_the_same_shards_and_resumes(
    beir_folder, undisturbed, object_store, monkeypatch
):
    out = ShardFolder(object_store.format("vectors"))
    encode_corpus(MODEL, str(beir_folder), out.location, shard_size=64, workers=2)
    system, root = out._root()
    system.delete_file(f"{root}/shards/000003.json")
    kept = system.get_file_info(f"{root}/shards/000000.parquet").mtime
    again = encode_corpus(MODEL, str(beir_folder), out.location, shard_size=64)
    assert system.get_file_info(f"{root}/shards/000000.parquet").mtime == kept
    assert again.ids == undisturbed.ids
    for mine, theirs in zip(again.shards(), undisturbed.shards(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="choose another output folder"):
        encode_corpus(MODEL, str(beir_folder), out.location, shard_size=32)
    monkeypatch.setattr(corpus_encoding, "_encode_missing", forbidden)
    assert len(encode_corpus(MODEL, str(beir_folder), out.location, shard_size=64)) == DOCUMENTS


@pytest.mark.integration
def test_more_workers_than_cores_is_an_input_error(beir_folder, tmp_path):
    with pytest.raises(InputError, match="500 CPUs, and the cluster has"):
        encode_corpus(MODEL, str(beir_folder), tmp_path / "out", shard_size=1, workers=500)


@pytest.mark.integration
def test_what_a_worker_cannot_write_is_said_in_one_line_with_its_machine(beir_folder, tmp_path):
    (tmp_path / "out" / "shards" / "000001.parquet").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=rf"^\w*Error on {platform.node()}: .*000001.parquet") as refused:
        encode_corpus(MODEL, str(beir_folder), tmp_path / "out", shard_size=64, workers=2)
    assert "\n" not in str(refused.value)


@pytest.mark.integration
def test_what_a_worker_refuses_is_a_plain_input_error(beir_folder, tmp_path, unpackable):
    for workers in (1, 2):
        with pytest.raises(InputError, match="int8 is for"):
            encode_corpus(
                unpackable,
                str(beir_folder),
                tmp_path / "out",
                shard_size=64,
                workers=workers,
                precision="int8",
            )


@pytest.mark.integration
def test_corpus_that_changed_meanwhile_is_a_plain_input_error(beir_folder, tmp_path):
    dataset = load_dataset(shutil.copytree(beir_folder, tmp_path / "data"))
    path = dataset.corpus.path
    path.write_text(path.read_text().replace(f'"{dataset.corpus.ids[5]}"', '"another"'))
    with pytest.raises(InputError, match="changed while it was in use"):
        encode_corpus(MODEL, dataset, tmp_path / "out", shard_size=700, workers=2)


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_killed_at_random_moments_then_resumed_gives_the_same_bits(beir_folder, undisturbed, tmp_path):
    """``EFFIR_RAY_KILLS`` sets how many runs are killed."""
    out = tmp_path / "out"
    draw = random.Random(time.time_ns())
    for _ in range(int(os.environ.get("EFFIR_RAY_KILLS", "2"))):
        run_and_kill(beir_folder, out, after_shards=draw.randint(0, 3), delay=draw.uniform(0, 0.3))
    resumed = encode_corpus(MODEL, str(beir_folder), out, shard_size=64)
    assert_same_bits(resumed, undisturbed)
    assert not list(out.glob("shards/*.tmp-*"))


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_killed_worker_is_replaced_and_its_shard_encoded_again(beir_folder, undisturbed, tmp_path):
    out, killed = tmp_path / "out", []

    def kill_the_worker() -> None:
        while not has_shards(out, 2):
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if "MapWorker" in " ".join(process.cmdline()):
                killed.append(process.pid)
                process.kill()

    killer = threading.Thread(target=kill_the_worker, daemon=True)
    killer.start()
    replaced = encode_corpus(MODEL, str(beir_folder), out, shard_size=64, workers=2)
    killer.join()
    assert killed
    assert replaced.ids == undisturbed.ids
    for mine, theirs in zip(replaced.shards(), undisturbed.shards(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)  # two workers have a thread each


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_lost_node_is_replaced_and_the_embeddings_are_the_same(beir_folder, undisturbed, tmp_path):
    encode = partial(encode_corpus, MODEL, str(beir_folder), tmp_path / "out", shard_size=64)
    lose_a_node(encode, partial(has_shards, tmp_path / "out", 2))
    assert_same_bits(encode(), undisturbed)


def has_shards(out: Path, count: int) -> bool:
    return len(ShardFolder(out).finished()) >= count


def assert_same_bits(embeddings: CorpusEmbeddings, undisturbed: CorpusEmbeddings) -> None:
    assert embeddings.ids == undisturbed.ids  # every document exactly once, in order
    for mine, theirs in zip(embeddings.shards(), undisturbed.shards(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def run_and_kill(folder: Path, out: Path, *, after_shards: int, delay: float) -> None:
    """Start an encoding in its own process, kill -9 it once it made some progress."""
    arguments = f"{MODEL!r}, {str(folder)!r}, {str(out)!r}, shard_size=64"
    code = f"from effir_ray.encoding.corpus_encoding import encode_corpus; encode_corpus({arguments})"
    process = subprocess.Popen([sys.executable, "-c", code])
    start = len(ShardFolder(out).finished())
    while process.poll() is None and len(ShardFolder(out).finished()) < start + after_shards:
        time.sleep(0.01)
    time.sleep(delay if after_shards else 10 * delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
