"""Parquet, saved data sets and tar shards as items: read, named and refused."""

import builtins
import decimal
import logging
import os
import tarfile

import numpy as np
import pytest

from rcml_jax.data.sources import folder
from rcml_jax.data.tables import rows_of, table_at, table_of
from rcml_jax.errors import UserError
from rcml_jax.search.items import from_names, read_items
from tests.data.conftest import png
from tests.data.containers import example, write_parquet, write_saved, write_tar
from tests.data.sources.test_folder import ITEMS, PAIRS, RELATIONS, quiet, write_table

BY_BYTES = [
    {**row, "image": {"bytes": png(n, 20), "path": f"{n}.png"}} for n, row in enumerate(ITEMS)
]
SHARDS = {
    f"{shard:05d}.tar": [
        part
        for n in range(3 * shard, 3 * shard + 3)
        for part in example(f"i{n}", png(n, 20), f"item, {n}", {"label": "ab"[n % 2], "url": "x"})
    ]
    for shard in range(2)
}


def write_shards(root):
    for name, members in SHARDS.items():
        write_tar(root / name, members)


def write_by_path(root):
    (root / "images").mkdir()
    for n in range(6):
        (root / "images" / f"{n}.png").write_bytes(png(n, 20))
    write_parquet(root / "items.parquet", ITEMS)


