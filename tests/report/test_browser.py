"""A whole report, and in a real browser: nothing missing, nothing of other hosts, not too wide."""

import json
import shutil

import pytest

from tests.browser import started_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with started_browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


def opened(browser, page, width, scheme):
    """The page at a width in pixels and a colour scheme, with empty logs."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for name in ("browser", "performance"):
        browser.get_log(name)
    browser.get(page.as_uri())
    assert browser.execute_script("return innerWidth") == width


def fetched(browser, page):
    """The addresses that the page asked for, and those of them that failed."""
    messages = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    asked = {
        m["params"]["requestId"]: m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
        # A new browser looks at a page of its own, too.
        and m["params"]["documentURL"] == page.as_uri()
    }
    failed = [
        asked[m["params"]["requestId"]]
        for m in messages
        if m["method"] == "Network.loadingFailed" and m["params"]["requestId"] in asked
    ]
    return list(asked.values()), failed


def test_a_whole_report_has_every_figure_of_relational_runs(whole_report):
    names = {path.name for path in whole_report.rglob("*.*")}
    assert {
        "map-rcml.svg", "map-clip.svg", "attention-1.svg", "map.npz", "attention.npz", "cost.csv",
    } < names  # fmt: skip
    assert any(name.startswith("case-") and name.endswith(".svg") for name in names)
    text = (whole_report / "index.html").read_text("utf-8")
    for part in (
        "t-SNE (perplexity 30", "Silhouette of the kinds by cosine", "median of 2 calls",
        "Drawn by the seed 0, not chosen", "Measured when this page was made", "rcml, 10 relations",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_in_a_browser(browser, whole_report, width, scheme):
    opened(browser, whole_report / "index.html", width, scheme)
    images = browser.execute_script(
        "return [...document.images].map(x => [x.src, x.complete, x.naturalWidth,"
        " x.getBoundingClientRect().right])"
    )
    assert len(images) > 20
    assert [src for src, complete, natural, _ in images if not complete or not natural] == []
    assert [src for src, _, _, right in images if right > width] == []
    # Nothing but tables, in their own boxes, is wider than the window.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    urls, failed = fetched(browser, whole_report / "index.html")
    assert len(urls) > len(images)
    root = whole_report.as_uri()
    assert [url for url in urls if not url.startswith((root, "data:"))] == []
    assert failed == []
    assert browser.get_log("browser") == []


def colours(browser):
    script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    return [
        sum(int(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3])
        for colour in browser.execute_script(script)
    ]


def test_the_page_is_dark_where_the_reader_is(browser, whole_report):
    opened(browser, whole_report / "index.html", 1400, "light")
    ink, paper = colours(browser)
    assert ink + 300 < paper
    opened(browser, whole_report / "index.html", 1400, "dark")
    ink, paper = colours(browser)
    assert paper + 300 < ink
    # Figures stay on white, in which they are drawn.
    behind = browser.execute_script(
        "return getComputedStyle(document.querySelector('.images a')).backgroundColor"
    )
    assert behind == "rgb(255, 255, 255)"


def test_a_missing_image_would_be_seen(browser, whole_report, tmp_path):
    """The checks above can fail."""
    copy = tmp_path / "report"
    shutil.copytree(whole_report, copy)
    (copy / "retrieval.svg").unlink()
    opened(browser, copy / "index.html", 1400, "light")
    _, failed = fetched(browser, copy / "index.html")
    assert failed == [(copy / "retrieval.svg").as_uri()]
    missing = "return [...document.images].filter(x => !x.naturalWidth).length"
    assert browser.execute_script(missing) == 1
    assert browser.get_log("browser") != []
