"""What lets a run outlive a dead worker, a dead driver or too large a micro-batch."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, model_validator

from effir_ray import storage
from effir_ray.caches import cache_folder
from effir_ray.config import Config, parse
from effir_ray.leases import Lease
from effir_ray.readers import read_json_object
from effir_ray.training.config import TrainConfig
from effir_ray.training.step.engine import Engine, largest, rank

REPORT_SECONDS = 1.0
"""Rows are sent in groups: a report waits until Ray Train's controller has taken the one before."""

CHECKPOINT_SECONDS = 300.0
"""Checkpoints that nobody asked for are this far apart: writing one can take as long as some steps."""

DEV_SCORE = "dev_ndcg_at_10"
SMALLEST_BUDGET = 256
"""Tokens: below this a machine without memory for one pass is out of memory for another reason."""

SETTINGS = "training.json"
"""In the output folder of every run."""

_PROGRESS, _BUDGET = "progress.json", "token_budget.json"
_STAGING = "staging-"


class SavedProgress(Config):
    """``progress.json`` of a training checkpoint: what was done, and the rows that came with it."""

    step: int = Field(ge=0, strict=True)
    rows: tuple[dict[str, Any], ...] = ()  # older versions wrote none

    @model_validator(mode="after")
    def _rows_of_a_training(self) -> SavedProgress:
        if any(type(row.get("step")) is not int for row in self.rows):
            raise ValueError("rows without the number of their step")
        return self


