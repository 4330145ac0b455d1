"""A catalogue in a table of LanceDB: what is written, found, filtered, resumed and refused."""

import dataclasses
import itertools
import json
import re
import sys

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from rcml_jax.errors import UserError
from rcml_jax.search import catalogue as catalogue_module
from rcml_jax.search import lance_search, lance_table
from rcml_jax.search.catalogue import embed_catalogue, open_model
from rcml_jax.search.catalogue import related as find
from rcml_jax.search.embedding_store import Plan
from rcml_jax.search.items import from_names, read_items
from rcml_jax.search.lance_search import TableSearcher, embed_table
from rcml_jax.search.lance_table import TableWriter, hold_table, open_table, table_or_path
from tests.search.conftest import SENTENCES
from tests.search.test_catalogue import counted
from tests.toy import ITEMS, write_rows

MODEL = {"workdir": "runs/a", "method": "rcml", "step": 7, "digest": "d0"}
WIDTH = 16


@pytest.fixture(scope="module")
def table(model, catalogue, tmp_path_factory):
    """The catalogue of `embedded` in a table."""
    to = f"lance://{tmp_path_factory.mktemp('table') / 't'}"
    return embed_table(model, read_items(catalogue), SENTENCES, to)


def pairs(matches):
    return [(m.index, m.id, m.text, pytest.approx(m.score, abs=1e-5)) for m in matches]


