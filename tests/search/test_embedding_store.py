"""Embeddings on disk: what is written in shards is read, and what does not belong is refused."""

import collections
import errno
import hashlib
import json
import shutil

import numpy as np
import pytest

from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError
from rcml_jax.search.embedding_store import Plan, Writer, ids_digest, open_embeddings
from rcml_jax.search.items import from_names

MODEL = {"workdir": "runs/a", "method": "rcml", "step": 7, "digest": "d0"}


def make_plan(tmp_path, n=5, **options):
    ids = tuple(f"i{i}" for i in range(n))
    items = from_names(ids, ("words",) * n, ("p.png",) * n, tmp_path)
    shapes = {"text": (3, 4), "image": (1, 4)}
    values = {"model": MODEL, "items": items, "relations": ("own", "r1", "r2"), "shapes": shapes}
    return Plan(**(values | {"shard": 2} | options))


def vectors(n=5):
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(3, n, 4)), rng.normal(size=(1, n, 4))
    has = {"text": np.array([1, 1, 0, 0, 1], bool), "image": np.array([1, 0, 1, 0, 1], bool)}
    return {"text": text, "image": image}, {name: mask[:n] for name, mask in has.items()}


def fill(writer, shards=None):
    blocks, has = vectors()
    for number, rows in enumerate(writer.shards()):
        if shards is not None and number == shards:
            return
        part = slice(rows.start, rows.stop)
        writer.write(
            rows.start,
            {m: x[:, part] for m, x in blocks.items()},
            {m: x[part] for m, x in has.items()},
        )
        writer.mark({"unreadable": [f"i{i}" for i in rows]})


@pytest.fixture
def store(tmp_path):
    fill(Writer(tmp_path / "store", make_plan(tmp_path)))
    return tmp_path / "store"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path, dtype):
    plan = make_plan(tmp_path, dtype=dtype)
    fill(Writer(tmp_path / "store", plan))
    found = open_embeddings(tmp_path / "store")
    blocks, has = vectors()
    for name in ("text", "image"):
        assert isinstance(found.vectors[name], np.memmap)
        assert found.vectors[name].dtype == dtype
        expected = np.where(has[name][:, None], blocks[name], 0).astype(dtype)
        np.testing.assert_array_equal(found.vectors[name], expected)
        np.testing.assert_array_equal(found.has[name], has[name])
        # What depends on no relation is there for every one.
        np.testing.assert_array_equal(found.under(name, 2), expected[-1])
    assert found.relations == plan.relations
    assert found.model == MODEL
    assert found.items.ids == plan.items.ids
    assert found.items.digest() == plan.items.digest()
    assert found.problems == {"unreadable": {"count": 5, "first": [f"i{i}" for i in range(5)]}}


def test_a_begun_store_goes_on_after_its_last_whole_shard(tmp_path, store):
    other = tmp_path / "other"
    first = Writer(other, make_plan(tmp_path))
    fill(first, shards=1)
    blocks, has = vectors()
    first.write(
        2, {m: x[:, 2:3] + 1 for m, x in blocks.items()}, {m: x[2:3] for m, x in has.items()}
    )
    with pytest.raises(UserError, match=r"is unfinished \(1 of 3 shards\)"):
        open_embeddings(other)
    again = Writer(other, make_plan(tmp_path, shard=4))
    assert again.shard == 2
    assert list(again.shards()) == [range(2, 4), range(4, 5)]
    fill(again)
    names = sorted(path.name for path in store.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (store / name).read_bytes() == (other / name).read_bytes(), name
    assert list(Writer(other, make_plan(tmp_path)).shards()) == []


def test_a_start_without_a_whole_shard_is_made_anew(tmp_path, store):
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    # Of another plan, too: nothing is lost.
    Writer(tmp_path / "other", make_plan(tmp_path, n=9, dtype="float16", shard=3))
    fill(Writer(tmp_path / "other", make_plan(tmp_path)))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": MODEL | {"digest": "d1"}}, "holds embeddings of another model (runs/a, step 7)"),
        ({"n": 4}, "holds embeddings of other items; give another directory, or remove it"),
        ({"relations": ("own", "r2", "r1")}, "other relations (3 sentences)"),
        ({"shapes": {"text": (3, 5), "image": (1, 5)}}, "another width"),
        ({"dtype": "float16"}, "the type float32"),
        ({"dtype": "int8"}, "the type 'int8' is unknown; choose float32 or float16"),
        ({"shard": 0}, "a shard of 0 items is too small"),
    ],
)
def test_another_plan_is_refused(tmp_path, store, options, message):
    before = {path: path.read_bytes() for path in store.iterdir()}
    with pytest.raises(UserError) as error:
        Writer(store, make_plan(tmp_path, **options))
    assert message in str(error.value)
    assert before == {path: path.read_bytes() for path in store.iterdir()}


