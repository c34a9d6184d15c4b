"""Random input never gets past a reader but as a value or as an InputError of one line.

Readers that share code share a test, which picks one of them for each example. A hundred examples a test;
``EFFIR_RAY_FUZZ_SECONDS=60`` goes on for a minute each. No example may take longer than 30 s or 2 GiB.
"""

from __future__ import annotations

import copy
import io
import json
import os
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from effir_ray.config import load_yaml
from effir_ray.data.beir_files import read_documents, read_qrels, scan_corpus
from effir_ray.data.download import _unpack
from effir_ray.data.pairs import load_pairs, read_jsonl
from effir_ray.errors import InputError
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.folder import read_spec
from effir_ray.models.llama import FAMILY
from effir_ray.models.retriever import load_retriever
from effir_ray.models.settings import (
    IDENTITY,
    AdapterSettings,
    DenseSettings,
    LengthSettings,
    ModelSettings,
    OwnSettings,
    PoolingSettings,
    PromptSettings,
    dense_place,
    normalizes,
    read_settings,
)
from effir_ray.models.tokenizers import load_tokenizer
from effir_ray.models.weight_files import INDEX_FILE, gguf_settings, model_tensors, safetensors_header
from effir_ray.readers import read_json
from effir_ray.results import store
from effir_ray.search.folder import STUDY_FILE, StudyRecord, record_of
from effir_ray.search.space import SearchSpace
from effir_ray.training.config import TrainConfig
from tests.helpers.search_examples import small_space

pytestmark = pytest.mark.timeout(600)

SECONDS = float(os.environ.get("EFFIR_RAY_FUZZ_SECONDS", "0"))
BYTES = 2 * 2**30
"""Of address space that an example may need, beside what is loaded already."""

Reader = Callable[[Any], object]


def fuzz(*readers: tuple[st.SearchStrategy[Any], Any, Reader]) -> None:
    """For whatever a reader's strategy draws it may return, or raise InputError with one line.

    A reader comes with an input that is good: it is read first, which loads what reading needs.
    """
    for _, good, read in readers:
        read(good)

    @settings(
        max_examples=100,
        deadline=30_000,  # ms an example: the machine may be busy
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.one_of([strategy.map(lambda value, read=read: (read, value)) for strategy, _, read in readers]))
    def run(drawn: tuple[Reader, Any]) -> None:
        read, value = drawn
        try:
            read(value)
        except InputError as error:
            assert "\n" not in str(error)

    end = time.monotonic() + SECONDS
    with at_most(BYTES):
        run()
        while time.monotonic() < end:
            run()  # others: nothing is remembered


