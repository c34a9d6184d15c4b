"""The folder of embeddings: what any Arrow reader sees, and what counts as finished."""

from __future__ import annotations

import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effir_ray.encoding.embedding_shards import CorpusEmbeddings, Encoding, ShardFolder, ShardRecord
from effir_ray.errors import InputError

ENCODING = Encoding(
    model="random:llama",
    model_fingerprint="m",
    dataset="d",
    corpus_fingerprint="f",
    documents=5,
    shard_size=2,
    max_length=None,
    dtype="float16",
    precision=None,
)
VECTORS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
IDS = ["a", "b", "ç", "d", "e"]


def fill(folder: ShardFolder, encoding: Encoding = ENCODING, shards=range(3)) -> None:
    folder.write_header(encoding)
    for shard in shards:
        rows = encoding.rows(shard)
        record = ShardRecord(
            shard=shard,
            documents=len(rows),
            dimension=8,
            tokens=7,
            seconds=0.5,
            peak_bytes=1,
            computed_in="float32",
        )
        folder.write_shard(record, [IDS[i] for i in rows], VECTORS[rows.start : rows.stop], encoding.dtype)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_folders_that_were_written_before_there_were_precisions(tmp_path, quantize):
    fill(ShardFolder(tmp_path))
    header = tmp_path / "encoding.json"
    old = json.loads(header.read_text()) | {"format": 1, "quantize": quantize}
    del old["precision"]
    header.write_text(json.dumps(old))
    read = CorpusEmbeddings(ShardFolder(tmp_path))
    assert read.ids == IDS and ShardFolder(tmp_path).header().precision == quantize


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("uri", [False, True])
def test_round_trip(tmp_path, dtype, uri):
    folder = ShardFolder(f"file://{tmp_path}/out" if uri else tmp_path / "out")
    fill(folder, ENCODING.model_copy(update={"dtype": dtype}))
    read = CorpusEmbeddings(folder)
    assert len(read) == 5 and read.ids == IDS
    assert [len(part) for part in read.shards()] == [2, 2, 1]
    np.testing.assert_array_equal(
        np.concatenate(list(read.shards())), VECTORS.astype(dtype).astype("float32")
    )
    assert [record.documents for record in read.records()] == [2, 2, 1]


def test_any_reader_sees_a_fixed_size_list(tmp_path):
    fill(ShardFolder(tmp_path))
    table = pq.read_table(tmp_path / "shards" / "000000.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 8)
    pattern = str(tmp_path / "shards" / "*.parquet")
    assert duckdb.sql(f"select count(*), min(len(embedding)) from '{pattern}'").fetchall() == [(5, 8)]


def test_a_shard_without_manifest_does_not_exist(tmp_path):
    folder = ShardFolder(tmp_path)
    fill(folder)
    (tmp_path / "shards" / "000001.json").unlink()
    assert folder.finished() == {0, 2}
    with pytest.raises(InputError, match="1 of 3 shards are missing"):
        CorpusEmbeddings(folder)


def test_leftovers_of_killed_writers_go(tmp_path):
    folder = ShardFolder(tmp_path)
    fill(folder)
    leftover = tmp_path / "shards" / "000001.parquet.tmp-1-ab"
    leftover.write_bytes(b"half")
    folder.remove_leftovers()
    assert not leftover.exists() and folder.finished() == {0, 1, 2}


def test_not_a_folder_of_embeddings(tmp_path):
    with pytest.raises(InputError, match="expected a folder written by"):
        CorpusEmbeddings(ShardFolder(tmp_path))
    (tmp_path / "encoding.json").write_text("[1]")
    with pytest.raises(InputError, match="expected a mapping"):
        ShardFolder(tmp_path).header()
    (tmp_path / "encoding.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(InputError, match="model_fingerprint: Field required"):
        ShardFolder(tmp_path).header()


def test_truncated_shard_is_named(tmp_path):
    folder = ShardFolder(tmp_path)
    fill(folder)
    path = tmp_path / "shards" / "000001.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="000001"):
        list(CorpusEmbeddings(folder).shards())


def test_unknown_location():
    with pytest.raises(InputError, match="cannot be used"):
        ShardFolder("nosuchscheme://bucket/x").header()
