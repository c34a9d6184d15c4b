"""Leases: one holder at a time, taken over from the dead, and never counted for one that lost it."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from effir_ray import leases, storage
from effir_ray.errors import LostProcess
from effir_ray.leases import Held, Owner, aloud, lease
from effir_ray.progress import show_progress

SPAWN = multiprocessing.get_context("spawn")


def _count(place: Path, rounds: int) -> None:
    """Adds to a number in a file, which loses counts when two do so at once."""
    for _ in range(rounds):
        with lease(place, "count"):
            number = int((place / "number").read_text())
            time.sleep(0.001)
            (place / "number").write_text(str(number + 1))


def test_of_many_processes_one_holds_it(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    workers = [SPAWN.Process(target=_count, args=(tmp_path, 40)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "number").read_text() == "160"
    assert [file.name for file in tmp_path.glob("count.*")] == ["count.160"], "one file is left"


def _hold(place: Path, held: Path) -> None:
    with lease(place, "x"):
        held.touch()
        time.sleep(600)


def _holder(place: Path) -> multiprocessing.process.BaseProcess:
    process = SPAWN.Process(target=_hold, args=(place, place / "held"))
    process.start()
    deadline = time.monotonic() + 60
    while not (place / "held").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    with pytest.raises(Held) as held, lease(tmp_path, "x", wait=False):
        pass
    assert held.value.owner is not None and held.value.owner.pid == process.pid
    assert str(held.value.owner).endswith(f" (process {process.pid})")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(60)
    begun = time.monotonic()
    with lease(tmp_path, "x") as mine:
        assert mine.generation == 2
    assert time.monotonic() - begun < 5


def _elsewhere(place: Path, name: str = "x") -> Path:
    """The file of a holder on another machine."""
    there = replace(Owner.here(), host="node-4", machine="node-4 other-boot", pid=12)
    file = place / f"{name}.7"
    file.write_text(json.dumps(asdict(there)))
    return file


def test_a_silent_machine_is_followed_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "EXPIRY", 1.0)
    _elsewhere(tmp_path)
    heard: list[str] = []
    begun = time.monotonic()
    with lease(tmp_path, "x", waiting=lambda owner, seconds: heard.append(f"{owner}")) as mine:
        assert mine.generation == 8
    assert 1.0 < time.monotonic() - begun < 10
    assert set(heard) == {"node-4 (process 12)"}


def test_a_machine_that_is_heard_of_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its clock says: what counts is that the time of its file changes."""
    monkeypatch.setattr(leases, "EXPIRY", 1.5)
    file = _elsewhere(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        for second in range(1, 100):
            if ended.wait(0.3):
                return
            os.utime(file, (second, second))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held) as held, lease(tmp_path, "x", wait=False):
            pass
        assert held.value.owner is not None and held.value.owner.host == "node-4"
        waited: list[float] = []

        class Enough(Exception):
            pass

        def waiting(owner: Owner | None, seconds: float) -> None:
            waited.append(seconds)
            if seconds > 3:
                raise Enough

        with pytest.raises(Enough), lease(tmp_path, "x", waiting=waiting):
            pass
    finally:
        ended.set()
        thread.join()


def test_holders_are_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_HEARTBEAT", 0.05)
    monkeypatch.setattr(leases, "_beating", leases._Heart())
    with lease(tmp_path, "x") as mine:
        file = tmp_path / mine.key
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_waits_says_for_whom_now_and_then() -> None:
    display, begun = io.StringIO(), []
    there = replace(Owner.here(), host="node-4", pid=12)
    with show_progress(display):
        waiting = aloud("embeddings", lambda: begun.append(1))
        for seconds in (0.1, 1.9, 2.1, 5.0, 12.0, 13.0, 72.2):
            waiting(None if seconds < 3 else there, seconds)
    assert display.getvalue().splitlines() == [
        "waiting for embeddings, 2 s",
        "waiting for embeddings, held by node-4 (process 12), 13 s",
        "waiting for embeddings, held by node-4 (process 12), 1 min 12 s",
    ]
    assert begun == [1]


def test_what_was_taken_over_does_not_count(tmp_path: Path) -> None:
    with lease(tmp_path, "x") as mine:
        mine.check()
        (tmp_path / "x.2").write_text(json.dumps(asdict(replace(Owner.here(), pid=1))))
        with pytest.raises(LostProcess, match="took this work over"):
            mine.check()
    assert json.loads((tmp_path / "x.2").read_text())["pid"] == 1, "the end of the first frees nothing"


def test_a_generation_that_came_and_went_is_not_used_again(tmp_path: Path) -> None:
    """Between looking and creating a whole life of another holder may pass."""
    (tmp_path / "x.3").write_text("free")
    assert leases._Files(tmp_path).create("x", 2, "") is None
    assert [file.name for file in tmp_path.glob("x.*")] == ["x.3"]


def test_names_that_begin_alike_are_apart(tmp_path: Path) -> None:
    with lease(tmp_path, "x"), lease(tmp_path, "x.1", wait=False), lease(tmp_path, "x.1.2", wait=False):
        assert {file.name for file in tmp_path.iterdir()} == {"x.1", "x.1.1", "x.1.2.1"}


def _count_in_bucket(uri: str, file: Path, rounds: int) -> None:
    for _ in range(rounds):
        with lease(uri, "count"):
            number = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(number + 1))


def test_in_a_bucket_one_of_many_processes_holds_it(tmp_path: Path, object_store: str) -> None:
    uri, file = object_store.format("leases"), tmp_path / "number"
    file.write_text("0")
    workers = [SPAWN.Process(target=_count_in_bucket, args=(uri, file, 6)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert file.read_text() == "18"


def test_in_a_bucket_the_dead_are_followed_and_fenced(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = object_store.format("dead")
    with lease(uri, "x") as first:
        with pytest.raises(Held) as held, lease(uri, "x", wait=False):
            pass
        assert held.value.owner == Owner.here()
        there = replace(Owner.here(), host="node-4", machine="node-4 other-boot", pid=12)
        monkeypatch.setattr(leases, "_read_owner", lambda text: there)
        monkeypatch.setattr(leases, "EXPIRY", 0.5)
        monkeypatch.setattr(leases._Objects, "touch", lambda self, key: None)
        with lease(uri, "x") as second:
            assert second.generation == first.generation + 1
            with pytest.raises(LostProcess, match="took this work over"):
                first.check()
            second.check()


@pytest.mark.parametrize("others, gets_it", [((), True), (("x@1@000",), False), (("x@2@zzz",), False)])
def test_in_a_bucket_who_sees_another_makes_way(
    object_store: str, others: tuple[str, ...], gets_it: bool
) -> None:
    """One that saw itself alone stays, whatever its name; a higher generation too."""
    uri = object_store.format(f"rivals-{len(others)}{gets_it}{''.join(others)[:3]}{'2' in str(others)}")
    for other in others:
        storage.put(storage.join(uri, other), b"{}")
    key = leases._Objects(uri).create("x", 1, "{}")
    assert (key is not None) == gets_it
    assert storage.entries(uri).keys() == ({key} if gets_it else set(others))
