"""Work directories, a catalogue that one of them embedded, and a table of items with flaws."""

import shutil

import pytest

from rcml_jax.search.catalogue import Searcher, embed_catalogue, open_model
from rcml_jax.search.explorer import Explorer
from rcml_jax.search.items import read_items
from tests.toy import write_rows
from tests.toy_run import make_run

SENTENCES = ["both place3", "both kind5"]
#: A sentence that nothing was embedded under.
NEW = "things that somebody would take to the seaside"


@pytest.fixture(scope="session")
def runs(catalogue, tmp_path_factory):
    """A work directory of each method, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(method="rcml", seed=0):
        key = f"{method}{seed}"
        if key not in made:
            made[key] = make_run(catalogue, folder / key, seed=seed, method=method)
        return made[key]

    return get


@pytest.fixture(scope="session")
def model(runs):
    return open_model(runs())


@pytest.fixture(scope="session")
def embedded(model, catalogue, tmp_path_factory):
    """The catalogue under two sentences."""
    to = tmp_path_factory.mktemp("embedded") / "e"
    return embed_catalogue(model, read_items(catalogue), SENTENCES, to)


@pytest.fixture
def patchy(tmp_path, catalogue):
    """A table of six items: whole, no image, no text, a damaged one, a missing one, nothing."""
    shutil.copytree(catalogue / "images", tmp_path / "patchy" / "images")
    folder = tmp_path / "patchy"
    (folder / "images" / "1.png").write_bytes(b"no image")
    rows = [
        {"id": "whole", "text": "kind1 place1", "image": "images/13.png"},
        {"id": "words", "text": "kind2 place2"},
        {"id": "view", "image": "images/14.png"},
        {"id": "damaged", "text": "kind4 <b>&amp; \x1b[31m", "image": "images/1.png"},
        {"id": "missing", "image": "images/nowhere.png"},
        {"id": "nothing"},
    ]
    write_rows(folder / "items.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def explorer(model, catalogue, tmp_path_factory):
    """An explorer of the catalogue with its token states."""
    items = read_items(catalogue)
    to = tmp_path_factory.mktemp("explored") / "e"
    found = embed_catalogue(model, items, SENTENCES, to, tokens="float16")
    return Explorer(Searcher(found, model), found.items.read)
