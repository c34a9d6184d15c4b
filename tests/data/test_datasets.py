import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from effir_ray import readers
from effir_ray.compression.calibration import draw_pairs, draw_texts
from effir_ray.data import beir_files, datasets
from effir_ray.data.datasets import load_dataset
from effir_ray.data.pair_stream import source_fingerprint
from effir_ray.data.pairs import load_pairs
from effir_ray.errors import InputError
from effir_ray.evaluation.evaluate import evaluate

HEADER = "query-id\tcorpus-id\tscore\n"
WriteFolder = Callable[..., Path]


def test_a_folder_is_read_as_it_is(folder: Path) -> None:
    dataset = load_dataset(str(folder))
    assert dataset.name == "toy"
    assert len(dataset.corpus) == 40
    assert [d.id for d in dataset.corpus.iter_documents(38)] == ["d38", "d39"]
    assert dataset.corpus.texts(["d7", "d3"]) == ["T7 text 7 é", "T3 text 3 é"]
    assert dataset.queries("test") == {f"q{i}": f"query {i}" for i in range(20, 30)}
    assert dataset.qrels("test")["q25"] == {"d25": 1}
    assert dataset.warnings == ()


def test_dev_is_cut_from_train_and_train_loses_it(folder: Path) -> None:
    dataset = load_dataset(folder)
    assert dataset.splits == ("train", "dev", "test")
    dev, train = set(dataset.queries("dev")), set(dataset.queries("train"))
    assert dev
    assert train
    assert dev | train == {f"q{i}" for i in range(20)}
    assert not dev & train
    assert set(load_dataset(folder).queries("dev")) == dev


def test_an_official_dev_split_is_used(folder: Path) -> None:
    (folder / "qrels/dev.tsv").write_text(HEADER + "q3\td3\t2\n")
    dataset = load_dataset(folder)
    assert dataset.qrels("dev") == {"q3": {"d3": 2}}
    assert set(dataset.queries("train")) == {f"q{i}" for i in range(20)} - {"q3"}


def test_a_missing_split_is_named(folder: Path) -> None:
    (folder / "qrels/train.tsv").unlink()
    with pytest.raises(InputError, match=r"no split 'dev'; it has test \(dev is cut from train"):
        load_dataset(folder).queries("dev")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("corpus.jsonl", "text 8", "text 9"),
        ("queries.jsonl", "query 8", "query 9"),
        ("qrels/test.tsv", "d20", "d21"),
    ],
)
def test_the_fingerprint_follows_every_file(folder: Path, file: str, old: str, new: str) -> None:
    before = load_dataset(folder).fingerprint
    text = (folder / file).read_text(encoding="utf-8")
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    assert load_dataset(folder).fingerprint != before


def test_a_sample_keeps_the_relevant_documents_and_is_repeatable(folder: Path) -> None:
    dataset = load_dataset(folder)
    sample = dataset.sample("test", queries=4, documents=12, seed=3)
    assert len(sample.queries("test")) == 4
    assert len(sample.corpus) == 12
    assert all(set(judged) <= set(sample.corpus.ids) for judged in sample.qrels("test").values())
    assert [d.id for d in sample.corpus.iter_documents()] == sample.corpus.ids
    again = load_dataset(folder).sample("test", queries=4, documents=12, seed=3)
    assert again.corpus.ids == sample.corpus.ids
    assert again.fingerprint == sample.fingerprint
    other = dataset.sample("test", queries=4, documents=12, seed=4)
    assert other.corpus.ids != sample.corpus.ids
    assert other.fingerprint != sample.fingerprint
    assert len(dataset.sample("test", queries=10, documents=3).corpus) == 10


def test_a_data_set_travels_to_workers(folder: Path) -> None:
    dataset = pickle.loads(pickle.dumps(load_dataset(folder)))
    assert [d.text for d in dataset.corpus.iter_documents(0, 1)] == ["text 0 é"]


