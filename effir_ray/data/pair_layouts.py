"""The JSON layouts of training examples in the field, read into one: query, positives, negatives, scores.

    ours           {"query": s, "positive(s)": s or [s], "negative(s)": s or [s], "teacher_scores": [x]}
    Tevatron       {"query_id": s, "query": s, "positive_passages": [{"docid": s, "title": s, "text": s}],
                    "negative_passages": [...]}
    sentence-      {"anchor": s, "positive": s, "negative" or "negative_1" ... "negative_n": s, "scores": [x]}
    transformers   {"anchor": s, "documents": [s], "labels": [1, 0, ...], "scores": [x]}  (labeled list)
    a text alone   {"_id": s, "title": s, "text": s}: BEIR's corpus.jsonl; only ``text`` must be there

sentence-transformers reads columns by position; the names here are the ones its documentation and its
``mine_hard_negatives`` use. A document is a string or a mapping with ``text`` and, optionally, ``title`` and
``docid`` (or ``_id``); title and text are joined by a space. Scores list the positives first, then the
negatives. A text alone comes with a query-like text of its own: its title, or its first sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effir_ray.errors import InputError
from effir_ray.readers import parse_json, quoted

_QUERY = ("query", "anchor", "question", "query_text")
_POSITIVE = ("positive", "positives", "positive_passages")
_NEGATIVE = ("negative", "negatives", "negative_passages")
_LISTED = ("documents", "docs", "passages")
_SCORES = ("teacher_scores", "scores")
_QUERY_LIKE = "query_like"  # of a text alone, between our own processes: its title is joined already
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_NUMBERED_NEGATIVE = re.compile(r"negative_(\d+)")


@dataclass(frozen=True, slots=True)
class Pair:
    """A query with its relevant documents and its hard negatives; texts are ready to be tokenised.

    ``positive_ids`` and ``negative_ids`` run parallel to the texts (a hash of the text where the source
    names none): in-batch negatives that are positives of a query are masked by them, and by their texts.
    ``teacher_scores`` holds one score a document, positives first. ``labelled``: False for a text alone, the
    only "positive" of a query-like part of itself: nobody said that it answers it.
    """

    query_id: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    teacher_scores: tuple[float, ...] | None = None
    positive_ids: tuple[str, ...] = ()
    negative_ids: tuple[str, ...] = ()
    labelled: bool = True

    def with_negatives(self, most: int | None) -> Pair:
        """The same pair with the first ``most`` negatives (None keeps all) and their scores."""
        if most is None or len(self.negatives) <= most:
            return self
        scores = self.teacher_scores
        return Pair(
            query_id=self.query_id,
            query=self.query,
            positives=self.positives,
            negatives=self.negatives[:most],
            teacher_scores=None if scores is None else scores[: len(self.positives) + most],
            positive_ids=self.positive_ids,
            negative_ids=self.negative_ids[:most],
        )


def text_id(text: str) -> str:
    """The id of a text that comes without one: equal texts are the same document."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:16]


def join_title(title: str | None, text: str) -> str:
    """BEIR's and the paper's document text: title and text with a space between."""
    return f"{title} {text}".strip() if title else text


def parse_pair(record: Any) -> Pair:
    """A ``Pair`` from one record of any layout above; ValueError says what is wrong with it."""
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object with a query and positives, found {type(record).__name__}")
    query = _first(record, _QUERY)
    if query is None and "text" in record:
        return _text_alone(record)
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"expected a non-empty text under one of {_names(_QUERY)}; keys: {_keys(record)}")
    positives, negatives = _documents(record)
    if not positives:
        raise ValueError(f"expected at least one document under one of {_names(_POSITIVE)}")
    identifier = record.get("query_id", record.get("_id"))
    return Pair(
        query_id=text_id(query) if identifier is None else str(identifier),
        query=query,
        positives=tuple(text for _, text in positives),
        negatives=tuple(text for _, text in negatives),
        teacher_scores=_scores(record, len(positives), len(negatives)),
        positive_ids=tuple(name for name, _ in positives),
        negative_ids=tuple(name for name, _ in negatives),
    )


def query_like(title: str | None, text: str) -> str:
    """What stands in for a query about a text: its title, or its first sentence (a question is itself)."""
    return (title or "").strip() or _SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def _text_alone(record: Mapping[str, Any]) -> Pair:
    """An empty text is one too, as in several corpora: a search engine has to encode it."""
    text, title, like = record["text"], record.get("title"), record.get(_QUERY_LIKE)
    if not isinstance(text, str) or not isinstance(title, str | None) or not isinstance(like, str | None):
        raise ValueError("expected a 'text' (and 'title') that is a string")
    document = join_title(title, text)
    name = str(record["_id"]) if record.get("_id") is not None else text_id(document)
    like = query_like(title, text) if like is None else like
    return Pair(name, like, (document,), positive_ids=(name,), labelled=False)


