"""The roofline's formulas, against the products that JAX counts and figures that are known."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import roofline
from benchmarks.roofline import CHIPS, clip_config, parameters, step
from rcml_jax.losses.clip import clip
from rcml_jax.losses.rcml import relation_contrastive

OPTIONS = {"items": 128, "chips": 8, "length": 32}


def counted(function, *shapes) -> float:
    """FLOP of value and gradient as XLA counts them before it optimises."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.jit(jax.value_and_grad(function, tuple(range(len(shapes)))))
    return gradient.lower(*arrays).cost_analysis()["flops"]


def test_models_have_the_parameters_that_are_known():
    known = {"vit-b-32": 151_277_313, "vit-l-14": 427_616_513, "vit-h-14": 986_109_441}
    for name, number in known.items():
        assert parameters(clip_config(name), 0) == number
    assert parameters(clip_config("vit-b-32"), 9) == 152_325_889


@pytest.mark.parametrize("relations", [0, 3])
def test_the_products_of_the_losses(relations):
    """On one chip, nothing computed twice; what is no product is a few percent at this width."""
    n, width = 64, 512
    found = step(clip_config("vit-b-32"), items=n, chips=1, length=8, relations=relations)
    if relations:
        pairs = jnp.zeros((relations, n // 2 // relations), jnp.int32)
        loss = functools.partial(
            lambda t, i: relation_contrastive(
                t, i, pairs, pairs, pair_valid=pairs == 0, related=jnp.eye(n, dtype=bool),
                valid=jnp.ones(n, bool), intra=jnp.zeros(relations, bool), remat=False,
            )[0]
        )  # fmt: skip
        shape = (relations, n, width)
        expected = found.loss * pairs.size / (n / 2)
    else:
        loss, shape, expected = clip, (n, width), found.loss
    assert expected <= counted(loss, shape, shape) < 1.15 * expected


def test_how_the_parts_grow():
    config = clip_config("vit-b-32")
    clip, rcml = (step(config, **OPTIONS, relations=r) for r in (0, 9))
    assert rcml.gathered == 4 * clip.gathered
    assert step(config, **OPTIONS, relations=2).gathered == rcml.gathered
    assert 1 < rcml.flop / clip.flop < 1.05
    assert rcml.gradients / clip.gradients == pytest.approx(152_325_889 / 151_277_313)
    more = step(config, **OPTIONS | {"chips": 16}, relations=0)
    # Received is what the others have: 7 eighths of 8 parts, 15 sixteenths of 16.
    assert more.gathered / clip.gathered == pytest.approx(15 / 7)
    assert more.gradients / clip.gradients == pytest.approx(15 / 14)
    assert (more.flop - more.loss, more.loss) == (clip.flop - clip.loss, 2 * clip.loss)
    for chip in CHIPS.values():
        enough = clip.hidden_from(chip)
        backward = 2 / 3 * (clip.flop - clip.loss) * enough / clip.items / chip.rate
        assert backward == pytest.approx(clip.gradients / chip.link)


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline", "--chip", "v5e", "--items", "128"])
    assert roofline.main() == 0
    header, rule, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.count("|") == rule.count("|") == row.count("|") == 12
    assert row.startswith("| v5e | 128 | 4.39 |")
