"""From Amazon's files to a relation graph: planted groups found, restarts, and a server.

The corpora are made up: see planted_amazon.
"""

import errno
import functools
import http.server
import json
import re
import threading

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from rcml_jax.data import download, prepared, stages
from rcml_jax.data.relation_graph import split_graph
from rcml_jax.data.sources import amazon, amazon_records
from rcml_jax.data.sources.amazon_records import identity
from rcml_jax.errors import UserError
from tests.data import planted_amazon
from tests.data.amazon_loading import change, load, report
from tests.data.conftest import png
from tests.data.planted_amazon import CATEGORIES, DOMAIN


def found_groups(cache, planted):
    """The planted group and the recovered cluster of each user of the 5-core."""
    core, buyers = (
        np.load(next((cache / "amazon" / "stages").glob(f"{DOMAIN}-{name}-*.npz")))
        for name in ("core", "buyers")
    )
    with core, buyers:
        users, cluster = core["users"].tolist(), buyers["cluster"]
    group = dict(zip(map(identity, planted.user_ids), planted.group.tolist(), strict=True))
    return np.array([group[user] for user in users]), cluster


def check_recovery(graph, planted, cache):
    """Groups are found; sentences name their categories; pairs are what their group likes."""
    group, cluster = found_groups(cache, planted)
    assert np.all(group >= 0), "casual buyers are not in the 5-core"
    assert adjusted_rand_score(group, cluster) >= 0.9
    item = np.array([int(key[1:]) for key in graph.ids])
    assert len(graph.relations) == planted_amazon.GROUPS
    for relation, sentence in enumerate(graph.relations):
        planted_group = np.bincount(group[cluster == relation]).argmax()
        shares = planted_amazon.group_shares(planted_group)
        favourites = [CATEGORIES[c] for c in np.argsort(-shares)[:4]]
        assert sentence.startswith("Co-purchased by people who primarily buy ")
        named = sentence.partition("interest in")[0]
        assert sum(name in named for name in favourites) >= 3
        liked = planted.likes(planted_group)[item]
        pairs = graph.pairs[graph.pairs[:, 2] == relation]
        assert np.mean(liked[pairs[:, 0]] & liked[pairs[:, 1]]) > 0.8


@pytest.fixture(scope="module")
def corpus_graph(corpus, tmp_path_factory):
    """(the graph, its cache, what was logged)."""
    cache, lines = tmp_path_factory.mktemp("cache"), []
    return load(cache, corpus, lines), cache, lines


# ---------------------------------------------------------------- what is planted is found


def test_planted_groups_are_recovered(corpus_graph, planted):
    graph, cache, _ = corpus_graph
    check_recovery(graph, planted, cache)


@pytest.mark.slow
def test_planted_groups_are_recovered_at_full_size(tmp_path):
    planted = planted_amazon.plant(20_000, 5_000)
    path = planted_amazon.write(planted, tmp_path / "full", images=False)
    (path / "images").mkdir()
    (path / "one.png").write_bytes(png(0))
    for key in planted.item_ids:  # drawn ones take seconds, and are in the small corpus
        (path / "images" / f"{key}.png").hardlink_to(path / "one.png")
    graph = load(tmp_path / "cache", path)
    assert len(graph) > 4900
    check_recovery(graph, planted, tmp_path / "cache")


def test_the_same_item_goes_with_others_in_another_relation(corpus_graph, planted):
    graph, _, _ = corpus_graph
    colour = planted.traits["colour"][[int(key[1:]) for key in graph.ids]]
    pattern = planted.traits["pattern"][[int(key[1:]) for key in graph.ids]]
    a, b, relation = graph.pairs.T
    by_colour = np.bincount(relation, colour[a] == colour[b]) / np.bincount(relation)
    by_pattern = np.bincount(relation, pattern[a] == pattern[b]) / np.bincount(relation)
    assert sum(by_colour > 0.8) == sum(by_pattern > 0.8) == 5
    assert np.all((by_colour > 0.8) ^ (by_pattern > 0.8))
    kinds = [set(relation[(a == i) | (b == i)].tolist()) for i in range(len(graph))]
    assert np.mean([len(found) >= 2 for found in kinds]) > 0.9


