"""A MADE-UP corpus in the format of Amazon Reviews 2023, with planted groups of buyers.

    python -m tests.data.planted_amazon DIRECTORY

writes it, images included, for `amazon.load(cache, "Planted", path=DIRECTORY)` of
`rcml_jax.data.sources`.
Nothing in it is real: no user, product, brand or image exists. It is for tests, and for seeing
whether a method uses relations at all; figures measured on it say nothing about real catalogues.

What is planted:

- An item has a category (one of 20), a colour (5), a pattern (5), and four traits that buyers do
  not care about: brand (6), finish (6), series (4), size (2). Its title names all seven, and its
  image shows them: category by the outline and the side of its notch, colour and pattern by the
  filling, brand by the frame, finish by the ground, series by the corner of a mark, and size. Every
  category has as many items of each colour and pattern, to within one.
- There are 10 groups of buyers. Group g < 5 buys only items of colour g, group g >= 5 only items of
  pattern g - 5. So every item is for exactly two groups, and those who buy it in one group go with
  other items than those in the other: the colour counts in one relation and the pattern in the
  other, and no fixed similarity of items can serve both.
- Four categories make up four fifths of what a group buys (SHARES), the other sixteen the rest.
  Groups 0 to 4 have the blocks 0-3, 4-7, ..., 16-19; groups 5 to 9 the same moved on by two. This
  is what clustering can recover: it sees categories only.
- NOISE of the purchases are of any item whatever. There are a fifth as many casual buyers, of one
  to three items, who belong to no group and drop out of the 5-core.

With `--reviews` it is a corpus of any size instead, without images, written as a stream: the same
items and groups, but reviews per user and per item follow power laws, and lines are as long as real
ones (`write_large`). The size of Electronics: `--reviews 44000000 --users 18300000 --items 1600000`
"""

import argparse
import dataclasses
import functools
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DOMAIN = "Planted"
GROUPS, LIKED = 10, 5
SHARES = (0.3, 0.22, 0.16, 0.12)
NOISE = 0.03
NOTICE = "Made up for tests; no such product, person or purchase exists."
SIZE = 64  # pixels of an image's side

CATEGORIES = (
    *("Kettles & Pots", "Lamps", "Notebooks", "Umbrellas", "Cushions", "Clocks", "Vases"),
    *("Backpacks", "Blankets", "Mugs", "Curtains", "Trays", "Wallets", "Scarves", "Baskets"),
    *("Frames", "Rugs", "Bottles", "Aprons", "Boxes"),
)
NOUNS = (
    *("kettle", "lamp", "notebook", "umbrella", "cushion", "clock", "vase", "backpack", "blanket"),
    *("mug", "curtain", "tray", "wallet", "scarf", "basket", "frame", "rug", "bottle", "apron"),
    "box",
)
COLOURS = {
    "red": (205, 30, 35),
    "green": (20, 140, 50),
    "blue": (30, 70, 210),
    "yellow": (225, 190, 10),
    "purple": (140, 40, 160),
}
PATTERNS = ("striped", "barred", "checked", "dotted", "diagonal")
BRANDS = {
    "Orvane": (0, 0, 0),
    "Telmor": (120, 120, 120),
    "Quistal": (0, 150, 160),
    "Brenoa": (240, 120, 30),
    "Yarvik": (120, 80, 40),
    "Lusomi": (240, 130, 180),
}
FINISHES = {
    "matte": (250, 250, 250),
    "glossy": (215, 230, 250),
    "brushed": (250, 232, 210),
    "waxed": (215, 245, 220),
    "raw": (235, 220, 245),
    "enamel": (225, 225, 225),
}
SERIES = ("alpha", "beta", "gamma", "delta")
SIZES = ("small", "large")

