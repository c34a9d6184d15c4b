"""Training pairs: every layout of the field reads into the same pairs; mistakes name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from effir_ray.data.pairs import Pair, load_pairs, shared_positives, shuffled, write_pairs
from effir_ray.errors import InputError
from tests.helpers.beir_folders import write_graded_folder, write_lines

LAYOUTS = {
    "ours": {"query": "q", "positive": "p", "negatives": ["n1", "n2"], "teacher_scores": [3, 2, 1]},
    "tevatron": {
        "query_id": "7",
        "query": "q",
        "positive_passages": [{"docid": "d1", "title": "", "text": "p"}],
        "negative_passages": [{"docid": "d2", "text": "n1"}, {"docid": "d3", "title": None, "text": "n2"}],
    },
    "n-tuple": {"anchor": "q", "positive": "p", "negative_2": "n2", "negative_1": "n1", "scores": [3, 2, 1]},
    "labeled list": {"query": "q", "documents": ["p", "n1", "n2"], "labels": [1, 0, 0], "scores": [3, 2, 1]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_into_the_same_pair(layout: str, tmp_path: Path) -> None:
    (pair,) = load_pairs(write_lines(tmp_path / "pairs.jsonl", LAYOUTS[layout]))
    assert (pair.query, pair.positives, pair.negatives) == ("q", ("p",), ("n1", "n2"))
    assert pair.teacher_scores == (None if layout == "tevatron" else (3.0, 2.0, 1.0))
    if layout == "tevatron":
        assert (pair.query_id, pair.positive_ids, pair.negative_ids) == ("7", ("d1",), ("d2", "d3"))


def test_title_and_text_are_joined_by_a_space(tmp_path: Path) -> None:
    record = {"query": "q", "positive_passages": [{"docid": "1", "title": "Ray", "text": "A framework."}]}
    (pair,) = load_pairs(write_lines(tmp_path / "pairs.jsonl", record))
    assert pair.positives == ("Ray A framework.",)


def test_documents_without_ids_are_identified_by_their_text(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "pairs.jsonl", {"query": "a", "positive": "x"}, {"query": "b", "positive": ["x", "y"]}
    )
    first, second = load_pairs(file)
    assert first.positive_ids[0] == second.positive_ids[0] != second.positive_ids[1]


def test_fewer_hard_negatives_keep_their_scores(tmp_path: Path) -> None:
    (pair,) = load_pairs(write_lines(tmp_path / "pairs.jsonl", LAYOUTS["ours"]), hard_negatives=1)
    assert pair.negatives == ("n1",)
    assert pair.teacher_scores == (3.0, 2.0)


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    pairs = load_pairs(write_lines(tmp_path / "in.jsonl", LAYOUTS["ours"], LAYOUTS["tevatron"]))
    write_pairs(pairs, tmp_path / "out.jsonl")
    assert load_pairs(tmp_path / "out.jsonl") == pairs


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "q"}, "positive"),
        ({"positive": "p"}, "'query'"),
        ({"query": "q", "positive": " "}, "without text"),
        ({"query": "q", "positive": 3}, "positives: expected a text"),
        ({"query": "q", "positive": "p", "teacher_scores": [1, 2]}, "expected 1 scores"),
        ({"query": "q", "positive": "p", "scores": [None]}, "finite"),
        ({"query": "q", "documents": ["n", "p"], "labels": [0, 1]}, "before the others"),
        ({"query": "q", "documents": ["p", "n"], "labels": ["1", "0"]}, "'labels' that are numbers"),
        ({"query": "q", "documents": ["p", "n"], "labels": [1, None]}, "'labels' that are numbers"),
        ({"query": "q", "positive": {"text": None}}, "positives: expected a document whose 'text'"),
        ({"query": "q", "positive": {"title": 7, "text": "p"}}, "is a string"),
        ({"query": "q", "positive_document_ids": ["1"]}, "by id only"),
        (["q", "p"], "found list"),
    ],
)
def test_a_bad_line_is_named(record: object, message: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", LAYOUTS["ours"], record)
    with pytest.raises(InputError, match=message) as caught:
        load_pairs(file)
    assert str(caught.value).startswith(f"{file}:2: ")


def test_broken_json_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('\n{"query": \n')
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: not valid JSON"):
        load_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="no such file"):
        load_pairs(tmp_path / "absent.jsonl")


def test_shuffling_depends_on_seed_and_epoch_alone() -> None:
    pairs = [Pair(str(index), "q", ("p",)) for index in range(50)]
    order = [pair.query_id for pair in shuffled(pairs, seed=1, epoch=2)]
    assert order == [pair.query_id for pair in shuffled(pairs, seed=1, epoch=2)]
    assert sorted(order) == sorted(pair.query_id for pair in pairs)
    assert order != [pair.query_id for pair in shuffled(pairs, seed=1, epoch=3)]
    assert order != [pair.query_id for pair in shuffled(pairs, seed=2, epoch=2)]


def test_a_beir_folder_gives_train_pairs_without_the_dev_queries(tmp_path: Path) -> None:
    folder = write_graded_folder(tmp_path / "set")
    train, dev = load_pairs(folder), load_pairs(folder, split="dev")
    assert dev
    assert {pair.query_id for pair in train}.isdisjoint(pair.query_id for pair in dev)
    assert len(train) + len(dev) == 40
    pair = next(pair for pair in train if pair.query_id == "q3")
    assert pair.positive_ids == ("d4", "d3")  # the higher grade first, grade 0 is no positive
    assert pair.positives == ("Part text 4", "Part text 3")
    with pytest.raises(InputError, match="no split 'test'"):
        load_pairs(folder, split="test")


def test_two_ids_that_ask_the_same_are_not_on_both_sides(tmp_path: Path) -> None:
    folder = write_graded_folder(tmp_path / "set")
    queries = load_pairs(folder)
    twice = {f"q{i}": f"query {i}" for i in range(40)} | {"t0": f" {queries[0].query.upper()}"}
    write_lines(folder / "queries.jsonl", *({"_id": name, "text": text} for name, text in twice.items()))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nt0\td0\t1\n")
    assert load_pairs(folder) == queries[1:]


def test_positives_of_rows_that_ask_the_same_are_shared() -> None:
    rows = [
        Pair("1", "One  question", ("a",), positive_ids=("A",)),
        Pair("2", "another", ("b",), positive_ids=("B",)),
        Pair("1", "one question", ("c", "d"), positive_ids=("C", "D")),
    ]
    assert shared_positives(rows) == {"one question": {"A": "a", "C": "c", "D": "d"}}


@pytest.mark.parametrize(
    ("record", "query", "document"),
    [
        ({"_id": 7, "title": "Wings", "text": "They lift. Well."}, "Wings", "Wings They lift. Well."),
        ({"title": "", "text": "They lift? Well. Yes"}, "They lift?", "They lift? Well. Yes"),
        ({"text": "What lifts a wing?"}, "What lifts a wing?", "What lifts a wing?"),
        ({"text": ""}, "", ""),
    ],
)
def test_a_text_alone_brings_a_query_like_part_of_itself(
    record: dict[str, object], query: str, document: str, tmp_path: Path
) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text(json.dumps(record) + "\n")
    (pair,) = load_pairs(file, texts=True)
    assert (pair.query, pair.positives, pair.labelled) == (query, (document,), False)
    write_pairs([pair], tmp_path / "again.jsonl")
    assert load_pairs(tmp_path / "again.jsonl", texts=True) == [pair]
    with pytest.raises(InputError, match=r"corpus.jsonl: texts without queries; expected pairs"):
        load_pairs(file)
