import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from beir.retrieval.evaluation import EvaluateRetrieval

from effir_ray.data.datasets import Dataset, load_dataset
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.evaluation import evaluate as module
from effir_ray.evaluation.corpus_search import Feedback, search_corpus
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.evaluation.trec import read_run
from effir_ray.models.retriever import load_retriever
from tests.helpers.real_data import real_data

WriteFolder = Callable[..., Path]
MODEL = "random:bert"


def reference_run(dataset: Dataset, depth: int) -> dict[str, dict[str, float]]:
    """Embeddings one by one, all inner products, a plain sort."""
    encoder = Encoder(load_retriever(MODEL))
    documents = {
        d.id: encoder.encode([d.document_text], "document")[0] for d in dataset.corpus.iter_documents()
    }
    run = {}
    for query_id, text in dataset.queries("test").items():
        query = encoder.encode([text], "query")[0]
        scores = {i: float(query @ row) for i, row in documents.items() if i != query_id}
        run[query_id] = dict(sorted(scores.items(), key=lambda hit: -hit[1])[:depth])
    return run


def test_scores_equal_a_plain_computation_scored_by_beir(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)  # several chunks and shards
    dataset = load_dataset(folder)
    result = evaluate(MODEL, dataset)
    expected = reference_run(dataset, 100)
    for query_id, hits in result.run.items():
        assert list(hits) == list(expected[query_id])
        assert list(hits.values()) == pytest.approx(list(expected[query_id].values()), abs=1e-5)
    ndcg, _, recall, _ = EvaluateRetrieval.evaluate(dataset.qrels("test"), expected, [10, 100])
    assert result.scores.mean["ndcg@10"] == pytest.approx(ndcg["NDCG@10"], abs=1e-5)
    assert result.scores.mean["recall@100"] == pytest.approx(recall["Recall@100"], abs=1e-5)
    assert 0 < result.search_ms * result.n_queries < 1000 * result.seconds
    assert (result.n_queries, result.n_documents) == (10, 40)


def test_what_is_written_can_be_read_by_others(folder: Path, tmp_path: Path) -> None:
    results = pytest.importorskip("mteb.results")
    result = evaluate(load_retriever(MODEL), str(folder), out=tmp_path / "out")
    assert read_run(tmp_path / "out/run.trec").keys() == result.run.keys()
    task = results.TaskResult.from_disk(tmp_path / "out/mteb.json")
    assert task.scores["test"][0]["main_score"] == result.scores.mean["ndcg@10"]
    per_query = json.loads((tmp_path / "out/per_query.json").read_text())
    assert per_query == result.scores.per_query
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["scores"] == result.scores.mean


def test_bad_data_is_refused_before_the_model_is_loaded(folder: Path) -> None:
    with pytest.raises(InputError, match="no split 'validation'"):
        evaluate("no-such-model", folder, split="validation")
    (folder / "corpus.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"corpus\.jsonl:1"):
        evaluate("no-such-model", folder)


def test_deeper_ranks_are_searched_as_deep(tmp_path: Path, write_folder: WriteFolder) -> None:
    dataset = load_dataset(write_folder(tmp_path / "deep", documents=160))
    result = evaluate(MODEL, dataset, cutoffs=[3, 150])
    assert {len(hits) for hits in result.run.values()} == {150}
    ndcg, *_ = EvaluateRetrieval.evaluate(dataset.qrels("test"), result.run, [3, 150])
    for cut in (3, 150):
        assert result.scores.mean[f"ndcg@{cut}"] == pytest.approx(ndcg[f"NDCG@{cut}"], abs=1e-5)
    assert "ndcg_at_150" in result.mteb_result()["scores"]["test"][0]


def test_several_workers_need_what_they_can_share(folder: Path) -> None:
    with pytest.raises(InputError, match=r"2 workers need .* a folder they all see"):
        evaluate(MODEL, folder, workers=2)


class Embedded:
    """Embeddings in memory."""

    def __init__(self, ids: list[str], rows: np.ndarray) -> None:
        self.ids, self._rows = ids, rows

    def shards(self) -> list[np.ndarray]:
        return [self._rows[:4], self._rows[4:]]


def test_a_query_never_finds_itself_nor_learns_from_itself() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((12, 8)).astype(np.float32)
    ids = [f"d{i}" for i in range(12)]
    queries, query_ids = rows[:3] * 2, ids[:3]  # queries are documents, as in ArguAna
    run = search_corpus(query_ids, queries, Embedded(ids, rows), depth=5)
    assert all(len(hits) == 5 and query_id not in hits for query_id, hits in run.items())
    feedback = Feedback(documents=2, alpha=0.0, beta=1.0)
    moved = search_corpus(query_ids, queries, Embedded(ids, rows), depth=11, feedback=feedback)
    for query_id, hits in run.items():
        mean = rows[[ids.index(i) for i in list(hits)[:2]]].mean(axis=0)
        others = [i for i in ids if i != query_id]
        expected = sorted(others, key=lambda i: -float(mean @ rows[ids.index(i)]))
        assert list(moved[query_id]) == expected


@pytest.mark.integration
def test_stored_and_distributed_embeddings_give_the_same_run(
    write_folder: WriteFolder, tmp_path: Path
) -> None:
    """Ray Data writes the shards, Ray tasks search them; a second evaluation encodes nothing."""
    folder = write_folder(tmp_path / "large", documents=2500)
    here = evaluate(MODEL, folder)
    stored = evaluate(MODEL, folder, out=tmp_path / "out", workers=2)
    for query_id, hits in here.run.items():
        assert list(stored.run[query_id].values()) == pytest.approx(list(hits.values()), abs=1e-5)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/embeddings").rglob("*.parquet")}
    assert len(shards) == 3
    alone = evaluate(MODEL, folder, out=tmp_path / "out", workers=1)
    assert alone.run == stored.run
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


@pytest.mark.integration
def test_minilm_reaches_its_reference_score_on_cranfield() -> None:
    """0.4996 through sentence-transformers and beir at 256 tokens."""
    result = evaluate("minilm-l6", real_data("cranfield"))
    assert result.scores.mean["ndcg@10"] == pytest.approx(0.4996, abs=0.003)
    assert "2 of 1400" in result.warnings[0]
