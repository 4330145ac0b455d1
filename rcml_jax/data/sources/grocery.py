"""Grocery Store: photographs of products on the shelves of shops, with their descriptions.

The published layout (github.com/marcusklasson/GroceryStoreDataset, MIT licence; Klasson, Zhang and
Kjellström, "A Hierarchical Grocery Store Image Dataset with Visual and Semantic Labels", WACV
2019), in a folder, its subfolder `dataset` or a .zip file of either:

- `classes.csv`: name, number, kind and its number, iconic image and description of each product;
- `train.txt`, `val.txt`, `test.txt`: a photograph a line, "path, product number, kind number";
- the photographs and descriptions where these files say.

An item is a photograph with its product's name and description, so that all photographs of a
product have the same text. The official lists are the splits of the items. The relations are ours
(`grocery_relations`): they link products, and pairs of photographs are drawn from that.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import logging
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from rcml_jax.data import images, prepared
from rcml_jax.data.relation_graph import SPLITS, RelationGraph, normalize_pairs
from rcml_jax.data.stages import HERE
from rcml_jax.errors import UserError
from rcml_jax.parsing import CsvRows, TextGate, text_lines, user_path

# What links grocery products, in sentences, and pairs of their photographs drawn from it.


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


NAME = "grocery"
SOURCE = "https://github.com/marcusklasson/GroceryStoreDataset/archive/refs/heads/master.zip"
#: The number of published photographs: train, validation and test.
PUBLISHED = 2640 + 296 + 2485
#: Of each relation, at most so many pairs are drawn in each split.
MOST_PAIRS = 2000
_LISTS = ("train.txt", "val.txt", "test.txt")
_RECIPE = 1  # counts changes of the relations, the pairs, the texts or the images
_LARGEST_SIDE = 512
_LARGEST_FILE = 64 * 2**20
_COLUMNS = (
    *("Class Name", "Class ID", "Coarse Class Name", "Coarse Class ID"),
    "Product Description Path",
)
_ABOUT = {
    "description": (
        "Photographs of grocery products with the products' names and descriptions. Relations: "
        "the same product, kind, department or brand, counterparts, and what descriptions share."
    ),
    "license": "MIT, Copyright (c) 2019 Marcus Klasson.",
    "citation": (
        "@inproceedings{klasson2019hierarchical, title={A Hierarchical Grocery Store Image "
        "Dataset with Visual and Semantic Labels}, author={Klasson, Marcus and Zhang, Cheng and "
        'Kjellstr{\\"o}m, Hedvig}, booktitle={IEEE Winter Conference on Applications of Computer '
        "Vision (WACV)}, year={2019}}"
    ),
    "homepage": "https://github.com/marcusklasson/GroceryStoreDataset",
}
_log = logging.getLogger(__name__)

Root = Path | zipfile.Path


@dataclasses.dataclass(frozen=True)
class _Class:
    """A row of classes.csv; `name` and `kind` in words."""

    name: str
    kind: str
    kind_number: int
    description: str
    where: str


@dataclasses.dataclass(frozen=True)
class _Photograph:
    """A line of a list; `product` is the place of its class."""

    path: str
    product: int
    split: int
    where: str


def from_config(data: Any, cache: Path) -> RelationGraph:
    """The graph of `config.data`: `path` and `strict`."""
    return load(cache, path=data.path, strict=data.strict)


def load(
    cache: str | Path,
    *,
    path: str | Path = "",
    strict: bool = False,
    log: Callable[[str], None] | None = None,
) -> RelationGraph:
    """The photographs' graph; prepared in `cache` the first time, then read.

    path: a folder or a .zip file in the published layout, whose changes make the graph anew.
        Without one the repository's archive is downloaded into `<cache>/grocery` once (pip install
        "rcml_jax[amazon]").
    strict: a photograph that cannot be decoded is an error, not left out with a warning.

    Labels are the products; what links these is the graph's `class_links`, and `pairs` are drawn
    from it, at most MOST_PAIRS of a relation in a split. The splits are the official ones.

    Raises:
      UserError: a file is missing or wrong (with file, line and reason), or the archive cannot be
        downloaded.
    """
    with contextlib.ExitStack() as files:
        if path:
            root = files.enter_context(open_root(path))
            listed = _read_lists(root, _read_classes(root))
            fingerprint, expected = _fingerprint(root, listed, strict), len(listed)
        else:
            fingerprint, expected = hashlib.sha256(_recipe(strict)).hexdigest(), PUBLISHED
            if not prepared.is_prepared(cache, NAME, fingerprint):
                archive = _download(user_path(cache) / NAME, log)
                root = files.enter_context(open_root(archive))
        graph = prepared.load_or_prepare(
            cache,
            NAME,
            lambda: read(root, strict=strict),
            fingerprint=fingerprint,
            runner=HERE,  # a .zip file stays open
            log=log,
            **_ABOUT,
        )
    if len(graph) < expected:
        _log.warning(
            "%d of %d photographs left out, as missing or undecodable.",
            expected - len(graph),
            expected,
        )
    return graph


def read(root: Root, *, strict: bool = False) -> RelationGraph:
    """The graph straight from the files under a root (`open_root`), nothing cached.

    Its photographs are read from there when they are asked for.

    Raises:
      UserError: as `load`.
    """
    classes = _read_classes(root)
    products = [_product(root, row) for row in classes.values()]
    photographs = _decodable(root, _read_lists(root, classes), strict)
    labels = np.array([p.product for p in photographs], np.int32)
    item_split = np.array([p.split for p in photographs], np.int8)
    linked = relations(products)
    links = [(a, b, e) for e, pairs in enumerate(linked.values()) for a, b in pairs]
    class_links = np.array(sorted(links), np.int32)
    pairs = draw_pairs(class_links, labels, item_split, most=MOST_PAIRS, seed=0)
    return RelationGraph(
        name=NAME,
        ids=tuple(p.path.rpartition(".")[0] for p in photographs),
        texts=tuple(products[label].text for label in labels),
        labels=labels,
        label_names=tuple(product.name for product in products),
        relations=tuple(linked),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        images=images.EncodedImages(len(photographs), lambda i: _stored(root, photographs[i])),
        item_split=item_split,
        class_links=class_links,
    ).validate()


@contextlib.contextmanager
def open_root(path: str | Path) -> Iterator[Root]:
    """Where classes.csv lies: in a folder or .zip file, or in `dataset` or `*/dataset` there.

    A .zip file is open as long as the context, and read as it is: nothing is unpacked.

    Raises:
      UserError: there is no such file or folder, or no classes.csv in it.
    """
    path = user_path(path)
    if not path.exists():
        raise UserError(f"There is no folder or .zip file {path}; correct --config.data.path.")
    if path.is_dir():
        yield _root_in(path, path)
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as a .zip file ({error}); delete it, so that it is downloaded "
            "anew, or name a folder."
        ) from error
    with archive:
        yield _root_in(zipfile.Path(archive), path)


def _root_in(root: Root, path: Path) -> Root:
    folders = [root, root / "dataset"]
    folders += [folder / "dataset" for folder in root.iterdir() if folder.is_dir()]
    for folder in folders:
        if (folder / "classes.csv").is_file():
            return folder
    raise UserError(
        f"{path} holds no classes.csv; name a copy of github.com/marcusklasson/GroceryStoreDataset "
        "with --config.data.path."
    )


def _download(folder: Path, log: Callable[[str], None] | None) -> Path:
    # Imported here: it needs an extra, which those who have a copy do without.
    from rcml_jax.data.download import download

    return download(SOURCE, folder / "GroceryStoreDataset.zip", log=log)


def _read_classes(root: Root) -> dict[int, _Class]:
    """The rows of classes.csv by the products' numbers, in their order."""
    file = root / "classes.csv"
    classes: dict[int, _Class] = {}
    rows = CsvRows(io.StringIO(_text(root, "classes.csv", "classes.csv"), newline=""), strict=False)
    # Columns have their type after the name: "Class ID (int)".
    names = [name.partition(" (")[0] for name in next(rows, (1, []))[1]]
    if missing := [name for name in _COLUMNS if name not in names]:
        raise UserError(f"{file} has no column '{missing[0]}'; take the published file.")
    for line, row in rows:
        where = f"{file}, line {line}"
        found = dict(zip(names, row, strict=False))
        values = [found.get(column, "").strip() for column in _COLUMNS]
        name, number, kind, kind_number, description = values
        if not all(values):
            raise UserError(f"{where}: a value is missing; take the published file.")
        if not (number.isdecimal() and kind_number.isdecimal()) or int(number) in classes:
            raise UserError(
                f"{where}: '{number}' and '{kind_number}' are not the numbers of a new class and "
                "its kind; take the published file."
            )
        words = [value.replace("-", " ") for value in (name, kind)]
        classes[int(number)] = _Class(words[0], words[1], int(kind_number), description, where)
    if not classes:
        raise UserError(f"{file} lists no product; take the published file.")
    return classes


