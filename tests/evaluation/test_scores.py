import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.evaluation import SCORES, scores
from rcml_jax.evaluation.scores import RelationEmbeddings, pair_scores
from tests import reference
from tests.evaluation.tables import ITEMS, KINDS, NAMES, arrays, random_table, units


def twin(table, a, b, relation, similarity):
    a, b, relation = np.broadcast_arrays(a, b, relation)
    out = {name: np.zeros(a.shape) for name in SCORES}
    for index in np.ndindex(a.shape):
        pair = a[index], b[index], relation[index]
        weight = table.sentence_weight
        found = reference.pair_score(*arrays(table), *pair, similarity, weight)
        for name, value in found.items():
            out[name][index] = value
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", NAMES)
def test_the_five_scores_are_those_of_the_twin(similarity, kind):
    table = random_table(**KINDS[kind])
    rng = np.random.default_rng(1)
    a, b = rng.integers(10, size=(7, 1)), rng.integers(10, size=(7, 3))
    relation = rng.integers(4, size=(7, 1))
    found = pair_scores(table, a, b, relation, similarity=similarity)
    assert tuple(found) == SCORES
    for name, expected in twin(table, a, b, relation, similarity).items():
        assert found[name].shape == (7, 3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["under relations", "both free"])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "product"])
def test_the_weighted_sentence_is_that_of_the_twin(similarity, kind):
    plain = random_table(**KINDS[kind])
    table = dataclasses.replace(plain, sentence_weight=0.7)
    rng = np.random.default_rng(1)
    a, b = rng.integers(10, size=(7, 1)), rng.integers(10, size=(7, 1))
    relation = rng.integers(4, size=(7, 3))
    found = pair_scores(table, a, b, relation, similarity=similarity)
    for name, expected in twin(table, a, b, relation, similarity).items():
        assert found[name].shape == (7, 3)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
    without = pair_scores(plain, a, b, relation, similarity=similarity)
    # The product compares with the sentence anyway.
    assert np.allclose(found["avg"], without["avg"]) == (similarity == "product")


def test_a_weighted_sentence_orders_as_the_query_vector_with_the_sentence_added():
    table = dataclasses.replace(random_table(text_free=True, image_free=True), sentence_weight=1.5)
    for query, relation in ((2, 1), (5, 3)):
        b = np.arange(10)[None]
        found = pair_scores(table, np.array([[query]]), b, np.array([[relation]]))
        vector = table.text[0, query] + 1.5 * table.relation[relation]
        np.testing.assert_array_equal(
            np.argsort(found["tt"][0]), np.argsort(table.text[0] @ vector)
        )
        assert not np.array_equal(
            np.argsort(found["tt"][0]), np.argsort(table.text[0] @ table.text[0, query])
        )


@pytest.mark.parametrize("similarity", ["cosine", "manhattan", "product"])
def test_blocks_of_queries_change_nothing(similarity, monkeypatch):
    table = random_table()
    rng = np.random.default_rng(2)
    a, b, relation = (
        rng.integers(10, size=(11, 1)),
        rng.integers(10, size=(11, 4)),
        np.zeros((1, 1)),
    )
    relation = relation.astype(int)
    whole = pair_scores(table, a, b, relation, similarity=similarity)
    # Three queries at a time, two times in a call: the last call is a part of one.
    monkeypatch.setattr(scores, "_CACHE_BYTES", 3 * 2 * (1 + 4) * 5 * 4)
    monkeypatch.setattr(scores, "_QUERIES", 6)
    parts = pair_scores(table, a, b, relation, similarity=similarity)
    for name in SCORES:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("similarity", NAMES)
def test_equal_candidates_tie_to_the_last_bit(similarity):
    """Wherever they stand among the others: their ranks must not hang on rounding."""
    rng = np.random.default_rng(5)
    kind = np.arange(10) % 3
    text, image = units(rng, 2, 2, 3, 37)[:, :, kind]
    table = RelationEmbeddings(ITEMS, text, image, units(rng, 2, 37))
    a, b = rng.integers(10, size=(30, 1)), rng.integers(10, size=(30, 21))
    found = pair_scores(table, a, b, rng.integers(2, size=(30, 1)), similarity=similarity)
    for name in SCORES:
        for row, kinds in zip(found[name], kind[b], strict=True):
            assert [len(np.unique(row[kinds == k])) for k in range(3)] == [1, 1, 1]
            assert len(np.unique(row)) == 3


def test_vectors_are_gathered_for_a_few_queries_at_a_time():
    block, columns, queries, dim = 16, 21, 4096, 128
    of = jax.ShapeDtypeStruct
    table = [of((2, 50, dim), jnp.float32)] * 2 + [of((2, dim), jnp.float32)]
    index = [of((queries // block, block, n), jnp.int32) for n in (1, columns, 1)]
    lowered = scores.scores_of_blocks.lower(*table, None, *index, similarity="cosine")
    plan = lowered.compile().memory_analysis()
    assert plan.temp_size_in_bytes < queries * columns * dim * 4 / 10


def test_an_unknown_similarity_is_named():
    one = np.zeros((1, 1), int)
    with pytest.raises(ValueError, match="unknown similarity 'cosin'"):
        pair_scores(random_table(), one, one, one, similarity="cosin")


def test_rows_of_items():
    table = random_table()
    np.testing.assert_array_equal(table.rows(ITEMS[[[2, 0], [9, 5]]]), [[2, 0], [9, 5]])
    for unknown in (0, 5, 43):
        with pytest.raises(ValueError, match="an item is not among the embeddings"):
            table.rows(np.array([3, unknown]))