# --- What is found --------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["both", "text", "image"])
def test_a_table_finds_what_the_files_find(model, embedded, table, catalogue, against):
    searcher = TableSearcher(table, model)
    options = {"against": against, "k": ITEMS}
    for sentence in (None, *SENTENCES):
        for given in ({"item": "i17"}, {"text": "kind5 place7"}, {"item": "i3"}):
            expected = find(embedded, sentence, **given, **options, model=model)
            found = searcher.search(sentence, **given, **options)
            assert len(found) == ITEMS - ("item" in given)
            assert [(m.index, m.id, m.text, m.score) for m in found] == pairs(expected)
            assert searcher.search(sentence, **given, against=against, k=4) == found[:4]
    image = catalogue / "images" / "17.png"
    expected = find(embedded, SENTENCES[0], image=image, model=model, against=against)
    found = searcher.search(SENTENCES[0], image=image, against=against)
    assert [(m.index, m.id, m.text, m.score) for m in found] == pairs(expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_items_that_lack_something(model, patchy, tmp_path, dtype):
    items = read_items(patchy)
    files = embed_catalogue(model, items, SENTENCES, tmp_path / "e", dtype=dtype)
    table = embed_table(model, items, SENTENCES, f"lance://{tmp_path}/t", dtype=dtype)
    assert table.problems() == files.problems
    assert table.dtype == dtype
    searcher = TableSearcher(table)
    for key, against in itertools.product(("whole", "words", "view"), ("both", "text", "image")):
        options = {"item": key, "against": against}
        expected = find(files, SENTENCES[0], **options)
        found = searcher.search(SENTENCES[0], **options)
        assert [(m.index, m.id, m.text, m.score) for m in found] == pairs(expected)
    with pytest.raises(UserError, match="'nothing' has no embedding: no text and no readable"):
        searcher.search(item="nothing")


def test_a_modality_that_depends_on_no_relation(runs, catalogue, tmp_path):
    model, items = open_model(runs("siglip")), read_items(catalogue)
    files = embed_catalogue(model, items, SENTENCES, tmp_path / "e")
    table = embed_table(model, items, SENTENCES, f"lance://{tmp_path}/t")
    names = [name for name in table.handle.schema.names if name.startswith("vector_image")]
    assert names == ["vector_image_0"]
    for sentence in SENTENCES:
        found = TableSearcher(table).search(sentence, item="i3")
        expected = find(files, sentence, item="i3")
        assert [(m.index, m.id, m.text, m.score) for m in found] == pairs(expected)


def made_up(n, root, *, clusters=30, **options):
    """A plan and random vectors, of which some items lack one; prices, brands and words."""
    rng = np.random.default_rng(0)
    words = np.array(["red cup", "red cups", "blue bowl", "blue cup"])
    texts = tuple(f"{said} {i}" for i, said in enumerate(rng.choice(words, n)))
    columns = {
        "price": tuple(round(x, 2) if x < 90 else None for x in rng.uniform(0, 100, n).tolist()),
        "brand": tuple(rng.choice(["X", "Y's"], n).tolist()),
        "Sold": tuple((rng.random(n) < 0.5).tolist()),
    }
    items = from_names(tuple(f"i{i}" for i in range(n)), texts, ("p.png",) * n, root)
    items = dataclasses.replace(items, columns=columns)
    centres = rng.normal(size=(2, clusters, WIDTH))[:, rng.integers(0, clusters, n)]
    text, image = centres + 0.7 * rng.normal(size=(2, 2, n, WIDTH))[0]
    vectors = {"text": np.stack([text, image]), "image": image[None]}
    vectors = {name: x / np.linalg.norm(x, axis=-1, keepdims=True) for name, x in vectors.items()}
    has = {"text": rng.random(n) < 0.9, "image": rng.random(n) < 0.9}
    shapes = {"text": (2, WIDTH), "image": (1, WIDTH)}
    values = {"model": MODEL, "items": items, "relations": ("own", "r1"), "shapes": shapes}
    return Plan(**(values | {"shard": 500} | options)), vectors, has


def write(writer, vectors, has, shards=None):
    for rows in itertools.islice(writer.shards(), shards):
        part = slice(rows.start, rows.stop)
        writer.write(
            rows.start,
            {m: x[:, part] for m, x in vectors.items()},
            {m: x[part] for m, x in has.items()},
        )
        writer.mark({})


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """2,500 made-up items without an index of vectors: address, plan, vectors, has."""
    folder = tmp_path_factory.mktemp("shop")
    plan, vectors, has = made_up(2500, folder)
    address = f"lance://{folder}/t"
    writer = TableWriter(address, plan)
    write(writer, vectors, has)
    writer.finish()
    return address, plan, vectors, has


def by_full_sort(vectors, has, own, keep, relation=1):
    """The numbers of the kept items by their mean cosines, in NumPy."""
    under = {"text": vectors["text"][relation], "image": vectors["image"][0]}
    query = [under[name][own] for name in under if has[name][own]]
    total, count = np.zeros(len(has["text"])), np.zeros(len(has["text"]))
    for name, rows in under.items():
        total += has[name] * np.sum([rows @ q for q in query], axis=0)
        count += has[name]
    scores = total / np.maximum(count, 1) / len(query)
    keep = np.array(keep) & (count > 0) & (np.arange(len(count)) != own)
    order = np.argsort(-np.where(keep, scores, -np.inf), kind="stable")
    return order[: keep.sum()]


def test_filters_and_words_keep_what_they_say(shop):
    address, plan, vectors, has = shop
    searcher, columns = TableSearcher(open_table(address)), plan.items.columns
    texts = plan.items.texts
    price = np.array([np.nan if x is None else x for x in columns["price"]])
    ours, sold = np.array(columns["brand"]) == "X", np.array(columns["Sold"])
    cups = np.array([bool({"cup", "cups"} & {*text.split()}) for text in texts])
    has_word = lambda word: np.array([word in text.split() for text in texts])  # noqa: E731
    cases = [
        ("price < 20 AND brand = 'X'", "", (price < 20) & ours),
        ("brand = 'Y''s' OR NOT sold", "", ~ours | ~sold),
        ("price IS NULL -- a remark", "", np.isnan(price)),
        ("price >= 19.5", "", price >= 19.5),
        ("", "Cup", cups),
        ("", "cup red", cups & has_word("red")),
        ("sold", "cup red", cups & has_word("red") & sold),
    ]
    for where, words, keep in cases:
        expected = by_full_sort(vectors, has, 5, keep)
        assert 100 < len(expected) < 2000
        found = searcher.search("r1", item="i5", k=2500, where=where, words=words)
        assert [m.index for m in found] == expected.tolist(), where
    counts = cups.sum(), (cups & has_word("red") & sold).sum()
    assert counts[0] > lance_search._FEW > counts[1]  # both ways of fetching what has the words
    with pytest.raises(UserError, match="that fulfils 'price > 100' whose text has 'cup'"):
        searcher.search("r1", item="i5", where="price > 100", words="cup")


def test_words_alone_are_a_query(shop):
    address, plan, *_ = shop
    searcher = TableSearcher(open_table(address))
    found = searcher.search(words="cup 77")
    expected = [i for i, t in enumerate(plan.items.texts) if re.fullmatch(r".*cups? 77", t)]
    assert [m.index for m in found] == expected
    assert all(m.score > 0 and m.id == f"i{m.index}" for m in found)
    with pytest.raises(UserError, match="no other item with text or image whose text has 'sea'"):
        searcher.search(words="sea")
    with pytest.raises(UserError, match="give one of an item, a text and an image"):
        searcher.search()


@pytest.mark.parametrize("kind", ["ivf-pq", "hnsw"])
def test_an_index_finds_nearly_what_is_nearest_and_scores_exactly(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(lance_search, "_CANDIDATES", 5)
    monkeypatch.setattr(lance_search, "_LEAST_CANDIDATES", 50)
    monkeypatch.setattr(lance_table, "_PROBES", 20)
    plan, vectors, has = made_up(1500, tmp_path)
    writer = TableWriter(f"lance://{tmp_path}/t", plan)
    write(writer, vectors, has)
    with pytest.raises(UserError, match="have no index; start the command that embeds again with"):
        TableSearcher(open_table(writer.directory)).search(item="i1", exact=False)
    writer.finish(kind)
    table = open_table(writer.directory)
    columns = {"vector_text_0", "vector_text_1", "vector_image_0"}
    assert {*table.indices} == {"text", "id", "item_number", *columns}
    query = table.handle.search(vectors["text"][0, 0], vector_column_name="vector_text_0")
    assert "ANN" in query.limit(10).explain_plan()
    searcher = TableSearcher(table)
    few = {"where": "price < 60 AND sold", "k": 10}
    for options in ({}, few, {"against": "image"}):
        shares = []
        for key in plan.items.ids[:200:10]:
            exact = {m.index: m.score for m in searcher.search("r1", item=key, **options)}
            found = searcher.search("r1", item=key, exact=False, **options)
            assert len(found) == 10
            shares.append(len(exact.keys() & {m.index for m in found}) / 10)
            for m in found:
                if m.index in exact:
                    assert m.score == pytest.approx(exact[m.index], abs=1e-5)
        assert np.mean(shares) > 0.9, options


def test_an_index_is_made_and_used_from_many_items_on(tmp_path, monkeypatch):
    plan, vectors, has = made_up(600, tmp_path)
    writer = TableWriter(f"lance://{tmp_path}/t", plan)
    write(writer, vectors, has)
    writer.finish()
    assert {*open_table(writer.directory).indices} == {"text"}
    searcher = TableSearcher(open_table(writer.directory))
    ways = []
    for name in ("_batches", "_candidates"):
        method = getattr(TableSearcher, name)
        monkeypatch.setattr(
            TableSearcher,
            name,
            lambda *args, name=name, method=method: ways.append(name) or method(*args),
        )
    searcher.search(item="i0")
    monkeypatch.setattr(lance_table, "MANY", 600)
    monkeypatch.setattr(lance_search, "MANY", 600)
    searcher.search(item="i0")  # it has no index yet
    TableWriter(writer.directory, plan).finish()
    searcher = TableSearcher(open_table(writer.directory))
    exact = searcher.search(item="i0", exact=True)
    # 200 candidates of each column are a third of the items, so that all are found.
    assert searcher.search(item="i0") == exact
    searcher.search(item="i0", words="cup")
    assert ways == ["_batches", "_batches", "_batches", "_candidates", "_batches"]


def test_too_few_items_for_an_index(tmp_path):
    plan, vectors, has = made_up(200, tmp_path)
    writer = TableWriter(f"lance://{tmp_path}/t", plan)
    write(writer, vectors, has)
    with pytest.raises(UserError, match="has too few items for an index; give 256 at least"):
        writer.finish("hnsw")


# --- Going on, and changes ------------------------------------------------------------------------


def contents(table):
    rows = table.handle.to_arrow().sort_by("item_number")
    return {name: rows[name].to_pylist() for name in rows.schema.names}


def test_an_interrupted_run_goes_on_with_what_is_missing(
    model, table, catalogue, tmp_path, monkeypatch
):
    monkeypatch.setattr(catalogue_module, "_CHUNK", 8)
    items, read = counted(read_items(catalogue))
    to = f"lance://{tmp_path}/t"

    def stop(done, total):
        if done == 40:  # in the middle of the third shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_table(model, items, SENTENCES, to, shard=16, note=stop)
    with pytest.raises(UserError, match=r"is unfinished \(32 of 60 items, 32 rows\); start"):
        open_table(to)
    read.clear()
    found = embed_table(model, items, SENTENCES, to, shard=16)
    assert sorted(read) == list(range(32, ITEMS))
    expected, got = contents(table), contents(found)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        if name.startswith("vector"):
            np.testing.assert_allclose(got[name], values, atol=1e-5)
        else:
            assert got[name] == values, name
    # Nothing is left to do.
    read.clear()
    version = found.handle.version
    assert embed_table(model, items, SENTENCES, to).handle.version == version
    assert read == []
    # A kill before the index of the texts.
    found.handle.drop_index("text_idx")
    with pytest.raises(UserError, match=r"texts of .* are not indexed yet; start the command"):
        TableSearcher(open_table(to)).search(words="kind3")
    assert TableSearcher(embed_table(model, items, SENTENCES, to)).search(words="kind3")


def test_what_a_kill_leaves_of_a_new_table_is_no_obstacle(model, patchy, tmp_path):
    (tmp_path / "t" / "items.lance" / "data").mkdir(parents=True)
    to = f"lance://{tmp_path}/t"
    with pytest.raises(UserError, match=r"there is no table in .*; embed first: rcml-embed"):
        open_table(to)
    # Of another plan, too, as long as it has no rows.
    plan, *_ = made_up(10, tmp_path)
    TableWriter(to, plan)
    assert len(embed_table(model, read_items(patchy), [], to)) == 6


def test_changed_items_are_embedded_anew(model, patchy, tmp_path, capsys):
    rows = [json.loads(line) for line in (patchy / "items.jsonl").read_text().splitlines()]
    rows = [row | {"price": n} for n, row in enumerate(rows)]
    write_rows(patchy / "items.jsonl", rows)
    to = f"lance://{tmp_path}/t"
    before = contents(embed_table(model, read_items(patchy), SENTENCES, to))
    capsys.readouterr()
    (patchy / "images" / "13.png").write_bytes((patchy / "images" / "20.png").read_bytes())
    rows[1]["text"] = "kind7 place7"
    rows[3]["price"] = 9.5
    write_rows(patchy / "items.jsonl", rows)
    items, read = counted(read_items(patchy))
    after = contents(embed_table(model, items, SENTENCES, to))
    assert "2 of 6 items changed since the last embedding" in capsys.readouterr().err
    assert read == [0]  # the item with other words has no image
    anew = contents(embed_table(model, items, SENTENCES, f"lance://{tmp_path}/anew"))
    assert after["price"] == [0, 1, 2, 9.5, 4, 5]
    for name, values in anew.items():
        for number, value in enumerate(values):
            if name.startswith("vector") and value is not None:
                np.testing.assert_allclose(after[name][number], value, atol=1e-5)
                if number > 1:  # the rows that were not embedded anew
                    assert after[name][number] == before[name][number]
            else:
                assert after[name][number] == value, name
    for name, number in (("vector_image_0", 0), ("vector_text_0", 1)):
        assert np.abs(np.subtract(after[name][number], before[name][number])).max() > 1e-3
    # The words of the full-text index are those of now.
    found = TableSearcher(open_table(to)).search(words="kind7")
    assert [m.id for m in found] == ["words"]


# --- Two writers ----------------------------------------------------------------------------------


def test_a_second_writer_is_refused(model, patchy, tmp_path):
    to = f"lance://{tmp_path}/t"
    with hold_table(to), pytest.raises(UserError, match=r"is embedding into lance://.*; wait unt"):
        embed_table(model, read_items(patchy), [], to)
    assert not (tmp_path / "t" / "items.lance").exists()


def test_two_writers_without_locks_find_out_and_lose_nothing(tmp_path):
    """As on object storage: each commit follows on our own last one."""
    (tmp_path / "t").mkdir()
    to = f"lance+file://{tmp_path}/t"
    plan, vectors, has = made_up(30, tmp_path, shard=10)
    with hold_table(to), hold_table(to):
        first = TableWriter(to, plan)
        write(first, vectors, has, shards=1)
        second = TableWriter(to, plan)
        write(first, vectors, has, shards=1)
        with pytest.raises(UserError, match=r"another process is writing to lance\+file://"):
            write(second, vectors, has)
    # Both at one moment: rows that are there twice, as many as are missing.
    rows = first._table.search().where("item_number < 10").to_arrow()
    first._table.add(rows)
    with pytest.raises(UserError, match=r"is unfinished \(20 of 30 items, 30 rows\)"):
        open_table(to)
    third = TableWriter(to, plan)
    assert list(third.shards()) == [range(0, 10), range(20, 30)]
    write(third, vectors, has)
    third.finish()
    found = contents(open_table(to))
    assert found["item_number"] == list(range(30))
    assert found["price"] == list(plan.items.columns["price"])
    values = [v for v, has in zip(found["vector_text_1"], has["text"], strict=True) if has]
    np.testing.assert_allclose(values, vectors["text"][1][has["text"]], atol=1e-6)
    assert [v is not None for v in found["vector_text_1"]] == has["text"].tolist()


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"digest": "d1"}}, "holds embeddings of another model (runs/a, step 7)"),
        ({"relations": ("own", "r2")}, "holds embeddings of other relations (2 sentences)"),
        ({"dtype": "float16"}, "holds embeddings of the type float32"),
        ({"n": 2499}, "holds embeddings of other items"),
        ({"columns": {"price": 1.5, "brand": "x"}}, "has other columns than the items ('Sold' is"),
        ({"columns": {"price": "1", "brand": "x", "Sold": True}}, "('price' is missing or of ano"),
        ({"columns": {"a.b": 1}}, "the column 'a.b' of the items cannot be one of a table"),
        ({"columns": {"a`b": 1}}, "the column 'a`b' of the items"),
        ({"columns": {"*": 1}}, "the column '*' of the items"),
        ({"columns": {"ID": 1}}, "the column 'ID' of the items"),
        ({"columns": {"a": 1, "A": 1}}, "the column 'A' of the items"),
        ({"columns": {"vector_x": 1}}, "the column 'vector_x' of the items"),
        ({"columns": {"_rowid": 1}}, "the column '_rowid' of the items"),
        ({"columns": {"caf\udce9": 1}}, r"the column 'caf\udce9' of the items"),
    ],
)
def test_another_plan_is_refused(shop, tmp_path, changes, message):
    address, plan, *_ = shop
    changes, version = dict(changes), open_table(address).handle.version
    n = changes.pop("n", len(plan.items))
    items = from_names(*(x[:n] for x in (plan.items.ids, plan.items.texts)), ("",) * n, tmp_path)
    columns = {name: values[:n] for name, values in plan.items.columns.items()}
    if "columns" in changes:
        columns = {name: (value,) * n for name, value in changes.pop("columns").items()}
    plan = dataclasses.replace(plan, items=dataclasses.replace(items, columns=columns), **changes)
    with pytest.raises(UserError) as error:
        TableWriter(address, plan)
    assert message in str(error.value)
    assert open_table(address).handle.version == version


