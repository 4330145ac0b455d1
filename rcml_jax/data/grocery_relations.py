"""What links grocery products, in sentences, and pairs of their photographs drawn from it.

Everything follows from the products' class names, kinds, departments and descriptions.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from rcml_jax.data.graph import SPLITS, normalize_pairs

SAME_PRODUCT = "both are photographs of the same product"
# fmt: off
BRANDS = (
    "Alpro", "Arla", "Bravo", "Garant", "God Morgon", "Oatly", "Tropicana", "Valio", "Yoggi",
)
# fmt: on
#: Words of a product's name that set it apart from an ordinary one: the sentence of the two.
_VERSIONS = {
    "Ecological": "one is the organic counterpart of the other",
    "Lactose": "one is the lactose-free counterpart of the other",
}
#: Plant-based kinds, and the kind of dairy that each stands in for.
_PLANT_BASED = {
    "Oat Milk": "Milk",
    "Soy Milk": "Milk",
    "Oatghurt": "Yoghurt",
    "Soyghurt": "Yoghurt",
}
#: What both names or descriptions say, as a pattern of words.
_PROPERTIES = {
    r"ecological(ly)?|organic": "both are organic",
    r"vanilla": "both are flavoured with vanilla",
    r"breakfast": "the shop suggests both for breakfast",
    r"salads?": "the shop suggests both for a salad",
    r"desserts?": "the shop suggests both for dessert",
    r"soups?": "the shop suggests both for soup",
}
_DEPARTMENTS = {"Packages": "packaged food and drink"}


@dataclasses.dataclass(frozen=True)
class Product:
    """A class of the data set: names in words ("God Morgon Apple Juice"), and its description."""

    name: str
    kind: str
    department: str
    description: str

    @property
    def text(self) -> str:
        """The name, then the description, in one line."""
        return " ".join(f"{self.name}. {self.description}".split())


def relations(products: Sequence[Product]) -> dict[str, list[tuple[int, int]]]:
    """Each relation's sentence and the products that it links, as places (a, b) with a <= b.

    A sentence that is true of two photographs of one product links it with itself. Groups of one
    product are left out: there the sentence says no more than that both show the same product.
    """
    numbers = range(len(products))
    found = {SAME_PRODUCT: [(a, a) for a in numbers]}
    for kind in _in_order(p.kind for p in products):
        members = [a for a in numbers if products[a].kind == kind]
        found[f"both are a kind of {kind.lower()}"] = _within(members)
    for department in _in_order(p.department for p in products):
        members = [a for a in numbers if products[a].department == department]
        place = _DEPARTMENTS.get(department, department.lower())
        found[f"both are sold in the {place} department"] = _within(members)
    for brand in BRANDS:
        members = [a for a in numbers if _brand(products[a]) == brand]
        found[f"both are made by {brand}"] = _within(members)
    for word, sentence in _VERSIONS.items():
        found[sentence] = _linked(products, lambda a, b, w=word: _is_version(a, b, w))
    found["one is the plant-based alternative to the other"] = _linked(
        products, lambda a, b: _PLANT_BASED.get(a.kind, "") == b.kind
    )
    plant_based = [a for a in numbers if products[a].kind in _PLANT_BASED]
    found["both are plant-based alternatives to dairy"] = _within(plant_based)
    found |= _juices(products)
    for pattern, sentence in _PROPERTIES.items():
        says = re.compile(rf"\b({pattern})\b", re.IGNORECASE)
        found[sentence] = _within([a for a in numbers if says.search(products[a].text)])
    return {sentence: links for sentence, links in found.items() if links}


def _juices(products: Sequence[Product]) -> dict[str, list[tuple[int, int]]]:
    """Juices and the kinds of fruit that their names or descriptions name."""
    fruit = {p.kind for p in products if p.department == "Fruit"}

    def pressed_from(juice: Product) -> set[str]:
        named = {f for f in fruit if re.search(rf"\b{re.escape(f)}s?\b", juice.text, re.I)}
        return named if juice.kind == "Juice" else set()

    return {
        "one is a juice pressed from the other": _linked(
            products, lambda a, b: b.department == "Fruit" and b.kind in pressed_from(a)
        ),
        "both are juices of the same fruit": _linked(
            products, lambda a, b: bool(pressed_from(a) & pressed_from(b)), itself=True
        ),
    }


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _brand(product: Product) -> str:
    return next((brand for brand in BRANDS if product.name.startswith(f"{brand} ")), "")


def _is_version(special: Product, plain: Product, word: str) -> bool:
    """Whether the name of one is that of the other and the word, brands aside."""
    rest = special.name.removeprefix(_brand(special)).split()
    other = plain.name.removeprefix(_brand(plain)).split()
    return word in rest and [w for w in rest if w != word] == other


def _within(members: list[int]) -> list[tuple[int, int]]:
    """Every two of a group, and each with itself; nothing for a group of one."""
    pairs = itertools.combinations_with_replacement(members, 2)
    return list(pairs) if len(members) > 1 else []


def _linked(products, holds, itself: bool = False) -> list[tuple[int, int]]:
    """The pairs for which `holds` is true in one direction or the other."""
    pairs = itertools.combinations_with_replacement(range(len(products)), 2)
    return [
        (a, b)
        for a, b in pairs
        if (itself or a != b)
        and (holds(products[a], products[b]) or holds(products[b], products[a]))
    ]


def draw_pairs(
    class_links: np.ndarray, labels: np.ndarray, item_split: np.ndarray, *, most: int, seed: int
) -> np.ndarray:
    """Pairs of items (P, 3) that are linked and in one split, `most` at most for each of both.

    class_links (L, 3): as in `RelationGraph`; labels, item_split (N,). The pairs of a relation are
    spread evenly over its links, drawn without replacement. Two items of one label are drawn only
    under a relation that links nothing else.
    """
    rng = np.random.default_rng(seed)
    blocks = [np.zeros((0, 3), np.int64)]
    for split in range(len(SPLITS)):
        mine = np.flatnonzero(item_split == split)
        members = [mine[labels[mine] == c] for c in range(int(labels.max(initial=-1)) + 1)]
        for relation in np.unique(class_links[:, 2]):
            links = class_links[class_links[:, 2] == relation, :2]
            apart = links[links[:, 0] != links[:, 1]]
            links = apart if len(apart) else links
            counts = np.array([_pair_count(members, a, b) for a, b in links])
            for (a, b), count, take in zip(links, counts, _share(counts, most), strict=True):
                first, second = _places(members, a, b, rng.choice(count, take, replace=False))
                blocks.append(np.stack([first, second, np.full(take, relation)], axis=1))
    return normalize_pairs(np.concatenate(blocks))[0]


def _pair_count(members: list[np.ndarray], a: int, b: int) -> int:
    n, m = len(members[a]), len(members[b])
    return n * (n - 1) // 2 if a == b else n * m


def _places(members: list[np.ndarray], a: int, b: int, drawn: np.ndarray):
    """The items of numbered pairs, each (k,)."""
    if a == b:
        i, j = np.triu_indices(len(members[a]), 1)
        return members[a][i[drawn]], members[a][j[drawn]]
    i, j = np.divmod(drawn, max(len(members[b]), 1))
    return members[a][i], members[b][j]


def _share(available: np.ndarray, most: int) -> np.ndarray:
    """How many of each to take: `most` in all, as evenly as they are there."""
    taken = np.zeros(len(available), int)
    for place, index in enumerate(np.argsort(available, kind="stable")):
        even = (most - taken.sum()) // (len(available) - place)
        taken[index] = min(available[index], even)
    return taken
