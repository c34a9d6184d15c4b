"""Files and folders on disks and in object stores, through one door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effir_ray import storage
from effir_ray.data.pair_stream import PairStream, source_fingerprint
from effir_ray.encoding.embedding_shards import ShardFolder
from effir_ray.errors import InputError


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_storage_is_the_same_on_a_path_and_on_a_uri(tmp_path: Path, scheme: str) -> None:
    base = f"{scheme}{tmp_path}/store"
    assert storage.read_json(f"{base}/a.json") is None
    storage.write_json(f"{base}/a.json", {"b": 1})
    assert storage.read_json(f"{base}/a.json") == {"b": 1}

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w")

    storage.upload(f"{base}/model", write, tmp_path / "aside")
    assert not (tmp_path / "aside").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    storage.fetch(f"{base}/model", tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["weights"]
    storage.remove(base)
    assert not storage.exists(base)
    storage.remove(base)


def test_options_of_a_uri_stay_at_its_end() -> None:
    assert storage.join("/runs/", "a") == "/runs/a"
    assert storage.join("s3://bucket/runs", "a") == "s3://bucket/runs/a"
    assert storage.join("s3://b/runs/?scheme=http", "a") == "s3://b/runs/a?scheme=http"


@pytest.mark.parametrize(
    "place",
    [
        "s3://KEY:HIDDEN@bucket/runs",
        "s3://KEY:HID/DEN@bucket/runs?scheme=http",
        "S3://HIDDEN@bucket/runs",
        "https://HIDDEN@host:8265/a",
        "s3://bucket/hf_HIDDENHIDDENHIDDEN",
        "s3://bucket/AKIAHIDDENHIDDENHIDD",
    ],
)
def test_a_place_with_credentials_is_refused_and_they_are_not_repeated(place: str) -> None:
    with pytest.raises(InputError, match="environment") as refused:
        storage.check(place)
    said = str(refused.value)
    assert "HID" not in said and "\n" not in said and said.startswith(place.partition("://")[0])
    assert "HID" not in storage.redacted(f"cannot write {place}: denied")


@pytest.mark.parametrize(
    "place",
    [
        "s3://bucket/model@main/x",
        "http://head:8265/a@b",
        "[http://head:8265,a@b]",
        "http://head:8265 me@there",
        "gs://anonymous@bucket/x",
        "/data/hf_models/a@b:c",
        "the hf_hub of AKIA",
    ],
)
def test_what_only_looks_like_credentials_is_let_through(place: str) -> None:
    storage.check_no_credentials(place)
    assert storage.redacted(place) == place


def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    storage.check(tmp_path.as_uri())
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"^s4://bucket cannot be used: Unrecognized"):
        storage.check("s4://bucket")


@pytest.mark.integration
def test_an_object_store_that_does_not_answer_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    nobody = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=x"
    with pytest.raises(InputError, match=r"cannot be used: .*connect"):
        storage.check(nobody)
    with pytest.raises(InputError, match=r"cannot be used: .*connect"):
        ShardFolder(nobody).header()


def test_a_folder_is_listed_by_name_and_a_file_is_itself(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    for base in (str(tmp_path), tmp_path.as_uri()):
        found = storage.list_files(base)
        assert [(file.place, file.size) for file in found] == [(f"{base}/{x}.txt", 5) for x in "ab"]
        assert storage.list_files(f"{base}/a.txt") == found[:1]
        with storage.open_file(found[1].place) as file:
            assert file.read() == b"b.txt"
    with pytest.raises(InputError, match=r"absent cannot be read: "):
        storage.list_files(tmp_path / "absent")


@pytest.mark.integration
def test_pairs_in_an_object_store_are_read_through_its_options(object_store: str) -> None:
    """The files of a folder are reached as the folder is: with the options of its URI."""
    place, rows = object_store.format("pairs"), [{"query": f"q{i}", "positive": f"p{i}"} for i in range(3)]
    system, path = storage.locate(place)
    system.create_dir(path)
    with system.open_output_stream(f"{path}/a.jsonl") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert [pair.query for pair in PairStream(place).read()] == ["q0", "q1", "q2"]
    assert [file.place for file in storage.list_files(place)] == [object_store.format("pairs/a.jsonl")]
    assert source_fingerprint(place) == source_fingerprint(place)
