"""What a node compares, without a cluster."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from effir_ray.cluster.probe import MARK, Shared, _difference, _files, _versions, check_shared, is_unused
from effir_ray.data.pair_stream import source_files
from effir_ray.errors import InputError
from effir_ray.models.names import model_reads
from tests.helpers.search_examples import write_corpus


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    """Everything is as it should be here."""
    reads = {"data 'toy'": partial(source_files, str(write_corpus(tmp_path / "toy")))}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("1234")
    return Shared(
        folder=tmp_path / "out",
        mark="1234",
        reads=reads,
        found={what: _files(find) for what, find in reads.items()},
        versions=_versions(),
        host="head",
    )


def test_nothing_is_wrong_where_all_is_the_same(shared: Shared) -> None:
    assert shared._problem() is None


def test_a_file_that_was_changed_in_place_is_found(shared: Shared, tmp_path: Path) -> None:
    file = tmp_path / "toy" / "qrels" / "dev.tsv"
    file.write_text(file.read_text().replace("q8\td8", "q8\td9"))
    assert str(shared._problem()).startswith("data 'toy': qrels/dev.tsv is not what it is on head")


def test_a_file_more_and_a_missing_folder_are_found(shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "toy" / "qrels" / "test.tsv").unlink()
    assert "qrels/test.tsv is not what it is" in str(shared._problem())
    (tmp_path / "toy").rename(tmp_path / "gone")
    assert "data 'toy' is not there (data set" in str(shared._problem())


def test_another_version_of_a_package_is_named(shared: Shared) -> None:
    other = Shared(**{**shared.__dict__, "versions": {**_versions(), "torch": "1.0"}})
    assert str(other._problem()).startswith("torch is ")
    assert "1.0 on head" in str(other._problem())


def test_files_are_compared_by_both_ends_and_size(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    prints = []
    for changed in (None, 0, 3 * 2**20 - 1):
        content = bytearray(3 * 2**20)
        if changed is not None:
            content[changed] = 1
        file.write_bytes(content)
        prints.append(_files(lambda: {"weights": file}))
    assert len({str(each) for each in prints}) == 3
    assert _difference(prints[0], prints[1]) == "weights"
    assert _difference(prints[0], {}) == "weights"


def test_a_models_own_files_are_compared_and_none_of_a_random_one(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in ("config.json", ".cache/note"):
        (tmp_path / name).write_text("{}")
    (find,) = model_reads(str(tmp_path)).values()
    assert set(find()) == {"config.json"}
    assert model_reads("random:llama") == {}
    (tmp_path / "config.json").unlink()
    (tmp_path / ".cache" / "note").unlink()
    (tmp_path / ".cache").rmdir()
    tmp_path.rmdir()
    with pytest.raises(InputError, match="no such folder"):
        find()


def test_without_a_cluster_nothing_is_asked_or_written(tmp_path: Path) -> None:
    assert check_shared(tmp_path / "out", {}) is None
    assert not (tmp_path / "out").exists()


def test_a_folder_with_nothing_but_a_mark_is_unused(tmp_path: Path) -> None:
    assert is_unused(tmp_path / "out")
    (tmp_path / MARK).touch()
    assert is_unused(tmp_path)
    (tmp_path / "rows").mkdir()
    assert not is_unused(tmp_path)
