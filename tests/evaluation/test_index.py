import numpy as np
import pytest

from effir_ray.errors import InputError, TrialFailure
from effir_ray.evaluation.index import exact_search

BACKENDS = ["faiss", "torch"]


def unit(rng: np.random.Generator, rows: int, dimensions: int) -> np.ndarray:
    x = rng.standard_normal((rows, dimensions)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    products = queries.astype(np.float64)[:, None, :] * documents.astype(np.float64)[None]
    scores = products.sum(-1).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def collections() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    queries = unit(rng, 23, 48)
    spread = unit(rng, 700, 48)
    tied = np.repeat(unit(rng, 7, 48), 100, axis=0)[
        rng.permutation(700)
    ]  # 100 copies each: ties far beyond k
    near = np.repeat(unit(rng, 7, 48), 100, axis=0)
    near = near + (rng.standard_normal(near.shape) * 3e-8).astype(np.float32)  # differ in the last bit
    collapsed = unit(rng, 1, 48) + 1e-6 * unit(rng, 700, 48)  # what a broken model produces
    return {
        "spread": (queries, spread),
        "tied": (queries, tied),
        "near": (queries, near),
        "collapsed": (queries, collapsed.astype(np.float32)),
        "long": (queries * 1000, spread * 50),
        "half": (queries, spread.astype(np.float16)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shard", [700, 350, 97, 10])
@pytest.mark.parametrize("name", list(collections()))
def test_every_backend_and_sharding_gives_the_reference_bit_for_bit(
    backend: str, shard: int, name: str
) -> None:
    queries, documents = collections()[name]
    expected = reference(queries, documents.astype(np.float32), 12)
    shards = (documents[start : start + shard] for start in range(0, len(documents), shard))
    scores, indices = exact_search(queries, shards, k=12, backend=backend)
    assert np.array_equal(indices, expected[1])
    assert np.array_equal(scores, expected[0])


def test_a_query_alone_scores_as_in_a_batch() -> None:
    queries, documents = collections()["spread"]
    scores, indices = exact_search(queries, documents, k=5)
    for row in range(len(queries)):
        alone = exact_search(queries[row : row + 1], documents, k=5)
        assert np.array_equal(alone[0][0], scores[row])
        assert np.array_equal(alone[1][0], indices[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_documents_than_k_are_filled_up(backend: str) -> None:
    queries, documents = collections()["spread"]
    scores, indices = exact_search(
        queries, iter([documents[:2], documents[2:2], documents[2:3]]), k=5, backend=backend
    )
    assert np.array_equal(np.sort(indices[:, :3], axis=1), np.tile([0, 1, 2], (len(queries), 1)))
    assert np.all(indices[:, 3:] == -1)
    assert np.all(np.isneginf(scores[:, 3:]))


def test_embeddings_that_cannot_be_trusted_are_a_failure() -> None:
    queries, documents = (array.copy() for array in collections()["spread"])
    documents[5, 3] = np.nan
    with pytest.raises(TrialFailure, match="documents: row 5"):
        exact_search(queries, documents, k=3)


def test_shapes_that_do_not_fit_are_named() -> None:
    queries, documents = collections()["spread"]
    with pytest.raises(InputError, match="documents have 40 dimensions, queries 48"):
        exact_search(queries, documents[:, :40], k=3)
    with pytest.raises(InputError, match="k is 0"):
        exact_search(queries, documents, k=0)
    with pytest.raises(InputError, match="unknown search backend 'annoy'"):
        exact_search(queries, documents, k=3, backend="annoy")
