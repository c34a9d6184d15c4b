"""Mining: the score rule, what may never be a negative, and work that is done once."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effir_ray.data.pairs import load_pairs, write_pairs
from effir_ray.errors import InputError
from effir_ray.stages import StageStore
from effir_ray.training.supervision import negatives, resumable
from effir_ray.training.supervision.negatives import hard_negatives, mine

TOPICS = ("copper mines", "river boats", "winter wheat", "glass bottles", "night trains", "paper kites")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pairs whose query shares all words with its positive and most with documents of the same topic."""
    lines = []
    for topic in TOPICS:
        for place in range(6):
            positive = f"{topic} in town{place} were opened in the year of the flood"
            lines.append(
                {"query_id": f"{topic}-{place}", "query": f"{topic} town{place}", "positive": positive}
            )
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_rule_keeps_the_best_below_the_margin() -> None:
    ranked = {"a": 0.99, "positive": 0.8, "b": 0.77, "c": 0.75, "d": 0.6, "e": 0.1}
    chosen = hard_negatives(
        list(ranked.values()), list(ranked), ["positive", "absent"], negatives=2, margin=0.05
    )
    assert chosen == ["c", "d"]  # a and b score above 0.95 * 0.8 = 0.76


def test_the_rule_works_for_negative_scores_and_without_the_positive() -> None:
    assert hard_negatives([-1.0, -1.02, -1.2], ["p", "a", "b"], ["p"], negatives=5, margin=0.05) == ["b"]
    assert hard_negatives([3.0, 2.0], ["a", "b"], ["p"], negatives=5, margin=0.05) == []


@pytest.mark.parametrize("by", ["bm25", "random:llama"])
def test_mined_negatives_come_from_the_collection(by: str, source: Path, tmp_path: Path) -> None:
    mined = load_pairs(mine(source, by=by, stages=StageStore(tmp_path / "stages"), negatives=3))
    texts = {text for pair in mined for text in pair.positives}
    assert [pair.query_id for pair in mined] == [pair.query_id for pair in load_pairs(source)]
    assert any(pair.negatives for pair in mined)
    for pair in mined:
        assert len(pair.negatives) <= 3
        assert texts.issuperset(pair.negatives)
        assert not set(pair.negatives) & set(pair.positives)


def test_bm25_finds_the_topic(source: Path, tmp_path: Path) -> None:
    for pair in load_pairs(mine(source, stages=StageStore(tmp_path / "stages"), negatives=3)):
        topic = pair.query_id.split("-")[0]
        assert len(pair.negatives) == 3
        assert all(text.startswith(topic) for text in pair.negatives)


def test_copies_of_a_positive_are_no_negatives(tmp_path: Path) -> None:
    copy = [{"docid": "copy", "title": "", "text": "red apples are sweet"}]
    record = {
        "query": "red apples",
        "positive_passages": [{"docid": "1", "text": "red apples are sweet"}],
        "negative_passages": [*copy, {"docid": "2", "text": "red pears are soft and somewhat less sweet"}],
    }
    filler = [{"query": f"thing {i}", "positive": f"a blue thing number {i}"} for i in range(4)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [record, *filler]))
    mined = load_pairs(mine(file, stages=StageStore(tmp_path / "stages"), negatives=2, depth=6, margin=0.0))
    assert "copy" not in mined[0].negative_ids
    assert "2" in mined[0].negative_ids


def test_the_positive_of_another_row_of_the_query_is_no_negative(tmp_path: Path) -> None:
    """One row a positive, the second with a copy of its document under another id."""
    rows = [
        {"query": "red apples", "positive": "red apples are sweet and round"},
        {"query": "Red  apples", "positive": "the sweet red apples of a late autumn in the valley"},
        {"query": "red pears", "positive": "red pears are soft and somewhat less sweet"},
        *({"query": f"thing {i}", "positive": f"a blue thing number {i}"} for i in range(4)),
    ]
    copy = {"docid": "copy", "text": "the sweet red apples of a late autumn in the valley"}
    rows.append({"query": "autumn", "positive": "leaves of autumn", "negatives": [copy]})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mined = load_pairs(mine(file, stages=StageStore(tmp_path / "stages"), negatives=3, depth=6, margin=0.0))
    for pair in mined[:2]:
        assert pair.negatives[0] == "red pears are soft and somewhat less sweet"
        assert not any("apples" in text for text in pair.negatives)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_parquet_and_folders_of_pairs_are_mined_as_their_lines_are(
    kind: str, source: Path, tmp_path: Path
) -> None:
    pairs = load_pairs(source)
    if kind == "parquet":
        other = tmp_path / "pairs.parquet"
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in source.open()]), other)
    else:
        other = tmp_path / "parts"
        other.mkdir()
        write_pairs(pairs[:20], other / "a.jsonl")
        write_pairs(pairs[20:], other / "b.jsonl")
    expected, found = (
        mine(place, stages=StageStore(tmp_path / f"stages-{place.name}"), negatives=3)
        for place in (source, other)
    )
    assert load_pairs(found) == load_pairs(expected)


def test_a_killed_run_resumes_at_the_last_chunk_and_a_second_run_does_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "CHUNK", 10)  # 36 pairs: 4 chunks
    stages = StageStore(tmp_path / "stages")
    whole = negatives.mine_pairs
    calls: list[int] = []

    def dies_at_the_third(pairs, **how):  # type: ignore[no-untyped-def]
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(pairs, **how)

    monkeypatch.setattr(negatives, "mine_pairs", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        mine(source, stages=stages, negatives=3)
    resumed = mine(source, stages=stages, negatives=3)
    assert calls == [10, 10, 10, 10, 6]  # the third chunk again, then the fourth
    assert mine(source, stages=stages, negatives=3) == resumed
    assert len(calls) == 5
    monkeypatch.setattr(resumable, "CHUNK", 100)
    unbroken = mine(source, stages=StageStore(tmp_path / "other"), negatives=3)
    assert resumed.read_bytes() == unbroken.read_bytes()


def test_bad_settings_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="negatives is 200"):
        mine(source, stages=StageStore(tmp_path), negatives=200)
    with pytest.raises(InputError, match="margin is"):
        mine(source, stages=StageStore(tmp_path), margin=1.5)
