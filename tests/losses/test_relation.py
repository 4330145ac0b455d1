import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rcml_jax.losses.contrastive import clip
from rcml_jax.losses.relation import (
    relation_contrastive,
    relation_identification,
    relation_terms,
)
from tests import reference

TERMS = ("tt", "ti", "it", "ii")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_batch(seed=0, relations=3, items=7, dim=4, padded_items=2, groups=(4, 1, 3)):
    """Random pairs: relation 0 is intra-sample, groups are uneven, the graph has more links."""
    rng = np.random.default_rng(seed)
    text, image = unit(rng.normal(size=(2, relations, items, dim))).astype(np.float32)
    real, size = items - padded_items, max(groups)
    anchor, positive = rng.integers(0, real, (2, relations, size))
    positive = np.where(anchor == positive, (positive + 1) % real, positive)
    positive[0] = anchor[0]
    pair_valid = np.arange(size) < np.array(groups)[:, None]
    related = np.eye(items, dtype=bool)
    related[anchor[pair_valid], positive[pair_valid]] = True
    related[0, 1] = True
    related |= related.T
    return (text, image, anchor, positive), {
        "pair_valid": pair_valid,
        "related": related,
        "valid": np.arange(items) < real,
        "intra": np.arange(relations) == 0,
    }


def check(arrays, options, temperature=0.3, ways=((None, True), (2, True))):
    """Loss, auxiliary scalars and gradients are the twin's, for each way (block, remat)."""
    text, image, anchor, positive = arrays
    options = {**options, "temperature": temperature}

    def twin(text, image):
        return reference.relation_contrastive(text, image, anchor, positive, **options)

    expected, expected_aux = twin(text, image)
    slopes = reference.gradient(lambda *z: twin(*z)[0], text, image)
    for block, remat in ways:

        def loss(text, image, block=block, remat=remat):
            return relation_contrastive(
                text, image, anchor, positive, **options, block=block, remat=remat
            )

        (value, aux), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
            text, image
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert set(aux) == set(expected_aux)
        for name in aux:
            np.testing.assert_allclose(aux[name], expected_aux[name], rtol=1e-5, atol=1e-6)
        for a, e in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-5)
    return value, aux, gradients


@pytest.mark.parametrize("seed", range(3))
def test_uneven_groups_and_padding(seed):
    arrays, options = make_batch(seed)
    _, aux, gradients = check(arrays, options)
    assert aux["pairs"] == options["pair_valid"].sum()
    for gradient in gradients:
        assert np.all(gradient[:, ~options["valid"]] == 0)
        assert np.any(gradient != 0)


def test_no_padding_in_blocks_of_any_size():
    ways = [(None, True), (1, True), (1, False), (9, True)]
    check(*make_batch(padded_items=0, groups=(4, 4, 4)), ways=ways)


def test_one_relation():
    check(*make_batch(relations=1, groups=(5,)))


