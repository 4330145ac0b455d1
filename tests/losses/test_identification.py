"""The contrast of a pair's similarity under its own relation with that under the others."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.losses.rcml import relation_identification
from tests import reference
from tests.losses.relation_batch import make_batch


def identification_batch(seed=0, **sizes):
    arrays, options = make_batch(seed, **sizes)
    rng = np.random.default_rng(seed + 10)
    relations, pairs = arrays[2].shape
    linked = rng.random((relations, pairs, relations)) < 0.3
    linked |= np.eye(relations, dtype=bool)[:, None]
    del options["related"]
    return arrays, {**options, "linked": linked, "temperature": 0.3}


@pytest.mark.parametrize("seed", range(3))
def test_identification_equals_its_twin(seed):
    (text, image, *pairs), options = identification_batch(seed)

    def twin(text, image):
        return reference.relation_identification(text, image, *pairs, **options)

    def loss(text, image):
        return relation_identification(text, image, *pairs, **options)

    (value, aux), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(text, image)
    expected, expected_aux = twin(text, image)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux["relation_accuracy"], expected_aux["relation_accuracy"])
    slopes = reference.gradient(lambda *z: twin(*z)[0], text, image)
    for a, e in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)
        assert np.abs(e).max() > 1e-3


@pytest.mark.parametrize("dim", [16, 5])
def test_identification_over_devices_equals_its_twin(dim):
    """Split by features where their number divides, 16 over 8 devices; items are split before."""
    (text, image, *pairs), options = identification_batch(items=16, dim=dim)
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "fsdp"))
    split = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))

    def loss(text, image):
        return relation_identification(text, image, *pairs, **options)[0]

    gradient = jax.value_and_grad(loss, (0, 1))
    expected, slopes = gradient(text, image)
    placed = jax.device_put((text, image), split)
    for form in (gradient, jax.jit(gradient)):
        value, gradients = form(*placed)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for a, e in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)
            assert np.abs(e).max() > 1e-3
    exchanged = "all-to-all" in jax.jit(gradient).lower(*placed).compile().as_text()
    assert exchanged == (dim == 16)


def test_identification_of_pairs_linked_under_everything_is_nothing():
    arrays, options = identification_batch()
    options["linked"] = np.ones_like(options["linked"])
    value, gradients = jax.value_and_grad(
        lambda text: relation_identification(text, *arrays[1:], **options)[0]
    )(arrays[0])
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradients, 0, atol=1e-6)


def test_identification_without_inter_sample_pairs_is_zero():
    arrays, options = identification_batch()
    options["intra"] = np.ones_like(options["intra"])
    value, aux = relation_identification(*arrays, **options)
    assert value == 0
    assert aux["relation_accuracy"] == 0


def test_identification_counts_ties_against_the_model():
    arrays, options = identification_batch()
    same = np.broadcast_to(arrays[0][:1, :1], arrays[0].shape)
    options["linked"] = np.broadcast_to(np.eye(3, dtype=bool)[:, None], options["linked"].shape)
    _, aux = relation_identification(same, same, *arrays[2:], **options)
    assert aux["relation_accuracy"] == 0
