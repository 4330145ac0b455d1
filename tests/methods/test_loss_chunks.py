"""`config.loss.chunk_size` and `.pair_chunk_size` reach every method's loss and keep its value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.losses import clip, siglip, unicl
from rcml_jax.methods import build, declip, m3col, rcml
from tests.methods.m3col_data import omics_config, write_tables
from tests.toy import tiny_config

LOSSES = {
    "rcml": (rcml, "relation_contrastive"),
    "clip": (clip, "clip"),
    "siglip": (siglip, "sigmoid"),
    "unicl": (unicl, "label_supervised"),
    "declip": (declip, "declip"),
}


@pytest.fixture
def given(monkeypatch):
    """Watch a loss: (module, name) → a list of the chunk sizes that it is given."""

    def watch(module, name):
        real, seen = getattr(module, name), []

        @functools.wraps(real)
        def watched(*args, **options):
            seen.append((options["chunk_size"], options.get("pair_chunk_size")))
            return real(*args, **options)

        monkeypatch.setattr(module, name, watched)
        return seen

    return watch


def check(config, z, loss, seen, ways, expected):
    """Value and gradient of `loss` stay the same with each pair of chunk sizes in `ways`."""
    found = []
    for way in ways:
        config.loss.update(dict(zip(("chunk_size", "pair_chunk_size"), way, strict=False)))
        # Traced anew, so that the options are read again.
        found.append(jax.jit(jax.value_and_grad(lambda z: loss(z)))(z))
    assert seen == expected
    for other in found[1:]:
        for a, e in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_of_relational_methods(catalogue, tmp_path, name, given):
    seen = given(*LOSSES[name])
    # DeCLIP's self-supervision compares no rows with others, and needs its heads.
    config = tiny_config(catalogue, method=name, loss__declip__self_supervision=0.0)
    method = build(config, tmp_path)
    batch = next(method.batches())
    z = np.random.default_rng(0).normal(size=(2, 16, 4, 6) if name == "rcml" else (2, 16, 6))
    z = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)
    params = {"bias": jnp.float32(-2)}

    def loss(z):
        z = {"text": z[0], "image": z[1], "text_view": z[1], "image_view": z[0]}
        return method.objective(params, z, batch, 0.0)[0]

    if name == "rcml":
        ways, expected = [(0, 0), (2, 0), (1, 1)], [(None, None), (2, None), (1, 1)]
    else:
        ways, expected = [(0,), (5,)], [(None, None), (5, None)]
    check(config, z, loss, seen, ways, expected)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("omics"))


@pytest.mark.parametrize("name", ["m3co", "multi_soft_clip", "clip"])
def test_of_m3col(tables, tmp_path, name, given):
    seen = given(m3col, name)
    config = omics_config(tables, seeds=1, data__folds=0, loss__contrastive=name)
    method = build(config, tmp_path)

    @jax.jit
    def embedded(key, batch):
        params, batch = method.init(key, batch), method.prepare(batch, key)
        return params, batch, method.embed(params, batch, key)

    params, batch, z = embedded(jax.random.key(0), next(method.batches()))

    def loss(z):
        return method.objective(params, z, batch, 0.0)[0]

    calls = 1 if name != "clip" else 3  # CLIP compares two of the three modalities at a time.
    check(config, z, loss, seen, [(0,), (7,)], [(None, None)] * calls + [(7, None)] * calls)
