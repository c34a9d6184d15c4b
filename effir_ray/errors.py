"""The ways a run ends that are not bugs, and the one resource whose end has many names."""

from __future__ import annotations

import errno
import re

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_FULL_IN_WORDS = ("no space left on device", "os error 28", "database or disk is full")


class _Told(Exception):
    """One line for a person: what a name or a file's content brings along of line ends and control characters
    stands there escaped."""

    def __init__(self, message: str) -> None:
        super().__init__(_CONTROL.sub(lambda found: repr(found[0])[1:-1], message))


class InputError(_Told):
    """Something the user gave is wrong. The message says what was found, what was expected and the fix.

    The command line prints it as one line and exits with code 2.
    """


class TrialFailure(_Told):
    """A trial cannot give a trustworthy score (NaN loss, collapsed embeddings, ...).

    The study records a failed row with this message as its reason and goes on.
    """


class LostProcess(_Told):
    """A process that the work needs was killed, again and again: not the work's own fault.

    What is finished is kept, and the same command goes on from there. The command line prints the message as
    one line and exits with code 1.
    """


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or one it came from, says that the disk or a quota is full.

    Not only OSErrors do: safetensors and SQLite raise types of their own, which are known by their words.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if getattr(link, "errno", None) in _FULL or any(
            words in str(link).lower() for words in _FULL_IN_WORDS
        ):
            return True
        link = link.__cause__ or link.__context__
    return False
