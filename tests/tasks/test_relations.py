"""What a relation task says of its texts, and where it takes relations for one."""

import dataclasses
import multiprocessing
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rcml_jax.data.images import ImageBank
from rcml_jax.data.sampling import batch_iterator
from rcml_jax.data.tokenizer import train_tokenizer
from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.tasks.relations import (
    RelationTask,
    cache_directory,
    load_graph,
    load_source,
    tell_cut_texts,
    tell_sentences_apart,
)
from tests.data.conftest import make_graph
from tests.toy import tiny_config, write_rows

WORDS = [f"word{i}" for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 20, 400)


@pytest.fixture
def graph():
    graph = make_graph(items=30, relations=4, group=5)
    start = " ".join(WORDS)
    sentences = (f"{start} red", "short", f"{start} blue", f"{start} {start}")
    return dataclasses.replace(graph, relations=sentences, relation_ids=("a", "b", "c", "d"))


def test_sentences_that_differ_behind_the_last_token_are_one(graph, tokenizer, capsys):
    longest = int(tokenizer.lengths(graph.relations).max())
    assert tell_sentences_apart(graph, tokenizer, longest, strict=True, tell=True) is graph
    limit = int(tokenizer.lengths([" ".join(WORDS)])[0])
    found = tell_sentences_apart(graph, tokenizer, limit, strict=False, tell=True)
    np.testing.assert_array_equal(found.same_sentence, [0, 1, 0, 0])
    said = capsys.readouterr().err
    assert f"1 group of relations has the same first {limit} tokens" in said
    assert "('a', 'c', 'd')" in said
    tell_sentences_apart(graph, tokenizer, limit, strict=False, tell=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"'a', 'c', 'd'.*set config\.data\.strict=False"):
        tell_sentences_apart(graph, tokenizer, limit, strict=True, tell=True)


def test_texts_that_are_cut_are_counted(tokenizer, capsys):
    texts = [" ".join(WORDS[:n]) for n in (1, 2, 10, 12)]
    lengths = tokenizer.lengths(texts)
    for text, length in zip(texts, lengths, strict=True):
        assert tokenizer.encode([text], 1000)[1].sum() == length
    limit = int(lengths[1])
    tell_cut_texts(texts, tokenizer, limit)
    median, most = int(np.median(lengths[2:] - limit)), int(lengths[3] - limit)
    said = capsys.readouterr().err
    assert f"2 of 4 texts are cut, behind the {limit} tokens" in said
    assert f"{median} tokens in the median, {most} at most" in said
    tell_cut_texts(texts, tokenizer, 1000)
    assert capsys.readouterr().err == ""


def test_relation_ids_of_one_sentence_link_the_same_pairs(catalogue, tmp_path):
    folder = shutil.copytree(catalogue, tmp_path / "copy")
    path = next(folder.glob("relations.*"))
    config = tiny_config(folder, method="rcml")
    known = load_graph(config.data)
    assert known.same_sentence is None
    ids = known.relation_ids
    relations = [
        {"id": key, "sentence": "They  agree." if n < 2 else f"sentence {n}"}
        for n, key in enumerate(ids)
    ]
    path.unlink()
    write_rows(folder / "relations.jsonl", relations)
    graph = load_graph(config.data)
    np.testing.assert_array_equal(graph.same_sentence[:3], [0, 0, 2])
    a, b, _ = graph.pairs[graph.pairs[:, 2] == 0].T
    assert graph.linked(a, b, np.full(len(a), 1)).all()


@pytest.mark.parametrize("stored_in_the_past", [False, True])
def test_batches_are_the_same_from_stored_and_from_encoded_images(
    catalogue, tmp_path, stored_in_the_past, monkeypatch
):
    options = {"batch.image_shift": 3, "batch.image_flip": True, "data.dir": str(tmp_path / "c")}
    batches = []
    for pixels in ("encoded", *["stored"] * (1 + stored_in_the_past)):
        if len(batches) == 2:
            monkeypatch.setattr("rcml_jax.data.images.to_array", None)
        config = tiny_config(catalogue, **options | {"data.pixels": pixels})
        data = RelationTask.load(config, tmp_path).batches()
        batches.append([next(data) for _ in range(3)])
    assert len(list((tmp_path / "c" / "pixels").glob("*.npy"))) == 1
    expected, found = batches[0], batches[-1]
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert not np.array_equal(found[0]["items"]["images"], found[1]["items"]["images"])


