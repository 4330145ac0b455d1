"""Local images first, then fetched ones; what cannot be had is counted."""

import functools

import numpy as np
import pytest

from rcml_jax.data import download, images
from rcml_jax.data.sources import amazon
from rcml_jax.data.sources.amazon import find_images, local_images
from rcml_jax.errors import UserError
from rcml_jax.parsing import read_file
from tests.data.conftest import png

IDS = [f"B{n}" for n in range(6)]
URLS = [f"https://host/{n}.png" for n in range(5)] + [""]


@pytest.fixture
def local(tmp_path):
    """B0 as it should be, B1 damaged, and files that are no images of items."""
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "B0.png").write_bytes(png(0))
    (folder / "B1.jpg").write_bytes(png(1)[:50])
    (folder / "notes.txt").write_text("x")
    (folder / "B2.png").mkdir()
    return folder


def served(monkeypatch, outcomes):
    """Replaces the fetcher: URLs not in `outcomes` (URL → reason) are had."""
    asked = []

    def fetch_images(urls, directory, *, max_size, log):
        asked.append(list(urls))
        paths = []
        for url in urls:
            path = download.image_path(directory, url)
            if url not in outcomes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(9))
            paths.append(None if url in outcomes else path)
        counts = dict.fromkeys(download.OUTCOMES, 0)
        for url in set(urls):
            counts[outcomes.get(url, "ok")] += 1
        return download.FetchReport(paths, counts)

    monkeypatch.setattr(download, "fetch_images", fetch_images)
    return asked


def find(local, cache, **options):
    options = {"fetch": True, "strict": False, "log": print} | options
    whole = functools.partial(images.decode_problems, read=read_file)
    paths, counts = find_images(
        IDS, URLS, local_images(local), cache, decode_problems=whole, **options
    )
    return paths, {name: number for name, number in counts.items() if number}


def test_local_images_are_found_by_name(local, tmp_path):
    assert local_images(local) == {"B0": local / "B0.png", "B1": local / "B1.jpg"}
    assert local_images(tmp_path / "none") == {}


def test_local_first_then_fetched(local, tmp_path, monkeypatch):
    monkeypatch.setattr(amazon, "MOST_FAILED", 0.5)
    asked = served(monkeypatch, {URLS[2]: "not_found", URLS[3]: "failed"})
    paths, counts = find(local, tmp_path)
    assert asked == [URLS[1:5]]
    assert paths[0] == local / "B0.png"
    found = [download.image_path(tmp_path, URLS[n]) for n in (1, 4)]
    assert paths[1:] == [found[0], None, None, found[1], None]
    assert counts == {
        "damaged local images": 1,
        "items without an image": 1,
        "images not found": 1,
        "images failed": 1,
    }
    assert amazon.encoded(str(paths[1])) == png(9)


def test_too_many_failures_ask_for_another_run(local, tmp_path, monkeypatch):
    served(monkeypatch, {URLS[3]: "failed"})
    with pytest.raises(UserError, match="1 of 4 images could not be fetched; run the same"):
        find(local, tmp_path)


def test_strict_names_the_item(local, tmp_path, monkeypatch):
    served(monkeypatch, {URLS[4]: "not_found"})
    with pytest.raises(UserError, match=r"item B4 \(https://host/4.png\) cannot be had"):
        find(local, tmp_path, strict=True)


def test_without_fetching_what_is_there_counts(local, tmp_path, monkeypatch):
    asked = served(monkeypatch, {URLS[2]: "not_found"})
    first, _ = find(local, tmp_path)
    again, counts = find(local, tmp_path, fetch=False)
    assert len(asked) == 1
    assert again == first
    assert counts["images not fetched"] == 1


def test_a_large_image_is_stored_smaller(tmp_path):
    (tmp_path / "x.png").write_bytes(png(0, 1000))
    stored = images.open_rgb(amazon.encoded(str(tmp_path / "x.png")))
    assert np.array(stored).shape == (512, 512, 3)
    with pytest.raises(UserError, match=r"none\.png cannot be read"):
        amazon.encoded(str(tmp_path / "none.png"))
