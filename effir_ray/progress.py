"""One progress display for all long work. The library is silent unless a caller switches it on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TextIO

_LINE_INTERVAL = 10.0  # seconds between plain progress lines where no terminal can redraw one

_stream: ContextVar[TextIO | None] = ContextVar("effir_ray_progress", default=None)


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[None]:
    """Within this context, work reports its progress to ``stream`` (standard error by default)."""
    token = _stream.set(stream or sys.stderr)
    try:
        yield
    finally:
        _stream.reset(token)


def progress_stream() -> TextIO | None:
    """Where progress goes in this context; None when nobody asked for it."""
    return _stream.get()


@dataclass
class Progress:
    """A running piece of work: ``advance`` it and attach live figures (docs/s, loss, ...)."""

    description: str
    total: int | None
    unit: str
    done: int = 0
    figures: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    before: int = 0

    def go_on_from(self, done: int) -> None:
        """So much was done by an earlier run: it took none of this one's time."""
        self.done = self.before = done

    def advance(self, n: int = 1, **figures: str | float) -> None:
        self.done += n
        self.figures.update({name: _text(value) for name, value in figures.items()})
        self._show()

    def _show(self) -> None:
        """Overridden by the displays below."""

    def line(self) -> str:
        """``Encoding 320/5183 docs, 18.2 docs/s, 4 min 27 s left, loss 0.31``."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        here = self.done - self.before
        rate = here / elapsed
        parts = [f"{self.description} {self.done}{f'/{self.total}' if self.total else ''} {self.unit}"]
        if here > 0:
            parts.append(f"{rate:.3g} {self.unit}/s")
        if self.total and here > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(
            parts + [f"{name.replace('_', ' ')} {value}" for name, value in self.figures.items()]
        )


@dataclass
class _Lines(Progress):
    """Plain lines, at most one each ``_LINE_INTERVAL`` seconds: logs, pipes, CI."""

    stream: TextIO = sys.stderr
    shown: float = field(default_factory=time.monotonic)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.shown >= _LINE_INTERVAL or (self.total is not None and self.done >= self.total):
            self.shown = now
            print(self.line(), file=self.stream, flush=True)


@dataclass
class _Live(Progress):
    """One line redrawn in place."""

    stream: TextIO = sys.stderr
    shown: float = 0.0

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.shown >= 0.1 or (self.total is not None and self.done >= self.total):
            self.shown = now
            print(f"\r\x1b[2K{self.line()}", end="", file=self.stream, flush=True)


@contextmanager
def progress(description: str, *, total: int | None = None, unit: str = "it") -> Iterator[Progress]:
    """``with progress("Encoding", total=n, unit="docs") as bar: bar.advance(32, tokens_per_s=410)``."""
    stream = _stream.get()
    if stream is None:
        yield Progress(description, total, unit)
    elif stream.isatty():
        bar = _Live(description, total, unit, stream=stream)
        try:
            yield bar
        finally:
            print(file=stream, flush=True)
    else:
        yield _Lines(description, total, unit, stream=stream)


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {secs} s" if minutes else f"{secs} s"


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
