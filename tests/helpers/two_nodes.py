"""A Ray cluster of several machines on this one: each node has a network, processes, a name and folders of
its own.

Its network is a bridge in a namespace of the head's, to which every node has a cable that can be pulled. A
killed node is gone with all its processes at once, as without power.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.kernels import compiled

ROOT = Path(__file__).parents[2]
_PORT, _JOBS_PORT = 6379, 8265
_START_SECONDS = 90
_STORE_BYTES = 100 * 1024**2
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_NAMESPACES = ("unshare", "-m", "-u", "-p", "-f", "--kill-child", "--mount-proc")


def unavailable() -> str:
    """Why there can be no such cluster here; "" where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux namespaces, which only root can make"
    if not all(map(shutil.which, ("ip", "unshare", "nsenter", "mount", "setpriv"))):
        return "needs ip, unshare, nsenter, mount and setpriv"
    name = f"er{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "bridge", "type", "bridge")
        subprocess.run(
            ["unshare", "-m", "-u", "-p", "-f", "true"], check=True, capture_output=True, timeout=20
        )
    except (subprocess.SubprocessError, OSError) as error:
        return f"this system allows no namespaces ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return ""


_IN_A_HURRY = """
import importlib.machinery
import sys


class InAHurry(importlib.machinery.PathFinder):
    # What a dead machine held is taken over after seconds: a test has no time for more.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "effir_ray.leases":
            return None
        spec = super().find_spec(name, path, target)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            module.EXPIRY, module._HEARTBEAT = 12.0, 2.0

        spec.loader.exec_module = loaded
        return spec


sys.meta_path.insert(0, InAHurry)
"""


