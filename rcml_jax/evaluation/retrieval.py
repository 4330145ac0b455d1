"""Relation-guided retrieval: the positive among unrelated candidates, under the relation."""

import numpy as np

from rcml_jax.evaluation.ranking import candidate_ranks, retrieval_metrics
from rcml_jax.evaluation.scores import SCORES, EmbeddingTable, pair_scores


def retrieval(
    table: EmbeddingTable,
    query: np.ndarray,
    candidates: np.ndarray,
    relation: np.ndarray,
    *,
    similarity: str = "cosine",
) -> dict:
    """Hit@1, Hit@5 and MRR for each of the five scores.

    query (q,), candidates (q, c) with the positive in column 0: item identifiers; relation (q,).
    Ties count against the model. Returns {"queries", "hit@1", "hit@5", "mrr"}, rates as fractions.
    """
    scores = pair_scores(
        table,
        table.rows(query)[:, None],
        table.rows(candidates),
        relation[:, None],
        similarity=similarity,
    )
    result: dict = {"queries": len(query), "hit@1": {}, "hit@5": {}, "mrr": {}}
    for name in SCORES:
        for measure, value in retrieval_metrics(candidate_ranks(scores[name]), ks=(1, 5)).items():
            result[measure][name] = float(value)
    return result
