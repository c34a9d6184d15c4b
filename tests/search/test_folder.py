"""Study folders: whose they are, and that only one search works in them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effir_ray import hardware
from effir_ray.compression.dimension import shorten
from effir_ray.errors import InputError
from effir_ray.mirrors import Mirror
from effir_ray.models.checkpoint import save_checkpoint
from effir_ray.models.retriever import load_retriever
from effir_ray.progress import show_progress
from effir_ray.provenance import __version__
from effir_ray.results import store
from effir_ray.search import study
from effir_ray.search.candidates import Candidate
from effir_ray.search.folder import attempts, claim, exclusive, finished_rows
from effir_ray.search.study import _say_other_version, search
from effir_ray.search.trial import sources_of
from tests.helpers.search_examples import row, small_space, write_corpus

CONTENTS = {"backbone": "b1", "dataset": "d1"}


def test_a_study_is_resumed_only_when_asked_and_keeps_its_threads(tmp_path: Path) -> None:
    space = small_space(threads=0)
    first = claim(tmp_path / "study", space, CONTENTS, resume=False)
    assert first.threads >= 1
    assert claim(tmp_path / "study", space, CONTENTS, resume=True) == first
    with pytest.raises(InputError, match="--resume"):
        claim(tmp_path / "study", space, CONTENTS, resume=False)


def test_the_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "study", small_space(), CONTENTS, resume=False)
    with pytest.raises(InputError, match=r"another study \('tiny', which differs in seed\)"):
        claim(tmp_path / "study", small_space(seed=1), CONTENTS, resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="holds no study"):
        claim(tmp_path / "notes", small_space(), CONTENTS, resume=True)


def test_what_no_row_depends_on_may_change(tmp_path: Path) -> None:
    axes = {"drop_mlp": [0, 1]}
    study = tmp_path / "study"
    claim(study, small_space(parameters=axes, trials=1), CONTENTS, resume=False)
    changes = {"concurrency": 2, "encoding_workers": 3, "keep": "all", "seeds": [0, 1]}
    more = small_space(parameters=axes, trials=2, budget={"hours": 1.0}, **changes)
    candidate = Candidate(drop_mlp=1)
    assert more.trial(candidate).id == small_space().trial(candidate).id
    assert claim(study, more, CONTENTS, resume=True).space == more
    assert claim(study, more, CONTENTS, resume=True).space == more
    with pytest.raises(InputError, match=r"which differs in constraints\)"):
        claim(
            study,
            more.model_copy(update={"constraints": ("parameters <= 5",)}),
            CONTENTS,
            resume=True,
        )


def test_a_resumed_study_reads_what_it_read_before(tmp_path: Path) -> None:
    """Rows of two corpora would stand on one front."""
    data = write_corpus(tmp_path / "data")
    space = small_space(dataset=str(data), dev={}, test={})
    claim(tmp_path / "study", space, sources_of(space).contents, resume=False)
    corpus = data / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("here is", "there is no"))
    with pytest.raises(InputError, match=r"has changed since it began \(dataset\)"):
        search(space, tmp_path / "study", resume=True)


def test_a_vocabulary_that_is_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    space = small_space(schedules=[{"drop_mlp": 1}, {"vocabulary": 20}])
    with pytest.raises(InputError, match="vocabulary is 20; expected 259"):
        search(space, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_what_is_shorter_already_is_known_before_anything_is_written(tmp_path: Path) -> None:
    model = shorten(load_retriever("random:llama"), np.eye(64, dtype=np.float32), 16)
    save_checkpoint(model, tmp_path / "model")
    space = small_space(backbone=str(tmp_path / "model"), schedules=[{"dimension": 32}])
    with pytest.raises(InputError, match="dimension is 32; the backbone's embeddings have 16"):
        search(space, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_gpu_serves_no_model_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = small_space(dataset=str(write_corpus(tmp_path / "data")), schedules=[{"precision": "int8"}])
    on_gpu = replace(hardware.detect(), device="cuda", name="1 x H200")
    monkeypatch.setattr(study, "machine", lambda: on_gpu)
    monkeypatch.setattr(study, "connect", lambda address: None)
    with pytest.raises(InputError, match="precision int8 is for CPUs, this study computes on 1 x H200"):
        search(space, tmp_path / "out")
    assert not (tmp_path / "out" / "study.json").exists()


def test_two_searches_do_not_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="another search is running")
    with exclusive(Mirror(tmp_path)), refused, exclusive(Mirror(tmp_path)):
        pass
    with exclusive(Mirror(tmp_path)):
        pass


def test_the_last_row_of_a_trial_counts_and_failed_ones_run_again(tmp_path: Path) -> None:
    assert finished_rows(tmp_path, small_space()) == []
    config = small_space().trial(Candidate())
    store.append(tmp_path, [row(config, 0.1)])
    store.append(tmp_path, [row(config, 0.2)])
    assert [kept.ndcg_at_10 for kept in finished_rows(tmp_path, small_space())] == [0.2]
    other = small_space().trial(Candidate(drop_mlp=1))
    store.append(tmp_path, [row(other, None)])
    assert [kept.ndcg_at_10 for kept in finished_rows(tmp_path, small_space())] == [0.2]
    assert attempts(tmp_path, small_space()) == {(config.id, "dev"): 2, (other.id, "dev"): 1}


def test_a_failure_with_a_later_clock_hides_no_success(tmp_path: Path) -> None:
    config = small_space().trial(Candidate())
    store.append(tmp_path, [row(config, 0.3)])
    store.append(tmp_path, [row(config, None)])
    assert [kept.ndcg_at_10 for kept in finished_rows(tmp_path, small_space())] == [0.3]


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


def test_another_version_than_the_one_that_began_a_study_is_said(tmp_path: Path) -> None:
    def said() -> str:
        stream = io.StringIO()
        with show_progress(stream):
            _say_other_version(claim(tmp_path / "study", small_space(), CONTENTS, resume=True))
        return stream.getvalue()

    claim(tmp_path / "study", small_space(), CONTENTS, resume=False)
    assert said() == ""
    file = tmp_path / "study" / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"effir_ray": "0.0.7"}))
    assert said().startswith(f"This study was started with effir-ray 0.0.7, and goes on with {__version__}")
