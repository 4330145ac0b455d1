"""Hidden patches and lost words: how much, where, and that nothing else changes."""

import io

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data.images import (
    EncodedImages,
    PatchesHidden,
    drop_words,
    drop_words_of_rows,
    hide_patches,
    hide_patches_of_rows,
)

GREY = 128


def rng(*seed):
    return np.random.default_rng(seed)


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def stored(encoded):
    return EncodedImages(len(encoded), encoded.__getitem__)


def images(n=6, height=8, width=4):
    """Images without the grey that hides."""
    return np.random.default_rng(0).integers(0, 100, (n, height, width, 3), np.uint8)


def hidden_patches(before, after, patch):
    """(n, rows, columns) bool: a patch is hidden as a whole, or not at all."""
    n, height, width, _ = before.shape
    hidden = np.zeros((n, height // patch, width // patch), bool)
    for i, r, c in np.ndindex(hidden.shape):
        place = i, slice(r * patch, (r + 1) * patch), slice(c * patch, (c + 1) * patch)
        hidden[i, r, c] = np.all(after[place] == GREY)
        if not hidden[i, r, c]:
            np.testing.assert_array_equal(after[place], before[place])
    return hidden


@pytest.mark.parametrize(
    ("share", "patch", "count"),
    [(0.5, 2, 4), (1 / 3, 2, 3), (0.05, 2, 0), (0.25, 4, 0), (0.75, 4, 2), (0.0, 2, 0), (1, 2, 8)],
)
def test_each_image_loses_the_same_number_of_whole_patches(share, patch, count):
    before = images()
    untouched = before.copy()
    after = hide_patches(before, np.random.default_rng(1), share=share, patch=patch)
    assert after.shape == before.shape
    assert after.dtype == np.uint8
    assert np.all(hidden_patches(before, after, patch).sum(axis=(1, 2)) == count)
    np.testing.assert_array_equal(before, untouched)


def test_patches_are_drawn_for_each_image_and_each_place():
    before = images(n=400)
    after = hide_patches(before, np.random.default_rng(1), share=0.25, patch=2)
    hidden = hidden_patches(before, after, 2)
    assert len(np.unique(hidden, axis=0)) == 8 * 7 / 2  # every choice of two of the eight
    assert np.abs(hidden.mean(axis=0) - 0.25).max() < 0.1


def test_the_generator_alone_decides():
    options = {"share": 0.5, "patch": 2}
    one, same, other = (
        hide_patches(images(), np.random.default_rng(seed), **options) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_words_are_lost_one_by_one():
    words = [f"word{i}" for i in range(4000)]
    kept = drop_words(" ".join(words), np.random.default_rng(0), share=0.3).split()
    assert abs(len(kept) / 4000 - 0.7) < 0.03
    assert kept == [word for word in words if word in set(kept)]  # in order, each once
    lost = np.array([word not in set(kept) for word in words])
    assert abs(np.mean(lost[1:] & lost[:-1]) - 0.3**2) < 0.03  # each by itself


def test_none_and_all_of_the_words():
    text = "a  red\tapple\n"
    assert drop_words(text, np.random.default_rng(0), share=0.0) == "a red apple"
    assert drop_words(text, np.random.default_rng(0), share=1.0) == ""
    assert drop_words("", np.random.default_rng(0), share=0.5) == ""


def test_a_text_may_turn_empty_and_depends_on_the_generator():
    found = {drop_words("one two", np.random.default_rng(seed), share=0.5) for seed in range(40)}
    assert found == {"", "one", "two", "one two"}


def test_what_a_row_loses_depends_on_the_seed_and_the_row_alone():
    before = images()
    rows = np.array([4, 0, 7, 2, 9, 5])
    after = hide_patches_of_rows(before, rows, 3, share=0.5, patch=2)
    order = np.array([5, 1, 3])
    some = hide_patches_of_rows(before[order], rows[order], 3, share=0.5, patch=2)
    np.testing.assert_array_equal(some, after[order])
    hidden = hidden_patches(before, after, 2)
    assert len(np.unique(hidden, axis=0)) > 1
    other = hide_patches_of_rows(before, rows, 4, share=0.5, patch=2)
    assert np.any(hidden_patches(before, other, 2) != hidden)
    texts = [f"red apple {row} tree leaf branch" for row in rows]
    lost = drop_words_of_rows(texts, rows, 3, share=0.5)
    chosen = [texts[i] for i in order]
    assert drop_words_of_rows(chosen, rows[order], 3, share=0.5) == [lost[i] for i in order]
    assert lost != texts
    assert drop_words_of_rows(texts, rows, 4, share=0.5) != lost


def test_the_same_patches_are_hidden_of_an_image_of_any_size():
    pixels = np.random.default_rng(0).integers(0, 100, (2, 24, 24, 3), np.uint8)
    encoded = [png(image) for image in pixels]
    found = PatchesHidden(stored(encoded), 3, share=0.5, side=4)
    assert len(found) == 2
    expected = hide_patches_of_rows(pixels, np.arange(2), 3, share=0.5, patch=6)
    for index in range(2):
        np.testing.assert_array_equal(np.asarray(found[index]), expected[index])
        with Image.open(io.BytesIO(found.encoded(index))) as image:
            np.testing.assert_array_equal(np.asarray(image), expected[index])
    small = PatchesHidden(stored([png(pixels[0, :9, :9])]), 3, share=0.5, side=4)
    assert np.asarray(small[0]).shape == (8, 8, 3)  # patches of two whole pixels
    before = np.zeros((1, 24, 24, 3), np.uint8)
    large = hidden_patches(before, hide_patches(before, rng(3, 0), share=0.5, patch=6), 6)
    grey = np.asarray(small[0])[None] == GREY
    np.testing.assert_array_equal(grey[:, ::2, ::2].all(-1), large)


def test_embeddings_of_hidden_images_are_known_by_what_is_hidden():
    of_items = stored([png(image) for image in images(2, 8, 8)])
    one = PatchesHidden(of_items, 3, share=0.5, side=4).states()
    assert one == PatchesHidden(of_items, 3, share=0.5, side=4).states()
    for seed, share, side in ((4, 0.5, 4), (3, 0.25, 4), (3, 0.5, 2)):
        assert PatchesHidden(of_items, seed, share=share, side=side).states() != one
