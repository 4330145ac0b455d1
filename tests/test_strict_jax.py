"""Losses, operations, models and training steps under JAX's own strictness.

People compose these losses in programs that run with JAX_NUMPY_RANK_PROMOTION=raise,
JAX_NUMPY_DTYPE_PROMOTION=strict, JAX_DEBUG_NANS, JAX_DEBUG_INFS, JAX_TRANSFER_GUARD=disallow once
everything is placed, or JAX_ENABLE_X64. Promotion is checked while tracing, so tracing suffices.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import ResNetConfig, RobertaConfig

from rcml_jax.evaluation.relation_probes import fit_classifier
from rcml_jax.losses.clip import clip
from rcml_jax.losses.declip import declip, masked_tokens, simsiam
from rcml_jax.losses.m3co import m3co
from rcml_jax.losses.multi_soft_clip import multi_soft_clip
from rcml_jax.losses.rcml import relation_contrastive, relation_identification
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import info_nce, softmax_contrastive
from rcml_jax.losses.unicl import label_supervised
from rcml_jax.methods import build
from rcml_jax.models.backbones import build_backbone
from rcml_jax.models.m3col import SCALINGS, Dropout, M3CoL, TableEncoder
from rcml_jax.models.rcml import RCML
from rcml_jax.models.towers.bert import small_bert_config
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.models.towers.efficientnet import EfficientNetLite0
from rcml_jax.models.towers.efficientnet import Stage as EfficientNetStage
from rcml_jax.models.towers.resnet import ResNet
from rcml_jax.models.towers.vit import small_vit_config
from rcml_jax.models.two_towers import TwoTowers
from rcml_jax.ops import mixup, ranking, similarity, views
from rcml_jax.training import optimizer, sharding
from rcml_jax.training.gradcache import accumulated
from rcml_jax.training.loop import train_and_evaluate
from rcml_jax.training.step import create, make_step
from tests.methods.m3col_data import omics_config, write_tables
from tests.models.test_checkpoints import tiny_siglip
from tests.toy import tiny_config


@contextlib.contextmanager
def strict(x64: bool = False):
    """What an environment sets: no silent broadcast, no silent conversion, no NaN, no infinity."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.enable_x64(x64),
    ):
        yield


