"""Decoded images in a file: the pixels of decoding, each image once, safe against kills."""

import io
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data import images as image_module
from rcml_jax.data import stages
from rcml_jax.data.images import ChosenImages, EncodedImages, Framing, ImageBank, StoredPixels
from rcml_jax.errors import UserError
from tests.toy import ROOT

COUNT = 12


def encode(index: int) -> bytes:
    """A JPEG, PNG or WebP of another size each, wide or high."""
    rng = np.random.default_rng(index)
    shape = (70 + 5 * index, 40) if index % 2 else (33, 48 + index)
    out = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    image.save(out, ("JPEG", "PNG", "WEBP")[index % 3])
    return out.getvalue()


class Counted(EncodedImages):
    """Remembers which images were decoded; `die_at`: the index whose decoding kills the process."""

    def __init__(self, change=b"", die_at=None):
        super().__init__(COUNT, encode)
        self.change, self.decoded, self.die_at = change, [], die_at

    def encoded(self, index):
        return super().encoded(index) + self.change * (index == 3)

    def __getitem__(self, index):
        if index == self.die_at:
            signal.raise_signal(signal.SIGKILL)
        self.decoded.append(int(index))
        return super().__getitem__(index)


FRAMINGS = [
    Framing(16),
    Framing(16, resize=20),
    Framing(16, squash=True, resample=int(Image.Resampling.BILINEAR)),
]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_pixels_are_those_of_decoding_and_each_image_is_decoded_once(tmp_path, framing):
    images, said = Counted(), []
    store = StoredPixels(tmp_path / "pixels", "toy", images, framing, log=said.append)
    asked = np.array([7, 0, 3, 7, 11])
    found = store(asked)
    np.testing.assert_array_equal(found, ImageBank(Counted(), framing, cache_bytes=0)(asked))
    assert type(found) is np.ndarray
    assert len(np.unique(found)) > 50
    assert found.flags.writeable
    assert sorted(images.decoded) == list(range(COUNT))
    assert said[0] == f"12 images of 16 pixels take 9 KiB, decoded once: {store.path}"
    again, lines = Counted(), len(said)
    other = StoredPixels(tmp_path / "pixels", "toy", again, framing, log=said.append)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(other))(asked), found)
    np.testing.assert_array_equal(other([]), found[:0])
    assert again.decoded == []
    assert len(said) == lines


def test_an_image_of_several_items_is_stored_once(tmp_path):
    images, items, said = Counted(), np.array([4, 2, 4, 9, 9, 4]), []
    store = StoredPixels(tmp_path, "toy", ChosenImages(images, items), 16, log=said.append)
    asked = [5, 0, 1, 3]
    np.testing.assert_array_equal(store(asked), ImageBank(Counted(), 16)(items[asked]))
    assert sorted(images.decoded) == [2, 4, 9]
    assert said[0].startswith("3 images of 16 pixels take 2 KiB")
    again = StoredPixels(tmp_path, "toy", ChosenImages(images, items[:4]), 16)
    assert again.path == store.path  # of the same images
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again))([2, 3]), store([2, 3]))


def test_the_file_is_that_of_images_framing_and_decoder(tmp_path, monkeypatch):
    def path(change=b"", framing=FRAMINGS[0]):
        return StoredPixels(tmp_path, "toy", Counted(change), framing).path

    paths = {path(), path(b"more"), *(path(framing=f) for f in FRAMINGS[1:])}
    assert path() in paths
    monkeypatch.setattr(image_module.PIL, "__version__", "1.0")
    paths.add(path())
    assert len(paths) == 5


def test_a_disk_without_room_is_told_in_one_sentence(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=COUNT * 16 * 16 * 3 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    store = StoredPixels(tmp_path / "pixels", "toy", Counted(), 16)
    sentence = r"12 images of 16 pixels take 9 KiB .* config\.data\.pixels=encoded$"
    with pytest.raises(UserError, match=sentence):
        store([0])
    assert not (tmp_path / "pixels").exists()
    usage.free += 1
    assert store([0]).shape == (1, 16, 16, 3)


def test_a_place_that_cannot_be_written_decodes(tmp_path):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    store = StoredPixels(tmp_path / "file" / "pixels", "toy", Counted(), 16, log=said.append)
    np.testing.assert_array_equal(store([5]), ImageBank(Counted(), 16)([5]))
    assert said == [f"{tmp_path}/file/pixels cannot be written; images are decoded in every run."]


def test_a_damaged_file_is_named(tmp_path):
    path = StoredPixels(tmp_path, "toy", Counted(), 16).path
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{path} is damaged .* delete it"):
        StoredPixels(tmp_path, "toy", Counted(), 16)([0])


def start(folder: pathlib.Path, die_at: int | None) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data.test_stored_pixels", str(folder), str(die_at)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def worker(folder: str, die_at: str) -> None:
    """Store in steps of two images, and print which of them this process decoded."""
    stages._STEP = 2
    images = Counted(die_at=None if die_at == "None" else int(die_at))
    store = StoredPixels(pathlib.Path(folder), "toy", images, 16, threads=1)
    store([0])
    print(*images.decoded)


def test_two_processes_share_the_work_of_one_and_a_killed_one_is_gone_on_with(tmp_path):
    killed = start(tmp_path, 7)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("*.npy"))
    both = [start(tmp_path, None) for _ in range(2)]
    decoded = " ".join(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    # The six images of the whole steps before the kill are not decoded again.
    assert sorted(map(int, decoded.split())) == list(range(6, COUNT))
    images = Counted()
    found = StoredPixels(tmp_path, "toy", images, 16)(np.arange(COUNT))
    assert images.decoded == []
    np.testing.assert_array_equal(found, ImageBank(Counted(), 16)(np.arange(COUNT)))


if __name__ == "__main__":
    worker(*sys.argv[1:])