def test_a_directory_with_anything_else_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    for name in ("chapter.txt", "items.jsonl", "text.npy"):
        path = tmp_path / "thesis" / name
        path.write_text("1")
        with pytest.raises(UserError, match=rf"holds {name} and no embeddings of ours"):
            Writer(tmp_path / "thesis", make_plan(tmp_path))
        assert list(path.parent.iterdir()) == [path]
        assert path.read_text() == "1"
        path.unlink()
    path = tmp_path / "thesis" / "manifest.json"
    path.write_text('{"name": "an app"}')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Writer(tmp_path / "thesis", make_plan(tmp_path))
    # What a kill leaves of a manifest is no obstacle.
    path.rename(path.with_name("manifest.json.part"))
    Writer(tmp_path / "thesis", make_plan(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        Writer(tmp_path / "file", make_plan(tmp_path))


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    plan = make_plan(tmp_path)
    needed = 5 * (3 * 4 * 4 + 1 + 4 * 4 + 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(UserError, match=r"no room in .*store for 0.0 MiB"):
        Writer(tmp_path / "store", plan)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    writer = Writer(tmp_path / "store", plan)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; mend that"):
        fill(writer)
    monkeypatch.undo()
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["done"] == 0


def test_damaged_files(tmp_path, store):
    def damaged(name, content):
        path = store / name
        good = path.read_bytes()
        path.write_bytes(content(good))
        with pytest.raises(UserError, match=rf"{name}.* is damaged .*; embed anew into"):
            open_embeddings(store)
        path.write_bytes(good)

    damaged("manifest.json", lambda good: good[:50])
    damaged("manifest.json", lambda good: b"{}")
    damaged("manifest.json", lambda good: good.replace(b'"done"', b'"over"'))
    damaged("manifest.json", lambda good: good.replace(b'"format": 2', b'"format": 9'))
    damaged("items.jsonl", lambda good: good[:50])
    damaged("items.jsonl", lambda good: good.splitlines(keepends=True)[0])
    damaged("text.npy", lambda good: good[:-1])
    damaged("text.npy", lambda good: b"")
    damaged("has_text.npy", lambda good: (store / "has_text.npy").read_bytes()[:100])
    damaged("image.npy", lambda good: (store / "text.npy").read_bytes())
    (store / "image.npy").unlink()
    with pytest.raises(UserError, match=r"image\.npy is damaged"):
        open_embeddings(store)
    with pytest.raises(UserError, match=r"image\.npy is damaged"):
        Writer(store, make_plan(tmp_path))
    (store / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds no manifest.json, so nothing was embedded there"):
        open_embeddings(store)


def test_changed_items_are_written_anew(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    images = tuple(f"{name}.png" for name in "abcde")

    def plan(texts=("words",) * 5):
        ids = tuple(f"i{i}" for i in range(5))
        return make_plan(tmp_path, items=from_names(ids, texts, images, tmp_path))

    store = tmp_path / "store"
    fill(Writer(store, plan()), shards=2)
    fill(Writer(store, plan()))
    before = open_embeddings(store)
    assert Writer(store, plan()).stale == []
    (tmp_path / "b.png").write_bytes(b"another image")
    changed = plan(("words", "words", "words", "other", "words"))
    writer = Writer(store, changed)
    assert writer.stale == [1, 3]
    with pytest.raises(UserError, match="2 items have changed since the last embedding"):
        open_embeddings(store)
    # Stopped here, and the image is as before: what may be half written is still stale.
    (tmp_path / "b.png").write_bytes(b"b")
    (tmp_path / "e.png").unlink()
    writer = Writer(store, changed)
    assert writer.stale == [1, 3, 4]
    blocks = {"text": np.full((3, 3, 4), 7.0), "image": np.full((1, 3, 4), 8.0)}
    has = {"text": np.array([1, 1, 1], bool), "image": np.array([1, 1, 0], bool)}
    writer.rewrite(writer.stale, blocks, has)
    (tmp_path / "d.png").write_bytes(b"changed after it was read")
    writer.refresh()
    found = open_embeddings(store)
    assert found.items.texts == ("words", "words", "words", "other", "words")
    assert found.problems["unreadable"] == {"count": 1, "first": ["i4"]}
    np.testing.assert_array_equal(found.has["image"], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(found.vectors["image"][0, 3:, 0], [8, 0])
    for name in ("text", "image"):
        np.testing.assert_array_equal(
            found.vectors[name][:, [0, 2]], before.vectors[name][:, [0, 2]]
        )
    # The states that are kept are those of before anything was read.
    assert Writer(store, changed).stale == [3]


def test_ids_are_hashed_as_one_list():
    for n in (0, 1, 4096, 5000):
        ids = [f"é{i}" for i in range(n)]
        expected = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        assert ids_digest(ids) == ids_digest(StringColumn.of(ids)) == expected
