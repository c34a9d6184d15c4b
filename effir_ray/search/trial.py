"""One trial: run the stages that do not exist yet, and make its row of what they left; or do so again."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from effir_ray import hardware
from effir_ray.cluster.connection import connect
from effir_ray.cluster.devices import machine, on_device, reserving, sharing, uses_gpus
from effir_ray.cluster.lost import own_disks
from effir_ray.cluster.probe import Find, check_shared, everywhere, is_unused
from effir_ray.data.pair_stream import source_files, source_fingerprint
from effir_ray.errors import InputError, LostProcess, TrialFailure
from effir_ray.evaluation.rows import make_row, mean_columns
from effir_ray.leases import aloud
from effir_ray.models.names import backbone_fingerprint, model_reads
from effir_ray.results import query_scores, store
from effir_ray.results.query_scores import QueryScores
from effir_ray.results.schema import TrialRow, sample_in_words
from effir_ray.results.selection import rows_of_trial
from effir_ray.results.tables import Folders
from effir_ray.search.folder import STAGES_FOLDER
from effir_ray.search.model_stages import settle, training_workers
from effir_ray.search.stage_graph import KeyedStage, Sources, Split, Stage, StageTask
from effir_ray.search.trial_config import StudySettings, TrialConfig
from effir_ray.search.trial_stages import trial_stages
from effir_ray.stages import StageStore
from effir_ray.storage import redacted
from effir_ray.training.identity import training_identity, training_reads

Listener = Callable[[str], None]


def run_trial(
    config: TrialConfig,
    stages: StageStore,
    *,
    split: Split = "dev",
    study: str = "",
    attempt: int = 1,
    listener: Listener = lambda stage: None,
    out: Path | None = None,
    here: hardware.Hardware | None = None,
    wrote: Callable[[Path], None] = lambda file: None,
) -> list[TrialRow]:
    """Score ``config`` on ``split``: its row; of several data sets the row of the means, then one for each.

    ``listener`` hears the name of every stage that is really run, or waited for. Scores of single queries go
    to the study's folder ``out``, before anyone writes the rows: none lacks them.
    ``here``: what stages compute on, where that is known. ``wrote`` hears of files of scores.

    Raises InputError when the configuration cannot be (more dropped than there is, ...) and TrialFailure when
    the result cannot be trusted. The number of compute threads is fixed first: sums depend on it.
    """
    settle(config)
    started = time.monotonic()
    sources = sources_of(config, here)
    runner = StageRunner(config, split, stages, listener)
    measured: dict[str, dict[str, Any]] = {name: {} for name in config.dataset_names}
    by_query: dict[str, QueryScores] = {}
    keyed_stages = trial_stages(config, sources, split)
    for keyed in keyed_stages:
        if keyed.stage.columns is not None:  # an end; it pulls in the rest
            stages.bring(runner.make(keyed))
            task = runner.task(keyed, keyed.path(stages))
            columns = keyed.stage.columns(task)
            for name in [keyed.config.dataset] if keyed.stage.each_dataset else config.dataset_names:
                measured[name] |= columns
            if keyed.stage.query_scores is not None:
                by_query[keyed.config.dataset] = keyed.stage.query_scores(task)
    known = dict(_known_columns(config, split, study, attempt))
    if workers := training_workers(keyed_stages, stages):
        known["training_workers"] = json.dumps(workers)
    row = make_row(
        **known,
        **mean_columns([(measured[name], by_query[name]) for name in measured]),
        contents=json.dumps(sources.contents),
        wall_seconds=time.monotonic() - started,
        device_seconds=runner.device_seconds,
    )
    apart = [
        make_row(
            **{**known, "dataset": name}, **measured[name], contents=json.dumps(sources.on(name).contents)
        )
        for name in config.datasets
    ]
    if out is not None:
        for one in apart or [row]:
            wrote(query_scores.append(out, one, by_query[one.dataset]))
    return [row, *apart]


def _build(build: Callable[[StageTask], None], task: StageTask) -> None:
    """``build`` in whatever process it runs in, of a study in an object store on whatever machine."""
    settle(task.config)
    elsewhere = bool(task.store.remote) and not task.out.exists()
    if elsewhere:
        task.out.mkdir(parents=True)
    with own_disks(task.store.root):
        build(task)
    if elsewhere:
        task.store.send(task.out)
        shutil.rmtree(task.out)


class StageRunner:
    """Builds stages of one trial, parents only when they are really needed; adds up the device seconds."""

    def __init__(self, config: TrialConfig, split: Split, store: StageStore, listener: Listener) -> None:
        self.config, self.split, self.store, self.listener = config, split, store, listener
        self.device_seconds = 0.0

    def make(self, keyed: KeyedStage) -> Path:
        """The folder of the stage, built if it is not there."""
        place = keyed.path(self.store)
        if self.store.has(place):
            return place
        for parent in keyed.parents.values():
            self.make(parent)
        stage = keyed.stage
        build = partial(self._build, keyed)
        return self.store.run(
            stage.name,
            keyed.inputs,
            build,
            version=stage.version,
            resumable=stage.resumable,
            waiting=aloud(stage.title, partial(self.listener, keyed.name)),
        )

    def task(self, keyed: KeyedStage, out: Path) -> StageTask:
        """What the stage's functions get, with ``out`` as its folder."""
        parents = {role: parent.path(self.store) for role, parent in keyed.parents.items()}
        return StageTask(
            config=keyed.config,
            split=self.split,
            parents=parents,
            out=out,
            store=self.store,
            inputs=keyed.inputs,
        )

    def _build(self, keyed: KeyedStage, out: Path) -> None:
        self.listener(keyed.name)
        stage, task = keyed.stage, self.task(keyed, out)
        with self._exclusive(stage):
            if stage.on_device(self.config):
                seconds = on_device(_build, stage.build, task).seconds
            else:
                started = time.monotonic()
                _build(stage.build, task)
                seconds = time.monotonic() - started
        self.device_seconds += seconds * stage.workers(task)

    @contextmanager
    def _exclusive(self, stage: Stage) -> Iterator[None]:
        """Exclusive stages of a study's trials take turns on a machine, and have a whole GPU."""
        if not stage.exclusive:
            yield
            return
        waiting = aloud(f"its turn on {platform.node()}", partial(self.listener, stage.name))
        with self.store.lease(platform.node(), waiting), sharing(1):
            yield


