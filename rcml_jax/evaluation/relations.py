"""Relation type prediction and relation validity."""

import numpy as np

from rcml_jax.evaluation.probe import fit_classifier
from rcml_jax.evaluation.ranking import candidate_ranks
from rcml_jax.evaluation.retrieval import rank_measures
from rcml_jax.evaluation.scores import EmbeddingTable, pair_scores


def relation_type(
    table: EmbeddingTable,
    a: np.ndarray,
    b: np.ndarray,
    relations: np.ndarray,
    *,
    where: np.ndarray | None = None,
    similarity: str = "cosine",
) -> dict:
    """Top-1 and Top-3 of the true relation among candidates, by the pair's score under each.

    a, b (p,): item identifiers; relations (p, c) with the true one in column 0; where (p, c) bool:
    the candidates that count. Ties count against the model, so one that does not look at the
    relation scores 0. Returns what `type_measures` does.
    """
    scores = pair_scores(
        table,
        table.rows(a)[:, None],
        table.rows(b)[:, None],
        relations,
        similarity=similarity,
    )
    return type_measures(scores, relations, where=where)


def type_measures(
    scores: dict[str, np.ndarray], relations: np.ndarray, *, where: np.ndarray | None = None
) -> dict:
    """Top-1 and Top-3 of scores (p, c) by name for relations (p, c), the true one in column 0.

    Returns {"pairs", "candidates", "top1", "top3", "macro"}, for each score its rate as a fraction;
    "macro" has means over true relations of each relation's mean.
    """
    ranks = {name: np.asarray(candidate_ranks(x, where=where)) for name, x in scores.items()}
    found = rank_measures(ranks, relations[:, 0], ("hit@1", "hit@3"))
    names = {"top1": "hit@1", "top3": "hit@3"}
    return {
        "pairs": len(relations),
        "candidates": relations.shape[1],
        **{name: found[measure] for name, measure in names.items()},
        "macro": {name: found["macro"][measure] for name, measure in names.items()},
    }


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
