import json
from pathlib import Path

import pytest

import effir_ray
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate
from effir_ray.evaluation.mteb_adapter import MtebModel, run_mteb

mteb = pytest.importorskip("mteb")

MODEL = "random:bert"
TOPICS = ["wing", "flow", "heat", "shock", "plate", "drag", "jet", "cone", "lift", "wave"]


@pytest.fixture
def words(folder: Path) -> Path:
    """Queries share words with their documents, so that even a random model finds something."""
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(40):
            text = f"{TOPICS[i % 10]} {TOPICS[i // 4]} {TOPICS[i // 4]}"
            print(json.dumps({"_id": f"d{i}", "title": f"{TOPICS[i % 10]} study", "text": text}), file=file)
    with (folder / "queries.jsonl").open("w") as file:
        for i in range(31):
            print(json.dumps({"_id": f"q{i}", "text": f"{TOPICS[i % 10]} {TOPICS[i // 4]}"}), file=file)
    return folder


def local_task(folder: Path) -> "mteb.AbsTask":
    """An mteb retrieval task over a BEIR folder on disk."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalRetrieval",
            description="A BEIR folder",
            dataset={"path": "local/folder", "revision": "1"},
            type="Retrieval",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *_: object, **__: object) -> None:
            data = load_dataset(folder)
            self.queries = {"test": data.queries("test")}
            documents = data.corpus.iter_documents()
            self.corpus = {"test": {d.id: {"title": d.title, "text": d.text} for d in documents}}
            self.relevant_docs = {"test": data.qrels("test")}
            self.data_loaded = True

    return LocalTask()


def test_mteb_gets_the_same_main_score(words: Path) -> None:
    model = MtebModel(MODEL)
    result = mteb.evaluate(model, local_task(words), cache=None, show_progress_bar=False)
    expected = evaluate(MODEL, words).scores.mean
    scores = result.task_results[0].scores["test"][0]
    assert 0.05 < expected["ndcg@10"] < 1
    assert scores["main_score"] == pytest.approx(expected["ndcg@10"], abs=1e-4)
    assert scores["recall_at_100"] == pytest.approx(expected["recall@100"], abs=1e-4)
    assert model.mteb_model_meta.name == "effir-ray/random-bert"


def test_a_task_of_mteb_is_evaluated_on_local_data_and_leaves_what_mteb_loads(
    words: Path, tmp_path: Path
) -> None:
    """Texts of a folder named like the task are taken in place of a download; a second run does nothing."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "scifact").symlink_to(words, target_is_directory=True)
    small = effir_ray.compress("random:bert", effir_ray.Schedule(drop_block=(1,)), tmp_path / "small")
    scores = run_mteb(small.checkpoint, ["SciFact"], tmp_path / "out", data=data)
    expected = evaluate(small.checkpoint, words).scores.mean["ndcg@10"]
    assert scores == {"SciFact": pytest.approx(expected, abs=1e-4)}
    meta = MtebModel(small.checkpoint).mteb_model_meta
    (result,) = mteb.ResultCache(tmp_path / "out").load_results(models=[meta], tasks=["SciFact"])
    assert result.task_results[0].get_score() == scores["SciFact"]
    (described,) = (tmp_path / "out").rglob("model_meta.json")
    found = json.loads(described.read_text())
    assert found["experiment_kwargs"] == {"blocks": 4, "attention": 3, "mlp": 3}
    assert found["adapted_from"] == "random:bert"
    assert found["n_parameters"] > found["n_embedding_parameters"] > 0
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("SciFact.json")}
    assert len(written) == 1
    assert run_mteb(small.checkpoint, ["SciFact"], tmp_path / "out", data=data) == scores
    assert {file: file.stat().st_mtime_ns for file in written} == written


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(InputError, match=r"--task: .*Scifakt"):
        run_mteb("random:bert", ["Scifakt"], "nowhere")
    assert not Path("nowhere").exists()


def test_local_data_that_a_task_cannot_use_is_named(words: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scifact is not there, which the task SciFact is to use"):
        run_mteb("random:bert", ["SciFact"], tmp_path / "out", data=tmp_path)
    (tmp_path / "scifact").symlink_to(words, target_is_directory=True)
    (words / "qrels" / "test.tsv").rename(words / "qrels" / "dev.tsv")
    with pytest.raises(InputError, match=r"the task SciFact needs judgements of split test"):
        run_mteb("random:bert", ["SciFact"], tmp_path / "out", data=tmp_path)
