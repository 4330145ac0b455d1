"""Garment groups of a made-up copy of H&M's files: labels, splits, masked words."""

import csv
import pickle

import numpy as np
import pytest

from rcml_jax.data.images import ChosenImages
from rcml_jax.data.relation_graph import SPLITS
from rcml_jax.data.sources import garments, hm
from rcml_jax.data.sources.garments import without_class_words
from rcml_jax.errors import UserError
from tests.data import hm_copy
from tests.data.hm_copy import write_copy

GROUP = {row["article_id"]: row["garment_group_name"] for row in hm_copy.rows()}
PRODUCT = {row["article_id"]: row["product_code"] for row in hm_copy.rows()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("hm") / "copy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_labels_are_groups_and_products_stay_in_one_split(copy, cache):
    lines = []
    data = garments.load(cache, copy, log=lines.append)
    image, text = data.modalities
    ids = [row["article_id"] for row in hm_copy.rows()]
    assert [data.label_names[label] for label in data.labels] == [GROUP[key] for key in ids]
    assert (image.kind, text.kind, data.classes) == ("image", "text", 4)
    assert text.values[0] == 'Kite No. 0. Red Kite. A kite, "made up", for the café.'
    assert image.values.encoded(7) == hm_copy.photograph(7)
    # The store tells what changes with an image, for all or for some of them.
    assert image.values.states() == hm.load(cache, copy).images.states()
    some = ChosenImages(image.values, np.array([7, 2]))
    assert some.states() == [image.values.states()[i] for i in (7, 2)]
    assert some[1].tobytes() == image.values[2].tobytes()
    assert pickle.loads(pickle.dumps(some)).encoded(0) == hm_copy.photograph(7)
    split_of = {}
    for key, split in zip(ids, data.split.tolist(), strict=True):
        assert split_of.setdefault(PRODUCT[key], split) == split
    assert set(split_of.values()) == set(range(len(SPLITS)))
    other = garments.load(cache, copy, split_seed=1, log=lines.append)
    assert not np.array_equal(other.split, data.split)
    assert not any("left out:" in line for line in lines)


def test_articles_without_a_group_or_of_a_group_that_is_not_trained(tmp_path):
    folder = write_copy(tmp_path / "own")
    path = folder / "articles.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[0]["garment_group_name"] = "Unknown"
    # One product of a group of its own, which is in one split; in a split seed it is the test's.
    for row in rows[4:8]:
        row["garment_group_name"] = "Alone"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, hm_copy.HEADER)
        writer.writeheader()
        writer.writerows(rows)
    sizes = set()
    for seed in range(12):
        lines = []
        data = garments.load(tmp_path / "cache", folder, split_seed=seed, log=lines.append)
        lost = len(rows) - len(data)
        assert f"H&M: {lost} of {len(rows)} articles are left out" in lines[-1]
        assert ("Alone" in data.label_names) == (lost == 1)
        assert np.bincount(data.labels).min() > 0
        sizes.add(lost)
    assert sizes == {1, 5}


def test_words_of_classes_are_masked_in_every_form(copy, cache):
    names = ("Dresses Ladies", "Socks & Tights", "Accessories", "Blouses and Shirts")
    texts = ["A DRESS and a blouse.", "Socks: one sock", "accessory, dressing", "tight-fitting"]
    assert without_class_words(texts, names) == ["A and a .", ": one", ", dressing", "-fitting"]
    plain = garments.load(cache, copy, log=[].append)
    masked = garments.load(cache, copy, mask_class_words=True, log=[].append)
    # The made-up groups are "Group 0" and so on, which no text says.
    assert masked.modalities[1].values == list(plain.modalities[1].values)


def test_a_missing_path():
    with pytest.raises(UserError, match="config m3col:hm,path=DIRECTORY"):
        garments.from_config(type("Data", (), {"path": ""}), None)
