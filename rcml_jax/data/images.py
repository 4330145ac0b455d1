"""Images to arrays: the one decoder, resize and crop, and the results in memory or in a file."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError, features

from rcml_jax.data.relation_graph import ItemImages
from rcml_jax.data.stages import HERE, Runner, disk_errors, mapped_rows, pack, ranges, unpack
from rcml_jax.errors import UserError
from rcml_jax.files import atomic_file
from rcml_jax.log import log_line

# Of strips longer than this many times their width only the centre is resized.
_LONGEST_RATIO = 8
#: The formats that are read, by Pillow's names; of several frames the first. None of them starts
#: another program, as Pillow's EPS does.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_JPEGS = ("JPEG", "MPO")  # MPO: a JPEG that is followed by others, as of many phones
_ORIENTATION = 0x0112
#: Memory for decoded images in a process.
CACHE_BYTES = 512 * 2**20


class ImageError(ValueError):
    """Bytes that are no image of `FORMATS`, are damaged, or have more pixels than allowed."""


class UnknownFormatError(ImageError):
    """Bytes that are no image of `FORMATS`."""


class TooManyPixelsError(ImageError):
    """An image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`: a decompression bomb."""


#: What reading and decoding an image may raise: the file (OSError, and ValueError for a name that
#: is none), or its content (ImageError, which is a ValueError).
DECODE_ERRORS = (OSError, ValueError)


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever a decoder raises into an ImageError: of damaged files they raise anything."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnknownFormatError(f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(str(error)) from error
    except Exception as error:
        raise ImageError(str(error) or type(error).__name__) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(encoded: bytes) -> Image.Image:
    """Open the image; only its header is read."""
    image = Image.open(io.BytesIO(encoded), formats=_formats())
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise TooManyPixelsError(
            f"{image.width} x {image.height} pixels are more than the {most:,} that are allowed"
        )
    return image


def _turned(image: Image.Image) -> bool:
    """Whether the image must be turned to be upright; damaged EXIF data say nothing."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # of many kinds
        return False


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The whole image, upright and as RGB, transparent parts white."""
    turned = _turned(image)
    image.load()
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        if image.format != "PNG":  # a PNG of this mode has 16 bits
            raise ImageError(f"the grey values of mode {image.mode} have no known range")
        return _from_16_bits(image)
    return flatten(image)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as RGB: the high byte, as Pillow has it of 16-bit colour."""
    values = np.asarray(image).astype(np.int64)
    bits = 16
    if image.format == "TIFF":  # 12 bits of a camera or a scanner come in the same mode
        tags: Any = getattr(image, "tag_v2", {})
        bits = min(16, max(8, int(tags.get(258, (16,))[0])))
        if tags.get(262) == 0:  # white is zero, which Pillow turns round for 8 bits alone
            values = (1 << bits) - 1 - values
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def open_rgb(encoded: bytes) -> Image.Image:
    """An upright RGB image from its file's bytes; transparent parts turn white.

    A JPEG's pixels are not read yet, so that `to_array` can decode it at a smaller scale.

    Raises:
      ImageError: the bytes are no image.
    """
    with _decoding():
        image = _open(encoded)
        if image.format in _JPEGS and image.mode == "RGB" and not _turned(image):
            return image
        return _upright_rgb(image)


def flatten(image: Image.Image) -> Image.Image:
    """The image as RGB, transparent parts white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def storable(encoded: bytes, max_size: int | None) -> bytes:
    """PNG or JPEG bytes for the store: as they are where possible, unchecked, else encoded anew.

    Anew: other formats or modes, transparency, an orientation tag, or a longer side beyond
    `max_size`.

    Raises:
      ImageError: the bytes are no image.
    """
    with _decoding():
        image = _open(encoded)
        kind = image.format
        side = max_size or 0
        large = max_size is not None and max(image.size) > side
        plain = not image.has_transparency_data and image.mode == "RGB"
        if kind in ("PNG", *_JPEGS) and plain and not large and not _turned(image):
            return encoded
        if large and kind in _JPEGS:
            image.draft("RGB", (side, side))
        image = _upright_rgb(image)
        if large:
            image.thumbnail((side, side), Image.Resampling.BICUBIC)
        # What the file says beside its pixels, such as a colour profile, may be damaged, too.
        image.info = {}
        out = io.BytesIO()
        if kind in _JPEGS:
            image.save(out, "JPEG", quality=90)
        else:
            image.save(out, "PNG")
        return out.getvalue()


def check_decodes(encoded: bytes) -> None:
    """Reads the whole image, a JPEG at the smallest scale; raises ImageError if it cannot."""
    with _decoding():
        image = _open(encoded)
        if image.format in _JPEGS:
            image.draft("RGB", (1, 1))
        _upright_rgb(image)


def decode_problems(
    places: Sequence[Any],
    read: Callable[[Any], bytes],
    *,
    kept: Path | None = None,
    runner: Runner = HERE,
) -> list[str]:
    """What is wrong with each image, "" where nothing is.

    places: what `read` takes for each image, a string or another value that JSON can hold. kept: a
    folder for what is known of each range of images, which is not looked at again; it is of the
    state of the images and of this decoder. runner: where the ranges are decoded, if `kept`.

    Raises:
      UserError: as `Runner.run`, or `kept` cannot be written.
    """
    if kept is None:
        return _problems(places, read)
    state = hashlib.sha256(json.dumps([PIL.__version__, FORMATS]).encode()).hexdigest()[:8]
    with disk_errors(kept):
        kept.mkdir(parents=True, exist_ok=True)
    parts = {
        kept / f"decoded-{state}-{start:09d}-{stop:09d}.json": places[start:stop]
        for start, stop in ranges(len(places))
    }
    # Pillow's decoders run side by side in threads; what is around them does not.
    check = functools.partial(_check_range, read, 1 if runner.elsewhere else None)
    arrays = lambda own: {"places": pack(own)}  # noqa: E731
    runner.run(check, [(path, functools.partial(arrays, own)) for path, own in parts.items()])
    return [text for path in parts for text in json.loads(path.read_text("utf-8"))]


def _check_range(
    read: Callable[[Any], bytes], threads: int | None, path: Path, arrays: dict[str, np.ndarray]
) -> None:
    problems = json.dumps(_problems(unpack(arrays["places"]), read, threads)).encode()
    with disk_errors(path.parent), atomic_file(path, shared=True) as file:
        file.write(problems)


def _problems(
    places: Sequence[Any], read: Callable[[Any], bytes], threads: int | None = None
) -> list[str]:
    def problem(place: Any) -> str:
        try:
            check_decodes(read(place))
        except DECODE_ERRORS as error:
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(problem, places))


def image_states(images: ItemImages) -> list:
    """A JSON value for each image that changes when the image does.

    Images that know it themselves have a method `states`; of the others the content is hashed.
    """
    own = getattr(images, "states", None)
    if own is not None:
        return own()
    return [hashlib.sha256(images.encoded(index)).hexdigest() for index in range(len(images))]


def _images_digest(images: ItemImages) -> str:
    """A digest that changes when an image does; images with many files know a short `state`."""
    short = getattr(images, "state", None)
    state = image_states(images) if short is None else short()
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Framing:
    """How an image becomes a square: it is resized, and the centre is cut out.

    size: side of the square in pixels. resize: what the short side is resized to before the cut, 0
    for `size`. squash: both sides are resized to that, whatever the proportions. resample: Pillow's
    number of the filter, bicubic by default.
    """

    size: int
    resize: int = 0
    squash: bool = False
    resample: int = int(Image.Resampling.BICUBIC)


def to_array(image: Image.Image, framing: int | Framing) -> np.ndarray:
    """The image as Hugging Face's processors make it: uint8 (size, size, 3).

    framing: as of a checkpoint; a number is that of CLIP, whose short side is resized to it. JPEGs
    are decoded at a smaller scale, of twice the size at least, which changes a photograph by a
    grey level or two on average. What is not scaled so comes out exactly as from the processor, or
    within two grey levels where it is a long strip.

    Raises:
      ImageError: the image's bytes are damaged.
    """
    framing = Framing(framing) if isinstance(framing, int) else framing
    size, short = framing.size, framing.resize or framing.size
    width, height = image.size
    with _decoding():
        # The smaller scale rounds both sides up; the box says where in it the image ends.
        drafted = image.draft("RGB", (2 * short, 2 * short))
        image = image.convert("RGB")
    box = drafted[1] if drafted else (0, 0, *image.size)
    long = short if framing.squash else int(short * max(width, height) / min(width, height))
    width, height = (long, short) if width > height else (short, long)
    left, top = (width - size) // 2, (height - size) // 2
    crop = (left, top, left + size, top + size)
    filter_ = Image.Resampling(framing.resample)
    if long > _LONGEST_RATIO * short:
        scales = 2 * ((box[2], width), (box[3], height))
        parts = [place * old / new for place, (old, new) in zip(crop, scales, strict=True)]
        image = image.resize((size, size), filter_, box=(parts[0], parts[1], parts[2], parts[3]))
        return np.array(image)
    image = image.resize((width, height), filter_, box=box)
    return np.array(image.crop(crop))


class EncodedImages:
    """Images of items that one function gives as encoded bytes.

    places: what `encode` takes for each item, a string or another value that JSON can hold, such as
    a path; a number N stands for the indices 0 to N - 1. Other processes can prepare the images
    where `encode` can be pickled.
    """

    def __init__(self, places: int | Sequence[Any], encode: Callable[[Any], bytes]):
        self.places = range(places) if isinstance(places, int) else places
        self.encode = encode

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Image.Image:
        return open_rgb(self.encoded(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of one item's image."""
        return self.encode(self.places[int(index)])


class ChosenImages:
    """Images of another source by their indices there, which may repeat; an `ItemImages`."""

    def __init__(self, images: ItemImages, indices: np.ndarray):
        self._images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image.Image:
        return self._images[int(self.indices[index])]

    def encoded(self, index: int) -> bytes:
        """The bytes of one item's image."""
        return self._images.encoded(int(self.indices[index]))

    def states(self) -> list:
        """A JSON value for each image that changes when the image does, as the source has it."""
        found = image_states(self._images)
        return [found[index] for index in self.indices]

    def distinct(self) -> tuple["ChosenImages", np.ndarray]:
        """Each image once, and the number among them of each item's image (n,)."""
        indices, rows = np.unique(self.indices, return_inverse=True)
        return ChosenImages(self._images, indices), rows


class ImageBank:
    """Items' images as arrays, decoded once while they fit into `cache_bytes` of memory.

    Which images are kept: the first that are asked for. Thread-safe; a pickled copy starts with
    an empty cache.
    """

    def __init__(
        self,
        images: ItemImages,
        framing: int | Framing,
        *,
        cache_bytes: int = CACHE_BYTES,
        threads: int | None = None,
    ):
        self.framing = Framing(framing) if isinstance(framing, int) else framing
        self.images, self.size, self.cache_bytes = images, self.framing.size, cache_bytes
        self.threads = threads or min(8, os.cpu_count() or 1)
        self._reset()

    def _reset(self) -> None:
        capacity = min(len(self.images), self.cache_bytes // (3 * self.size**2))
        # np.empty: the system hands out the memory only as the images come in.
        self._store = np.empty((capacity, self.size, self.size, 3), np.uint8)
        self._slot = np.full(len(self.images), -1, np.int64)
        self._used = 0
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def cached(self) -> int:
        """The number of images in memory."""
        return self._used

    def __call__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of items (n,): uint8 (n, size, size, 3).

        Raises:
          UserError: an image cannot be decoded.
        """
        indices = np.asarray(indices, np.int64)
        slots = self._slot[indices]
        out = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        hit = slots >= 0
        out[hit] = self._store[slots[hit]]
        missing = np.unique(indices[~hit])
        for index, array in zip(missing, self._decode_all(missing), strict=True):
            out[indices == index] = array
            self._keep(index, array)
        return out

    def _decode_all(self, indices: np.ndarray):
        if len(indices) < 4 or self.threads == 1:
            return map(self._decode, indices)
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="images")
        return self._pool.map(self._decode, indices)

    def _decode(self, index: int) -> np.ndarray:
        try:
            return to_array(self.images[int(index)], self.framing)
        except DECODE_ERRORS as error:
            raise UserError(self._undecodable(int(index), error)) from error

    def _undecodable(self, index: int, error: Exception) -> str:
        paths = getattr(self.images, "paths", None)
        if paths is not None:
            return f"The image {paths[index]} cannot be decoded ({error}); mend or remove it."
        return (
            f"The image of item {index} cannot be decoded ({error}); remove the prepared data set, "
            "so that it is made anew, or mend the source image."
        )

    def _keep(self, index: int, array: np.ndarray) -> None:
        with self._lock:
            if self._slot[index] >= 0 or self._used >= len(self._store):
                return
            self._store[self._used] = array
            self._slot[index] = self._used  # published last: readers take no lock
            self._used += 1


class StoredPixels:
    """Images of items as arrays, decoded once into a file that is mapped: reading is a copy.

    Called as an `ImageBank`, whose results it has to the bit. The file has all N images, uint8
    (N, size, size, 3), those of `ChosenImages` once each. It is written when images are first asked
    for, in threads. After a kill the next call goes on, and of several processes one writes while
    the others wait. Where the directory cannot be written, images are decoded as by an `ImageBank`.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        images: ItemImages,
        framing: int | Framing,
        *,
        threads: int | None = None,
        log: Callable[[str], None] = log_line,
    ):
        """directory, name: where the file lies and the start of its name, before a digest."""
        # Of items that share an image the file has it once.
        self._rows: np.ndarray | None = None
        if isinstance(images, ChosenImages):
            images, self._rows = images.distinct()
        # A bank without memory: every image is decoded once.
        self._bank = ImageBank(images, framing, cache_bytes=0, threads=threads or os.cpu_count())
        self.images, self.framing, self.size = images, self._bank.framing, self._bank.size
        self._directory, self._name, self._log = Path(directory), name, log
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._read: Callable[[np.ndarray], np.ndarray] | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_read")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __call__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of items (n,): uint8 (n, size, size, 3).

        Raises UserError as `open` does.
        """
        rows = np.asarray(indices, np.int64)
        return self.open()(rows if self._rows is None else self._rows[rows])

    def open(self) -> Callable[[np.ndarray], np.ndarray]:
        """Map the file, and write it where it is missing; returns what reads rows of it.

        Raises UserError where an image cannot be decoded or the disk has too little room.
        """
        with self._lock:
            if self._read is None:
                self._read = self._open()
            return self._read

    def _open(self) -> Callable[[np.ndarray], np.ndarray]:
        path = self.path
        if not path.is_file():
            if not _can_write(path.parent):
                self._log(f"{path.parent} cannot be written; images are decoded in every run.")
                return ImageBank(self.images, self.framing)
            self._tell_size(path)
        return mapped_rows(path, _PixelRows(self._bank), log=self._log).__getitem__

    @functools.cached_property
    def path(self) -> Path:
        """The file; its name has a digest of the images, the framing and the decoder."""
        framing = {f.name: getattr(self.framing, f.name) for f in dataclasses.fields(Framing)}
        decoder = [PIL.__version__, features.version("jpg"), features.version("webp")]
        state = json.dumps([_images_digest(self.images), len(self.images), framing, decoder])
        digest = hashlib.sha256(state.encode()).hexdigest()[:16]
        return self._directory / f"{self._name}-{self.size}px-{digest}.npy"

    def _tell_size(self, path: Path) -> None:
        """Say how large the file will be; UserError where there is not that much room."""
        part = path.with_name(path.name + ".part")
        size = len(self.images) * self.size**2 * 3
        wanted = size - (part.stat().st_size if part.is_file() else 0)
        folder = next(x for x in (path.parent, *path.parents) if x.is_dir())
        free = shutil.disk_usage(folder).free
        what = f"{len(self.images):,} images of {self.size} pixels take {_in_words(size)}"
        if wanted > free:
            raise UserError(
                f"{what} when they are stored decoded, but {path.parent} has room for "
                f"{_in_words(free)}; free some, set data.dir to another disk, or set "
                "config.data.pixels=encoded"
            )
        self._log(f"{what}, decoded once: {path}")


class _PixelRows:
    """Decoded images as `stored_rows` takes rows."""

    dtype: type = np.uint8

    def __init__(self, bank: ImageBank):
        self._bank, self.shape = bank, (bank.size, bank.size, 3)

    def __len__(self) -> int:
        return len(self._bank.images)

    def block(self, start: int, stop: int) -> np.ndarray:
        return self._bank(np.arange(start, stop))


def _can_write(folder: Path) -> bool:
    """Whether a folder, or one that is to be made, can be written."""
    there = next(x for x in (folder, *folder.parents) if x.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _in_words(size: int) -> str:
    """A size in bytes as KiB, MiB or GiB."""
    power = next((p for p in (30, 20) if size >= 2**p), 10)
    return f"{size / 2**power:,.{power // 30}f} {'KMG'[power // 10 - 1]}iB"


#: Which images of a batch some images are: how many the batch has, and their indices in it.
Part = tuple[int, np.ndarray]


def augment(
    images: np.ndarray,
    rng: np.random.Generator,
    part: Part | None = None,
    *,
    shift: int = 0,
    flip: bool = False,
) -> np.ndarray:
    """Randomly moved and mirrored copies of images (n, H, W, 3), the edge colour filling in.

    shift: at most so many pixels in each direction; flip: mirror half of them left to right.
    part: the draws are those that these images have in a batch; None: they are all of it.
    """
    n, height, width, _ = images.shape
    count, mine = part or (n, np.arange(n))
    # Beyond its own size a shift leaves nothing but the edge.
    limit = np.array([[height - 1], [width - 1]])
    moves = (rng.integers(0, 2 * shift + 1, (2, count))[:, mine] - shift).clip(-limit, limit)
    mirrored = rng.random((count, 1))[mine, 0] < 0.5 if flip else np.zeros(n, bool)
    out = np.empty_like(images)
    for image, to, down, right, mirror in zip(images, out, *moves.tolist(), mirrored, strict=True):
        to = to[:, ::-1] if mirror else to
        # What is in sight, then the columns beside it and the rows above and below.
        top, bottom = max(0, -down), height - max(0, down)
        left, end = max(0, -right), width - max(0, right)
        to[top:bottom, left:end] = image[top + down : bottom + down, left + right : end + right]
        to[top:bottom, :left] = to[top:bottom, left : left + 1]
        to[top:bottom, end:] = to[top:bottom, end - 1 : end]
        to[:top], to[bottom:] = to[top], to[bottom - 1]
    return out


# Taking information away from images and texts, to make a task that needs both.


_GREY = 128


def hide_patches(
    images: np.ndarray,
    rng: np.random.Generator,
    part: Part | None = None,
    *,
    share: float,
    patch: int,
) -> np.ndarray:
    """Copies of images (n, H, W, 3) uint8, the same share of the patches of each turned grey.

    H and W are multiples of `patch`; share: 0 to 1, rounded to a whole number of patches; part: as
    of `augment`.
    """
    n, height, width, _ = images.shape
    batch, mine = part or (n, np.arange(n))
    rows, columns = height // patch, width // patch
    count = round(share * rows * columns)
    order = np.argsort(rng.random((batch, rows * columns))[mine], axis=1)
    hidden = (order < count).reshape(n, rows, columns)
    mask = hidden.repeat(patch, axis=1).repeat(patch, axis=2)
    return np.where(mask[..., None], np.uint8(_GREY), images)


def hide_patches_of_rows(
    images: np.ndarray, rows: Sequence[int] | np.ndarray, seed: int, *, share: float, patch: int
) -> np.ndarray:
    """As `hide_patches`; what is hidden of an image depends on the seed and its row, rows (n,)."""
    return np.concatenate(
        [
            hide_patches(image[None], _noise(seed, row), share=share, patch=patch)
            for image, row in zip(images, rows, strict=True)
        ]
    )


class PatchesHidden:
    """Images without the patches that `hide_patches_of_rows` hides, for a tower of any size.

    They are squares of `side` × `side` patches, whatever the image's size; the row is its index.
    """

    def __init__(self, images: ItemImages, seed: int, *, share: float, side: int):
        self._images, self._seed, self._share, self._side = images, seed, share, side

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        image = self._images[index]
        patch = max(min(image.size) // self._side, 1)
        pixels = to_array(image, patch * self._side)[None]
        hidden = hide_patches_of_rows(pixels, [index], self._seed, share=self._share, patch=patch)
        return Image.fromarray(hidden[0])

    def encoded(self, index: int) -> bytes:
        """The PNG bytes of one image."""
        out = io.BytesIO()
        self[index].save(out, "PNG")
        return out.getvalue()

    def states(self) -> list:
        """A JSON value for each image that changes when the image or what is hidden does."""
        hidden = [self._share, self._side, self._seed]
        return [[*hidden, state] for state in image_states(self._images)]


def drop_words(text: str, rng: np.random.Generator, *, share: float) -> str:
    """The text without about that share of its words, each lost by itself; it may turn empty."""
    words = text.split()
    kept = rng.random(len(words)) >= share
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def drop_words_of_rows(
    texts: Sequence[str], rows: Sequence[int] | np.ndarray, seed: int, *, share: float
) -> list[str]:
    """As `drop_words`; which words a text loses depends on the seed and its row, rows (n,)."""
    return [
        drop_words(text, _noise(seed, row), share=share)
        for text, row in zip(texts, rows, strict=True)
    ]


def _noise(seed: int, row: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(row)))
