"""constraints.txt pins whatever an installation brings, the CUDA libraries of the GPU extra too."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESOLVED = (ROOT / "tests" / "helpers" / "gpu_requirements.txt").read_text().splitlines()


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {plain(name): version for name, version in (line.split("==") for line in lines)}


def test_everything_that_the_gpu_extra_brings_has_its_version() -> None:
    names = [line for line in RESOLVED if not line.startswith("#")]
    assert len(names) > 100 and any(name.startswith("nvidia-") for name in names)
    assert [name for name in names if name not in pins()] == []


def test_what_the_gpu_extra_brings_was_looked_up_for_the_versions_that_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    names = {plain(re.split(r"[\[<>=~!; ]", requirement)[0]) for requirement in wanted}
    assert names <= set(RESOLVED)
    known = dict(re.findall(r"(\S+)==(\S+)", RESOLVED[1]))
    assert known.keys() == {"torch", "faiss-gpu-cu12", "bitsandbytes"}
    assert {name: pins()[name] for name in known} == known