def _replace_line(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line + b"\n"
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("file", "line", "content", "message"),
    [
        ("corpus.jsonl", 5, b'{"_id": "d4", "text": ', "not valid JSON"),
        ("corpus.jsonl", 5, b'["d4", "text"]', "found a JSON list"),
        ("corpus.jsonl", 5, b'{"_id": "d3", "text": "x"}', "_id 'd3' was already used on line 4"),
        ("corpus.jsonl", 5, b'{"_id": "d4", "title": "", "text": " "}', "without title and text"),
        ("corpus.jsonl", 5, b'{"_id": "d4", "title": "x"}', "field 'text' is missing"),
        ("corpus.jsonl", 5, b'{"_id": "d4", "text": 3}', "field 'text' is a JSON int"),
        ("corpus.jsonl", 5, b'{"_id": 4, "text": "x"}', "_id is 4; expected a string"),
        ("corpus.jsonl", 5, b'{"_id": "d4", "text": "caf\xe9"}', "not UTF-8 .byte 0xe9 at column 27"),
        (
            "corpus.jsonl",
            5,
            b'{"_id": "d4", "text": "\\ud83d"}',
            "a text holds half of a surrogate pair",
        ),
        ("corpus.jsonl", 5, b'{"_id": "d4", "text": "x", "n": 1' + b"0" * 5000 + b"}", "too many digits"),
        ("queries.jsonl", 2, b'{"_id": "q1", "text": ""}', "query 'q1' has no text"),
        ("queries.jsonl", 2, b'{"_id": "q0", "text": "x"}', "_id 'q0' was already used on line 1"),
        ("qrels/test.tsv", 1, b"q20\td20\t1", "expected the header"),
        ("qrels/test.tsv", 3, b"q21\t0\td21\t1", "4 tab-separated fields"),
        ("qrels/test.tsv", 3, b"q21\td21\thigh", "score is 'high'"),
        ("qrels/test.tsv", 3, b"q21\td999\t1", "document 'd999' is not in the corpus"),
        ("qrels/test.tsv", 3, b"q999\td21\t1", "query 'q999' is not in queries.jsonl"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(
    folder: Path, file: str, line: int, content: bytes, message: str
) -> None:
    _replace_line(folder / file, line, content)
    with pytest.raises(InputError, match=f"{file}:{line}: .*{message}"):
        load_dataset(folder)


@pytest.mark.parametrize("chunk", [1, 7, 40, 41])
def test_ids_are_those_of_the_file_whatever_the_chunks(
    folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beir_files, "_CHUNK", chunk)
    corpus = load_dataset(folder).corpus
    assert corpus.ids == [f"d{i}" for i in range(40)]
    part = corpus.subset([30, 2])
    assert part.ids == ["d30", "d2"] and [d.id for d in part.iter_documents()] == ["d30", "d2"]
    assert corpus.subset([]).ids == []
    _replace_line(folder / "corpus.jsonl", 40, b'{"_id": "d0", "text": "x"}')
    with pytest.raises(InputError, match=r"corpus\.jsonl:40: _id 'd0' was already used on line 1;"):
        load_dataset(folder)


def test_ids_that_only_share_their_hash_are_no_duplicates(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beir_files, "hash", lambda identifier: len(identifier), raising=False)
    assert len(load_dataset(folder).corpus) == 40
    _replace_line(folder / "corpus.jsonl", 5, b'{"_id": "d3", "text": "x"}')
    with pytest.raises(InputError, match=r"corpus\.jsonl:5: _id 'd3' was already used on line 4;"):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("corpus.jsonl", "holds no documents"),
        ("queries.jsonl", "no queries"),
        ("qrels/test.tsv", "no judgements"),
    ],
)
def test_empty_and_missing_files_are_named(folder: Path, file: str, message: str) -> None:
    (folder / file).write_bytes(b"")
    with pytest.raises(InputError, match=f"{file}: .*{message}"):
        load_dataset(folder)
    (folder / file).unlink()
    if file != "qrels/test.tsv":  # train.tsv alone still is a data set
        with pytest.raises(InputError, match=f"{file}: no such file"):
            load_dataset(folder)


def test_a_line_of_100_megabytes_is_refused_unread(folder: Path) -> None:
    path = folder / "corpus.jsonl"
    os.truncate(path, path.stat().st_size + 100 * 2**20)  # a sparse file: zero bytes without a line end
    with pytest.raises(InputError, match=r"corpus\.jsonl:41: line longer than 10 MiB"):
        load_dataset(folder)


def test_few_blemishes_are_kept_with_a_warning(tmp_path: Path, write_folder: WriteFolder) -> None:
    folder = write_folder(tmp_path / "large", documents=1000)
    _replace_line(folder / "corpus.jsonl", 7, b'{"_id": "d6", "title": "", "text": ""}')
    dataset = load_dataset(folder)
    assert len(dataset.corpus) == 1000
    assert "corpus.jsonl:7: document without title and text (1 of 1000)" in dataset.warnings[0]
    rows = "".join(f"q{i % 30}\td{i}\t0\n" for i in range(1000))
    (folder / "qrels/test.tsv").write_text(f"{HEADER}{rows}q29\tlost\t1\n")
    dataset = load_dataset(folder)
    assert "document 'lost' is not in the corpus (1 of 1001 judgements)" in dataset.warnings[1]
    assert dataset.qrels("test")["q29"]["lost"] == 1


def test_an_unknown_name_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_folder: WriteFolder
) -> None:
    monkeypatch.setenv("EFFIR_RAY_DATA", str(tmp_path))
    with pytest.raises(InputError, match="effir-ray data get scifact"):
        load_dataset("scifact")
    write_folder(tmp_path / "scifact")
    assert load_dataset("scifact").name == "scifact"