def failed_row(
    config: TrialConfig, split: Split, study: str, error: BaseException | str, *, attempt: int = 1
) -> TrialRow:
    """The row of a trial that could not be measured."""
    reason = error if isinstance(error, str) else failure_reason(error)
    return make_row(**_known_columns(config, split, study, attempt), status="failed", reason=reason)


def sources_of(config: StudySettings, here: hardware.Hardware | None = None) -> Sources:
    """Fingerprints of everything from outside that a trial or a whole study reads, and ``here`` (this
    machine, unless told), what it computes on. Raises InputError for what is not there."""
    here = here or hardware.detect()
    return Sources(
        backbone=backbone_fingerprint(config.backbone),
        dataset=source_fingerprint(config.dataset),
        datasets={name: source_fingerprint(name) for name in config.datasets},
        calibration=source_fingerprint(config.calibration_from or config.dataset),
        trainings={name: training_identity(training) for name, training in config.trainings.items()},
        device=here.device,
        dtype=here.precision,
        machine=here.name,
    )


def reads_of(configs: Iterable[StudySettings]) -> dict[str, Find]:
    """All that ``sources_of`` looks at: what it is called -> its files, wherever that is called."""
    reads: dict[str, Find] = {}
    for config in configs:
        reads |= model_reads(config.backbone)
        for name in dict.fromkeys((*config.dataset_names, config.calibration_from or config.dataset)):
            reads[f"data '{name}'"] = partial(source_files, name)
        for training in config.trainings.values():
            reads |= training_reads(training)
    return reads


def _known_columns(config: TrialConfig, split: Split, study: str, attempt: int) -> Mapping[str, Any]:
    """The columns that are known before anything ran."""
    return {
        "study": study,
        "trial_id": config.id,
        "trial": config.model_dump_json(),
        "schedule": config.name,
        "backbone": config.backbone,
        "dataset": config.measured_on,
        "split": split,
        "seed": config.seed,
        "sample": sample_in_words(config.model_dump(include={"dev", "test", "sample_seed"}), split),
        "attempt": attempt,
        "recovered": config.recovery is not None,
    }


def failure_reason(error: BaseException) -> str:
    """One line. Our own errors speak for themselves; others are named by their class, and of a traceback
    that came from another process only its last line, the error there, is kept."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if isinstance(error, InputError | TrialFailure | LostProcess):
        return redacted(" ".join(lines))
    return redacted(f"{type(error).__name__}: {lines[-1] if len(lines) > 2 else ' '.join(lines)}")


def repeat(
    results: Folders,
    trial: str,
    out: Path | str,
    *,
    split: str | None = None,
    address: str | None = None,
) -> list[tuple[TrialRow, TrialRow]]:
    """Do the trial of these rows once more, every stage anew in ``out``: (row then, row now) for each split
    and data set.

    ``trial`` is a trial id, which may be shortened as long as one trial matches. Scores come out the same;
    speeds are measured anew. Raises InputError when there is no such row, it failed, or ``out`` is not empty.
    """
    folder = Path(out).resolve()
    originals = _measured(store.read(results), trial, split)
    if not is_unused(folder):
        raise InputError(f"{folder} is not empty; a repetition starts from nothing, choose another --out")
    connect(address)
    reads = reads_of(TrialConfig.of(original) for original in originals)
    stages, here = StageStore(folder / STAGES_FOLDER), machine()
    repeated: dict[tuple[str, str, str], TrialRow] = {}
    with everywhere(check_shared(folder, reads)), reserving(uses_gpus()):
        for original in originals:
            if _measures(original) in repeated:
                continue
            rows = run_trial(
                TrialConfig.of(original),
                stages,
                split="test" if original.split == "test" else "dev",
                study=original.study,
                out=folder,
                here=here,
            )
            store.append(folder, rows)
            repeated |= {_measures(row): row for row in rows}
    return [(original, repeated[_measures(original)]) for original in originals]


def _measures(row: TrialRow) -> tuple[str, str, str]:
    return row.study, row.dataset, row.split


def _measured(table: Any, trial: str, split: str | None) -> list[TrialRow]:
    rows = rows_of_trial(store.latest(table), trial, split)
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        raise InputError(
            f"trial {rows[0].trial_id} failed ({failed[0].reason}): there are no scores to compare with"
        )
    return rows
