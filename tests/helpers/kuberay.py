"""The fields that a manifest of KubeRay 1.7 may use, from its custom resource definitions (ray.io/v1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]
"""Field -> the fields below it; None where anything may follow or a schema of Kubernetes itself goes on."""

_CLUSTER: Fields = {
    "authOptions": dict.fromkeys(("enableK8sTokenAuth", "mode", "secretName")),
    "autoscalerOptions": dict.fromkeys(
        (
            "args",
            "command",
            "env",
            "envFrom",
            "idleTimeoutSeconds",
            "image",
            "imagePullPolicy",
            "resources",
            "securityContext",
            "upscalingMode",
            "version",
            "volumeMounts",
        )
    ),
    "enableInTreeAutoscaling": None,
    "gcsFaultToleranceOptions": {
        "backend": None,
        "externalStorageNamespace": None,
        "redisAddress": None,
        "redisPassword": dict.fromkeys(("value", "valueFrom")),
        "redisUsername": dict.fromkeys(("value", "valueFrom")),
        "storage": dict.fromkeys(
            ("accessModes", "claimName", "deletionPolicy", "size", "storageClassName", "subPath")
        ),
    },
    "headGroupSpec": dict.fromkeys(
        (
            "enableIngress",
            "headService",
            "ingressOptions",
            "labels",
            "rayStartParams",
            "resources",
            "serviceType",
            "template",
        )
    ),
    "headServiceAnnotations": None,
    "historyServerOptions": None,
    "managedBy": None,
    "networkPolicy": dict.fromkeys(("head", "mode", "worker", "workerGroups")),
    "rayVersion": None,
    "suspend": None,
    "tlsOptions": {"enabled": None},
    "upgradeStrategy": {"type": None},
    "workerGroupSpecs": dict.fromkeys(
        (
            "groupName",
            "idleTimeoutSeconds",
            "labels",
            "maxReplicas",
            "minReplicas",
            "numOfHosts",
            "priority",
            "rayStartParams",
            "replicas",
            "resources",
            "scaleStrategy",
            "suspend",
            "template",
        )
    ),
}

_JOB: Fields = {
    "activeDeadlineSeconds": None,
    "backoffLimit": None,
    "clusterSelector": None,
    "deletionStrategy": dict.fromkeys(("deletionRules", "onFailure", "onSuccess")),
    "entrypoint": None,
    "entrypointNumCpus": None,
    "entrypointNumGpus": None,
    "entrypointResources": None,
    "jobId": None,
    "managedBy": None,
    "metadata": None,
    "preRunningDeadlineSeconds": None,
    "rayClusterSpec": _CLUSTER,
    "runtimeEnvYAML": None,
    "shutdownAfterJobFinishes": None,
    "submissionMode": None,
    "submitterConfig": {"backoffLimit": None},
    "submitterPodTemplate": None,
    "suspend": None,
    "ttlSecondsAfterFinished": None,
}

KINDS: dict[str, Fields] = {
    kind: {"apiVersion": None, "kind": None, "metadata": None, "spec": spec}
    for kind, spec in (("RayJob", _JOB), ("RayCluster", _CLUSTER))
}


def unknown_fields(value: Any, fields: Fields | None, place: str = "") -> Iterator[str]:
    """Where ``value`` has a field that is not among ``fields``, as ``spec.workerGroupSpecs.minReplica``."""
    if fields is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from unknown_fields(item, fields, place)
    elif isinstance(value, dict):
        for name, below in value.items():
            path = f"{place}.{name}".lstrip(".")
            if name not in fields:
                yield path
            else:
                yield from unknown_fields(below, fields[name], path)