Url = Callable[[str], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Planted:
    """Made-up items (N,), users (U,) and purchases (R,), all int arrays.

    traits: name → (N,) value of each item. group: of each user, -1 for the casual ones. user, item:
    purchases in a random order; some come twice.
    """

    traits: dict[str, np.ndarray]
    group: np.ndarray
    user: np.ndarray
    item: np.ndarray

    @functools.cached_property
    def item_ids(self) -> list[str]:
        return [f"P{i:09d}" for i in range(len(self.traits["category"]))]

    @functools.cached_property
    def user_ids(self) -> list[str]:
        return [f"MADEUPUSER{i:018d}" for i in range(len(self.group))]

    def title(self, item: int) -> str:
        """All the traits of an item in words."""
        value = {name: int(values[item]) for name, values in self.traits.items()}
        brand, colour = list(BRANDS)[value["brand"]], list(COLOURS)[value["colour"]]
        return (
            f"{brand} {SIZES[value['size']]} {colour} "
            f"{PATTERNS[value['pattern']]} {NOUNS[value['category']]}, "
            f"{list(FINISHES)[value['finish']]}, series {SERIES[value['series']]}"
        )

    def likes(self, group: int) -> np.ndarray:
        """Which items (N,) a group buys, noise aside."""
        if group < LIKED:
            return self.traits["colour"] == group
        return self.traits["pattern"] == group - LIKED


def plant(
    users: int = 20_000, items: int = 5_000, *, purchases: tuple[int, int] = (10, 20), seed: int = 0
) -> Planted:
    """A corpus with so many users in groups, each with a number of purchases in the given range.

    From 100 items on every category has every colour and pattern.
    """
    rng = np.random.default_rng(seed)
    traits = _traits(items, rng)
    group = np.arange(users) % GROUPS
    many = rng.integers(purchases[0], purchases[1] + 1, users)
    user = np.repeat(np.arange(users), many)
    item = np.empty(len(user), np.int64)
    empty = Planted(traits, group, user, item)
    for g in range(GROUPS):
        weight = group_shares(g)[traits["category"]] * empty.likes(g)
        mine = group[user] == g
        item[mine] = rng.choice(items, int(mine.sum()), p=weight / weight.sum())
    noise = rng.random(len(user)) < NOISE
    item[noise] = rng.integers(items, size=int(noise.sum()))
    casual = users // 5
    few = rng.integers(1, 4, casual)
    user = np.concatenate([user, np.repeat(users + np.arange(casual), few)])
    item = np.concatenate([item, rng.integers(items, size=int(few.sum()))])
    order = rng.permutation(len(user))
    group = np.concatenate([group, np.full(casual, -1)])
    return Planted(traits, group, user[order], item[order])


def group_shares(group: int) -> np.ndarray:
    """A group's distribution over the categories."""
    count = len(CATEGORIES)
    shares = np.full(count, (1 - sum(SHARES)) / (count - len(SHARES)))
    first = 4 * (group % LIKED) + 2 * (group >= LIKED)
    shares[(first + np.arange(len(SHARES))) % count] = SHARES
    return shares


def _traits(items: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    number = np.arange(items)
    category, place = number % len(CATEGORIES), number // len(CATEGORIES)
    traits = {
        "category": category,
        "colour": place % LIKED,
        "pattern": (place + place // LIKED) % LIKED,
    }
    for name, values in (("brand", BRANDS), ("finish", FINISHES), ("series", SERIES)):
        traits[name] = rng.integers(len(values), size=items)
    return traits | {"size": rng.integers(len(SIZES), size=items)}


# ---------------------------------------------------------------- the files of any size

# The number of reviews of the user (item) of rank x is proportional to x ** -exponent.
USER_EXPONENT, ITEM_EXPONENT = 0.6, 0.7
_DRAWN = 500_000  # reviews at a time
_POOL = 20_000  # distinct texts of reviews: more than a compressor remembers


def write_large(directory: Path, *, reviews: int, users: int, items: int, seed: int = 0) -> Path:
    """Write both files, gzipped, of a corpus of any size; returns the directory.

    A review takes 640 bytes on average, 380 of them the text, and 204 when compressed; an item's
    record 2,000. One review in 16 has the address of an image. The memory is that of `items` and of
    one part of the reviews.

    Raises:
      ValueError: fewer than 100 items.
    """
    if items < 100:
        raise ValueError(f"items={items} must be at least 100")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.txt").write_text(f"{NOTICE}\n\n{__doc__}")
    rng = np.random.default_rng(seed)
    nobody = np.zeros(0, np.int64)
    planted = Planted(_traits(items, rng), nobody, nobody, nobody)
    bodies = [_review_body(rng) for _ in range(_POOL)]
    with gzip.open(directory / f"{DOMAIN}.jsonl.gz", "wb", 1) as file:
        for first in range(0, reviews, _DRAWN):
            count = min(_DRAWN, reviews - first)
            user, item = draw_large(count, users, items, rng)
            file.write(_review_block(bodies, user, item, first, rng))
    texts = [_words(rng, 1000) for _ in range(2000)]
    chosen = rng.integers(len(texts), size=items)
    with gzip.open(directory / f"meta_{DOMAIN}.jsonl.gz", "wb", 1) as file:
        lines = item_records(planted, "https://images.invalid/{}.png".format)
        for record, text in zip(lines, chosen.tolist(), strict=True):
            record["features"] = [texts[text]]
            file.write(f"{json.dumps(record)}\n".encode())
    return directory


def draw_large(
    count: int, users: int, items: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Users and items (count,) of so many reviews; user u is of group u % GROUPS."""
    user = _ranks(count, users, USER_EXPONENT, rng)
    group = user % GROUPS
    cumulated = np.cumsum([group_shares(g) for g in range(GROUPS)], axis=1)
    category = (rng.random(count)[:, None] > cumulated[group, :-1]).sum(axis=1)
    row = _ranks(count, items // (len(CATEGORIES) * LIKED), ITEM_EXPONENT, rng)
    # The one of five items in a row that has the group's colour or pattern; see `_traits`.
    place = np.where(group < LIKED, group, (group - LIKED - row) % LIKED)
    item = category + len(CATEGORIES) * (LIKED * row + place)
    noise = rng.random(count) < NOISE
    item[noise] = rng.integers(items, size=int(noise.sum()))
    return user, item


def _ranks(count: int, n: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Ranks (count,) below n, drawn with density proportional to rank ** -exponent."""
    return (n * rng.random(count) ** (1 / (1 - exponent))).astype(np.int64)


def _review_body(rng: np.random.Generator) -> bytes:
    """The fields of a review that come before the ids."""
    image = {"small_image_url": f"https://images.invalid/{rng.integers(10**9)}.jpg"}
    record = {
        "rating": float(rng.integers(1, 6)),
        "title": _words(rng, 25),
        "text": _words(rng, int(rng.lognormal(5.3, 0.9))),
        "images": [image] if rng.random() < 1 / 16 else [],
    }
    return json.dumps(record)[:-1].encode()


def _words(rng: np.random.Generator, length: int) -> str:
    """Made-up words, the common ones most often, of about `length` characters together."""
    ranks = _ranks(length // 5 + 1, 4000, 0.75, rng)
    return " ".join(_WORDS[rank] for rank in ranks.tolist())


_SYLLABLES = "bacodifegulameniporasetuvewixozake"


def _word(number: int) -> str:
    count = 1 + (number > 15) + number % 3
    places = (number // 16**k + 5 * k for k in range(count))
    return "".join(_SYLLABLES[2 * (place % 16) :][:2] for place in places)


_WORDS = [_word(number) for number in range(4000)]


def _review_block(
    bodies: list[bytes], user: np.ndarray, item: np.ndarray, first: int, rng: np.random.Generator
) -> bytes:
    """Reviews as lines; ids look random, as real ones do, so that they compress as badly."""
    columns = [
        rng.integers(len(bodies), size=len(user)),
        item,
        item,
        user,
        (user.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(4),
        1_600_000_000_000 + first + np.arange(len(user)),
        _ranks(len(user), 10, 0.9, rng),
    ]
    line = (
        b'%b, "asin": "V%09d", "parent_asin": "P%09d", "user_id": "M%012X%015X", '
        b'"timestamp": %d, "helpful_vote": %d, "verified_purchase": true}\n'
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return b"".join([line % (bodies[body], *rest) for body, *rest in rows])


# ---------------------------------------------------------------- the files


def write(
    planted: Planted,
    directory: Path,
    *,
    view: str = "raw",
    compressed: bool = True,
    images: bool = True,
    url: Url = "https://images.invalid/{}.png".format,
) -> Path:
    """Write both files and, if wanted, `images/<parent_asin>.png`; returns the directory.

    view: "raw" or "hugging_face", whose fields look different. url: an id → its image's address.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.txt").write_text(f"{NOTICE}\n\n{__doc__}")
    ending = ".jsonl.gz" if compressed else ".jsonl"
    write_lines(directory / f"{DOMAIN}{ending}", review_lines(planted, view))
    write_lines(directory / f"meta_{DOMAIN}{ending}", item_lines(planted, view, url))
    if images:
        (directory / "images").mkdir(exist_ok=True)
        for i, key in enumerate(planted.item_ids):
            (directory / "images" / f"{key}.png").write_bytes(image(planted, i))
    return directory


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Text lines, gzipped if the name says so."""
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text, 1) if path.suffix == ".gz" else text)


def review_lines(planted: Planted, view: str = "raw") -> Iterator[str]:
    """Review records, the fields that come in two spellings in one of them by view."""
    raw = view == "raw"
    time, votes = ("timestamp", "helpful_vote") if raw else ("sort_timestamp", "helpful_votes")
    users, items = planted.user_ids, planted.item_ids
    rows = zip(planted.user.tolist(), planted.item.tolist(), strict=True)
    for number, (user, item) in enumerate(rows):
        record = {
            "rating": 5.0,
            "title": "Made up",
            "text": NOTICE,
            "images": [],
            "asin": f"V{items[item][1:]}",
            "parent_asin": items[item],
            "user_id": users[user],
            time: 1_600_000_000_000 + number,
            votes: 0,
            "verified_purchase": True,
        }
        yield json.dumps(record)


def item_lines(planted: Planted, view: str, url: Url) -> Iterator[str]:
    """Item records as in the raw files or as Hugging Face shows them."""
    for record in item_records(planted, url):
        yield json.dumps(record if view == "raw" else _hugging_face(record))


def item_records(planted: Planted, url: Url) -> Iterator[dict]:
    """Item records as in the raw files."""
    for i, key in enumerate(planted.item_ids):
        yield {
            "main_category": "Made up",
            "title": planted.title(i),
            "average_rating": 5.0,
            "rating_number": 10,
            "features": [],
            "description": [NOTICE],
            "price": 9.99 if i % 2 else None,
            "images": [_image(url(key), "MAIN"), _image(url(f"{key}-back"), "PT01")],
            "videos": [],
            "store": None,
            "categories": ["Made up", CATEGORIES[planted.traits["category"][i]]],
            "details": {"Brand": "made up"},
            "parent_asin": key,
            "bought_together": None,
        }


def _image(address: str, variant: str) -> dict:
    high = address if variant == "MAIN" else None
    return {"thumb": address, "large": address, "variant": variant, "hi_res": high}


def _hugging_face(record: dict) -> dict:
    images = {key: [image[key] for image in record["images"]] for key in record["images"][0]}
    return record | {
        "images": images,
        "videos": {"title": [], "url": [], "user_id": []},
        "details": json.dumps(record["details"]),
        "price": str(record["price"]),
    }


# ---------------------------------------------------------------- the images


def image(planted: Planted, item: int) -> bytes:
    """The PNG of an item; places and shades differ a little from item to item."""
    value = {name: int(values[item]) for name, values in planted.traits.items()}
    rng = np.random.default_rng([item, 7])
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(FINISHES.values())[value["finish"]])
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(
        (0, 0, SIZE - 1, SIZE - 1), outline=list(BRANDS.values())[value["brand"]], width=4
    )
    filling = _filling(value["colour"], value["pattern"], rng)
    canvas.paste(filling, mask=_outline(value["category"], value["size"], rng))
    _mark(draw, value["series"])
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def _mark(draw: ImageDraw.ImageDraw, corner: int) -> None:
    x, y = (6 if corner % 2 == 0 else SIZE - 13), (6 if corner < 2 else SIZE - 13)
    draw.ellipse((x, y, x + 6, y + 6), fill="black")


def _filling(colour: int, pattern: int, rng: np.random.Generator) -> Image.Image:
    """A colour with a lighter pattern of a period of twelve pixels."""
    y, x = np.mgrid[:SIZE, :SIZE] + rng.integers(12, size=2)[:, None, None]
    stripes, bars = y % 12 < 6, x % 12 < 6
    light = (
        stripes,
        bars,
        stripes ^ bars,
        (y % 12 - 6) ** 2 + (x % 12 - 6) ** 2 < 14,
        (x + y) % 12 < 6,
    )[pattern]
    shade = np.array(list(COLOURS.values())[colour]) * rng.uniform(0.9, 1.0)
    pixels = np.where(light[..., None], 255 - (255 - shade) * 0.35, shade)
    return Image.fromarray(pixels.astype(np.uint8))


def _outline(category: int, size: int, rng: np.random.Generator) -> Image.Image:
    """A circle, square, triangle, diamond or cross with a notch at one of its sides."""
    mask = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(mask)
    r = (18, 22)[size]
    cx, cy = SIZE // 2 + rng.integers(-2, 3, 2)
    shape, side = category // 4, category % 4
    if shape == 0:
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
    elif shape == 1:
        draw.rectangle((cx - r, cy - r, cx + r, cy + r), fill=255)
    elif shape == 2:
        draw.polygon([(cx, cy - r), (cx + r, cy + r), (cx - r, cy + r)], fill=255)
    elif shape == 3:
        draw.polygon([(cx, cy - r), (cx + r, cy), (cx, cy + r), (cx - r, cy)], fill=255)
    else:
        draw.rectangle((cx - r, cy - r // 2, cx + r, cy + r // 2), fill=255)
        draw.rectangle((cx - r // 2, cy - r, cx + r // 2, cy + r), fill=255)
    reach = r // 2 if shape == 2 else r  # a triangle is narrow in the middle
    nx, ny = (cx, cx + reach, cx, cx - reach)[side], (cy - r, cy, cy + r, cy)[side]
    draw.rectangle((nx - 7, ny - 7, nx + 7, ny + 7), fill=0)
    return mask


def main(argv: list[str] | None = None) -> None:
    """The command: write the corpus and say how to use it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.data.planted_amazon", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=5_000)
    parser.add_argument("--reviews", type=int, help="any number, without images; see above")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    sizes = {name: getattr(options, name) for name in ("users", "items", "seed")}
    if options.reviews is not None:
        write_large(options.directory, reviews=options.reviews, **sizes)
        print(f"{options.directory}: {options.reviews:,} made-up reviews. {NOTICE}")
        return
    planted = plant(**sizes)
    write(planted, options.directory)
    print(
        f"{options.directory}: {options.users:,} made-up users in {GROUPS} groups, "
        f"{options.items:,} items, {len(planted.user):,} purchases. {NOTICE}\n"
        f'Read them with amazon.load(cache, "{DOMAIN}", path="{options.directory}").'
    )


if __name__ == "__main__":
    main(sys.argv[1:])
