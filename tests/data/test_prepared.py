import dataclasses
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rcml_jax.data import prepared
from rcml_jax.data.images import EncodedImages
from rcml_jax.data.relation_graph import split_graph
from rcml_jax.data.strings import StringColumn
from rcml_jax.errors import UserError
from tests.data.conftest import make_graph, make_respects, png

ROOT = Path(__file__).parents[2]


def assert_same(one, two):
    names = ("name", "ids", "texts", "label_names", "relations", "intra_relation")
    for name in (*names, "paraphrases", "held_out"):
        assert getattr(one, name) == getattr(two, name)
    for name in ("labels", "pairs", "pair_split"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for i in range(len(one)):
        assert one.images.encoded(i) == two.images.encoded(i)


def with_splits(graph):
    graph.pair_split[:] = split_graph(graph, seed=0, disjoint="pair").pair_split
    return graph


def test_a_graph_comes_back_as_it_was(toy, tmp_path):
    said = tuple((sentence, f"{sentence}, unseen") for sentence in toy.relations)
    toy = dataclasses.replace(with_splits(toy), paraphrases=said, held_out=1)
    folder = prepared.prepare(tmp_path, toy, license="CC0", description="Made up.")
    loaded = prepared.load(tmp_path, "toy")
    assert_same(toy, loaded)
    assert loaded.images[5].getpixel((0, 0)) == (5, 0, 7)
    assert len(loaded.images) == len(toy)
    assert "CC0" in (folder / "dataset_info.json").read_text() + (folder / "LICENSE").read_text()
    # Without the compact copy, or with a damaged one, the records have it all.
    (folder / "graph.npz").unlink()
    assert_same(toy, prepared.load(tmp_path, "toy"))
    (folder / "graph.npz").write_bytes(b"PK cut short")
    assert_same(toy, prepared.load(tmp_path, "toy"))


def test_ids_and_texts_are_mapped(toy, tmp_path):
    folder = prepared.prepare(tmp_path, toy)
    assert {path.name for path in folder.glob("*.strings")} == {"ids.strings", "texts.strings"}
    loaded = prepared.load(tmp_path, "toy")
    for column in (loaded.ids, loaded.texts):
        assert isinstance(column, StringColumn)
        assert isinstance(column._data.base, np.memmap)
    assert len(pickle.dumps(loaded.texts)) < len(pickle.dumps(toy.texts))
    assert_same(toy, pickle.loads(pickle.dumps(loaded)))
    # Files of before, of other items or cut short are made anew from the records.
    texts = folder / "texts.strings"
    whole = texts.read_bytes()
    for content in (None, b"", whole[:-1]):
        texts.unlink() if content is None else texts.write_bytes(content)
        assert_same(toy, prepared.load(tmp_path, "toy"))
        assert texts.read_bytes() == whole
    StringColumn.of(["one"]).save(folder / "ids.strings")
    assert_same(toy, prepared.load(tmp_path, "toy"))


def test_attributes_and_groups_come_back(tmp_path):
    graph = make_respects()
    folder = prepared.prepare(tmp_path, graph)
    for _ in range(2):
        loaded = prepared.load(tmp_path, "toy")
        for name in ("attributes", "item_group"):
            one, two = getattr(graph, name), getattr(loaded, name)
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        assert loaded.item_split is loaded.class_links is None
        (folder / "graph.npz").unlink()  # the second time they come from the records
    without = dataclasses.replace(graph, name="plain", attributes=None, item_group=None)
    prepared.prepare(tmp_path, without)
    loaded = prepared.load(tmp_path, "plain")
    assert loaded.attributes is loaded.item_group is None


def test_a_graph_without_pairs_for_most_items(tmp_path):
    graph = make_graph(items=30, relations=1, group=2)
    prepared.prepare(tmp_path, graph)
    assert_same(graph, prepared.load(tmp_path, "toy"))


def test_tensorflow_is_not_imported_and_nothing_warns(tmp_path):
    code = f"""
        import sys
        from rcml_jax.data import prepared
        from tests.data.conftest import make_graph
        prepared.prepare({str(tmp_path)!r}, make_graph())
        prepared.load({str(tmp_path)!r}, "toy").images[3].load()
        assert "tensorflow" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_is_built_once(toy, tmp_path):
    builds, lines = [], []

    def build():
        builds.append(1)
        return toy

    for _ in range(2):
        loaded = prepared.load_or_prepare(
            tmp_path, "toy", build, fingerprint="abc", log=lines.append
        )
    assert (len(builds), len(lines)) == (1, 1)
    assert_same(toy, loaded)
    prepared.load_or_prepare(tmp_path, "toy", build, fingerprint="abd", log=lines.append)
    assert len(builds) == 2


def test_a_killed_preparation_is_not_taken_for_whole(toy, tmp_path):
    code = f"""
        import dataclasses, os, signal
        from rcml_jax.data import prepared
        from rcml_jax.data.images import EncodedImages
        from tests.data.conftest import make_graph, png
        def encode(i):
            if i == 40:
                os.kill(os.getpid(), signal.SIGKILL)
            return png(i)
        graph = dataclasses.replace(make_graph(), images=EncodedImages(60, encode))
        prepared.prepare({str(tmp_path)!r}, graph)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.rglob("incomplete.*"))
    assert left
    assert not prepared.is_prepared(tmp_path, "toy")
    with pytest.raises(UserError, match="prepare 'toy' first"):
        prepared.load(tmp_path, "toy")
    os.utime(left[0], (0, 0))  # abandoned long ago
    prepared.prepare(tmp_path, toy)
    assert_same(toy, prepared.load(tmp_path, "toy"))
    assert not left[0].exists()


