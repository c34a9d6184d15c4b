"""Fine-tuning a model on Ray Train: starts the workers, follows their rows, puts the result in place."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from effir_ray import storage
from effir_ray.cluster.connection import connect, disconnect, is_connected
from effir_ray.cluster.devices import machine, on_device, reserving, room
from effir_ray.cluster.lost import check_local_processes, is_lost_process, pause_seconds, watched
from effir_ray.cluster.probe import check_shared, current, everywhere
from effir_ray.config import Config, parse
from effir_ray.errors import InputError, LostProcess, TrialFailure
from effir_ray.files import write_whole
from effir_ray.models.loading import load_config
from effir_ray.models.names import PACKAGED, backbone_fingerprint, model_reads
from effir_ray.readers import read_json_object
from effir_ray.stages import StageStore
from effir_ray.training.config import STATE, STUDY_TEACHER, TrainConfig
from effir_ray.training.identity import training_identity, training_reads
from effir_ray.training.run.fault_tolerance import (
    DEV_SCORE,
    SETTINGS,
    SMALLEST_BUDGET,
    clear_staging,
    halve,
    halved_budget,
)
from effir_ray.training.run.history import HISTORY, HistoryWriter, follow, read_history
from effir_ray.training.run.loop import train_worker
from effir_ray.training.run.rendezvous import torch_config
from effir_ray.training.run.reservations import NamedReservation, Trainer, release
from effir_ray.training.run.trackers import Board, check_installed, tracked
from effir_ray.training.supervision.training_data import needs_model, prepare

_RESULT, _TRACKING = "result.json", "tracking.json"
RESIZE_SECONDS = 60.0
"""So often a run whose number of workers may change looks for room for more."""

_DATA = ("stdlib",)  # names of data sets that are not paths, whatever lies here


class _Identity(Config):
    settings: dict[str, Any] = Field(default_factory=dict)
    contents: dict[str, Any] = Field(default_factory=dict)


class _Place(Config):
    model_config = ConfigDict(frozen=True, extra="ignore")

    storage_path: str | None = None


class TrainRecord(Config):
    """``training.json``: which run a folder holds. Versions before this one wrote no ``identity``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    config: _Place
    identity: _Identity = Field(default_factory=_Identity)


class TrainOutcome(Config):
    """``result.json``: what ``TrainResult`` says beside the rows."""

    step: int
    seconds: float
    engine: str


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """``history``: one row a step. ``engine`` names what ran, and why if it is not DeepSpeed.

    ``step``: after how many steps the weights in ``checkpoint`` were taken (the best dev score's, or all).
    """

    checkpoint: Path
    step: int
    history: list[dict[str, Any]]
    seconds: float
    engine: str


def train(
    model: str | Path,
    config: TrainConfig,
    out: Path,
    *,
    address: str | None = None,
    resume: bool = True,
    stages: StageStore | None = None,
    track: Collection[str] = (),
    begun: Path | None = None,
) -> TrainResult:
    """Fine-tune ``model`` (any name or path that ``load_retriever`` takes) into ``out/checkpoint``.

    Run again with the same arguments it goes on from the newest training checkpoint, or returns at once when
    it had finished; ``resume=False`` starts over. Works in a script, a notebook and inside a Ray Tune trial.
    ``stages`` keeps mined negatives and teacher embeddings (by default below ``out``).
    ``begun``: the folder of a run of the same model and settings that ``stop_after`` ended earlier; its steps
    are not done again, and the weights are those of a run that was not stopped.
    ``track``: "mlflow" and "wandb" (Weights & Biases), where the curves are then shown too.

    Raises InputError for data or settings that cannot work (a folder of another run included) and
    TrialFailure when the weights can no longer be trusted; LostProcess when processes are lost again and
    again, or another process took over the stage of ``stages`` that ``out`` is.
    """
    check_installed(track)
    if config.distillation.teacher == STUDY_TEACHER:
        raise InputError(
            f"distillation.teacher: '{STUDY_TEACHER}' is a study's own full model, known in a study alone; "
            "name a model or a checkpoint folder"
        )
    if config.stop_after == 0:
        raise InputError("stop_after is 0: nothing would be trained; expected a number of steps")
    if storage.is_uri(out):
        raise InputError(f"out is {out}: expected a folder; storage_path keeps checkpoints in object stores")
    out = Path(out).absolute()
    stages = stages or StageStore(out / "stages")
    model, config = _absolute(str(model), PACKAGED), with_absolute_paths(config)
    _check_ladder(model, config)
    job = _open(out, model, config, resume)
    if (out / _RESULT).is_file():
        return _finished(out)
    job["begun"] = _go_on_from(begun, out) if begun is not None else None
    job["lease"] = lease = stages.lease_of(out)
    began = time.monotonic()
    given = is_connected()
    connect(address)
    reconnect = None if given else partial(connect, address)
    with everywhere(check_shared(out, model_reads(model) | training_reads(config))):
        outcome, state = _trained(job, config, out, stages, track, reconnect)
    if config.stop_after is not None:
        _copy(state, out / STATE)
    if lease is not None:
        lease.check()
    storage.fetch(job["saved"], out / "checkpoint")
    result = {**outcome, "seconds": time.monotonic() - began}
    _write_json(out / _RESULT, result)
    storage.remove(job["run"])
    clear_staging(out)
    return _finished(out)


