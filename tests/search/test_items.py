"""Tables of items to embed: what is read, and what is said of a wrong one."""

import dataclasses
import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data.images import ImageBank, ImageError
from rcml_jax.data.sources import folder as folder_source
from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError
from rcml_jax.search.items import from_graph, pixels, read_items
from tests.data.conftest import make_graph


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_a_folder_a_csv_and_a_jsonl_hold_the_same_items(tmp_path):
    table = write(
        tmp_path / "items.csv",
        "id,Text,image,price",
        'a,"one, two",p/a.png,3',
        "7,,b.png,",
        "c,x,,",
    )
    lines = ('{"id": "a", "text": "one, two", "image": "p/a.png"}',)
    lines += ('{"id": 7, "text": null, "image": "b.png"}', '{"id": "c", "text": " x "}')
    other = write(tmp_path / "other.jsonl", *lines)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"bytes of a")
    read = [read_items(path) for path in (tmp_path, table, other, str(table))]
    for items in read:
        assert items.ids == ("a", "7", "c")
        assert items.texts == ("one, two", "", "x")
        assert items.image_names == ("p/a.png", "b.png", "")
        assert items.root == tmp_path.resolve()
        assert items.read(0) == b"bytes of a"
        with pytest.raises(FileNotFoundError):
            items.read(1)
    assert len({items.digest() for items in read}) == 1


def test_further_columns_have_one_type_each(tmp_path):
    table = write(
        tmp_path / "items.csv",
        "id,text,price,stock,zip,word,none,Big Number,",
        "a,x,3.5,3,012,a,,99999999999999999999,left out",
        "b,x,,-4,100,7,,1,",
        "c,x,1e3,0,100,,,2,",
    )
    assert read_items(table).columns == {
        "price": (3.5, None, 1000.0),
        "stock": (3, -4, 0),
        "zip": ("012", "100", "100"),
        "word": ("a", "7", None),
        "none": (None, None, None),
        "big number": ("99999999999999999999", "1", "2"),
    }
    rows = [
        {"id": "a", "text": "x", "price": 3, "sold": True, "zip": "012", "mixed": 1},
        {"id": "b", "text": "x", "price": 2.5, "sold": None, "mixed": "1"},
        {"id": "c", "text": "x", "sold": False, "zip": "7", "mixed": True, "Big": 2**60},
    ]
    write(tmp_path / "t.jsonl", *map(json.dumps, rows))
    found = read_items(tmp_path / "t.jsonl").columns
    assert found == {
        "price": (3.0, 2.5, None),
        "sold": (True, None, False),
        "zip": ("012", None, "7"),
        "mixed": ("1", "1", "true"),
        "Big": (None, None, str(2**60)),
    }
    for values in found.values():
        assert len({type(value) for value in values} - {type(None)}) == 1


def test_the_digest_tells_items_apart(tmp_path):
    tables = [
        ("id,text,image", "a,b,c", "d,e,f"),
        ("id,text,image", "d,e,f", "a,b,c"),
        ("id,text,image", "a,b,c", "d,e,g"),
        ("id,text,image", "a,bc,", "d,e,f"),
        ("id,text,image", "ab,,c", "d,e,f"),
        ("id,text,image", "a,b,c"),
    ]
    digests = {read_items(write(tmp_path / "t.csv", *table)).digest() for table in tables}
    assert len(digests) == len(tables)
    # Half of a surrogate pair has no UTF-8.
    assert read_items(write(tmp_path / "t.jsonl", '{"id": "\\ud83d", "text": "x"}')).digest()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("id,text", "a,x", "a,y"), "t.csv, line 3: the id 'a' is used before (t.csv, line 2)"),
        (("id,text", ",x"), "t.csv, line 2: 'id' is empty"),
        (("name,text", "a,x"), "t.csv, line 2: the column 'id' is missing"),
        (("id,text", "a,x,y"), "t.csv, line 2: there are more values than columns"),
        (("id,text", 'a,"x'), "malformed CSV"),
        (("id,text",), "t.csv has no items"),
        (("id,title", "a,x"), "t.csv has no value in a column 'text' or 'image'"),
    ],
)
def test_wrong_tables(tmp_path, lines, message):
    with pytest.raises(UserError) as error:
        read_items(write(tmp_path / "t.csv", *lines))
    assert message in str(error.value)


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere; give a folder"):
        read_items(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither items.csv nor items.jsonl"):
        read_items(tmp_path)
    with pytest.raises(UserError, match=r"neither \.csv nor \.jsonl, \.parquet or \.tar"):
        read_items(write(tmp_path / "items.txt", "a"))
    (tmp_path / "t.csv").write_bytes(b"id,text\na,\xff\n")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_items(tmp_path / "t.csv")
    with pytest.raises(UserError, match="malformed JSON"):
        read_items(write(tmp_path / "t.jsonl", "{"))


def test_items_and_their_rows_are_no_objects_of_python(tmp_path):
    """Of each item there are the bytes of its strings and three offsets, and rows are streamed."""
    rows = [
        json.dumps({"id": f"{i:010d}", "text": "x" * 60, "image": f"{i:010d}.png"})
        for i in range(20_000)
    ]
    write(tmp_path / "items.jsonl", *rows)
    tracemalloc.start()
    try:
        items = read_items(tmp_path)
        kept, _ = tracemalloc.get_traced_memory()
        for _ in items.rows():  # what is imported and cached at the first time
            pass
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert sum(row["state"] is None for row in items.rows()) == 20_000
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    # As tuples of strings they took 237 bytes, and their rows 617.
    assert kept / 20_000 < 170
    assert peak / 20_000 < 60


def test_items_of_a_graph_are_its_columns():
    graph = make_graph()
    ids, texts = StringColumn.of(graph.ids), StringColumn.of(graph.texts)
    items = from_graph(dataclasses.replace(graph, ids=ids, texts=texts))
    assert items.ids is items.image_names is ids
    assert items.texts is texts


def test_pixels_and_items_are_those_of_the_folder_source(tmp_path):
    """A turned photograph, a large one, a transparent and a paletted image."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "0.jpg", exif=exif)
    noise.resize((900, 700)).save(tmp_path / "1.jpg")
    noise.convert("RGBA").rotate(30).save(tmp_path / "2.png")
    noise.convert("P").save(tmp_path / "3.png")
    names = ("0.jpg", "1.jpg", "2.png", "3.png")
    write(tmp_path / "items.csv", "id,text,image", *(f"{name},t,{name}" for name in names))
    write(tmp_path / "relations.csv", "id,sentence", "r,both")
    write(tmp_path / "pairs.csv", "a,b,relation", "0.jpg,1.jpg,r")
    graph, _ = folder_source.read(tmp_path)
    bank = ImageBank(graph.images, 24)
    for items in (read_items(tmp_path), from_graph(graph)):
        assert items.ids == graph.ids
        assert [row["id"] for row in items.rows()] == [*names]
        for i in range(4):
            np.testing.assert_array_equal(pixels(items.read(i), 24), bank([i])[0])
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    with pytest.raises(ImageError, match="truncated"):
        pixels(buffer.getvalue()[:200], 24)
