"""Ray Tune's view of a study: a ``Searcher`` whose suggestions come from ``Proposals``.

Tune's own OptunaSearch loses trials that fail or are interrupted, and cannot warm-start several objectives;
here Tune only asks what to run and says what ended. Rows, not Tune's checkpoints, are what a study resumes
from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from effir_ray.errors import InputError, TrialFailure
from effir_ray.results import store
from effir_ray.results.schema import TrialRow
from effir_ray.search.folder import attempts, finished_rows
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.trial import failed_row

ROW = "row"  # under this key a trial process reports its row (JSON)
ABORT = "abort"  # or, under this one, why no trial of this study can run


class ScheduleSearcher(Searcher):  # type: ignore[misc]  # ray has no types
    """Hands out requests and takes rows; ``changed`` hears about every start (row None) and end.

    ``fatal`` is set, and nothing more handed out, when going on makes no sense.
    """

    def __init__(
        self, proposals: Proposals, out: Path, changed: Callable[[TrialRequest, TrialRow | None], None]
    ) -> None:
        super().__init__()
        self.proposals, self.out, self.changed = proposals, out, changed
        self.running: dict[str, TrialRequest] = {}  # by Tune's trial id
        self.fatal: Exception | None = None
        self.attempts = attempts(out)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        request = None if self.fatal else self.proposals.next()
        if request is None:
            return str(Searcher.FINISHED) if self.fatal or self.proposals.exhausted else None
        self.running[trial_id] = request
        self.attempts[request.key] += 1
        self.changed(request, None)
        return {
            "trial": request.config.model_dump_json(),
            "split": request.split,
            "attempt": self.attempts[request.key],
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        request = self.running.pop(trial_id)
        if result is not None and ABORT in result:
            self.fatal = InputError(result[ABORT])
            return
        try:
            row = self._row(request, result)
        except InputError as problem:  # no disk space for the row
            self.fatal = problem
            return
        self.proposals.finished(row)
        self.changed(request, row)
        if row.status == "failed" and request.config == request.config.full():
            self.fatal = TrialFailure(f"the full model cannot be measured on {row.split}: {row.reason}")

    def _row(self, request: TrialRequest, result: dict[str, Any] | None) -> TrialRow:
        """Trial processes write their own rows; one that died without gets a failed row here."""
        if result is not None and ROW in result:
            return TrialRow.model_validate_json(result[ROW])
        written = [row for row in finished_rows(self.out) if (row.trial_id, row.split) == request.key]
        if written:  # the process died between writing its row and reporting it
            return written[0]
        reason = "the trial's process ended without a result (killed, or out of memory)"
        study, attempt = self.proposals.space.name, self.attempts[request.key]
        row = failed_row(request.config, request.split, study, reason, attempt=attempt)
        store.append(self.out, [row])
        return row

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a checkpoint of its own, which no study is ever resumed from."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: rows and Optuna's storage hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed study starts a new searcher on the rows."""
