import numpy as np
import pytest

from rcml_jax.evaluation.retrieval import retrieval
from tests import reference
from tests.evaluation.tables import ITEMS, KINDS, NAMES, arrays, collapsed_table, random_table


def queries(count=25, width=8, seed=3):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(10)[: width + 1] for _ in range(count)])
    return ITEMS[rows[:, 0]], ITEMS[rows[:, 1:]], rng.integers(4, size=count)


def twin(table, query, candidates, relation, similarity):
    places = np.searchsorted(ITEMS, query), np.searchsorted(ITEMS, candidates)
    return reference.retrieval(*arrays(table), *places, relation, similarity)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", NAMES)
def test_the_measures_are_those_of_the_twin(similarity, kind):
    table = random_table(**KINDS[kind])
    result = retrieval(table, *queries(), similarity=similarity)
    assert result.pop("queries") == 25
    expected = twin(table, *queries(), similarity)
    assert result.keys() == expected.keys()
    for measure, values in expected.items():
        assert result[measure] == pytest.approx(values)
    assert 0 < expected["hit@5"]["avg"] < 1


def test_collapsed_embeddings_score_nothing():
    result = retrieval(collapsed_table(), *queries())
    for name in ("tt", "ii", "ti", "it", "avg"):
        assert result["hit@1"][name] == result["hit@5"][name] == 0
        assert result["mrr"][name] == pytest.approx(1 / 8)


def test_nan_embeddings_score_nothing():
    table = random_table()
    table.text[:] = np.nan
    result = retrieval(table, *queries())
    assert result["hit@5"]["tt"] == result["hit@5"]["avg"] == 0
    assert result["hit@5"]["ii"] > 0


def test_a_positive_that_is_the_query_itself_comes_first():
    query, candidates, relation = queries()
    candidates[:, 0] = query
    table = random_table()
    result = retrieval(table, query, candidates, relation)
    assert result["hit@1"]["tt"] == result["hit@1"]["avg"] == result["mrr"]["ii"] == 1
