"""A group of processes that talk to each other over gloo, as Ray Train's workers do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

_SECONDS = 570
ROOT = Path(__file__).parents[2]


def run_group(script: str, ranks: int, out: Path) -> None:
    """Run ``python SCRIPT RANK RANKS PORT OUT`` once a rank; AssertionError with the logs where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(ranks), str(port), str(out)],
            stdout=(out / f"{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(timeout=_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), {file.name: file.read_text()[-3000:] for file in out.glob("*.log")}
