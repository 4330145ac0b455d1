import numpy as np
import pytest

from rcml_jax.evaluation.relation_probes import relation_type, relation_validity, validity_features
from tests import reference
from tests.evaluation.tables import ITEMS, KINDS, NAMES, arrays, collapsed_table, random_table

SCORES = ("tt", "ii", "ti", "it", "avg")


def pairs(count=25, candidates=7, seed=4):
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(10)[:2] for _ in range(count)])
    relations = np.stack([rng.permutation(9)[:candidates] for _ in range(count)])
    return ITEMS[rows[:, 0]], ITEMS[rows[:, 1]], relations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", NAMES)
def test_the_measures_are_those_of_the_twin(similarity, kind):
    table = random_table(relations=9, **KINDS[kind])
    a, b, relations = pairs()
    result = relation_type(table, a, b, relations, similarity=similarity)
    assert (result.pop("pairs"), result.pop("candidates")) == (25, 7)
    places = np.searchsorted(ITEMS, a), np.searchsorted(ITEMS, b)
    expected = reference.relation_type(*arrays(table), *places, relations, similarity)
    assert result.keys() == expected.keys()
    macro, twin_macro = result.pop("macro"), expected.pop("macro")
    for measure, values in expected.items():
        assert result[measure] == pytest.approx(values)
        assert macro[measure] == pytest.approx(twin_macro[measure])


def test_a_model_that_does_not_look_at_the_relation_scores_nothing():
    table = random_table(relations=9, text_free=True, image_free=True)
    result = relation_type(table, *pairs())
    assert result["top1"] == result["top3"] == dict.fromkeys(SCORES, 0.0)
    # The product looks at the sentence, so that the same table is not at 0.
    assert relation_type(table, *pairs(), similarity="product")["top3"]["avg"] > 0


def test_collapsed_embeddings_score_nothing():
    table = collapsed_table()
    a, b, relations = pairs()
    for similarity in NAMES:
        result = relation_type(table, a, b, relations % 4, similarity=similarity)
        assert result["top3"] == dict.fromkeys(SCORES, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_validity_features(kind):
    table = random_table(**KINDS[kind])
    a, b, relation = ITEMS[[0, 3, 9]], ITEMS[[1, 2, 3]], np.array([2, 0, 3])
    features = validity_features(table, a, b, relation)
    assert features.shape == (3, 25)
    for row, (i, j, e) in enumerate(zip([0, 3, 9], [1, 2, 3], relation, strict=True)):
        et, ei = (e if len(x) > 1 else 0 for x in (table.text, table.image))
        parts = [table.text[et, i], table.image[ei, i], table.text[et, j], table.image[ei, j]]
        np.testing.assert_array_equal(features[row], np.concatenate([*parts, table.relation[e]]))


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_validity_is_the_accuracy_on_the_second_set(probe):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 4)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int32)
    train, test = (features[:40], labels[:40]), (features[40:], labels[40:])
    result = relation_validity(train, test, probe=probe)
    assert (result["pairs"], result["probe"]) == (40, probe)
    assert result["accuracy"] > 0.85
    turned = relation_validity(train, (test[0], 1 - test[1]), probe=probe)
    assert turned["accuracy"] == pytest.approx(1 - result["accuracy"])
