"""The two passes over Amazon's files: the 5-core of the reviews, and the records of its items."""

from array import array
from collections import Counter
from collections.abc import Container
from pathlib import Path

import numpy as np

from rcml_jax.data.amazon_records import (
    Item,
    identity,
    malformed,
    parse_item,
    parse_review,
    records,
)
from rcml_jax.data.copurchases import CORE, distinct_purchases, k_core
from rcml_jax.data.stages import Arrays, pack
from rcml_jax.errors import UserError


def read_purchases(path: Path, *, strict: bool = False) -> Arrays:
    """The 5-core of a review file, as a stage: the arrays of `Purchases`, and packed `counts`.

    counts: reviews, malformed review lines, repeated reviews, users with one purchase. The last
    two are no mistakes, and allowed with `strict`.

    Raises:
      UserError: the file is cut or cannot be read, its 5-core is empty, or a malformed line
        (`strict`).
    """
    problems: Counter[str] = Counter()
    users, items = array("Q"), array("Q")
    for number, record in records(path, problems, strict=strict):
        review = parse_review(record)
        if review is None:
            malformed(path, number, "no user_id or parent_asin", problems, strict)
            continue
        users.append(identity(review.user))
        items.append(identity(review.item))
    hashes = np.frombuffer(users, np.uint64), np.frombuffer(items, np.uint64)
    purchases, left_out = distinct_purchases(*hashes)
    core = k_core(purchases)
    if not len(core.user):
        raise UserError(
            f"{path} holds no users and items with {CORE} purchases each ({len(users):,} reviews); "
            "give a larger file."
        )
    counts = {
        "reviews": len(users),
        "malformed review lines": problems["malformed"],
        "repeated reviews": left_out["repeated"],
        "users with one purchase": left_out["single"],
    }
    return {
        "users": core.users,
        "items": core.items,
        "user": core.user,
        "item": core.item,
        "counts": pack(counts),
    }


def read_items(
    path: Path, items: np.ndarray, *, strict: bool = False, pictured: Container[str] = ()
) -> Arrays:
    """The records of the items with hashes (N,) uint64, as a stage.

    ids, titles, images: packed lists of N strings, "" where something is missing; category (N,)
    int32, a place in the packed list `categories`, -1 for unknown; packed `counts`. Of several
    records of one item the first with a title and an image counts.

    With `strict` an item lacks no record, title, second-level category, or image (unless it is in
    `pictured`).

    Raises:
      UserError: the file is cut or cannot be read, none of the items is in it, or one that is not
        whole (`strict`), with file and line.
    """
    place = {key: i for i, key in enumerate(items.tolist())}
    found: list[Item | None] = [None] * len(items)
    problems: Counter[str] = Counter()
    for number, record in records(path, problems, strict=strict):
        item = parse_item(record)
        if item is None:
            malformed(path, number, "no parent_asin", problems, strict)
            continue
        i = place.get(identity(item.id))
        if i is None:
            continue
        if strict:
            _check(item, pictured, f"{path}, line {number}")
        known = found[i]
        problems["repeated"] += known is not None
        if known is None or (not (known.title and known.image) and item.title and item.image):
            # Only what the graph needs: records are long.
            found[i] = item._replace(details={}, categories=item.categories[:2])
    whole = [item or Item("", "", "", (), None, {}) for item in found]
    missing = found.count(None)
    if missing == len(found) or (strict and missing):
        raise UserError(
            f"{path} has no record of {missing:,} of the {len(found):,} items that the reviews "
            "name; give the item file of the same domain, whole"
            + (", or turn strict off." if missing < len(found) else ".")
        )
    categories = sorted({item.category for item in whole} - {""})
    number_of = {name: i for i, name in enumerate(categories)} | {"": -1}
    category = np.array([number_of[item.category] for item in whole], np.int32)
    counts = {
        "malformed item lines": problems["malformed"],
        "repeated item records": problems["repeated"],
        "items without a record": missing,
        "items without a title": sum(not item.title for item in whole) - missing,
        "items without a second-level category": int(np.sum(category < 0)) - missing,
    }
    return {
        "ids": pack([item.id for item in whole]),
        "titles": pack([item.title for item in whole]),
        "images": pack([item.image for item in whole]),
        "category": category,
        "categories": pack(categories),
        "counts": pack(counts),
    }


def _check(item: Item, pictured: Container[str], where: str) -> None:
    lacks = {
        "title": not item.title,
        "MAIN image": not item.image and item.id not in pictured,
        "second-level category": not item.category,
    }
    for part, missing in lacks.items():
        if missing:
            raise UserError(
                f"{where}: item {item.id} has no {part}; complete the record, or turn strict off "
                "to leave such items out."
            )
