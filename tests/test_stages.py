"""Stages: built once, never half, shared between processes."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effir_ray import leases
from effir_ray.errors import InputError, LostProcess, TrialFailure
from effir_ray.leases import Lease
from effir_ray.stages import StageStore, _discard, fingerprint


def _write(folder: Path) -> None:
    (folder / "value").write_text("1")


def test_a_second_run_builds_nothing(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    first = store.run("double", {"x": 1}, _write)

    def forbidden(folder: Path) -> None:
        raise AssertionError("built twice")

    assert store.run("double", {"x": 1}, forbidden) == first
    assert (first / "value").read_text() == "1"
    assert len((tmp_path / "runs.log").read_text().splitlines()) == 1


@pytest.mark.parametrize("inputs, version", [({"x": 2}, 1), ({"x": 1}, 2)])
def test_other_inputs_or_code_are_another_stage(tmp_path: Path, inputs: dict[str, int], version: int) -> None:
    store = StageStore(tmp_path)
    assert store.run("s", {"x": 1}, _write) != store.run("s", inputs, _write, version=version)


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    store = StageStore(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        store.run("s", {}, fails)
    assert not list(tmp_path.glob("s/*/half"))
    assert (store.run("s", {}, _write) / "value").exists()


# A forked child of a process with threads (torch, Arrow, trackers) may find their locks taken, for ever.
SPAWN = multiprocessing.get_context("spawn")


def _slow_build(root: Path, seconds: float) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("")
        time.sleep(seconds)

    StageStore(root).run("slow", {}, build)


def test_processes_share_one_build(tmp_path: Path) -> None:
    workers = [SPAWN.Process(target=_slow_build, args=(tmp_path, 0.5)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len((tmp_path / "runs.log").read_text().splitlines()) == 1


def test_a_killed_build_is_not_mistaken_for_a_result(tmp_path: Path) -> None:
    worker = SPAWN.Process(target=_slow_build, args=(tmp_path, 60))
    worker.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("slow/*.tmp*/half")):
        assert worker.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join(60)
    place = StageStore(tmp_path).run("slow", {}, _write)
    assert sorted(item.name for item in place.iterdir()) == ["stage.json", "value"]
    assert not list(tmp_path.glob("slow/*.tmp*"))


def test_a_resumable_build_goes_on_in_its_folder(tmp_path: Path) -> None:
    """The kept folder has the same path every time: what is recorded inside stays true."""
    store, folders = StageStore(tmp_path), []

    def interrupted(folder: Path) -> None:
        folders.append(folder)
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    def goes_on(folder: Path) -> None:
        folders.append(folder)
        (folder / "half").rename(folder / "whole")

    with pytest.raises(KeyboardInterrupt):
        store.run("train", {}, interrupted, resumable=True)
    place = store.run("train", {}, goes_on, resumable=True)
    assert sorted(item.name for item in place.iterdir()) == ["stage.json", "whole"]
    assert folders[0] == folders[1]


@pytest.mark.parametrize("error", [InputError("other settings"), TrialFailure("the loss is NaN")])
def test_a_resumable_build_that_cannot_go_on_begins_anew(tmp_path: Path, error: Exception) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise error

    with pytest.raises(type(error)):
        StageStore(tmp_path).run("train", {}, fails, resumable=True)
    assert not list(tmp_path.glob("train/*.tmp*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("(os error 28)")])
def test_a_full_disk_is_named(tmp_path: Path, error: Exception) -> None:
    def full(folder: Path) -> None:
        raise error

    with pytest.raises(InputError, match="no disk space left while building stage 's'"):
        StageStore(tmp_path).run("s", {}, full)


def test_a_full_disk_of_a_node_alone_is_not_the_studys(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise LostProcess("node left: no space in /tmp") from OSError(28, "No space left on device")

    with pytest.raises(LostProcess, match="node left"):
        StageStore(tmp_path).run("s", {}, full)


def test_fingerprint_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = fingerprint(tmp_path)
    (tmp_path / "a").write_text("2")
    changed = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({before, changed, fingerprint(tmp_path)}) == 3


def test_a_build_that_another_process_took_over_finishes_nothing(tmp_path: Path) -> None:
    store = StageStore(tmp_path)

    def cut_off(folder: Path) -> None:
        (folder / "value").write_text("of the first")
        (holder,) = (tmp_path / "locks").glob("s-*.1")
        holder.with_suffix(".2").write_text("{}")

    with pytest.raises(LostProcess, match="took this work over"):
        store.run("s", {}, cut_off)
    assert not list(tmp_path.glob("s/*"))


def _stopped_build(root: Path, resumable: bool) -> None:
    def build(folder: Path) -> None:
        (folder / "value").write_text("of the first")
        (root / "begun").touch()
        while not (root / "go").exists():
            time.sleep(0.01)
        (folder / "value").write_text("of the first, again")

    store = StageStore(root)
    try:
        store.run("slow", {}, build, resumable=resumable)
    except LostProcess as error:
        (root / "lost").write_text(str(error))


@pytest.mark.parametrize("resumable", [False, True])
def test_a_stopped_builder_that_wakes_up_changes_nothing_of_its_successors(
    resumable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "EXPIRY", 1.0)
    worker = SPAWN.Process(target=_stopped_build, args=(tmp_path, resumable))
    worker.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert worker.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(worker.pid or 0, signal.SIGSTOP)
    place = StageStore(tmp_path).run("slow", {}, _write, resumable=resumable)
    before = {file.name: (file.read_text(), file.stat().st_mtime_ns) for file in place.iterdir()}
    (tmp_path / "go").touch()
    os.kill(worker.pid or 0, signal.SIGCONT)
    worker.join(60)
    assert "another process took this work over" in (tmp_path / "lost").read_text()
    assert {file.name: (file.read_text(), file.stat().st_mtime_ns) for file in place.iterdir()} == before
    assert before["value"][0] == "1"
    assert len((tmp_path / "runs.log").read_text().splitlines()) == 1
    assert [item.name for item in (tmp_path / "slow").iterdir()] == [place.name]


def test_what_a_builder_that_was_cut_off_raises_is_no_failure_of_the_stage(tmp_path: Path) -> None:
    """Its folder was gone, or half of another's; and what is in it now is its successor's to go on with."""
    store = StageStore(tmp_path)

    def cut_off(folder: Path) -> None:
        lease = store.lease_of(folder)
        assert lease is not None
        lease.check()
        (folder / "half").write_text("of the second")
        (tmp_path / "locks" / lease.key).with_suffix(".2").write_text("{}")
        with pytest.raises(LostProcess):
            lease.check()
        raise InputError("other settings")

    with pytest.raises(LostProcess, match="took this work over"):
        store.run("s", {}, cut_off, resumable=True)
    (kept,) = tmp_path.glob("s/*.tmp/half")
    assert store.lease_of(kept.parent) is None


def test_a_stage_that_another_builder_finished_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    """The lease goes between the look at it and the deletion."""

    class Going(Lease):
        looks = iter([True, False, False])

        @property
        def held(self) -> bool:
            return next(self.looks)

    place = StageStore(tmp_path).run("s", {}, _write)
    with pytest.raises(LostProcess):
        _discard(place, Going(leases._Files(tmp_path), "s", 1, "s.1"))
    assert (place / "value").read_text() == "1"
    assert [item.name for item in (tmp_path / "s").iterdir()] == [place.name]


def test_who_waits_hears_for_whom(tmp_path: Path) -> None:
    heard: set[int] = set()
    worker = SPAWN.Process(target=_slow_build, args=(tmp_path, 1.0))
    worker.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("slow/*.tmp*/half")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    StageStore(tmp_path).run(
        "slow", {}, _write, waiting=lambda owner, seconds: heard.add(owner.pid if owner else 0)
    )
    assert heard == {worker.pid}
    worker.join(60)


def test_copies_of_what_an_object_store_has_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were not used for longest, while the disk is nearly full, and none that may be in use."""
    store = StageStore(tmp_path / "here", (tmp_path / "there").as_uri())
    usage = SimpleNamespace(total=100, used=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    places = [store.run("one", {"number": number}, _write) for number in range(4)]
    for age, place in zip((2, 3, 1, 0), places, strict=True):
        os.utime(place, (time.time() - age * 3600,) * 2)
    missing = StageStore(tmp_path / "other", store.remote).run("one", {"number": 4}, _write).name
    there = places[0].with_name(missing)
    assert store.bring(there).exists() and all(place.exists() for place in places)

    shutil.rmtree(there)
    freed: list[Path] = []
    remove = shutil.rmtree

    def removing(place: Path, **options: Any) -> None:
        if Path(place) in places:
            freed.append(Path(place))
            usage.used -= 8
        remove(place, **options)

    monkeypatch.setattr(shutil, "rmtree", removing)
    usage.used = 90
    store.bring(there)
    assert freed == [places[1], places[0]]
    assert (there / "value").read_text() == "1" and store.has(places[1])

    usage.used = 100
    shutil.rmtree(there)
    store.bring(places[1])  # whoever needs it gets it again
    assert places[2] in freed and places[3].exists(), "that one was used just now"
