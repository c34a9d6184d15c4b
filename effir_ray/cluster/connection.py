"""Connecting to Ray: a given cluster, or a quiet private instance on this machine.

Whoever reaches a Ray instance can run code on it (CVE-2023-48022). The private one therefore listens on the
loopback interface alone, asks for a token of its own, and keeps its files in a folder that only this user can
enter.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil

from effir_ray.errors import InputError, LostProcess

_LOCAL_OBJECT_STORE_BYTES = 256 * 1024**2
"""Stages talk through files, so the object store only carries small blocks."""

_REACH_TIMEOUT = 10.0  # seconds

_START_ATTEMPTS = 3

_WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # spinning OpenMP threads slow FAISS and neighbouring workers
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # what has reserved no GPU sees none
}

LOOPBACK = "127.0.0.1"

_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch between an instance that other machines can join and one on the loopback interface. It is off
by default on Windows and macOS, hence the name; 127.0.0.1 as this node's address would be replaced."""

_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""After so many seconds without its control service Ray ends a process, even one that has left it by then."""

_NEEDED = ("gcs_server", "raylet")
_TRIES_TO_REMOVE = 30
_SECONDS_TO_FAIL = 15.0  # what of a start notices a lost process by itself has done so by then

INSTANCE = "EFFIR_RAY_INSTANCE"  # in the environment of a private instance's workers: its folder

_TOKEN = "token"
_SECONDS_TO_A_TOKEN = 60.0  # an instance's folder has its token at once

_VERSIONS = re.compile(r"Ray: (\S+) Python: (\S+)")
"""In Ray's message about a cluster of another version, lines joined: of it, then of this process."""


def connect(address: str | None = None, *, num_cpus: int | None = None) -> None:
    """Make Ray usable in this process; does nothing when it already is.

    ``address`` (or the environment's RAY_ADDRESS) names a running cluster; without one a private local
    instance starts and ends with this process. Raises InputError when the address does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    if ray.is_initialized():
        return
    target = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        "runtime_env": {"env_vars": worker_environment(local=target is None)},
    }
    if target is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 starves workers beside any other program
        with _own_sigterm():
            _start_local(num_cpus, options)
        return
    try:
        _ask(target)
        with _own_sigterm():
            ray.init(address=target, **options)
    except ray.exceptions.AuthenticationError:
        raise token_refused(target, given=False) from None
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise _no_cluster(target, error) from None


def disconnect() -> None:
    """Leave a Ray that was lost; ``connect`` starts or reaches one anew.

    Threads that still wait for the old one must not start another, as Ray's functions do where there is none.
    """
    import ray

    start_no_other()
    ray.shutdown()


def start_no_other() -> None:
    """From now on only ``connect`` starts a Ray."""
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this program's handler of SIGTERM, if it has one: Ray's own prints native stacks and ends the
    process on the spot.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start_local(num_cpus: int | None, options: dict[str, Any]) -> None:
    """Ray gives its own processes 30 seconds, which a busy machine may not keep: try again, then say so."""
    import ray

    folder = _new_folder()
    options["runtime_env"]["env_vars"][INSTANCE] = str(folder)
    atexit.register(_end_local, folder, _ask_for_token(folder))
    for attempt in range(_START_ATTEMPTS):
        try:
            with _on_loopback(), _without_obituaries(), _watched_start() as dead:
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_cpus=num_cpus,
                    object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
                    _temp_dir=str(folder),
                    **options,
                )
            return
        except Exception as error:
            if lost := dead():
                ray.shutdown()
                raise LostProcess(_ended_early(lost)) from error
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == _START_ATTEMPTS - 1:
                raise InputError(
                    f"Ray did not start on this machine within 30 s, {_START_ATTEMPTS} times over; "
                    "stop other programs, or give --address of a running cluster"
                ) from None


@contextmanager
def _watched_start() -> Iterator[Callable[[], list[str]]]:
    """Within it Ray starts; yields what says which of its processes have ended.

    Ray waits for one that was killed meanwhile until its patience ends, where neither an exception nor a
    signal reaches it. After some seconds of that this process ends with one line, as Ray ends it otherwise.
    """
    before, started = set(psutil.Process().children()), threading.Event()

    def dead() -> list[str]:
        ended = []
        for child in set(psutil.Process().children()) - before:
            with suppress(psutil.NoSuchProcess):
                if child.name() in _NEEDED and child.status() == psutil.STATUS_ZOMBIE:
                    ended.append(child.name())
        return sorted(ended)

    def watch() -> None:
        while not started.wait(1):
            if (lost := dead()) and not started.wait(_SECONDS_TO_FAIL):
                print(f"effir-ray: {_ended_early(lost)}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield dead
    finally:
        started.set()


def _ended_early(lost: list[str]) -> str:
    return f"Ray's own {' and '.join(lost)} ended while Ray started; run the same again"


def _new_folder() -> Path:
    while True:
        with suppress(FileNotFoundError):  # the end of another instance has removed the empty folder
            return Path(tempfile.mkdtemp(prefix="", dir=private_folder()))


def is_connected() -> bool:
    """Whether this process is connected to a Ray of whatever kind. Does not import Ray to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def on_cluster() -> bool:
    """Whether this process is connected to a Ray that is no private instance: there may be other nodes."""
    return is_connected() and not is_private()


