"""Study folders: whose they are, and that only one search works in them."""

from pathlib import Path

import pytest

from effir_ray.errors import InputError
from effir_ray.results import store
from effir_ray.search.folder import claim, exclusive, finished_rows
from effir_ray.search.space import Candidate
from effir_ray.search.study import search
from tests.helpers.search_examples import row, small_space, write_corpus


def test_a_study_is_resumed_only_when_asked_and_keeps_its_threads(tmp_path: Path) -> None:
    space = small_space(threads=0)
    first = claim(tmp_path / "study", space, resume=False)
    assert first.threads >= 1
    assert claim(tmp_path / "study", space, resume=True) == first
    with pytest.raises(InputError, match="--resume"):
        claim(tmp_path / "study", space, resume=False)


def test_the_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "study", small_space(), resume=False)
    with pytest.raises(InputError, match=r"another study \('tiny', which differs in seed\)"):
        claim(tmp_path / "study", small_space(seed=1), resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="holds no study"):
        claim(tmp_path / "notes", small_space(), resume=True)


def test_two_searches_do_not_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="another search is running")
    with exclusive(tmp_path), refused, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_the_last_row_of_a_trial_counts_and_failed_ones_run_again(tmp_path: Path) -> None:
    assert finished_rows(tmp_path) == []
    config = small_space().trial(Candidate())
    store.append(tmp_path, [row(config, 0.1)])
    store.append(tmp_path, [row(config, 0.2)])
    assert [kept.ndcg_at_10 for kept in finished_rows(tmp_path)] == [0.2]
    store.append(tmp_path, [row(config, None)])
    assert finished_rows(tmp_path) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [("ray://127.0.0.1:10001", "effir-ray submit"), ("127.0.0.1:1", "no Ray cluster answers")],
)
def test_an_address_that_cannot_be_used_leaves_no_folder(
    tmp_path: Path, address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's instance would be taken
    space = small_space(dataset=str(write_corpus(tmp_path / "data")), dev={}, test={})
    with pytest.raises(InputError, match=message) as refused:
        search(space, tmp_path / "study", address=address)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "study").exists()