def test_a_directory_with_anything_else_is_left_alone(model, patchy, tmp_path):
    items = read_items(patchy)
    embed_catalogue(model, items, [], tmp_path / "files")
    with pytest.raises(UserError, match=r"files holds .* and is no table of ours; give an empty"):
        embed_table(model, items, [], f"lance://{tmp_path}/files")
    embed_table(model, items, [], f"lance://{tmp_path}/t")
    with pytest.raises(UserError, match=r"holds items\.lance and no embeddings of ours"):
        embed_catalogue(model, items, [], tmp_path / "t")
    lancedb.connect(tmp_path / "theirs").create_table("items", pa.table({"a": [1]}))
    for use in (open_table, lambda to: embed_table(model, items, [], to)):
        with pytest.raises(UserError, match=r"holds a table that is not ours or is damaged"):
            use(f"lance://{tmp_path}/theirs")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"LanceDB cannot use lance://.*/file \(.*File exists"):
        embed_table(model, items, [], f"lance://{tmp_path}/file")
    for path in (tmp_path / "t" / "items.lance" / "data").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"LanceDB cannot use lance://.*/t \("):
        TableSearcher(open_table(f"lance://{tmp_path}/t")).search(item="whole")


def test_filters_that_cannot_be_used(shop):
    searcher = TableSearcher(open_table(shop[0]))
    names = "on the columns id, text, image, price, brand, Sold, item_number, image_state"
    for where, message in (
        (
            "prize < 20",
            "the filter 'prize < 20' cannot be used (Schema error: No field named prize",
        ),
        ("price <", "Expected: an expression, found: EOF"),
        ("price < 20 AND", "found: EOF"),
        ("price", "does not return a boolean"),
        ("price < 'much'", "could not convert to literal of type"),
        ('brand = "X"', "No field named"),
        ("nope(price)", "Invalid function 'nope'"),
        ("1/0 > 1", "Divide by zero"),
        (") OR (price < 3", "parse"),
    ):
        for exact in (True, None):
            with pytest.raises(UserError) as error:
                searcher.search(item="i5", where=where, exact=exact)
            assert message.lower() in str(error.value).lower(), where
            assert names in str(error.value)
            assert "\n" not in str(error.value)
            assert ".rs:" not in str(error.value)