def is_private() -> bool:
    """Whether the Ray that this process is connected to is a private instance, which ends with its driver."""
    import ray

    return bool(ray.util.get_node_ip_address() == LOOPBACK)


def through_client() -> bool:
    """Whether this process talks to its cluster through the Ray client, and is on none of its nodes."""
    import ray

    return bool(ray.util.client.ray.is_connected())


def private_folder() -> Path:
    """Where private instances keep tokens, sockets and logs, one folder each; those of killed ones go.

    Below ``$RAY_TMPDIR`` or ``/tmp``, since the path of a socket may have 107 characters. Only this user can
    enter it: a folder of somebody else in its place is not used.
    """
    place = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    folder = place / f"effir-ray-{os.getuid()}"
    place.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o170777 != 0o040700:
            return Path(tempfile.mkdtemp(prefix="effir-ray-", dir=place))
    _sweep(folder)
    return folder


def _sweep(folder: Path) -> None:
    """Remove the folders of instances whose driver is gone."""
    for place in list(folder.glob("*")):
        with suppress(OSError):  # another process removes it too
            if not (place / _TOKEN).exists():  # killed before it had one; or it is just being made
                if time.time() - place.stat().st_mtime > _SECONDS_TO_A_TOKEN:
                    shutil.rmtree(place)
                continue
            with (place / _TOKEN).open() as file:  # its process holds the lock
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _end_stragglers(place)
                _remove(place)


def _remove(place: Path) -> None:
    """An instance's folder, its token last: where processes of the instance still write, the next one that
    starts finds what is left by it."""
    for entry in place.iterdir():
        if entry.name == _TOKEN:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if [entry.name for entry in place.iterdir()] == [_TOKEN]:
        shutil.rmtree(place, ignore_errors=True)


def _ask_for_token(folder: Path) -> TextIO:
    """Make the next instance of this process, and all its workers, use a token: the user's, else a new one.

    Ray's own way would be a file in the home folder that everyone can read. Returns the token's file; its
    lock says that the instance lives.
    """
    from ray import _raylet

    raylet: Any = _raylet  # its stub leaves these two out

    aside = folder / f".{_TOKEN}"
    file = os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    file.write(secrets.token_hex(32))
    file.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    aside.rename(folder / _TOKEN)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault(_PATIENCE, str(10**6))  # ``lost.watched`` notices it at once
    if "RAY_AUTH_TOKEN" not in os.environ:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / _TOKEN)
    raylet.Config.initialize("")  # it looked at the environment when ray was imported
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    return file


def _end_local(folder: Path, token: TextIO) -> None:
    import ray

    ray.shutdown()
    for _ in range(_TRIES_TO_REMOVE):  # processes that are just ending write a last log
        _end_stragglers(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.1)
    token.close()
    _sweep(folder.parent)  # of processes that outlived their killed driver when this instance began
    with suppress(OSError):  # another instance lives
        folder.parent.rmdir()


