import json
import logging
import shutil
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rcml_jax.data import prepared
from rcml_jax.data.images import ImageBank
from rcml_jax.data.relation_graph import SPLITS, split_graph
from rcml_jax.data.sources import grocery
from rcml_jax.data.sources.grocery import SAME_PRODUCT, Product, draw_pairs, relations
from rcml_jax.errors import UserError
from tests.data.grocery_copy import COUNTS, LISTS, PRODUCTS, photograph, write_copy

REAL = Path(__file__).parents[4] / "shared" / "data" / "grocery"
NAMES = [name.replace("-", " ") for name, *_ in PRODUCTS]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("grocery") / "copy")


@pytest.fixture(scope="module")
def graph(copy, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return grocery.load(cache, path=copy, log=lambda line: None)


@pytest.fixture
def changed(copy, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(copy, tmp_path / "changed")


def linked(graph, sentence):
    """The products that a relation links, as a set of pairs of names."""
    e = graph.relations.index(sentence)
    return {
        (graph.label_names[a], graph.label_names[b])
        for a, b, relation in graph.class_links.tolist()
        if relation == e
    }


def test_items_texts_and_labels(graph):
    assert graph.validate() is graph
    assert len(graph) == len(PRODUCTS) * sum(COUNTS.values())
    assert graph.label_names == tuple(NAMES)
    assert graph.ids[0] == "train/Fruit/Apple/Granny-Smith/Granny-Smith_001"
    for text, label in zip(graph.texts, graph.labels, strict=True):
        assert text.startswith(f"{NAMES[label]}. ")
    juice = NAMES.index("Tropicana Smooth")
    texts = {text for text, label in zip(graph.texts, graph.labels, strict=True) if label == juice}
    assert texts == {"Tropicana Smooth. Pressed on apples and oranges."}
    assert graph.images.encoded(0) == photograph(0, 0)
    # An image shows its own product.
    images = ImageBank(graph.images, 4)(np.arange(len(graph))).mean(axis=(1, 2))
    colours = np.array([images[graph.labels == c].mean(axis=0) for c in range(len(NAMES))])
    distances = np.linalg.norm(images[:, None] - colours, axis=2)
    np.testing.assert_array_equal(distances.argmin(axis=1), graph.labels)


def test_the_official_lists_are_the_splits(graph, copy):
    for disjoint in ("item", "pair"):
        splits = split_graph(graph, seed=7, disjoint=disjoint)
        assert splits.disjoint == "declared item"
        for split, name in zip(SPLITS, LISTS.values(), strict=True):
            lines = (copy / name).read_text().splitlines()
            listed = {line.partition(".jpg")[0] for line in lines}
            items = splits.items(split)
            assert {graph.ids[i] for i in items} == listed
            assert len(items) == len(lines)
            assert set(splits.pairs(split)[:, :2].ravel().tolist()) <= set(items.tolist())
    assert np.all(splits.pair_split >= 0)  # no pair is drawn across splits


def test_relations_and_sentences(graph):
    assert linked(graph, SAME_PRODUCT) == {(name, name) for name in NAMES}
    milks = {("Arla Milk", "Arla Milk"), ("Arla Ecological Milk", "Arla Ecological Milk")}
    milks.add(("Arla Milk", "Arla Ecological Milk"))
    assert linked(graph, "both are a kind of milk") == milks
    assert linked(graph, "both are made by Arla") == milks
    apples = linked(graph, "both are a kind of apple")
    assert ("Granny Smith", "Royal Gala") in apples
    assert len(apples) == 3
    fruit = linked(graph, "both are sold in the fruit department")
    assert ("Royal Gala", "Orange") in fruit
    assert len(fruit) == 6
    packed = linked(graph, "both are sold in the packaged food and drink department")
    assert len(packed) == 15
    organic = linked(graph, "one is the organic counterpart of the other")
    assert organic == {("Arla Milk", "Arla Ecological Milk")}
    plants = linked(graph, "one is the plant-based alternative to the other")
    assert plants == {("Arla Milk", "Oatly Oat Milk"), ("Arla Ecological Milk", "Oatly Oat Milk")}
    pressed = linked(graph, "one is a juice pressed from the other")
    assert pressed == {
        ("Granny Smith", "Bravo Apple Juice"),
        ("Royal Gala", "Bravo Apple Juice"),
        ("Granny Smith", "Tropicana Smooth"),
        ("Royal Gala", "Tropicana Smooth"),
        ("Orange", "Tropicana Smooth"),
    }
    assert ("Bravo Apple Juice", "Tropicana Smooth") in linked(
        graph, "both are juices of the same fruit"
    )
    assert ("Carrots", "Leek") in linked(graph, "the shop suggests both for soup")
    breakfast = linked(graph, "the shop suggests both for breakfast")
    assert {a for pair in breakfast for a in pair} == {"Bravo Apple Juice", "Arla Milk"}
    # What would link one product alone says no more than that it is the same.
    for sentence in graph.relations:
        for absent in ("orange", "carrots", "Oatly", "Bravo", "lactose", "vanilla", "salad"):
            assert absent not in sentence, sentence


def test_a_property_is_a_whole_word():
    products = [
        Product("A", "A", "Fruit", "Inorganic, for saladbars."),
        Product("B", "B", "Fruit", "Organic. In salads."),
        Product("C", "C", "Fruit", "ORGANIC, in a salad."),
    ]
    found = relations(products)
    assert found["both are organic"] == [(1, 1), (1, 2), (2, 2)]
    assert found["the shop suggests both for a salad"] == [(1, 1), (1, 2), (2, 2)]


def test_pairs_are_linked_and_of_two_products_where_there_are_two(graph):
    assert np.all(graph.linked(*graph.pairs.T))
    a, b, e = graph.pairs.T
    same = graph.labels[a] == graph.labels[b]
    np.testing.assert_array_equal(same, e == graph.relations.index(SAME_PRODUCT))
    assert set(e.tolist()) == set(range(len(graph.relations)))
    # Few enough for all of them: 5 photographs of each in training.
    splits = split_graph(graph, seed=0)
    milk = graph.relations.index("both are a kind of milk")
    assert np.sum(splits.pairs("train")[:, 2] == milk) == COUNTS["train"] ** 2


def test_drawn_pairs_are_spread_evenly_and_without_repetition():
    labels = np.repeat([0, 1, 2, 3], [2, 10, 10, 10])
    links = np.array([(0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 2, 0), (2, 3, 0), (3, 3, 1)])
    item_split = np.zeros(32, np.int8)
    item_split[-1] = 2
    pairs = draw_pairs(links, labels, item_split, most=70, seed=0)
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    assert not np.any(pairs[:, :2] == 31)  # alone in its split
    counts = {}
    for a, b, e in pairs.tolist():
        key = (labels[a], labels[b], e)
        counts[key] = counts.get(key, 0) + 1
    # Two items allow 20 pairs with ten others, the rest is shared; 9 items make 36 pairs.
    assert counts == {(0, 1, 0): 20, (1, 2, 0): 25, (2, 3, 0): 25, (0, 0, 1): 1, (3, 3, 1): 36}
    np.testing.assert_array_equal(pairs, draw_pairs(links, labels, item_split, most=70, seed=0))
    other = draw_pairs(links, labels, item_split, most=70, seed=1)
    assert not np.array_equal(pairs, other)


def test_no_relation_has_more_pairs_than_allowed(copy, monkeypatch):
    monkeypatch.setattr(grocery, "MOST_PAIRS", 7)
    graph = grocery.read(copy)
    splits = split_graph(graph, seed=0)
    for split in SPLITS:
        counts = np.bincount(splits.pairs(split)[:, 2])
        assert counts.max() == 7


def test_a_change_of_a_file_makes_the_graph_anew(changed, tmp_path):
    lines = []

    def load():
        return grocery.load(tmp_path / "cache", path=changed, log=lines.append)

    load()
    load()
    assert len(lines) == 1
    description = next(changed.rglob("Leek_Description.txt"))
    description.write_text("Green and white.")
    assert "Leek. Green and white." in load().texts
    photo = next((changed / "test").rglob("Leek_001.jpg"))
    photo.write_bytes(photograph(3, 3, size=24))
    assert load().images[load().ids.index("test/Vegetables/Leek/Leek_001")].size == (24, 24)
    assert len(lines) == 3


def zipped(folder, archive, prefix="GroceryStoreDataset-master/dataset"):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("GroceryStoreDataset-master/README.md", "# GroceryStoreDataset")
        for path in sorted(folder.rglob("*")):
            file.write(path, f"{prefix}/{path.relative_to(folder)}")
    return archive


def test_subfolders_and_archives_are_read_as_they_are(graph, copy, tmp_path):
    nested = tmp_path / "clone" / "dataset"
    shutil.copytree(copy, nested)
    archive = zipped(copy, tmp_path / "copy.zip")
    for path in (nested.parent, archive):
        found = grocery.load(tmp_path / "cache", path=path, log=lambda line: None)
        assert (found.ids, found.texts, found.relations) == (
            graph.ids,
            graph.texts,
            graph.relations,
        )
        np.testing.assert_array_equal(found.pairs, graph.pairs)
        assert found.images.encoded(17) == graph.images.encoded(17)


def test_the_archive_is_downloaded_once(copy, tmp_path, monkeypatch, caplog):
    pytest.importorskip("httpx")
    zipped(copy, tmp_path / "master.zip")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(grocery, "PUBLISHED", len(PRODUCTS) * sum(COUNTS.values()))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(grocery, "SOURCE", f"http://127.0.0.1:{server.server_port}/master.zip")
        first = grocery.load(tmp_path / "cache", log=lambda line: None)
        server.shutdown()
    assert asked == ["/master.zip"]
    shutil.rmtree(tmp_path / "cache" / "grocery")  # the prepared graph is enough
    again = grocery.load(tmp_path / "cache", log=lambda line: None)
    assert first.ids == again.ids
    assert not caplog.records


# What is wrong is said in one sentence.


def error_of(path, **options):
    with pytest.raises(UserError) as error, grocery.open_root(path) as root:
        grocery.read(root, **options)
    message = str(error.value)
    assert message.count("\n") == 0
    assert message.endswith(".")
    return message


def test_a_missing_or_wrong_place(tmp_path):
    assert "There is no folder or .zip file" in error_of(tmp_path / "nowhere")
    assert "holds no classes.csv" in error_of(tmp_path)
    (tmp_path / "text.zip").write_text("no archive")
    assert "cannot be read as a .zip file" in error_of(tmp_path / "text.zip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("val.txt", "val.txt: there is no file val.txt under"),
        ("train/Fruit/Orange/Orange_002.jpg", "train.txt, line 12: there is no file train/Fruit"),
        (
            "iconic-images-and-descriptions/Vegetables/Leek/Leek_Description.txt",
            "classes.csv, line 11: there is no file /iconic-images-and-descriptions/Vegetables",
        ),
    ],
)
def test_a_missing_file(changed, name, message):
    (changed / name).unlink()
    assert message in error_of(changed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test/x.jpg, 11, 0", "test.txt, line 45: there is no class 11 in classes.csv"),
        ("test/x.jpg, 0, 3", "the kind of class 0 is 0, not 3"),
        ("test/x.jpg; 0", "'test/x.jpg; 0' is not 'path, class number, kind number'"),
        ("test/x.jpg, 0, zero", "is not 'path, class number, kind number'"),
        ("test/x.jpg, 0, 0", "there is no file test/x.jpg"),
        ("../copy/x.jpg, 0, 0", "there is no file ../copy/x.jpg"),
        ("train/Fruit/Orange/Orange_001.jpg, 2, 1", "is listed before"),
    ],
)
def test_a_wrong_line_of_a_list(changed, line, message):
    with (changed / "test.txt").open("a") as file:
        file.write(f"\n{line}\n")
    assert message.replace("line 45", "line 46") in error_of(changed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Class ID (int),Coarse", "Number,Coarse", "has no column 'Class ID'"),
        ("Leek,9,", "Leek,8,", "classes.csv, line 11: '8' and '6' are not the numbers of a new"),
        ("Leek,9,", "Leek,nine,", "'nine' and '6' are not the numbers"),
        ("Leek,9,", ",9,", "line 11: a value is missing"),
    ],
)
def test_a_wrong_class(changed, old, new, message):
    file = changed / "classes.csv"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert message in error_of(changed)


