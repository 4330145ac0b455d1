"""Relation-guided retrieval: one positive among candidates, or all relevant items of a gallery."""

import functools
import itertools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import scipy.sparse

from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.measures import of_ranks
from rcml_jax.evaluation.scores import RelationEmbeddings, pair_scores
from rcml_jax.ops.ranking import candidate_ranks
from rcml_jax.ops.similarity import l2_normalize, prepare_rows, row_scores

_MEASURES = ("hit@5", "r_precision", "map")
_BLOCK = 128  # queries ranked at a time


def retrieval(
    table: RelationEmbeddings,
    query: np.ndarray,
    candidates: np.ndarray,
    relation: np.ndarray,
    *,
    similarity: str = "cosine",
) -> dict:
    """Hit@1, Hit@5, MRR and further measures of ranks in `MEASURES`, for each of the five scores.

    query (q,), candidates (q, c) with the positive in column 0: item identifiers; relation (q,).
    Ties count against the model. Returns what `retrieval_measures` does.
    """
    scores = pair_scores(
        table,
        table.rows(query)[:, None],
        table.rows(candidates),
        relation[:, None],
        similarity=similarity,
    )
    return retrieval_measures(scores, relation)


def retrieval_measures(scores: dict[str, np.ndarray], relation: np.ndarray) -> dict:
    """The measures of ranks from scores (q, c), with the positive in column 0.

    relation (q,). Returns {"queries", "hit@1", "hit@5", "mrr", "macro"}: rates as fractions, for
    each score. "macro" averages the rates of the relations, each with equal weight.
    """
    ranks = {name: np.asarray(candidate_ranks(x)) for name, x in scores.items()}
    return {"queries": len(relation), **rank_measures(ranks, relation, of_ranks("retrieval"))}


def rank_measures(
    ranks: dict[str, np.ndarray],
    relation: np.ndarray,
    measures: Mapping[str, Callable[[np.ndarray], np.ndarray]],
) -> dict:
    """Mean measures of 0-based ranks (q,) by name; "macro" averages over relations (q,).

    measures: by name a function of ranks, as of `Measure.of_ranks`. Raises ValueError if there is
    no query.
    """
    if not len(relation):
        raise ValueError("there are no queries to average over")
    result: dict = {measure: {} for measure in measures}
    result["macro"] = {measure: {} for measure in measures}
    of_relation = [np.flatnonzero(relation == e) for e in np.unique(relation)]
    for name, found in ranks.items():
        for measure, function in measures.items():
            values = function(found)
            parts = [np.mean(values[rows]) for rows in of_relation]
            result[measure][name] = float(np.mean(values))
            result["macro"][measure][name] = float(np.mean(parts))
    return result


def gallery_retrieval(
    table: RelationEmbeddings,
    items: np.ndarray,
    texts: np.ndarray,
    query: np.ndarray,
    relation: np.ndarray,
    relevance: scipy.sparse.csr_array,
    hidden: scipy.sparse.csr_array,
    *,
    similarity: str = "cosine",
) -> dict:
    """Hit@5, R-precision and mean average precision over a gallery, for each of the five scores.

    items (n,): identifiers of the gallery. texts (n,): the index of the first item with the same
        text, whose embedding stands for all of them.
    query (q,): indices into the gallery; relation (q,), sorted; relevance, hidden (q, n) sparse
        bool:
        the relevant items, and items that are not ranked.

    Where texts are ranked (TT, IT), each distinct text is ranked once. It is relevant if any item
    with this text is; the query's own text is left out. Where texts are queries (TT, TI), each is
    asked once under each relation. Hit@5: a relevant item is among the first five. R-precision: the
    share of relevant items among the first R, where R items are relevant. Ties count against the
    model: irrelevant items come first.

    Returns {"gallery": {"items", "texts"}, "queries", "hit@5", "r_precision", "map", "chance"}: for
    each score the number of queries and the means as fractions. "chance" has the expected means of
    a random order.
    """
    rows, first = table.rows(items), np.unique(texts)
    text_of = np.searchsorted(first, texts)
    shape = len(items), len(first)
    carried = scipy.sparse.csr_array((np.ones(len(items)), (np.arange(len(items)), text_of)), shape)
    asked = text_of[query] + relation.astype(np.int64) * len(first)
    once = np.isin(np.arange(len(query)), np.unique(asked, return_index=True)[1])
    total: dict = {name: np.zeros((2, len(_MEASURES))) for name in SCORES}
    counts = dict.fromkeys(SCORES, 0)
    for part in _blocks_of(relation):
        indices, e = query[part], relation[part[0]]
        of_item = relevance[part].toarray(), ~hidden[part].toarray()
        shown = np.asarray(carried.sum(axis=0)) > (hidden[part].astype(float) @ carried).toarray()
        of_text = (relevance[part].astype(float) @ carried).toarray() > 0, shown
        others = shown & (np.arange(len(first)) != text_of[indices][:, None])
        scores = _gallery_scores(table, e, rows, texts, first, indices, similarity)
        for name in SCORES:
            is_relevant, ranked = of_text if name[-1] == "t" else of_item
            ranked = others if name == "tt" else ranked
            counted = np.any(is_relevant & ranked, axis=1)
            if name[0] == "t":
                counted &= once[part]
            chosen = scores[name][counted], is_relevant[counted], ranked[counted]
            total[name] += np.stack([_ranked_measures(*chosen), _expected_measures(*chosen[1:])])
            counts[name] += int(counted.sum())
    means = {name: total[name] / max(counts[name], 1) for name in SCORES}
    by_measure = [
        {m: {name: float(means[name][row, i]) for name in SCORES} for i, m in enumerate(_MEASURES)}
        for row in (0, 1)
    ]
    gallery = {"items": len(items), "texts": len(first)}
    return {"gallery": gallery, "queries": counts, **by_measure[0], "chance": by_measure[1]}


