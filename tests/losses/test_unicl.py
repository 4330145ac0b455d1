"""UniCL against its twin and against CLIP."""

import numpy as np
import pytest

from rcml_jax.losses.clip import clip
from rcml_jax.losses.unicl import label_supervised
from tests import reference
from tests.losses.plain import PAIRED_OPTIONS, check, embeddings

PAIRS = PAIRED_OPTIONS["pairs masked"]["where"]


@pytest.mark.parametrize("labels", [[0, 1, 0, 0, 1], [2, -1, -1, 2, 7], [-1] * 5, [0] * 5])
@pytest.mark.parametrize("where", [None, np.array([1, 0, 1, 1, 1], bool), PAIRS])
def test_label_supervised(labels, where):
    labels = np.array(labels)
    check(
        lambda t, i: label_supervised(t, i, labels, temperature=0.4, where=where),
        lambda t, i: reference.label_supervised(t, i, labels, temperature=0.4, where=where),
        *embeddings(5, 5, 3),
    )


def test_unknown_labels_make_it_clip():
    pair = embeddings(6, 6, 4)
    unknown = label_supervised(*pair, np.full(6, -1))
    np.testing.assert_allclose(unknown, clip(*pair), rtol=1e-6)
