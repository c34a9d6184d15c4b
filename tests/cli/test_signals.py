"""A study that is told to stop: one line, the exit code of the signal, and it goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effir_ray.results import store
from tests.helpers.beir_folders import write_folder

_SECONDS = 240


@pytest.mark.integration
def test_a_stopped_study_says_so_and_goes_on(tmp_path: Path) -> None:
    """First by SIGTERM, then, resumed, by Ctrl-C; then it ends."""
    space, out = tmp_path / "space.yaml", tmp_path / "out"
    space.write_text(
        f"name: stopped\nbackbone: random:llama\ndataset: {write_folder(tmp_path / 'data')}\nthreads: 1\n"
        "query_max_length: 16\ndocument_max_length: 32\ncalibration_texts: 16\n"
        "timing: {queries: 4, documents: 4, rounds: 1}\nsampler: grid\n"
        "parameters: {drop_mlp: [0, 1, 2], drop_attention: [0, 1, 2]}\n"
    )
    command = [sys.executable, "-m", "effir_ray", "search", str(space), "--out", str(out), "--resume"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for stop, (number, code) in enumerate([(signal.SIGTERM, 143), (signal.SIGINT, 130)]):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + _SECONDS
        while len(list(out.glob("rows/*.parquet"))) <= stop:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert said.splitlines()[-1] == "effir-ray: interrupted; what is finished is kept"
        assert "Traceback" not in said and "SIGTERM received" not in said
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, env=environment)
    rows = [row for row in store.read([out]).to_pylist() if row["split"] == "dev"]
    names = ["1A", "1M", "1M1A", "1M2A", "2A", "2M", "2M1A", "2M2A", "full"]
    assert sorted(row["schedule"] for row in rows) == names