def wide(tree) -> list[str]:
    """Arrays of 64-bit floats in a tree, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, x in leaves if x.dtype == np.float64]


def check(function, *args):
    """Run a function as it stands, compiled, and traced under x64, where its floats stay 32-bit."""
    args = jax.device_put(args)
    with strict():
        plain = function(*args)
        compiled = jax.jit(function)
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(compiled(*args))
    with strict(x64=True):
        shapes = jax.eval_shape(function, *args)
    assert jax.tree.structure(shapes) == jax.tree.structure(plain)
    assert jax.tree.leaves(shapes)
    assert not wide(shapes)


# Losses, with their gradients

_RNG = np.random.default_rng(0)
N, D, R, G = 6, 4, 3, 2


def normal(*shape):
    return _RNG.standard_normal(shape).astype(np.float32)


TEXT, IMAGE, MORE = normal(N, D), normal(N, D), normal(N, D)
VALID = np.arange(N) < N - 1
LABELS = np.array([0, 1, 0, 2, -1, 2], np.int32)
PAIRS = {
    "anchor": np.array([[0, 1], [2, 3], [4, 4]], np.int32),
    "positive": np.array([[1, 2], [4, 0], [4, 4]], np.int32),
    "pair_valid": np.array([[True, True], [True, False], [True, False]]),
    "valid": VALID,
    "intra": np.array([False, False, True]),
}
RELATED = np.eye(N, dtype=bool)
LINKED = np.eye(R, dtype=bool)[:, None].repeat(G, axis=1)
LAMBDA = np.array([0.3, 1.0, 0.5, 0.9, 0.2, 1.0], np.float32)
PARTNERS = np.array([1, 0, 3, 2, 4, 5], np.int32)
TEMPERATURE = np.float32(0.1)

LOSSES = {
    "clip": lambda t, i: clip(t, i, where=VALID),
    "clip of no rows": lambda t, i: clip(t, i, where=np.zeros(N, bool)),
    "clip by chunks": lambda t, i: clip(t, i, where=VALID, chunk_size=4),
    "clip with a mask of pairs": lambda t, i: clip(t, i, where=VALID[:, None] & VALID),
    "siglip": lambda t, i: sigmoid(t, i, where=VALID),
    "siglip by chunks": lambda t, i: sigmoid(t, i, where=VALID, chunk_size=4),
    "unicl": lambda t, i: label_supervised(t, i, LABELS, where=VALID),
    "unicl by chunks": lambda t, i: label_supervised(t, i, LABELS, where=VALID, chunk_size=4),
    "info_nce": lambda t, i: info_nce(t, i, targets=PARTNERS, weights=LAMBDA),
    "info_nce by chunks": lambda t, i: info_nce(t, i, targets=PARTNERS, chunk_size=4),
    "softmax": lambda t, i: softmax_contrastive(t @ i.T, where=VALID),
    "m3co": lambda t, i: m3co([t, i], [i, t], LAMBDA, [PARTNERS, PARTNERS], where=VALID),
    "m3co by chunks": lambda t, i: m3co(
        [t, i], [i, t], LAMBDA, [PARTNERS, PARTNERS], where=VALID, chunk_size=4
    ),
    "m3co, traced temperature": lambda t, i: m3co(
        [t, i], [i, t], LAMBDA, [PARTNERS, PARTNERS], temperature=jnp.exp(t[0, 0])
    ),
    "multi_soft_clip": lambda t, i: multi_soft_clip([t, i], where=VALID),
    "multi_soft_clip by chunks": lambda t, i: multi_soft_clip([t, i], where=VALID, chunk_size=4),
    "multi_soft_clip, traced temperature": lambda t, i: multi_soft_clip(
        [t, i], where=VALID, temperature=jnp.exp(t[0, 0])
    ),
    "declip": lambda t, i: declip([t, i], [i, t], self_supervised=jnp.sum(t), where=VALID),
    "declip by chunks": lambda t, i: declip([t, i], [i, t], where=VALID, chunk_size=4),
    "simsiam": lambda t, i: simsiam([t, i], [i, t], where=VALID),
    "masked tokens": lambda t, i: jnp.sum(
        masked_tokens(t.reshape(3, 2, D), i, np.zeros(N, np.float32), LABELS.reshape(3, 2).clip(0))
    ),
    "rcml": lambda t, i: relation_contrastive(*of_relations(t, i), related=RELATED, **PAIRS),
    "rcml by chunks": lambda t, i: relation_contrastive(
        *of_relations(t, i), related=RELATED, chunk_size=2, pair_chunk_size=1, **PAIRS
    ),
    "rcml, related by relation": lambda t, i: relation_contrastive(
        *of_relations(t, i), related=jnp.stack([RELATED] * R), temperature=TEMPERATURE, **PAIRS
    ),
    "identification": lambda t, i: relation_identification(
        *of_relations(t, i), linked=LINKED, **PAIRS
    ),
}


def of_relations(*embeddings):
    return [jnp.stack([similarity.l2_normalize(x + r) for r in range(R)]) for x in embeddings]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss(name):
    def first(text, image):
        value = LOSSES[name](text, image)
        return value if isinstance(value, tuple) else (value, {})

    graded = jax.value_and_grad(first, argnums=(0, 1), has_aux=True)
    args = jax.device_put((TEXT, IMAGE))
    with strict():
        plain, _ = first(*args)  # Uncompiled: every intermediate array is looked at.
        compiled = jax.jit(graded)
        with jax.transfer_guard("disallow"):
            (value, _), grads = jax.block_until_ready(compiled(*args))
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    assert any(np.any(g) for g in grads) != (name == "clip of no rows")
    with strict(x64=True):
        assert not wide(jax.eval_shape(graded, *args))
        double = jax.eval_shape(graded, *(jax.ShapeDtypeStruct((N, D), jnp.float64),) * 2)
    assert wide(double[1]) == ["[0]", "[1]"]


# Operations

KEY = jax.random.key(0)
IDS = np.array([[1, 5, 6, 7, 3, 0, 0, 0], [1, 8, 3, 1, 9, 9, 3, 0]], np.int32)
ENDS = np.array([[4], [6]], np.int32)
BODY = (IDS != 1) & (IDS != 3) & (IDS != 0)
PIXELS = _RNG.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)

OPS = {
    **{name: (f, TEXT, IMAGE) for name, f in similarity.SIMILARITIES.items()},
    **{f"paired {name}": (f, TEXT, IMAGE) for name, f in similarity.PAIRED.items()},
    "chi_square shifted": (functools.partial(similarity.chi_square, signed="shift"), TEXT, IMAGE),
    **{f"{name} of columns": (f, TEXT, np.arange(N) > 0) for name, f in SCALINGS.items()},
    "coefficients": (lambda key: mixup.coefficients(key, 5, fraction=0.5), KEY),
    "partners": (lambda key: mixup.partners(key, N, where=VALID), KEY),
    "mix": (mixup.mix, {"a": TEXT, "b": IMAGE[:, :, None]}, LAMBDA, PARTNERS),
    "ranks": (lambda x: ranking.candidate_ranks(x, where=np.ones(D, bool)), TEXT),
    "hits": (lambda r: ranking.hit_at(r, 2), np.arange(3, dtype=np.int32)),
    "reciprocal ranks": (ranking.reciprocal_rank, np.arange(3, dtype=np.int32)),
    "image views": (lambda x, key: views.image_view(x, key, flip=True), PIXELS, KEY),
    "dropped tokens": (views.drop_tokens, IDS, ENDS, BODY, KEY),
    "masked tokens": (lambda *x: views.mask_tokens(*x, mask_id=2), IDS, BODY, KEY),
    "dropped states": (
        views.drop_states, TEXT[None], np.ones((1, N), bool), np.zeros(1, np.int32), KEY
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_an_operation(name):
    check(*OPS[name])


# Models

SIZES = {"width": 8, "layers": 1, "heads": 2}
CLIP = small_clip_config(
    **SIZES, vocab_size=16, eos_token_id=3, image_size=16, patch_size=8, embed_dim=6
)


def bert(dropout=0.1):
    return small_bert_config(**SIZES, vocab_size=16, pad_token_id=0, max_length=8, dropout=dropout)


def roberta():
    sizes = bert().to_dict() | {"max_position_embeddings": 12}
    return RobertaConfig(**{k: v for k, v in sizes.items() if k != "model_type"})


def vit():
    return small_vit_config(**SIZES, image_size=16, patch_size=8, dropout=0.1)


RESNET = ResNetConfig(
    embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_channels=3
)
SMALL_NET = {"stages": (EfficientNetStage(3, 2, 2, 4, 2),), "stem": 4, "width": 6}
TRAIN = {"deterministic": False, "rngs": {"dropout": KEY}}
MASK = (IDS > 0).astype(np.int32)
MODELS = {
    "clip": (TwoTowers(CLIP), (IDS, PIXELS), {}),
    "clip, half": (TwoTowers(CLIP, jnp.bfloat16, "layers"), (IDS, PIXELS), {}),
    "siglip": (
        TwoTowers(tiny_siglip(text={"vocab_size": 16, "eos_token_id": 3})), (IDS, None), {}
    ),
    "rcml": (RCML(CLIP, {"gate": True, "learn_pooled_prior": True}), (IDS, IDS, PIXELS), {}),
    "rcml, half": (RCML(CLIP, {"gate": True}, jnp.bfloat16), (IDS, IDS, PIXELS), {}),
    "bert": (build_backbone(bert()), (IDS, MASK), TRAIN),
    "roberta": (build_backbone(roberta()), (IDS, MASK), TRAIN),
    "vit": (build_backbone(vit()), (PIXELS,), TRAIN),
    "resnet": (ResNet(RESNET), (PIXELS,), {}),
    "efficientnet": (EfficientNetLite0(**SMALL_NET), (PIXELS,), {}),
    "m3col": (
        M3CoL({"a": TableEncoder((4, 4), 0.25)}, 3, (4,), dropout=0.5), ({"a": (TEXT,)},), TRAIN
    ),
    "dropout": (Dropout(0.3), (TEXT,), TRAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    module, inputs, options = MODELS[name]
    rngs = options.get("rngs", {})
    options = {k: v for k, v in options.items() if k != "rngs"}

    def run(key, *inputs):
        variables = module.init({"params": key, "dropout": key}, *inputs, **options)
        return module.apply(variables, *inputs, rngs=rngs, **options)

    # Flax's own LayerNorm mixes half precision with float32.
    promotion = "standard" if "half" in name else "strict"
    with strict(), jax.numpy_dtype_promotion(promotion):
        found = jax.jit(run)(*jax.device_put((KEY, *inputs)))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    with strict(x64=True), jax.numpy_dtype_promotion(promotion):
        init = functools.partial(module.init, **options)
        assert not wide(jax.eval_shape(init, {"params": KEY, "dropout": KEY}, *inputs))
        assert not wide(jax.eval_shape(run, KEY, *inputs))


# Training steps

RELATIONAL = {
    "rcml": {"model.learn_pooled_prior": True, "loss.learn_temperature": True},
    "rcml, packed": {"batch.texts_per_row": 2, "loss.chunk_size": 2, "batch.sentence_noise": 0.1},
    "clip": {"loss.mask_related": True},
    "siglip": {"loss.learn_temperature": True},
    "unicl": {"model.freeze": "image"},
    "declip": {},
}


def relational(name, catalogue, workdir):
    method = name.split(",")[0]
    options = {"model.gate": True, "data.threads": 0, "method": method} | RELATIONAL[name]
    config = tiny_config(catalogue)
    config.update_from_flattened_dict(options)
    return build(config, workdir)


def m3col(contrastive, workdir):
    tables = write_tables(workdir / "tables")
    several = {"data__folds": 0, "seeds": 2 if contrastive == "clip" else 1}
    return build(omics_config(tables, loss__contrastive=contrastive, **several), workdir / "run")


METHODS = {
    **{name: functools.partial(relational, name) for name in RELATIONAL},
    **{
        f"m3col, {name}": lambda catalogue, workdir, name=name: m3col(name, workdir)
        for name in ("m3co", "multi_soft_clip", "clip")
    },
}


def parts_of_a_run(method, parts=1):
    """The state before the first step, the step, and a batch."""
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    transform, _ = optimizer.build(
        method.config.optimizer, 10, method.frozen(params), method.decayed(params)
    )
    state = create(params, transform, jax.random.key(1))
    return state, make_step(method, transform, 10, parts=parts), batch


@pytest.mark.parametrize("name", METHODS)
def test_a_step(name, catalogue, tmp_path):
    parts = 2 if name in ("rcml, packed", "m3col, m3co") else 1
    method = METHODS[name](catalogue, tmp_path)
    with strict():
        state, step, batch = parts_of_a_run(method, parts)
        place = sharding.build("jit", jax.devices()[:1])
        state, batch = place.put_state(state), place.put_batch(batch)
        compiled = place.compile(step)
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                state, metrics = compiled(state, batch)
            jax.block_until_ready(state)
        assert np.isfinite(metrics["loss"])
    with strict(x64=True):
        state, step, batch = parts_of_a_run(method, parts)
        assert not wide(state)
        found = jax.eval_shape(functools.partial(step, axis=None), state, batch)
    assert not wide(found)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_probe(kind):
    labels = (TEXT[:, 0] > 0).astype(np.int32)
    with strict():
        assert set(fit_classifier(TEXT, labels, kind=kind, steps=3)(TEXT)) <= {0, 1}


@pytest.mark.parametrize("recipe", ["rcml", "m3col"])
def test_a_whole_run(recipe, catalogue, tmp_path):
    """As an environment has it that sets all of them; the guard is for the steps alone."""
    if recipe == "rcml":
        config = tiny_config(catalogue)
    else:
        config = omics_config(write_tables(tmp_path / "tables"), seeds=1, epochs=3, data__folds=2)
    with strict(), jax.transfer_guard("disallow"):
        assert train_and_evaluate(config, tmp_path / "run")


def test_accumulation_in_parts():
    encode = lambda params, x, key: x @ params["w"]  # noqa: E731
    graded = accumulated(lambda params, z: clip(z, z) + jnp.sum(params["w"]), encode, micro_batch=2)
    check(lambda w, x: graded({"w": w}, x, None), normal(D, D), TEXT)
