"""The image of the data set's card: what it says of a respect is so in the graph."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from docs.openmoji_card import FIGURE, PARTNERS, WRONG, draw, examples, grey_pairs, value
from rcml_jax.data.images import EncodedImages
from rcml_jax.data.sources.openmoji import SENTENCES
from tests.data.conftest import make_graph


def linked(graph, relation, a, b):
    return [min(a, b), max(a, b), relation] in graph.pairs.tolist()


@pytest.fixture
def graph():
    """Items 0 to 11 under three respects; a fourth has too few pairs."""
    pairs = [(a, b, 0) for a in range(6) for b in range(a + 1, 6)]
    pairs += [(a, b, 1) for a in range(12) for b in range(a + 1, 12) if a % 2 == b % 2]
    pairs += [(a, b, 2) for a in range(12) for b in range(a + 1, 12) if a % 3 == b % 3]
    found = make_graph(items=12, relations=4)
    pairs = np.array(sorted([*pairs, (0, 1, 3)]), np.int32)
    return dataclasses.replace(found, pairs=pairs)


@pytest.mark.parametrize("seed", range(5))
def test_examples_are_linked_as_they_say(graph, seed):
    found = examples(graph, seed)
    assert [line.relation for line in found] == [0, 1, 2]
    for line in found:
        assert len(set(line.partners.tolist())) == PARTNERS
        assert all(linked(graph, line.relation, line.query, x) for x in line.partners.tolist())
        assert len(set(line.wrong.tolist())) == WRONG == len(line.linked)
        for item, respects in zip(line.wrong.tolist(), line.linked, strict=True):
            truth = tuple(r for r in range(4) if linked(graph, r, line.query, item))
            assert respects == truth
            assert truth
            assert line.relation not in truth


def test_the_seed_alone_decides(graph):
    first, again, other = (repr(examples(graph, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_image_is_of_the_same_bytes_again(graph, tmp_path):
    found = examples(graph, 0)
    one, two = (draw(graph, found, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > image.height > 500


def test_values_are_told_where_they_cannot_be_seen():
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[:32, :48], pixels[:32, 48:] = (234, 90, 71), (92, 158, 49)
    assert value("colour", pixels) == "red"
    assert value("second colour", pixels) == "green"
    assert value("outline", pixels) == "wide, over 75 % of its box filled"
    assert value("word", pixels) == ""


def test_recoloured_pairs_of_greys_are_counted(graph):
    grey, red = (155, 155, 154), (234, 90, 71)
    drawn = [io.BytesIO() for _ in range(3)]
    for file, colour in zip(drawn, (grey, (208, 207, 206), red), strict=True):
        Image.new("RGB", (16, 16), colour).save(file, "PNG")
    place = list(SENTENCES).index("recoloured")
    pairs = np.array([(0, 1, place), (0, 2, place), (1, 2, 0)], np.int32)
    images = EncodedImages(3, lambda item: drawn[item].getvalue())
    assert grey_pairs(dataclasses.replace(graph, pairs=pairs, images=images)) == (1, 2)


def test_the_figure_is_small():
    assert 50_000 < FIGURE.stat().st_size < 400_000
