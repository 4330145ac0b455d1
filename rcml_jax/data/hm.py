"""H&M Personalized Fashion Recommendations: photographs of garments, and who bought them.

The published layout, in one folder: `articles.csv`, `transactions_train.csv` and photographs
`images/0NN/0NNNNNNNNN.jpg`. In full it has 105,542 articles and 31.8 million transactions; a part
of it works as well. The data belong to a competition and may not be passed on: nothing is
downloaded, and the user needs a copy.

An item is an article with its photograph; the text is its name, colour, type and description. The
label is its garment group. The colours of one product (`product_code`) form a group of items that
no split parts. Relations:

- kinds of buyers, as from Amazon's reviews (`rcml_jax.data.copurchases`): a customer is a
  distribution over `CATEGORY`, k-means finds kinds of customers, and two articles that one customer
  bought are a pair under the sentence of the customer's kind;
- two articles that one customer bought on one day;
- one product in two colours;
- respects in which two articles agree (RESPECTS), such as "the same pattern": the sentence names
  the respect, and the query tells the value. All articles of one value are linked; the pairs are a
  sample of them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rcml_jax.data import images, store
from rcml_jax.data.copurchases import (
    copurchase_pairs,
    distinct_purchases,
    kinds_of_buyers,
    merge_kinds,
    within_item_cap,
)
from rcml_jax.data.graph import RelationGraph, normalize_pairs, pairs_within
from rcml_jax.data.hm_files import (
    Article,
    Photograph,
    Transactions,
    find_photographs,
    read_articles,
    read_transactions,
)
from rcml_jax.data.log import log_line
from rcml_jax.data.stages import digest, file_state
from rcml_jax.errors import UserError

NAME = "hm"
#: Columns of articles.csv and the sentences that name them as respects.
RESPECTS = {
    "product_type_name": "They are the same type of product.",
    "garment_group_name": "They belong to the same group of garments.",
    "colour_group_name": "They have the same colour.",
    "perceived_colour_value_name": "Their colours are equally light or dark.",
    "graphical_appearance_name": "They have the same pattern.",
    "section_name": "They are sold in the same section of the shop.",
    "index_group_name": "They are made for the same group of customers.",
}
SAME_DAY = "They were bought by one customer on the same day."
OTHER_COLOUR = "They are the same product in another colour."
#: What a customer's purchases are counted by, and what the classes are.
CATEGORY, LABEL, COLOUR = "product_type_name", "garment_group_name", "colour_group_name"
CLUSTERS = 10
#: Customers who bought fewer articles are of no kind: too little is known of them.
MIN_PURCHASES = 5
PAIRS_PER_USER = 10
PAIRS_PER_ITEM = 50
PAIRS_PER_RESPECT = 20_000
RECIPE = 1  # counts changes of what is made from the same files and options

_LARGEST_SIDE = 512
_ROUNDS = 20
_ABOUT = {
    "license": (
        "Competition data, to be used under the rules of the competition. No licence to pass them "
        "on is given."
    ),
    "citation": (
        "@misc{hm2022, title={H\\&M Personalized Fashion Recommendations}, publisher={Kaggle}, "
        "year={2022}}"
    ),
    "homepage": (
        "https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations"
    ),
}

Log = Callable[[str], None]


class _Options(NamedTuple):
    """What a graph depends on beside its files."""

    strict: bool
    clusters: int
    min_purchases: int
    pairs_per_user: int
    pairs_per_item: int
    pairs_per_respect: int
    seed: int


def load(
    cache: str | Path,
    path: str | Path,
    *,
    strict: bool = False,
    clusters: int = CLUSTERS,
    min_purchases: int = MIN_PURCHASES,
    pairs_per_user: int = PAIRS_PER_USER,
    pairs_per_item: int = PAIRS_PER_ITEM,
    pairs_per_respect: int = PAIRS_PER_RESPECT,
    seed: int = 0,
    log: Log | None = None,
) -> RelationGraph:
    """The graph of a folder in the published layout; prepared in `cache` the first time, then read.

    clusters: kinds of customers (fewer if there are fewer distinct customers); customers who bought
    fewer than `min_purchases` articles are of none. A customer gives at most `pairs_per_user`
    pairs, drawn at random, to their kind and as many to the same day. An article keeps at most
    `pairs_per_item` pairs of each of these two (those of the most customers first) and of other
    colours. At most `pairs_per_respect` pairs of a respect are drawn. `seed` draws and starts
    k-means.

    Left out, counted, and reported to `log`: malformed rows, repeated articles, articles without a
    photograph or with a damaged one, and transactions of unknown articles. With `strict` the first
    of them is an error with file and line. Articles without a description stay, by their names.

    Raises:
      UserError: an option is wrong; a file is missing or is not as published; scikit-learn is
        missing (extra `amazon`); no two articles are linked; or as said under `strict`.
    """
    options = _Options(
        strict, clusters, min_purchases, pairs_per_user, pairs_per_item, pairs_per_respect, seed
    )
    for name, value in options._asdict().items():
        if name not in ("strict", "seed") and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    root = Path(path).expanduser()
    files = [_file(root, name) for name in ("articles.csv", "transactions_train.csv")]
    photographs = find_photographs(root)
    pictures = sorted((key, photo.size, photo.time) for key, photo in photographs.items())
    state = [[file_state(file) for file in files], pictures]
    return store.load_or_prepare(
        Path(cache).expanduser(),
        NAME,
        lambda: _build(*files, photographs, options, log or log_line),
        fingerprint=digest([RECIPE, _LARGEST_SIDE, options, state]),
        log=log,
        description=(
            "Articles of H&M's competition with their photographs. Relations: "
            f"{clusters} kinds of customers (k-means on {CATEGORY}), bought on one day, the same "
            f"product in another colour, and {len(RESPECTS)} respects in which articles agree. At "
            f"most {pairs_per_user} pairs of a customer, drawn at random, {pairs_per_item} of an "
            f"article, and {pairs_per_respect} of a respect."
        ),
        **_ABOUT,
    )


def _file(root: Path, name: str) -> Path:
    if not (root / name).is_file():
        raise UserError(
            f"There is no {name} in {root}; give the folder with the files of the H&M competition: "
            "--config configs/rcml.py:hm,path=DIRECTORY"
        )
    return root / name


def _build(
    articles_file: Path,
    transactions_file: Path,
    photographs: dict[str, Photograph],
    options: _Options,
    log: Log,
) -> RelationGraph:
    counts: Counter[str] = Counter()
    articles = read_articles(articles_file, tuple(RESPECTS), counts, strict=options.strict)
    pictures = _pictures(articles, photographs, counts, options.strict)
    log(f"Reading {transactions_file} ({transactions_file.stat().st_size / 1e6:,.1f} MB)")
    bought = read_transactions(transactions_file, articles, counts, strict=options.strict)
    chosen = np.flatnonzero([picture is not None for picture in pictures])
    if not len(chosen):
        raise UserError(
            f"No article of {articles_file} has a photograph that can be decoded; add images/."
        )
    graph = _graph(articles, [pictures[i] for i in chosen], chosen, bought, options)
    total, customers, empty = (
        counts.pop(name, 0)
        for name in ("transactions", "customers", "articles without a description")
    )
    problems = [f"{number:,} {name}" for name, number in counts.items() if number]
    for sentence, number in zip(graph.relations, np.bincount(graph.pairs[:, 2]), strict=True):
        log(f"{number:>9,} pairs: {sentence}")
    log(
        f"H&M: {len(articles):,} articles, {total:,} transactions, {customers:,} customers of these"
        f" articles; {len(graph):,} articles have a photograph. Left out: "
        f"{', '.join(problems) or 'nothing'}. Kept by their names: {empty:,} articles without a "
        "description."
    )
    return graph


def _pictures(
    articles: list[Article], photographs: dict[str, Photograph], counts: Counter, strict: bool
) -> list[Path | None]:
    """Each article's photograph, None where there is none or it cannot be decoded."""
    found = [photographs.get(article.id) for article in articles]
    whole = iter(images.decode_problems([p.path.read_bytes for p in found if p]))
    pictures: list[Path | None] = []
    for article, photograph in zip(articles, found, strict=True):
        problem = next(whole) if photograph else "there is no such file"
        name = photograph.path if photograph else f"images/{article.id[:3]}/{article.id}.jpg"
        if problem and strict:
            raise UserError(
                f"{article.where}: the photograph {name} cannot be decoded ({problem}); add or "
                "replace it, or turn strict off to leave such articles out."
            )
        kind = "with a damaged photograph" if photograph else "without a photograph"
        counts[f"articles {kind}"] += bool(problem)
        pictures.append(None if problem or not photograph else photograph.path)
    return pictures


