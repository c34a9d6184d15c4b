"""The display of a running study: what runs, how far it is, how long is left, and the rows so far.

On a terminal it is redrawn in place; elsewhere (logs, CI) it is plain lines, one a change and one now and
then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from effir_ray.cluster.devices import lacks_nodes
from effir_ray.mirrors import Mirror
from effir_ray.progress import duration, progress_stream
from effir_ray.results.schema import TrialRow
from effir_ray.search.activity import Activity, current
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.time_estimate import TimeEstimate
from effir_ray.search.trial_stages import titles

if TYPE_CHECKING:
    from rich.console import RenderableType

_LATEST_ROWS = 12
_LIVE_INTERVAL = 0.5  # seconds
_LINE_INTERVAL = 20.0
_IDLE = "starting a trial process"
_NOWHERE = "waiting for a node of the cluster"


class StudyDisplay:
    """``with display:`` shows the study on the stream chosen by ``show_progress``; nothing without one."""

    def __init__(self, proposals: Proposals, estimate: TimeEstimate, study: Mirror) -> None:
        self.proposals, self.estimate, self.study = proposals, estimate, study
        self.stream = progress_stream()
        self.started = time.monotonic()
        self.rows: deque[TrialRow] = deque(maxlen=_LATEST_ROWS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._lock = threading.Lock()
        self._left, self._asked, self._ask_at = (
            0.0,
            0.0,
            0.0,
        )  # seconds left; when asked, and asked again

    def __enter__(self) -> StudyDisplay:
        if self.stream is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # Tune's thread, where it stays behind, says nothing more
            self._stop.set()
        if self.stream is not None:
            self._thread.join()

    def changed(self, request: TrialRequest, row: TrialRow | None) -> None:
        """A trial started (no row) or ended."""
        if row is not None:
            self.rows.append(row)
            if self.stream is not None and not self.stream.isatty():
                self._print(_row_line(row, self._title(row)))

    def _work(self) -> None:
        assert self.stream is not None
        if self.stream.isatty():
            self._live()
        else:
            self._lines()

    def _live(self) -> None:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(file=self.stream), auto_refresh=False, transient=False) as live:
            while not self._stop.wait(_LIVE_INTERVAL):
                live.update(self._render(), refresh=True)
            live.update(self._render(), refresh=True)

    def _lines(self) -> None:
        """A line when a stage begins, and every ``_LINE_INTERVAL`` seconds what is being done."""
        shown: set[tuple[str, str, float]] = set()
        last = -_LINE_INTERVAL
        while not self._stop.wait(_LIVE_INTERVAL):
            running = current(self.study)
            now = {(activity.trial, activity.stage, activity.since) for activity in running}
            if now - shown or time.monotonic() - last >= _LINE_INTERVAL:
                for line in [_activity_line(activity) for activity in running] or [_idle()]:
                    self._print(f"{self._headline()} | {line}")
                shown, last = now, time.monotonic()

    def _print(self, line: str) -> None:
        with self._lock:
            if not self._stop.is_set():
                print(line, file=self.stream, flush=True)

    def _headline(self) -> str:
        dev, planned = self.proposals.done("dev"), self.proposals.planned
        parts = [f"{min(dev, planned)}/{planned} trials"]
        if tests := self.proposals.done("test"):
            parts.append(f"{tests} tested")
        if repeated := len(self.proposals.repeated):
            parts.append(f"{repeated} scores of other seeds")
        parts.append(f"{duration(time.monotonic() - self.started)} elapsed")
        if self.proposals.stopped:
            parts.append(self.proposals.stopped)
        left = self._seconds_left()
        return ", ".join(parts + ([f"about {duration(left)} left"] if left > 0 else []))

    def _seconds_left(self) -> float:
        """Asked anew so seldom that it is a twentieth of a core's work at most, of however many trials."""
        began = time.monotonic()
        if began < self._ask_at:
            return max(0.0, self._left - (began - self._asked))
        known, unknown, tests = self.proposals.to_come()
        running = [(activity.stage, activity.since) for activity in current(self.study)]
        self._left = self.estimate.seconds_left(known, unknown, tests, running)
        self._asked = time.monotonic()
        self._ask_at = self._asked + 20 * (self._asked - began)
        return self._left

    def _title(self, row: TrialRow) -> str:
        return self.proposals.space.title(row.schedule, row.backbone)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table("schedule", "split", "nDCG@10", "parameters", "doc. speed-up", box=None, pad_edge=False)
        for row in list(self.rows):
            table.add_row(self._title(row), row.split, *_cells(row))
        bar = ProgressBar(total=self.proposals.planned, completed=self.proposals.done("dev"), width=40)
        lines = [_activity_line(activity) for activity in current(self.study)] or [_idle()]
        running = [Text(line, style="cyan") for line in lines]
        return Group(Text(self._headline(), style="bold"), bar, *running, table)


def _idle() -> str:
    return _NOWHERE if lacks_nodes() else _IDLE


def _activity_line(activity: Activity) -> str:
    what = titles()[activity.stage]
    since = duration(max(0.0, time.time() - activity.since))
    split = " (test)" if activity.split == "test" else ""
    return f"{activity.trial}{split}: {what} for {since}" + (
        f": {activity.detail}" if activity.detail else ""
    )


def _cells(row: TrialRow) -> tuple[str, str, str]:
    if row.ndcg_at_10 is None:
        return ("failed", row.reason[:60], "")
    speed = f"{row.document_speedup:.2f}x" if row.document_speedup else ""
    return (f"{100 * row.ndcg_at_10:.1f}", f"{(row.parameters or 0) / 1e6:.1f} M", speed)


def _row_line(row: TrialRow, title: str) -> str:
    score, size, speed = _cells(row)
    if row.status == "failed":
        return f"{title} on {row.split} failed: {row.reason}"
    return f"{title} on {row.split}: nDCG@10 {score}, {size} parameters, documents {speed} as fast"
