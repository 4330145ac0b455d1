import numpy as np
import pytest

from rcml_jax.evaluation import scores
from rcml_jax.evaluation.scores import SCORES, pair_scores
from tests import reference
from tests.evaluation.tables import ITEMS, KINDS, NAMES, arrays, random_table


def twin(table, a, b, relation, similarity):
    a, b, relation = np.broadcast_arrays(a, b, relation)
    out = {name: np.zeros(a.shape) for name in SCORES}
    for index in np.ndindex(a.shape):
        pair = a[index], b[index], relation[index]
        for name, value in reference.pair_score(*arrays(table), *pair, similarity).items():
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
    # Room for three queries at a time: the last block is a part of one.
    monkeypatch.setattr(scores, "_BLOCK_BYTES", 3 * 4 * 5 * 4)
    parts = pair_scores(table, a, b, relation, similarity=similarity)
    for name in SCORES:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-6, atol=1e-7)


def test_an_unknown_similarity_is_named():
    one = np.zeros((1, 1), int)
    with pytest.raises(ValueError, match="unknown similarity 'cosin'"):
        pair_scores(random_table(), one, one, one, similarity="cosin")


def test_rows_of_items():
    table = random_table()
    np.testing.assert_array_equal(table.rows(ITEMS[[[2, 0], [9, 5]]]), [[2, 0], [9, 5]])
    for unknown in (0, 5, 43):
        with pytest.raises(ValueError, match="an item is not in the embedding table"):
            table.rows(np.array([3, unknown]))