_Named = tuple[str, str]  # id and text of a document


def _documents(record: Mapping[str, Any]) -> tuple[list[_Named], list[_Named]]:
    listed = _first(record, _LISTED)
    if listed is not None:
        return _labelled(listed, record.get("labels"))
    if "positive_document_ids" in record:
        raise ValueError(
            "this Tevatron layout names documents by id only; write the texts as 'positive_passages' "
            "and 'negative_passages'"
        )
    negatives = _listed(_first(record, _NEGATIVE), "negatives")
    numbered = sorted(
        (int(match[1]), key) for key in record if (match := _NUMBERED_NEGATIVE.fullmatch(str(key)))
    )
    negatives += [_document(record[key], key) for _, key in numbered if record[key] is not None]
    return _listed(_first(record, _POSITIVE), "positives"), negatives


def _labelled(documents: Any, labels: Any) -> tuple[list[_Named], list[_Named]]:
    found = _listed(documents, "documents")
    if not isinstance(labels, Sequence) or len(labels) != len(found):
        raise ValueError(f"expected {len(found)} 'labels' (1 relevant, 0 not) beside the documents")
    if not all(isinstance(label, int | float) for label in labels):
        raise ValueError("expected 'labels' that are numbers (1 relevant, 0 not)")
    split = sum(1 for label in labels if label > 0)
    if any(label > 0 for label in labels[split:]):
        raise ValueError("expected the relevant documents (label 1) before the others")
    return found[:split], found[split:]


def _scores(record: Mapping[str, Any], positives: int, negatives: int) -> tuple[float, ...] | None:
    scores = _first(record, _SCORES)
    if scores is None:
        return None
    expected = f"{positives + negatives} scores (positives first, then negatives)"
    if not isinstance(scores, Sequence) or len(scores) != positives + negatives:
        found = f"{len(scores)}" if isinstance(scores, Sequence) else type(scores).__name__
        raise ValueError(f"expected {expected}, found {found}")
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise ValueError(f"expected {expected} that are finite numbers")
    return tuple(float(score) for score in scores)


def _listed(value: Any, field: str) -> list[_Named]:
    if value is None:
        return []
    items = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(items, Sequence):
        raise ValueError(f"{field}: expected a text or a list of documents, found {type(value).__name__}")
    return [_document(item, field) for item in items]


def _document(value: Any, field: str) -> _Named:
    if isinstance(value, Mapping):
        text, title = value.get("text"), value.get("title")
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise ValueError(f"{field}: expected a document whose 'text' (and 'title') is a string")
        text = join_title(title, text)
        name = value.get("docid", value.get("_id"))
    elif isinstance(value, str):
        text, name = value, None
    else:
        raise ValueError(f"{field}: expected a text or a document with 'text', found {type(value).__name__}")
    if not text.strip():
        raise ValueError(f"{field}: a document without text")
    return text_id(text) if name is None else str(name), text


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(quoted(key) for key in list(record)[:10]) or "none"


def parse_line(line: str | bytes, where: str) -> Pair:
    """One line of JSON as a pair; ``where`` (``file:line``) opens the message of the InputError."""
    try:
        return parse_pair(parse_json(line if isinstance(line, str) else line.decode(), where))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text: byte 0x{error.object[error.start]:02x}") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def to_json(pair: Pair) -> str:
    """The line of ``write_pairs`` for one pair; titles are already joined to their texts."""
    if not pair.labelled:
        alone = {"_id": pair.query_id, "text": pair.positives[0], _QUERY_LIKE: pair.query}
        return json.dumps(alone, ensure_ascii=False)
    record: dict[str, object] = {
        "query_id": pair.query_id,
        "query": pair.query,
        "positive_passages": _passages(pair.positive_ids, pair.positives),
        "negative_passages": _passages(pair.negative_ids, pair.negatives),
    }
    if pair.teacher_scores is not None:
        record["teacher_scores"] = pair.teacher_scores
    return json.dumps(record, ensure_ascii=False)


def normalised(text: str) -> str:
    """What copies of a text have in common, of a question or of a document: all but case and spacing."""
    return " ".join(text.split()).casefold()


def _passages(ids: Sequence[str], texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"docid": name, "title": "", "text": text} for name, text in zip(ids, texts, strict=True)]
