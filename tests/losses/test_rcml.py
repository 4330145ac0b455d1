"""RCML's loss against its twin, and what must leave it unchanged."""

import jax
import numpy as np
import pytest

from rcml_jax.losses.clip import clip
from rcml_jax.losses.rcml import relation_contrastive, relation_terms
from tests import reference
from tests.losses.relation_batch import make_batch, unit

TERMS = ("tt", "ti", "it", "ii")


def check(arrays, options, temperature=0.3, ways=((None, True), (2, True))):
    """Loss, auxiliary scalars and gradients are the twin's, for each way (chunk_size, remat)."""
    text, image, anchor, positive = arrays
    options = {**options, "temperature": temperature}

    def twin(text, image):
        return reference.relation_contrastive(text, image, anchor, positive, **options)

    expected, expected_aux = twin(text, image)
    slopes = reference.gradient(lambda *z: twin(*z)[0], text, image)
    for chunk_size, remat in ways:

        def loss(text, image, chunk_size=chunk_size, remat=remat):
            return relation_contrastive(
                text, image, anchor, positive, **options, chunk_size=chunk_size, remat=remat
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


def test_no_padding_in_chunks_of_any_size():
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


def test_negatives_of_each_relation():
    arrays, options = make_batch()
    relations, items = len(options["intra"]), len(options["valid"])
    links = np.random.default_rng(1).random((relations, items, items)) < 0.3
    linked = links | links.transpose(0, 2, 1) | np.eye(items, dtype=bool)
    one, _ = relation_contrastive(*arrays, **options)
    same = np.broadcast_to(options["related"], linked.shape)
    np.testing.assert_allclose(
        relation_contrastive(*arrays, **options | {"related": same})[0], one, rtol=1e-6
    )
    value, _, _ = check(arrays, options | {"related": linked})
    assert value != one
    in_parts, _ = relation_contrastive(
        *arrays, **options | {"related": linked}, temperature=0.3, chunk_size=2, pair_chunk_size=2
    )
    np.testing.assert_allclose(in_parts, value, rtol=1e-6)


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


def test_learned_temperature():
    arrays, options = make_batch()
    slope = jax.jit(
        jax.grad(lambda s: relation_contrastive(*arrays, **options, temperature=s, chunk_size=1)[0])
    )(np.float32(0.2))
    (expected,) = reference.gradient(
        lambda s: reference.relation_contrastive(*arrays, **options, temperature=float(s))[0], 0.2
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-4)
