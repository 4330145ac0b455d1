"""DeCLIP's heads: batch norm over the rows that count, and their shapes."""

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.methods.declip import SimSiamHeads, TokenHead, WholeBatchNorm
from tests import reference

WHERE = np.array([1, 1, 0, 1, 1, 0, 1], bool)


def rows(seed=0, n=7, d=8):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32) * 3 + 1


def test_batch_norm_is_of_the_rows_that_count():
    params = {"scale": rows(1, 1)[0], "bias": rows(2, 1)[0]}
    found = WholeBatchNorm().apply({"params": params}, rows(), WHERE)
    expected = reference.whole_batch_norm(rows(), params["scale"], params["bias"], WHERE)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_simsiam_heads_do_not_see_padding():
    heads = SimSiamHeads()
    variables = heads.init(jax.random.key(0), rows(), WHERE)
    apply = jax.jit(heads.apply)
    small = apply(variables, rows()[WHERE], np.ones(5, bool))
    for whole, alone in zip(apply(variables, rows(), WHERE), small, strict=True):
        assert whole.shape == (7, 8)
        np.testing.assert_allclose(whole[WHERE], alone, rtol=1e-4, atol=1e-5)
    predicted, projected = small
    np.testing.assert_allclose(np.mean(projected, axis=0), np.zeros(8), atol=1e-5)
    np.testing.assert_allclose(np.std(projected, axis=0), np.ones(8), atol=1e-2)
    assert not np.allclose(predicted, projected, atol=0.1)
    # A hidden layer of a quarter of the width.
    assert variables["params"]["predictor_0"]["kernel"].shape == (8, 2)


def test_token_head():
    head = TokenHead(5, 11)
    variables = head.init(jax.random.key(0), jnp.zeros((1, 1, 8)))
    hidden, bias = head.apply(variables, rows().reshape(1, 7, 8))
    assert (hidden.shape, bias.shape) == ((1, 7, 5), (11,))
    np.testing.assert_allclose(np.mean(hidden, axis=-1), np.zeros((1, 7)), atol=1e-5)
