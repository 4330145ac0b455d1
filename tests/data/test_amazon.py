"""From Amazon's files to a relation graph: planted groups found, bad input, and restarts.

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

from rcml_jax.data import amazon, amazon_purchases, amazon_stages, fetch, store
from rcml_jax.data.amazon_records import identity
from rcml_jax.data.graph import split_graph
from rcml_jax.errors import UserError
from tests.data import planted_amazon
from tests.data.conftest import png
from tests.data.planted_amazon import CATEGORIES, DOMAIN

SEVERAL = r"\d[\d,]*"


def load(cache, path="", lines=None, **options):
    lines = [] if lines is None else lines
    return amazon.load(cache, DOMAIN, path=path, log=lines.append, **options)


def report(lines):
    """The one line of counts: name → number."""
    (line,) = (line for line in lines if line.startswith(f"Amazon {DOMAIN}: "))
    problems = line.partition("Left out or incomplete: ")[2].rstrip(".").split(", ")
    return {name: int(n.replace(",", "")) for n, _, name in (p.partition(" ") for p in problems)}


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
def planted():
    return planted_amazon.plant(2000, 400)


@pytest.fixture(scope="module")
def corpus(planted, tmp_path_factory):
    return planted_amazon.write(planted, tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """(the graph, its cache, what was logged)."""
    cache, lines = tmp_path_factory.mktemp("cache"), []
    return load(cache, corpus, lines), cache, lines


@pytest.fixture
def tiny(tmp_path):
    """A corpus of 100 items, not compressed, to be changed by a test."""
    return planted_amazon.write(planted_amazon.plant(500, 100), tmp_path / "tiny", compressed=False)


def change(path, edit):
    """Rewrites the records of a `.jsonl` file; `edit` changes one in place or returns a line."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        lines.append(edit(number, record) or json.dumps(record))
    path.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------- what is planted is found


def test_planted_groups_are_recovered(prepared, planted):
    graph, cache, _ = prepared
    check_recovery(graph, planted, cache)


@pytest.mark.slow
def test_planted_groups_are_recovered_at_full_size(tmp_path):
    planted = planted_amazon.plant(20_000, 5_000)
    path = planted_amazon.write(planted, tmp_path / "full", pictures=False)
    (path / "images").mkdir()
    (path / "one.png").write_bytes(png(0))
    for key in planted.item_ids:  # drawn ones take seconds, and are in the small corpus
        (path / "images" / f"{key}.png").hardlink_to(path / "one.png")
    graph = load(tmp_path / "cache", path)
    assert len(graph) > 4900
    check_recovery(graph, planted, tmp_path / "cache")


def test_the_same_item_goes_with_others_in_another_relation(prepared, planted):
    graph, _, _ = prepared
    colour = planted.traits["colour"][[int(key[1:]) for key in graph.ids]]
    pattern = planted.traits["pattern"][[int(key[1:]) for key in graph.ids]]
    a, b, relation = graph.pairs.T
    by_colour = np.bincount(relation, colour[a] == colour[b]) / np.bincount(relation)
    by_pattern = np.bincount(relation, pattern[a] == pattern[b]) / np.bincount(relation)
    assert sum(by_colour > 0.8) == sum(by_pattern > 0.8) == 5
    assert np.all((by_colour > 0.8) ^ (by_pattern > 0.8))
    kinds = [set(relation[(a == i) | (b == i)].tolist()) for i in range(len(graph))]
    assert np.mean([len(found) >= 2 for found in kinds]) > 0.9


def test_items_labels_and_pictures(prepared, planted):
    graph, _, lines = prepared
    number = [int(key[1:]) for key in graph.ids]
    assert graph.texts == tuple(map(planted.title, number))
    assert graph.label_names == tuple(sorted(CATEGORIES))
    names = [graph.label_names[label] for label in graph.labels]
    assert names == [CATEGORIES[c] for c in planted.traits["category"][number]]
    assert graph.images.encoded(7) == planted_amazon.picture(planted, number[7])
    splits = split_graph(graph, seed=0)
    assert splits.disjoint == "item"
    assert all(len(splits.pairs(split)) for split in ("train", "validation", "test"))
    assert set(report(lines)) == {"repeated reviews", "users with one purchase"}
    single = np.bincount(np.unique(np.stack([planted.user, planted.item]), axis=1)[0]) == 1
    assert report(lines)["users with one purchase"] == single.sum()


