import hashlib
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from effir_ray.data.datasets import load_dataset
from effir_ray.data.near_duplicates import near_duplicates
from effir_ray.data.stdlib_corpus import (
    assign_splits,
    build_stdlib,
    collect,
    examples_of,
    first_sentence,
    write_examples,
)
from effir_ray.errors import InputError
from effir_ray.leases import LEASES

SOURCE = b'''
"""Module text."""
class Box(dict):
    """Holds things that were put into it. More text."""
    size = 3
    def put(self, thing: int) -> None:
        """Put one more thing into this box.

        Details.
        """
        self.size += thing
    def _hide(self):
        """Hide every thing that is in here."""
        return 1

if True:
    async def fetch(url, *, tries=3):
        """Fetch the page behind one address, patiently."""; return url

def tiny(): pass
def vague():
    """Do it."""
    return 2
'''


def test_public_documented_definitions_become_examples() -> None:
    box, put, fetch = examples_of(SOURCE, "pack.box")
    assert [e.name for e in (box, put, fetch)] == ["pack.box.Box", "pack.box.Box.put", "pack.box.fetch"]
    assert box.query == "Holds things that were put into it."
    assert put.query == "Put one more thing into this box."
    assert put.signature == "def pack.box.Box.put(self, thing: int) -> None"
    assert fetch.signature == "async def pack.box.fetch(url, *, tries=3)"
    assert box.title == "pack box Box"
    for example in (box, put, fetch):  # nobody's answer contains a question
        assert not any(text in example.source for text in ("Put one", "Holds", "Hide", "Fetch", '"""'))
    assert "self.size += thing" in box.source
    assert "return url" in fetch.source


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("Return the sum of\n    all the numbers. And more.", "Return the sum of all the numbers."),
        ("Short one.", None),
        ("add(a, b) -> the sum of both of the numbers", None),
        ("See the documentation of the other function for this.", None),
        (">>> from module import add, subtract and others", None),
        ("", None),
    ],
)
def test_trivial_docstrings_are_dropped(docstring: str, query: str | None) -> None:
    assert first_sentence(docstring, "add") == query


def test_near_duplicates_are_those_of_an_exhaustive_comparison() -> None:
    words = [hashlib.sha1(str(i).encode()).hexdigest()[:6] for i in range(400)]
    texts = [
        " ".join(words[start : start + 60]) for start in range(0, 300, 30)
    ]  # overlap by half: not duplicates
    texts += [f"{texts[0]} one more", texts[3].upper(), "short", "short", "other"]
    assert [i for i, duplicate in enumerate(near_duplicates(texts)) if duplicate] == [10, 11, 13]


def test_splits_meet_their_shares_and_do_not_depend_on_order() -> None:
    counts = {f"module{i}": 1 + i * 7 % 40 for i in range(60)}
    splits = assign_splits(counts)
    assert splits == assign_splits(dict(reversed(counts.items())))
    total = sum(counts.values())
    for split, share in {"train": 0.6, "dev": 0.15, "test": 0.25}.items():
        assert sum(n for m, n in counts.items() if splits[m] == split) / total == pytest.approx(
            share, abs=0.02
        )


def test_the_folder_is_built_once_and_by_splits_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one part of the real library; the whole is built by the integration test."""
    library = tmp_path / "lib"
    real = Path(sysconfig.get_path("stdlib"))
    for name in ["email/message", "email/headerregistry", "json/decoder", "statistics", "calendar", "turtle"]:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / f"{name}.py").write_bytes((real / f"{name}.py").read_bytes())
    (library / "broken.py").write_text("def (")
    monkeypatch.setenv("EFFIR_RAY_DATA", str(tmp_path / "data"))
    folder = build_stdlib(library)
    assert [path for path in folder.parent.iterdir() if path.name.startswith(".")] == [folder.parent / LEASES]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert build_stdlib(library) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    dataset = load_dataset("stdlib")
    modules = [{q.split(":")[1].split(".")[0] for q in dataset.queries(split)} for split in dataset.splits]
    assert dataset.splits == ("train", "dev", "test")
    assert sum(map(len, modules)) == len(set.union(*modules)) == 5
    assert len(dataset.corpus) == sum(len(dataset.queries(split)) for split in dataset.splits) > 100


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only 0 documented public objects"):
        collect(tmp_path)


@pytest.mark.integration
def test_the_real_data_set_is_large_stable_and_neither_trivial_nor_hopeless(tmp_path: Path) -> None:
    import bm25s

    from effir_ray.evaluation.metrics import score_run

    library = Path(sysconfig.get_path("stdlib"))
    loaded = set(sys.modules)
    write_examples(collect(library), tmp_path / "stdlib")
    assert not {"turtle", "tkinter", "curses"} & (set(sys.modules) - loaded)  # read, never imported
    dataset = load_dataset(tmp_path / "stdlib")
    assert len(dataset.corpus) > 2500
    sources = [json.dumps(d.text) for d in dataset.corpus.iter_documents()]
    assert not any(near_duplicates(sources, threshold=0.95))
    ranker = bm25s.BM25()
    texts = [document.document_text for document in dataset.corpus.iter_documents()]
    ranker.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    queries = dataset.queries("test")
    tokens = bm25s.tokenize(list(queries.values()), stopwords="en", show_progress=False)
    found, scores = ranker.retrieve(tokens, k=100, show_progress=False)
    run = {
        query_id: {dataset.corpus.ids[i]: float(s) for i, s in zip(row, values, strict=True)}
        for query_id, row, values in zip(queries, found, scores, strict=True)
    }
    assert 0.25 < score_run(run, dataset.qrels("test")).mean["ndcg@10"] < 0.75
