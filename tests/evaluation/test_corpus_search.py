import numpy as np

from effir_ray.evaluation.corpus_search import Feedback, gather, rocchio


def test_a_query_moves_to_the_mean_of_what_counts() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    documents = np.array([[[0.0, 2.0], [0.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]], dtype=np.float32)
    found = np.array([[True, True], [False, False]])
    moved = rocchio(queries, documents, found, Feedback(documents=2, alpha=0.5, beta=1.0))
    assert np.allclose(moved, [[0.5, 3.0], [0.0, 1.0]])  # the second found nothing and stays


def test_rows_are_gathered_across_shards() -> None:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    indices = np.array([[0, 9, 3], [4, -1, 4]])
    gathered = gather([rows[:3], rows[3:4], rows[4:]], indices, 2)
    assert np.array_equal(gathered[0], rows[[0, 9, 3]])
    assert np.array_equal(gathered[1], [rows[4], [0, 0], rows[4]])
