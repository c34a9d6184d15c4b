"""How the workers of a run find each other, and what becomes of those that do not."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

from effir_ray.cluster.connection import INSTANCE, is_private


def torch_config(backend: str) -> TorchConfig:
    """Ray's own way between machines; on a private instance, which is one machine, a file.

    torch's store listens on every interface, and anyone who reaches it can write to it.
    """
    return FileConfig(backend=backend) if is_private() else StoreConfig(backend=backend)


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray has no types
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """A group that does not come to stand is taken down.

        Ray Train's controller starts another one but forgets this one, whose CPUs and GPUs stay reserved for
        as long as the driver lives: where there are no others, the next group waits for them for ever.
        """
        try:
            self.meet(worker_group, backend_config)
        except BaseException:
            worker_group._worker_group_state.shutdown()
            raise

    def meet(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)


@dataclass
class StoreConfig(TorchConfig):  # type: ignore[misc]
    """Workers that meet at torch's store, on the machine of the first."""

    @property
    def backend_cls(self) -> type:
        return _Backend


@dataclass
class FileConfig(TorchConfig):  # type: ignore[misc]
    """Workers of one machine, which meet at a file of this user."""

    @property
    def backend_cls(self) -> type:
        return _FileBackend


class _FileBackend(_Backend):
    def meet(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        # It lives in the controller, which outlives the group, and goes with the instance if that is killed.
        # mkdtemp's folder is this user's alone, also below another Ray of this machine's loopback interface.
        self.folder = tempfile.TemporaryDirectory(prefix="effir-ray-", dir=os.environ.get(INSTANCE))
        group = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": (Path(self.folder.name) / "rendezvous").as_uri(),
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **group)
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: FileConfig) -> None:
        super().on_shutdown(worker_group, backend_config)
        self.folder.cleanup()
