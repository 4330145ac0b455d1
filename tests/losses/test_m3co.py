"""M3Co against its twin, and what M3Co and MultiSClip have in common."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.losses import m3co as losses
from rcml_jax.losses.clip import clip
from rcml_jax.losses.m3co import m3co
from rcml_jax.losses.multi_soft_clip import multi_soft_clip
from rcml_jax.training.sharding import across_devices
from tests import reference
from tests.losses.mixed_batch import PADDED, D, N, make


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("known", [True, False])
def test_m3co_equals_its_twin(modalities, known):
    """In the form without a shift, of a known temperature, and as the paper writes it."""
    clean, mixed, coefficient, partner = make(modalities)

    def ours(c, m, traced):
        temperature = 0.3 if known else traced
        return m3co(c, m, coefficient, partner, temperature=temperature)

    value, slopes = jax.jit(jax.value_and_grad(ours, (0, 1)))(clean, mixed, np.float32(0.3))

    def twin(c, m):
        return reference.m3co(c, m, coefficient, partner, temperature=0.3)

    np.testing.assert_allclose(value, twin(clean, mixed), rtol=1e-5)
    for ours, theirs in zip(slopes, reference.gradient(twin, clean, mixed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        assert np.abs(theirs).max() > 1e-2


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
    for temperature, chunk_size in itertools.product((1e-3, 1e3), (None, 2)):
        options = {"temperature": temperature, "where": where, "chunk_size": chunk_size}
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


@pytest.mark.parametrize("where", [np.ones(N, bool), PADDED, np.zeros(N, bool)])
def test_sums_without_a_shift_are_the_equation(where):
    """In value and gradient, for the logits and the targets."""
    rng = np.random.default_rng(4)
    logits = rng.uniform(-40, 40, (N, N)).astype(np.float32)  # Cosines over 0.025.
    targets = rng.random((N, N)).astype(np.float32)

    def value_and_slopes(form):
        return jax.jit(jax.value_and_grad(form, (0, 1)))(logits, targets, where)

    forms = losses._bidirectional_without_shift, losses._bidirectional
    fast, plain = (jax.tree.leaves(value_and_slopes(form)) for form in forms)
    for a, e in zip(fast, plain, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-4)
        assert np.all(np.isfinite(a))
        assert np.any(e != 0) == np.any(where)


def test_the_form_follows_the_temperature(monkeypatch):
    """Without a shift at a known temperature that allows it, else as the paper writes it."""
    used = []
    for name in ("_bidirectional", "_bidirectional_without_shift"):
        monkeypatch.setattr(losses, name, lambda *_, name=name: used.append(name) or jnp.float32(0))
    logits = jnp.zeros((N, N))
    for temperature in (0.1, 0.025, 0.024, None):
        losses.bidirectional(logits, logits, None, temperature)
    jax.jit(lambda t: losses.bidirectional(logits, logits, None, t))(0.1)
    fast, plain = "_bidirectional_without_shift", "_bidirectional"
    assert used == [fast, fast, plain, plain, plain]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_vmap_is_one_batch_at_a_time(chunk_size):
    batches = [make(seed=s) for s in range(3)]
    stacked = [np.stack(parts) for parts in zip(*batches, strict=True)]
    first, second = (
        partial(m3co, chunk_size=chunk_size),
        partial(multi_soft_clip, chunk_size=chunk_size),
    )
    expected = [m3co(*batch) for batch in batches], [multi_soft_clip(b[0]) for b in batches]
    np.testing.assert_allclose(jax.vmap(first)(*stacked), expected[0], rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(second)(stacked[0]), expected[1], rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_eight_devices_equal_one(chunk_size):
    clean, mixed, coefficient, partner = make(n=16)

    def both(e):
        first = m3co(e[0], e[1], coefficient, partner, chunk_size=chunk_size)
        return first + multi_soft_clip(e[0], chunk_size=chunk_size)

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
    ("modalities", "where", "chunk_size"), [(2, None, 2), (3, PADDED, 3), (2, PADDED, 99)]
)
def test_chunks_are_the_plain_form(modalities, where, chunk_size):
    """In value and gradient, for the temperature and the coefficients, too."""
    clean, mixed, coefficient, partner = make(modalities)
    if where is not None:
        partner = np.stack([np.where(where, [2, 1, 3, 0, 4], np.arange(N))] * modalities)

    def losses(arrays, chunk_size):
        clean, mixed, coefficient, temperature = arrays
        options = {"temperature": temperature, "where": where, "chunk_size": chunk_size}
        stopped = multi_soft_clip(clean, stop_gradient_targets=True, **options)
        mixing = m3co(clean, mixed, coefficient, partner, **options)
        found = jnp.stack([mixing, multi_soft_clip(clean, **options), stopped])
        return found, found

    slopes = jax.jit(jax.jacrev(losses, has_aux=True), static_argnums=1)
    arrays = clean, mixed, coefficient, np.float32(0.3)
    ours, theirs = (jax.tree.leaves(slopes(arrays, b)) for b in (chunk_size, None))
    for a, e in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
        assert np.abs(e).max() > 1e-3


def test_chunks_of_no_samples_are_refused():
    for loss in (lambda **o: m3co(*make(), **o), lambda **o: multi_soft_clip(make()[0], **o)):
        with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
            loss(chunk_size=0)


@pytest.mark.parametrize("name", ["m3co", "multi_soft_clip"])
def test_chunks_hold_a_part_of_the_similarities(name):
    n = 2048
    rows = jax.ShapeDtypeStruct((2, n, 8), jnp.float32)
    others = jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((2, n), jnp.int32)

    def planned(chunk_size):
        def loss(clean, mixed, coefficient, partner):
            if name == "m3co":
                return m3co(clean, mixed, coefficient, partner, chunk_size=chunk_size)
            return multi_soft_clip(clean, chunk_size=chunk_size)

        graded = jax.jit(jax.value_and_grad(loss, (0, 1)))
        plan = graded.lower(rows, rows, *others).compile().memory_analysis()
        return plan.temp_size_in_bytes

    assert planned(64) < planned(None) / 5
    assert planned(None) > 4 * n * n
