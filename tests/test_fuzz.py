"""Random input never gets past a reader but as a value or as an InputError of one line.

A hundred examples each; ``EFFIR_RAY_FUZZ_SECONDS=60`` goes on for a minute each.
"""

from __future__ import annotations

import io
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from effir_ray.config import load_yaml
from effir_ray.data.beir_files import read_qrels, scan_corpus
from effir_ray.data.pairs import read_jsonl
from effir_ray.errors import InputError
from effir_ray.models.settings import AdapterSettings, ModelSettings, OwnSettings, read_settings
from effir_ray.models.weight_files import gguf_settings, safetensors_header
from effir_ray.readers import read_json
from effir_ray.results import store
from effir_ray.search.space import SearchSpace

pytestmark = pytest.mark.timeout(600)

SECONDS = float(os.environ.get("EFFIR_RAY_FUZZ_SECONDS", "0"))


def fuzz(strategy: st.SearchStrategy[Any], attempt: Callable[[Any], object]) -> None:
    """``attempt`` may return or raise InputError with one line, for whatever ``strategy`` draws."""

    @settings(
        max_examples=100,
        deadline=30_000,  # ms an example: the machine may be busy
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(strategy)
    def run(value: Any) -> None:
        try:
            attempt(value)
        except InputError as error:
            assert "\n" not in str(error)

    end = time.monotonic() + SECONDS
    run()
    while time.monotonic() < end:
        run()  # others: nothing is remembered


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


SPACE = (
    b"name: t\nbackbone: random:llama\ndataset: stdlib\nseed: &s 1\nthreads: *s\nschedules: [{drop_mlp: 1}]\n"
)


def test_fuzz_yaml(tmp_path: Path) -> None:
    read = into(tmp_path / "a.yaml", lambda file: load_yaml(file, SearchSpace))
    fuzz(mangled(SPACE) | st.text(max_size=60) | st.text("[]{}&*!:-?|>'\"# \n<a1.", max_size=60), read)


def test_fuzz_spaces(tmp_path: Path) -> None:
    names = [name for name in SearchSpace.model_fields if name != "name"]
    whole = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)
    texts = whole.map(lambda more: json.dumps({"name": "t", "backbone": "b", "dataset": "d", **more}))
    fuzz(texts, into(tmp_path / "a.yaml", lambda file: load_yaml(file, SearchSpace)))


def test_fuzz_json(tmp_path: Path) -> None:
    fuzz(st.text(max_size=60) | VALUES.map(json.dumps), into(tmp_path / "a.json", read_json))


@pytest.mark.parametrize("kind", [ModelSettings, OwnSettings, AdapterSettings])
def test_fuzz_model_files(kind: Any, tmp_path: Path) -> None:
    fuzz(objects(*kind.model_fields), into(tmp_path / "a.json", lambda file: read_settings(file, kind)))


def test_fuzz_safetensors(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    whole = struct.pack("<Q", len(header)) + header + bytes(16)
    entries = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "I8", "F4", "x"]), "shape": VALUES, "data_offsets": VALUES}
    )
    built = st.dictionaries(st.text(max_size=4), entries | VALUES, max_size=3).map(
        lambda value: (raw := json.dumps(value).encode()) and struct.pack("<Q", len(raw)) + raw + bytes(16)
    )
    fuzz(
        mangled(whole) | built | st.binary(max_size=200), into(tmp_path / "a.safetensors", safetensors_header)
    )


def test_fuzz_gguf(tmp_path: Path) -> None:
    text = struct.pack("<Q", 1) + b"a"
    whole = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    whole += text + struct.pack("<IQ", 10, 7) + text + struct.pack("<IIQ", 9, 8, 2) + text * 2
    whole += text + struct.pack("<IQQIQ", 2, 2, 2, 0, 0) + bytes(32)
    fuzz(mangled(whole) | st.binary(max_size=300), into(tmp_path / "a.gguf", gguf_settings))


def test_fuzz_pairs(tmp_path: Path) -> None:
    lines = objects("query", "anchor", "positive", "negatives", "negative_1", "scores", "documents", "labels")
    read = into(tmp_path / "a.jsonl", lambda file: list(read_jsonl(file)))
    fuzz(lines | mangled(b'{"query": "a", "positive": "b", "scores": [1]}\n') | st.text(max_size=60), read)


def test_fuzz_corpus_and_qrels(tmp_path: Path) -> None:
    corpus = into(tmp_path / "corpus.jsonl", scan_corpus)
    fuzz(objects("_id", "title", "text") | mangled(b'{"_id": "d", "title": "", "text": "x"}\n'), corpus)
    qrels = into(tmp_path / "test.tsv", lambda file: read_qrels(file, {"q": "x"}, {"d"}))
    fuzz(mangled(b"query-id\tcorpus-id\tscore\nq\td\t1\n"), qrels)


def test_fuzz_rows(tmp_path: Path) -> None:
    table = pa.table({"study": ["s"], "ndcg_at_10": [0.5], "trial": ["{}"]})
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({"effir_ray_schema": "2"}), buffer)
    fuzz(mangled(buffer.getvalue()), into(tmp_path / "a.parquet", lambda file: store.read([file])))