def _trained(
    job: dict[str, Any],
    config: TrainConfig,
    out: Path,
    stages: StageStore,
    track: Collection[str],
    reconnect: Callable[[], None] | None,
) -> tuple[dict[str, Any], Any]:
    """See ``_fit``; ``job`` gets what the workers need besides."""
    with reserving(room(config.fewest_workers, config.cpus_per_worker).gpus):
        job["shared"] = current()
        job |= on_device(prepare, config, stages).value if needs_model(config) else prepare(config, stages)
        settings = {"model": job["model"], **job["config"]}
        with tracked(track, out.name, _tracking_id(out) if track else "", settings) as boards:
            return _fit(job, config, out, boards, reconnect)


def _copy(checkpoint: Any, folder: Path) -> None:
    """Ray's own ``to_directory`` leaves files in the system's temporary folder."""
    from pyarrow import fs

    folder.mkdir(exist_ok=True)
    fs.copy_files(checkpoint.path, str(folder), source_filesystem=checkpoint.filesystem)


def _tracking_id(out: Path) -> str:
    """What trackers know the run in ``out`` by: the same when it goes on, another when it starts over."""
    file = out / _TRACKING
    if not file.is_file():
        _write_json(file, {"id": uuid.uuid4().hex[:12]})
    return str(read_json_object(file).get("id"))


def _absolute(name: str, reserved: Collection[str]) -> str:
    """``name`` as an absolute path where it is that of a file or folder: workers may stand elsewhere."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in reserved and path.exists() else name


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """``config`` with every path that a worker reads or writes made absolute."""
    changes: dict[str, Any] = {"dataset": _absolute(config.dataset, _DATA)}
    if config.dev is not None and config.dev.dataset is not None:
        changes["dev"] = config.dev.model_copy(update={"dataset": _absolute(config.dev.dataset, _DATA)})
    if isinstance(config.held_out, str):
        changes["held_out"] = _absolute(config.held_out, _DATA)
    elif config.held_out is not None:
        changes["held_out"] = tuple(_absolute(name, _DATA) for name in config.held_out)
    if config.distillation.teacher is not None:
        teacher = _absolute(config.distillation.teacher, PACKAGED)
        changes["distillation"] = config.distillation.model_copy(update={"teacher": teacher})
    if config.storage_path is not None and not storage.is_uri(config.storage_path):
        changes["storage_path"] = str(Path(config.storage_path).expanduser().absolute())
    return config.model_copy(update=changes)


def _check_ladder(model: str, config: TrainConfig) -> None:
    """Raise InputError when a rung drops a layer that the model has not got."""
    if config.elastic:
        layers = load_config(model).num_hidden_layers
        for rung in config.elastic:
            rung.check(layers)


def _open(out: Path, model: str, config: TrainConfig, resume: bool) -> dict[str, Any]:
    """Claim the output folder for this run; the description of the run that workers get."""
    identity = training_identity(config)
    identity["contents"]["model"] = backbone_fingerprint(model)
    record = {"model": model, "config": config.model_dump(mode="json"), "identity": identity}
    base, name = _place(out, record)
    storage.check(base)
    run = storage.join(base, name)
    known = out / SETTINGS
    before = _before(known, resume) or record
    if not resume:
        for file in (SETTINGS, _RESULT, HISTORY, _TRACKING):
            (out / file).unlink(missing_ok=True)
        for old in (before, record):
            storage.remove(storage.join(*_place(out, old)))
    elif differing := _differences(before, record):
        raise InputError(
            f"{out} holds a run of another model or other settings or data ({known}: "
            f"{', '.join(differing)}); choose another folder, or start over with resume=False"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_json(known, record)
    saved = storage.join(run, "model")
    return {**record, "out": str(out), "base": base, "name": name, "run": run, "saved": saved}


def _before(file: Path, resume: bool) -> dict[str, Any] | None:
    """What ``training.json`` says of the run that was here; without ``resume`` it need not be readable."""
    if not file.exists():
        return None
    try:
        record = read_json_object(file)
        parse(record, TrainRecord, source=str(file))
    except InputError as error:
        if not resume:
            return None
        raise InputError(f"{error}; choose another folder, or start over with resume=False") from None
    return record


def _place(out: Path, record: dict[str, Any]) -> tuple[str, str]:
    """Where Ray Train keeps the run of a record: folder or URI, and its name there."""
    identity = json.dumps([str(out), record.get("identity")], sort_keys=True)
    base = record["config"].get("storage_path") or str(out / "run")
    return base, hashlib.sha256(identity.encode()).hexdigest()[:12]


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the settings and contents that differ, and of the place of the checkpoints."""
    known, found = before.get("identity", {}), after["identity"]
    names = [key for key, value in found["settings"].items() if known.get("settings", {}).get(key) != value]
    for role in sorted(found["contents"].keys() | known.get("contents", {}).keys()):
        if known.get("contents", {}).get(role) != found["contents"].get(role):
            names.append(f"contents of {role}")
    place = "storage_path"
    return names + [place] * (before["config"].get(place) != after["config"][place])