@pytest.mark.parametrize("file", ["metadata.json", "dataset_info.json", "features.json"])
def test_a_damaged_cache_names_the_folder_to_delete(toy, tmp_path, file):
    folder = prepared.prepare(tmp_path, toy)
    (folder / "graph.npz").unlink()
    (folder / file).write_text("{")
    with pytest.raises(UserError, match="delete that folder") as error:
        prepared.load(tmp_path, "toy")
    assert str(folder) in str(error.value)


def test_damaged_records_name_the_folder_to_delete(toy, tmp_path):
    folder = prepared.prepare(tmp_path, toy)
    records = next(folder.glob("*.array_record*"))
    whole = records.read_bytes()
    records.write_bytes(b"\0" * len(whole))
    loaded = prepared.load(tmp_path, "toy")
    with pytest.raises(UserError, match="delete that folder"):
        loaded.images[0]
    (folder / "graph.npz").unlink()
    with pytest.raises(UserError, match="delete that folder"):
        prepared.load(tmp_path, "toy")
    records.unlink()
    with pytest.raises(UserError, match="delete that folder"):
        prepared.load(tmp_path, "toy")


def test_a_full_or_closed_disk_is_a_user_error(toy, tmp_path):
    def fails(error):
        def encode(index):
            raise error

        graph = make_graph()
        object.__setattr__(graph, "images", EncodedImages(60, encode))
        with pytest.raises(UserError) as raised:
            prepared.prepare(tmp_path, graph)
        return str(raised.value)

    assert "No room is left" in fails(OSError(errno.ENOSPC, "No space left on device"))
    assert "cannot be written" in fails(PermissionError(errno.EACCES, "denied"))
    assert fails(UserError("image 3 is bad")) == "image 3 is bad"
    assert not list(tmp_path.rglob("incomplete.*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepared.prepare(tmp_path / "file", toy)


def test_images_are_read_from_many_threads_and_by_pickled_copies(toy, tmp_path):
    prepared.prepare(tmp_path, toy)
    loaded = prepared.load(tmp_path, "toy").images
    indices = np.random.default_rng(0).integers(60, size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(loaded.encoded, indices)) == [png(i) for i in indices]
    assert pickle.loads(pickle.dumps(loaded)).encoded(9) == png(9)
