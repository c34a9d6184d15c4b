"""Connecting to Ray: a given cluster, or a quiet private instance on this machine."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from effir_ray.errors import InputError

_LOCAL_OBJECT_STORE_BYTES = 256 * 1024**2
"""Stages talk through files, so the object store only carries small blocks."""

_REACH_TIMEOUT = 10.0  # seconds

_START_ATTEMPTS = 3

_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # spinning OpenMP threads slow FAISS and neighbouring workers
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Make Ray usable in this process; does nothing when it already is.

    ``address`` (or the environment's RAY_ADDRESS) names a running cluster; without one a private local
    instance starts and ends with this process. Raises InputError when the address does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    if ray.is_initialized():
        return
    target = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        "runtime_env": {"env_vars": worker_environment()},
    }
    if target is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 starves workers beside any other program
        _start_local(num_cpus, options)
        return
    _check_reachable(target)
    try:
        ray.init(address=target, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(target, error) from None


def _start_local(num_cpus: int | None, options: dict[str, Any]) -> None:
    """Ray gives its own processes 30 seconds, which a busy machine may not keep: try again, then say so."""
    import ray

    for attempt in range(_START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=num_cpus,
                object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
                **options,
            )
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == _START_ATTEMPTS - 1:
                raise InputError(
                    f"Ray did not start on this machine within 30 s, {_START_ATTEMPTS} times over; "
                    "stop other programs, or give --address of a running cluster"
                ) from None


def worker_environment() -> dict[str, str]:
    """Environment of every worker process, whatever its node has: the driver's devices are not theirs."""
    environment = dict(_WORKER_ENVIRONMENT)
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        environment["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
    return environment


def _check_reachable(address: str) -> None:
    """Ray itself retries an address where nobody listens for many minutes before it says so."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return  # "auto" and "local": Ray resolves them itself
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: BaseException) -> InputError:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(
        f"no Ray cluster answers at '{address}' ({reason}); start one with 'ray start --head' "
        "or leave --address and RAY_ADDRESS unset to run on this machine"
    )
