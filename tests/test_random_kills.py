"""Commands whose processes are killed at random moments, and started again, end as undisturbed ones do.

``EFFIR_RAY_KILLS`` says how many processes are killed in all (3), at most three in each run.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from effir_ray.encoding.corpus_encoding import encode_corpus
from effir_ray.encoding.embedding_shards import CorpusEmbeddings, ShardFolder
from effir_ray.results import query_scores, store
from effir_ray.search.folder import STAGES_FOLDER
from effir_ray.training.run.history import read_history
from tests.helpers.search_examples import small_space, write_corpus

KILLS = int(os.environ.get("EFFIR_RAY_KILLS", "3"))
_KILLS_A_RUN = 3
_RUN_SECONDS = 1200

VICTIMS = {
    "driver": "",
    "trial": "ImplicitFunc",
    "training worker": "RayTrainWorker",
    "training controller": "TrainController",
    "encoding actor": "MapWorker",
    "raylet": "raylet/raylet",
    "control service": "gcs_server",
}
"""What is killed -> part of its command line; the driver is what is started."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """``line``: the words after ``effir-ray``, for an output folder. ``victims``: what is killed, this
    one first. A kill comes within so many ``seconds`` after its victim has begun. ``equal``: asserts that the
    second folder holds what the first does, and nothing else.
    """

    line: Callable[[Path], list[str]]
    victims: tuple[str, ...]
    seconds: float
    equal: Callable[[Path, Path], None]
    whole: Callable[[Path], object] | None = None


STEPS = 24
SHARDS = 200
SHARD = 32
FILLERS = 1010
"""Documents that no query asks for: with them a study's corpus is two shards, one an actor."""


def search(folder: Path) -> Command:
    training = {
        "steps": 4,
        "batch_size": 8,
        "lora": None,
        "query_max_length": 16,
        "document_max_length": 32,
    }
    space = small_space(
        dataset=str(write_corpus(folder / "data")),
        dev={},
        test={},
        threads=1,
        encoding_workers=2,
        recovery=training,
        schedules=[{"drop_mlp": 1, "recover": True}, {"drop_mlp": 2, "recover": True}],
        strategy="halving",  # the better one goes on from what it had learnt
        halving={"factor": 2, "rungs": 2},
        objectives=["ndcg_at_10", "parameters"],
    )
    with (folder / "data" / "corpus.jsonl").open("a") as corpus:
        corpus.writelines(f'{{"_id": "f{i}", "title": "", "text": "{i}"}}\n' for i in range(FILLERS))
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(space.model_dump(mode="json")))

    def line(out: Path) -> list[str]:
        resume = ["--resume"] if (out / "study.json").exists() else []
        return ["search", str(file), "--out", str(out), *resume]

    victims = ("encoding actor", *(kind for kind in VICTIMS if kind != "encoding actor"))
    return Command(line=line, victims=victims, seconds=15, equal=equal_studies)


def equal_studies(whole: Path, out: Path) -> None:
    expected, scores = ranking(whole), ranking(out)
    dev = [name for name in expected if name.endswith("dev")]
    assert sum(name.split()[0].endswith("+ft") for name in dev) == 1
    assert sum(name.split()[0].endswith("+ft@2") for name in dev) == 2
    assert len(list(whole.glob("stages/recovered/*"))) == 3
    assert not list(whole.glob("stages/recovered/*/state*"))
    assert sorted(dev) == sorted(name for name in scores if name.endswith("dev"))
    for name in scores.keys() & expected.keys():  # speeds decide too what is tested
        assert scores[name] == pytest.approx(expected[name], abs=1e-6), name
    found = store.read([out]).to_pylist()
    assert {row["status"] for row in found} == {"ok"}
    assert max(Counter((row["trial_id"], row["split"]) for row in found).values()) == 1
    assert len(query_scores.read(out)) == sum(row["n_queries"] for row in found)
    builds = Counter(line.split()[1] for line in (out / STAGES_FOLDER / "runs.log").read_text().splitlines())
    assert max(builds.values()) == 1
    assert not list(out.rglob("*.tmp")) and not list(out.glob("activity/*"))
    assert not (out / STAGES_FOLDER / "locks").exists()


def ranking(out: Path) -> dict[str, float]:
    """Schedule and split -> nDCG@10."""
    return {
        f"{row['schedule']} {row['recovered']} {row['split']}": row["ndcg_at_10"]
        for row in store.read([out]).to_pylist()
    }


def train(folder: Path, object_store: str) -> Command:
    """With checkpoints in an object store, on the way to which they lie on this machine."""
    settings = {
        "dataset": str(write_corpus(folder / "data")),
        "hard_negatives": 0,
        "steps": STEPS,
        "batch_size": 8,
        "lora": None,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
        "query_max_length": 16,
        "document_max_length": 32,
        "storage_path": object_store.format("kept"),
    }
    file = folder / "training.yaml"
    file.write_text(yaml.safe_dump(settings))

    def line(out: Path) -> list[str]:
        return ["train", str(file), "--model", "random:llama", "--out", str(out)]

    victims = ("raylet", "training worker", "training controller", "driver", "control service")
    return Command(line=line, victims=victims, seconds=12, equal=equal_runs)


