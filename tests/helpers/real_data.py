"""Real BEIR data sets, where this machine has them."""

import os
from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    """A real BEIR folder, or a skip that says how to provide one."""
    root = os.environ.get("EFFIR_DATASETS") or Path(__file__).parents[3] / "shared/datasets"
    if not (Path(root) / name / "corpus.jsonl").is_file():
        pytest.skip(f"no {name} in {root}; set EFFIR_DATASETS to a folder of BEIR data sets")
    return Path(root) / name
