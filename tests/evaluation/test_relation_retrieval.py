import dataclasses
import math

import numpy as np
import pytest
import scipy.sparse

from rcml_jax.evaluation.relation_retrieval import _BLOCK, gallery_retrieval, retrieval
from rcml_jax.evaluation.scores import RelationEmbeddings
from tests import reference
from tests.evaluation.tables import (
    ITEMS,
    KINDS,
    NAMES,
    arrays,
    collapsed_table,
    random_table,
    units,
)


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
    macro, twin_macro = result.pop("macro"), expected.pop("macro")
    for measure, values in expected.items():
        assert result[measure] == pytest.approx(values)
        assert macro[measure] == pytest.approx(twin_macro[measure])
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


# Every partner in a gallery.

#: Places of ITEMS that share a text, and the first of each.
TEXTS = np.array([0, 1, 0, 3, 4, 1, 0, 7, 8, 9])


def gallery(count=30, relations=4, seed=5, hide=0.1):
    """Queries with random answers; of some more places are hidden than the query's own."""
    rng = np.random.default_rng(seed)
    query = rng.integers(len(ITEMS), size=count)
    relation = np.sort(rng.integers(relations, size=count))
    relevance = rng.random((count, len(ITEMS))) < 0.3
    hidden = rng.random(relevance.shape) < hide
    hidden[np.arange(count), query] = True
    relevance &= ~hidden
    relevance[~relevance.any(axis=1), :2] = True
    hidden[relevance] = False
    hidden[np.arange(count), query] = True
    relevance[np.arange(count), query] = False
    kept = relevance.any(axis=1)
    return query[kept], relation[kept], relevance[kept], hidden[kept]


def run(table, query, relation, relevance, hidden, texts=TEXTS, **options):
    sparse = (scipy.sparse.csr_array(matrix) for matrix in (relevance, hidden))
    return gallery_retrieval(table, ITEMS, texts, query, relation, *sparse, **options)


def slow_measures(ranking):
    """Of a ranking (right or wrong, best first): Hit@5, R-precision and average precision."""
    answers = sum(ranking)
    places = [place for place, is_relevant in enumerate(ranking, 1) if is_relevant]
    precision = [sum(ranking[:place]) / place for place in places]
    return any(ranking[:5]), sum(ranking[:answers]) / answers, sum(precision) / answers


def slow_gallery(table, query, relation, relevance, hidden, texts=TEXTS, similarity="cosine"):
    """The measures by their definitions, one query and one candidate at a time."""
    text, image, h = arrays(table)
    result = {name: [] for name in ("tt", "ii", "ti", "it", "avg")}
    asked = set()
    for q, e, is_relevant, is_hidden in zip(query, relation, relevance, hidden, strict=True):
        for name, found in result.items():
            if name in ("tt", "ti") and (texts[q], e) in asked:
                continue
            ranked = []
            if name in ("tt", "it"):
                for t in np.unique(texts):
                    shown = (texts == t) & ~is_hidden
                    if shown.any() and not (name == "tt" and t == texts[q]):
                        ranked.append((t, bool((is_relevant & shown).any())))
            else:
                ranked = [(c, bool(is_relevant[c])) for c in range(len(texts)) if not is_hidden[c]]
            if not any(good for _, good in ranked):
                continue
            # Embeddings of the first item with a text stand for all of them.
            own, order = text[:, texts], []
            for c, good in ranked:
                weight = table.sentence_weight
                scores = reference.pair_score(own, image, h, q, c, e, similarity, weight)
                order.append((-np.round(scores[name], 6), good))
            order.sort()  # at one score False, a wrong one, comes first
            found.append(slow_measures([good for _, good in order]))
        asked.add((texts[q], e))
    return result


def check(result, expected):
    for name, rows in expected.items():
        assert result["queries"][name] == len(rows)
        means = np.mean(np.array(rows, float), axis=0)
        for measure, mean in zip(("hit@5", "r_precision", "map"), means, strict=True):
            assert result[measure][name] == pytest.approx(mean), (measure, name)


@pytest.mark.parametrize("kind", KINDS)
def test_gallery_measures_are_those_of_the_twin(kind):
    table, asked = random_table(**KINDS[kind]), gallery()
    result = run(table, *asked)
    expected = slow_gallery(table, *asked)
    check(result, expected)
    assert result["gallery"] == {"items": 10, "texts": 7}
    assert len(expected["tt"]) < len(expected["ii"]) == len(asked[0])
    assert len(expected["ti"]) < len(expected["it"])


