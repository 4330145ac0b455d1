"""Flickr8k as a relation graph, from a small copy in its published layout."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from rcml_jax.data.images import image_states
from rcml_jax.data.relation_graph import SPLITS, split_graph
from rcml_jax.data.sources import flickr8k
from rcml_jax.errors import UserError
from tests.data.sources.test_captions import write_flickr

#: By image its two captions; the last two images are validation and test.
CAPTIONS = [
    ("A dog runs on the beach", "Two DOGS play"),
    ("A puppy in snow", "a brown dog"),
    ("A dogged walker", "a man on a rock"),
    ("A man with a dog", "somebody sleeps"),
    ("Dogs by the sea", "a dog swims"),
    ("dog", "a dog"),
]


@pytest.fixture
def copy(tmp_path):
    return write_flickr(tmp_path, caption=lambda n, k: CAPTIONS[n][k])


def test_items_are_captions_with_their_photographs(copy):
    graph = flickr8k.load(copy)
    assert len(graph) == 12
    assert graph.ids[:3] == ("0.jpg#0", "0.jpg#1", "1.jpg#0")
    assert graph.texts[2] == "A puppy in snow"
    assert graph.images.encoded(3) == (copy / "flickr30k-images" / "1.jpg").read_bytes()
    np.testing.assert_array_equal(np.asarray(graph.images[2]), np.asarray(graph.images[3]))
    states = image_states(graph.images)
    assert len(states) == 12
    assert states[2] == states[3] != states[4]
    splits = split_graph(graph, seed=0, disjoint="item")
    assert [len(splits.items(split)) for split in SPLITS] == [8, 2, 2]


def test_relations_are_one_photograph_and_one_subject(copy):
    graph = flickr8k.load(copy)
    assert graph.relations == (flickr8k.SAME, "both of them show a dog")
    pairs = {tuple(pair) for pair in graph.pairs.tolist()}
    assert {pair for pair in pairs if pair[2] == 0} == {(2 * i, 2 * i + 1, 0) for i in range(6)}
    # More than half of the captions of photographs 0, 1, 4 and 5 name a dog; "dogged" is none.
    dogs = [item for image in (0, 1, 4, 5) for item in (2 * image, 2 * image + 1)]
    assert {pair for pair in pairs if pair[2] == 1} == {
        (a, b, 1) for a in dogs for b in dogs if a < b
    }
    assert graph.linked(np.array([0]), np.array([9]), np.array([1])).all()
    assert not graph.linked(np.array([0]), np.array([6]), np.array([1])).any()


def test_pairs_of_a_subject_are_drawn_by_the_seed(copy, monkeypatch):
    monkeypatch.setattr(flickr8k, "PAIRS", 5)
    drawn = [flickr8k.load(copy, seed=seed).pairs for seed in (0, 0, 1)]
    assert np.bincount(drawn[0][:, 2]).tolist() == [6, 5]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_without_a_path_it_is_said(tmp_path):
    with pytest.raises(UserError, match="needs a local copy: --config rcml:flickr8k,path="):
        flickr8k.from_config(ConfigDict({"path": "", "strict": False}), tmp_path)
