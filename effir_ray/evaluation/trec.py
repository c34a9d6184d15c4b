"""TREC run files: ``query-id Q0 document-id rank score tag``, one hit a line.

White space separates the fields, so that of an id is written in percent-encoding (``%20`` for a space).
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

from effir_ray.errors import InputError
from effir_ray.evaluation.metrics import Run
from effir_ray.files import whole


def write_run(run: Run, path: Path, *, tag: str) -> None:
    """Write ``run``, best hit first (ties in the run's own order), scores exact to the last float32 bit."""
    tag = "_".join(tag.split()) or "effir-ray"
    with whole(path) as aside, aside.open("w", encoding="utf-8") as file:
        for query_id, hits in run.items():
            ranked = sorted(hits.items(), key=lambda hit: -hit[1])
            for rank, (document_id, score) in enumerate(ranked, 1):
                file.write(f"{_field(query_id)} Q0 {_field(document_id)} {rank} {score:.9g} {tag}\n")


def _field(identifier: str) -> str:
    return re.sub(r"\s", lambda space: quote(space[0]), identifier)


def read_run(path: Path) -> Run:
    """Read a run file. Raises InputError naming the line that is malformed or repeats a document."""
    run: Run = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        fields = line.split()
        try:
            query_id, _, document_id, _, score, _ = fields
            value = float(score)
        except ValueError:
            raise InputError(
                f"{path}:{number}: found {line!r}; expected query-id Q0 document-id rank score tag"
            ) from None
        hits = run.setdefault(query_id, {})
        if document_id in hits:
            raise InputError(f"{path}:{number}: document '{document_id}' twice for query '{query_id}'")
        hits[document_id] = value
    return run
