"""A full disk is known by whatever name it comes."""

import errno
import sqlite3

import pytest

from effir_ray.errors import InputError, LostProcess, TrialFailure, is_disk_full


def _chained(cause: Exception, *, explicit: bool) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("a step failed") from (error if explicit else None)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_recognised_through_other_errors(error: Exception) -> None:
    assert is_disk_full(error)
    assert is_disk_full(_chained(error, explicit=True))
    assert is_disk_full(_chained(error, explicit=False))


def test_what_a_person_is_told_is_one_line_whatever_a_file_is_called() -> None:
    for kind in (InputError, TrialFailure, LostProcess):
        said = str(kind("/data/\n\x1b[2J\u2028ö: no such file"))
        assert said == r"/data/\n\x1b[2J\u2028ö: no such file"


def test_other_errors_are_not_a_full_disk() -> None:
    circle = ValueError("a")
    circle.__cause__ = circle
    for error in (OSError(errno.EACCES, "Permission denied"), ValueError("28"), circle):
        assert not is_disk_full(error)
