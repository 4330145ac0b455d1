"""Hugging Face's own Flax CLIP behind our interface: our numbers, and what it cannot do."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError
from rcml_jax.models.two_towers import TwoTowers, build_towers
from tests.models.checkpoints_on_disk import make_model
from tests.models.hugging_face import needs_flax_classes
from tests.models.test_checkpoints import tiny_siglip
from tests.models.test_encoders import batch, tiny

assert batch  # a fixture


def configurations():
    """CLIP as openai's and laion's checkpoints have it, and the rule of the oldest ones for EOT."""
    legacy = tiny()
    legacy.text_config.eos_token_id = 2
    return {"quick_gelu": tiny(), "gelu": tiny(activation="gelu"), "oldest": legacy}


@needs_flax_classes
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("name", configurations())
def test_values_and_gradients_are_those_of_our_towers(batch, name, projected):
    config = configurations()[name]
    params = make_model(config, shake=lambda noise: 0.2 * noise).params

    def graded(towers):
        def value(params):
            tokens = [
                towers.apply({"params": params}, given, projected=projected, method=method)
                for given, method in zip(batch, ("text_states", "image_states"), strict=True)
            ]
            # Of a text what counts: padding is masked by whoever uses the states.
            used = [jnp.where(t.mask[..., None], t.states, 0) for t in tokens]
            return sum(jnp.sum(jnp.sin(2 * x)) for x in used), (used, tokens[0].pooled_index)

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    (_, (ours, index)), gradient = graded(build_towers(config))
    (_, (theirs, their_index)), expected = graded(build_towers(config, implementation="hf"))
    np.testing.assert_array_equal(index, their_index)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest),
        gradient,
        expected,
    )


@needs_flax_classes
def test_the_parameters_are_ours(batch):
    shapes = [
        jax.eval_shape(towers.init, jax.random.key(0), *batch)["params"]
        for towers in (build_towers(tiny()), build_towers(tiny(), implementation="hf"))
    ]
    ours, theirs = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in shapes)
    assert ours == theirs


@needs_flax_classes
def test_bfloat16_computes_near_ours(batch):
    variables = make_model(tiny()).variables
    half = build_towers(tiny(), jnp.bfloat16, implementation="hf").apply(variables, *batch)
    full = TwoTowers(tiny()).apply(variables, *batch)
    for name in full:
        assert np.sum(full[name] * half[name], axis=1).min() > 0.99


@needs_flax_classes
@pytest.mark.parametrize(
    ("config", "remat"), [(tiny(), "layers"), (tiny(), "dots"), (tiny_siglip(), "")]
)
def test_it_is_clip_without_rematerialisation(config, remat):
    with pytest.raises(UserError, match=r"towers=hf is Hugging Face's CLIP alone, without remat"):
        build_towers(config, remat=remat, implementation="hf")


@needs_flax_classes
def test_it_takes_no_packed_texts(batch):
    towers = build_towers(tiny(), implementation="hf")
    packed = PackedTexts(batch[0], jnp.asarray([[1, 4]] * 3))
    with pytest.raises(
        UserError, match=r"towers=hf takes one text a row; set config.batch.texts_p"
    ):
        towers.init(jax.random.key(0), packed)


def test_where_transformers_has_no_flax_classes(monkeypatch):
    # What an import of a module that is not there finds; with transformers 5 it is not there.
    monkeypatch.setitem(sys.modules, "transformers.models.clip.modeling_flax_clip", None)
    with pytest.raises(
        UserError, match=r"needs the Flax classes of transformers before 5; pip inst"
    ):
        build_towers(tiny(), implementation="hf")


def test_another_implementation_is_unknown():
    with pytest.raises(
        UserError, match=r"config.model.towers='flax' is unknown; leave it empty, or"
    ):
        build_towers(tiny(), implementation="flax")