@contextmanager
def at_most(extra: int) -> Iterator[None]:
    """Within it this process gets no more memory than it has and ``extra`` bytes: MemoryError beyond that."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def mangled(base: bytes) -> st.SearchStrategy[bytes]:
    """``base`` cut, with pieces of it overwritten, or something else altogether."""
    edits = st.lists(st.tuples(st.integers(0, len(base)), st.binary(max_size=12)), max_size=4)

    def apply(cut: int, changes: list[tuple[int, bytes]]) -> bytes:
        data = bytearray(base[:cut])
        for place, piece in changes:
            data[place : place + len(piece)] = piece
        return bytes(data)

    return st.builds(apply, st.integers(0, len(base)), edits) | st.builds(apply, st.just(len(base)), edits)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def objects(*names: str) -> st.SearchStrategy[str]:
    """JSON objects with some of these keys and values of any kind."""
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=len(names)).map(json.dumps)


def into(file: Path, read: Callable[[Path], object]) -> Callable[[Any], None]:
    def attempt(content: Any) -> None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        read(file)

    return attempt


def altered(good: Any) -> st.SearchStrategy[str]:
    """The JSON value ``good`` with others in place of some of what is in it."""
    changes = st.lists(st.tuples(st.sampled_from(list(places(good))), VALUES), min_size=1, max_size=3)

    def apply(drawn: list[tuple[tuple[Any, ...], Any]]) -> str:
        value = copy.deepcopy(good)
        for (*path, last), new in drawn:
            inner = value
            try:
                for step in path:
                    inner = inner[step]
                inner[last] = new
            except (KeyError, IndexError, TypeError):  # an earlier change took it away
                continue
        return json.dumps(value)

    return changes.map(apply)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where inside ``value`` something stands: keys and indices from outside in."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_memory_that_a_reader_may_not_take_is_refused() -> None:
    with at_most(2**28), pytest.raises(MemoryError):
        bytearray(2**29)
    bytearray(2**29)


SPACE = (
    b"name: t\nbackbone: random:llama\ndataset: stdlib\nseed: &s 1\nthreads: *s\nschedules: [{drop_mlp: 1}]\n"
)
TRAINING = b"dataset: stdlib\nsteps: 4\nlora: {r: 4}\nhard_negatives: 0\ndev: {every: 8, queries: 10}\n"


def test_fuzz_settings(tmp_path: Path) -> None:
    yaml = st.text(max_size=60) | st.text("[]{}&*!:-?|>'\"# \n<a1.", max_size=60)

    def fields(required: dict[str, str], kind: Any) -> st.SearchStrategy[str]:
        names = sorted(kind.model_fields.keys() - required.keys())
        more = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)
        return more.map(lambda drawn: json.dumps(required | drawn))

    space = into(tmp_path / "space.yaml", lambda file: load_yaml(file, SearchSpace))
    training = into(tmp_path / "training.yaml", lambda file: load_yaml(file, TrainConfig))
    study = into(tmp_path / STUDY_FILE, lambda file: record_of(file.parent))
    record = StudyRecord(space=small_space(), threads=1, contents={"data": "a"}, effir_ray="1")
    good = record.model_dump_json()
    named = {"name": "t", "backbone": "b", "dataset": "d"}
    fuzz(
        (mangled(SPACE) | yaml | fields(named, SearchSpace), SPACE, space),
        (mangled(TRAINING) | fields({"dataset": "d"}, TrainConfig), TRAINING, training),
        (mangled(good.encode()) | altered(json.loads(good)), good, study),
    )


def test_fuzz_json_of_models(tmp_path: Path) -> None:
    def kind(of: Any) -> tuple[st.SearchStrategy[Any], str, Reader]:
        good = {
            ModelSettings: {"model_type": "llama"},
            OwnSettings: {"format": 1},
            AdapterSettings: {"base_model_name_or_path": "a", "lora_alpha": 1},
            DenseSettings: {
                "in_features": 4,
                "out_features": 2,
                "bias": False,
                "activation_function": IDENTITY,
            },
        }.get(of, {})
        drawn = objects(*of.model_fields) | st.dictionaries(st.sampled_from([*of.model_fields]), VALUES).map(
            lambda more: json.dumps(good | more)
        )
        return drawn, json.dumps(good), into(tmp_path / "a.json", lambda file: read_settings(file, of))

    files = {
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 9},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
        "modules.json": [{"type": "sentence_transformers.models.Normalize"}],
    }
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)

    def spec(drawn: tuple[str, str]) -> object:
        for name, good in files.items():
            (folder / name).write_text(drawn[1] if name == drawn[0] else json.dumps(good))
        return read_spec(folder, FAMILY)

    described = st.one_of(
        [
            (altered(good) | VALUES.map(json.dumps)).map(lambda text, name=name: (name, text))
            for name, good in files.items()
        ]
    )
    steps = [{"type": f"a.{kind}", "path": f"1_{kind}"} for kind in ("Transformer", "Pooling", "Dense")]
    kinds = (ModelSettings, OwnSettings, AdapterSettings, DenseSettings)
    kinds += (PoolingSettings, LengthSettings, PromptSettings)
    fuzz(
        (st.text(max_size=60) | VALUES.map(json.dumps), "{}", into(tmp_path / "a.json", read_json)),
        *map(kind, kinds),
        (described, ("modules.json", "[]"), spec),
        (st.text(max_size=60) | VALUES.map(json.dumps), "[]", into(tmp_path / "modules.json", normalizes)),
        (altered(steps), json.dumps(steps), into(tmp_path / "modules.json", dense_place)),
    )


def test_fuzz_safetensors(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    whole = struct.pack("<Q", len(header)) + header + bytes(16)
    entries = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "I8", "F4", "x"]), "shape": VALUES, "data_offsets": VALUES}
    )
    built = st.dictionaries(st.text(max_size=4), entries | VALUES, max_size=3).map(
        lambda value: (raw := json.dumps(value).encode()) and struct.pack("<Q", len(raw)) + raw + bytes(16)
    )
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "model-1.safetensors").write_bytes(whole)
    names = st.sampled_from(
        ["a", "b", "model-1.safetensors", "../model-1.safetensors", "model-2.safetensors", ""]
    )
    maps = st.dictionaries(names, names | VALUES, max_size=3).map(
        lambda map_: json.dumps({"weight_map": map_})
    )
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "model-1.safetensors"}}
    fuzz(
        (
            mangled(whole) | built | st.binary(max_size=200),
            whole,
            into(tmp_path / "a.safetensors", safetensors_header),
        ),
        (
            altered(index) | maps | mangled(json.dumps(index).encode()),
            json.dumps(index),
            into(folder / INDEX_FILE, lambda file: model_tensors(file.parent)),
        ),
    )


def test_fuzz_gguf(tmp_path: Path) -> None:
    text = struct.pack("<Q", 1) + b"a"
    whole = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    whole += text + struct.pack("<IQ", 10, 7) + text + struct.pack("<IIQ", 9, 8, 2) + text * 2
    whole += text + struct.pack("<IQQIQ", 2, 2, 2, 0, 0) + bytes(32)
    fuzz((mangled(whole) | st.binary(max_size=300), whole, into(tmp_path / "a.gguf", gguf_settings)))


def test_fuzz_tokenizers(tmp_path: Path) -> None:
    save_checkpoint(load_retriever("random:llama"), tmp_path / "model")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "model" / name, folder / name)
    whole = (folder / "tokenizer.json").read_bytes()
    state = json.loads(whole)
    state["model"]["vocab"] = dict(list(state["model"]["vocab"].items())[:40])
    state["model"]["merges"] = state["model"]["merges"][:5]

    def load(file: Path) -> object:
        tokenizer = load_tokenizer(file.parent, append_eos=True, trust_remote_code=False)
        return tokenizer("a word or two")

    read = into(folder / "tokenizer.json", load)
    fuzz((altered(state) | mangled(whole) | VALUES.map(json.dumps), whole, read))


def test_fuzz_texts(tmp_path: Path) -> None:
    pair, document = (
        b'{"query": "a", "positive": "b", "scores": [1]}\n',
        b'{"_id": "d", "title": "", "text": "x"}\n',
    )
    judgements = b"query-id\tcorpus-id\tscore\nq\td\t1\n"
    lines = objects("query", "anchor", "positive", "negatives", "negative_1", "scores", "documents", "labels")
    fuzz(
        (
            lines | mangled(pair) | st.text(max_size=60),
            pair,
            into(tmp_path / "a.jsonl", lambda file: list(read_jsonl(file))),
        ),
        (
            objects("_id", "title", "text") | mangled(document),
            document,
            into(tmp_path / "corpus.jsonl", scan_corpus),
        ),
        (
            mangled(judgements),
            judgements,
            into(tmp_path / "test.tsv", lambda file: read_qrels(file, {"q": "x"}, {"d"})),
        ),
    )


def test_fuzz_tables_and_archives(tmp_path: Path) -> None:
    columns: list[list[Any]] = [
        ["a"],
        [1],
        [None],
        [0.5],
        [float("nan")],
        [["a"]],
        [[1.0]],
        [{"a": 1}],
        [b"\xff"],
    ]

    def table(metadata: dict[str, str] | None = None, **values: list[Any]) -> bytes:
        buffer = io.BytesIO()
        parquet.write_table(pa.table(values).replace_schema_metadata(metadata), buffer)
        return buffer.getvalue()

    def tables(metadata: dict[str, str] | None, *names: str) -> st.SearchStrategy[bytes]:
        drawn = st.dictionaries(st.sampled_from(names), st.sampled_from(columns), min_size=1)
        return drawn.map(lambda values: table(metadata, **values))

    def corpus(file: Path) -> object:
        return list(read_documents(file, scan_corpus(file).offsets))

    def unpack(file: Path) -> None:
        shutil.rmtree(tmp_path / "scifact", ignore_errors=True)
        _unpack(file, tmp_path / "scifact")

    ours = {"effir_ray_schema": "2"}
    rows = table(ours, study=["s"], ndcg_at_10=[0.5], trial=["{}"])
    documents, pairs = table(_id=["d"], title=["t"], text=["x"]), table(query=["q"], positive=["p"])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scifact/corpus.jsonl", "x" * 100)
        archive.writestr("scifact/qrels/test.tsv", "y" * 10)
    fuzz(
        (
            mangled(rows) | tables(ours, "study", "ndcg_at_10", "trial", "created_at", "parameters"),
            rows,
            into(tmp_path / "a.parquet", lambda file: store.read([file])),
        ),
        (
            mangled(documents) | tables(None, "_id", "title", "text"),
            documents,
            into(tmp_path / "corpus.parquet", corpus),
        ),
        (
            mangled(pairs) | tables(None, "query", "positive", "negatives", "scores", "text"),
            pairs,
            into(tmp_path / "pairs.parquet", lambda file: load_pairs(file, texts=True)),
        ),
        (mangled(packed.getvalue()), packed.getvalue(), into(tmp_path / "scifact.zip", unpack)),
    )