class StepReports:
    """Sends rows to the driver about once a second; with them a checkpoint where one is due.

    A checkpoint is due every ``checkpoint_every`` steps (by default a tenth of all) and after every dev
    score, and at the end of a run that stops on the way. It holds weights and optimizer state; the place in
    the data and all random draws follow from the step. It is put together in ``place`` (see ``staging``).
    """

    def __init__(
        self, engine: Engine, config: TrainConfig, run: str, place: Path, lease: Lease | None = None
    ) -> None:
        self._engine, self._every, self._stop = engine, config.checkpoint_every, config.stop_after
        self._lease = lease
        self._run, self._place, self._staging = run, place, own_staging(place)
        shutil.rmtree(self._staging, ignore_errors=True)  # what a killed worker left
        self._rows: list[dict[str, Any]] = []
        self._sent = self._saved = time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        """Every rank calls it after every step: reporting is a barrier, so rank 0's clock decides for all."""
        self._rows.append(row)
        stopped = row["step"] == self._stop
        last = row["step"] == row["steps"] or stopped
        due = self._since(self._sent) >= REPORT_SECONDS
        if DEV_SCORE in row or stopped or (self._periodic(row["step"], row["steps"]) and not last):
            self._staging.mkdir(mode=0o700, parents=True)
            try:
                self._engine.save(self._staging)
                if rank() == 0:
                    progress = {"step": row["step"], "rows": self._rows}
                    (self._staging / _PROGRESS).write_text(json.dumps(progress))
                self._report(row, str(self._staging))
            finally:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._saved = time.monotonic()
        elif due or last:
            self._report(row, None)

    def restore(self, begun: str | None) -> int:
        """Load the newest checkpoint of this run, or that of the shorter one that it goes on from, into the
        engine; returns how many steps it had done.

        Ray Train's controller keeps a checkpoint before the rows that came with it are written: a kill in
        between would lose them, so they are in the checkpoint too and sent again.
        """
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and begun is not None:  # its rows are known
            own = ray.train.Checkpoint.from_directory(begun)
            return _load(self._engine, own, self._run, self._place).step
        if checkpoint is None:
            return 0
        progress = _load(self._engine, checkpoint, self._run, self._place)
        self._rows = list(progress.rows)
        if self._rows:
            self._report(self._rows[-1], None)
        return progress.step

    def _periodic(self, step: int, steps: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        return step % max(1, steps // 10) == 0 and self._since(self._saved) >= CHECKPOINT_SECONDS

    def _since(self, moment: float) -> float:
        """Seconds by rank 0's clock, on every rank."""
        return largest(time.monotonic() - moment if rank() == 0 else 0.0, self._engine.device)

    def _report(self, row: dict[str, Any], folder: str | None) -> None:
        import ray.train

        metrics = {"rows": self._rows, DEV_SCORE: row.get(DEV_SCORE, -1.0), "step": row["step"]}
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        if self._lease is not None and rank() == 0:  # what the driver's successor has is not written over
            self._lease.check()
        ray.train.report(metrics, checkpoint=checkpoint)
        self._rows, self._sent = [], time.monotonic()


def staging(run: str, out: str) -> Path:
    """Where workers keep what is on its way to the storage of ``run``: beside it, since there is room; the
    system's temporary folder may be small, or memory. For an object store that is the output folder ``out``,
    or this user's cache on a machine that does not see it.
    """
    if not storage.is_uri(run):
        return Path(run)
    if (Path(out) / SETTINGS).is_file() and os.access(out, os.W_OK):
        return Path(out)
    return cache_folder() / "staging" / run.partition("?")[0].rpartition("/")[2]


def own_staging(place: Path) -> Path:
    """This rank's folder there, always the same: a killed worker leaves at most one, which its successor
    removes.
    """
    return place / f"{_STAGING}{rank()}"


def leave_staging(place: Path) -> None:
    """Remove ``place`` where it was made for nothing else."""
    import ray.train

    if ray.train.get_context().get_local_rank() == 0:
        with suppress(OSError):  # the run's storage or its output folder
            place.rmdir()


def clear_staging(out: Path) -> None:
    """Remove what killed workers left in the output folder."""
    for folder in out.glob(f"{_STAGING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def restore_best(engine: Engine, run: str, place: Path) -> int | None:
    """Load the checkpoint with the best dev score; returns its step, None when no checkpoint has one."""
    import ray.train

    reported = [
        (entry.metrics[DEV_SCORE], entry.metrics["step"], entry.checkpoint)
        for entry in ray.train.get_all_reported_checkpoints()
        if entry.metrics[DEV_SCORE] >= 0
    ]
    if not reported:
        return None
    _, _, best = max(reported, key=lambda entry: entry[:2])
    return _load(engine, best, run, place).step


def _load(engine: Engine, checkpoint: Any, run: str, place: Path) -> SavedProgress:
    """What ``StepReports`` wrote of its progress; the engine has the checkpoint's weights."""
    with _on_disk(checkpoint, run, place) as folder:
        progress = read_progress(folder / _PROGRESS)
        engine.load(folder)
        return progress


@contextmanager
def _on_disk(checkpoint: Any, run: str, place: Path) -> Iterator[Path]:
    """The folder of ``checkpoint``. One in an object store is copied once for all ranks of a machine, to
    ``place``: Ray's own ``as_directory`` leaves it in the system's temporary folder when it is killed.
    """
    import ray.train
    from pyarrow import fs

    if isinstance(checkpoint.filesystem, fs.LocalFileSystem):
        yield Path(checkpoint.path)
        return
    context = ray.train.get_context()
    folder = place / f"{_STAGING}node-{context.get_node_rank()}"
    first = context.get_local_rank() == 0
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            storage.bring(storage.join(run, Path(checkpoint.path).name), folder)
        dist.barrier()
        yield folder
        dist.barrier()  # not after an error, which others may not have: they would wait for ever
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def read_progress(file: Path) -> SavedProgress:
    """Raises InputError for a file that is none of ours."""
    return parse(read_json_object(file), SavedProgress, source=str(file))


class HalvedBudget(Config):
    """``token_budget.json`` of a run."""

    token_budget: int = Field(ge=0, strict=True)


class OutOfMemory(RuntimeError):
    """A worker ran out of memory; the run starts again from its newest checkpoint with a smaller budget."""


@contextmanager
def halving(run: str, budget: int) -> Iterator[None]:
    """An out-of-memory error inside halves the token budget that the run's next start reads, and ends this
    one.

    Other ranks may be waiting inside a collective at that moment, so no rank can simply try again.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        halve(run, budget)
        raise OutOfMemory(f"out of memory with a token budget of {budget}: {error}") from error


def halve(run: str, budget: int) -> None:
    storage.write_json(storage.join(run, _BUDGET), {"token_budget": budget // 2})


def halved_budget(run: str) -> int | None:
    """The token budget that an earlier start of this run was brought down to; None when it never was."""
    found = storage.read_json(storage.join(run, _BUDGET))
    return (
        None if found is None else parse(found, HalvedBudget, source=storage.join(run, _BUDGET)).token_budget
    )


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an exception for it on GPUs, and only a message on CPUs."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
