import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.ops import ranking
from tests import reference


def make_scores(seed=0, queries=40, candidates=21):
    # Few distinct values, so that there are ties.
    rng = np.random.default_rng(seed)
    return rng.integers(0, 8, (queries, candidates)).astype(np.float32)


@pytest.mark.parametrize("shape", [None, (21,), (40, 21)])
def test_ranks(shape):
    scores = make_scores()
    where = None if shape is None else np.random.default_rng(1).uniform(size=shape) < 0.6
    ranks = ranking.candidate_ranks(scores, where=where)
    assert jnp.issubdtype(ranks.dtype, jnp.integer)
    np.testing.assert_array_equal(ranks, reference.candidate_ranks(scores, where))


def test_candidates_are_not_ordered():
    scores = make_scores()
    order = np.concatenate([[0], 1 + np.random.default_rng(1).permutation(20)])
    np.testing.assert_array_equal(
        ranking.candidate_ranks(scores[:, order]), ranking.candidate_ranks(scores)
    )


def test_without_ties_the_rank_is_the_place_in_the_order():
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(9.0, dtype=np.float32), (30, 1)), axis=1)
    place = np.argmax(np.argsort(-scores, axis=1) == 0, axis=1)
    np.testing.assert_array_equal(ranking.candidate_ranks(scores), place)


@pytest.mark.parametrize("value", [0.0, 1e4, -np.inf, np.nan])
def test_a_collapsed_model_ranks_last(value):
    ranks = ranking.candidate_ranks(np.full((3, 21), value, np.float32))
    np.testing.assert_array_equal(ranks, np.full(3, 20))
    assert ranking.retrieval_metrics(ranks)["hit@5"] == 0


def test_nan():
    scores = make_scores()
    scores[0, 0] = np.nan
    scores[1, 3] = np.nan
    ranks = ranking.candidate_ranks(scores)
    np.testing.assert_array_equal(ranks, reference.candidate_ranks(scores))
    assert ranks[0] == 20
    where = np.arange(21) < 6
    assert ranking.candidate_ranks(scores, where=where)[0] == 5


def test_only_the_positive():
    np.testing.assert_array_equal(ranking.candidate_ranks(np.zeros((4, 1), np.float32)), 0)
    nobody = ranking.candidate_ranks(make_scores(), where=np.zeros(21, bool))
    np.testing.assert_array_equal(nobody, 0)


def test_measures():
    ranks = reference.candidate_ranks(make_scores())
    metrics = ranking.retrieval_metrics(jnp.asarray(ranks), ks=(1, 3, 5))
    expected = {f"hit@{k}": np.mean([rank < k for rank in ranks]) for k in (1, 3, 5)}
    expected["mrr"] = np.mean([1 / (rank + 1) for rank in ranks])
    assert set(metrics) == set(expected)
    for name, value in metrics.items():
        assert isinstance(value, float)
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)


def test_sums_and_counts_of_padded_batches_add_up():
    ranks = reference.candidate_ranks(make_scores())
    padded = np.concatenate([ranks, np.zeros(8, ranks.dtype)]).reshape(3, 16)
    where = (np.arange(48) < 40).reshape(3, 16)
    batches = list(zip(padded, where, strict=True))
    for measure in (lambda r, **o: ranking.hit_at(r, 5, **o), ranking.reciprocal_rank):
        parts = np.array([measure(r, where=w) for r, w in batches])
        np.testing.assert_allclose(parts.sum(axis=0), measure(ranks), rtol=1e-6)
    whole = ranking.retrieval_metrics(padded.ravel(), where=where.ravel())
    assert whole == pytest.approx(ranking.retrieval_metrics(ranks), rel=1e-6)


def test_no_queries_is_an_error():
    with pytest.raises(ValueError, match="no queries"):
        ranking.retrieval_metrics(np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="no queries"):
        ranking.retrieval_metrics(np.zeros(3, np.int32), where=np.zeros(3, bool))


def test_vmap_and_bfloat16():
    scores = np.stack([make_scores(seed) for seed in range(3)])
    ranks = jax.vmap(ranking.candidate_ranks)(jnp.asarray(scores, jnp.bfloat16))
    np.testing.assert_array_equal(ranks, [reference.candidate_ranks(s) for s in scores])


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        ranks = ranking.candidate_ranks(jnp.asarray(make_scores()))
        ranking.retrieval_metrics(ranks)
