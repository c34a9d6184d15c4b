"""Ray Tune's view of a study: a ``Searcher`` whose suggestions come from ``Proposals``.

Tune's own OptunaSearch loses trials that fail or are interrupted, and cannot warm-start several objectives;
here Tune only asks what to run and says what ended. Rows, not Tune's checkpoints, are what a study resumes
from.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper
from ray.tune.search import Searcher

from effir_ray.cluster.lost import pause_seconds
from effir_ray.errors import InputError, TrialFailure
from effir_ray.leases import Lease
from effir_ray.mirrors import Mirror
from effir_ray.results import store
from effir_ray.results.schema import TrialRow
from effir_ray.search.folder import attempts, finished_rows, pull_rows
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.trial import failed_row
from effir_ray.training.run.reservations import release_abandoned

ROW = "row"  # under this key a trial process reports its row (JSON)
FILE = "file"  # and under this one the name of the file with it
ABORT = "abort"  # or, under this one, why no trial of this study can run
LOST = "lost"  # or, under this one, that a process it needed is gone
UNFIT = "unfit"  # and under this one the id of the node that was unfit for it, or ""

MAX_LOSSES = 3
"""A trial is tried so often again after it lost a process; then it counts as failed."""

_LOOK_SECONDS = 10.0
_SIGHT_SECONDS = 60.0  # until a network file system shows a file that another machine has written

_KILLED = "the trial's process ended without a result (killed, or out of memory)"


class ScheduleSearcher(Searcher):  # type: ignore[misc]  # ray has no types
    """Hands out requests and takes rows; ``changed`` hears about every start (row None) and end.

    A trial that lost its process, or one it needed, is handed out again after a pause: that says nothing
    about its schedule. ``fatal`` is set when going on makes no sense: nothing more is handed out then, and
    what Tune still says is not heard.
    """

    def __init__(
        self, proposals: Proposals, study: Mirror, changed: Callable[[TrialRequest, TrialRow | None], None]
    ) -> None:
        super().__init__()
        self.proposals, self.study, self.changed = proposals, study, changed
        self.out = study.folder
        self.running: dict[str, TrialRequest] = {}  # by Tune's trial id
        self.fatal: Exception | None = None
        self.attempts = attempts(self.out, proposals.space)
        self.unfit: set[str] = set()  # ids of nodes that no work goes to any more
        self.losses: Counter[tuple[str, str]] = Counter()
        self.waiting: list[tuple[float, TrialRequest]] = []  # (not before this moment, what is tried again)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        request = None if self.fatal else self._due() or self.proposals.next()
        if request is None:
            return str(Searcher.FINISHED) if self.fatal or self.proposals.exhausted else None
        self.running[trial_id] = request
        self.attempts[request.key] += 1
        self.changed(request, None)
        return {
            "trial": request.config.model_dump_json(),
            "split": request.split,
            "attempt": self.attempts[request.key],
            "avoid": sorted(self.unfit),
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        request = self.running.pop(trial_id)
        if self.fatal is not None:  # the row, if there is one, is on disk
            return
        if result is not None and ABORT in result:
            self.fatal = InputError(result[ABORT])
            return
        try:
            row = self._row(request, result) or self._lost(request, result)
        except InputError as problem:  # no disk space for the row, or another folder's
            self.fatal = problem
            return
        if row is None:
            return
        self.proposals.finished(row)
        self.changed(request, row)
        if row.status == "failed" and request.config == request.config.full():
            self.fatal = TrialFailure(f"the full model cannot be measured on {row.split}: {row.reason}")

    def _due(self) -> TrialRequest | None:
        """What is to be tried again and has waited for long enough."""
        for entry in self.waiting:
            if entry[0] <= time.monotonic():
                self.waiting.remove(entry)
                return entry[1]
        return None

    def _row(self, request: TrialRequest, result: dict[str, Any] | None) -> TrialRow | None:
        """The row that the trial's process wrote; None when there is none."""
        if result is not None and ROW in result:
            self._check_own(str(result[FILE]))
            return TrialRow.model_validate_json(result[ROW])
        # The process may have died between writing its row and reporting it.
        pull_rows(self.study)
        written = finished_rows(self.out, self.proposals.space)
        return next((row for row in written if (row.trial_id, row.split) == request.key), None)

    def _check_own(self, name: str) -> None:
        """Raise InputError for a row in a folder that is not this one, though its path is the same."""
        place = self.out / store.ROWS_FOLDER
        self.study.pull_file(f"{store.ROWS_FOLDER}/{name}")
        deadline = time.monotonic() + _SIGHT_SECONDS
        while not (place / name).exists():
            if time.monotonic() > deadline:
                raise InputError(
                    f"{place}: a trial's row was written to a folder of this name on another node; every "
                    "node must see the same: mount shared storage there, or choose another --out"
                )
            time.sleep(0.1)

    def _lost(self, request: TrialRequest, result: dict[str, Any] | None) -> TrialRow | None:
        """None while the trial is tried again; then a failed row."""
        if result is not None and result.get(UNFIT):
            self.unfit.add(str(result[UNFIT]))
        self.losses[request.key] += 1
        if self.losses[request.key] <= MAX_LOSSES:
            self.waiting.append((time.monotonic() + pause_seconds(self.losses[request.key]), request))
            return None
        reason = f"{(result or {}).get(LOST, _KILLED)}, {MAX_LOSSES + 1} times"
        study, attempt = self.proposals.space.name, self.attempts[request.key]
        row = failed_row(request.config, request.split, study, reason, attempt=attempt)
        self.study.push(store.append(self.out, [row]))
        return row

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into a checkpoint of its own, which no study is ever resumed from."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: rows and Optuna's storage hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed study starts a new searcher on the rows."""


class StillHeld(Stopper):  # type: ignore[misc]  # ray has no types
    """Raises LostProcess in Tune's loop when another search has taken over what this one ``held``. Now and
    then it gives back what trainings of killed trials, of this study or of one before, have reserved.

    Asked in every round, as a callback would be; but for callbacks Ray imports every tracker there is, and
    wandb's folders in the system's temporary one outlive a killed process.
    """

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def __init__(self, held: Lease) -> None:
        self._held, self._looked = held, -math.inf

    def stop_all(self) -> bool:
        if time.monotonic() > self._looked + _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._held.check()
            release_abandoned()
        return False
