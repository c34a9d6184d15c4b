"""Running a study, here or as a job of a cluster: Ray Tune works through the proposals, rows are its
memory."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from effir_ray import storage
from effir_ray.cluster.connection import connect, is_connected, is_private
from effir_ray.cluster.devices import avoided, avoiding, machine, reserving, sharing, uses_gpus
from effir_ray.cluster.jobs import submit
from effir_ray.cluster.lost import is_lost_process, outlive_ray, own_disks, unfit_node, watched
from effir_ray.cluster.probe import Shared, check_shared, everywhere
from effir_ray.compression.planning import with_dimension
from effir_ray.compression.vocabulary import check_size
from effir_ray.config import Config, load_yaml
from effir_ray.data.datasets import load_dataset
from effir_ray.errors import InputError, LostProcess
from effir_ray.hardware import PINNED, Hardware
from effir_ray.leases import Lease
from effir_ray.mirrors import Mirror
from effir_ray.models.accounting import embedding_size
from effir_ray.models.loading import load_config, load_present, load_text_side
from effir_ray.progress import progress_stream
from effir_ray.provenance import __version__
from effir_ray.results import store
from effir_ray.results.query_scores import QUERY_SCORES
from effir_ray.results.schema import TrialRow
from effir_ray.results.tables import compact
from effir_ray.search.activity import remove_leftovers, reporting
from effir_ray.search.disk import Collector
from effir_ray.search.display import StudyDisplay
from effir_ray.search.dry_run import dry_run, load_backbones
from effir_ray.search.folder import (
    STAGES_FOLDER,
    STUDY_FILE,
    StudyRecord,
    claim,
    exclusive,
    find,
    finished_rows,
    pull,
    pull_rows,
    record_of,
    stages_of,
)
from effir_ray.search.footprint import Footprint, check_space
from effir_ray.search.optuna_study import STORAGE, readable, write_all_trials
from effir_ray.search.proposals import Proposals, TrialRequest
from effir_ray.search.shapes import solver
from effir_ray.search.space import SearchSpace
from effir_ray.search.stage_graph import Sources, Split, study_contents
from effir_ray.search.time_estimate import TimeEstimate
from effir_ray.search.trial import failed_row, failure_reason, reads_of, run_trial, sources_of
from effir_ray.search.trial_config import TrialConfig
from effir_ray.stages import size_on_disk

_SPACE_FILE = "space.yaml"  # a job's search space travels with it
_TRIAL_CPUS = 0.01
"""A trial only drives; its training and encoding workers ask for the CPUs. A whole CPU for the driver would
leave two training workers on a 2-core machine waiting for ever."""

_ALL = 10**9  # Tune's number of samples: the searcher says when the study is finished


class StudyResult(Config):
    """What a search leaves. ``front``: ids of the dev trials that meet the constraints and no other beats,
    best in the first objective first; ``shortfall``: why fewer trials ran than were asked for, else empty.
    ``kept_bytes`` of models and embeddings of trials are on disk, ``freed_bytes`` were deleted (the space's
    ``keep``)."""

    out: Path | str
    study: str
    trials: int
    failed: int
    front: tuple[str, ...]
    shortfall: str = ""
    kept_bytes: int = 0
    freed_bytes: int = 0


def search(
    space: SearchSpace | Path | str, out: Path | str, *, resume: bool = False, address: str | None = None
) -> StudyResult:
    """Run every trial of ``space`` that has no row in ``out`` yet, then the test scores of the front and of
    the full model.

    Raises InputError for a space that cannot run and for a folder that belongs to another study, is in use,
    or holds this study already while ``resume`` is False, and for an ``address`` that cannot be used;
    TrialFailure when the full model cannot be measured.
    """
    space = space if isinstance(space, SearchSpace) else load_yaml(Path(space), SearchSpace)
    study = _study_at(out)
    folder = study.folder
    _check_address(address)
    preview = dry_run(space)
    sources = _checked_sources(space)
    need = Footprint(peak=preview.peak_bytes, end=preview.end_bytes)
    check_space(folder, need, size_on_disk(folder / STAGES_FOLDER))
    contents = study_contents(sources)
    storage.check(study.uri)
    pull(study)
    find(folder, space, contents, resume=resume)
    given = is_connected()
    connect(address)  # before anything is written: a mistyped address leaves no claimed folder
    shared = check_shared(
        None if study.uri else folder, reads_of(space.of(name) for name in space.backbone_names)
    )
    with ExitStack() as stack:
        if space.device == "cuda" and is_private() and not uses_gpus():
            raise InputError(
                "device is cuda, and Ray finds no GPU on this machine; leave device out, or name a cluster "
                "that has some (--address)"
            )
        if space.device != "auto":
            stack.enter_context(reserving(space.device == "cuda"))
        return _search(space, study, sources, contents, shared, resume=resume, given=given, address=address)


def _search(
    space: SearchSpace,
    study: Mirror,
    sources: dict[str, Sources],
    contents: dict[str, str],
    shared: Shared | None,
    *,
    resume: bool,
    given: bool,
    address: str | None,
) -> StudyResult:
    """Connected, and with everything checked that takes no device. ``given``: Ray was there before."""
    folder, here = study.folder, machine()
    if space.device not in ("auto", here.device):
        raise InputError(
            f"device is {space.device}, and what this Ray starts for it computes on {here.device}: its "
            "workers see other devices than it counts"
        )
    _check_precisions(space, here)
    record = claim(folder, space, contents, resume=resume, here=here)
    study.push(folder / STUDY_FILE)
    _say_other_version(record)
    space = space.model_copy(update={"threads": record.threads})
    sources = {
        name: replace(own, device=here.device, dtype=here.precision, machine=here.name)
        for name, own in sources.items()
    }
    with exclusive(study) as held:
        remove_leftovers(study)
        backbones = load_backbones(space)
        stages = stages_of(study)
        solve = solver(space, backbones, stages, sources)
        proposals = Proposals(space, folder, finished_rows(folder, space), backbones, solve)
        collector = Collector(proposals, stages, sources)
        collector.collect()  # what a killed run had no time for
        estimate = TimeEstimate(stages, backbones, sources)
        with reserving(uses_gpus()):
            _work(proposals, study, estimate, collector, here, shared, address, held, restart=not given)
        held.check()
        remove_leftovers(study)
        stages.remove_locks()
        pull_rows(study)
        for kind in (store.ROWS, QUERY_SCORES):
            compact(folder, kind)
            study.push_files(kind.name)
        with readable(folder / STORAGE):
            write_all_trials(space, folder, _all_rows(proposals))
        study.push(folder / STORAGE)
        return _result(proposals, study, collector)


class Cleaned(Config):
    """``freed_bytes`` were deleted now, ``kept_bytes`` of models and embeddings are still there."""

    freed_bytes: int
    kept_bytes: int


def clean(out: Path | str, *, keep: Literal["front", "none"] = "front") -> Cleaned:
    """Delete the models and embeddings of a study that is not running: those of trials that are not on its
    front, or all that have their test scores too. Rows and scores stay, and ``--resume`` goes on.

    Raises InputError where there is no study, it is running, or what it reads is not what it read.
    """
    study = _study_at(out)
    folder = study.folder
    pull(study)
    record = record_of(folder)
    space = record.space.model_copy(update={"threads": record.threads, "keep": keep})
    device, _, dtype = record.computes.partition(", ")
    read = _checked_sources(space)
    sources = {name: replace(own, device=device, dtype=dtype) for name, own in read.items()}
    if study_contents(sources) != record.contents or not record.computes:
        raise InputError(
            f"{study}: what the study reads has changed since it began, or another version began it: which "
            "stages are whose is not known any more; delete folders of stages/ by hand, or the whole study"
        )
    with exclusive(study):
        proposals = Proposals(space, folder, finished_rows(folder, space), load_backbones(space))
        collector = Collector(proposals, stages_of(study), sources)
        before = collector.kept_bytes()
        collector.collect()
        collector.store.remove_locks()
        left = collector.kept_bytes()
    return Cleaned(freed_bytes=before - left, kept_bytes=left)


def submit_search(
    space: Path, out: str | None = None, *, address: str | None = None, resume: bool = False
) -> str:
    """Start ``effir-ray search space --out out`` on the cluster; returns the job's id.

    ``out`` (a path or a URI) and data sets must be where the cluster sees them. Without ``out`` it is the
    folder of the study's name in ``$EFFIR_RAY_OUT``, where this cluster's studies lie. Raises InputError for
    a space that cannot run, for no or a relative ``out`` and when no job server answers.
    """
    loaded = load_yaml(space, SearchSpace)
    out = out or _cluster_folder(loaded.name)
    dry_run(loaded.model_copy(update={"priors": ()}))  # they may lie where only the cluster sees them
    if not storage.is_uri(out) and not PurePosixPath(out).is_absolute():
        raise InputError(
            f"--out {out}: a job's own folder is gone when it ends; give the absolute path of a folder that "
            "every node of the cluster sees, or a URI of an object store"
        )
    return submit(
        ["search", _SPACE_FILE, "--out", out, *(["--resume"] if resume else [])],
        name=f"effir-ray-{loaded.name}",
        files={_SPACE_FILE: space.read_text(encoding="utf-8")},
        address=address,
    )


def _cluster_folder(study: str) -> str:
    place = os.environ.get("EFFIR_RAY_OUT")
    if not place:
        raise InputError(
            "submit needs --out FOLDER, where every node of the cluster sees it, or EFFIR_RAY_OUT: the "
            "folder there that all studies lie in, each in one of its name"
        )
    return storage.join(place, study)


def _work(
    proposals: Proposals,
    study: Mirror,
    estimate: TimeEstimate,
    collector: Collector,
    here: Hardware,
    shared: Shared | None,
    address: str | None,
    held: Lease,
    *,
    restart: bool,
) -> None:
    """Run what is left; ``restart``: when Ray itself is lost, start or reach it anew and go on.

    Raises LostProcess when that does not help, and when another search has taken the folder over.
    """

    def work() -> None:
        if not proposals.complete:
            _run(proposals, study, StudyDisplay(proposals, estimate, study), collector, here, shared, held)

    def between() -> None:
        held.check()
        remove_leftovers(study)
        proposals.take_back()

    outlive_ray(work, address, restart=restart, goes_on=f"--resume goes on with {study}", between=between)


def _run(
    proposals: Proposals,
    study: Mirror,
    display: StudyDisplay,
    collector: Collector,
    here: Hardware,
    shared: Shared | None,
    held: Lease,
) -> None:
    """One Tune run. Its trial processes are used again from trial to trial: a start costs many seconds."""
    _quiet()
    from ray import tune

    from effir_ray.search.searcher import ScheduleSearcher, StillHeld

    def changed(request: TrialRequest, row: TrialRow | None) -> None:
        display.changed(request, row)
        if row is not None:
            collector.collect()

    space = proposals.space
    searcher = ScheduleSearcher(proposals, study, changed)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, out=str(study), space=space, here=here, gpus=uses_gpus(), shared=shared),
        _trial_resources,
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=_ALL,
            max_concurrent_trials=space.concurrency,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(study.folder), verbose=0, stop=StillHeld(held)
        ),
    )
    with display:
        try:
            watched(tuner.fit)
        except BaseException as error:  # Tune's loop stays behind, and may wake up
            searcher.fatal = error if isinstance(error, Exception) else LostProcess("stopped")
            raise
    if searcher.fatal is not None:
        raise searcher.fatal


def _trial(
    config: dict[str, Any], out: str, space: SearchSpace, here: Hardware, gpus: bool, shared: Shared | None
) -> None:
    """What a trial process does with one piece of work. The row is on disk before Tune hears of it.

    ``gpus``: whether the study computes on GPUs."""
    from ray import tune

    from effir_ray.search.searcher import ABORT, FILE, LOST, ROW, UNFIT

    trial, split = TrialConfig.model_validate_json(config["trial"]), _split(config["split"])
    study = Mirror.of(out)
    folder = study.folder
    title = space.title(trial.name, trial.backbone)
    try:
        with (
            everywhere(shared),
            reserving(gpus),
            sharing(space.resources.gpus),
            avoiding(config["avoid"]),
            own_disks(folder),
            reporting(study, trial.id, title, split) as listener,
        ):
            rows = run_trial(
                trial,
                stages_of(study),
                split=split,
                study=space.name,
                attempt=config["attempt"],
                listener=listener,
                out=folder,
                here=here,
                wrote=study.push,
            )
    except InputError as error:  # wrong for every trial: schedules were checked before
        tune.report({ABORT: str(error)})
        return
    except Exception as error:
        if isinstance(error, LostProcess) or is_lost_process(error):
            tune.report({LOST: failure_reason(error), UNFIT: unfit_node(error)})
            return
        rows = [failed_row(trial, split, space.name, error, attempt=config["attempt"])]
    file = store.append(folder, rows)
    study.push(file)
    row = rows[0]
    numbers = {name: value for name, value in row.model_dump().items() if isinstance(value, int | float)}
    tune.report({**numbers, ROW: row.model_dump_json(), FILE: file.name})


def _trial_resources(config: dict[str, Any]) -> Any:
    """Of the process of a trial with this configuration; trials with other ones get another process."""
    from ray.tune import PlacementGroupFactory

    selector = avoided(config["avoid"], "CPU")
    elsewhere = {"bundle_label_selector": [selector]} if selector else {}
    return PlacementGroupFactory([{"CPU": _TRIAL_CPUS}], **elsewhere)


def _split(name: str) -> Split:
    return "test" if name == "test" else "dev"


def _quiet() -> None:
    """Ray's own reports go to its log files; what matters is in the rows and on the display."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its newer output prints tables even when told to be silent
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths in a search space stay valid
    # Its loggers would only repeat the rows, and a full disk makes each write a traceback of its own.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the study at once; --resume goes on
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its ERROR: a traceback for each lost process


