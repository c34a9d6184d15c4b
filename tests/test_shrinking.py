"""shrink: real weights and real text, stopped half-way, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel

from effir_ray import shrinking
from effir_ray.data.datasets import load_dataset
from effir_ray.encoding.encoder import Encoder
from effir_ray.errors import InputError
from effir_ray.models.retriever import load_retriever
from effir_ray.shrinking import shrink
from tests.helpers.beir_folders import write_folder, write_lines
from tests.helpers.real_data import real_data


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_lines(
        tmp_path / "texts.jsonl",
        *({"text": f"Text {i} of many. It speaks of number {i * i}."} for i in range(60)),
    )


@pytest.mark.integration
def test_half_of_minilm_learns_from_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before it learns, it goes on with the cut it had chosen; then it answers at once."""
    documents = load_dataset(str(real_data("cranfield"))).corpus.iter_documents(0, 150)
    openings = ({"title": d.title, "text": " ".join(d.text.split()[:50])} for d in documents)
    source, out = write_lines(tmp_path / "texts.jsonl", *openings), tmp_path / "half"
    settings = {"texts": str(source), "minutes": 0.3}

    def stopped(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shrinking, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            shrink("minilm-l6", out, **settings)
    assert not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr(shrinking, "measure_importance", None)
        found = shrink("minilm-l6", out, **settings)
    assert found.kept_blocks == (0, 4, 5) and found.blocks == 6 and found.ordinary
    assert found.comparison.parameters < found.comparison.full_parameters
    assert found.comparison.flops_ratio == pytest.approx(0.5, abs=0.02)
    assert found.comparison.document_speedup_interval[0] > 0
    assert found.comparison.scores["small"]["cosine"] > 0.9  # 0.85 before it learns
    assert found.comparison.lost.low < 1 - found.comparison.scores["small"]["overlap@10"] < 0.4

    plain = AutoModel.from_pretrained(out)
    assert type(plain).__name__ == "BertModel" and plain.config.num_hidden_layers == 3
    vectors = Encoder(load_retriever(out)).encode(["one text"], "document")
    assert np.isfinite(vectors).all()
    assert json.loads((out / "shrink.json").read_text())["asked"]["keep"] == 0.5
    assert not (tmp_path / "half.work").exists()

    with monkeypatch.context() as patched:
        patched.setattr(shrinking, "train", None)
        assert shrink("minilm-l6", out, **settings) == found
    with pytest.raises(InputError, match=r"other settings or data \(keep\)"):
        shrink("minilm-l6", out, keep=0.67, **settings)


@pytest.mark.integration
def test_scores_stand_beside_the_full_models_and_bm25(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "toy", documents=60)
    settings = {"dataset": str(data), "vocabulary": 300, "minutes": 0.2}
    found = shrink("random:llama", tmp_path / "out", **settings).comparison
    small = load_retriever(tmp_path / "out")
    assert small.model.config.vocab_size == len(small.tokenizer) == 300
    assert found.parameters == sum(parameter.numel() for parameter in small.model.parameters())
    assert found.measure == "nDCG@10 on toy test" and set(found.scores) == {"full", "small", "bm25"}
    lost = found.scores["full"]["ndcg@10"] - found.scores["small"]["ndcg@10"]
    assert found.lost.mean == pytest.approx(lost) and found.lost.n == 10
    assert found.lost.low <= lost <= found.lost.high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep is 0; expected the share of blocks"),
        ({"keep": 1.0}, "keep is 1; expected the share of blocks"),
        ({"keep": 0.1}, "has 4 whole blocks; keep 0.1 of them leaves 0"),
        ({"vocabulary": 20}, "vocabulary is 20; expected 259 .* to 444"),
        ({"vocabulary": 500}, "vocabulary is 500; expected 259"),
        ({"minutes": 0}, "minutes is 0; expected a positive number"),
        ({"texts": None}, "give a data set .its documents., or texts"),
        ({"texts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"dataset": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    texts: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    given = {"texts": str(texts), **settings}
    with pytest.raises(InputError, match=message):
        shrink("random:llama", tmp_path / "out", **given)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


def test_too_few_texts_and_a_folder_of_another_are_refused(texts: Path, tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", *({"text": f"Text {i}."} for i in range(15)))
    with pytest.raises(InputError, match="15 texts; learning takes at least 20"):
        shrink("random:llama", tmp_path / "out", texts=str(few))
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not written by shrink"):
        shrink("random:llama", other, texts=str(texts))
    assert [file.name for file in other.iterdir()] == ["notes.txt"]