@pytest.mark.parametrize(
    ("asked", "name"), [("DBPedia", "dbpedia-entity"), ("CQADupStack/Tex", "cqadupstack/tex")]
)
def test_a_data_set_is_found_under_its_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_folder: WriteFolder, asked: str, name: str
) -> None:
    monkeypatch.setenv("EFFIR_RAY_DATA", str(tmp_path))
    write_folder(tmp_path / name)
    assert load_dataset(asked).name == name


def test_a_byte_order_mark_is_no_part_of_the_first_document(folder: Path) -> None:
    path = folder / "corpus.jsonl"
    expected = list(load_dataset(folder).corpus.iter_documents())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(load_dataset(folder).corpus.iter_documents()) == expected


def test_a_corpus_alone_will_do_where_no_queries_are_needed(folder: Path) -> None:
    whole = load_dataset(folder)
    (folder / "queries.jsonl").unlink()
    corpus = load_dataset(folder, queries=False)
    assert corpus.corpus.ids == whole.corpus.ids and not corpus.splits
    assert corpus.corpus.fingerprint == whole.corpus.fingerprint
    assert corpus.corpus.subset([1]).fingerprint != corpus.corpus.subset([2]).fingerprint
    with pytest.raises(InputError, match="has no split 'test'"):
        corpus.queries("test")


def test_a_missing_folder_is_not_said_to_be_downloadable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; give 'stdlib', a BEIR folder") as error:
        load_dataset(tmp_path / "absent")
    assert "data get" not in str(error.value)


def test_lines_up_to_the_limit_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(len(line) for line in (folder / "corpus.jsonl").read_bytes().splitlines(keepends=True))
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", longest)
    assert len(load_dataset(folder).corpus) == 40


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The corpora that were scanned since, in order."""
    seen: list[Path] = []
    scan = datasets.scan_corpus

    def counted(path: Path) -> beir_files.CorpusScan:
        seen.append(path)
        return scan(path)

    monkeypatch.setattr(datasets, "scan_corpus", counted)
    return seen


def age(folder: Path, seconds: int = 60) -> Path:
    """As if nothing in ``folder`` had changed for so long."""
    for file in folder.rglob("*"):
        then = file.stat().st_mtime - seconds
        os.utime(file, (then, then))
    return folder


def test_a_corpus_is_scanned_once_whoever_asks(folder: Path, scans: list[Path]) -> None:
    source = str(age(folder))
    dataset = load_dataset(source)
    assert load_dataset(folder, queries=False).corpus is dataset.corpus
    assert source_fingerprint(source) == dataset.fingerprint
    assert len(load_pairs(source)) == len(dataset.queries("train"))
    assert len(draw_texts(load_dataset(source), 3, seed=0)) == 3
    assert len(draw_pairs(source, 3, seed=0)) == 3
    assert evaluate("random:bert", source).fingerprint == dataset.fingerprint
    assert scans == [folder.resolve() / "corpus.jsonl"]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("corpus.jsonl", b"text 8", b"text 9"),
        ("queries.jsonl", b"query 8", b"query 9"),
        ("qrels/test.tsv", b"d20", b"d21"),
    ],
)
def test_a_changed_file_is_read_again(
    folder: Path, file: str, old: bytes, new: bytes, scans: list[Path]
) -> None:
    before = load_dataset(age(folder))
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content.replace(old, new))  # as long as before
    now = load_dataset(folder)
    assert now.fingerprint != before.fingerprint
    assert len(scans) == (2 if file == "corpus.jsonl" else 1)
    (folder / file).write_bytes(content)
    assert load_dataset(folder).fingerprint == before.fingerprint


def test_a_new_split_is_seen(folder: Path) -> None:
    assert load_dataset(age(folder)).splits == ("train", "dev", "test")
    (folder / "qrels/train.tsv").unlink()
    assert load_dataset(folder).splits == ("test",)
    (folder / "qrels/dev.tsv").write_text(HEADER + "q3\td3\t2\n")
    assert load_dataset(folder).splits == ("dev", "test")


def test_only_the_data_sets_used_last_are_kept(
    tmp_path: Path, write_folder: WriteFolder, scans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [age(write_folder(tmp_path / name)) for name in "abc"]
    monkeypatch.setattr(datasets, "_REMEMBERED_DOCUMENTS", 100)  # two of 40 fit
    for name in (0, 1, 0, 2, 0, 2):
        load_dataset(folders[name])
    assert [path.parent.name for path in scans] == ["a", "b", "c"]
    load_dataset(folders[1])
    assert len(scans) == 4
    monkeypatch.setattr(datasets, "_REMEMBERED_DOCUMENTS", 10)  # one that is larger stays alone
    load_dataset(folders[0])
    load_dataset(folders[0])
    assert len(scans) == 5
