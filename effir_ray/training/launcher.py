"""Fine-tuning a model on Ray Train: starts the workers, follows their rows, puts the result in place."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effir_ray.cluster import connect
from effir_ray.errors import InputError, TrialFailure
from effir_ray.training import storage
from effir_ray.training.config import TrainConfig
from effir_ray.training.history import HistoryWriter, follow, read_history

_SETTINGS, _RESULT, _HISTORY = "training.json", "result.json", "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """``history``: one row a step. ``engine`` names what ran, and why if it is not DeepSpeed."""

    checkpoint: Path
    history: list[dict[str, Any]]
    seconds: float
    engine: str


def train(
    model: str | Path, config: TrainConfig, out: Path, *, address: str | None = None, resume: bool = True
) -> TrainResult:
    """Fine-tune ``model`` (any name or path that ``load_retriever`` takes) into ``out/checkpoint``.

    Run again with the same arguments it goes on from the newest training checkpoint, or returns at once when
    it had finished; ``resume=False`` starts over. Works in a script, a notebook and inside a Ray Tune trial.

    Raises InputError for data or settings that cannot work (a folder of another run included) and
    TrialFailure when the weights can no longer be trusted.
    """
    out = Path(out).absolute()
    job = _open(out, str(model), config, resume)
    if (out / _RESULT).is_file():
        return _finished(out)
    began = time.monotonic()
    connect(address)
    outcome = _fit(job, config, out)
    storage.fetch(job["saved"], out / "checkpoint")
    result = {"engine": outcome["engine"], "seconds": time.monotonic() - began}
    _write_json(out / _RESULT, result)
    storage.remove(job["run"])
    return _finished(out)


def _open(out: Path, model: str, config: TrainConfig, resume: bool) -> dict[str, Any]:
    """Claim the output folder for this run; the description of the run that workers get."""
    settings = {"model": model, "config": config.model_dump(mode="json")}
    name = hashlib.sha256(json.dumps([str(out), settings], sort_keys=True).encode()).hexdigest()[:12]
    base = config.storage_path or str(out / "run")
    run = f"{base.rstrip('/')}/{name}"
    if not resume:
        for file in (_SETTINGS, _RESULT, _HISTORY):
            (out / file).unlink(missing_ok=True)
        storage.remove(run)
    known = out / _SETTINGS
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != settings:
        raise InputError(
            f"{out} holds a run of another model or other settings ({known}); choose another folder, "
            "or start over with resume=False"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_json(known, settings)
    job = {**settings, "pairs": config.dataset, "base": base, "name": name, "run": run}
    return {**job, "saved": f"{run}/model"}


def _fit(job: dict[str, Any], config: TrainConfig, out: Path) -> dict[str, Any]:
    """Run the workers to the end; what they returned."""
    # The controller looks after its workers this often; its default of 2 s would hold every report up.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    from ray.train import CheckpointConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from effir_ray.training.loop import train_worker

    scaling, backend = _scaling(config)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend=backend),
        scaling_config=scaling,
        run_config=RunConfig(
            name=job["name"],
            storage_path=job["base"],
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            callbacks=[HistoryWriter(out / _HISTORY)],
        ),
    )
    try:
        with follow(out / _HISTORY, f"Training {Path(job['model']).name}"):
            outcome = trainer.fit().return_value
    except SystemExit:
        raise KeyboardInterrupt from None  # Ray's own handler of Ctrl-C ends the process with code 0
    if "error" in outcome:
        kind = InputError if outcome["error"] == "InputError" else TrialFailure
        raise kind(outcome["message"])
    return dict(outcome)


def _scaling(config: TrainConfig) -> tuple[Any, str]:
    """Resources of the workers and their communication backend; InputError for more than the cluster has.

    Asking for more than there is would wait for ever without a word. A Tune trial that calls this holds a
    sliver of a CPU itself, so the workers' share is cut to what is left.
    """
    import ray
    from ray.train import ScalingConfig

    cluster = ray.cluster_resources()
    gpu = cluster.get("GPU", 0) >= config.workers
    own = ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0) if _in_worker() else 0.0
    cpus = cluster.get("CPU", 0.0)
    if config.workers * config.cpus_per_worker > cpus:
        raise InputError(
            f"{config.workers} workers of {config.cpus_per_worker:g} CPUs each, but the cluster has "
            f"{cpus:g}; lower workers or cpus_per_worker"
        )
    share = min(config.cpus_per_worker, int((cpus - own) / config.workers * 100) / 100)
    scaling = ScalingConfig(
        num_workers=config.workers,
        use_gpu=gpu,
        resources_per_worker={"CPU": share, **({"GPU": 1} if gpu else {})},
    )
    return scaling, "nccl" if gpu else "gloo"


def _in_worker() -> bool:
    import ray
    from ray._private.worker import WORKER_MODE

    return bool(ray._private.worker.global_worker.mode == WORKER_MODE)


def _finished(out: Path) -> TrainResult:
    result = json.loads((out / _RESULT).read_text(encoding="utf-8"))
    return TrainResult(checkpoint=out / "checkpoint", history=read_history(out / _HISTORY), **result)


def _write_json(file: Path, value: Any) -> None:
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)
