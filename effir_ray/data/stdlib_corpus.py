"""The embedded data set ``stdlib``: docstring sentence -> code, from the running Python's standard library.

A document is a public function, method or class (qualified name, signature, source without docstrings); its
query is the first sentence of its docstring, after CodeSearchNet (arXiv 1909.09436, section 2). Modules are
parsed with ``ast``, never imported. The splits share no top-level module, and near-duplicates (arXiv
2107.06499) are removed, so that nothing leaks from train to test.

With CPython 3.11.7: 3,625 documents; 2,175 train, 544 dev and 906 test queries. BM25 (bm25s, its defaults)
reaches nDCG@10 0.406 on test with English stop words left out and 0.363 with them: neither trivial nor
hopeless.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import shutil
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from effir_ray.caches import data_folder
from effir_ray.data.near_duplicates import near_duplicates
from effir_ray.errors import InputError
from effir_ray.leases import LEASES, aloud, lease

_VERSION = 1  # of this construction; raise it when the same Python would give other documents
_SHARES = {"train": 0.6, "dev": 0.15, "test": 0.25}
_MIN_QUERY_WORDS = 5
_MAX_QUERY_WORDS = 60
_MAX_SOURCE_CHARS = 4000
_NOT_PUBLIC = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "antigravity",
    "this",
}
_SAYS_NOTHING = (
    ">>>",
    "see ",
    "same as ",
    "like ",
    "implement",
    "deprecated",
    "internal",
    "undocumented",
    "todo",
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Documented:
    """One documented object: its document and the query that should find it."""

    name: str  # qualified, e.g. "json.decoder.JSONDecoder.decode": the document id
    signature: str
    source: str
    query: str

    @property
    def title(self) -> str:
        """The qualified name as words: ``json decoder JSON Decoder raw decode``."""
        return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", self.name))

    @property
    def module(self) -> str:
        """The top-level module, by which splits are made."""
        return self.name.partition(".")[0]


def build_stdlib(library: Path | None = None) -> Path:
    """The BEIR folder of the running Python's standard library: built once a Python version, then only found.

    Raises InputError where the sources are not installed.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    folder = data_folder() / f"stdlib-{sys.implementation.name}-{version}-v{_VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lease(folder.parent / LEASES, folder.name, waiting=aloud("data set stdlib")) as mine:
        if not folder.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=".stdlib-", dir=folder.parent))
            try:
                write_examples(collect(library or Path(sysconfig.get_path("stdlib"))), aside)
                mine.check()
                aside.replace(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def collect(library: Path) -> list[Documented]:
    """All examples of the library in ``library``, without near-duplicates, ordered by name."""
    found = {example.name: example for example in _all_examples(library)}
    examples = [found[name] for name in sorted(found)]
    if len(examples) < 100:
        raise InputError(
            f"{library}: only {len(examples)} documented public objects found; the data set 'stdlib' needs "
            "the standard library's .py files: install them (e.g. libpython3-stdlib) or give another data set"
        )
    same_code = near_duplicates([example.source for example in examples])
    examples = [example for example, drop in zip(examples, same_code, strict=True) if not drop]
    same_query = near_duplicates([example.query for example in examples])
    return [example for example, drop in zip(examples, same_query, strict=True) if not drop]


def write_examples(examples: Iterable[Documented], folder: Path) -> None:
    """Write a BEIR folder: corpus.jsonl, queries.jsonl and qrels of the three splits."""
    examples = list(examples)
    split_of = assign_splits(_counts(examples))
    (folder / "qrels").mkdir(parents=True)
    folder.chmod(0o755)  # made by mkdtemp, readable by its owner alone
    with (
        (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus,
        (folder / "queries.jsonl").open("w", encoding="utf-8") as queries,
    ):
        for example in examples:
            text = f"{example.signature}\n{example.source}"
            print(json.dumps({"_id": example.name, "title": example.title, "text": text}), file=corpus)
            print(json.dumps({"_id": f"q:{example.name}", "text": example.query}), file=queries)
    for split in _SHARES:
        rows = [f"q:{e.name}\t{e.name}\t1\n" for e in examples if split_of[e.module] == split]
        (folder / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8"
        )


def assign_splits(counts: Mapping[str, int]) -> dict[str, str]:
    """Top-level module -> split: the largest modules first, each goes where most is missing.

    ``counts`` holds the examples a module has; equal counts are ordered by SHA-1 of the name. Deterministic,
    and the shares are met although modules differ much in size.
    """
    total = sum(counts.values())
    missing = {split: share * total for split, share in _SHARES.items()}
    splits = {}
    for module in sorted(counts, key=lambda name: (-counts[name], hashlib.sha1(name.encode()).hexdigest())):
        splits[module] = max(missing, key=missing.__getitem__)
        missing[splits[module]] -= counts[module]
    return splits


def examples_of(source: bytes, module: str) -> Iterator[Documented]:
    """The public, properly documented functions, methods and classes of one module's source."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return  # some distributions ship deliberately broken samples
    lines = source.splitlines(keepends=True)
    for qualified, node in _public_definitions(tree, module):
        query = first_sentence(ast.get_docstring(node) or "", node.name)
        if query is None:
            continue
        body = _without_docstrings(node, lines)
        if len(body.splitlines()) > 1:  # a bare `def f(): pass` shows nothing to be found by
            yield Documented(qualified, _signature(node, qualified), body[:_MAX_SOURCE_CHARS], query)


def first_sentence(docstring: str, name: str) -> str | None:
    """The query in a docstring; None when it says too little: few words, a signature, a cross-reference."""
    paragraph = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(])", paragraph)[0].strip()
    words = re.findall(r"[A-Za-z]{2,}", sentence)
    if not _MIN_QUERY_WORDS <= len(words) <= _MAX_QUERY_WORDS:
        return None
    opening = sentence.lower()
    return None if opening.startswith((f"{name.lower()}(", *_SAYS_NOTHING)) else sentence


def _all_examples(library: Path) -> Iterator[Documented]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        public = parts and parts[0] in sys.stdlib_module_names
        if public and not any(part.startswith(("_", "test_")) or part in _NOT_PUBLIC for part in parts):
            yield from examples_of(path.read_bytes(), ".".join(parts))


def _public_definitions(scope: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Definitions in a module or class body, also under ``if`` and ``try``; none local to a function."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Definition):
            if not node.name.startswith("_"):
                qualified = f"{prefix}.{node.name}"
                yield qualified, node
                if isinstance(node, ast.ClassDef):
                    yield from _public_definitions(node, qualified)
        elif isinstance(node, ast.If | ast.Try):
            yield from _public_definitions(node, prefix)


def _signature(node: Definition, qualified: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {qualified}({', '.join(ast.unparse(base) for base in node.bases)})"
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{prefix} {qualified}({ast.unparse(node.args)}){returns}"


def _without_docstrings(node: Definition, lines: list[bytes]) -> str:
    """The source of ``node`` with its docstring, and those of everything inside it, cut out.

    A class would otherwise contain the queries of its own methods.
    """
    assert node.end_lineno is not None
    kept = lines[node.lineno - 1 : node.end_lineno]
    for inner in ast.walk(node):
        if isinstance(inner, Definition) and ast.get_docstring(inner, clean=False) is not None:
            text = inner.body[0]
            assert text.end_lineno is not None and text.end_col_offset is not None
            first, last = text.lineno - node.lineno, text.end_lineno - node.lineno
            before, after = kept[first][: text.col_offset], kept[last][text.end_col_offset :]
            kept[first : last + 1] = [before + after] + [b""] * (last - first)  # line numbers stay valid
    text_lines = b"".join(kept).decode("utf-8", errors="replace").splitlines()
    return textwrap.dedent("\n".join(line.rstrip() for line in text_lines if line.strip()))


def _counts(examples: Iterable[Documented]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.module] = counts.get(example.module, 0) + 1
    return counts