def _product(root: Root, row: _Class) -> Product:
    """A class with its description's text; the department is the folder that it lies in."""
    department = PurePosixPath(row.description.lstrip("/")).parts[1:2]
    return Product(
        row.name,
        row.kind,
        department[0] if department else "",
        _text(root, row.description, row.where).strip(),
    )


def _read_lists(root: Root, classes: dict[int, _Class]) -> list[_Photograph]:
    """The photographs of the three lists, every line checked."""
    places = {number: place for place, number in enumerate(classes)}
    found: dict[str, _Photograph] = {}
    for split, name in enumerate(_LISTS):
        for number, line in enumerate(text_lines(_text(root, name, name)), 1):
            if not line.strip():
                continue
            where = f"{root / name}, line {number}"
            path, *numbers = (part.strip() for part in line.rsplit(",", 2))
            if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or not path:
                raise UserError(
                    f"{where}: {line.strip()[:80]!r} is not 'path, class number, kind number'; "
                    "correct the line."
                )
            product, kind = map(int, numbers)
            if product not in classes:
                raise UserError(f"{where}: there is no class {product} in classes.csv; correct it.")
            if kind != classes[product].kind_number:
                raise UserError(
                    f"{where}: the kind of class {product} is {classes[product].kind_number}, not "
                    f"{kind}; correct it."
                )
            if path in found:
                raise UserError(
                    f"{where}: {path} is listed before ({found[path].where}); remove one line."
                )
            found[path] = _Photograph(path, places[product], split, where)
    if not any(p.split == 0 for p in found.values()):
        raise UserError(f"{root / _LISTS[0]} lists no photograph; take the published file.")
    return list(found.values())


