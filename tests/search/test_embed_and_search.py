"""rcml-embed and rcml-search: from a table of items to a page, and what they refuse."""

import json
import re
import shutil
from html.parser import HTMLParser

from rcml_jax.cli import embed, search
from rcml_jax.search.catalogue import related as find
from rcml_jax.search.embedding_store import open_embeddings
from tests.cli.test_commands import fails, files, run
from tests.search.conftest import SENTENCES


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def check_page(path, cards, images):
    """One file with nothing from elsewhere."""
    page, source = Page(path), path.read_text("utf-8")
    assert page.open == []
    assert len(page.all("li")) == cards
    assert len(page.all("img")) == images
    for image in page.all("img"):
        assert image["src"].startswith("data:image/jpeg;base64,")
        assert image["alt"]
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "form", "a"}
    assert not any(
        name.startswith("on") or name in ("href", "srcset")
        for _, attributes in page.elements
        for name in attributes
    )
    assert "://" not in source
    assert "url(" not in source
    assert "@import" not in source
    assert any("width=device-width" in meta.get("content", "") for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in source
    return page


def test_from_a_table_to_a_page(runs, catalogue, tmp_path, capsys):
    to, html = tmp_path / "e", tmp_path / "page.html"
    args = ["--workdir", runs(), "--items", catalogue / "items.jsonl", "--to", to]
    args += [f"--relation={SENTENCES[0]}", "--relation", SENTENCES[1], "--shard=30"]
    status, out, err = run(embed.main, args, capsys)
    assert status == 0, err
    assert out == f"{to}: text (3, 60, 16), image (3, 60, 16), float32\n"
    assert err.splitlines()[-1].startswith("60 of 60 items")
    assert "warning" not in err
    before = files(to)
    assert run(embed.main, args, capsys)[0] == 0
    assert files(to) == before

    asked = ["--embeddings", to, "--relation", SENTENCES[1], "--k", 4, "--html", html]
    found = find(open_embeddings(to), SENTENCES[1], item="i17", k=4)
    status, out, err = run(search.main, [*asked, "--item=i17"], capsys)
    assert (status, err) == (0, "")
    rows = [line for line in out.splitlines() if re.search(r" i\d+ ", line)]
    for row, match in zip(rows, found, strict=True):
        assert f"{match.score:.3f}" in row
        assert match.id in row
        assert match.text in row
    page = check_page(html, cards=4, images=5)
    words = " ".join(page.words)
    places = [words.index(f" {match.id} ") for match in found]
    assert places == sorted(places)
    assert "i17" in words
    assert SENTENCES[1] in words

    image = catalogue / "images" / "17.png"
    status, _, err = run(search.main, [*asked, "--image", image], capsys)
    assert status == 0, err
    check_page(html, cards=4, images=5)
    options = ["--text", "kind5 place7", "--workdir", runs(), "--against=image"]
    status, _, err = run(search.main, [*asked, *options], capsys)
    assert status == 0, err
    check_page(html, cards=4, images=4)


def test_texts_that_are_markup_and_images_that_are_gone(runs, patchy, tmp_path, capsys):
    to, html = tmp_path / "e", tmp_path / "page.html"
    args = ["--workdir", runs(), "--items", patchy, "--to", to, "--dtype", "float16"]
    args += ["--relation", "<i>both</i> [red]kind5"]
    status, out, err = run(embed.main, args, capsys)
    assert status == 0
    assert "float16" in out
    assert "warning: images that cannot be read, left out: 2 (damaged, missing)" in err
    assert "warning: items with neither text nor image: 1 (nothing)" in err
    # What was embedded may be gone when it is shown.
    (patchy / "images" / "13.png").unlink()
    args = ["--embeddings", to, "--item", "words", "--html", html]
    args += ["--relation", "<i>both</i> [red]kind5"]
    status, out, err = run(search.main, args, capsys)
    assert status == 0, err
    assert "<i>both</i> [red]kind5" in out
    assert "kind4 <b>&amp;" in out
    assert "\x1b" not in out
    page = check_page(html, cards=3, images=1)
    assert "kind4 <b>&amp; \x1b[31m" in page.words
    assert not page.all("b") + page.all("i")
    # Each of the others has a frame that says so.
    assert page.words.count("no image") == 3


def test_the_items_of_the_runs_own_data(runs, tmp_path, capsys):
    to, html = tmp_path / "e", tmp_path / "page.html"
    args = ["--workdir", runs(), "--to", to, "--relation", SENTENCES[0]]
    status, out, err = run(embed.main, args, capsys)
    assert status == 0, err
    assert "text (2, 60, 16)" in out
    args = ["--embeddings", to, "--item=i17", "--html", html]
    status, out, err = run(search.main, args, capsys)
    assert status == 0, err
    check_page(html, cards=10, images=11)
    found = find(open_embeddings(to), item="i17")
    assert [match.id in out for match in found] == [True] * 10


def test_wrong_embed_commands(runs, catalogue, patchy, tmp_path, capsys):
    to = tmp_path / "e"
    good = {"--workdir": runs(), "--items": catalogue, "--to": to}

    def wrong(*parts, more=(), **changes):
        values = good | {f"--{name}": value for name, value in changes.items()}
        args = [f"{name}={value}" for name, value in values.items() if value is not None]
        fails(embed.main, [*args, *more], capsys, *parts)
        assert not to.exists() or {path.name for path in files(to)} <= {".lock"}

    wrong("arguments are required: --workdir", workdir=None)
    wrong("arguments are required: --to", to=None)
    wrong("holds no config.json", workdir=tmp_path)
    wrong("there is no", "give a folder", items=tmp_path / "nowhere")
    wrong("--dtype", "float16", dtype="int8")
    wrong("--shard", shard="many")
    wrong("a shard of 0 items", shard=0)
    wrong("a relation is empty", relation=" ")
    wrong("unknown argument 'surplus'", more=["surplus"])
    wrong("wrong option", "relatoin", more=["--relatoin=x"])
    wrong("--config.model.beta would make another model", more=["--config.model.beta=1"])
    wrong("config.devices=-1", "8 devices", more=["--config.devices=-1"])
    wrong("config.devices=9", "8 devices", more=["--config.devices", "9"])
    args = ["--workdir", runs(), "--items", patchy, "--to", tmp_path / "strict", "--strict"]
    fails(embed.main, args, capsys, "images/1.png of item 'damaged'", "leave strict off")
    trained = tmp_path / "m3col"
    shutil.copytree(runs(), trained)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"method": "m3col"}))
    wrong("config.method='m3col' is unknown", "rcml, clip, siglip, unicl", workdir=trained)
    config["model"]["width"] = 8
    (trained / "config.json").write_text(json.dumps(config))
    wrong("checkpoint of another model", workdir=trained)
    shutil.rmtree(trained / "checkpoints")
    wrong("holds no checkpoints", workdir=trained)