def _end_stragglers(folder: Path) -> None:
    """Kill Ray's processes that outlived the instance in ``folder``: now and then one waits for ever for its
    own threads, with all the memory it has, and agents of a killed raylet write logs until they notice."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.pid != os.getpid() and _belongs(process, folder):
                process.kill()


def _belongs(process: psutil.Process, folder: Path) -> bool:
    """Whether it is one of the workers, or of Ray's own processes, of the instance in ``folder``."""
    if process.name().startswith("ray::"):
        return bool(process.environ().get(INSTANCE) == str(folder))
    import ray

    words = process.cmdline()
    of_ray = any(word.startswith(f"{Path(ray.__file__).parent}/") for word in words[:4])  # or -u before it
    return of_ray and any(f"{folder}/" in word for word in words)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within it a Ray instance is started that listens on the loopback interface alone, with all processes
    that it will start.
    """
    from ray._private import ray_constants

    before, known = os.environ.get(_LOOPBACK_SWITCH), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_LOOPBACK_SWITCH], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        if before is None:
            del os.environ[_LOOPBACK_SWITCH]
        else:
            os.environ[_LOOPBACK_SWITCH] = before


@contextmanager
def _without_obituaries() -> Iterator[None]:
    """Within it an instance is started of whose lost processes Ray prints no logs: errors say what was lost,
    and its folder has the logs.
    """
    from ray._private import worker

    plain = worker.listen_error_messages
    worker.listen_error_messages = lambda *_: None
    try:
        yield
    finally:
        worker.listen_error_messages = plain


def worker_environment(*, local: bool = False) -> dict[str, str]:
    """Environment of every worker process, whatever its node has: the driver's devices are not theirs.

    ``local``: the workers of a private instance, whose process groups stay on the loopback interface too.
    """
    environment = dict(_WORKER_ENVIRONMENT)
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        environment["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
    if local:
        names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
        environment |= {f"{kind}_SOCKET_IFNAME": name for name in names for kind in ("GLOO", "NCCL")}
    return environment


def _ask(target: str) -> None:
    """One call to the cluster's control service. Ray itself tries for 10 seconds to many minutes where nobody
    listens or its token is refused, and writes a line a second meanwhile.

    Raises InputError for a refused token and another version of Ray, ConnectionError and OSError without an
    answer, Ray's AuthenticationError when a token is to be used and there is none.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    if target.startswith("ray://"):
        check_reachable(target.removeprefix("ray://"))
        return
    place = canonicalize_bootstrap_address(target)
    if place is None:  # "auto" and "local": Ray resolves them itself
        return
    with init_grpc_channel(place) as channel:
        service = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            answer = service.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_REACH_TIMEOUT)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                given = os.environ.get("RAY_AUTH_MODE") == "token"
                raise token_refused(target, given=given) from None
            raise ConnectionError(error.details()) from None
    if answer.ray_version != ray.__version__:
        raise _other_version(target, answer.ray_version, ray.__version__)


def check_reachable(place: str) -> None:
    """Raise OSError where nobody listens at ``host:port``."""
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT).close()


def token_refused(place: str, *, given: bool) -> InputError:
    """The error of a cluster that wants its token, whether another was ``given`` or none."""
    return InputError(
        f"the Ray cluster at '{place}' asks for its token, and {'another' if given else 'none'} was given; "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    )


def _other_version(place: str, theirs: str, ours: str) -> InputError:
    return InputError(
        f"the cluster at '{place}' runs Ray {theirs}, this process Ray {ours}; both must be the same"
    )


def _no_cluster(address: str, error: BaseException) -> InputError:
    reason = " ".join(str(error).split())
    if "Version mismatch" in reason:
        theirs, ours = (" with Python ".join(pair) for pair in _VERSIONS.findall(reason))
        return _other_version(address, theirs, ours)
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(
        f"no Ray cluster answers at '{address}' ({reason}); start one with 'ray start --head' "
        "or leave --address and RAY_ADDRESS unset to run on this machine"
    )
