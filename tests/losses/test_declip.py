"""DeCLIP's terms against their twins, with padding, and the identities that they must keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.losses import declip as losses
from rcml_jax.losses.clip import clip
from tests import reference
from tests.losses.plain import embeddings, value_and_slopes

PADDED = np.array([1, 0, 1, 1, 1, 0], bool)
MASKS = {"all": None, "padded": PADDED, "one": np.arange(6) == 2, "none": np.zeros(6, bool)}


def views(n=6, d=3):
    """Two views of texts and of images."""
    return *embeddings(n, n, d, seed=1), *embeddings(n, n, d, seed=2)


def check(ours, twin, *arrays):
    """Value and gradients of our loss, under jit, are the twin's."""
    value, slopes = value_and_slopes(ours)(*arrays)
    np.testing.assert_allclose(value, twin(*arrays), rtol=2e-5, atol=1e-6)
    for a, e in zip(slopes, reference.gradient(twin, *arrays), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)
    return value, slopes


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_neighbors(temperature, mask, chunk_size):
    text, bank, image, _ = views()
    options = {"temperature": temperature, "where": MASKS[mask]}
    value, (slope,) = check(
        lambda i: losses.neighbor_supervision(text, bank, i, chunk_size=chunk_size, **options),
        lambda i: reference.neighbor_supervision(text, bank, i, **options),
        image,
    )
    assert (value > 0) == (mask in ("all", "padded"))
    if MASKS[mask] is not None:
        assert np.all(slope[~MASKS[mask]] == 0)
    # What a neighbour is drawn to is a constant, as an entry of the paper's queue is.
    constants = value_and_slopes(
        lambda t, b: losses.neighbor_supervision(t, b, image, chunk_size=chunk_size, **options)
    )(text, bank)[1]
    assert all(np.all(s == 0) for s in constants)


def test_equal_neighbors_are_positives_and_the_own_text_is_no_key():
    """Texts 0 and 1 both lie next to 2, and 2 next to 0: for image 2 there are no negatives."""
    text = jnp.array([[1.0, 0.05, 0.0], [0.9, 0.0, 0.5], [1.0, 0.0, 0.1]])
    np.testing.assert_array_equal(losses.nearest_rows(text, text), [2, 2, 0])
    image = jnp.array([[0.3, 1.0, 0.0], [0.0, 1.0, 0.4], [0.0, 1.0, 1.0]])
    logits = reference.matrix(reference.cosine, image, text[jnp.array([2, 0])])
    # Image 0: keys t2, t2, and not t0, which is its own. Image 1: t2, t2, t0. Image 2: t0 alone.
    first = np.log(2)
    second = np.log(2 * np.exp(logits[1, 0]) + np.exp(logits[1, 1])) - logits[1, 0]
    value = losses.neighbor_supervision(text, text, image, temperature=1.0)
    np.testing.assert_allclose(value, (first + second + 0) / 3, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_simsiam(mask):
    arrays, where = views(), MASKS[mask]
    _, slopes = check(
        lambda a, b: losses.simsiam((a, b), arrays[2:], where=where),
        lambda a, b: reference.simsiam((a, b), arrays[2:], where),
        *arrays[:2],
    )
    assert np.any(slopes[0] != 0) == (mask != "none")
    stopped = value_and_slopes(lambda c, d: losses.simsiam(arrays[:2], (c, d), where=where))
    assert all(np.all(s == 0) for s in stopped(*arrays[2:])[1])


def test_simsiam_of_equal_directions_is_minus_one():
    x, y, _, _ = views()
    np.testing.assert_allclose(losses.simsiam((x, y), (3 * y, 2 * x)), -1, rtol=1e-6)


def test_masked_tokens():
    rng = np.random.default_rng(0)
    states, table, bias = (rng.normal(size=s).astype("f4") for s in ((2, 3, 4), (7, 4), (7,)))
    labels, weights = np.array([[0, 6, 2], [2, 2, 5]]), rng.uniform(size=(2, 3)).astype("f4")
    found = jax.jit(losses.masked_tokens)(states, table, bias, labels)
    np.testing.assert_allclose(
        found, reference.masked_tokens(states, table, bias, labels), rtol=1e-5
    )
    check(
        lambda *a: jnp.sum(weights * losses.masked_tokens(*a, labels)),
        lambda *a: np.sum(weights * reference.masked_tokens(*a, labels)),
        states, table, bias,
    )  # fmt: skip


def weighted(weights):
    return dict(zip(("self_supervision", "multi_view", "nearest_neighbor"), weights, strict=True))


@pytest.mark.parametrize("where", [None, PADDED], ids=["all", "padded"])
@pytest.mark.parametrize("weights", [(0.2, 0.2, 0.2), (0.5, 0.0, 0.5), (0.0, 1.0, 0.0)])
def test_the_whole_loss(weights, where):
    plain = views()[0]
    options = {"temperature": 0.4, "where": where}

    def ours(t, t2, i, i2, own):
        value, _ = losses.declip(
            (t, t2), (i, i2), self_supervised=own, **weighted(weights), **options
        )
        return value

    def twin(t, t2, i, i2, own):
        return reference.declip((t, t2), (i, i2), plain, own, weights, **options)

    check(ours, twin, *views(), np.float32(1.3))


def test_without_weights_it_is_clip():
    text, text_view, image, image_view = views()
    options = {"temperature": 0.3, "where": PADDED}
    value, terms = losses.declip(
        (text, text_view), (image, image_view), self_supervised=9.0, **weighted((0, 0, 0)),
        **options,
    )  # fmt: skip
    assert list(terms) == ["clip"]
    assert value == terms["clip"] == clip(text, image, **options)


def test_padding_equals_a_smaller_batch_and_chunks_change_nothing():
    arrays = views(8, 4)
    where = np.arange(8) < 5

    def whole(t, t2, i, i2, **options):
        return losses.declip((t, t2), (i, i2), temperature=0.3, **options)[0]

    padded, slopes = value_and_slopes(partial(whole, where=where))(*arrays)
    small, own = value_and_slopes(whole)(*(x[:5] for x in arrays))
    chunked, others = value_and_slopes(partial(whole, where=where, chunk_size=3))(*arrays)
    np.testing.assert_allclose([padded, chunked], [small, small], rtol=1e-5)
    for a, b, e in zip(slopes, others, own, strict=True):
        np.testing.assert_allclose(a[:5], e, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
        assert np.all(a[5:] == 0)
        assert np.any(a[:5] != 0)


def test_a_traced_temperature_has_a_gradient():
    text, text_view, image, image_view = views()

    def loss(temperature):
        return losses.declip((text, text_view), (image, image_view), temperature=temperature)[0]

    slope = jax.jit(jax.grad(loss))(0.3)
    np.testing.assert_allclose(slope, (loss(0.305) - loss(0.295)) / 0.01, rtol=1e-2)


def test_narrow_types_are_computed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in views()]
    value, _ = losses.declip(arrays[:2], arrays[2:])
    assert value.dtype == jnp.float32
    assert losses.simsiam(arrays[:2], arrays[2:]).dtype == jnp.float32
