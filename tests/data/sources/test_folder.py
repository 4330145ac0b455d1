import csv
import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data import prepared
from rcml_jax.data.relation_graph import split_graph
from rcml_jax.data.sources import folder
from rcml_jax.errors import UserError
from tests.data.conftest import png

ITEMS = [
    {"id": f"i{n}", "text": f"item, {n}", "image": f"images/{n}.png", "label": "ab"[n % 2]}
    for n in range(6)
]
RELATIONS = [{"id": "1", "sentence": "Both are red."}, {"id": "2", "sentence": "Both are round."}]
PAIRS = [
    {"item_a": "i0", "item_b": "i1", "relation": "1", "split": "train"},
    {"item_a": "i3", "item_b": "i2", "relation": "2", "split": "val"},
    {"item_a": "i4", "item_b": "i5", "relation": "1", "split": "test"},
    {"item_a": "i5", "item_b": "i4", "relation": "2", "split": ""},
    {"item_a": "i1", "item_b": "i0", "relation": "1", "split": ""},
]


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["id"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(params=["csv", "jsonl"])
def data(tmp_path, request):
    return make(tmp_path, request.param)


def make(root, kind="csv"):
    (root / "images").mkdir()
    for n in range(6):
        (root / "images" / f"{n}.png").write_bytes(png(n, 20))
    for name, rows in (("items", ITEMS), ("relations", RELATIONS), ("pairs", PAIRS)):
        write_table(root / f"{name}.{kind}", rows)
    return root


def quiet(line):
    del line


def test_a_folder_becomes_a_graph(data):
    graph = folder.load(data, log=quiet)
    assert graph.ids == tuple(f"i{n}" for n in range(6))
    assert graph.texts[3] == "item, 3"
    assert graph.relations == ("Both are red.", "Both are round.")
    assert graph.label_names == ("a", "b")
    np.testing.assert_array_equal(graph.labels, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(graph.pairs, [[0, 1, 0], [2, 3, 1], [4, 5, 0], [4, 5, 1]])
    np.testing.assert_array_equal(graph.pair_split, [0, 1, 2, -1])
    assert split_graph(graph, seed=0).disjoint == "declared"
    assert graph.images[5].getpixel((0, 0)) == (5, 0, 7)
    assert graph.images.encoded(5) == png(5, 20)  # stored as it is


def test_other_column_names_and_no_options(tmp_path):
    make(tmp_path)
    rows = [{"id": r["id"], "text": r["text"], "image": r["image"]} for r in ITEMS]
    write_table(tmp_path / "items.csv", rows)
    for a, b in (("item_1", "item_2"), ("a", "b")):
        write_table(
            tmp_path / "pairs.csv",
            [{a: r["item_a"], b: r["item_b"], "relation": r["relation"]} for r in PAIRS],
        )
        graph, skipped = folder.read(tmp_path)
        assert len(graph.pairs) == 4
        assert np.all(graph.pair_split == -1)
        assert np.all(graph.labels == -1)
        assert skipped == folder.Skipped()


def test_numbers_as_ids_in_jsonl(tmp_path):
    make(tmp_path, "jsonl")
    write_table(tmp_path / "relations.jsonl", [{"id": n, "sentence": f"s{n}"} for n in (1, 2)])
    assert folder.read(tmp_path)[0].relations == ("s1", "s2")


def test_the_cache_follows_the_files(data, monkeypatch):
    lines = []
    folder.load(data, log=lines.append)
    folder.load(data, log=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("Prepared ")
    (data / "images" / "2.png").write_bytes(png(77, 21))
    assert folder.load(data, log=lines.append).images[2].getpixel((0, 0)) == (77, 0, 7)
    path = next(data.glob("relations.*"))
    path.write_text(path.read_text().replace("red", "blue"))
    assert folder.load(data, log=lines.append).relations[0] == "Both are blue."
    folder.load(data, log=lines.append, max_image_size=10)
    assert len(lines) == 4
    monkeypatch.setattr(folder, "read", lambda *a, **k: pytest.fail("read again"))
    folder.load(data, log=lines.append)


def test_the_cache_goes_where_it_is_told(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    before = sorted(data.rglob("*"))
    folder.load(data, cache, log=quiet)
    assert sorted(data.rglob("*")) == before
    assert list(cache.rglob("dataset_info.json"))


def test_images_are_capped(tmp_path):
    make(tmp_path)
    Image.new("RGB", (900, 300), "red").save(tmp_path / "images" / "0.jpg")
    rows = [{**ITEMS[0], "image": "images/0.jpg"}, *ITEMS[1:]]
    write_table(tmp_path / "items.csv", rows)
    assert folder.load(tmp_path, log=quiet).images[0].size == (512, 171)
    assert folder.load(tmp_path, log=quiet, max_image_size=90).images[0].size == (90, 30)
    assert folder.load(tmp_path, log=quiet, max_image_size=None).images[0].size == (900, 300)


def test_a_corrupt_image_is_left_out_with_its_pairs(data, caplog):
    image = data / "images" / "1.png"
    image.write_bytes(image.read_bytes()[:50])
    graph, skipped = folder.read(data)
    assert skipped == folder.Skipped(("i1",), 2)
    assert "i1" not in graph.ids
    pairs = [(graph.ids[a], graph.ids[b], e) for a, b, e in graph.pairs]
    assert pairs == [("i2", "i3", 1), ("i4", "i5", 0), ("i4", "i5", 1)]
    for _ in range(2):  # also when the cache is read
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = folder.load(data, log=quiet)
        assert loaded.ids == graph.ids
        assert "1 of 6 items left out" in caplog.text
        assert "i1" in caplog.text
    number = 3 if (data / "items.csv").exists() else 2
    with pytest.raises(UserError, match=rf"items\.\w+, line {number}: the image .*1\.png cannot"):
        folder.load(data, log=quiet, strict=True)
    for n in range(6):
        (data / "images" / f"{n}.png").write_bytes(b"")
    with pytest.raises(UserError, match="No image of"):
        folder.load(data, log=quiet)


def changed(rows, index, **values):
    rows = [dict(row) for row in rows]
    for key, value in values.items():
        if value is None:
            del rows[index][key]
        else:
            rows[index][key] = value
    return rows


WRONG = {
    "duplicate id": ("items", changed(ITEMS, 2, id="i0"), 2, "'i0' is used before"),
    "empty text": ("items", changed(ITEMS, 1, text=" "), 1, "'text' is empty"),
    "empty id": ("items", changed(ITEMS, 1, id=""), 1, "'id' is empty"),
    "no image": ("items", changed(ITEMS, 4, image="images/x.png"), 4, "no image file"),
    "a folder": ("items", changed(ITEMS, 4, image="images"), 4, "no image file"),
    "empty sentence": ("relations", changed(RELATIONS, 1, sentence=""), 1, "'sentence' is empty"),
    "double relation": ("relations", changed(RELATIONS, 1, id="1"), 1, "'1' is used before"),
    "unknown item": ("pairs", changed(PAIRS, 2, item_b="i9"), 2, "no item 'i9'"),
    "unknown relation": ("pairs", changed(PAIRS, 0, relation="9"), 0, "no relation '9'"),
    "bad split": ("pairs", changed(PAIRS, 1, split="dev"), 1, "no split 'dev'"),
    "self pair": ("pairs", changed(PAIRS, 3, item_b="i5"), 3, "paired with itself"),
    "two splits": ("pairs", changed(PAIRS, 3, split="train"), 3, "in split train, but in test"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named_by_file_and_line(data, case):
    table, rows, index, reason = WRONG[case]
    path = next(data.glob(f"{table}.*"))
    write_table(path, rows)
    line = index + (2 if path.suffix == ".csv" else 1)
    with pytest.raises(UserError) as error:
        folder.load(data, log=quiet)
    assert str(error.value).startswith(f"{path.name}, line {line}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("table", "column"),
    [("items", "image"), ("relations", "sentence"), ("pairs", "item_b"), ("pairs", "relation")],
)
def test_a_missing_column_is_named(data, table, column):
    path = next(data.glob(f"{table}.*"))
    rows = {"items": ITEMS, "relations": RELATIONS, "pairs": PAIRS}[table]
    write_table(path, [{k: v for k, v in row.items() if k != column} for row in rows])
    with pytest.raises(
        UserError, match=rf"{table}\.\w+, line \d: the column '{column}' is missing"
    ):
        folder.load(data, log=quiet)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "malformed JSON"),
        ("[1]", "no JSON object"),
        ('{"id": ["x"]}', "a list or an object"),
        ('{"id": "x", "text": "a", "text": "b"}', "comes twice"),
    ],
)
def test_malformed_json_lines(tmp_path, line, reason):
    make(tmp_path, "jsonl")
    path = tmp_path / "items.jsonl"
    path.write_text(f"\n{path.read_text()}{line}\n")  # a blank line first: it counts
    with pytest.raises(UserError, match=rf"items\.jsonl, line 8: .*{reason}"):
        folder.load(tmp_path, log=quiet)


@pytest.mark.parametrize(
    ("line", "reason"), [("3,a,b,c,d,e", "more values than columns"), ('"3" x,a', "malformed CSV")]
)
def test_malformed_csv_lines(tmp_path, line, reason):
    make(tmp_path)
    path = tmp_path / "relations.csv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=rf"relations\.csv, line 4: .*{reason}"):
        folder.load(tmp_path, log=quiet)


def test_a_column_that_comes_twice_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / "items.csv"
    path.write_text(path.read_text().replace("label", "Text ", 1))
    with pytest.raises(UserError, match=r"items\.csv: the column 'text' comes twice"):
        folder.load(tmp_path, log=quiet)


def test_tables_that_are_missing_double_empty_or_not_text(tmp_path):
    def message():
        with pytest.raises(UserError) as error:
            folder.load(tmp_path / "data", log=quiet)
        return str(error.value)

    assert "There is no folder" in message()
    (tmp_path / "data").mkdir()
    assert "neither items.csv nor items.jsonl" in message()
    make(tmp_path / "data")
    (tmp_path / "data" / "items.jsonl").write_text("")
    assert "both items.csv and items.jsonl" in message()
    (tmp_path / "data" / "items.jsonl").unlink()
    for table in ("pairs", "relations", "items"):
        write_table(tmp_path / "data" / f"{table}.csv", [])
        assert f"{table}.csv has no {table}" in message()
    (tmp_path / "data" / "items.csv").write_bytes("id,text\n1,é".encode("latin-1"))
    assert "not UTF-8" in message()


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    make(tmp_path)
    path = tmp_path / "items.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(folder.read(tmp_path)[0]) == 6


def test_an_interrupted_preparation_is_made_anew(data, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.images, "storable", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.load(data, log=quiet)
    assert not list(data.rglob("dataset_info.json"))
    assert len(folder.load(data, log=quiet)) == 6
    assert prepared.DATASET in os.listdir(next((data / folder.CACHE).iterdir()))


def test_texts_that_are_no_unicode_text(tmp_path):
    make(tmp_path, "jsonl")
    items = [dict(row) for row in ITEMS]
    items[1].update(text="red cup \ud83d", label="b\0")
    items[2]["id"] = "i2\udc80"
    relations = [RELATIONS[0], RELATIONS[1] | {"sentence": "Both \ud83d."}]
    pairs = [dict(row) for row in PAIRS]
    pairs[1]["item_b"] = "i2\udc80"
    for name, rows in (("items", items), ("relations", relations), ("pairs", pairs)):
        write_table(tmp_path / f"{name}.jsonl", rows)
    lines = []
    graph = folder.load(tmp_path, log=lines.append)
    assert graph.texts[1] == "red cup \ufffd"
    assert graph.ids[2] == "i2\ufffd"
    assert graph.relations[1] == "Both \ufffd."
    assert "b\ufffd" in graph.label_names
    assert lines[0].startswith("5 texts held a NUL or half of a surrogate pair")
    assert "the first is in items.jsonl, line 2" in lines[0]
    with pytest.raises(UserError, match=r"items\.jsonl, line 2: .*surrogate pair"):
        folder.load(tmp_path, strict=True)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_refused(tmp_path, value):
    make(tmp_path, "jsonl")
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write(f'{{"id": "x", "text": "t", "image": "images/1.png", "label": {value}}}\n')
    with pytest.raises(UserError, match=r"items\.jsonl, line 7: malformed JSON"):
        folder.load(tmp_path)


def test_long_values_and_odd_signs(data):
    kind = next(data.glob("items.*")).suffix
    text = "word " * 40_000 + "\u2028\x85\x0c end"
    write_table(data / f"items{kind}", [ITEMS[0] | {"text": text}, *ITEMS[1:]])
    assert folder.load(data, log=quiet).texts[0] == text


def test_relation_ids_with_one_sentence(data):
    kind = next(data.glob("relations.*")).suffix
    relations = [*RELATIONS, {"id": "3", "sentence": "Both  are red."}]
    write_table(data / f"relations{kind}", relations)
    lines = []
    graph = folder.load(data, log=lines.append)
    assert graph.relation_ids == ("1", "2", "3")
    assert lines[0].startswith("1 sentence has several relation ids ('1', '3')")
    with pytest.raises(UserError, match=r"1 sentence has several relation ids \('1', '3'\)"):
        folder.load(data, strict=True)


def test_images_of_every_kind_of_damage_are_left_out(tmp_path):
    make(tmp_path)
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "DDS")
    (tmp_path / "images" / "3.png").write_bytes(out.getvalue())
    (tmp_path / "images" / "2.png").write_bytes(png(2, 20)[:60])
    assert folder.load(tmp_path, log=quiet).ids == ("i0", "i1", "i4", "i5")
    with pytest.raises(
        UserError, match=r"items\.csv, line 4: the image .*2\.png cannot be decoded"
    ):
        folder.load(tmp_path, strict=True)