def test_weight_of_the_intra_modal_terms():
    arrays, options = make_batch()
    for weight in (0.0, 0.5, 2.0):
        loss, aux = relation_contrastive(*arrays, **options, intra_modal_weight=weight)
        expected, _ = reference.relation_contrastive(*arrays, **options, intra_modal_weight=weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        sums = (aux["ti"] + aux["it"]) / 2 + weight * (aux["tt"] + aux["ii"])
        np.testing.assert_allclose(loss, sums, rtol=1e-6)


def test_intra_sample_pairs_have_no_intra_modal_terms():
    arrays, options = make_batch()
    options["pair_valid"][1:] = False
    _, aux, _ = check(arrays, options)
    assert aux["tt"] == aux["ii"] == 0
    assert aux["ti"] > 0


def test_no_pairs():
    arrays, options = make_batch()
    options["pair_valid"][:] = False
    value, aux, gradients = check(arrays, options)
    assert value == 0
    assert aux["accuracy"] == aux["pairs"] == 0
    assert all(np.all(g == 0) for g in gradients)


def test_pairs_of_padding_items_do_not_count():
    (text, image, anchor, positive), options = make_batch()
    positive[1, 0] = np.flatnonzero(~options["valid"])[0]
    _, aux, _ = check((text, image, anchor, positive), options)
    assert aux["pairs"] == options["pair_valid"].sum() - 1


def test_row_without_negatives():
    arrays, options = make_batch(relations=1, groups=(1,))
    options["intra"][:] = False
    options["related"][:] = True
    value, aux, gradients = check(arrays, options)
    assert value == 0
    assert aux["accuracy"] == 1
    assert all(np.all(g == 0) for g in gradients)
    # One row with negatives, one without: the mean is over both, in each cross-modal term.
    (_, _, anchor, positive), _ = make_batch(relations=1, groups=(1,))
    i, j = anchor[0, 0], positive[0, 0]
    k = next(k for k in np.flatnonzero(options["valid"]) if k not in (i, j))
    options["related"][i, k] = False
    _, _, gradients = check(arrays, options)
    assert all(np.any(g != 0) for g in gradients)


def test_the_positive_is_counted_once():
    # The graph should relate every pair; should it miss one, {j} ∪ N(i) is still a set.
    arrays, options = make_batch()
    options["related"] = np.eye(len(options["valid"]), dtype=bool)
    check(arrays, options)


def test_related_items_are_no_negatives():
    (text, image, anchor, positive), options = make_batch(relations=1, groups=(1,))
    options["intra"][:] = False
    i, j = anchor[0, 0], positive[0, 0]
    k = next(k for k in np.flatnonzero(options["valid"]) if k not in (i, j))
    options["related"][i, k] = options["related"][k, i] = True
    options["related"][j, k] = options["related"][k, j] = True
    before, _ = relation_contrastive(text, image, anchor, positive, **options)
    text, image = text.copy(), image.copy()
    text[:, k], image[:, k] = -text[:, k], unit(image[:, k] + 1)
    after, _ = relation_contrastive(text, image, anchor, positive, **options)
    assert before == after > 0


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_reduction_to_clip(temperature, weight):
    """One intra-sample relation of all N self pairs and no links is CLIP (Eq. 7–8)."""
    items = 6
    (text, image, *_), _ = make_batch(relations=1, items=items, padded_items=0, groups=(1,))
    own = np.arange(items)[None]

    def ours(text, image):
        loss, _ = relation_contrastive(
            text,
            image,
            own,
            own,
            pair_valid=np.ones((1, items), bool),
            related=np.eye(items, dtype=bool),
            valid=np.ones(items, bool),
            intra=np.ones(1, bool),
            temperature=temperature,
            intra_modal_weight=weight,
        )
        return loss

    def theirs(text, image):
        return clip(text[0], image[0], temperature=temperature, normalize=False)

    value, gradients = jax.value_and_grad(ours, (0, 1))(text, image)
    expected, slopes = jax.value_and_grad(theirs, (0, 1))(text, image)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(value, clip(text[0], image[0], temperature=temperature), rtol=1e-5)
    for a, e in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_permutations():
    (text, image, anchor, positive), options = make_batch()
    expected, expected_aux = relation_contrastive(text, image, anchor, positive, **options)
    rng = np.random.default_rng(1)
    items, relations, pairs = (rng.permutation(n) for n in (text.shape[1], 3, anchor.shape[1]))
    inverse = np.argsort(items)
    moved, aux = relation_contrastive(
        text[relations][:, items],
        image[relations][:, items],
        inverse[anchor[relations][:, pairs]],
        inverse[positive[relations][:, pairs]],
        pair_valid=options["pair_valid"][relations][:, pairs],
        related=options["related"][items][:, items],
        valid=options["valid"][items],
        intra=options["intra"][relations],
    )
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    for name in aux:
        np.testing.assert_allclose(aux[name], expected_aux[name], rtol=1e-5)


def test_pairs_are_undirected_and_modalities_symmetric():
    (text, image, anchor, positive), options = make_batch()
    expected, aux = relation_contrastive(text, image, anchor, positive, **options)
    reversed_pairs, _ = relation_contrastive(text, image, positive, anchor, **options)
    np.testing.assert_allclose(reversed_pairs, expected, rtol=1e-6)
    swapped, swapped_aux = relation_contrastive(image, text, anchor, positive, **options)
    np.testing.assert_allclose(swapped, expected, rtol=1e-6)
    for name in TERMS:
        other = name.translate(str.maketrans("ti", "it"))
        np.testing.assert_allclose(swapped_aux[other], aux[name], rtol=1e-6)


def test_more_padding_changes_nothing():
    (text, image, anchor, positive), options = make_batch()
    expected, _ = relation_contrastive(text, image, anchor, positive, **options)
    extra = np.zeros_like(text[:, :3])
    related = np.pad(options["related"], (0, 3)) | np.eye(text.shape[1] + 3, dtype=bool)
    padded, _ = relation_contrastive(
        np.concatenate([text, extra], 1),
        np.concatenate([image, extra], 1),
        np.pad(anchor, ((0, 0), (0, 2))),
        np.pad(positive, ((0, 0), (0, 2))),
        pair_valid=np.pad(options["pair_valid"], ((0, 0), (0, 2))),
        related=related,
        valid=np.pad(options["valid"], (0, 3)),
        intra=options["intra"],
    )
    np.testing.assert_allclose(padded, expected, rtol=1e-6)


def test_accuracy_counts_ties_against_the_model():
    (text, _, anchor, positive), options = make_batch()
    ones = np.full_like(text, 0.5)
    _, aux = relation_contrastive(ones, ones, anchor, positive, **options)
    assert aux["accuracy"] == 0
    _, expected = reference.relation_contrastive(ones, ones, anchor, positive, **options)
    assert expected["accuracy"] == 0


def test_terms_of_one_relation_add_up():
    (text, image, anchor, positive), options = make_batch()
    shared = {name: options[name] for name in ("related", "valid")}
    terms = [
        relation_terms(*z, pair_valid=pair_valid, **shared)
        for *z, pair_valid in zip(text, image, anchor, positive, options["pair_valid"], strict=True)
    ]
    _, aux = relation_contrastive(text, image, anchor, positive, **options)
    for name in ("ti", "it", "accuracy"):
        mean = sum(t[name][0] for t in terms) / sum(t[name][1] for t in terms)
        np.testing.assert_allclose(aux[name], mean, rtol=1e-6)
    for name in ("tt", "ii"):
        mean = sum(t[name][0] for t in terms[1:]) / sum(t[name][1] for t in terms[1:])
        np.testing.assert_allclose(aux[name], mean, rtol=1e-6)


def test_tiny_temperature():
    arrays, options = make_batch()
    with jax.debug_nans(True):
        (value, _), gradients = jax.value_and_grad(
            lambda t, i: relation_contrastive(t, i, *arrays[2:], **options, temperature=1e-4),
            (0, 1),
            has_aux=True,
        )(*arrays[:2])
    expected, _ = reference.relation_contrastive(*arrays, **options, temperature=1e-4)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in gradients)


