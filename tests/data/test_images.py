import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data import images
from rcml_jax.errors import UserError
from tests import reference
from tests.data.conftest import png

try:  # transformers 5 calls so what needs no torchvision
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


def noise(width, height, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
    return Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.BICUBIC)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 57), (57, 101), (31, 90), (32, 32)])
def test_to_array_is_clips_resize_and_crop(width, height):
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        do_normalize=False,
        do_rescale=False,
    )
    image = noise(width, height)
    expected = clip(image)["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(images.to_array(image, 32), expected)


def test_jpegs_are_decoded_small_and_stay_close():
    data = encoded(noise(1200, 900), "JPEG", quality=95)
    image = images.open_rgb(data)
    fast = images.to_array(image, 64).astype(int)
    assert max(image.size) < 400  # drafted
    full = images.to_array(Image.open(io.BytesIO(data)).convert("RGB"), 64).astype(int)
    assert np.abs(fast - full).mean() < 2


def test_modes_become_rgb_and_transparency_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert images.open_rgb(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "1", "I;16", "LA"):
        assert images.to_array(images.open_rgb(encoded(Image.new(mode, (9, 7)))), 4).shape == (
            4,
            4,
            3,
        )


def test_very_long_images_cost_no_memory():
    assert images.to_array(Image.new("RGB", (20_000, 2)), 64).shape == (64, 64, 3)
    assert images.to_array(Image.new("RGB", (1, 5_000)), 64).shape == (64, 64, 3)


def test_storable_keeps_what_it_can():
    plain, jpeg = encoded(noise(60, 40)), encoded(noise(60, 40), "JPEG")
    assert images.storable(plain, 512) == plain
    assert images.storable(jpeg, None) == jpeg
    for data in (encoded(noise(600, 400)), encoded(noise(600, 400), "JPEG")):
        small = Image.open(io.BytesIO(images.storable(data, 100)))
        assert max(small.size) <= 100
        assert abs(small.width / small.height - 1.5) < 0.03
        assert small.format == Image.open(io.BytesIO(data)).format
    other = Image.open(io.BytesIO(images.storable(encoded(noise(60, 40), "BMP"), 512)))
    assert (other.format, other.size) == ("PNG", (60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = images.storable(encoded(noise(60, 40), "JPEG", exif=exif), 512)
    assert Image.open(io.BytesIO(turned)).size == (40, 60)


def test_check_decodes_finds_cut_files():
    for data in (encoded(noise(200, 100)), encoded(noise(200, 100), "JPEG")):
        images.check_decodes(data)
        with pytest.raises(images.DECODE_ERRORS):
            images.check_decodes(data[: len(data) // 2])
    with pytest.raises(images.DECODE_ERRORS):
        images.check_decodes(b"no image")


class Counted(images.EncodedImages):
    """Counts how often each image is decoded."""

    def __init__(self, count):
        super().__init__(count, png)
        self.decoded = np.zeros(count, int)

    def __getitem__(self, index):
        self.decoded[index] += 1
        return super().__getitem__(index)


def test_the_bank_decodes_once_within_its_budget():
    source = Counted(20)
    bank = images.ImageBank(source, 4, cache_bytes=10 * 4 * 4 * 3)
    order = np.array([3, 3, 0, 19, 7])
    for _ in range(3):
        out = bank(order)
        assert out.dtype == np.uint8
        np.testing.assert_array_equal(out[:, 0, 0, 0], order)
    assert source.decoded.sum() == 4
    bank(range(20))
    bank(range(20))
    assert bank.cached == 10
    assert sorted(set(source.decoded)) == [1, 2]
    assert bank([]).shape == (0, 4, 4, 3)
    none = images.ImageBank(source, 4, cache_bytes=0)
    np.testing.assert_array_equal(none([5])[:, 0, 0, 0], [5])


def test_the_bank_is_thread_safe_and_can_be_pickled():
    bank = images.ImageBank(images.EncodedImages(300, png), 4, cache_bytes=100 * 48)
    rng = np.random.default_rng(0)
    batches = [rng.integers(300, size=32) for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        for batch, out in zip(batches, pool.map(bank, batches), strict=True):
            np.testing.assert_array_equal(
                out[:, 0, 0, 0] + 256 * out[:, 0, 0, 1].astype(int), batch
            )
    assert bank.cached == 100
    copy = pickle.loads(pickle.dumps(bank))
    assert copy.cached == 0
    np.testing.assert_array_equal(copy(batches[0]), bank(batches[0]))


def test_a_damaged_image_is_a_user_error():
    data = encoded(noise(200, 100), "JPEG")
    bank = images.ImageBank(images.EncodedImages(3, lambda i: data[: 500 * i]), 4)
    with pytest.raises(UserError, match="item 2"):
        bank([2])
    with pytest.raises(UserError, match="item 0"):
        bank([0])


def test_augmentation_moves_and_mirrors():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 3), np.uint8)
    same = images.augment(pixels, np.random.default_rng(1))
    np.testing.assert_array_equal(same, pixels)
    mirrored = images.augment(pixels, np.random.default_rng(1), flip=True)
    kinds = {
        (bool(np.all(new == old)) and "kept") or (bool(np.all(new == old[:, ::-1])) and "mirrored")
        for new, old in zip(mirrored, pixels, strict=True)
    }
    assert kinds == {"kept", "mirrored"}
    moved = images.augment(pixels, np.random.default_rng(1), shift=2)
    places = set()
    for new, old in zip(moved, pixels, strict=True):
        padded = np.pad(old, ((2, 2), (2, 2), (0, 0)), mode="edge")
        windows = {(y, x): padded[y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
        places.update(place for place, window in windows.items() if np.array_equal(window, new))
    assert len(places) > 15


@pytest.mark.parametrize("shift", [0, 1, 4, 5, 30])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mine", [range(20), [19, 3, 4]])
def test_augmentation_is_that_of_one_index_for_all_images(shift, flip, mine):
    mine = np.array(mine)
    pixels = np.random.default_rng(0).integers(0, 256, (len(mine), 5, 7, 3), np.uint8)
    found = images.augment(pixels, np.random.default_rng(1), (20, mine), shift=shift, flip=flip)
    expected = reference.augment(pixels, np.random.default_rng(1), 20, mine, shift, flip)
    np.testing.assert_array_equal(found, expected)
    assert np.array_equal(found, pixels) == (not shift and not flip)
