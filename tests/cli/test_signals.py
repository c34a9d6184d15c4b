"""What is told to stop says so in one line, with the exit code of the signal, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from effir_ray.results import store
from effir_ray.training.run.history import HISTORY, read_history
from tests.helpers.beir_folders import write_folder

_SECONDS = 240


def _alone() -> dict[str, str]:
    """The environment of a command that starts a Ray of its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def _are_more(out: Path, pattern: str, than: int) -> bool:
    return len(list(out.glob(pattern))) > than


def _has_text(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _stop(command: list[str], begun: Callable[[], bool], number: int, code: int) -> None:
    """Send the signal when ``begun`` is true, and look at how the command ends."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_alone())
    deadline = time.monotonic() + _SECONDS
    while not begun():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.splitlines()[-1] == "effir-ray: interrupted; what is finished is kept"
    assert "Traceback" not in said and "SIGTERM received" not in said


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
    for stop, (number, code) in enumerate([(signal.SIGTERM, 143), (signal.SIGINT, 130)]):
        begun = partial(_are_more, out, "rows/*.parquet", stop)
        _stop(command, begun, number, code)
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, env=_alone())
    rows = [row for row in store.read([out]).to_pylist() if row["split"] == "dev"]
    names = ["1A", "1M", "1M1A", "1M2A", "2A", "2M", "2M1A", "2M2A", "full"]
    assert sorted(row["schedule"] for row in rows) == names


@pytest.mark.integration
def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    settings, out = tmp_path / "train.yaml", tmp_path / "out"
    settings.write_text(
        f"dataset: {write_folder(tmp_path / 'data')}\nsteps: 600\nbatch_size: 4\nworkers: 1\nlora: null\n"
        "query_max_length: 16\ndocument_max_length: 16\ncheckpoint_every: 30\n"
    )
    command = [sys.executable, "-m", "effir_ray", "train", str(settings), "--model", "random:bert"]
    command += ["--out", str(out)]
    _stop(command, partial(_has_text, out / HISTORY), signal.SIGTERM, 143)  # it comes after a checkpoint
    before = read_history(out / HISTORY)
    assert before and len(before) < 600
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, env=_alone())
    rows = read_history(out / HISTORY)
    assert [row["step"] for row in rows] == list(range(1, 601))
    assert rows[: 30 * (len(before) // 30)] == before[: 30 * (len(before) // 30)]  # not done again


@pytest.mark.integration
def test_a_stopped_encoding_goes_on(tmp_path: Path) -> None:
    data, out = write_folder(tmp_path / "data", documents=4000), tmp_path / "out"
    command = [sys.executable, "-m", "effir_ray", "encode", "--model", "random:llama", "--dataset", str(data)]
    command += ["--out", str(out), "--shard-size", "20"]
    _stop(command, partial(_are_more, out, "shards/*.json", 0), signal.SIGTERM, 143)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("shards/*.json")}
    assert 0 < len(kept) < 200
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, env=_alone())
    assert len(list(out.glob("shards/*.json"))) == 200
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # not encoded again
