"""Long work on training pairs in chunks: a finished chunk is a stage, and a killed run resumes after it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from effir_ray.data.pairs import Pair, write_pairs
from effir_ray.progress import progress
from effir_ray.stages import StageStore

FILE = "pairs.jsonl"
SIZE = 2000  # queries a chunk: at most so many are worked on twice after a kill

Process = Callable[[Sequence[Pair]], list[Pair]]


def in_chunks(
    stages: StageStore,
    stage: str,
    inputs: Mapping[str, Any],
    pairs: Sequence[Pair],
    make_process: Callable[[], Process],
    *,
    description: str,
    size: int | None = None,
) -> Path:
    """The JSONL file of the stage: ``process`` applied to ``pairs``, ``size`` (default ``SIZE``) at a time.

    ``inputs`` must determine ``pairs`` and ``process``. ``make_process`` is called at most once, and only if
    a chunk is missing (loading a model or building an index is not for nothing).
    """
    process, size = cache(make_process), size or SIZE
    parts = [
        (start, {**inputs, "start": start, "stop": min(start + size, len(pairs))})
        for start in range(0, len(pairs), size)
    ]

    def build_part(start: int, folder: Path) -> None:
        write_pairs(process()(pairs[start : start + size]), folder / FILE)

    def build(folder: Path) -> None:
        with (
            progress(description, total=len(pairs), unit="queries") as bar,
            (folder / FILE).open("wb") as out,
        ):
            for start, part in parts:
                made = stages.run(f"{stage}-part", part, partial(build_part, start))
                out.write((made / FILE).read_bytes())
                bar.advance(part["stop"] - start)

    folder = stages.run(stage, inputs, build)
    for _, part in parts:  # the whole holds them now
        shutil.rmtree(stages.path(f"{stage}-part", part), ignore_errors=True)
    return folder / FILE