def _study_at(out: Path | str) -> Mirror:
    return Mirror.of(out if storage.is_uri(out) else Path(out).resolve())


def _check_precisions(space: SearchSpace, here: Hardware) -> None:
    """GPUs multiply in the type that a model was loaded in."""
    axis = space.axes.get("precision")
    asked = {candidate.precision for candidate in space.always()} | set(axis.values() if axis else ())
    if here.device != "cpu" and (named := sorted(map(str, asked - {"auto"}))):
        raise InputError(
            f"precision {', '.join(named)} is for CPUs, this study computes on {here.name}: leave it out, "
            f"or say for all with {PINNED}"
        )


def _check_address(address: str | None) -> None:
    target = address or os.environ.get("RAY_ADDRESS") or ""
    if target.startswith("ray://"):
        raise InputError(
            f"{target}: a search does not run through the Ray client; use --address auto on a node of the "
            "cluster, or effir-ray submit from elsewhere"
        )


def _say_other_version(record: StudyRecord) -> None:
    stream = progress_stream()
    if stream is not None and record.effir_ray != __version__:
        print(
            f"This study was started with effir-ray {record.effir_ray}, and goes on with {__version__}: "
            "stages that changed since are built again.",
            file=stream,
        )


def _checked_sources(space: SearchSpace) -> dict[str, Sources]:
    """What the study reads, for each backbone. Raises InputError for what is not there, dev and test splits
    included."""
    sources = {name: sources_of(space.of(name)) for name in space.backbone_names}
    for name in space.dataset_names:
        dataset = load_dataset(name)
        dataset.qrels("dev")
        dataset.qrels("test")
    for name in space.backbone_names:
        listed = [each for each in space.listed() if each.backbone in (None, name)]
        if wanted := [each for each in listed if each.vocabulary]:
            tokenizer, _ = load_text_side(name)
            for candidate in wanted:
                check_size(tokenizer, candidate.vocabulary)
        if wanted := [each for each in listed if each.dimension]:
            first_blocks = space.of(name).first_blocks
            config, present = (load(name, first_blocks=first_blocks) for load in (load_config, load_present))
            for candidate in wanted:
                with_dimension(present, candidate, embedding_size(config, present))
    return sources


def _all_rows(proposals: Proposals) -> list[TrialRow]:
    return [*proposals.rows.values(), *proposals.repeated.values()]


def _result(proposals: Proposals, study: Mirror, collector: Collector) -> StudyResult:
    dev = [row for row in _all_rows(proposals) if row.split == "dev"]
    return StudyResult(
        out=study.uri or study.folder,
        study=proposals.space.name,
        trials=len(dev),
        failed=sum(row.status == "failed" for row in dev),
        front=tuple(config.id for config in proposals.front()),
        shortfall=proposals.shortfall,
        kept_bytes=collector.kept_bytes(),
        freed_bytes=collector.store.freed_bytes(),
    )
