"""Relation type prediction and relation validity."""

import numpy as np

from rcml_jax.evaluation.probe import fit_classifier
from rcml_jax.evaluation.ranking import candidate_ranks, retrieval_metrics
from rcml_jax.evaluation.scores import SCORES, EmbeddingTable, pair_scores


def relation_type(
    table: EmbeddingTable,
    a: np.ndarray,
    b: np.ndarray,
    relations: np.ndarray,
    *,
    similarity: str = "cosine",
) -> dict:
    """Top-1 and Top-3 of the true relation among candidates, by the pair's score under each.

    a, b (p,): item identifiers; relations (p, c) with the true one in column 0. Ties count against
    the model, so one that does not look at the relation scores 0. Rates are fractions.
    """
    scores = pair_scores(
        table,
        table.rows(a)[:, None],
        table.rows(b)[:, None],
        relations,
        similarity=similarity,
    )
    result: dict = {"pairs": len(a), "candidates": relations.shape[1], "top1": {}, "top3": {}}
    for name in SCORES:
        metrics = retrieval_metrics(candidate_ranks(scores[name]), ks=(1, 3))
        result["top1"][name] = float(metrics["hit@1"])
        result["top3"][name] = float(metrics["hit@3"])
    return result


def validity_features(
    table: EmbeddingTable, a: np.ndarray, b: np.ndarray, relation: np.ndarray
) -> np.ndarray:
    """Frozen features [z_T(A), z_I(A), z_T(B), z_I(B), h_E] of (m,) examples → (m, 5d)."""

    def take(embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return embeddings[relation if len(embeddings) > 1 else 0, rows]

    ra, rb = table.rows(a), table.rows(b)
    parts = [
        take(table.text, ra),
        take(table.image, ra),
        take(table.text, rb),
        take(table.image, rb),
    ]
    return np.concatenate([*parts, table.relation[relation]], axis=-1)


def relation_validity(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    probe: str = "linear",
    seed: int = 0,
) -> dict:
    """Accuracy of a probe that tells true (A, B, e) from false, fitted on frozen features.

    train, test: (features (m, f), labels (m,) of 0 and 1), as `validity_features` gives them. probe
    is "linear" (logistic regression) or "mlp".
    """
    predict = fit_classifier(*train, kind=probe, seed=seed)
    features, labels = test
    correct = predict(features) == labels
    return {"pairs": len(labels), "probe": probe, "accuracy": float(np.mean(correct))}