def test_items_labels_and_images(corpus_graph, planted):
    graph, _, lines = corpus_graph
    number = [int(key[1:]) for key in graph.ids]
    assert graph.texts == tuple(map(planted.title, number))
    assert graph.label_names == tuple(sorted(CATEGORIES))
    names = [graph.label_names[label] for label in graph.labels]
    assert names == [CATEGORIES[c] for c in planted.traits["category"][number]]
    assert graph.images.encoded(7) == planted_amazon.image(planted, number[7])
    splits = split_graph(graph, seed=0)
    assert splits.disjoint == "item"
    assert all(len(splits.pairs(split)) for split in ("train", "validation", "test"))
    assert set(report(lines)) == {"repeated reviews", "users with one purchase"}
    single = np.bincount(np.unique(np.stack([planted.user, planted.item]), axis=1)[0]) == 1
    assert report(lines)["users with one purchase"] == single.sum()


def test_caps_are_kept_and_stated(corpus_graph, corpus, tmp_path):
    graph, _, _ = corpus_graph
    assert np.bincount(graph.pairs[:, :2].ravel()).max() <= amazon.PAIRS_PER_ITEM
    capped = load(tmp_path, corpus, pairs_per_user=2, pairs_per_item=5)
    assert np.bincount(capped.pairs[:, :2].ravel()).max() == 5
    (info,) = tmp_path.glob("amazon_*/relation_graph/*/dataset_info.json")
    about = json.loads(info.read_text())["description"]
    assert "At most 2 pairs of a user, drawn at random, and 5 of a product" in about


def test_a_prepared_graph_is_read_and_the_same(corpus_graph, corpus):
    graph, cache, _ = corpus_graph
    lines = []
    again = load(cache, corpus, lines)
    assert lines == []
    np.testing.assert_array_equal(again.pairs, graph.pairs)


# ---------------------------------------------------------------- layouts and views


def test_both_views_and_layouts_give_the_same_graph(tiny, tmp_path):
    graph = load(tmp_path / "cache", tiny)
    other = planted_amazon.write(
        planted_amazon.plant(500, 100), tmp_path / "other", view="hugging_face"
    )
    for kind, name in (("review_categories", DOMAIN), ("meta_categories", f"meta_{DOMAIN}")):
        (other / "raw" / kind).mkdir(parents=True)
        name = f"{name}.jsonl.gz"
        (other / name).rename(other / "raw" / kind / name)
    found = load(tmp_path / "cache 2", other)
    assert (found.ids, found.texts, found.relations) == (graph.ids, graph.texts, graph.relations)
    np.testing.assert_array_equal(found.pairs, graph.pairs)


def test_the_first_whole_record_of_an_item_counts(tiny, tmp_path):
    meta = tiny / f"meta_{DOMAIN}.jsonl"
    first = json.loads(meta.read_text().splitlines()[0])
    key = first["parent_asin"]
    records = [first | {"title": ""}, first, first | {"title": "later"}]
    rest = meta.read_text().splitlines()[1:]
    meta.write_text("\n".join([*map(json.dumps, records), *rest]) + "\n")
    lines = []
    graph = load(tmp_path / "cache", tiny, lines)
    assert graph.texts[graph.ids.index(key)] == first["title"]
    assert report(lines)["repeated item records"] == 2


# ---------------------------------------------------------------- restarts


@pytest.mark.parametrize("stage", ["core", "items", "buyers"])
def test_a_run_goes_on_after_a_full_disk(tiny, tmp_path, monkeypatch, stage):
    expected = load(tmp_path / "other", tiny)
    save = stages.save_arrays

    def full(path, arrays):
        if path.name.startswith(f"{DOMAIN}-{stage}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, arrays)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_arrays", full)
        with pytest.raises(UserError, match=r"No room is left on the disk of .*; free some"):
            load(cache, tiny)
    lines = []
    graph = load(cache, tiny, lines)
    np.testing.assert_array_equal(graph.pairs, expected.pairs)
    read = [line.split()[2] for line in lines if line.startswith("Reading the ")]
    assert read == {"core": ["reviews", "items"], "items": ["items"], "buyers": []}[stage]


def test_other_options_take_up_what_was_read(tiny, tmp_path, monkeypatch):
    load(tmp_path, tiny)
    monkeypatch.setattr(amazon_records, "records", None)  # nothing is read again
    graph = load(tmp_path, tiny, clusters=3)
    assert len(graph.relations) == 3
    other = load(tmp_path, tiny, clusters=3, seed=5)
    assert other.pairs.tolist() != graph.pairs.tolist()


