"""Token states on disk: pooled under a new sentence they give what embedding under it gives."""

import json
import shutil

import jax
import numpy as np
import pytest

from rcml_jax.cli import embed, search
from rcml_jax.errors import UserError
from rcml_jax.search import catalogue as module
from rcml_jax.search import token_store
from rcml_jax.search.catalogue import Searcher, embed_catalogue, open_model
from rcml_jax.search.embedding_store import open_embeddings
from rcml_jax.search.items import read_items
from rcml_jax.search.token_store import open_tokens, plan_tokens, quantize
from tests.cli.test_commands import fails, files, run
from tests.search.conftest import SENTENCES
from tests.toy import ITEMS, write_rows

NEW = "things that somebody would take to the seaside"
KEPT = ["both place3"]


@pytest.fixture(scope="module")
def kept(model, catalogue, tmp_path_factory):
    """The catalogue with its token states, by their type."""
    folder = tmp_path_factory.mktemp("kept")
    items = read_items(catalogue)
    return {
        dtype: embed_catalogue(model, items, KEPT, folder / dtype, tokens=dtype, shard=25)
        for dtype in ("float16", "int8")
    }


@pytest.fixture(scope="module")
def anew(model, catalogue, tmp_path_factory):
    """The catalogue embedded under the sentence that is new to the others."""
    to = tmp_path_factory.mktemp("anew") / "e"
    return embed_catalogue(model, read_items(catalogue), [NEW], to)


def test_float16_gives_the_embeddings_of_the_sentence(model, kept, anew):
    found = Searcher(kept["float16"], model).vectors(NEW)
    for name, vectors in found.items():
        expected = anew.under(name, 1)
        assert np.abs(vectors - expected).max() <= 1e-3
        # The sentence has a say, so that the other ones' embeddings would not do.
        assert np.abs(kept["float16"].under(name, 1) - expected).max() > 1e-2
        assert np.abs(kept["float16"].under(name, 0) - expected).max() > 1e-2


def test_int8_finds_the_same_items(model, kept, anew):
    shares = []
    for i in range(ITEMS):
        item, k = f"i{i}", 10
        expected = {m.index for m in Searcher(anew).search(NEW, item=item, k=k)}
        found = {m.index for m in Searcher(kept["int8"], model).search(NEW, item=item, k=k)}
        shares.append(len(expected & found) / k)
        if i == 0:
            searcher = Searcher(kept["int8"], model)
            assert np.abs(searcher.vectors(NEW)["text"] - anew.under("text", 1)).max() < 0.05
    assert np.mean(shares) >= 0.95


def test_the_embeddings_beside_the_states_are_the_same(model, kept, catalogue, tmp_path):
    plain = embed_catalogue(model, read_items(catalogue), KEPT, tmp_path / "e")
    for name in ("text", "image"):
        np.testing.assert_allclose(kept["int8"].vectors[name], plain.vectors[name], atol=1e-5)
    assert plain.tokens is None
    with pytest.raises(UserError, match=r"was not embedded under .* or with --tokens, or choose"):
        Searcher(plain, model).vectors(NEW)


def test_texts_and_images_ask_under_a_new_sentence(model, kept, anew, catalogue):
    searcher, known = Searcher(kept["float16"], model), Searcher(anew, model)
    image = catalogue / "images" / "17.png"
    for query in ({"text": "kind5 place7"}, {"image": image}, {"item": "i17"}):
        for against in ("both", "image"):
            found = searcher.search(NEW, **query, against=against, k=ITEMS)
            expected = known.search(NEW, **query, against=against, k=ITEMS)
            scores = {match.id: match.score for match in expected}
            assert [scores[m.id] for m in found] == pytest.approx(
                [m.score for m in found], abs=2e-3
            )
            assert {m.id for m in found} == scores.keys()


def test_a_block_and_its_rest(model, kept, anew, monkeypatch):
    """Several blocks, whose last begins earlier, and rows that are no neighbours."""
    searcher = Searcher(kept["float16"], model)
    whole = searcher.vectors(NEW)
    monkeypatch.setattr(token_store, "_ROWS", 8)
    monkeypatch.setattr(token_store, "_ROWS_IN_CACHE", 4)
    parts = Searcher(kept["float16"], model).vectors(NEW)
    items = np.array([50, 3, 3, 17, 42, 8, 9, 10, 0, 59])
    some = searcher._pool(NEW, items)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-6)
        np.testing.assert_allclose(some[name], whole[name][items], atol=1e-6)


