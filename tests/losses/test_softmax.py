"""Softmax cross entropy and InfoNCE against their twins, and at the edges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.losses.softmax import info_nce, softmax_contrastive
from tests import reference
from tests.losses.plain import (
    SOFTMAX_OPTIONS,
    check,
    embeddings,
    scores,
    soft_targets,
    value_and_slopes,
)


@pytest.mark.parametrize("options", SOFTMAX_OPTIONS.values(), ids=SOFTMAX_OPTIONS)
def test_softmax(options):
    check(
        partial(softmax_contrastive, **options),
        partial(reference.softmax_contrastive, **options),
        scores(4, 6),
    )


@pytest.mark.parametrize("options", SOFTMAX_OPTIONS.values(), ids=SOFTMAX_OPTIONS)
@pytest.mark.parametrize("normalize", [True, False])
def test_info_nce(options, normalize):
    options = {**options, "temperature": 0.3, "normalize": normalize}
    check(
        partial(info_nce, **options),
        partial(reference.info_nce, **options),
        *embeddings(4, 6, 3),
    )


def test_row_softmax_of_two_is_the_logistic_function():
    logit = np.float32(1.7)
    actual = softmax_contrastive(jnp.array([[logit, 0]]))
    np.testing.assert_allclose(actual, np.log1p(np.exp(-logit)), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"where": np.zeros(3, bool)},
        {"where": np.zeros((3, 3), bool), "targets": soft_targets(3, 3)},
        {"targets": np.full(3, -1)},
        {"targets": np.zeros((3, 3), np.float32)},
        {"weights": np.zeros(3, np.float32)},
    ],
)
def test_nothing_to_learn_from(options):
    loss = partial(softmax_contrastive, **options)
    # Not compiled, so that a NaN is seen in any step on the way, even if it is masked at the end.
    with jax.debug_nans(True):
        value, gradient = jax.value_and_grad(loss)(scores(3, 3))
    assert value == 0
    assert np.all(gradient == 0)


def test_infinite_logits_count_as_masked():
    logits = scores(4, 6)
    masked = np.random.default_rng(7).uniform(size=(4, 6)) < 0.4
    masked[1] = True
    infinite = np.where(masked, -np.inf, logits).astype(np.float32)
    for targets in (None, soft_targets(4, 6)):
        loss = partial(softmax_contrastive, targets=targets)
        value, (gradient,) = value_and_slopes(loss)(infinite)
        np.testing.assert_allclose(value, loss(logits, where=~masked), rtol=1e-6)
        assert np.isfinite(gradient).all()


def test_nan_logits_are_not_hidden():
    logits = scores(3, 3)
    logits[0, 1] = np.nan
    assert np.isnan(softmax_contrastive(logits))


@pytest.mark.parametrize("targets", [None, soft_targets(3, 3)])
def test_extreme_logits(targets):
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]], np.float32)
    loss = partial(softmax_contrastive, targets=targets)
    with jax.debug_nans(True):
        value, (gradient,) = value_and_slopes(loss)(logits)
    np.testing.assert_allclose(value, reference.softmax_contrastive(logits, targets), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert np.any(gradient != 0)


def test_gradient_of_soft_targets():
    logits = scores(3, 4)
    targets = soft_targets(3, 4) + np.float32(0.1)
    where = np.array([1, 1, 0, 1], bool)
    actual = jax.grad(lambda t: softmax_contrastive(logits, t, where=where))(targets)
    (expected,) = reference.gradient(
        lambda t: reference.softmax_contrastive(logits, t, where), targets
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_wrong_shapes_are_refused():
    logits = scores(3, 4)
    with pytest.raises(ValueError, match=r"targets are int.* shape \(4,\)"):
        softmax_contrastive(logits, np.arange(4))
    with pytest.raises(ValueError, match=r"targets are float32 of shape \(3,\)"):
        softmax_contrastive(logits, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="4 rows have no diagonal in 3 columns"):
        softmax_contrastive(logits.T)