def test_a_changed_file_is_read_anew(tiny, tmp_path):
    before = load(tmp_path, tiny)

    def rename(number, record):
        record["title"] = f"New {record['title']}"

    change(tiny / f"meta_{DOMAIN}.jsonl", rename)
    lines = []
    after = load(tmp_path, tiny, lines)
    assert after.texts == tuple(f"New {text}" for text in before.texts)
    assert not any(line.startswith("Reading the reviews") for line in lines)


# ---------------------------------------------------------------- from a server


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine: (its folder, its address, what it was asked for)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    asked = []
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(amazon, "SOURCE", f"{address}/raw")
        yield folder, address, asked
        running.shutdown()


def publish(folder, address):
    planted = planted_amazon.plant(500, 100)
    planted_amazon.write(planted, folder, url=f"{address}/images/{{}}.png".format)
    for kind, name in (("review_categories", DOMAIN), ("meta_categories", f"meta_{DOMAIN}")):
        (folder / "raw" / kind).mkdir(parents=True)
        name = f"{name}.jsonl.gz"
        (folder / name).rename(folder / "raw" / kind / name)
    return planted


def test_records_and_images_are_fetched_once(server, tmp_path, monkeypatch):
    folder, address, _ = server
    planted = publish(folder, address)
    for n in (3, 4):
        (folder / "images" / f"P{n:09d}.png").unlink()
    lines = []
    graph = load(tmp_path / "cache", lines=lines)
    assert len(graph) == 98
    assert report(lines)["images not found"] == 2
    assert graph.images.encoded(0) == planted_amazon.image(planted, int(graph.ids[0][1:]))
    # Prepared once, it needs neither the server nor the files; other caps need no server.
    monkeypatch.setattr(download, "download", lambda url, path, log: path)
    capped = load(tmp_path / "cache", pairs_per_user=1, fetch_images=False)
    assert capped.ids == graph.ids
    for file in (tmp_path / "cache" / "amazon").glob("*.gz"):
        file.unlink()
    np.testing.assert_array_equal(load(tmp_path / "cache").pairs, graph.pairs)


def test_images_are_kept_when_the_disk_is_full_at_the_end(server, tmp_path, monkeypatch):
    folder, address, asked = server
    publish(folder, address)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_write", full)
        with pytest.raises(UserError, match="No room is left on the disk"):
            load(tmp_path / "cache")
    assert len(asked) == 102
    lines = []
    assert len(load(tmp_path / "cache", lines=lines)) == 100
    assert len(asked) == 102
    assert not any(line.startswith(("Reading", "Clustering", "Download")) for line in lines)


def test_a_domain_that_is_not_published(server, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{DOMAIN}.jsonl.gz cannot be downloaded")):
        load(tmp_path / "cache")


def test_the_command_writes_what_load_reads(tmp_path, capsys):
    planted_amazon.main([str(tmp_path / "made"), "--users", "500", "--items", "100"])
    assert "made-up users in 10 groups" in capsys.readouterr().out
    assert "MADE-UP" in (tmp_path / "made" / "README.txt").read_text()
    assert len(load(tmp_path / "cache", tmp_path / "made")) == 100


def test_the_command_writes_a_corpus_of_any_size(tmp_path, capsys):
    planted_amazon.main([str(tmp_path), "--reviews", "3000", "--users", "300", "--items", "400"])
    assert "3,000 made-up reviews" in capsys.readouterr().out
    core = amazon_records.read_purchases(tmp_path / f"{DOMAIN}.jsonl.gz", strict=True)
    items = amazon_records.read_items(
        tmp_path / f"meta_{DOMAIN}.jsonl.gz", core["items"], strict=True
    )
    assert stages.unpack(core["counts"])["reviews"] == 3000
    assert list(map(identity, stages.unpack(items["ids"]))) == core["items"].tolist()
    assert stages.unpack(items["categories"]) == sorted(CATEGORIES)


def test_drawn_reviews_follow_groups_and_power_laws():
    planted = planted_amazon.plant(10, 400)
    user, item = planted_amazon.draw_large(20_000, 300, 400, np.random.default_rng(0))
    for group in range(planted_amazon.GROUPS):
        mine = item[user % planted_amazon.GROUPS == group]
        assert np.mean(planted.likes(group)[mine]) > 0.95
        share = np.bincount(planted.traits["category"][mine], minlength=len(CATEGORIES)) / len(mine)
        np.testing.assert_allclose(share, planted_amazon.group_shares(group), atol=0.06)
    # Of a density of x ** -0.6 a hundredth of the ranks has 0.01 ** 0.4 of the mass.
    assert np.mean(user < 3) == pytest.approx(0.01**0.4, abs=0.02)