@pytest.mark.parametrize(("block", "pair_block"), [(None, None), (1, None), (1, 3)])
def test_eight_devices_equal_one(block, pair_block):
    (text, image, *pairs), options = make_batch(items=16, padded_items=3, groups=(6, 2, 8))
    devices = np.array(jax.devices())
    assert len(devices) == 8
    step = jax.jit(
        jax.value_and_grad(
            lambda t, i: relation_contrastive(
                t, i, *pairs, **options, block=block, pair_block=pair_block
            )[0],
            (0, 1),
        )
    )
    by_item = NamedSharding(Mesh(devices, ("batch",)), PartitionSpec(None, "batch"))
    value, gradients = step(*(jax.device_put(x, by_item) for x in (text, image)))
    expected, slopes = step(*(jax.device_put(x, devices[0]) for x in (text, image)))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, e in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
        assert np.any(a != 0)


def test_learned_temperature():
    arrays, options = make_batch()
    slope = jax.jit(
        jax.grad(lambda s: relation_contrastive(*arrays, **options, temperature=s, block=1)[0])
    )(np.float32(0.2))
    (expected,) = reference.gradient(
        lambda s: reference.relation_contrastive(*arrays, **options, temperature=float(s))[0], 0.2
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_bfloat16_is_computed_in_float32():
    (text, image, *pairs), options = make_batch()
    text, image = jnp.asarray(text, jnp.bfloat16), jnp.asarray(image, jnp.bfloat16)
    loss, _ = relation_contrastive(text, image, *pairs, **options)
    exact, _ = relation_contrastive(text.astype("f4"), image.astype("f4"), *pairs, **options)
    assert loss.dtype == jnp.float32
    assert loss == exact
    slope = jax.grad(lambda t: relation_contrastive(t, image, *pairs, **options)[0])(text)
    assert slope.dtype == jnp.bfloat16
    assert np.isfinite(slope.astype("f4")).all()


@pytest.mark.parametrize(("block", "pair_block"), [(None, None), (1, None), (1, 3)])
def test_vmap(block, pair_block):
    batches = [make_batch(seed) for seed in range(3)]
    expected = [relation_contrastive(*arrays, **options)[0] for arrays, options in batches]
    arrays, options = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    actual = jax.vmap(
        lambda arrays, options: relation_contrastive(
            *arrays, **options, block=block, pair_block=pair_block
        )[0]
    )(arrays, options)
    np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("block", [None, 2])
def test_strict_promotion(block):
    arrays, options = jax.tree.map(jnp.asarray, make_batch())
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(
            jax.grad(lambda t: relation_contrastive(t, *arrays[1:], **options, block=block)[0])
        )(arrays[0])


def value_and_gradients(arrays, options, **ways):
    """Loss, terms and gradients for the embeddings, compiled."""
    text, image, *pairs = arrays

    def loss(text, image):
        return relation_contrastive(text, image, *pairs, **options, temperature=0.3, **ways)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(text, image)


@pytest.mark.parametrize(
    "ways",
    [
        {"pair_block": 1},
        {"pair_block": 3, "block": 2},
        {"pair_block": 2, "block": 1, "remat": False},
        {"pair_block": 99, "block": 1},
    ],
)
def test_pairs_in_blocks_are_the_plain_form(ways):
    arrays, options = make_batch(groups=(7, 2, 5), items=9)
    expected, actual = (value_and_gradients(arrays, options, **w) for w in ({}, ways))
    assert all(np.abs(gradient).max() > 1e-2 for gradient in expected[1])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-7)


