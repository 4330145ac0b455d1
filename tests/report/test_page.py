"""The page of a report: whole, self-contained, and nothing in it that was not escaped."""

import html.parser
import re
from urllib.parse import unquote

import pytest

from rcml_jax.report.page import (
    Figure,
    FigureImage,
    Folder,
    Paragraph,
    Section,
    Table,
    load,
    write_page,
    written_files,
)


class Links(html.parser.HTMLParser):
    """What a page links to, and the tags that are open at its end."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self):
        super().__init__()
        self.links, self.open, self.images, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(path):
    page = Links()
    page.feed(path.read_text("utf-8"))
    assert page.open == []
    return page


def test_everything_that_the_page_links_is_there(report):
    page = read(report / "index.html")
    local = [link for link in page.links if not link.startswith(("#", "data:"))]
    assert len(local) > 20
    for link in local:
        assert not re.match(r"[a-z]+:|//|/", link), link
        assert (report / unquote(link)).is_file(), link
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids)
    assert all(len(image["alt"]) > 10 for image in page.images)


def test_everything_that_was_written_is_linked(report):
    linked = {unquote(link) for link in read(report / "index.html").links}
    written = {p.relative_to(report).as_posix() for p in report.rglob("*") if p.is_file()}
    assert written - linked == {"index.html"}


def test_the_page_lists_every_file_of_the_report(report):
    written = {p.relative_to(report).as_posix() for p in report.rglob("*") if p.is_file()}
    assert set(written_files(report / "index.html")) == written


def test_a_list_names_nothing_outside_the_folder(tmp_path):
    page = tmp_path / "index.html"
    write_page(page, "T", [], [], ["a.svg", "../b", "/c", "data/../../d", 'e"<&>.svg'])
    assert written_files(page) == ["a.svg", 'e"<&>.svg']
    page.write_text("<html>my own page</html>")
    assert written_files(page) is None
    page.write_text('<meta name="generator" content="rcml_jax.report">')
    assert written_files(page) == []


def test_every_file_of_numbers_can_be_read(report):
    files = sorted((report / "data").iterdir())
    assert len(files) > 5
    for path in files:
        assert load(path), path


def test_no_file_names_another_host(report):
    for path in report.rglob("*"):
        if path.suffix not in (".svg", ".html"):
            continue
        # XML names its dialects by addresses that no browser fetches; images are inside as text.
        allowed = r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE.*?>|<metadata>.*?</metadata>|"data:[^"]*"'
        rest = re.sub(allowed + "|<!--.*?-->", "", path.read_text("utf-8"), flags=re.DOTALL)
        assert "//" not in rest, path


def test_the_figures_that_need_no_model_are_there(report):
    names = {path.name for path in report.glob("*.svg")}
    assert {
        "controls-1.svg", "controls-2.svg",
        "retrieval.svg", "relation-type.svg", "validity.svg", "against-beta-hit-5.svg",
        "curve-relational-loss.svg", "curve-relational-validation.svg",
        "curve-classification-learning-rate.svg", "accuracy-by-epoch-test.svg",
    } < names  # fmt: skip


def test_what_is_left_out_has_its_reason(report):
    text = (report / "index.html").read_text("utf-8")
    left_out = re.findall(r'left-out"><b>(.*?)</b>, left out: (.*?)</figure>', text)
    reasons = dict(left_out)
    assert "evaluation.similarity=all" in reasons["Relation type: Top-3 by similarity"]
    assert "has no checkpoints" in reasons["Embeddings of each modality and fused"]
    for title in ("The same items under one relation", "Case studies", "Latency and parameters"):
        assert "the model of rcml cannot be opened" in reasons[title]
    assert "similarities.npz" in reasons["Alignment of two modalities"]
    assert all(len(reason) > 30 for reason in reasons.values())


def test_captions_state_the_protocol(report):
    text = (report / "index.html").read_text("utf-8")
    for part in (
        "chance of Hit@5 0.238", "Ties count against the model", "drawn by a fixed seed",
        "Without controls, so not shown: clip", "above the best control of its own evaluation",
        "probe on frozen features", "at every look of training", "the ring is the best validation",
    ):  # fmt: skip
        assert part in text


def test_texts_are_escaped_and_numbers_stand_right(tmp_path):
    folder = Folder(tmp_path)
    path, _ = folder.save("a b&c.csv", {"x": [1]})
    image = folder.image_path("p.svg")
    image.write_text("<svg/>")
    sections = [
        Section(
            "A & B <x>",
            (
                Figure(
                    "<script>alert(1)</script>",
                    'caption "quoted" & <b>',
                    (FigureImage(image, 'alt "x" <y>'),),
                    Table(["name", "<i>"], [["a<b", "1.5 ± 0.2"], ["c", "–"]], frozenset({(0, 1)})),
                    (path,),
                ),
                Figure("Gone", left_out="because <of> this"),
            ),
        )
    ]
    write_page(tmp_path / "index.html", "T<i>tle", [Paragraph("<i>", ("<u>", "b"))], sections)
    text = (tmp_path / "index.html").read_text("utf-8")
    read(tmp_path / "index.html")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "because &lt;of&gt; this" in text
    assert "<code>&lt;u&gt;</code>,\n<code>b</code>." in text
    assert 'href="data/a%20b%26c.csv"' in text
    assert '<td class="number marked">1.5 ± 0.2</td>' in text
    assert "<td>a&lt;b</td>" in text
    assert written_files(tmp_path / "index.html") == []


def test_names_are_given_once(tmp_path):
    folder = Folder(tmp_path)
    assert [folder.image_path("a.svg").name for _ in range(3)] == ["a.svg", "a-2.svg", "a-3.svg"]
    assert folder.save("a.csv", {"x": [1]})[0].name == "a.csv"


@pytest.mark.parametrize(
    "scheme", ["light dark", "prefers-color-scheme: dark", "width=device-width"]
)
def test_the_page_is_for_phones_and_for_the_dark(report, scheme):
    assert scheme in (report / "index.html").read_text("utf-8")