def test_vectors_of_the_last_sentences_are_kept(model, kept, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_SENTENCES", 2)
    searcher = Searcher(kept["float16"], model)
    first = searcher.vectors(NEW)
    searcher.vectors("a second one")
    assert searcher.vectors(f" {NEW.upper()}") is first
    searcher.vectors("a third one")
    assert searcher.vectors(NEW) is first
    assert searcher.vectors("a second one") is not None
    assert len(searcher._pooled) == 2


# --- Candidates -----------------------------------------------------------------------------------


def test_all_items_as_candidates_are_the_exact_search(model, kept):
    searcher = Searcher(kept["int8"], model)
    for query in ({"item": "i17"}, {"text": "kind5 place7"}):
        exact = searcher.search(NEW, **query, k=12)
        found = searcher.search(NEW, **query, k=12, candidates=ITEMS)
        assert [m.id for m in found] == [m.id for m in exact]
        assert [m.score for m in found] == pytest.approx([m.score for m in exact], abs=1e-6)
    assert searcher.recall(NEW, k=5, candidates=ITEMS, queries=7) == (1.0, 7)


def test_few_candidates_are_those_of_the_nearest_known_sentence(model, kept):
    searcher = Searcher(kept["float16"], model)
    states = model.method.token_reader(model.params).relations([*kept["float16"].relations, NEW])
    states = np.asarray(states / np.linalg.norm(states, axis=1, keepdims=True))
    nearest = int(np.argmax(states[:-1] @ states[-1]))
    assert searcher.nearest_known(NEW) == nearest
    assert searcher.nearest_known(KEPT[0]) == 1
    known = kept["float16"].relations[nearest]
    candidates = {m.index for m in searcher.search(known, item="i17", k=12)}
    exact = [m for m in searcher.search(NEW, item="i17", k=ITEMS) if m.index in candidates]
    found = searcher.search(NEW, item="i17", k=10, candidates=12)
    assert [m.id for m in found] == [m.id for m in exact[:10]]
    share, asked = searcher.recall(NEW, k=10, candidates=12, queries=ITEMS)
    assert asked == ITEMS
    assert 0.2 < share < 1


# --- What is kept, and what is refused ------------------------------------------------------------


def test_items_that_lack_something(model, patchy, tmp_path):
    found = embed_catalogue(model, read_items(patchy), [], tmp_path / "e", tokens="float16")
    tokens = open_tokens(found)
    np.testing.assert_array_equal(tokens.places["text"][:, 2] > 0, found.has["text"])
    np.testing.assert_array_equal(tokens.places["image"][:, 2] > 0, found.has["image"])
    vectors = Searcher(found, model).vectors(NEW)
    for name, has in found.has.items():
        norms = np.linalg.norm(vectors[name], axis=1)
        np.testing.assert_allclose(norms, has.astype(float), atol=1e-5)
    expected = model.method.embedder(model.params, [NEW]).text(["kind2 place2"])[1, 0]
    np.testing.assert_allclose(vectors["text"][1], expected, atol=1e-3)


def test_the_size_on_disk_is_told_before(model, catalogue, tmp_path, capsys, monkeypatch):
    items = read_items(catalogue)
    layout = plan_tokens(model.method.token_reader(model.params), items, "int8")
    to = tmp_path / "e"
    monkeypatch.setattr(module, "_size", lambda count: f"{count} bytes")
    embed_catalogue(model, items, [], to, tokens="int8")
    assert f"token states (int8) of 60 items: {layout.bytes} bytes" in capsys.readouterr().err
    kinds = ("states_", "scales_", "tokens_")
    sizes = [np.load(p).nbytes for p in to.iterdir() if p.name.startswith(kinds)]
    assert sum(sizes) == layout.bytes
    room = layout.bytes - 1
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=room))
    with pytest.raises(UserError, match=r"no room in .* or without --tokens"):
        embed_catalogue(model, items, [], tmp_path / "full", tokens="int8")


def test_an_interrupted_run_goes_on(model, catalogue, kept, tmp_path):
    def stop(done, _):
        if done == 50:
            raise KeyboardInterrupt

    to, items = tmp_path / "e", read_items(catalogue)
    with pytest.raises(KeyboardInterrupt):
        embed_catalogue(model, items, KEPT, to, tokens="int8", shard=25, note=stop)
    with pytest.raises(UserError, match="is unfinished"):
        open_embeddings(to)
    embed_catalogue(model, items, KEPT, to, tokens="int8")
    for path in kept["int8"].directory.iterdir():
        assert path.read_bytes() == (to / path.name).read_bytes(), path.name


def test_changed_items_are_written_anew_where_they_have_room(model, patchy, tmp_path):
    rows = [json.loads(line) for line in (patchy / "items.jsonl").read_text().splitlines()]
    to = tmp_path / "e"
    embed_catalogue(model, read_items(patchy), [], to, tokens="float16")
    rows[1]["text"] = "kind9 place2"
    write_rows(patchy / "items.jsonl", rows)
    found = embed_catalogue(model, read_items(patchy), [], to, tokens="float16")
    other = embed_catalogue(model, read_items(patchy), [], tmp_path / "other", tokens="float16")
    for name, vectors in Searcher(found, model).vectors(NEW).items():
        expected = Searcher(other, model).vectors(NEW)[name]
        # Of states that were rounded to float16 once in a chunk of one, once of six.
        np.testing.assert_allclose(vectors, expected, atol=1e-4)
    rows[1]["text"] = "many words " * 5
    write_rows(patchy / "items.jsonl", rows)
    with pytest.raises(UserError, match=r"the text of item 'words' has grown .* another directory"):
        embed_catalogue(model, read_items(patchy), [], to, tokens="float16")


