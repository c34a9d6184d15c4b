"""Models in tests are tiny: a second thread only waits for the first, and for long beside other programs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import beir_folders

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, after this
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning for a busy core takes seconds a product

# The same numbers on every processor; tests of other types ask for them.
os.environ.setdefault("EFFIR_RAY_PRECISION", "float32")

FAST = 120  # seconds; on two quiet cores the slowest takes a few


LONG = ("test_random_kills.py", "test_fuzz.py", "test_killed_runs.py")
"""Files of minutes. Begun last, one would run alone; begun first, the others are done beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fast test that hangs ends with the stacks of all threads instead of holding up the run."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        if not item.get_closest_marker("integration") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(FAST))


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    """``write_folder(folder, documents=40, queries=30)`` writes a small BEIR folder."""
    return beir_folders.write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return beir_folders.write_folder(tmp_path / "toy")


@pytest.fixture(scope="module")
def object_store() -> Iterator[str]:
    """A bucket of an S3 server on this machine, as ``store.format(folder)``: the URI of a folder in it.

    Where it is and its keys are in the environment, for Ray's processes too.
    """
    import ray
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        maker, bucket = fs.FileSystem.from_uri("s3://bucket?region=us-east-1&allow_bucket_creation=true")
        maker.create_dir(bucket)
        ray.shutdown()  # workers of one that runs already would not see them
        yield "s3://bucket/{}?region=us-east-1"
    server.stop()