def halves(batches, count, split=()):
    """The batches of two processes that share each batch, `batches(local_rows)`, put together.

    split: arrays of `shared` of which each has the columns of its items alone.
    """
    parts = []
    for process in range(2):
        mine = lambda n, process=process: np.arange(n // 2) + process * (n // 2)  # noqa: E731
        data = batches(mine)
        parts.append([next(data) for _ in range(count)])
    joined = []
    for first, second in zip(*parts, strict=True):
        shared = [batch["shared"] for batch in (first, second)]
        columns = {name: np.concatenate([x.pop(name) for x in shared], axis=-1) for name in split}
        jax.tree.map(np.testing.assert_array_equal, *shared)
        items = jax.tree.map(lambda *x: np.concatenate(x), first["items"], second["items"])
        joined.append({"items": items, "shared": shared[0] | columns})
    return joined


@pytest.mark.parametrize("negatives", ["unrelated", "unlinked"])
@pytest.mark.parametrize("split", [(), ("related",)])
@pytest.mark.parametrize("texts_per_row", [1, 4])
def test_processes_read_halves_of_the_same_batch(
    catalogue, tmp_path, monkeypatch, texts_per_row, split, negatives
):
    options = {"batch.image_shift": 3, "batch.image_flip": True, "data.pixels": "encoded"}
    options |= {"batch.texts_per_row": texts_per_row, "data.threads": 0}
    options["loss.negatives"] = negatives
    method = build(tiny_config(catalogue, **options), tmp_path)
    method.split_shared = split
    data = method.batches()
    whole = [next(data) for _ in range(3)]
    asked = []
    read = ImageBank.__call__
    monkeypatch.setattr(
        ImageBank, "__call__", lambda bank, items: asked.append(len(items)) or read(bank, items)
    )
    found = halves(method.batches, 3, split)
    jax.tree.map(np.testing.assert_array_equal, whole, found)
    assert found[0]["shared"]["related"].shape[-2:] == (16, 16)
    assert set(asked) == {8}
    assert len(jax.tree.leaves(found[0]["items"]["images"])[0]) == 16 // texts_per_row


def test_workers_read_the_same_batches_and_go_on_where_threads_were(catalogue, tmp_path):
    options = {"data.pixels": "encoded", "batch.sentence_noise": 0.1, "batch.image_shift": 2}
    read = {
        workers: build(tiny_config(catalogue, **options | {"data.workers": workers}), tmp_path)
        for workers in (0, 2)
    }
    threads, workers = (method.batches() for method in read.values())
    expected = [next(threads) for _ in range(4)]
    workers.set_state({"next_index": 1})
    # As the loop does: the first batch is read for its shapes, and again.
    first = next(workers)
    pids = {child.pid for child in multiprocessing.active_children()}
    assert len(pids) >= 2
    workers.set_state({"next_index": 1})
    found = [next(workers) for _ in range(2)]
    assert {child.pid for child in multiprocessing.active_children()} == pids
    jax.tree.map(np.testing.assert_array_equal, [first, *found], expected[1:2] + expected[1:3])
    # Threads go on with the state of workers, and the other way round.
    assert workers.get_state() == {"next_index": 3}
    threads.set_state(workers.get_state())
    workers.close()
    jax.tree.map(np.testing.assert_array_equal, expected[3], next(threads))


def test_workers_are_started_anew_elsewhere_and_tell_what_is_wrong_as_it_is():
    batches = batch_iterator(range(9), refuse, workers=1)
    np.testing.assert_array_equal(next(batches), 0)
    with pytest.raises(UserError, match="the second one"):
        next(batches)
    batches.set_state({"next_index": 7})
    np.testing.assert_array_equal([next(batches), next(batches)], [7, 8])
    batches.close()


def refuse(index):
    if index == 1:
        raise UserError("the second one")
    return np.asarray(index)


def remember(data, cache):
    """A data source that returns the directory of the cache that it was given."""
    return cache


def test_without_a_home_directory_every_store_is_in_one_place(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    data = ConfigDict({"name": "toy", "dir": ""})
    known = {"toy": f"{__name__}:remember"}
    found = load_source(data, known, pathlib.Path, tmp_path / "run")
    assert found == tmp_path / "rcml_jax_cache" == cache_directory("", tmp_path / "run")
    # One line, however many stores there are.
    assert capsys.readouterr().err.count("No home directory is known") == 1
    data.dir = str(tmp_path)
    assert load_source(data, known, pathlib.Path, tmp_path / "run") == tmp_path
    assert capsys.readouterr().err == ""