def _graph(
    articles: list[Article],
    pictures: list[Path],
    chosen: np.ndarray,
    bought: Transactions,
    options: _Options,
) -> RelationGraph:
    """The graph of the articles with a photograph (`chosen`); the others count for the kinds."""
    columns = dict(zip(RESPECTS, zip(*(a.values for a in articles), strict=True), strict=True))
    items = [articles[i] for i in chosen]
    products, product = np.unique([item.product for item in items], return_inverse=True)
    values = np.stack([_numbered(column)[1][chosen] for column in columns.values()], axis=1)
    colour = values[:, list(columns).index(COLOUR)]
    sentences, parts = _purchase_relations(columns[CATEGORY], chosen, bought, options)
    parts.append(_other_colours(product, colour, len(products), options))
    rng = np.random.default_rng([options.seed, 3])
    parts += [agreeing_pairs(v, options.pairs_per_respect, rng) for v in values.T]
    sentences += [OTHER_COLOUR, *RESPECTS.values()]
    attributes = np.full((len(items), len(sentences)), -1, np.int32)
    attributes[:, -len(RESPECTS) :] = values
    # A sentence without a pair is no relation.
    used = [relation for relation, part in enumerate(parts) if len(part)]
    if not used:
        raise UserError("No two of these articles are linked; give a larger part of the data.")
    pairs = [np.insert(parts[r], 2, number, axis=1) for number, r in enumerate(used)]
    pairs, pair_split = normalize_pairs(np.concatenate(pairs))
    names, label = _numbered(columns[LABEL])
    present = np.unique(label[chosen])
    present = present[present >= 0]
    renumbered = np.full(len(names) + 1, -1, np.int32)
    renumbered[present] = np.arange(len(present))
    return RelationGraph(
        name=NAME,
        ids=tuple(item.id for item in items),
        texts=tuple(item.text for item in items),
        labels=renumbered[label[chosen]],
        label_names=tuple(names[i] for i in present),
        relations=tuple(sentences[r] for r in used),
        pairs=pairs,
        pair_split=pair_split,
        images=images.EncodedImages(len(items), lambda index: _encoded(pictures[index])),
        item_group=product.astype(np.int32),
        attributes=attributes[:, used],
    )