def write_dict(root):
    write_saved(root / "items" / "train", [BY_BYTES[:2], BY_BYTES[2:3]])
    write_saved(root / "items" / "test", [BY_BYTES[3:]])
    (root / "items" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def split_parquet(root):
    (root / "items").mkdir()
    write_parquet(root / "items" / "a-0.parquet", BY_BYTES[:4], row_group_size=1)
    write_parquet(root / "items" / "a-1.parquet", BY_BYTES[4:])


FORMS = {
    "parquet with bytes": lambda root: write_parquet(root / "items.parquet", BY_BYTES),
    "parquet with paths": write_by_path,
    "parquet with plain bytes": lambda root: write_parquet(
        root / "items.parquet", [r | {"image": r["image"]["bytes"]} for r in BY_BYTES]
    ),
    "parquet files": split_parquet,
    "saved": lambda root: write_saved(root / "items", [BY_BYTES[:3], BY_BYTES[3:]]),
    "saved splits": write_dict,
    "shards in a folder": lambda root: write_shards(root / "items"),
    "shards": write_shards,
    "one shard": lambda root: write_tar(
        root / "items.tar", [part for shard in SHARDS.values() for part in shard]
    ),
}


def with_relations(root):
    write_table(root / "relations.csv", RELATIONS)
    write_table(root / "pairs.csv", PAIRS)
    return root


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_graph_and_items(tmp_path, form):
    FORMS[form](tmp_path)
    graph = folder.load(with_relations(tmp_path), log=quiet)
    assert tuple(graph.ids) == tuple(f"i{n}" for n in range(6))
    assert tuple(graph.texts) == tuple(f"item, {n}" for n in range(6))
    assert graph.label_names == ("a", "b")
    np.testing.assert_array_equal(graph.labels, [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(graph.pairs, [[0, 1, 0], [2, 3, 1], [4, 5, 0], [4, 5, 1]])
    assert [graph.images.encoded(n) for n in range(6)] == [png(n, 20) for n in range(6)]
    items = read_items(tmp_path)
    assert (items.ids, items.texts) == (tuple(graph.ids), tuple(graph.texts))
    # In any order, and by the names alone, as a store of embeddings has them.
    again = from_names(items.ids, items.texts, items.image_names, items.root)
    for n in (4, 0, 5, 2, 1, 3):
        assert items.read(n) == again.read(n) == png(n, 20)
    assert list(again.rows()) == list(items.rows())


def test_relations_and_pairs_in_parquet(tmp_path):
    write_shards(tmp_path)
    write_parquet(tmp_path / "relations.parquet", RELATIONS)
    write_parquet(tmp_path / "pairs.parquet", PAIRS)
    graph, _ = folder.read(tmp_path)
    np.testing.assert_array_equal(graph.pair_split, [0, 1, 2, -1])


def test_datasets_own_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "vector": datasets.Sequence(datasets.Value("float32")),
        }
    )
    rows = [
        {"id": n, "text": f"t{n}", "label": n % 2, "vector": [0.5, n]} | {"image": r["image"]}
        for n, r in enumerate(BY_BYTES)
    ]
    made = datasets.Dataset.from_list(rows, features=features)
    chosen = made.select([5, 0, 3])
    chosen.save_to_disk(tmp_path / "saved", num_shards=2)
    chosen.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": chosen}).save_to_disk(tmp_path / "splits")
    for table in (table_of(tmp_path / "saved", "items"), table_at(tmp_path / "rows.parquet")):
        assert [row["label"] for _, row in rows_of(table)] == ["dog", "cat", "dog"]
        assert {"vector"} & {*next(rows_of(table))[1]} == set()
    for path in (tmp_path / "saved", tmp_path / "rows.parquet", tmp_path / "splits"):
        items = read_items(path)
        assert items.ids == ("5", "0", "3")
        assert [items.read(i) for i in range(3)] == [png(n, 20) for n in (5, 0, 3)]


def test_items_without_text_or_image(tmp_path):
    rows = [
        {"id": 1, "text": None, "image": {"bytes": png(1), "path": None}},
        {"id": 2, "text": "only a text", "image": None},
        {"id": 3, "text": "a path", "image": {"bytes": None, "path": "3.png"}},
    ]
    (tmp_path / "3.png").write_bytes(png(3))
    path = write_parquet(tmp_path / "t.parquet", rows)
    saved = write_saved(tmp_path / "saved", [rows])
    (saved / "3.png").write_bytes(png(3))
    for items in (read_items(path), read_items(saved)):
        assert items.texts == ("", "only a text", "a path")
        assert [bool(name) for name in items.image_names] == [True, False, True]
        assert (items.read(0), items.read(2)) == (png(1), png(3))
    members = [
        *example("a", png(0)),
        *example("b", None, "b's text"),
        *example("c", None, None, {}),
    ]
    members += example("d", png(4), None, {"caption": "of json", "exif": {"x": 1}})
    items = read_items(write_tar(tmp_path / "s.tar", members))
    assert items.ids == ("a", "b", "c", "d")
    assert items.texts == ("", "b's text", "", "of json")
    assert [bool(name) for name in items.image_names] == [True, False, False, True]


def test_img2dataset_writes_more_than_is_read(tmp_path):
    """Statistics and a Parquet file beside each shard; folders and hidden files in it."""
    directory = tarfile.TarInfo("sub")
    directory.type = tarfile.DIRTYPE
    hidden = [
        (directory, None),
        ("._i0.jpg", b"x"),
        ("sub/i7.jpg", png(7)),
        ("sub/i7.mask.png", b""),
    ]
    write_tar(tmp_path / "00000.tar", SHARDS["00000.tar"] + hidden)
    write_parquet(tmp_path / "00000.parquet", [{"key": "i0", "status": "success"}])
    (tmp_path / "00000_stats.json").write_text("{}")
    items = read_items(tmp_path)
    assert items.ids == ("i0", "i1", "i2", "sub/i7")
    assert items.read(3) == png(7)


def test_a_prepared_folder_of_shards_is_not_read_again(tmp_path, monkeypatch, caplog):
    write_shards(with_relations(tmp_path))
    broken = example("i2", png(2)[:40], "item, 2")
    write_tar(tmp_path / "00000.tar", SHARDS["00000.tar"][:6] + broken)
    folder.load(tmp_path, log=quiet)
    monkeypatch.setattr(folder, "rows_of", lambda *a: pytest.fail("read again"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(folder.load(tmp_path, log=quiet)) == 5
    assert "1 of 6 items left out" in caplog.text
    assert "i2" in caplog.text
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"00000\.tar, key 'i2': the image .* cannot be decoded"):
        folder.load(tmp_path, log=quiet, strict=True)
    write_tar(tmp_path / "00000.tar", SHARDS["00000.tar"])
    assert len(folder.load(tmp_path, log=quiet)) == 6


def link(kind, name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return [(member, None)]


BAD_SHARDS = {
    "key twice": (
        example("a", png(0)) + example("b", png(1)) + example("a", png(2)),
        "used before",
    ),
    "part twice": (example("a", png(0)) * 2, r"s\.tar, key 'a': \.jpg comes twice"),
    "outside": ([("../a.jpg", b"")], r"s\.tar, member '\.\./a\.jpg': its name leads out"),
    "deep outside": ([("x/../../a.jpg", b"")], "leads out"),
    "absolute": ([("/etc/a.jpg", b"")], "leads out"),
    "symbolic link": (link(tarfile.SYMTYPE, "a.jpg", "/etc/passwd"), r"'a\.jpg': it is a link"),
    "hard link": (link(tarfile.LNKTYPE, "a.jpg", "b"), "it is a link"),
    "pipe": (link(tarfile.FIFOTYPE, "a.jpg", ""), "no plain file"),
    "bad json": ([("a.json", b"{")], r"s\.tar, key 'a': malformed JSON"),
    "listed json": ([("a.json", b"[]")], r"s\.tar, key 'a': its \.json is no object"),
    "latin text": ([("a.txt", "é".encode("latin-1"))], r"s\.tar, key 'a': text is not UTF-8"),
    "nothing": ([], "has no items"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards(tmp_path, case):
    members, message = BAD_SHARDS[case]
    with pytest.raises(UserError, match=message):
        read_items(write_tar(tmp_path / "s.tar", members))


@pytest.mark.parametrize("left", [100, 700, 1024, 1700])
def test_a_truncated_shard_is_refused(tmp_path, left):
    """In a header, in a file, after a file and in a later header."""
    path = write_tar(tmp_path / "s.tar", example("a", b"x" * 400, "text"))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"s\.tar (is truncated|cannot be read)"):
        read_items(path)
    path.write_bytes(b"no archive " * 100)
    with pytest.raises(UserError, match=r"s\.tar cannot be read .* no tar archive"):
        read_items(path)


def test_bad_tables(tmp_path):
    path = tmp_path / "t.parquet"
    cases = {
        r"t\.parquet, row 1: the column 'id' is missing": [{"name": "a", "text": "x"}],
        r"t\.parquet, row 2: 'id' is empty": [{"id": 1, "text": "x"}, {"id": None, "text": "y"}],
        r"t\.parquet, row 2: the id 'a' is used before \(t\.parquet, row 1\)": 2
        * [{"id": "a", "text": "x"}],
        r"t\.parquet: the column 'text' comes twice": [{"id": "a", "text": "x", "Text": "y"}],
        "has no value in a column 'text' or 'image'": [{"id": "a"}],
    }
    for message, rows in cases.items():
        write_parquet(path, rows)
        with pytest.raises(UserError, match=message):
            read_items(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        read_items(path)
    with_relations(tmp_path)
    rows = [dict(row) for row in BY_BYTES]
    rows[4]["image"] = {"bytes": png(4)[:50], "path": None}
    path.unlink()
    write_parquet(tmp_path / "items.parquet", rows)
    with pytest.raises(UserError, match=r"items\.parquet, row 5: the image .* cannot be decoded"):
        folder.load(tmp_path, log=quiet, strict=True)
    assert len(folder.load(tmp_path, log=quiet)) == 5
    write_shards(tmp_path / "items")
    with pytest.raises(UserError, match=r"has both items\.parquet and items; remove one"):
        folder.load(tmp_path, log=quiet)


def with_columns(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet

    both = {"id": pa.array(["a", "b"]), "text": pa.array(["x", "y"])} | columns
    pyarrow.parquet.write_table(pa.Table.from_arrays([*both.values()], [*both]), path)
    return path


def test_values_that_python_has_not_or_has_otherwise(tmp_path):
    """Dates beyond the year 9999, decimals, what pandas writes where nothing is, new types."""
    import pyarrow as pa

    images = [png(1), png(2)]
    items = read_items(
        with_columns(
            tmp_path / "t.parquet",
            label=pa.array([float("nan"), 2.0]),
            price=pa.array([decimal.Decimal("1.50"), None]),
            day=pa.array([1, None], pa.date32()),
            time=pa.array([86_400, 10**12], pa.timestamp("s")),
            span=pa.array([2**62, 1], pa.duration("s")),
            kind=pa.array([1, 2], pa.date32()).dictionary_encode(),
            image=pa.array(images, pa.binary_view()),
        )
    )
    columns = dict(items.columns)
    assert columns.pop("time")[0].startswith("1970-01-02 00:00:00")
    assert columns == {
        "label": (None, 2.0),
        "price": (1.5, None),
        "day": ("1970-01-02", None),
        "span": (str(2**62), "1"),
        "kind": ("1970-01-02", "1970-01-03"),
    }
    assert [items.read(i) for i in range(2)] == images


def test_columns_that_cannot_be_read(tmp_path):
    import pyarrow as pa

    lists = pa.array([["x"], ["y"]])
    for column, values in (
        ("id", lists),
        ("text", pa.array([{"en": "x"}, {"en": "y"}])),
        ("text", pa.array([b"x", b"y"])),
        ("image", lists),
        ("label", lists),
    ):
        path = with_columns(tmp_path / "t.parquet", **{column: values})
        with pytest.raises(UserError, match=rf"column '{column}' is of the type .* not read"):
            read_items(path)
    twice = pa.table([pa.array(["a"]), pa.array(["x"]), pa.array(["y"])], ["id", "text", "text"])
    pa.parquet.write_table(twice, path)
    with pytest.raises(UserError, match="the column 'text' comes twice"):
        read_items(path)
    zones = pa.array([1, 2], pa.timestamp("s", "Mars/Olympus"))
    with pytest.raises(UserError, match=r"cannot be read \(.*Mars/Olympus"):
        read_items(with_columns(path, day=zones))


def test_damaged_offsets_do_not_end_the_process(tmp_path):
    """An Arrow file is mapped as it is; its offsets may lead anywhere."""
    saved = write_saved(tmp_path / "saved", [[{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]])
    (file,) = saved.glob("*.arrow")
    whole, wrong = (np.array([0, 1, end], np.int32).tobytes() for end in (2, 2**30))
    assert whole in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(whole, wrong))
    with pytest.raises(UserError, match=r"\.arrow cannot be read"):
        read_items(saved)


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("items.tar", "s.tar", "t.parquet", "t.arrow", "items.csv"):
        os.mkfifo(tmp_path / name)
    for name in ("s.tar::0+5", "t.parquet::0", "t.arrow::0"):
        with pytest.raises(OSError, match="no regular file"):
            from_names(("a",), ("",), (name,), tmp_path).read(0)
    for path in (tmp_path / "items.tar", tmp_path / "items.csv", tmp_path):
        with pytest.raises(UserError, match="no regular file"):
            read_items(path)


def test_a_table_whose_name_is_no_text(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", [{"id": "a", "text": "x"}])
    path.rename(tmp_path / os.fsdecode(b"caf\xe9.parquet"))
    with pytest.raises(UserError, match="cannot be encoded as a file name"):
        read_items(tmp_path)


def test_a_damaged_saved_data_set(tmp_path):
    saved = write_saved(tmp_path / "items", [BY_BYTES[:3], BY_BYTES[3:]])
    second = saved / "data-00001-of-00002.arrow"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow cannot be read"):
        read_items(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=r"items lacks data-00001-of-00002\.arrow"):
        read_items(tmp_path)
    (saved / "state.json").write_text("{")
    with pytest.raises(UserError, match="is no whole data set of Hugging Face"):
        read_items(saved)


def test_a_part_that_has_gone_is_an_unreadable_image(tmp_path):
    shard = write_tar(tmp_path / "s.tar", example("a", png(0), "x"))
    table = write_parquet(tmp_path / "t.parquet", BY_BYTES)
    for path in (shard, table):
        items = read_items(path)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(OSError, match=path.name):
            items.read(0)
    for name in ("t.parquet::99", "s.tar::0+99999999999", "gone.arrow::0"):
        with pytest.raises(OSError, match=name.partition(":")[0]):
            from_names(("a",), ("",), (name,), tmp_path).read(0)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "t.parquet", ITEMS)
    imported = builtins.__import__

    def without(name, *args):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r't\.parquet needs pyarrow: pip install "rcml_jax\[parquet'
    ):
        read_items(path)
