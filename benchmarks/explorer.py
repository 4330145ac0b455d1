"""How long does somebody wait for the explorer's page, and for a changed sentence?

    python -m benchmarks.explorer --workdir runs/rcml
    python -m benchmarks.explorer --workdir runs/rcml --screenshot docs/figures/explorer.png

`rcml-explore` runs in a process of its own; Chromium asks it, driven by Selenium. *First page*:
from the address to the images of the grid, in a browser that has never seen the page, and again in
the same one. *Changed sentence*: from the Enter key to the results under a sentence that was never
asked before, as the page shows them. `--screenshot` writes what `--link` shows, as a PNG of 96
colours.
"""

import io
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import timing
from benchmarks.service import started
from tests.browser import started_browser

LINK = "?item=1F4D8&relation=both+of+them+are+blue&other=both+are+books&k=8"
SENTENCES = (
    "things that somebody would take to the seaside",
    "both of them are red",
    "they are used in a kitchen",
    "a child would play with them",
    "they can be seen in the sky at night",
    "both belong to winter",
    "one would give them to a friend",
    "they are found in an office",
)
# The first rows of the grid; a browser loads images far below them when they are scrolled to.
_READY = """
const images = [...document.querySelectorAll("#grid img")].slice(0, 15);
return images.length > 0 && images.every(x => x.complete && x.naturalWidth)
  && document.querySelector("#relation textarea, #relation input") !== null;
"""
_TITLE = "return [...document.querySelectorAll('#left h2')].map(x => x.textContent).join('');"


def wait_until(true: Callable[[], Any], seconds: float = 120) -> float:
    """Seconds until something is true, looked at every hundredth."""
    start = time.perf_counter()
    while not true():
        if time.perf_counter() - start > seconds:
            raise SystemExit("the page does not answer")
        time.sleep(0.01)
    return time.perf_counter() - start


def first_page(browser: Any, address: str) -> float:
    """Seconds until the page can be used."""
    start = time.perf_counter()
    browser.get(address)
    wait_until(lambda: browser.execute_script(_READY))
    return time.perf_counter() - start


def changed_sentence(browser: Any, sentence: str) -> float:
    """Seconds until the results under a sentence stand there."""
    from selenium.webdriver.common.keys import Keys

    box = browser.find_element("css selector", "#relation textarea, #relation input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(sentence)
    box.send_keys(Keys.ENTER)
    return wait_until(lambda: browser.execute_script(_TITLE) == sentence)


def screenshot(browser: Any, address: str, path: pathlib.Path, colours: int = 96) -> None:
    """Write what an address shows, 1,200 pixels wide and as high as the page is."""
    size = {"width": 1200, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
    wait_until(lambda: browser.execute_script(_READY) and browser.execute_script(_TITLE))
    wait_until(lambda: browser.execute_script("return [...document.images].every(x => x.complete)"))
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": height})
    time.sleep(1)  # until it is laid out anew
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height} pixels, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    """Measure and print."""
    parser = timing.parser(__doc__ or "", repeats=len(SENTENCES))
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--embeddings")
    parser.add_argument("--screenshot", type=pathlib.Path)
    parser.add_argument("--link", default=LINK, help="the view that is shown")
    options, overrides = parser.parse_known_args()
    figures: dict[str, Any] = {"machine": timing.start("the explorer in Chromium")}
    args = [f"--workdir={options.workdir}", *overrides]
    if options.embeddings:
        args.append(f"--embeddings={options.embeddings}")
    with (
        tempfile.TemporaryDirectory() as folder,
        started("rcml_jax.cli.explore", *args) as (address, _),
        started_browser(folder) as browser,
    ):
        found = {"first page": [first_page(browser, address)]}
        found["page again"] = [first_page(browser, address) for _ in range(3)]
        browser.find_element("css selector", "#grid button img").click()
        wait_until(lambda: browser.execute_script(_TITLE))
        turns = divmod(np.arange(options.repeats), len(SENTENCES))
        asked = [SENTENCES[n] + "!" * turn for turn, n in zip(*turns, strict=True)]
        found["changed sentence"] = [changed_sentence(browser, said) for said in asked]
        print(f"\n{'seconds':<20}{'median':>10}{'least':>10}{'most':>10}")
        for name, seconds in found.items():
            cells = (np.median(seconds), min(seconds), max(seconds))
            print(f"{name:<20}" + "".join(f"{x:>10.2f}" for x in cells))
        figures |= found
        if options.screenshot:
            screenshot(browser, address.rstrip("/") + "/" + options.link, options.screenshot)
    timing.write_json(options.json, figures)


if __name__ == "__main__":
    main()