def _decodable(root: Root, listed: list[_Photograph], strict: bool) -> list[_Photograph]:
    """The photographs that can be decoded; with `strict` all can, or UserError."""
    problems = images.decode_problems(
        [(p.path, p.where) for p in listed], lambda place: _bytes(root, *place)
    )
    for photograph, text in zip(listed, problems, strict=True):
        if text and strict:
            raise UserError(
                f"{photograph.where}: the photograph {photograph.path} cannot be decoded ({text}); "
                "replace it or leave `strict` off."
            )
    kept = [p for p, text in zip(listed, problems, strict=True) if not text]
    if not kept:
        raise UserError(f"No photograph under {root} can be decoded; check the files.")
    return kept


def _stored(root: Root, photograph: _Photograph) -> bytes:
    try:
        return images.storable(_bytes(root, photograph.path, photograph.where), _LARGEST_SIDE)
    except images.DECODE_ERRORS as error:
        raise UserError(
            f"{photograph.where}: the photograph {photograph.path} cannot be read ({error}); "
            "replace it."
        ) from error


def _text(root: Root, name: str, where: str) -> str:
    try:
        text = _bytes(root, name, where).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{root / name} is not UTF-8 text ({error}); save it as UTF-8.") from error
    # The published files are few and fixed, so that nothing is replaced in them.
    return TextGate(strict=True)(text, str(root / name))


def _bytes(root: Root, name: str, where: str) -> bytes:
    """A file's content; names of files are relative to the root, with or without a slash before."""
    file = _file(root, name)
    if file is None or not file.is_file():
        raise UserError(
            f"{where}: there is no file {name} under {root}; complete the copy of the data set."
        )
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST_FILE + 1)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy or download it anew.") from error
    if len(content) > _LARGEST_FILE:
        raise UserError(f"{file} is larger than any file of this data set; check it.")
    return content


def _file(root: Root, name: str) -> Root | None:
    """The file of a name; None for one that leads out of the root."""
    parts = PurePosixPath(name.lstrip("/")).parts
    return None if ".." in parts or not parts else root.joinpath(*parts)


def _recipe(strict: bool) -> bytes:
    return f"{_RECIPE} {MOST_PAIRS} {_LARGEST_SIDE} {strict}".encode()


def _fingerprint(root: Root, listed: list[_Photograph], strict: bool) -> str:
    """Changes with the lists, the descriptions, and the photographs' sizes and times."""
    digest = hashlib.sha256(_recipe(strict))
    if isinstance(root, zipfile.Path):
        for entry in root.root.infolist():
            digest.update(f"{entry.filename} {entry.CRC} {entry.file_size}".encode())
        return digest.hexdigest()
    for name in ("classes.csv", *_LISTS):
        digest.update(_bytes(root, name, name))
    for row in _read_classes(root).values():
        digest.update(_bytes(root, row.description, row.where))
    for photograph in listed:
        file = _file(root, photograph.path)
        if isinstance(file, Path) and file.is_file():  # else `read` will say so
            stat = file.stat()
            digest.update(f"{photograph.path} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
