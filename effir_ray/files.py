"""Files that others read: complete or not there at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to: it becomes ``file`` at the end, or is removed when writing fails.

    Readers see the old content or the new, and of several writers at once the last one wins.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """``content`` (text as UTF-8) in ``file``, see ``whole``."""
    with whole(file) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
