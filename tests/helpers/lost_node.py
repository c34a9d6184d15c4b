"""Work on a Ray cluster whose only node with CPUs dies on the way and is replaced.

In a process of its own: Ray starts nodes from a main thread only, and one process has one cluster.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def lose_a_node(work: Callable[..., Any], far_enough: Callable[[], bool]) -> None:
    """Run ``work(address=...)`` to its end; its node dies as soon as ``far_enough()``. Both must pickle."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(_lose_a_node, work, far_enough).result()


def _lose_a_node(work: Callable[..., Any], far_enough: Callable[[], bool]) -> None:
    import ray
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 128 * 1024**2}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store}
    )
    try:
        node = cluster.add_node(num_cpus=1, **store)
        outcome = _in_background(lambda: work(address=cluster.address))
        while not (far_enough() or outcome.done()):
            time.sleep(0.05)
        assert not outcome.done(), f"it ended before its node was lost: {outcome.exception()}"
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, **store)
        outcome.result(timeout=500)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _in_background(work: Callable[[], object]) -> Future[None]:
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future
