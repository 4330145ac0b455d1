"""Embedding a catalogue with a work directory, and what is found to be related in it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.search import catalogue as module
from rcml_jax.search.catalogue import embed_catalogue, open_model
from rcml_jax.search.catalogue import related as find
from rcml_jax.search.embedding_store import open_embeddings
from rcml_jax.search.items import read_items
from tests.cli.test_commands import files
from tests.search.conftest import SENTENCES
from tests.toy import ITEMS, write_rows

# --- Embedding ------------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_methods_tables(model, embedded):
    method, items = model.method, np.arange(ITEMS)
    relations = [method.task.sentences.index(sentence) for sentence in SENTENCES]
    table = method.tables(model.params, items)["relation"]
    image, text = method.own_embeddings(model.params, items)
    for name, own in (("text", text), ("image", image)):
        found = embedded.vectors[name]
        assert isinstance(found, np.memmap)
        assert (found.shape, found.dtype) == ((3, ITEMS, 16), np.float32)
        np.testing.assert_allclose(found[0], own, atol=1e-5)
        np.testing.assert_allclose(found[1:], getattr(table, name)[relations], atol=1e-5)
        assert np.abs(found[1] - found[2]).max() > 0.01
        assert embedded.has[name].all()
    assert embedded.relations == (method.task.graph.intra_relation, *SENTENCES)
    assert embedded.items.ids == method.task.graph.ids
    assert embedded.problems == {
        name: {"count": 0, "first": []} for name in ("unreadable", "empty")
    }


def test_under_a_transfer_guard(runs, embedded, catalogue, tmp_path):
    """As JAX_TRANSFER_GUARD sets it, for all threads: it is for training steps alone."""
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        model = open_model(runs())
        found = embed_catalogue(model, read_items(catalogue), SENTENCES, tmp_path / "e")
        near = find(found, SENTENCES[0], text="kind3 place3", model=model, k=3)
        with model.running():
            result = model.method.evaluate(model.params)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    np.testing.assert_array_equal(found.vectors["text"], embedded.vectors["text"])
    assert len(near) == 3
    assert 0 <= result["retrieval"]["hit@5"]["avg"] <= 1


def test_a_baseline_reads_the_sentence_behind_the_text(runs, catalogue, tmp_path):
    model = open_model(runs("siglip"))
    found = embed_catalogue(model, read_items(catalogue), SENTENCES, tmp_path / "e")
    method, items = model.method, np.arange(ITEMS)
    relations = [method.task.sentences.index(sentence) for sentence in SENTENCES]
    needed = np.ones((len(method.task.sentences), ITEMS), bool)
    tables = method.tables(model.params, items, needed)
    assert found.vectors["text"].shape == (3, ITEMS, 16)
    assert found.vectors["image"].shape == (1, ITEMS, 16)
    np.testing.assert_allclose(found.vectors["text"][:1], tables["plain"].text, atol=1e-5)
    sentence = tables["sentence"].text[relations]
    np.testing.assert_allclose(found.vectors["text"][1:], sentence, atol=1e-5)
    np.testing.assert_allclose(found.vectors["image"], tables["plain"].image, atol=1e-5)
    # The one image is compared under every sentence.
    scores = {s: find(found, s, item="i3", against="image", k=ITEMS)[0].index for s in SENTENCES}
    assert len(scores) == 2
    assert found.under("image", 2).shape == (ITEMS, 16)


def counted(items):
    """The items, and a list of the indices of the images that are read."""
    read = []

    def reading(index):
        read.append(index)
        return items.read(index)

    return dataclasses.replace(items, read=reading), read


def test_an_interrupted_run_goes_on_with_the_next_shard(model, catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 8)
    items, read = counted(read_items(catalogue))
    whole = embed_catalogue(model, items, SENTENCES, tmp_path / "whole", shard=16)
    assert sorted(read) == list(range(ITEMS))
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done == 40:  # in the middle of the third shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_catalogue(model, items, SENTENCES, tmp_path / "cut", shard=16, note=stop)
    assert seen == [(done, ITEMS) for done in (8, 16, 24, 32, 40)]
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["done"] == 2
    with pytest.raises(UserError, match=r"is unfinished \(2 of 4 shards\); start the command"):
        open_embeddings(tmp_path / "cut")
    read.clear()
    embed_catalogue(model, items, SENTENCES, tmp_path / "cut")
    assert sorted(read) == list(range(32, ITEMS))
    for path in whole.directory.iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    # Nothing is left to do.
    read.clear()
    embed_catalogue(model, items, SENTENCES, tmp_path / "cut")
    assert read == []


def test_items_that_lack_something(model, patchy, tmp_path):
    found = embed_catalogue(model, read_items(patchy), SENTENCES, tmp_path / "e", dtype="float16")
    np.testing.assert_array_equal(found.has["text"], [1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(found.has["image"], [1, 0, 1, 0, 0, 0])
    assert found.problems == {
        "unreadable": {"count": 2, "first": ["damaged", "missing"]},
        "empty": {"count": 1, "first": ["nothing"]},
    }
    for name, vectors in found.vectors.items():
        assert vectors.dtype == np.float16
        norms = np.linalg.norm(np.asarray(vectors, np.float32), axis=-1)
        expected = np.broadcast_to(found.has[name], norms.shape).astype(float)
        np.testing.assert_allclose(norms, expected, atol=2e-3)
    # The other modality is what it is alone.
    embedder = model.method.embedder(model.params, SENTENCES)
    alone = embedder.text(["kind2 place2"])[:, 0]
    np.testing.assert_allclose(found.vectors["text"][:, 1], alone, atol=1e-3)
    with pytest.raises(UserError, match=r"the image images/1.png of item 'damaged' cannot be"):
        embed_catalogue(model, read_items(patchy), [], tmp_path / "strict", strict=True)
    write_rows(patchy / "items.jsonl", [{"id": "a", "text": "x"}, {"id": "nothing"}])
    with pytest.raises(UserError, match=r"the item 'nothing' has neither text nor image"):
        embed_catalogue(model, read_items(patchy), [], tmp_path / "strict2", strict=True)
    # A catalogue of texts alone.
    texts = embed_catalogue(model, read_items(patchy), [], tmp_path / "texts")
    assert texts.vectors["image"].shape == (1, 2, 16)
    assert not texts.vectors["image"].any()


def test_sentences_are_embedded_once(model, patchy, tmp_path):
    intra = model.method.task.graph.intra_relation
    given = ["both  kind5 ", "Both kind5", intra, "both place3"]
    found = embed_catalogue(model, read_items(patchy), given, tmp_path / "e")
    assert found.relations == (intra, "both kind5", "both place3")
    with pytest.raises(UserError, match=r"a relation is empty; give a sentence"):
        embed_catalogue(model, read_items(patchy), [" "], tmp_path / "other")


def test_what_belongs_to_another_model_or_other_items_is_refused(
    runs, model, embedded, catalogue, patchy
):
    to, items = embedded.directory, read_items(catalogue)
    before = files(to)
    for arguments, message in (
        ((open_model(runs(seed=1)), items, SENTENCES), "another model"),
        ((open_model(runs("siglip")), items, SENTENCES), "another model"),
        ((model, read_items(patchy), SENTENCES), "other items"),
        ((model, items, SENTENCES[::-1]), "other relations"),
    ):
        with pytest.raises(UserError, match=f"holds embeddings of {message}"):
            embed_catalogue(*arguments, to)
    assert files(to) == before


def test_a_model_that_is_not_finite(model, patchy, tmp_path):
    params = jax.tree.map(lambda p: p * jnp.nan, model.params)
    broken = dataclasses.replace(model, params=params)
    with pytest.raises(UserError, match="text embeddings are not finite; train it anew"):
        embed_catalogue(broken, read_items(patchy), [], tmp_path / "e")


# --- What is related ------------------------------------------------------------------------------


def by_full_sort(embedded, relation, query, names, leave_out=None):
    cosines = [q @ embedded.vectors[name][relation].T for q in query for name in names]
    scores = np.mean(cosines, axis=0)
    order = np.argsort(-scores, kind="stable")
    return [(i, pytest.approx(scores[i], abs=1e-5)) for i in order if i != leave_out]


@pytest.mark.parametrize("against", ["both", "text", "image"])
def test_the_most_related_are_those_of_a_full_sort(model, embedded, catalogue, against):
    names = ("text", "image") if against == "both" else (against,)
    for number, sentence in ((0, None), (2, "both kind5")):
        own = [embedded.vectors[name][number][17] for name in ("text", "image")]
        image = catalogue / "images" / "17.png"
        for given, query, left_out in (
            ({"item": "i17"}, own, 17),
            # Of the item itself: its vectors, but the item is found.
            ({"text": "kind5 place7", "model": model}, own[:1], None),
            ({"image": image, "model": model}, own[1:], None),
        ):
            found = find(embedded, sentence, **given, against=against, k=ITEMS)
            expected = by_full_sort(embedded, number, query, names, left_out)
            assert [(match.index, match.score) for match in found] == expected
            few = find(embedded, sentence, **given, against=against)
            assert few == found[:10]
            assert few[0].id == f"i{few[0].index}"
            assert few[0].text == embedded.items.texts[few[0].index]


def test_a_query_finds_what_has_a_vector_only(model, patchy, tmp_path):
    found = embed_catalogue(model, read_items(patchy), SENTENCES, tmp_path / "e")
    ids = lambda **options: [match.id for match in find(found, SENTENCES[0], **options)]  # noqa: E731
    assert sorted(ids(item="whole")) == ["damaged", "view", "words"]
    assert sorted(ids(item="whole", against="image")) == ["view"]
    assert sorted(ids(text="kind1", model=model, against="image")) == ["view", "whole"]
    score = find(found, SENTENCES[0], item="whole", against="image")[0].score
    text, image = (found.vectors[name][1] for name in ("text", "image"))
    assert score == pytest.approx((text[0] + image[0]) @ image[2] / 2, abs=1e-6)
    with pytest.raises(UserError, match=r"the item 'nothing' has no embedding: no text and no"):
        ids(item="nothing")
    write_rows(patchy / "items.jsonl", [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}])
    texts = embed_catalogue(model, read_items(patchy), [], tmp_path / "texts")
    with pytest.raises(UserError, match=r"holds no other item with image"):
        find(texts, item="a", against="image")


def test_sentences_and_items_that_are_not_there(embedded):
    assert [m.id for m in find(embedded, " BOTH  kind5", item="i1")] == [
        m.id for m in find(embedded, "both kind5", item="i1")
    ]
    with pytest.raises(UserError) as error:
        find(embedded, "both kind6", item="i1")
    assert "was not embedded under 'both kind6'; embed it anew" in str(error.value)
    assert all(repr(sentence) in str(error.value) for sentence in embedded.relations)
    with pytest.raises(UserError, match=r"has no item 'I17'; did you mean 'i17'"):
        find(embedded, item="I17")
    with pytest.raises(UserError, match=r"has no item '&'; see its items.jsonl"):
        find(embedded, item="&")


def test_queries_that_cannot_be(runs, model, embedded, tmp_path):
    other = open_model(runs(seed=1))
    (tmp_path / "no.png").write_bytes(b"no image")
    for options, message in (
        ({"item": "i1", "k": 0}, "k is 0; it must be at least 1"),
        ({"item": "i1", "against": "sound"}, "against='sound' is unknown"),
        ({}, "give one of an item, a text and an image"),
        ({"item": "i1", "text": "x"}, "give one of an item, a text and an image"),
        ({"text": "x"}, "with the catalogue's model only"),
        ({"text": " ", "model": model}, "the text is empty"),
        ({"text": "x", "model": other}, "was embedded by another model"),
        ({"image": tmp_path / "nowhere.png", "model": model}, "No such file"),
        ({"image": tmp_path / "no.png", "model": model}, "no.png cannot be read (no JPEG"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            find(embedded, **options)


def test_changed_images_and_texts_are_embedded_anew(model, patchy, tmp_path, capsys):
    to = tmp_path / "e"
    before = embed_catalogue(model, read_items(patchy), SENTENCES, to)
    before = {name: np.array(x) for name, x in before.vectors.items()}
    capsys.readouterr()
    embed_catalogue(model, read_items(patchy), SENTENCES, to)
    assert "changed" not in capsys.readouterr().err
    (patchy / "images" / "13.png").write_bytes((patchy / "images" / "20.png").read_bytes())
    after = embed_catalogue(model, read_items(patchy), SENTENCES, to)
    assert "1 of 6 items changed since the last embedding" in capsys.readouterr().err
    anew = embed_catalogue(model, read_items(patchy), SENTENCES, tmp_path / "anew")
    for name, vectors in after.vectors.items():
        np.testing.assert_allclose(vectors, anew.vectors[name], atol=1e-5)
        np.testing.assert_array_equal(vectors[:, 1:], before[name][:, 1:])
    assert np.abs(after.vectors["image"][:, 0] - before["image"][:, 0]).max() > 1e-3


def test_arguments_that_are_no_text(model, embedded, patchy, tmp_path):
    with pytest.raises(UserError, match="is not UTF-8 text"):
        embed_catalogue(model, read_items(patchy), ["caf\udce9"], tmp_path / "other")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        find(embedded, text="caf\udce9", model=model)