def test_stores_that_do_not_fit(runs, model, kept, embedded, catalogue, tmp_path):
    items, to = read_items(catalogue), kept["int8"].directory
    before = files(to)
    for tokens, theirs in (("", "int8"), ("float16", "int8")):
        with pytest.raises(UserError, match=f"embeddings of the option --tokens {theirs}"):
            embed_catalogue(model, items, KEPT, to, tokens=tokens)
    with pytest.raises(UserError, match="holds embeddings of the option --tokens left out"):
        embed_catalogue(model, items, SENTENCES, embedded.directory, tokens="int8")
    assert files(to) == before
    with pytest.raises(UserError, match="type 'int4' of token states is unknown"):
        embed_catalogue(model, items, [], tmp_path / "e", tokens="int4")
    with pytest.raises(UserError, match="method 'siglip' pools no tokens"):
        embed_catalogue(open_model(runs("siglip")), items, [], tmp_path / "e", tokens="int8")
    assert not (tmp_path / "e").exists() or {p.name for p in files(tmp_path / "e")} <= {".lock"}
    with pytest.raises(UserError, match="was embedded by another model"):
        Searcher(kept["int8"], open_model(runs(seed=1)))
    with pytest.raises(UserError, match="is new and needs the model"):
        Searcher(kept["int8"]).search(NEW, item="i1")
    # A store from before there were token states.
    older = shutil.copytree(embedded.directory, tmp_path / "older")
    manifest = json.loads((older / "manifest.json").read_text())
    del manifest["tokens"]
    (older / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="keeps no token states; embed anew with --tokens"):
        open_tokens(open_embeddings(older))
    damaged = shutil.copytree(to, tmp_path / "damaged")
    path = next(damaged.glob("states_text_*.npy"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"states_text_.*is damaged"):
        open_tokens(open_embeddings(damaged))
    path.unlink()
    with pytest.raises(UserError, match=r"states_text_.*is damaged"):
        open_tokens(open_embeddings(damaged))


def test_sentences_that_cannot_be(model, kept):
    searcher = Searcher(kept["int8"], model)
    for sentence, message in (
        ("", "the relation is empty"),
        (" \n", "the relation is empty"),
        ("word " * 10_000, "the relation has 50,000 characters; give a sentence of at most 2,000"),
        ("half \ud800", "is not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=message) as error:
            searcher.search(sentence, item="i1")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="5 candidates are too few for k=10"):
        searcher.search(NEW, item="i1", candidates=5)


def test_states_that_float16_cannot_hold(model, catalogue, tmp_path):
    items = read_items(catalogue)
    params = jax.tree.map(lambda p: p, model.params)
    kernel = params["towers"]["text_projection"]["kernel"]
    params["towers"]["text_projection"]["kernel"] = kernel * 1e7
    large = module.dataclasses.replace(model, params=params)
    with pytest.raises(UserError, match=r"the text states are too large for float16"):
        embed_catalogue(large, items, [], tmp_path / "e", tokens="float16")
    embed_catalogue(large, items, [], tmp_path / "int8", tokens="int8")


def test_quantize_is_within_half_a_step():
    states = np.random.default_rng(0).normal(size=(3, 4, 32)).astype(np.float32)
    states[0, 0] = 0
    values, scales = quantize(states, "int8")
    assert (values.dtype, scales.shape) == (np.int8, (3, 4))
    error = np.abs(values * scales[..., None] - states)
    assert (error <= scales[..., None] / 2 + 1e-6).all()
    assert np.abs(values[1:]).max(axis=-1).min() == 127


def test_the_commands(runs, catalogue, tmp_path, capsys):
    to, workdir = tmp_path / "e", runs()
    args = ["--workdir", workdir, "--items", catalogue, "--to", to, "--tokens"]
    status, out, err = run(embed.main, args, capsys)
    assert status == 0, err
    assert "float32; token states, float16" in out
    asked = ["--embeddings", to, "--item=i17", "--k=5", "--relation", NEW]
    status, out, err = run(search.main, [*asked, "--candidates=60", "--recall"], capsys)
    assert (status, err) == (0, "")
    expected = Searcher(open_embeddings(to), open_model(workdir)).search(NEW, item="i17", k=5)
    for match in expected:
        assert match.text in out
    assert "recall@5 of 60 candidates against the exact search: 1.000 (20 items asked)" in out
    fails(search.main, [*asked, "--recall"], capsys, "--recall needs --candidates")
    fails(search.main, [*asked[:3], "--relation=", "--k=5"], capsys, "the relation is empty")
    args = ["--workdir", workdir, "--to", tmp_path / "f", "--tokens=int4"]
    fails(embed.main, args, capsys, "--tokens", "float16")
