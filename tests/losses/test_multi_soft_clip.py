"""MultiSClip against its twin; what it shares with M3Co is in test_m3co.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.losses import multi_soft_clip as losses
from rcml_jax.losses.multi_soft_clip import multi_soft_clip
from tests import reference
from tests.losses.mixed_batch import make


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("known", [True, False])
def test_multi_soft_clip_equals_its_twin(modalities, known):
    """In the form without a shift, of a known temperature, and as the paper writes it."""
    clean = make(modalities)[0]

    def ours(c, traced):
        return multi_soft_clip(c, temperature=0.3 if known else traced)

    value, slope = jax.jit(jax.value_and_grad(ours))(clean, np.float32(0.3))
    np.testing.assert_allclose(value, reference.multi_soft_clip(clean, 0.3), rtol=1e-5)
    (expected,) = reference.gradient(lambda c: reference.multi_soft_clip(c, 0.3), clean)
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-5)


def test_stopped_targets_change_the_gradient_and_not_the_value():
    clean = make()[0]
    free, stopped = (
        jax.value_and_grad(lambda c, s=s: multi_soft_clip(c, stop_gradient_targets=s))(clean)
        for s in (False, True)
    )
    np.testing.assert_allclose(free[0], stopped[0])
    assert np.abs(free[1] - stopped[1]).max() > 1e-3


def test_the_gram_matrix_has_the_gradient_of_two_products():
    """Also where the gradient that reaches it is not symmetric."""
    rng = np.random.default_rng(2)
    x, g = (jnp.asarray(rng.normal(size=(6, k)), jnp.float32) for k in (4, 6))
    value, pull = jax.vjp(losses._gram, x)
    expected, pull_plain = jax.vjp(lambda x: x @ x.T, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(g)[0], pull_plain(g)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(pull(g)[0] - 2 * (g @ x)).max() > 1e-2