def _numbered(values: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct values, sorted, and the number of each (N,) int32; -1 for ""."""
    names, number = np.unique(values, return_inverse=True)
    missing = int(len(names) > 0 and names[0] == "")
    return names[missing:].tolist(), (number - missing).astype(np.int32)


def _purchase_relations(
    categories: Sequence[str], chosen: np.ndarray, bought: Transactions, options: _Options
) -> tuple[list[str], list[np.ndarray]]:
    """Sentences of the kinds of customers and of the same day; the item pairs (P, 2) of each."""
    place = np.full(len(categories), -1, np.int32)
    place[chosen] = np.arange(len(chosen))
    caps = {
        "items": len(chosen),
        "per_user": options.pairs_per_user,
        "per_item": options.pairs_per_item,
        "seed": options.seed,
    }
    ids = (bought.customer.astype(np.uint64), bought.article.astype(np.uint64))
    purchases, _ = distinct_purchases(*ids, options.min_purchases)
    if not len(purchases.user):
        raise UserError(
            f"No customer has bought {options.min_purchases} articles of articles.csv; lower "
            "--config.data.min_purchases or give a larger part of the data."
        )
    article = purchases.items.astype(np.int64)
    names, category = _numbered(categories)
    cluster, sentences = kinds_of_buyers(
        purchases, category[article], names, clusters=options.clusters, seed=options.seed
    )
    sentences, cluster = merge_kinds(sentences, cluster)
    item = place[article[purchases.item]]
    keep = (item >= 0) & (cluster[purchases.user] >= 0)
    pairs = copurchase_pairs(purchases.user[keep], item[keep], cluster, **caps)
    parts = [pairs[pairs[:, 2] == kind, :2] for kind in range(len(sentences))]

    item = place[bought.article]
    customer, day, item = (x[item >= 0] for x in (bought.customer, bought.day, item))
    new = np.ones(len(item), bool)
    new[1:] = (np.diff(customer) != 0) | (np.diff(day) != 0)
    basket = np.cumsum(new, dtype=np.int32) - 1
    owner, one_kind = customer[new], np.zeros(int(new.sum()), np.int32)
    pairs = copurchase_pairs(basket, item, one_kind, owner=owner, **caps)
    return [*sentences, SAME_DAY], [*parts, pairs[:, :2]]


def _other_colours(
    product: np.ndarray, colour: np.ndarray, products: int, options: _Options
) -> np.ndarray:
    """Pairs (P, 2) of one product in two colours, at most `pairs_per_item` of an article."""
    members = np.split(np.argsort(product, kind="stable"), np.bincount(product).cumsum()[:-1])
    pairs = pairs_within([group for group in members if len(group) > 1])[:, :2]
    one, other = colour[pairs].T
    pairs = pairs[(one != other) & (one >= 0) & (other >= 0)]
    pairs = np.random.default_rng([options.seed, 2]).permutation(pairs)
    return pairs[within_item_cap(pairs, len(product), options.pairs_per_item)]


def agreeing_pairs(values: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most `most` pairs (P, 2) of items a < b with one value (N,), -1 for none; distinct.

    Every item is drawn equally often, with a partner of its value: a value has pairs in proportion
    to its items, not to their square, so that the most common value does not take them all.
    """
    order = np.argsort(values, kind="stable")
    order = order[values[order] >= 0]
    start = np.flatnonzero(np.diff(values[order], prepend=-1))
    size = np.diff(np.append(start, len(order)))
    possible = int(np.sum(size.astype(np.int64) * (size - 1) // 2))
    if possible <= most:
        return pairs_within(np.split(order, start[1:]))[:, :2]
    run = np.repeat(np.arange(len(size)), size)
    shared = np.flatnonzero(size[run] > 1)
    found = np.zeros(0, np.int64)
    for _ in range(_ROUNDS):
        first = rng.choice(shared, most)
        step = rng.integers(1, size[run[first]])
        second = start[run[first]] + (first - start[run[first]] + step) % size[run[first]]
        ends = np.sort(np.stack([order[first], order[second]]), axis=0).astype(np.int64)
        key = np.concatenate([found, ends[0] * len(values) + ends[1]])
        found = key[np.sort(np.unique(key, return_index=True)[1])]
        if len(found) >= most:
            break
    return np.stack(np.divmod(found[:most], len(values)), axis=1).astype(np.int32)


def _encoded(path: Path) -> bytes:
    try:
        return images.storable(path.read_bytes(), _LARGEST_SIDE)
    except images.DECODE_ERRORS as error:
        raise UserError(f"The photograph {path} cannot be read ({error}); replace it.") from error