def test_blocks_of_no_pairs_are_refused():
    arrays, options = make_batch()
    with pytest.raises(ValueError, match="pair_block=0 must be at least 1"):
        relation_contrastive(*arrays, **options, pair_block=0)


@pytest.mark.parametrize(("relations", "most"), [(11, 2**31), (1, 2**30)])
def test_four_thousand_pairs_fit_into_memory(relations, most):
    """Value and gradient for 8,192 items of width 512, inputs and gradients included."""
    pairs, items, width = -(-4096 // relations), 8192, 512
    of = jax.ShapeDtypeStruct
    embeddings = of((relations, items, width), jnp.float32)
    index = of((relations, pairs), jnp.int32)
    options = {
        "pair_valid": of((relations, pairs), bool),
        "related": of((items, items), bool),
        "valid": of((items,), bool),
        "intra": of((relations,), bool),
    }

    def planned(**ways):
        def loss(text, image, anchor, positive, options):
            return relation_contrastive(text, image, anchor, positive, **options, **ways)[0]

        graded = jax.jit(jax.value_and_grad(loss, (0, 1)))
        plan = graded.lower(embeddings, embeddings, index, index, options).compile()
        plan = plan.memory_analysis()
        return plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes

    assert planned(block=1, pair_block=128) < most < 2**32
    assert planned() > 3 * 2**30


def identification_batch(seed=0):
    arrays, options = make_batch(seed)
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
