"""The one decoder: formats by name, upright, 16-bit grey, bombs, and whatever damaged files do."""

import base64
import io
import json
import pathlib
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from rcml_jax.data import images

#: Format: options of Pillow's `save`.
OPTIONS = {
    "JPEG": {"quality": 80},
    "PNG": {},
    "WEBP": {"quality": 60},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {"quality": 50},
}
ROUNDS = 1500


def photo(width=24, height=16, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def outcomes(data):
    """What the three ways through the gate say of a file: "" or the error's text."""
    found = []
    for way in (
        images.check_decodes,
        lambda x: images.storable(x, 512),
        lambda x: images.storable(x, 8),
        lambda x: images.to_array(images.open_rgb(x), 8),
    ):
        try:
            way(data)
            found.append("")
        except images.ImageError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_formats_by_name_are_read(kind):
    assert outcomes(encoded(photo(), kind, **OPTIONS[kind])) == [""] * 4
    assert set(OPTIONS) == set(images.FORMATS)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "EPS", "PCX", "DDS", "PDF"])
def test_no_other_format_is_read(kind):
    data = encoded(photo(32, 32), kind)
    for problem in outcomes(data):
        assert "no JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF image" in problem
    with pytest.raises(images.UnknownFormatError):
        images.open_rgb(data)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = images.open_rgb(data).getpixel((4, 4))
    assert red > 200
    assert blue < 60


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_way_turns_an_image_upright(kind):
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white at the top
    data = encoded(image, kind, exif=exif)
    for upright in (images.open_rgb(data), images.open_rgb(images.storable(data, 512))):
        assert upright.size == (32, 64)
        pixels = images.to_array(upright, 16)
        assert pixels[:4].mean() > 200
        assert pixels[-4:].mean() < 50


def test_damaged_exif_leaves_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(), "JPEG", exif=exif).replace(b"MM\x00*", b"MM\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert images.open_rgb(data).size == (24, 16)


def grey_tiff(values, photometric):
    """A grey TIFF of one strip, as a scanner writes it; photometric: 0, white is zero, or 1."""
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric}
    tags |= {273: 8, 277: 1, 278: height, 279: len(data)}
    out = struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags))
    return out + b"".join(struct.pack("<HHII", tag, 4, 1, x) for tag, x in tags.items()) + b"\0" * 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_whose_white_is_zero(dtype):
    most = np.iinfo(dtype).max
    values = np.linspace(0, most, 64).astype(dtype).reshape(8, 8)
    plain, turned = (
        np.asarray(images.open_rgb(images.storable(grey_tiff(x, photometric), None)))
        for photometric, x in ((1, values), (0, most - values))
    )
    np.testing.assert_array_equal(turned, plain)
    assert plain[0, 0].tolist() == [0, 0, 0]
    assert plain[7, 7].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_values(kind):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(values), kind)
    for image in (images.open_rgb(data), images.open_rgb(images.storable(data, 512))):
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image)[..., 0], values >> 8)
    images.check_decodes(data)


def test_12_bit_grey_fills_the_range():
    values = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(values), "TIFF", tiffinfo={258: 12})
    # Pillow packs 16 bits all the same; a file that says 12 has its white at 4095.
    assert data  # the header alone is of interest here
    image = Image.fromarray(values)
    image.format, image.tag_v2 = "TIFF", {258: (12,)}
    np.testing.assert_array_equal(np.asarray(images._from_16_bits(image))[..., 0], values >> 4)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_of_an_unknown_range_is_refused(mode):
    data = encoded(photo(mode="L").convert(mode), "TIFF")
    assert all("no known range" in problem for problem in outcomes(data))


def test_bombs_are_refused(monkeypatch):
    data = encoded(Image.new("1", (200, 200)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200 - 1)
    for way in (images.check_decodes, images.open_rgb, lambda x: images.storable(x, 512)):
        # Pillow warns, too, which is an error in tests; ours comes without it as well.
        for action in ("error", "ignore"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                with pytest.raises(images.TooManyPixelsError):
                    way(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    images.check_decodes(data)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, MemoryError])
def test_whatever_a_decoder_raises_is_a_decode_error(monkeypatch, error):
    def fail(self):
        raise error("inside the decoder")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    (problem,) = images.decode_problems([encoded_before], bytes)
    assert "inside the decoder" in problem
    with pytest.raises(images.ImageError):
        images.open_rgb(encoded_before)


encoded_before = encoded(photo())
DAMAGED = json.loads((pathlib.Path(__file__).parent / "damaged_images.json").read_text("ascii"))


@pytest.mark.parametrize("number", range(16))
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_that_escaped_as_other_errors(number):
    """Found by mutating small files: Pillow 13 raises the error named beside each."""
    kind, error, text = DAMAGED[number]
    assert error in ("RuntimeError", "NotImplementedError", "TypeError")
    found = outcomes(base64.b85decode(text))
    assert found[0] or (not any(found) and kind == "AVIF")  # another decoder may read it


def mutated(data, rng):
    """A copy with some bytes changed, cut out, doubled or the end cut off."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place, kind = int(rng.integers(len(data))), rng.integers(4)
        length = int(rng.integers(1, 9))
        if kind == 0:
            data[place] = int(rng.integers(256))
        elif kind == 1 and len(data) > 16:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = data[place : place + length]
        else:
            data[place : place + length] = rng.bytes(length)
    if rng.random() < 0.2:
        del data[int(rng.integers(1, len(data))) :]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_end_in_an_image_or_a_decode_error(kind):
    rng = np.random.default_rng(0)
    whole = [
        encoded(photo(mode=mode, seed=seed), kind, **OPTIONS[kind])
        for seed, mode in enumerate(("RGB", "L") if kind in ("JPEG", "AVIF") else ("RGB", "P"))
    ]
    refused = 0
    for number in range(ROUNDS):
        data = mutated(whole[number % len(whole)], rng)
        found = outcomes(data)
        # What passes the check of the preparation must not fail later.
        assert found[0] or not any(found), (number, found)
        refused += bool(found[0])
    assert ROUNDS // 10 < refused < ROUNDS
