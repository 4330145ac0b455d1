"""Random arrays for the plain losses, their options, and their comparison with the twins."""

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.losses.clip import clip
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import info_nce
from rcml_jax.losses.unicl import label_supervised
from tests import reference


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


def check(ours, twin, *arrays):
    """Value and gradients of our loss, under jit, are the twin's."""
    value, gradients = value_and_slopes(ours)(*arrays)
    np.testing.assert_allclose(value, twin(*arrays), rtol=2e-5, atol=1e-6)
    for a, e in zip(gradients, reference.gradient(twin, *arrays), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)
        assert np.any(a != 0)


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

LOSSES = {
    "info_nce": info_nce,
    "clip": clip,
    "sigmoid": sigmoid,
    "label_supervised": label_supervised,
}

ALL_LOSSES = LOSSES | {
    "label_supervised": lambda t, i: label_supervised(t, i, jnp.arange(t.shape[0]) // 3),
}