def _go_on_from(begun: Path, out: Path) -> str:
    """The state of a shorter run, whose rows are the first of this one's."""
    if not (out / HISTORY).exists():
        write_whole(out / HISTORY, (begun / HISTORY).read_text(encoding="utf-8"))
    return str(begun / STATE)


def _fit(
    job: dict[str, Any],
    config: TrainConfig,
    out: Path,
    boards: Sequence[Board],
    reconnect: Callable[[], None] | None,
) -> tuple[dict[str, Any], Any]:
    """Run the workers to the end; what they returned, and their newest checkpoint.

    Out of memory, they run again with half the tokens. A process lost while they start (Ray Train calls that
    its controller's error), the controller itself, or Ray where ``reconnect`` can start or reach it anew, is
    replaced ``max_failures`` times, as Ray Train does with workers later on.
    """
    # The controller looks after its workers this often; its default of 2 s would hold every report up.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Workers stay in the folder they start in: as for any other Ray task, relative names mean the same there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # A busy machine needs more than the default minute until its workers have imported everything.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError, WorkerGroupError

    lost = 0
    _release(job)  # of a driver that was killed
    while True:
        budget = halved_budget(job["run"])
        try:
            with follow(out, f"Training {Path(job['model']).name}", boards):
                result = watched(_trainer(job, config, out).fit)
            break
        except SystemExit:
            raise KeyboardInterrupt from None  # Ray's own handler of Ctrl-C ends the process with code 0
        except (TrainingFailedError, RayError, LostProcess) as error:
            if _ray_is_lost(error):
                lost += 1
                if lost > config.max_failures or reconnect is None:
                    raise _lost(error, config) from error
                disconnect()
                time.sleep(pause_seconds(lost))
                reconnect()
                continue
            _release(job)
            halved = _budget_after(error, job, config)
            if halved is None or halved == budget:
                lost += 1
                if not is_lost_process(error):
                    raise
                if lost > config.max_failures or isinstance(error, WorkerGroupError):
                    raise _lost(error, config) from error
                time.sleep(pause_seconds(lost))
            if halved is not None and halved < SMALLEST_BUDGET:
                raise TrialFailure(f"out of memory even with a token budget of {halved * 2}") from error
    outcome = result.return_value
    if "error" in outcome:
        kind = InputError if outcome["error"] == "InputError" else TrialFailure
        raise kind(outcome["message"])
    return dict(outcome), result.checkpoint


def _release(job: dict[str, Any]) -> None:
    """Give back what this run has reserved; LostProcess where another driver goes on with it."""
    if job["lease"] is not None:
        job["lease"].check()
    release(job["run"])