def test_caps_are_kept_and_stated(prepared, corpus, tmp_path):
    graph, _, _ = prepared
    assert np.bincount(graph.pairs[:, :2].ravel()).max() <= amazon.PAIRS_PER_ITEM
    capped = load(tmp_path, corpus, pairs_per_user=2, pairs_per_item=5)
    assert np.bincount(capped.pairs[:, :2].ravel()).max() == 5
    (info,) = tmp_path.glob("amazon_*/relation_graph/*/dataset_info.json")
    about = json.loads(info.read_text())["description"]
    assert "At most 2 pairs of a user, drawn at random, and 5 of a product" in about


def test_a_prepared_graph_is_read_and_the_same(prepared, corpus):
    graph, cache, _ = prepared
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


# ---------------------------------------------------------------- bad input


def test_flaws_are_left_out_and_counted_in_one_line(tiny, tmp_path):
    reviews, meta = tiny / f"{DOMAIN}.jsonl", tiny / f"meta_{DOMAIN}.jsonl"
    with reviews.open("a") as file:
        file.write('{"cut off\n{"user_id": "U"}\n[]\n')

    def spoil(number, record):
        if number == 0:
            return "no JSON"
        if number == 1:
            del record["title"]
        if number in (2, 3):
            record["categories"] = record["categories"][:1]
        if number == 4:
            record["images"] = []
            (tiny / "images" / f"{record['parent_asin']}.png").unlink()
        if number == 5:
            (tiny / "images" / f"{record['parent_asin']}.png").write_bytes(b"no picture")
            record["images"] = []

    change(meta, spoil)
    lines = []
    graph = load(tmp_path / "cache", tiny, lines)
    counts = report(lines)
    assert counts.pop("repeated reviews") > 0
    assert counts.pop("users with one purchase") > 0
    assert counts == {
        "malformed review lines": 3,
        "malformed item lines": 1,
        "items without a record": 1,
        "items without a title": 1,
        "items without a second-level category": 2,
        "items without an image": 1,
        "damaged local pictures": 1,
    }
    assert len(graph) == 96
    unknown = np.flatnonzero(graph.labels < 0)
    assert [graph.ids[i] for i in unknown] == [f"P{n:09d}" for n in (2, 3)]
    assert graph.label_names[graph.labels[graph.ids.index("P000000007")]] == CATEGORIES[7]


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ({"title": None}, "item P000000003 has no title"),
        ({"images": []}, "item P000000003 has no MAIN image"),
        ({"categories": ["Made up"]}, "item P000000003 has no second-level category"),
        ({"parent_asin": None}, r"malformed record \(no parent_asin\)"),
    ],
)
def test_strict_names_the_line_of_an_item(tiny, tmp_path, flaw, message):
    (tiny / "images" / "P000000003.png").unlink()

    def spoil(number, record):
        if number == 3:
            record.update(flaw)

    change(tiny / f"meta_{DOMAIN}.jsonl", spoil)
    with pytest.raises(UserError, match=rf"meta_{DOMAIN}\.jsonl, line 4: {message}"):
        load(tmp_path / "cache", tiny, strict=True)


def test_strict_names_the_line_of_a_review_even_after_a_lenient_run(tiny, tmp_path):
    change(tiny / f"{DOMAIN}.jsonl", lambda number, record: "{" if number == 9 else None)
    load(tmp_path / "cache", tiny)
    with pytest.raises(UserError, match=rf"{DOMAIN}\.jsonl, line 10: malformed record"):
        load(tmp_path / "cache", tiny, strict=True)


def test_strict_takes_what_is_whole(tiny, tmp_path):
    graph, lenient = (load(tmp_path / "cache", tiny, strict=strict) for strict in (True, False))
    np.testing.assert_array_equal(graph.pairs, lenient.pairs)
    meta = tiny / f"meta_{DOMAIN}.jsonl"
    meta.write_text("".join(meta.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="has no record of 1 of the 100 items"):
        load(tmp_path / "cache", tiny, strict=True)


@pytest.mark.parametrize("name", [DOMAIN, f"meta_{DOMAIN}"])
def test_a_cut_gz_is_one_sentence_and_mended_by_the_whole_file(corpus, tmp_path, name):
    for file in (f"{DOMAIN}.jsonl.gz", f"meta_{DOMAIN}.jsonl.gz", "images"):
        (tmp_path / file).symlink_to(corpus / file)
    cut = tmp_path / f"{name}.jsonl.gz"
    whole = cut.read_bytes()
    cut.unlink()
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}\.jsonl\.gz is cut: .*; delete it") as error:
        load(tmp_path / "cache", tmp_path)
    assert "\n" not in str(error.value)
    cut.write_bytes(whole)
    assert len(load(tmp_path / "cache", tmp_path)) == 400


