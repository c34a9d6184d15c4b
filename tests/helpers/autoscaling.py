"""A head whose autoscaler starts nodes with a GPU from none, on one machine: the one of Ray's own tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

_PROVIDER = Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
_DEFAULTS = "example.yaml"  # which the provider reads, and Ray's package leaves out
_HEAD = "ray.head.default"  # as the provider calls it

ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}


def write_config(file: Path, *, most: int) -> list[str]:
    """Options of ``ray start`` for at most so many nodes of a CPU and a GPU."""
    lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    node = {"CPU": 1, "GPU": 1, "object_store_memory": 100 * 2**20}
    config: dict[str, Any] = {
        "cluster_name": "fake",
        "max_workers": most,
        "provider": {"type": "fake_multinode", "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID},
        "available_node_types": {
            _HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": node, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": _HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in lists},
    }
    file.write_text(json.dumps(config))
    return ["--num-cpus=0", f"--autoscaling-config={file}"]


def setup(config: Path) -> list[str]:
    """Lines of a shell that give the node's own Ray what its package lacks."""
    copy = config.with_suffix(".provider")
    return [
        f"mkdir {copy}",
        f"cp -r {_PROVIDER}/. {copy}",
        f"cp {config} {copy}/{_DEFAULTS}",
        f"mount --bind {copy} {_PROVIDER}",
    ]
