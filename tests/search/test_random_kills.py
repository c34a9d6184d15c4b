"""Studies whose processes are killed at random moments end as undisturbed ones do.

``EFFIR_RAY_KILLS`` says how many processes are killed (2), three in each study.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from effir_ray.results import query_scores, store
from effir_ray.search.folder import STAGES_FOLDER
from tests.helpers.search_examples import small_space, write_corpus

KILLS = int(os.environ.get("EFFIR_RAY_KILLS", "2"))
_KILLS_A_STUDY = 3
_STUDY_SECONDS = 400

TRAINING = {
    "steps": 4,
    "batch_size": 8,
    "lora": None,
    "query_max_length": 16,
    "document_max_length": 32,
}

VICTIMS = {
    "trial": "ImplicitFunc",
    "training worker": "RayTrainWorker",
    "training controller": "TrainController",
    "raylet": "raylet/raylet",
    "control service": "gcs_server",
}
"""What is killed -> part of its command line; the driver besides."""


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    space = small_space(
        dataset=str(write_corpus(folder / "data")),
        dev={},
        test={},
        threads=1,
        recovery=TRAINING,
        schedules=[{"drop_mlp": 1, "recover": True}, {"drop_mlp": 2, "recover": True}],
        strategy="halving",  # the better one goes on from what it had learnt
        halving={"factor": 2, "rungs": 2},
        objectives=["ndcg_at_10", "parameters"],
    )
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space.model_dump(mode="json")))
    return file


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Where the studies' processes put what is to go. Short: paths of sockets may have 107 characters."""
    place = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.integration
@pytest.mark.timeout(600 + 120 * KILLS)
def test_whatever_is_killed_the_rows_are_those_of_an_undisturbed_study(
    space: Path, temporary: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "undisturbed"
    assert start(space, whole, temporary).wait(_STUDY_SECONDS) == 0
    expected = rows(whole)
    assert sum(name.split()[0].endswith("+ft") for name in expected if name.endswith("dev")) == 1
    assert sum(name.split()[0].endswith("+ft@2") for name in expected if name.endswith("dev")) == 2
    assert len(list(whole.glob("stages/recovered/*"))) == 3
    assert not list(whole.glob("stages/recovered/*/state*"))
    seed = random.randrange(10**6)
    draw, told = random.Random(seed), [f"seed {seed}"]
    for number in range(0, KILLS, _KILLS_A_STUDY):
        out = tmp_path / f"killed-{number}"
        disturbed(space, out, temporary, draw, min(_KILLS_A_STUDY, KILLS - number), told)
        scores = rows(out)
        dev = [name for name in expected if name.endswith("dev")]
        assert sorted(dev) == sorted(name for name in scores if name.endswith("dev")), told
        for name in scores.keys() & expected.keys():  # speeds decide too what is tested
            assert scores[name] == pytest.approx(expected[name], abs=1e-6), (name, told)
        found = store.read([out]).to_pylist()
        assert {row["status"] for row in found} == {"ok"}, told
        assert max(Counter((row["trial_id"], row["split"]) for row in found).values()) == 1, told
        assert len(query_scores.read(out)) == sum(row["n_queries"] for row in found), told
        builds = Counter(
            line.split()[1] for line in (out / STAGES_FOLDER / "runs.log").read_text().splitlines()
        )
        assert max(builds.values()) == 1, told
        assert not list(out.rglob("*.tmp")) and not list(out.glob("activity/*")), told
        assert not (out / STAGES_FOLDER / "locks").exists(), told
    # What torch compiles it keeps for the user's next process, whether this one was killed or not.
    left = [place.name for place in temporary.iterdir() if not place.name.startswith("torchinductor_")]
    assert not left, told
    print("; ".join(told))


def disturbed(
    space: Path, out: Path, temporary: Path, draw: random.Random, kills: int, told: list[str]
) -> None:
    """Runs the study in ``out`` to its end, with so many kills on the way."""
    process, deadline = start(space, out, temporary), time.monotonic() + _STUDY_SECONDS * (kills + 1)
    while True:
        assert time.monotonic() < deadline, told
        until = time.monotonic() + draw.uniform(0.5, 15)
        kind = draw.choice(["driver", *VICTIMS])
        while kills and process.poll() is None and (time.monotonic() < until or not victims(process, kind)):
            if time.monotonic() > until + 20:  # there is none of this kind any more, or not yet
                kind = draw.choice(["driver", *VICTIMS])
            time.sleep(0.05)
        if not kills:
            with suppress(subprocess.TimeoutExpired):
                process.wait(deadline - time.monotonic())
        if process.poll() is None:
            for victim in victims(process, kind)[:1]:
                with suppress(psutil.NoSuchProcess):
                    family = psutil.Process(process.pid).children(recursive=True) if kind == "driver" else []
                    victim.kill()
                    psutil.wait_procs(family, timeout=60)  # they follow their driver
                    told.append(f"{kind} killed after {len(list(out.glob('rows/*')))} files of rows")
                    kills -= 1
            continue
        code = process.wait()
        if code == 0:
            return
        # -9: the driver; 1: a Ray that was lost too often. Anything else is a defect.
        assert code in (1, -9), (told, code, (out.parent / f"{out.name}.log").read_text()[-2000:])
        process = start(space, out, temporary)


def start(space: Path, out: Path, temporary: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from effir_ray.cli import main; main()"
    command = [sys.executable, "-c", code, "search", str(space), "--out", str(out)]
    if (out / "study.json").exists():
        command.append("--resume")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary)}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def victims(process: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        driver = psutil.Process(process.pid)
        if kind == "driver":
            return [driver]
        found = []
        for child in driver.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if VICTIMS[kind] in " ".join(child.cmdline()):
                    found.append(child)
        return found
    return []


def rows(out: Path) -> dict[str, float]:
    """Schedule and split -> nDCG@10."""
    return {
        f"{row['schedule']} {row['recovered']} {row['split']}": row["ndcg_at_10"]
        for row in store.read([out]).to_pylist()
    }
