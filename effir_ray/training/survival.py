"""Rows and checkpoints on their way to the driver, and back into a run that starts again."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from effir_ray.training.config import TrainConfig
from effir_ray.training.distributed import largest, rank
from effir_ray.training.engine import Engine

REPORT_SECONDS = 1.0
"""Rows are sent in groups: a report waits until Ray Train's controller has taken the one before."""


class Reporter:
    """Sends rows to the driver about once a second, and a checkpoint every ``checkpoint_every`` steps."""

    def __init__(self, engine: Engine, config: TrainConfig) -> None:
        self._engine, self._every = engine, config.checkpoint_every
        self._rows: list[dict[str, Any]] = []
        self._sent = time.monotonic()

    def __call__(self, row: dict[str, Any], *, last: bool) -> None:
        """Every rank calls it after every step: reporting is a barrier, so rank 0's clock decides for all."""
        self._rows.append(row)
        checkpoint = self._every is not None and row["step"] % self._every == 0 and not last
        elapsed = time.monotonic() - self._sent if rank() == 0 else 0.0
        due = largest(elapsed, self._engine.device) >= REPORT_SECONDS
        if checkpoint:
            self._report_checkpoint(row)
        elif due or last:
            self._report(None)

    def _report_checkpoint(self, row: dict[str, Any]) -> None:
        from ray.train import Checkpoint

        with tempfile.TemporaryDirectory() as scratch:
            self._engine.save(Path(scratch))
            if rank() == 0:
                (Path(scratch) / "progress.json").write_text(json.dumps({"step": row["step"]}))
            self._report(Checkpoint.from_directory(scratch), row)

    def _report(self, checkpoint: Any, row: dict[str, Any] | None = None) -> None:
        import ray.train

        scores = {key: value for key, value in (row or {}).items() if key.startswith("dev_")}
        ray.train.report({"rows": self._rows, **scores}, checkpoint=checkpoint)
        self._rows, self._sent = [], time.monotonic()


def restore(engine: Engine) -> int:
    """Load the newest checkpoint of this run into ``engine``; returns how many steps it had done."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        engine.load(Path(folder))
        step = json.loads((Path(folder) / "progress.json").read_text())["step"]
    return int(step)
