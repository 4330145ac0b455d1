"""Relation type prediction and relation validity."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rcml_jax.evaluation import PROBES
from rcml_jax.evaluation.measures import of_ranks
from rcml_jax.evaluation.relation_retrieval import rank_measures
from rcml_jax.evaluation.scores import RelationEmbeddings, pair_scores
from rcml_jax.ops.ranking import candidate_ranks

# Small classifiers on frozen features.


def fit_classifier(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    kind: str = "linear",
    l2: float = 1.0,
    steps: int = 200,
    width: int = 256,
    seed: int = 0,
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a binary classifier on (m, f) features and (m,) labels; returns features → labels.

    "linear": logistic regression, Σ log(1 + exp(−y f(x))) + l2/2 ‖w‖² (scikit-learn's C = 1/l2),
    by L-BFGS. "mlp": one hidden layer of `width` ReLUs by the same optimiser. Features are
    standardised by the training mean and deviation.
    """
    if kind not in PROBES:
        raise ValueError(f"probe {kind!r} is unknown; choose one of {PROBES}")
    mean = features.mean(axis=0)
    scale = features.std(axis=0) + 1e-6
    logits, first = (_linear, _first_linear) if kind == "linear" else (_mlp, _first_mlp)
    x = jnp.asarray((features - mean) / scale, jnp.float32)
    y = jnp.asarray(labels, jnp.float32)
    params = _fit(logits, first(features.shape[1], width, seed), x, y, l2, steps=steps)

    def predict(features: np.ndarray) -> np.ndarray:
        scores = logits(params, jnp.asarray((features - mean) / scale, jnp.float32))
        return np.asarray(scores > 0).astype(np.int32)

    return predict


@functools.partial(jax.jit, static_argnames=("logits", "steps"))
def _fit(
    logits: Callable, params: dict, x: jax.Array, y: jax.Array, l2: float, *, steps: int
) -> dict:
    """The parameters at the end; compiled once for a form of classifier and a shape of data."""

    def loss(params):
        fit = jnp.sum(optax.sigmoid_binary_cross_entropy(logits(params, x), y))
        decay = sum(jnp.sum(p * p) for p in jax.tree.leaves(params) if p.ndim > 1)
        return (fit + 0.5 * l2 * decay) / len(y)

    return minimise(loss, params, steps)


def minimise(loss: Callable, params: Any, steps: int, tolerance: float = 1e-5) -> Any:
    """L-BFGS until the gradient's norm is below the tolerance, at most `steps` iterations."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def body(carry):
        params, state, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, optax.tree.norm(grad)

    def unfinished(carry):
        _, state, norm = carry
        return (optax.tree.get(state, "count") < steps) & (norm > tolerance)

    @jax.jit
    def run(params):
        return jax.lax.while_loop(
            unfinished, body, (params, optimizer.init(params), jnp.asarray(jnp.inf))
        )[0]

    return run(params)


def _first_linear(width_in: int, width: int, seed: int) -> dict:
    del width, seed
    return {"w": jnp.zeros((width_in, 1)), "b": jnp.zeros((1,))}


def _linear(p: dict, x: jax.Array) -> jax.Array:
    return (x @ p["w"] + p["b"][None])[:, 0]


def _first_mlp(width_in: int, width: int, seed: int) -> dict:
    first, second = jax.random.split(jax.random.key(seed))
    init = jax.nn.initializers.he_normal()
    return {
        "w1": init(first, (width_in, width)),
        "b1": jnp.zeros((width,)),
        "w2": init(second, (width, 1)),
        "b2": jnp.zeros((1,)),
    }


def _mlp(p: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ p["w1"] + p["b1"][None])
    return (hidden @ p["w2"] + p["b2"][None])[:, 0]


def relation_type(
    table: RelationEmbeddings,
    a: np.ndarray,
    b: np.ndarray,
    relations: np.ndarray,
    *,
    where: np.ndarray | None = None,
    similarity: str = "cosine",
) -> dict:
    """Top-1 and Top-3 of the true relation, ranked by the pair's score under each candidate.

    a, b (p,): item identifiers; relations (p, c) with the true one in column 0; where (p, c) bool:
    the candidates that count. Ties count against the model, so a model that ignores the
    relation has 0. Returns what `type_measures` does.
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
    """Top-1 and Top-3 from scores (p, c) by name; relations: (p, c), the true one in column 0.

    Returns {"pairs", "candidates", "top1", "top3", "macro"}: rates as fractions, for each score.
    "macro" averages the rates of the true relations, each with equal weight.
    """
    ranks = {name: np.asarray(candidate_ranks(x, where=where)) for name, x in scores.items()}
    found = rank_measures(ranks, relations[:, 0], of_ranks("relation_type"))
    return {"pairs": len(relations), "candidates": relations.shape[1], **found}


def validity_features(
    table: RelationEmbeddings, a: np.ndarray, b: np.ndarray, relation: np.ndarray
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
