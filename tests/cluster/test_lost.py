"""Which errors say that a process is gone, and which that the work is wrong."""

from __future__ import annotations

import pytest
from ray import exceptions
from ray.train import ControllerError, WorkerGroupError

from effir_ray.cluster.lost import in_one_line, is_lost_process
from effir_ray.errors import InputError, LostProcess, TrialFailure


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def task_error(cause: Exception) -> Exception:
    """As ``ray.get`` raises what a task raised."""
    return exceptions.RayTaskError("work", "Traceback ...", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        exceptions.WorkerCrashedError(),
        exceptions.ActorDiedError(),
        ControllerError(exceptions.ActorDiedError()),
        ControllerError(task_error(exceptions.ActorDiedError())),
        WorkerGroupError("rank 1", {0: RuntimeError("connection closed"), 1: exceptions.ActorDiedError()}),
        task_error(exceptions.NodeDiedError("gone")),
        caused(ValueError("encoding"), exceptions.LocalRayletDiedError()),
    ],
)
def test_a_process_that_is_gone_is_found_wherever_the_error_comes_from(error: Exception) -> None:
    assert is_lost_process(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        task_error(ValueError("bad schedule")),
        WorkerGroupError("rank 0", {0: RuntimeError("shape mismatch")}),
        exceptions.ActorDiedError(exceptions.RayTaskError("init", "Traceback ...", ValueError("no"))),
    ],
)
def test_errors_of_the_work_itself_are_not_tried_again(error: Exception) -> None:
    assert not is_lost_process(error)


@pytest.mark.parametrize("cause", [InputError("no file"), TrialFailure("NaN"), LostProcess("taken over")])
def test_our_own_errors_come_out_as_they_were_raised(cause: Exception) -> None:
    with pytest.raises(type(cause)) as raised, in_one_line("searching"):
        raise task_error(cause)
    assert raised.value is cause


def test_of_other_errors_the_cause_is_kept_without_a_remote_traceback() -> None:
    with pytest.raises(ValueError, match=r"^bad shape$"), in_one_line("searching"):
        raise task_error(ValueError("bad shape"))


@pytest.mark.parametrize("error", [exceptions.WorkerCrashedError(), exceptions.NodeDiedError("gone\nmore")])
def test_a_lost_process_is_one_line(error: Exception) -> None:
    with (
        pytest.raises(LostProcess, match=r"^searching: a process was lost") as raised,
        in_one_line("searching"),
    ):
        raise error
    assert "\n" not in str(raised.value)
