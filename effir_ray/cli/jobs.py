"""submit, jobs, logs, stop, results: searches on a Ray cluster, through its job server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

import effir_ray
from effir_ray.cli._options import AsJson, JobAddress, out_option
from effir_ray.cli._output import say, show_json, show_table

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that submit printed or jobs lists.")]


def submit(
    space: Annotated[Path, typer.Argument(help="YAML of a search space.")],
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder of the study as the cluster sees it, on shared storage, or its URI in an object "
            "store. $EFFIR_RAY_OUT/NAME, with the study's name, when left out.",
            show_default=False,
        ),
    ] = None,
    address: JobAddress = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in --out.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the output until the job ends.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a search as a job on a Ray cluster; it goes on when this terminal closes.

    Ships the search space and this version of effir-ray; the cluster needs the packages it depends on
    (cluster/ has an image). With --follow the exit code is that of the job.

    \b
    [bold]Examples[/bold]
    effir-ray submit search_spaces/mistral-7b.yaml --address http://head:8265 --out /shared/mistral
    effir-ray submit search_spaces/demo.yaml --out /tmp/demo --follow
    EFFIR_RAY_OUT=/shared effir-ray submit search_spaces/demo.yaml --address http://head:8265
    """
    job = effir_ray.submit_search(space, out, address=address, resume=resume)
    if as_json:
        show_json({"job": job})
    else:
        say(f"Job: {job}")
    if follow:
        status = effir_ray.follow_job(job, address=address, write=lambda text: typer.echo(text, nl=False))
        if status != "SUCCEEDED":
            typer.echo(f"effir-ray: job {job} ended as {status}", err=True)
            raise typer.Exit(1)


def jobs(address: JobAddress = None, as_json: AsJson = False) -> None:
    """List the jobs of a cluster, newest first.

    \b
    [bold]Examples[/bold]
    effir-ray jobs --address http://head:8265
    """
    found = effir_ray.list_jobs(address=address)
    if as_json:
        show_json(found)
        return
    show_table(
        ["job", "status", "started", "seconds", "command"],
        [(job.id, job.status, job.started, job.seconds, job.command) for job in found],
    )


def logs(
    job: JobId,
    address: JobAddress = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
) -> None:
    """Print what a job has written.

    \b
    [bold]Examples[/bold]
    effir-ray logs effir-ray-demo-4f2c --follow
    """
    if follow:
        effir_ray.follow_job(job, address=address, write=lambda text: typer.echo(text, nl=False))
    else:
        typer.echo(effir_ray.job_logs(job, address=address), nl=False)


def stop(job: JobId, address: JobAddress = None, as_json: AsJson = False) -> None:
    """Stop a job. What its search has finished is kept; submit it again with --resume.

    \b
    [bold]Examples[/bold]
    effir-ray stop effir-ray-demo-4f2c
    """
    status = effir_ray.stop_job(job, address=address)
    if as_json:
        show_json({"job": job, "status": status})
    else:
        say(f"{job}: {status}")


def results(
    job: JobId,
    out: Annotated[Path | None, out_option("Folder to copy the tables to.")] = None,
    address: JobAddress = None,
    as_json: AsJson = False,
) -> None:
    """Say where the tables of a job's study lie, or copy them here with --out.

    Rows appear while the job runs; the copy can be repeated. Copying needs the study's folder to be mounted
    on this machine at the same path.

    \b
    [bold]Examples[/bold]
    effir-ray results effir-ray-demo-4f2c
    effir-ray results effir-ray-demo-4f2c --out runs/demo
    """
    found = effir_ray.fetch_results(job, out, address=address)
    if as_json:
        show_json(found)
        return
    say(
        f"{job} ({found.status}): {found.place}" + ("" if found.seen else ", which this machine does not see")
    )
    if found.files:
        say(f"{len(found.files)} files copied to {out}")
    if found.seen:
        say(f"Next: effir-ray pareto {shlex.quote(str(out or found.place))}")