def test_lists_that_are_empty_or_no_text(changed):
    (changed / "train.txt").write_text("")
    assert "lists no photograph" in error_of(changed)
    (changed / "train.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in error_of(changed)
    (changed / "classes.csv").write_text((changed / "classes.csv").read_text().partition("\n")[0])
    assert "lists no product" in error_of(changed)


def test_an_unreadable_photograph_is_left_out_and_said(graph, changed, tmp_path, caplog):
    broken = changed / "train/Fruit/Orange/Orange_002.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    message = error_of(changed, strict=True)
    assert "train.txt, line 12: the photograph train/Fruit/Orange/Orange_002.jpg cannot" in message
    with caplog.at_level(logging.WARNING):
        kept = grocery.load(tmp_path / "cache", path=changed, log=lambda line: None)
    lost = set(graph.ids) - set(kept.ids)
    assert lost == {"train/Fruit/Orange/Orange_002"}
    assert "1 of 121 photographs left out" in caplog.text
    for photo in changed.rglob("*.jpg"):
        photo.write_bytes(b"")
    assert "No photograph under" in error_of(changed)


def test_a_damaged_archive(copy, tmp_path):
    archive = zipped(copy, tmp_path / "copy.zip")
    whole = bytearray(archive.read_bytes())
    place = whole.index(b"Leek_001.jpg") + 200
    whole[place : place + 50] = bytes(50)
    archive.write_bytes(whole)
    assert "cannot be read (" in error_of(archive)


def test_the_store_keeps_splits_and_class_links(graph, tmp_path):
    prepared.prepare(tmp_path, graph)
    for _ in range(2):
        loaded = prepared.load(tmp_path, "grocery")
        assert loaded.item_split.dtype == np.int8
        np.testing.assert_array_equal(loaded.item_split, graph.item_split)
        np.testing.assert_array_equal(loaded.class_links, graph.class_links)
        # Without the compact copy the records have it all.
        (prepared.folder_of(tmp_path, "grocery") / "graph.npz").unlink()


def test_a_prepared_graph_of_an_older_version_has_neither(toy, tmp_path):
    folder = prepared.prepare(tmp_path, toy)
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata.pop("class_links") is None
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with np.load(folder / "graph.npz") as file:
        arrays = dict(file)
    assert np.all(arrays.pop("item_split") == -1)
    np.savez(folder / "graph.npz", **arrays)
    loaded = prepared.load(tmp_path, "toy")
    assert loaded.item_split is loaded.class_links is None
    np.testing.assert_array_equal(loaded.pairs, toy.pairs)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="no copy of the data set is here")
def test_the_real_data(tmp_path):
    graph = grocery.load(tmp_path, path=REAL, strict=True, log=lambda line: None)
    splits = split_graph(graph, seed=0)
    assert [len(splits.items(split)) for split in SPLITS] == [2640, 296, 2485]
    assert len(graph) == grocery.PUBLISHED == 5421
    assert len(graph.label_names) == len(set(graph.texts)) == 81
    assert len(graph.relations) == 36
    for brand, products in (("Arla", 10), ("God Morgon", 4), ("Oatly", 2)):
        pairs = linked(graph, f"both are made by {brand}")
        assert len({a for a, _ in pairs}) == products
    assert len(linked(graph, "one is the organic counterpart of the other")) == 4
    assert len(linked(graph, "one is the plant-based alternative to the other")) == 36
    for split in SPLITS:
        assert np.bincount(splits.pairs(split)[:, 2]).max() <= grocery.MOST_PAIRS
    used = np.unique(splits.pairs("train")[:, 2])
    np.testing.assert_array_equal(used, np.arange(36))
