"""Mixing, its coefficients and its partners."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rcml_jax.ops.mixup import coefficients, mix, partners, symmetric_beta
from tests import reference

N = 5


def test_mix_equals_its_twin_for_every_leaf():
    rng = np.random.default_rng(0)
    tree = {"a": jnp.asarray(rng.normal(size=(N, 2, 3))), "b": jnp.asarray(rng.normal(size=N))}
    coefficient, partner = jnp.asarray(rng.random(N)), rng.permutation(N)
    mixed = mix(tree, coefficient, jnp.asarray(partner))
    for name, value in tree.items():
        np.testing.assert_allclose(
            mixed[name], reference.mix(value, coefficient, partner), rtol=1e-5, atol=1e-6
        )
    with pytest.raises(TypeError, match="mix its embedding"):
        mix(jnp.arange(N), coefficient, partner)


def test_coefficients_are_beta_and_partners_a_permutation():
    drawn = coefficients(jax.random.key(0), 20_000, alpha=0.15)
    assert abs(float(drawn.mean()) - 0.5) < 0.02
    # The variance of Beta(α, α) is 1 / (4 (2α + 1)).
    assert abs(float(drawn.var()) - 1 / (4 * 1.3)) < 0.01
    some = coefficients(jax.random.key(0), 20_000, fraction=0.25)
    assert abs(float((some < 1).mean()) - 0.25) < 0.02
    np.testing.assert_array_equal(np.sort(partners(jax.random.key(1), 50)), np.arange(50))


@pytest.mark.parametrize("alpha", [0.15, 0.5, 1.0, 2.0, 8.0])
def test_symmetric_beta_has_the_distribution_of_its_name(alpha):
    n = 50_000
    draw = jax.jit(partial(symmetric_beta, alpha=alpha, shape=(n,)))
    drawn = np.asarray(draw(jax.random.key(0)), np.float64)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    # Near 1 float32 is coarse: there the distribution of 1 − λ, which is the same, is compared.
    for values in (drawn[drawn < 0.5], 1 - drawn[drawn > 0.5]):
        assert abs(len(values) / n - 0.5) < 0.01
        values = np.maximum(values, 2.0**-24)
        steps = np.sort(values)
        expected = 2 * scipy.stats.beta.cdf(steps, alpha, alpha)
        # Draws below the resolution of numbers next to 1 have one place.
        seen = np.searchsorted(steps, steps, side="right") / len(steps)
        # The 1 % point of Kolmogorov and Smirnov's statistic is 1.63 / √n.
        assert np.abs(seen - expected)[steps > 2.0**-20].max() < 1.63 / np.sqrt(len(steps))
    for power in (1, 2, 3, 4):
        moment = scipy.stats.beta.moment(power, alpha, alpha)
        assert abs(np.mean(drawn**power) - moment) < 4 * np.std(drawn**power) / np.sqrt(n)


def test_extreme_beta_draws_stay_numbers():
    draw = jax.jit(jax.vmap(lambda key, alpha: symmetric_beta(key, alpha, (1000,))))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 3), jnp.array([1e-6, 1e-2, 1e6])))
    assert np.all((drawn >= 0) & (drawn <= 1))
    assert np.mean((drawn[0] < 1e-30) | (drawn[0] == 1)) > 0.99
    np.testing.assert_allclose(drawn[2], 0.5, atol=0.01)


def test_padding_is_its_own_partner_and_nobody_elses():
    wheres = np.array([[1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    wheres = np.concatenate([wheres, [np.zeros(6, bool), np.ones(6, bool), np.arange(6) == 2]])
    keys = jax.random.split(jax.random.key(2), 500)
    draw = jax.jit(jax.vmap(jax.vmap(lambda k, w: partners(k, 6, where=w), (0, None)), (None, 0)))
    found = draw(keys, wheres)
    assert jnp.issubdtype(found.dtype, jnp.integer)
    for where, rows in zip(wheres, np.asarray(found), strict=True):
        # A permutation that keeps the padding where it is maps valid samples to valid ones.
        np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(6), (500, 1)))
        assert np.all(rows[:, ~where] == np.flatnonzero(~where))
        for sample in np.flatnonzero(where):
            chance = np.bincount(rows[:, sample], minlength=6) / 500
            np.testing.assert_allclose(chance, where / where.sum(), atol=0.1)


def test_partners_under_vmap_are_those_of_one_key():
    where = np.arange(9) < 7
    keys = jax.random.split(jax.random.key(3), 4)
    one = jax.jit(lambda k, w: partners(k, 9, where=w))
    many = jax.vmap(one, (0, None))(keys, where)
    np.testing.assert_array_equal(many, [one(key, where) for key in keys])
    assert len(np.unique(many, axis=0)) == 4
