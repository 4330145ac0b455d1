"""What the explorer shows, and its page in a real browser."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from rcml_jax.cli import explore
from rcml_jax.errors import UserError
from rcml_jax.search.catalogue import Searcher, embed_catalogue, open_model
from rcml_jax.search.explorer import Explorer, View
from rcml_jax.search.items import read_items
from tests.browser import started_browser
from tests.cli.test_commands import fails
from tests.search.conftest import NEW, SENTENCES
from tests.toy import ITEMS, ROOT


@pytest.fixture(scope="module")
def picture(catalogue):
    return (catalogue / "images" / "17.png").read_bytes()


def test_the_grid_has_the_items_with_all_words(explorer):
    assert explorer.items(most=5) == [0, 1, 2, 3, 4]
    assert explorer.items("KIND5 place7") == [17]
    assert explorer.items("i17 kind5") == [17]
    assert explorer.items("nowhere") == []


def test_results_are_those_of_the_searcher(explorer, picture):
    searcher = explorer.searcher
    image = {"image": explorer.pixels(picture)}
    for view, query in (
        (View(item="i17"), {"item": "i17"}),
        (View(text="kind5"), {"text": "kind5"}),
        (View(image=picture), image),
    ):
        for relation in ("", SENTENCES[0], NEW):
            asked = dataclasses.replace(view, relation=relation, other=NEW, k=5, against="text")
            expected = searcher.search(relation or None, **query, k=5, against="text")
            assert explorer.search(asked) == expected
            expected = searcher.search(NEW, **query, k=5, against="text")
            assert explorer.search(asked, other=True) == expected


def test_what_two_items_have_in_common(explorer, picture):
    embeddings = explorer.searcher.embeddings
    found = explorer.common(View(item="i17"), 29)
    vectors = [embeddings.vectors[name] for name in ("text", "image")]
    expected = {
        sentence: np.mean([a[r, 17] @ b[r, 29] for a in vectors for b in vectors])
        for r, sentence in enumerate(SENTENCES, 1)
    }
    assert dict(found) == pytest.approx(expected, abs=1e-5)
    assert found[0][1] >= found[1][1]
    assert explorer.common(View(item="i17"), 29, most=1) == found[:1]
    # An image alone, and a text alone, are compared with both sides of the item.
    alone = dict(explorer.common(View(image=picture), 29))
    for r, sentence in enumerate(SENTENCES, 1):
        score = np.mean([vectors[1][r, 17] @ b[r, 29] for b in vectors])
        assert alone[sentence] == pytest.approx(score, abs=1e-4)
    assert {s for s, _ in explorer.common(View(text="kind5"), 29)} == {*SENTENCES}


def test_attention_is_that_of_the_head(explorer, picture, model):
    found = explorer.attention(View(item="i17", relation=NEW))
    assert found.words[0][0] == "[start]"
    assert found.words[-1][0] == "[end]"
    assert "kind" in "".join(word for word, _ in found.words)
    assert sum(weight for _, weight in found.words) == pytest.approx(1, abs=1e-5)
    assert Image.open(io.BytesIO(found.image)).size == (224, 224)
    assert 0 < found.pooled < 1
    reader = model.method.token_reader(model.params)
    weights = reader.attention(
        reader.text(["kind5 place7"]), reader.relations([NEW]), np.zeros(1, bool)
    )
    expected = np.asarray(weights)[0, 0, : len(found.words)]
    np.testing.assert_allclose([weight for _, weight in found.words], expected, atol=1e-6)
    # Another sentence, and none, look elsewhere.
    for other in (SENTENCES[0], ""):
        words = explorer.attention(View(item="i17", relation=other)).words
        assert np.abs(np.subtract([w for _, w in words], expected)).max() > 1e-4
    assert explorer.attention(View(image=picture, relation=NEW)).words == ()
    assert explorer.attention(View(text="kind5", relation=NEW)).image is None


def test_a_baseline_has_results_and_no_attention(runs, embedded, catalogue, tmp_path):
    model = open_model(runs("siglip"))
    found = embed_catalogue(model, read_items(catalogue), SENTENCES, tmp_path / "e")
    explorer = Explorer(Searcher(found, model), found.items.read)
    view = View(item="i17", relation=SENTENCES[0])
    assert len(explorer.search(view)) == 12
    assert explorer.attention(view) is None
    assert not explorer.any_sentence
    assert len(explorer.common(view, 3)) == 2
    with pytest.raises(UserError, match="was not embedded under"):
        explorer.search(View(item="i17", relation=NEW))
    explorer.warm_up()
    # Without the model, too.
    bare = Explorer(Searcher(embedded), embedded.items.read)
    assert bare.attention(view) is None
    assert len(bare.search(View(item="i17", relation=SENTENCES[0]))) == 12


def test_a_link_restores_the_view(picture):
    view = View(item="a&b=ü", relation="both 100% <red>", other=NEW, k=7, against="text")
    link = view.link()
    assert link.startswith("?")
    assert View.from_link(dict(urllib.parse.parse_qsl(link[1:]))) == view
    assert View(image=picture).link() == ""
    assert View.from_link({"theme": "dark", "text": "x"}) == View(text="x")
    with pytest.raises(UserError, match="k='many' in the link is no number"):
        View.from_link({"k": "many"})


def png(size):
    out = io.BytesIO()
    Image.new("1", size).save(out, "PNG")
    return out.getvalue()


def test_what_cannot_be_asked(explorer):
    for view, message in (
        (View(), "nothing is asked"),
        (View(text=" "), "nothing is asked"),
        (View(text="word " * 10_000), "the text has 50,000 characters"),
        (View(item="i17", relation="word " * 10_000), "the relation has 50,000 characters"),
        (View(item="i99"), "has no item 'i99'; did you mean"),
        (View(item="i17", k=0), "0 results cannot be shown; give 1 to 100"),
        (View(item="i17", k=10**9), "1000000000 results cannot be shown"),
        (View(item="i17", against="sound"), "against='sound' is unknown"),
        (View(image=b"no image"), "the image cannot be read (no JPEG"),
        (View(image=b""), "the image cannot be read"),
        (View(image=png((12_000, 12_000))), "pixels"),
        (View(image=b"\0" * (21 * 2**20)), "the image has 21 MiB; give one of at most 20"),
    ):
        with pytest.raises(UserError) as error:
            explorer.search(view)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_images_that_are_gone(model, patchy, tmp_path):
    found = embed_catalogue(model, read_items(patchy), [], tmp_path / "e", tokens="int8")
    explorer = Explorer(Searcher(found, model), found.items.read)
    assert [explorer.thumbnail(i) is not None for i in range(6)] == [1, 0, 1, 0, 0, 0]
    (patchy / "images" / "13.png").unlink()
    looks = explorer.attention(View(item="whole", relation=NEW))
    assert looks.image is None
    assert looks.words
    explorer.warm_up()
    assert explorer.common(View(item="whole"), 1) == []


def test_wrong_commands(runs, embedded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explore, "require_gradio", lambda: None)

    def wrong(*parts, args=(), workdir=None):
        given = ["--workdir", workdir or runs(), *args]
        fails(explore.main, given, capsys, *parts)

    wrong("--port 70000 is no port", args=["--port=70000"])
    wrong("--candidates -1 must not be negative", args=["--candidates=-1"])
    wrong("holds no config.json", workdir=tmp_path)
    wrong("holds no manifest.json", args=["--embeddings", tmp_path])
    wrong("was embedded by another model", args=["--embeddings", embedded.directory],
          workdir=runs(seed=1))  # fmt: skip
    wrong("would make another model", args=["--config.model.beta=1"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(explore.importlib.util, "find_spec", lambda name: None)
    wrong("pip install 'rcml_jax[explore]'")


def test_the_items_of_the_run_are_embedded_once(runs, capsys):
    explorer = explore.open_explorer(runs())
    directory = explorer.searcher.embeddings.directory
    assert (directory.name, len(explorer.relations)) == ("explorer", 22)
    assert explorer.any_sentence
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*.npy")}
    assert explorer.thumbnail(17) is not None
    explore.open_explorer(runs())
    assert {path: path.stat().st_mtime_ns for path in directory.glob("*.npy")} == before


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(explorer, runs, tmp_path_factory):
    """Of the command in a process of its own: gradio's server warns of its own dependencies."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    directory = explorer.searcher.embeddings.directory
    command = [sys.executable, "-m", "rcml_jax.cli.explore", f"--workdir={runs()}", "--port=0"]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, f"--embeddings={directory}"],
            stdout=file,
            stderr=file,
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"},
        )
    try:
        end = time.monotonic() + 180
        while not (found := re.search(r"http://[^\s]+", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with started_browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


class Page:
    """The page in a browser: boxes by the id of their part, and what is shown."""

    def __init__(self, browser, address, query="", width=1200):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for name in ("browser", "performance"):
            browser.get_log(name)
        self.browser = browser
        browser.get(address + query)
        self.until(lambda: self.find("#relation textarea") and self.find("#grid img"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def until(self, true, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := true():
                    return found
            except Exception as error:  # what was found is replaced meanwhile
                if "stale" not in str(error).lower():
                    raise
            time.sleep(0.1)
        raise AssertionError(self.browser.find_element("css selector", "body").text)

    def type(self, part, words):
        from selenium.webdriver.common.keys import Keys

        box = self.find(f"#{part} textarea, #{part} input")[0]
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(words or Keys.DELETE)
        box.send_keys(Keys.ENTER)

    def value(self, part):
        return self.find(f"#{part} textarea, #{part} input")[0].get_attribute("value")

    def ids(self, side):
        return [e.text.strip() for e in self.find(f"#{side} .cards .id")]

    def title(self, side):
        return "".join(e.text for e in self.find(f"#{side} h2"))


def expected(explorer, **options):
    return [match.id for match in explorer.search(View(**options))]


def test_pick_type_compare_and_link(browser, address, explorer):
    page = Page(browser, address)
    page.find("#grid button img")[3].click()
    page.until(lambda: page.ids("left") == expected(explorer, item="i3"))
    page.until(lambda: page.value("item") == "i3")
    assert page.title("left") == "as what they are"
    # A sentence that is new to the catalogue, by the keyboard.
    page.type("relation", NEW)
    page.until(lambda: page.title("left") == NEW)
    assert page.ids("left") == expected(explorer, item="i3", relation=NEW)
    assert page.find("#left .heat")
    assert any("kind" in e.text for e in page.find("#left .token"))
    assert page.title("right") == ""
    # Beside a second one.
    page.type("other", SENTENCES[1])
    page.until(lambda: page.title("right") == SENTENCES[1])
    assert page.ids("right") == expected(explorer, item="i3", relation=SENTENCES[1])
    assert page.ids("left") == expected(explorer, item="i3", relation=NEW)
    rows = [
        row.text for row in page.find("#common tbody tr, #common table tr") if "both" in row.text
    ]
    first = explorer.search(View(item="i3", relation=NEW))[0].index
    assert [row.split(" ", 1)[1] for row in rows] == [
        sentence for sentence, _ in explorer.common(View(item="i3"), first)
    ]
    images = browser.execute_script(
        "return [...document.images].filter(x => !x.complete || !x.naturalWidth).length"
    )
    assert images == 0
    link = page.find("#view-link")[0].get_attribute("href")
    again = Page(browser, link)
    again.until(lambda: again.title("right") == SENTENCES[1])
    assert again.ids("left") == expected(explorer, item="i3", relation=NEW)
    assert (again.value("item"), again.value("relation")) == ("i3", NEW)


def test_upload_and_text(browser, address, explorer, catalogue, tmp_path):
    page = Page(browser, address)
    path = catalogue / "images" / "17.png"
    page.find("#file input[type=file]")[0].send_keys(str(path))
    page.until(lambda: page.ids("left") == expected(explorer, image=path.read_bytes()))
    assert page.find("#left .heat")
    assert not page.find("#view-link")
    page.type("text", "kind5 place7")
    page.until(lambda: page.ids("left") == expected(explorer, text="kind5 place7"))
    page.type("filter", "kind5 place7")
    page.until(lambda: len(page.find("#grid button img")) == 1)
    page.find("#grid button img")[0].click()
    page.until(lambda: page.value("item") == "i17")


def test_a_mistake_is_told_on_the_page(browser, address, tmp_path):
    page = Page(browser, address)
    page.type("item", "i99")
    page.until(lambda: page.find("#left [role=alert]"))
    assert "has no item 'i99'" in page.find("#left [role=alert]")[0].text
    (tmp_path / "bomb.png").write_bytes(png((12_000, 12_000)))
    page.find("#file input[type=file]")[0].send_keys(str(tmp_path / "bomb.png"))
    page.until(lambda: "12000 x 12000 pixels" in page.find("#left [role=alert]")[0].text)


def test_markup_is_text(browser, address):
    page = Page(browser, address)
    page.type("text", "<i>x</i>")
    page.until(lambda: page.ids("left"))
    shown = page.find("#left .asked")[0].text
    assert "<i>x</i>" in "".join(c for c in shown if c not in " ·\n")
    assert not page.find("#left .asked i")
    page.type("relation", "<i>they</i>")
    page.until(lambda: page.title("left") == "<i>they</i>")


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_from_elsewhere_and_not_too_wide(browser, address, explorer, width):
    page = Page(browser, address, View(item="i3", relation=NEW, other=SENTENCES[0]).link(), width)
    page.until(lambda: page.title("right") == SENTENCES[0])
    messages = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert len(urls) > 10
    own = (address.rstrip("/"), "data:", "blob:", "chrome:", "about:")
    assert [url for url in urls if not url.startswith(own)] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    severe = [row["message"] for row in browser.get_log("browser") if row["level"] == "SEVERE"]
    assert severe == []
    assert address.startswith("http://127.0.0.1:")


def test_items_asked_at_once_are_answered_each(explorer):
    from concurrent.futures import ThreadPoolExecutor

    views = [View(item=f"i{i}", relation=f"a sentence of number {i % 5}") for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(explorer.search, views))
    assert found == [explorer.search(view) for view in views]
    assert len(explorer.searcher.embeddings.items) == ITEMS