@pytest.mark.parametrize(
    ("domain", "options", "message"),
    [
        ("../x", {}, "There is no domain '../x'; use for instance Electronics,"),
        ("", {}, "There is no domain ''"),
        (DOMAIN, {"clusters": 0}, "clusters=0 must be at least 1"),
        (DOMAIN, {"pairs_per_user": 0}, "pairs_per_user=0 must be"),
        (DOMAIN, {"pairs_per_item": -1}, "pairs_per_item=-1 must be"),
        (DOMAIN, {"path": "none/such"}, "There is no folder none/such"),
        ("Other", {}, r"has neither Other\.jsonl\.gz nor Other\.jsonl"),
    ],
)
def test_wrong_options_are_one_sentence(corpus, tmp_path, domain, options, message):
    with pytest.raises(UserError, match=message):
        amazon.load(tmp_path, domain, **{"path": corpus} | options)


def test_nothing_left_is_one_sentence(tiny, tmp_path):
    reviews, meta = tiny / f"{DOMAIN}.jsonl", tiny / f"meta_{DOMAIN}.jsonl"
    lines, items = reviews.read_text(), meta.read_text()
    reviews.write_text("".join(lines.splitlines(keepends=True)[:50]))
    with pytest.raises(UserError, match=r"holds no users and items with 5 purchases each \(50 rev"):
        load(tmp_path / "cache", tiny)
    reviews.write_text("")
    with pytest.raises(UserError, match="holds no users and items"):
        load(tmp_path / "cache", tiny)
    reviews.write_text(lines)
    meta.write_text("{}\n")
    with pytest.raises(UserError, match="has no record of 100 of the 100 items"):
        load(tmp_path / "cache", tiny)
    meta.write_text(items)
    for picture in (tiny / "images").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match="No user of Planted has bought two items with title and"):
        load(tmp_path / "cache", tiny, fetch_images=False)


# ---------------------------------------------------------------- restarts


@pytest.mark.parametrize("stage", ["core", "items", "buyers"])
def test_a_run_goes_on_after_a_full_disk(tiny, tmp_path, monkeypatch, stage):
    expected = load(tmp_path / "other", tiny)
    save = amazon_stages.save_arrays

    def full(path, arrays):
        if path.name.startswith(f"{DOMAIN}-{stage}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, arrays)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(amazon_stages, "save_arrays", full)
        with pytest.raises(UserError, match=r"No room is left on the disk of .*; free some"):
            load(cache, tiny)
    lines = []
    graph = load(cache, tiny, lines)
    np.testing.assert_array_equal(graph.pairs, expected.pairs)
    read = [line.split()[2] for line in lines if line.startswith("Reading the ")]
    assert read == {"core": ["reviews", "items"], "items": ["items"], "buyers": []}[stage]


def test_other_options_take_up_what_was_read(tiny, tmp_path, monkeypatch):
    load(tmp_path, tiny)
    monkeypatch.setattr(amazon_purchases, "records", None)  # nothing is read again
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


def test_records_and_pictures_are_fetched_once(server, tmp_path, monkeypatch):
    folder, address, _ = server
    planted = publish(folder, address)
    for n in (3, 4):
        (folder / "images" / f"P{n:09d}.png").unlink()
    lines = []
    graph = load(tmp_path / "cache", lines=lines)
    assert len(graph) == 98
    assert report(lines)["pictures not found"] == 2
    assert graph.images.encoded(0) == planted_amazon.picture(planted, int(graph.ids[0][1:]))
    # Prepared once, it needs neither the server nor the files; other caps need no server.
    monkeypatch.setattr(fetch, "download", lambda url, path, log: path)
    capped = load(tmp_path / "cache", pairs_per_user=1, fetch_images=False)
    assert capped.ids == graph.ids
    for file in (tmp_path / "cache" / "amazon").glob("*.gz"):
        file.unlink()
    np.testing.assert_array_equal(load(tmp_path / "cache").pairs, graph.pairs)


def test_pictures_are_kept_when_the_disk_is_full_at_the_end(server, tmp_path, monkeypatch):
    folder, address, asked = server
    publish(folder, address)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
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