def equal_runs(whole: Path, out: Path) -> None:
    expected, found = read_history(whole / "history.jsonl"), read_history(out / "history.jsonl")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    losses = [[row["loss"] for row in rows] for rows in (expected, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    weights = [load_file(place / "checkpoint" / "model.safetensors") for place in (whole, out)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert np.allclose(value, weights[1][name], atol=1e-5), name
    assert names(out) == names(whole)
    assert not list(out.glob("run/*"))


def encode(folder: Path) -> Command:
    data = folder / "data"
    data.mkdir()
    draw = random.Random(0)
    with (data / "corpus.jsonl").open("w") as corpus:
        for i in range(SHARDS * SHARD):
            text = " ".join(str(draw.randrange(100)) for _ in range(draw.randint(1, 40)))
            corpus.write(f'{{"_id": "d{i}", "title": "", "text": "{text}"}}\n')

    def line(out: Path) -> list[str]:
        words = ["encode", "--model", "random:llama", "--dataset", str(data), "--out", str(out)]
        return [*words, "--workers", "2", "--shard-size", str(SHARD)]

    def whole(out: Path) -> object:
        return encode_corpus("random:llama", data, out, shard_size=SHARD)

    victims = ("raylet", "encoding actor", "driver", "control service")
    return Command(line=line, victims=victims, seconds=15, equal=equal_embeddings, whole=whole)


def equal_embeddings(whole: Path, out: Path) -> None:
    expected, found = (CorpusEmbeddings(ShardFolder(place)) for place in (whole, out))
    assert list(found.ids) == list(expected.ids)
    assert all(map(np.array_equal, found.shards(), expected.shards()))
    assert names(out) == names(whole)


def names(folder: Path) -> set[str]:
    """What is in it, but for the lease, which counts its holders."""
    return {place.name for place in folder.iterdir() if not re.fullmatch(r"\.\w+\.\d+", place.name)}


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Where the processes put what is to go. Short: paths of sockets may have 107 characters."""
    place = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


COMMANDS = ("search", "train", "encode")


def prepared(name: str, folder: Path, object_store: str) -> Command:
    folder.mkdir()
    return (
        {"search": search, "encode": encode}[name](folder) if name != "train" else train(folder, object_store)
    )


@pytest.mark.integration
@pytest.mark.timeout(1800 + 240 * KILLS)
@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_killed_the_end_is_that_of_an_undisturbed_run(
    name: str, object_store: str, temporary: Path, tmp_path: Path
) -> None:
    kills = KILLS // len(COMMANDS) + (COMMANDS.index(name) < KILLS % len(COMMANDS))
    if not kills:
        pytest.skip("fewer kills than commands were asked for")
    command, whole = prepared(name, tmp_path / "input", object_store), tmp_path / "undisturbed"
    if command.whole is not None:
        command.whole(whole)
    else:
        assert start(command, whole, temporary).wait(_RUN_SECONDS) == 0, said(whole)
    seed = random.randrange(10**6)
    draw, told = random.Random(seed), [f"{name}, seed {seed}"]
    wanted, idle = list(islice(kinds(command, draw), kills)), 0
    while wanted:
        out, part, left = tmp_path / f"killed-{len(told)}-{idle}", wanted[:_KILLS_A_RUN], len(wanted)
        # Where it ended before its first kill, the next one comes earlier.
        disturbed(command, out, temporary, draw, part, told, seconds=command.seconds / 2**idle)
        wanted = part + wanted[_KILLS_A_RUN:]
        idle = idle + 1 if len(wanted) == left else 0
        assert idle < 5, "it ends before anything can be killed"
        try:
            command.equal(whole, out)
        except AssertionError as error:
            error.add_note("; ".join(told))
            raise
        assert "Traceback" not in said(out), (told, said(out)[-3000:])
    # What torch compiles it keeps for the user's next process, whether this one was killed or not.
    left = [place.name for place in temporary.iterdir() if not place.name.startswith("torchinductor_")]
    assert not left, told
    print("; ".join(told))


def kinds(command: Command, draw: random.Random) -> Iterator[str]:
    """Without end: every victim once before any comes again."""
    yield command.victims[0]
    rest = list(command.victims[1:])
    while True:
        draw.shuffle(rest)
        yield from rest
        rest = list(command.victims)


def disturbed(
    command: Command,
    out: Path,
    temporary: Path,
    draw: random.Random,
    wanted: list[str],
    told: list[str],
    *,
    seconds: float,
) -> None:
    """Runs the command to its end, with kills on the way, which are taken from ``wanted``; the first comes
    within so many ``seconds``."""
    process = start(command, out, temporary)
    deadline = time.monotonic() + _RUN_SECONDS * (len(wanted) + 1)
    while True:
        while wanted and not victims(process, wanted[0]) and process.poll() is None:
            assert time.monotonic() < deadline, (told, said(out)[-2000:])
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.1, seconds) if wanted else deadline - time.monotonic())
        if process.poll() is None:
            assert wanted, ("it does not end", told, said(out)[-2000:])
            seconds /= 2  # where it has ended by itself meanwhile, the next one is met earlier
            for victim in victims(process, wanted[0])[:1]:
                with suppress(psutil.NoSuchProcess):
                    family = psutil.Process(process.pid).children(recursive=True)
                    victim.kill()
                    seconds = command.seconds
                    told.append(f"{wanted.pop(0)} killed with {len(list(out.rglob('*')))} files there")
                    if victim.pid == process.pid:
                        psutil.wait_procs(family, timeout=60)  # they follow their driver
            continue
        code = process.wait()
        if code == 0:
            return
        # -9: the driver; 1: a Ray that was lost too often. Anything else is a defect.
        assert code in (1, -9), (told, code, said(out)[-2000:])
        process = start(command, out, temporary)


def start(command: Command, out: Path, temporary: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", "from effir_ray.cli import main; main()", *command.line(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(temporary), "RAY_TMPDIR": str(temporary)}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)


def said(out: Path) -> str:
    return (out.parent / f"{out.name}.log").read_text(errors="replace")


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