def test_gallery_measures_under_another_similarity():
    table, asked = random_table(), gallery()
    check(
        run(table, *asked, similarity="manhattan"),
        slow_gallery(table, *asked, similarity="manhattan"),
    )


def test_gallery_measures_with_a_weighted_sentence():
    for kind in ("under relations", "both free"):
        plain, asked = random_table(**KINDS[kind]), gallery()
        table = dataclasses.replace(plain, sentence_weight=0.8)
        result = run(table, *asked)
        check(result, slow_gallery(table, *asked))
        assert result["map"]["avg"] != run(plain, *asked)["map"]["avg"]


def test_more_queries_than_a_block():
    table, asked = random_table(relations=2), gallery(2 * _BLOCK + 40, relations=2)
    assert np.bincount(asked[1]).min() > _BLOCK
    check(run(table, *asked), slow_gallery(table, *asked))


def test_ties_in_a_gallery_count_against_the_model():
    """Few different vectors, many equal ones, in all places of the gallery."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        text, image = (units(rng, 1, 3, 5)[:, rng.integers(3, size=len(ITEMS))] for _ in "ti")
        table = RelationEmbeddings(ITEMS, text, image, units(rng, 4, 5))
        asked = gallery(seed=seed)
        check(run(table, *asked), slow_gallery(table, *asked))


def test_collapsed_embeddings_rank_every_wrong_one_first():
    query, relation, relevance, hidden = gallery(hide=0)
    relevance[:, :] = False
    relevance[:, [3, 7]] = True
    relevance[np.arange(len(query)), query] = False
    result = run(collapsed_table(), query, relation, relevance, hidden)
    for name in ("ii", "avg", "it", "ti", "tt"):
        assert result["r_precision"][name] == 0
        assert 0 < result["map"][name] < result["chance"]["map"][name]
        # Of few texts, less than five may be wrong.
        assert result["hit@5"][name] == 0 or name in ("tt", "it")


def test_a_perfect_gallery_and_nan():
    """Texts and images of one direction a class, the query's own class right."""
    classes = TEXTS
    direction = np.eye(10, dtype=np.float32)[classes][None]
    table = RelationEmbeddings(ITEMS, direction, direction, units(np.random.default_rng(0), 1, 10))
    query = np.flatnonzero(np.isin(classes, [0, 1]))
    relevance = classes[query][:, None] == classes
    hidden = np.arange(10) == query[:, None]
    asked = query, np.zeros(len(query), int), relevance & ~hidden, hidden
    result = run(table, *asked)
    # No other text is right: TT asks nothing. Texts ask once.
    assert result["queries"] == {"tt": 0, "ii": 5, "ti": 2, "it": 5, "avg": 5}
    for name in ("ii", "ti", "it", "avg"):
        assert result["hit@5"][name] == result["r_precision"][name] == result["map"][name] == 1
    assert result["map"]["tt"] == 0
    table.image[:] = np.nan
    broken = run(table, *asked)
    for name in ("ii", "ti", "it", "avg"):
        assert broken["r_precision"][name] == 0, name


def test_chance_is_the_mean_over_all_orders():
    """Of random orders of galleries with different numbers of answers."""
    asked = gallery(count=12)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(150):
        table = RelationEmbeddings(
            ITEMS, units(rng, 1, 10, 6), units(rng, 1, 10, 6), units(rng, 4, 6)
        )
        drawn.append(run(table, *asked))
    chance = drawn[0]["chance"]
    for measure in ("hit@5", "r_precision", "map"):
        for name in ("tt", "it", "ii"):
            values = [d[measure][name] for d in drawn]
            spread = np.std(values) / math.sqrt(len(values))
            assert abs(np.mean(values) - chance[measure][name]) < 5 * spread + 1e-9
    relevance = asked[2]
    ranked = (~asked[3]).sum(axis=1)
    wrong = [
        math.comb(n - r, 5) / math.comb(n, 5)
        for n, r in zip(ranked.tolist(), relevance.sum(axis=1).tolist(), strict=True)
    ]
    assert chance["hit@5"]["ii"] == pytest.approx(1 - np.mean(wrong))