@dataclass(kw_only=True)
class Node:
    """``process`` began it; ``init`` is the first process inside, with which all others end."""

    name: str
    address: str
    netns: str
    cable: str
    process: subprocess.Popen[bytes]
    init: int
    log: Path

    def run(self, *command: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        """A command on this node, in the environment of its processes."""
        return subprocess.run(
            self.inside(*command),
            env=_environment_of(self.init),
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """The same in the background."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.inside(*command), env=_environment_of(self.init), stdout=stream, stderr=stream
            )

    def inside(self, *command: str) -> list[str]:
        # nsenter resets the working directory
        return ["nsenter", "-t", str(self.init), "-m", "-u", "-n", "-p", *command]

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of this node with ``part`` in their command lines."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found


@dataclass(kw_only=True)
class Nodes:
    """The cluster. ``shared`` is a folder that all nodes see, besides everything else of this machine that no
    node has a folder of its own for."""

    shared: Path
    scratch: Path
    tag: str
    nodes: dict[str, Node] = field(default_factory=dict)
    has_network: bool = False
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 250)))

    @property
    def head(self) -> Node:
        return self.nodes["head"]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{_PORT}"

    @property
    def jobs_address(self) -> str:
        return f"http://{self.head.address}:{_JOBS_PORT}"

    def add(
        self,
        name: str,
        *options: str,
        private: Sequence[Path] = (),
        sizes: Mapping[str, str] | None = None,
        setup: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Node:
        """Start a node; the first is the head. ``options`` of ``ray start``; ``private``: folders of its own
        in place of this machine's; ``sizes``: of its folders "tmp" and "cache", where they are small disks;
        ``setup``: lines of a shell before Ray starts.
        """
        head = not self.nodes or name == "head"
        number = 1 if head else next(self.numbers) + 1
        address, netns, cable = f"10.231.77.{number}", f"{self.tag}{name}", f"{self.tag}{number}"
        if head:
            self._network_once(netns, address)
        else:
            _join(f"{self.tag}head", cable, netns, address)
        place = self.scratch / name
        # Workers have Ray's files where the head has them.
        mounts = [(folder, "") for folder in dict.fromkeys((self.scratch / "head", place, *private))]
        mounts += [(place / part, size) for part, size in (sizes or {}).items()]
        command = ["ray", "start", "--block", f"--node-ip-address={address}", "--disable-usage-stats"]
        command += [f"--object-store-memory={_STORE_BYTES}", *options]
        if head:
            command += ["--head", f"--port={_PORT}", f"--dashboard-host={address}", f"--temp-dir={place}/ray"]
            command += [f"--dashboard-port={_JOBS_PORT}"]
        else:
            command += [f"--address={self.head.address}:{_PORT}"]
        lines = ["set -e", f"hostname {name}"]
        for folder, size in mounts:
            option = f"-o size={size} " if size else ""
            lines += [f"mkdir -p {folder}", f"mount -t tmpfs {option}none {folder}"]
        lines += [f"mkdir -p {place}/{part}" for part in ("tmp", "cache", "home")]
        if (kernels := compiled()) and "cache" not in (sizes or {}):
            lines.append(f"cp -r {kernels} {place}/cache")
        lines += [*setup, f"exec {shlex.join(command)}"]
        log = self.scratch / f"{name}-{secrets.token_hex(2)}.log"
        place.mkdir(exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*_ENDS_WITH_US, "ip", "netns", "exec", netns, *_NAMESPACES, "bash", "-c", "\n".join(lines)],
                env=self._environment(place) | dict(environment or {}),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.nodes[name] = node = Node(
            name=name, address=address, netns=netns, cable=cable, process=process, init=0, log=log
        )
        _await(node)
        return node

    def _network_once(self, netns: str, address: str) -> None:
        """A head that is lost leaves its network to the next one."""
        if not self.has_network:
            _network(netns, address)
            self.has_network = True

    def _environment(self, place: Path) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return environment | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{self.scratch / 'site'}{os.pathsep}{ROOT}",
            "HOME": f"{place}/home",
            "TMPDIR": f"{place}/tmp",
            "EFFIR_RAY_CACHE": f"{place}/cache",
            "RAY_TMPDIR": str(place),
        }

    def kill(self, name: str) -> None:
        """The power goes."""
        node = self.nodes.pop(name)
        _end(node)
        if name != "head":
            subprocess.run(["ip", "netns", "del", node.netns], check=False, capture_output=True)

    def cut(self, name: str) -> None:
        """Pull the node's cable."""
        _ip("-n", f"{self.tag}head", "link", "set", self.nodes[name].cable, "down")

    def mend(self, name: str) -> None:
        _ip("-n", f"{self.tag}head", "link", "set", self.nodes[name].cable, "up")


@contextmanager
def several_nodes(shared: Path, *head_options: str, **more: Any) -> Iterator[Nodes]:
    """A cluster with a head, to which nodes can be added; see ``Nodes.add``."""
    # Paths of sockets may have 107 characters.
    scratch = Path(tempfile.mkdtemp(prefix="n", dir="/tmp"))
    (scratch / "site").mkdir()
    (scratch / "site" / "sitecustomize.py").write_text(_IN_A_HURRY)
    cluster = Nodes(shared=shared, scratch=scratch, tag=f"er{secrets.token_hex(2)}")
    try:
        cluster.add("head", *head_options, **more)
        yield cluster
    finally:
        for node in cluster.nodes.values():
            _end(node)
        for name in {f"{cluster.tag}head", *(node.netns for node in cluster.nodes.values())}:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _network(netns: str, address: str) -> None:
    _ip("netns", "add", netns)
    _ip("-n", netns, "link", "set", "lo", "up")
    _ip("-n", netns, "link", "add", "bridge", "type", "bridge")
    _ip("-n", netns, "addr", "add", f"{address}/24", "dev", "bridge")
    _ip("-n", netns, "link", "set", "bridge", "up")


def _join(head: str, cable: str, netns: str, address: str) -> None:
    _ip("netns", "add", netns)
    _ip("-n", netns, "link", "set", "lo", "up")
    _ip("link", "add", cable, "netns", head, "type", "veth", "peer", "name", "eth0", "netns", netns)
    _ip("-n", head, "link", "set", cable, "master", "bridge", "up")
    _ip("-n", netns, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", netns, "link", "set", "eth0", "up")


def _await(node: Node) -> None:
    """Until Ray says that the node runs, and its job server answers if it has one."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and node.process.poll() is None:
        if "Ray runtime started" in node.log.read_text():
            (bash,) = psutil.Process(node.process.pid).children()
            node.init = bash.pid
            return
        time.sleep(0.2)
    _end(node)
    raise AssertionError(f"{node.name} did not start:\n{node.log.read_text()}")


def _end(node: Node) -> None:
    """With the first process inside all others of the node end."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(node.process.pid).children():
            process.kill()
    with suppress(ProcessLookupError):
        os.kill(node.process.pid, signal.SIGKILL)
    node.process.wait()


def _environment_of(pid: int) -> dict[str, str]:
    environment: dict[str, str] = psutil.Process(pid).environ()
    return environment


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)
