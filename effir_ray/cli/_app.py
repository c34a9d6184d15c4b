"""The application object, and how every command ends.

A command parses its options, calls one function of the library and shows the result. What the user did
wrong ends it with one clear line and exit code 2, Ctrl-C with 130, SIGTERM with 143, a run that failed for a
stated reason with 1. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import inspect
import os
import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from effir_ray.errors import InputError, LostProcess, TrialFailure, is_disk_full
from effir_ray.storage import redacted

_WRONG_PLACE = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    }
)
"""What a path the user chose can be wrong for."""


_stopped_by: list[int] = []
"""The signal that ended this process, where it was not Ctrl-C."""


def stop(number: int, _frame: Any) -> None:
    """Handler of SIGTERM, which schedulers and service managers send: the same end as by Ctrl-C."""
    signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the tidying up
    _stopped_by.append(number)
    raise KeyboardInterrupt


class Commands(TyperGroup):
    """A command group that turns the library's exceptions into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            _fail(_message(error), code=2)
        except (TrialFailure, LostProcess) as error:
            _fail(_message(error), code=1)
        except KeyboardInterrupt:
            number = _stopped_by[0] if _stopped_by else signal.SIGINT
            _fail("interrupted; what is finished is kept", code=128 + number)
        except BrokenPipeError:  # the reader of a pipe has left, as in `effir-ray query ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            _explain(error)
            raise


def _explain(error: Exception) -> None:
    """End with one line where the file system, not the program, is what is wrong; else return."""
    if is_disk_full(error):
        place = getattr(error, "filename", None) or "while writing"
        _fail(f"no disk space left ({place}); free some and run it again", code=2)
    if isinstance(error, OSError) and error.filename and error.errno in _WRONG_PLACE:
        _fail(f"{error.filename}: {os.strerror(error.errno)}; choose another place", code=2)


def _message(error: Exception) -> str:
    """Ray wraps what a worker raised; its ``cause`` is the original, without the remote traceback. What the
    user typed is repeated without keys."""
    return redacted(str(getattr(error, "cause", None) or error))


def _fail(message: str, *, code: int) -> None:
    typer.echo(f"effir-ray: {message}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    name="effir-ray",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def flowing(text: str) -> str:
    """A docstring whose paragraphs are as wide as the terminal; rich would keep the ends of our lines and
    break each once more. What begins with a backspace character stays as it is, as typer has it."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else " ".join(part.split()) for part in paragraphs)


@app.callback()
def root() -> None:
    """Finds the smallest and fastest dense retriever hidden in a language model.

    It drops attention, MLP or whole-block sublayers of a Transformer and narrows
    its MLPs (EffiR, arXiv 2512.20612), fine-tunes what is left, measures quality,
    size and speed, and searches for the best trade-offs, on a laptop or a cluster.

    \b
    [bold]Start here[/bold]
    effir-ray demo                       a real search in ten to twenty minutes
    effir-ray shrink MODEL --texts corpus.jsonl --out smaller
    effir-ray search SPACE.yaml --out runs/mine
    effir-ray pareto runs/mine           what came out, as a table
    effir-ray report runs/mine           ... as an interactive page
    effir-ray COMMAND --help             options and examples of a command
    """
