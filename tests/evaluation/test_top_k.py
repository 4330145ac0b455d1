"""The streamed search of one query against a full sort."""

import numpy as np
import pytest

from rcml_jax.evaluation import top_k as module
from rcml_jax.evaluation.top_k import nearest


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def by_full_sort(vectors, has, query, k, leave_out=None):
    """Places and scores of the best: every cosine, the mean of those that exist, a stable sort."""
    n = len(next(iter(vectors.values())))
    scores = np.full(n, -np.inf)
    for i in range(n):
        cosines = [q.astype(float) @ x[i] for q in query for m, x in vectors.items() if has[m][i]]
        if cosines and i != leave_out:
            scores[i] = np.mean(cosines)
    order = np.argsort(-scores, kind="stable")[:k]
    order = order[scores[order] > -np.inf]
    return order, scores[order]


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    vectors = {"text": unit(rng, 101, 6), "image": unit(rng, 101, 6)}
    has = {name: rng.random(101) < 0.7 for name in vectors}
    for name, rows in vectors.items():
        rows[~has[name]] = 0
    return vectors, has


@pytest.mark.parametrize("rows", [1, 7, 101, 1000])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_the_best_are_those_of_a_full_sort(table, monkeypatch, rows, sides, k):
    monkeypatch.setattr(module, "_BLOCK_BYTES", rows * 4 * 6)
    vectors, has = table
    query = unit(np.random.default_rng(1), sides, 6)
    for leave_out in (None, 0, 55, 100):
        index, scores = nearest(vectors, has, query, k, leave_out=leave_out)
        expected, cosines = by_full_sort(vectors, has, query, k, leave_out)
        np.testing.assert_array_equal(index, expected)
        np.testing.assert_allclose(scores, cosines, atol=1e-6)


def test_one_modality_alone_has_only_its_own_candidates(table):
    vectors, has = table
    query = unit(np.random.default_rng(2), 1, 6)
    index, scores = nearest({"text": vectors["text"]}, has, query, 500)
    assert sorted(index) == list(np.flatnonzero(has["text"]))
    np.testing.assert_allclose(scores, vectors["text"][index] @ query[0], atol=1e-6)


def test_of_equal_scores_the_first_come_first(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_BYTES", 3 * 4 * 2)
    rows = np.tile(np.array([[1, 0], [0, 1]], np.float32), (6, 1))
    query = np.array([[1, 0]], np.float32)
    index, _ = nearest({"text": rows}, {"text": np.ones(12, bool)}, query, 4)
    assert list(index) == [0, 2, 4, 6]


def test_what_is_masked_is_not_read_and_nothing_may_be_left():
    rows = np.full((3, 2), np.nan, np.float32)
    index, scores = nearest({"text": rows}, {"text": np.zeros(3, bool)}, rows[:1] * 0 + 1, 2)
    assert len(index) == len(scores) == 0


def test_a_mapped_file_of_half_precision(tmp_path):
    rng = np.random.default_rng(3)
    rows = unit(rng, 40, 8)
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    index, scores = nearest({"text": mapped}, {"text": np.ones(40, bool)}, rows[5:6], 3)
    assert index[0] == 5
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, rows[index] @ rows[5], atol=2e-3)
