"""Every bad file of ``bad_inputs/`` and ``helpers/bad_files.py`` ends in one line and exit code 2.

Within 10 seconds and 2 GiB, and without a traceback. A file that gave trouble is added to its folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import bad_files, bad_input_worker

ROOT = Path(__file__).parents[1]
GIB = 2
KINDS = (*bad_input_worker.kinds(Path()), "pipes")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of every bad input: see the worker."""
    scratch = tmp_path_factory.mktemp("bad")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, bad_input_worker.__file__, str(scratch), *KINDS],
        capture_output=True,
        text=True,
        timeout=580,
        env=environment | {"XDG_CACHE_HOME": str(scratch / "cache")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)  # the first one waits for all
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line(kind: str, outcomes: list[dict[str, Any]]) -> None:
    found = [case for case in outcomes if case["kind"] == kind]
    assert found
    wrong = [
        case
        for case in found
        if case["code"] != 2
        or len(case["lines"]) != 1
        or len(case["lines"][0]) > 1000
        or case["seconds"] > bad_input_worker.SECONDS
        or case["gib"] > GIB
    ]
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    files = [path for path in bad_input_worker.CORPUS.rglob("*") if path.is_file()]
    lists = (getattr(bad_files, name) for name in dir(bad_files) if name.isupper() and name[0] != "_")
    assert len(files) + sum(len(cases) for cases in lists) >= 300


@pytest.mark.parametrize("name", ["password-file", "shell-script", "secret-of-another"])
def test_what_a_strangers_file_holds_is_not_repeated(name: str) -> None:
    file = bad_input_worker.CORPUS / "spaces" / f"{name}.yaml"
    (line,) = bad_input_worker.command("search", file, "--dry-run").stderr.splitlines()
    said = line.replace(str(file), "")
    assert not any(word in said for word in ("root", "daemon", "hunter2", "TOKEN", "Secret", "aHVudGVyMg"))