def test_wrong_related_commands(runs, embedded, tmp_path, capsys):
    to, html = embedded.directory, tmp_path / "page.html"

    def wrong(args, *parts, embeddings=to):
        given = ["--embeddings", embeddings, "--html", html]
        fails(search.main, [*given, *args], capsys, *parts)
        assert not html.exists()

    wrong([], "one of the arguments --item --image --text is required")
    wrong(["--item=i1", "--text=x"], "--text: not allowed with argument --item")
    wrong(["--item=i99"], "has no item 'i99'; did you mean")
    wrong(["--item=i1", "--relation=both kind6"], "was not embedded under 'both kind6'")
    wrong(["--item=i1", "--k=0"], "k is 0; it must be at least 1")
    wrong(["--item=i1", "--k=few"], "--k: invalid int value: 'few'")
    wrong(["--item=i1", "--against=sound"], "--against")
    wrong(["--item=i1", "--htlm=x"], "wrong option", "htlm")
    wrong(["--image", tmp_path / "nowhere.png"], "nowhere.png cannot be read", "No such file")
    wrong(["--text="], "the text is empty")
    wrong(["--text=x", "--workdir", runs(seed=1)], "was embedded by another model")
    wrong(["--text=x", "--workdir", tmp_path], "holds no config.json")
    wrong(["--item=i1"], "holds no manifest.json", embeddings=tmp_path)
    args = ["--embeddings", to, "--item=i1", "--html", tmp_path / "no" / "page.html"]
    assert run(search.main, args, capsys)[0] == 2
