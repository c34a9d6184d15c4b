"""Work on a Ray cluster whose only node with CPUs is lost and replaced, or joined by another for a while.

In a process of its own: Ray starts nodes from a main thread only, and one process has one cluster.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

_STORE = {"object_store_memory": 128 * 1024**2}


def lose_a_node(work: Callable[..., Any], far_enough: Callable[[], bool]) -> None:
    """Run ``work(address=...)`` to its end; its node dies as soon as ``far_enough()``. Both must pickle."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(_lose_a_node, work, far_enough).result()


def come_and_go(work: Callable[..., Any], then: Callable[[], bool], until: Callable[[], bool]) -> None:
    """Run ``work(address=...)`` on one node to its end; another comes as soon as ``then()``, and is lost as
    soon as ``until()``. All must pickle."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(_come_and_go, work, then, until).result()


def _come_and_go(work: Callable[..., Any], then: Callable[[], bool], until: Callable[[], bool]) -> None:
    with _head() as cluster:
        cluster.add_node(num_cpus=1, **_STORE)
        outcome = _in_background(lambda: work(address=cluster.address))
        _wait(then, outcome)
        node = cluster.add_node(num_cpus=1, **_STORE)
        _wait(until, outcome)
        cluster.remove_node(node, allow_graceful=False)
        outcome.result(timeout=500)


def _lose_a_node(work: Callable[..., Any], far_enough: Callable[[], bool]) -> None:
    with _head() as cluster:
        node = cluster.add_node(num_cpus=1, **_STORE)
        outcome = _in_background(lambda: work(address=cluster.address))
        _wait(far_enough, outcome)
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, **_STORE)
        outcome.result(timeout=500)


@contextmanager
def _head() -> Iterator[Any]:
    """A cluster of a head without CPUs."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, **_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _wait(moment: Callable[[], bool], outcome: Future[None]) -> None:
    while not (moment() or outcome.done()):
        time.sleep(0.05)
    assert not outcome.done(), f"it ended before its nodes changed: {outcome.exception()}"


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
