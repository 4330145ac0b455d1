"""M3Co and MultiSClip against their twins, and the identities that they must keep."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.losses.clip import clip
from rcml_jax.losses.mixup import m3co, multi_soft_clip
from rcml_jax.ops.mixup import coefficients, mix, partners, symmetric_beta
from rcml_jax.training.sharding import across_devices
from tests import reference

N, D = 5, 4
PADDED = np.array([1, 0, 1, 1, 0], bool)


def make(modalities=2, n=N, seed=0):
    rng = np.random.default_rng(seed)
    clean, mixed = rng.normal(size=(2, modalities, n, D)).astype(np.float32)
    coefficient = rng.beta(0.5, 0.5, n).astype(np.float32)
    partner = np.stack([rng.permutation(n) for _ in range(modalities)])
    return clean, mixed, coefficient, partner


@pytest.mark.parametrize("modalities", [2, 3])
def test_m3co_equals_its_twin(modalities):
    clean, mixed, coefficient, partner = make(modalities)
    value, slopes = jax.jit(
        jax.value_and_grad(lambda c, m: m3co(c, m, coefficient, partner, temperature=0.3), (0, 1))
    )(clean, mixed)

    def twin(c, m):
        return reference.m3co(c, m, coefficient, partner, temperature=0.3)

    np.testing.assert_allclose(value, twin(clean, mixed), rtol=1e-5)
    for ours, theirs in zip(slopes, reference.gradient(twin, clean, mixed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        assert np.abs(theirs).max() > 1e-2


@pytest.mark.parametrize("modalities", [2, 3])
def test_multi_soft_clip_equals_its_twin(modalities):
    clean = make(modalities)[0]
    value, slope = jax.jit(jax.value_and_grad(partial(multi_soft_clip, temperature=0.3)))(clean)
    np.testing.assert_allclose(value, reference.multi_soft_clip(clean, 0.3), rtol=1e-5)
    (expected,) = reference.gradient(lambda c: reference.multi_soft_clip(c, 0.3), clean)
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-5)


def test_without_mixing_m3co_is_twice_clip():
    clean, _, _, partner = make()
    value = m3co(clean, clean, np.ones(N), partner, temperature=0.2)
    np.testing.assert_allclose(value, 2 * clip(*clean, temperature=0.2), rtol=1e-6)


def test_a_permutation_of_modalities_changes_nothing():
    clean, mixed, coefficient, partner = make(3)
    first = m3co(clean, mixed, coefficient, partner), multi_soft_clip(clean)
    for order in itertools.permutations(range(3)):
        order = list(order)
        found = m3co(clean[order], mixed[order], coefficient, partner[order])
        np.testing.assert_allclose(found, first[0], rtol=1e-5)
        np.testing.assert_allclose(multi_soft_clip(clean[order]), first[1], rtol=1e-5)


def test_stopped_targets_change_the_gradient_and_not_the_value():
    clean = make()[0]
    free, stopped = (
        jax.value_and_grad(lambda c, s=s: multi_soft_clip(c, stop_gradient_targets=s))(clean)
        for s in (False, True)
    )
    np.testing.assert_allclose(free[0], stopped[0])
    assert np.abs(free[1] - stopped[1]).max() > 1e-3


def test_padding_is_neither_row_nor_candidate():
    clean, mixed, coefficient, partner = make()
    where = np.arange(N + 3) < N

    def pad(x):
        extra = np.random.default_rng(1).normal(size=(x.shape[0], 3, D))
        return np.concatenate([x, extra], axis=1).astype(np.float32)

    tail = np.broadcast_to(np.arange(N, N + 3), (2, 3))
    padded = np.concatenate([coefficient, [0.3] * 3]), np.concatenate([partner, tail], axis=1)
    first, second = (jax.jit(partial(f, where=where)) for f in (m3co, multi_soft_clip))
    np.testing.assert_allclose(
        first(pad(clean), pad(mixed), *padded),
        jax.jit(m3co)(clean, mixed, coefficient, partner),
        rtol=1e-6,
    )
    value, slope = jax.jit(jax.value_and_grad(second))(pad(clean))
    np.testing.assert_allclose(value, jax.jit(multi_soft_clip)(clean), rtol=1e-6)
    assert np.all(np.isfinite(slope))
    assert np.all(slope[:, N:] == 0)


def test_extreme_temperatures_stay_finite():
    clean, mixed, coefficient, partner = make()
    partner = np.stack([[0, 1, 3, 2, 4]] * 2)
    where = np.array([0, 1, 1, 1, 1], bool)
    for temperature, block in itertools.product((1e-3, 1e3), (None, 2)):
        options = {"temperature": temperature, "where": where, "block": block}
        value, slope = jax.jit(
            jax.value_and_grad(
                lambda c, o=options: (
                    m3co(c, mixed, coefficient, partner, **o) + multi_soft_clip(c, **o)
                )
            )
        )(clean)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("temperature", [0.025, 0.1])
def test_exponentials_without_a_shift_are_those_with_one(temperature):
    """A temperature that is known takes the first way, a traced one the other."""
    clean, mixed, coefficient, partner = make(3)
    # Identical and opposite vectors have the largest exponents.
    clean[:, 1], clean[1, 2] = clean[:, 0], -clean[0, 2]
    partner = np.stack([[2, 1, 3, 0, 4]] * 3)

    def both(arrays, temperature):
        clean, mixed = arrays
        options = {"temperature": temperature, "where": PADDED}
        found = m3co(clean, mixed, coefficient, partner, **options)
        return found + multi_soft_clip(clean, **options)

    graded = jax.value_and_grad(both)
    known = jax.jit(partial(graded, temperature=temperature))((clean, mixed))
    traced = jax.jit(graded)((clean, mixed), temperature)
    for a, e in zip(jax.tree.leaves(known), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=2e-5)
        assert np.abs(e).max() > 1e-2


@pytest.mark.parametrize("block", [None, 2])
def test_vmap_is_one_batch_at_a_time(block):
    batches = [make(seed=s) for s in range(3)]
    stacked = [np.stack(parts) for parts in zip(*batches, strict=True)]
    first, second = partial(m3co, block=block), partial(multi_soft_clip, block=block)
    expected = [m3co(*batch) for batch in batches], [multi_soft_clip(b[0]) for b in batches]
    np.testing.assert_allclose(jax.vmap(first)(*stacked), expected[0], rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(second)(stacked[0]), expected[1], rtol=1e-5)


@pytest.mark.parametrize("block", [None, 6])
def test_eight_devices_equal_one(block):
    clean, mixed, coefficient, partner = make(n=16)

    def both(e):
        first = m3co(e[0], e[1], coefficient, partner, block=block)
        return first + multi_soft_clip(e[0], block=block)

    value, slope = jax.value_and_grad(both)((clean, mixed))

    split = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec(None, "data"))
    sharded = jax.device_put((clean, mixed), split)
    found, slopes = jax.jit(jax.value_and_grad(both))(sharded)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    for ours, theirs in zip(slopes, slope, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)

    def loss(scale, rows):
        # Rows lead, so that the gather of a sharded leaf puts the batch together again.
        arrange = lambda rows: both(tuple(jnp.swapaxes(x, 0, 1) for x in rows))  # noqa: E731
        return across_devices(arrange)(tuple(scale * x for x in rows))

    def device(scale, rows):
        value, slope = jax.value_and_grad(loss)(scale, rows)
        return value, jax.lax.pmean(slope, "data")

    rows = tuple(np.swapaxes(x, 0, 1).reshape(8, 2, 2, D) for x in (clean, mixed))
    scale = jnp.ones((2, D))
    values, slopes = jax.pmap(device, axis_name="data", in_axes=(None, 0))(scale, rows)
    expected = jax.grad(lambda s: both((clean * s[:, None], mixed * s[:, None])))(scale)
    np.testing.assert_allclose(values, np.full(8, value), rtol=1e-6)
    np.testing.assert_allclose(slopes[0], expected, atol=1e-5)


@pytest.mark.parametrize("wrong", ["one modality", "partners missing", "widths differ"])
def test_wrong_shapes_are_named(wrong):
    clean, mixed, coefficient, partner = make()
    if wrong == "one modality":
        clean, mixed, partner = clean[:1], mixed[:1], partner[:1]
    elif wrong == "partners missing":
        partner = partner[:1]
    else:
        mixed = [mixed[0], mixed[1][:, :2]]
    with pytest.raises(ValueError, match=r"arrays|shapes"):
        m3co(clean, mixed, coefficient, partner)


@pytest.mark.parametrize(
    ("modalities", "where", "block"), [(2, None, 2), (3, PADDED, 3), (2, PADDED, 99)]
)
def test_blocks_are_the_plain_form(modalities, where, block):
    """In value and gradient, for the temperature and the coefficients, too."""
    clean, mixed, coefficient, partner = make(modalities)
    if where is not None:
        partner = np.stack([np.where(where, [2, 1, 3, 0, 4], np.arange(N))] * modalities)

    def losses(arrays, block):
        clean, mixed, coefficient, temperature = arrays
        options = {"temperature": temperature, "where": where, "block": block}
        stopped = multi_soft_clip(clean, stop_gradient_targets=True, **options)
        mixing = m3co(clean, mixed, coefficient, partner, **options)
        found = jnp.stack([mixing, multi_soft_clip(clean, **options), stopped])
        return found, found

    slopes = jax.jit(jax.jacrev(losses, has_aux=True), static_argnums=1)
    arrays = clean, mixed, coefficient, np.float32(0.3)
    ours, theirs = (jax.tree.leaves(slopes(arrays, b)) for b in (block, None))
    for a, e in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
        assert np.abs(e).max() > 1e-3


def test_blocks_of_no_samples_are_refused():
    for loss in (lambda **o: m3co(*make(), **o), lambda **o: multi_soft_clip(make()[0], **o)):
        with pytest.raises(ValueError, match="block=0 must be at least 1"):
            loss(block=0)


@pytest.mark.parametrize("name", ["m3co", "multi_soft_clip"])
def test_blocks_hold_a_part_of_the_similarities(name):
    n = 2048
    rows = jax.ShapeDtypeStruct((2, n, 8), jnp.float32)
    others = jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((2, n), jnp.int32)

    def planned(block):
        def loss(clean, mixed, coefficient, partner):
            if name == "m3co":
                return m3co(clean, mixed, coefficient, partner, block=block)
            return multi_soft_clip(clean, block=block)

        graded = jax.jit(jax.value_and_grad(loss, (0, 1)))
        plan = graded.lower(rows, rows, *others).compile().memory_analysis()
        return plan.temp_size_in_bytes

    assert planned(64) < planned(None) / 5
    assert planned(None) > 4 * n * n


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
