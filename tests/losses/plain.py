"""Random arrays for the plain losses, options of theirs, and their compiled gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.losses import contrastive


def embeddings(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)


def scores(n, m, seed=0):
    return np.random.default_rng(seed).normal(size=(n, m)).astype(np.float32) * 3


def soft_targets(n, m, seed=3):
    targets = np.random.default_rng(seed).uniform(size=(n, m)).astype(np.float32)
    return np.where(targets > 0.5, targets, 0)


def value_and_slopes(loss):
    """The loss and its gradients with respect to all arguments, compiled."""

    def step(*arrays):
        return jax.value_and_grad(loss, tuple(range(len(arrays))))(*arrays)

    return jax.jit(step)


SOFTMAX_OPTIONS = {
    "diagonal": {},
    "indices": {"targets": np.array([5, 0, 0, 3])},
    "indices, some rows without": {"targets": np.array([5, -1, 6, 3])},
    "soft": {"targets": soft_targets(4, 6)},
    "bool": {"targets": soft_targets(4, 6) > 0},
    "row without mass": {"targets": soft_targets(4, 6) * np.array([[1], [0], [1], [1]], "f4")},
    "columns masked": {"where": np.array([1, 1, 0, 1, 0, 1], bool)},
    "entries masked": {"where": soft_targets(4, 6, seed=5) > 0, "targets": soft_targets(4, 6)},
    "weights": {"weights": np.array([1, 0, 0.5, 2], np.float32)},
}

PAIRED_OPTIONS = {
    "plain": {},
    "padded": {"where": np.array([1, 0, 1, 1, 0], bool)},
    "one valid": {"where": np.array([1, 1, 0, 0, 0], bool)},
    "indices": {"targets": np.array([1, 1, 4, 3, -1])},
    "soft": {"targets": soft_targets(5, 5), "where": np.array([1, 1, 1, 1, 0], bool)},
    "dot": {"normalize": False},
    "pairs masked": {"where": soft_targets(5, 5, seed=7) + np.eye(5) > 0},
}

ALL_LOSSES = {
    "info_nce": contrastive.info_nce,
    "clip": contrastive.clip,
    "sigmoid": contrastive.sigmoid,
    "label_supervised": lambda t, i: contrastive.label_supervised(
        t, i, jnp.arange(t.shape[0]) // 3
    ),
}