def test_questions_that_cannot_be(runs, model, table, patchy):
    searcher = TableSearcher(table)
    for options, message in (
        ({"item": "i1", "k": 0}, "k is 0; it must be at least 1"),
        ({"item": "i1", "k": "3"}, "k is '3'; it must be a whole number"),
        ({"item": "i1", "k": 1.5}, "k is 1.5; it must be a whole number"),
        ({"item": "i1", "against": "sound"}, "against='sound' is unknown"),
        ({"item": "i1", "text": "x"}, "give one of an item, a text and an image"),
        ({"item": "I17"}, "has no item 'I17'; did you mean"),
        ({"item": "'"}, 'has no item "\'"'),
        ({"item": ""}, "has no item ''"),
        ({"text": "x"}, "with the catalogue's model only"),
        ({"item": "i1", "where": "a\0"}, "is not UTF-8 text"),
        ({"relation": "both kind6", "item": "i1"}, "with that sentence, or choose 'both kind5'"),
        ({"relation": " ", "item": "i1"}, "the relation is empty"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            searcher.search(**options)
    with pytest.raises(UserError, match="was embedded by another model"):
        TableSearcher(table, open_model(runs(seed=1)))


def test_addresses(tmp_path):
    assert table_or_path("lance://a/b") == "lance://a/b"
    assert table_or_path("lance+s3://bucket/path") == "lance+s3://bucket/path"
    assert table_or_path("s3://bucket/path/") == "s3://bucket/path"
    assert table_or_path(str(tmp_path)) == tmp_path
    for address, message in (
        ("lance://", "names no directory; write lance://DIRECTORY"),
        ("lance://s3://bucket", r"write lance\+s3://bucket for object storage"),
        ("lance+db://catalogue", "is a server of LanceDB, which is not supported"),
        ("http://bucket", "http:// is not supported"),
        ("lance://a\0b", "has a NUL"),
        ("lance+s3://my bucket/x", "has a bucket of no valid name"),
        ("lance+gs://bucket:x/y", "has a bucket of no valid name"),
    ):
        with pytest.raises(UserError, match=message):
            table_or_path(address)
    for address in ("LANCE://a", "lance+://a", "a"):
        with pytest.raises(UserError, match=f"'{re.escape(address)}' is the address of no table"):
            open_table(address)
    with pytest.raises(UserError, match=r"LanceDB cannot use lance\+foo://a \(No object store pro"):
        open_table("lance+foo://a")
    with pytest.raises(UserError, match=r"there is no table in lance://.*/none; embed first"):
        open_table(f"lance://{tmp_path}/none")
    assert not (tmp_path / "none").exists()


def test_without_lancedb(shop, model, patchy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for use in (open_table, lambda to: embed_table(model, read_items(patchy), [], to)):
        with pytest.raises(UserError, match=r'needs LanceDB: pip install "rcml_jax\[lance\]"'):
            use(shop[0] if use is open_table else f"lance://{tmp_path}/t")