def _ray_is_lost(error: Exception) -> bool:
    """Whether ``error`` came because a process of Ray's own is gone, not only one of the run's."""
    from ray.exceptions import LocalRayletDiedError, RpcError

    try:
        check_local_processes()
    except LostProcess:
        return True
    return isinstance(error, LostProcess | LocalRayletDiedError | RpcError)


def _lost(error: Exception, config: TrainConfig) -> LostProcess:
    reason = str(error).strip().splitlines()[-1].strip()
    return LostProcess(
        f"a training process was lost (killed, out of memory, or its node gone) {config.max_failures + 1} "
        f"times, max_failures is {config.max_failures}; run it again to go on from the newest checkpoint "
        f"({reason})"
    )


def _budget_after(error: Exception, job: dict[str, Any], config: TrainConfig) -> int | None:
    """The token budget for the next start after ``error``; None when memory was not the reason.

    A worker that runs out of memory writes it; one that Ray's memory monitor killed could not. The monitor
    kills several actors at once, so that its reason may come as the controller's. torch's error for GPUs
    has the name of Ray's, so the text of a traceback does not tell them apart.
    """
    from ray.exceptions import OutOfMemoryError

    text = str(error)
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    if "low on memory" in text or any(isinstance(failure, OutOfMemoryError) for failure in failures):
        lengths = config.query_max_length + (1 + config.hard_negatives) * config.document_max_length
        everything = config.batch_size // config.fewest_workers * lengths
        halve(job["run"], halved_budget(job["run"]) or config.token_budget or everything)
    elif "OutOfMemory" not in text:
        return None
    return halved_budget(job["run"])


def _trainer(job: dict[str, Any], config: TrainConfig, out: Path) -> Any:
    """One of the same name in the same place goes on from its newest checkpoint."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig

    scaling = _scaling(config)
    # A GPU of Ray's is a number that somebody gave: torch decides what workers talk through.
    backend = "nccl" if scaling.use_gpu and machine().device == "cuda" else "gloo"
    best = {"checkpoint_score_attribute": DEV_SCORE, "checkpoint_score_order": "max"}
    keep = CheckpointConfig(num_to_keep=config.keep_checkpoints, **(best if config.dev else {}))
    return Trainer(
        train_worker,
        train_loop_config=job,
        torch_config=torch_config(backend),
        scaling_config=scaling,
        numbers_of_workers=config.numbers_of_workers,
        run_config=RunConfig(
            name=job["name"],
            storage_path=job["base"],
            # A controller that tries again by itself does so without end; ``_fit`` counts.
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=0),
            checkpoint_config=keep,
            callbacks=[HistoryWriter(out / HISTORY), NamedReservation(job["run"])],
        ),
    )


def _scaling(config: TrainConfig) -> Any:
    """Resources of the workers; InputError for more than the cluster has or gets.

    Asking Ray Train for more than there is would wait for ever without a word. A Tune trial that calls this
    holds a sliver of a CPU itself, so the workers' share is cut to what is left.
    """
    import ray
    from ray.train import ScalingConfig

    fewest, most = config.fewest_workers, config.most_workers
    there = room(fewest, config.cpus_per_worker)
    own = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0) if _in_worker() else 0.0
    now = max(fewest, min(most, int(there.cpus / config.cpus_per_worker)))
    share = min(config.cpus_per_worker, int((there.cpus - own) / now * 100) / 100)
    if there.gpus:
        share = min(share, _cpus_beside_a_gpu(own))
    return ScalingConfig(
        num_workers=config.workers,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        use_gpu=there.gpus,
        resources_per_worker={"CPU": share, **({"GPU": 1} if there.gpus else {})},
    )


def _cpus_beside_a_gpu(own: float) -> float:
    """What each worker of a node may take where the GPUs have the fewest CPUs, this process's ``own`` left
    out, which may hold some of them: with more a worker would wait for ever."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    shares = [(node.get("CPU", 0.0) - own) / node["GPU"] for node in nodes]
    return max(0.0, int(min(shares) * 100) / 100) if shares else math.inf


def _in_worker() -> bool:
    import ray
    from ray._private.worker import WORKER_MODE

    return bool(ray._private.worker.global_worker.mode == WORKER_MODE)


def _finished(out: Path) -> TrainResult:
    file = out / _RESULT
    result = parse(read_json_object(file), TrainOutcome, source=str(file))
    history = read_history(out / HISTORY)
    return TrainResult(checkpoint=out / "checkpoint", history=history, **result.model_dump())


def _write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=1) + "\n")
