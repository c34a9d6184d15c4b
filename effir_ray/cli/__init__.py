"""The command line: ``effir-ray COMMAND``. Start-up imports neither torch, transformers nor ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from effir_ray.cli import jobs, machine, models, results, retrieval, search, training
from effir_ray.cli._app import app, flowing, stop

__all__ = ["app", "main"]

_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start": (machine.demo, machine.doctor),
    "Search": (search.search, search.repeat, search.clean),
    "Results": (results.pareto, results.compare, results.query, results.report, results.export),
    "Models": (models.shrink, models.analyze, models.compress),
    "Training": (training.train, training.mine, training.annotate),
    "Retrieval": (retrieval.encode, retrieval.evaluate, retrieval.measure, retrieval.mteb),
    "Cluster": (jobs.submit, jobs.jobs, jobs.logs, jobs.stop, jobs.results),
}
for _panel, _functions in _COMMANDS.items():
    for _function in _functions:
        app.command(rich_help_panel=_panel)(_function)
app.add_typer(machine.data, name="data", rich_help_panel="Start")
for _info in (*app.registered_commands, *machine.data.registered_commands):
    _info.help = flowing(_info.callback.__doc__ or "") if _info.callback else None

_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Our own progress display is the one that counts; a user's setting of these variables wins."""


def main() -> None:
    """Entry point of ``effir-ray``."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, stop)
    app()
