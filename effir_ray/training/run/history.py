"""The rows of a run: written by Ray Train's controller on the driver's machine, shown and read there."""

from __future__ import annotations

import contextvars
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from ray.train import UserCallback

from effir_ray.config import Config, parse
from effir_ray.progress import Progress, progress
from effir_ray.readers import open_regular, parse_json
from effir_ray.training.run.trackers import Board, TensorBoard

HISTORY = "history.jsonl"
_POLL_SECONDS = 0.3


class Step(Config):
    """A row of a training: this and what was measured."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int = Field(ge=0, strict=True)


def checked_row(row: Any, source: str) -> dict[str, Any]:
    """``row`` itself; InputError unless it is one of a training."""
    parse(row, Step, source=source)
    found: dict[str, Any] = row
    return found


class HistoryWriter(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Appends rank 0's rows to a JSON-lines file. Runs in the controller, on the driver's machine."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with self._file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in metrics[0]["rows"])


def read_history(file: Path) -> list[dict[str, Any]]:
    """The last row of every step in order: after a restart steps since the checkpoint are done again.

    Raises InputError for a line that is no row of a training.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in _lines(file, 0)[0]:
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


@contextmanager
def follow(out: Path, description: str, boards: Sequence[Board] = ()) -> Iterator[None]:
    """Within this context rows that arrive in ``out`` go to the progress display, to TensorBoard files and to
    ``boards``.
    """
    stop = threading.Event()
    known = read_history(out / HISTORY)  # here, where an InputError is heard
    context = contextvars.copy_context()  # the display belongs to the caller's context
    work = (_show, out, description, boards, known, stop)
    thread = threading.Thread(target=context.run, args=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show(
    out: Path,
    description: str,
    boards: Sequence[Board],
    known: Sequence[dict[str, Any]],
    stop: threading.Event,
) -> None:
    file = out / HISTORY
    at = file.stat().st_size if file.exists() else 0
    purge = known[-1]["step"] + 1 if known else None
    tensorboard = TensorBoard(out / "tensorboard", purge_from=purge)
    with progress(description, unit="steps") as bar, tensorboard as board:
        while True:
            ending = stop.wait(_POLL_SECONDS)
            rows, at = _lines(file, at)
            for row in rows:
                _advance(bar, row)
                for each in (board, *boards):
                    each.on_row(row)
            if ending:
                return


def _advance(bar: Progress, row: dict[str, Any]) -> None:
    bar.total = row["steps"]
    if not bar.done:
        bar.go_on_from(row["step"] - 1)
    bar.advance(
        row["step"] - bar.done,
        loss=row["loss"],
        learning_rate=row["learning_rate"],
        tokens_per_s=row["tokens_per_s"],
        mfu=row["mfu"],
        engine=row["engine"],
        **{name: row[name] for name in ("dev_ndcg_at_10", "note") if name in row},
    )


def _lines(file: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Complete rows from byte ``start`` on, and where the next one begins."""
    if not file.exists():
        return [], start
    with open_regular(file) as lines:
        lines.seek(start)
        text = lines.read()
    whole = text[: text.rfind(b"\n") + 1]
    rows = [
        checked_row(parse_json(line, f"{file}:{number}"), f"{file}:{number}")
        for number, line in enumerate(whole.splitlines(), start=1)
    ]
    return rows, start + len(whole)
