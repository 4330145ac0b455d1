"""SigLIP's learned bias; what it shares with the other losses is in test_plain.py."""

import jax
import numpy as np

from rcml_jax.losses.siglip import sigmoid
from tests import reference
from tests.losses.plain import embeddings


def test_learned_bias():
    pair = embeddings(5, 5, 4)
    slope = jax.grad(lambda b: sigmoid(*pair, temperature=0.5, bias=b))(-2.0)
    (expected,) = reference.gradient(
        lambda b: reference.sigmoid(*pair, temperature=0.5, bias=float(b)), -2.0
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)