def _blocks_of(relation: np.ndarray):
    """Yield the rows of queries in blocks of one relation each."""
    bounds = np.flatnonzero(np.diff(relation, prepend=-1, append=-1)).tolist()
    for start, stop in itertools.pairwise(bounds):
        for low in range(start, stop, _BLOCK):
            yield np.arange(low, min(low + _BLOCK, stop))


def _gallery_scores(
    table: RelationEmbeddings, relation: int, rows, texts, first, indices, similarity: str
) -> dict[str, np.ndarray]:
    """Scores of queries with every item (II, TI, AVG) or every distinct text (TT, IT)."""
    text, image = (
        side[relation if len(side) > 1 else 0][rows] for side in (table.text, table.image)
    )
    text = text[texts]
    padded = np.minimum(np.arange(_BLOCK), len(indices) - 1)
    sentence = (table.relation[relation], table.sentence_weight) if table.sentence_weight else None
    scores = _score_block(text, image, text[first], indices[padded], sentence, similarity)
    return {name: np.asarray(block)[: len(indices)] for name, block in scores.items()}


@functools.partial(jax.jit, static_argnames="similarity")
def _score_block(text, image, distinct, indices, sentence, similarity):
    def score_rows(x, y):
        return row_scores(similarity, prepare_rows(similarity, x), prepare_rows(similarity, y))

    def score(x, y):
        found = score_rows(x, y)
        if sentence is None:
            return found
        # The query's own score with the sentence is the same for all candidates.
        vector, weight = sentence
        return found + weight * score_rows(vector[None], y)

    both = l2_normalize(text + image)
    return {
        "tt": score(text[indices], distinct),
        "ii": score(image[indices], image),
        "ti": score(text[indices], image),
        "it": score(image[indices], distinct),
        "avg": score(both[indices], both),
    }


def _ranked_measures(scores: np.ndarray, relevance: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Sums (3,) of the measures over rows (q, c), each with a relevant, ranked item."""
    relevance = relevance & ranked
    worst = np.where(relevance, -np.inf, np.inf)
    scores = np.where(np.isnan(scores), worst, scores).astype(np.float32) + np.float32(0)
    # One unsigned key per item: falling score, irrelevant before relevant, unranked items last.
    bits = scores.view(np.uint32)
    rising = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    keys = (~rising).astype(np.uint64) << np.uint64(1) | relevance
    keys[~ranked] = np.iinfo(np.uint64).max - 1
    keys.sort(axis=1)
    hits = (keys & np.uint64(1)).astype(np.int64)
    found, relevant = hits.cumsum(axis=1), relevance.sum(axis=1)
    in_first = np.take_along_axis(found, relevant[:, None] - 1, axis=1)[:, 0]
    precision = np.sum(hits * found / np.arange(1, hits.shape[1] + 1), axis=1) / relevant
    return np.array(
        [
            np.sum(np.any(hits[:, :5], axis=1)),
            np.sum(in_first / relevant),
            np.sum(precision),
        ]
    )


def _expected_measures(relevance: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """Expected value of `_ranked_measures` over all orders of the ranked items."""
    n = ranked.sum(axis=1).astype(float)
    relevant = (relevance & ranked).sum(axis=1).astype(float)
    # The first k of n ranked items hold no relevant one.
    free = np.stack([(n - relevant - k).clip(min=0) / (n - k).clip(min=1) for k in range(5)])
    harmonic = np.cumsum(1 / np.arange(1, ranked.shape[1] + 1))[n.astype(int) - 1]
    # E[AP] = Σ_k (1 + (k - 1) (R - 1)/(n - 1)) / (k n)
    others = (relevant - 1) / (n - 1).clip(min=1)
    precision = (harmonic + others * (n - harmonic)) / n
    return np.array([np.sum(1 - np.prod(free, axis=0)), np.sum(relevant / n), np.sum(precision)])
