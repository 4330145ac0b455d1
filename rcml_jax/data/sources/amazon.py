"""Amazon Reviews 2023: products that the same kind of buyers buy together.

The records are those of Hou et al., "Bridging Language and Items for Retrieval and Recommendation"
(arXiv 2403.03952): the reviews and the items of one domain, in `<Domain>.jsonl.gz` and
`meta_<Domain>.jsonl.gz`. From them, after the paper of RCML:

- purchases are the distinct pairs of a user and a `parent_asin`, in their 5-core;
- items are those of it with a title and a MAIN image; the label is the second-level category;
- a user is a distribution over second-level categories; k-means finds kinds of buyers, and the mean
  shares of a kind are written as its sentence;
- two items that one user bought are a pair under the sentence of the user's kind.

A user gives at most `pairs_per_user` pairs, drawn at random, and an item keeps at most
`pairs_per_item`, those of the most buyers first: neither heavy buyers nor best-sellers dominate.

Memory: the files are streams, and of a review two 64-bit hashes are kept. A made-up corpus of the
size of Electronics (44 million reviews) peaked at 2.9 GiB (`benchmarks/amazon.py`). Fetched files,
images and finished steps stay in the cache (`amazon/`), so that a run that was stopped goes on
where it was.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rcml_jax.data import images, prepared
from rcml_jax.data.images import EncodedImages
from rcml_jax.data.relation_graph import RelationGraph
from rcml_jax.data.sources.amazon_records import CATEGORIES, read_items, read_purchases
from rcml_jax.data.sources.copurchases import (
    CORE,
    Purchases,
    copurchase_pairs,
    kinds_of_buyers,
    merge_kinds,
)
from rcml_jax.data.stages import HERE, Arrays, Runner, Stages, digest, file_state, pack, unpack
from rcml_jax.errors import UserError
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import read_file, user_path

# Images of Amazon's products: local files first, the others fetched.


#: The longer side of a stored image; a larger one is scaled down.
STORED_SIZE = 512
# If more of the wanted images fail in a way that another run may mend, the set is not prepared.
MOST_FAILED = 0.05
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def local_images(directory: Path) -> dict[str, Path]:
    """The images of a folder by their names without the ending; none where there is no folder."""
    if not directory.is_dir():
        return {}
    found: dict[str, Path] = {}
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, ending = os.path.splitext(entry.name)
            if ending.lower() in _ENDINGS and entry.is_file():
                found.setdefault(stem, Path(entry.path))
    return found


def find_images(
    ids: Sequence[str],
    urls: Sequence[str],
    local: dict[str, Path],
    cache: Path,
    *,
    decode_problems: Callable[[list[str]], list[str]],
    fetch: bool,
    strict: bool,
    log: Callable[[str], None],
) -> tuple[list[Path | None], dict[str, int]]:
    """The image of each item, or None where none can be had; and how many were not, by reason.

    An item has its local image, if it can be decoded (`decode_problems` as `images` has it, of
    paths), else that of its URL ("": none), which is fetched into `cache` where it is not there
    yet. Nothing is fetched unless `fetch`: then only what is in `cache` counts. An item that is not
    to have one has the id and the URL "".

    Raises:
      UserError: so many images fail that another run is worthwhile; any at all with `strict`.
    """
    paths = [local.get(key) for key in ids]
    places = [i for i, path in enumerate(paths) if path is not None]
    problems = decode_problems([str(paths[i]) for i in places])
    for i, problem in zip(places, problems, strict=True):
        if problem:
            paths[i] = None
    counts = {"damaged local images": sum(map(bool, problems))}
    open_places = [i for i, path in enumerate(paths) if path is None]
    counts["items without an image"] = sum(
        ids[i] != "" and not urls[i] and ids[i] not in local for i in open_places
    )
    wanted = [i for i in open_places if urls[i]]
    if wanted:
        addresses = [urls[i] for i in wanted]
        found = (
            _fetch(addresses, cache, log, counts) if fetch else _stored(addresses, cache, counts)
        )
        for index, path in zip(wanted, found, strict=True):
            paths[index] = path
    if strict and None in paths:
        first = paths.index(None)
        raise UserError(
            f"The image of item {ids[first]} ({urls[first] or 'no address'}) cannot be had; add "
            "it to the folder of images, or turn strict off to leave such items out."
        )
    return paths, counts


def encoded(path: str) -> bytes:
    """The bytes of an image as the data set stores them; UserError if it cannot be read."""
    try:
        return images.storable(read_file(path), STORED_SIZE)
    except images.DECODE_ERRORS as error:
        raise UserError(
            f"The image {path} cannot be read ({error}); replace or remove it."
        ) from error


def _fetch(
    urls: list[str], cache: Path, log: Callable[[str], None], counts: dict[str, int]
) -> list[Path | None]:
    from rcml_jax.data.download import fetch_images

    report = fetch_images(urls, cache, max_size=STORED_SIZE, log=log)
    failed = report.counts["failed"]
    if failed > MOST_FAILED * len(set(urls)):
        raise UserError(
            f"{failed:,} of {counted(len(set(urls)), 'images')} could not be fetched; run the same "
            "command again later, which goes on with these, or turn the fetching of images off."
        )
    for reason, number in report.counts.items():
        if reason not in ("ok", "cached"):
            counts[f"images {reason.replace('_', ' ')}"] = number
    return report.paths


def _stored(urls: list[str], cache: Path, counts: dict[str, int]) -> list[Path | None]:
    from rcml_jax.data.download import image_path

    paths = [image_path(cache, url) for url in urls]
    found = [path if path.is_file() else None for path in paths]
    counts["images not fetched"] = found.count(None)
    return found


SOURCE = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"
#: The domains of RCML's paper; the others of the data set work as well.
DOMAINS = (
    "Electronics",
    "Automotive",
    "Office_Products",
    "Baby_Products",
    "Pet_Supplies",
    "Musical_Instruments",
    "Sports_and_Outdoors",
)
CLUSTERS = 10
PAIRS_PER_USER = 10
PAIRS_PER_ITEM = 50
RECIPE = 2  # counts changes of what is made from the same files and options

_FOLDERS = ("review_categories", "meta_categories")
_LICENSE = "None is stated for the records and the images; see the homepage before sharing any."
_CITATION = (
    "@article{hou2024bridging, title={Bridging Language and Items for Retrieval and "
    "Recommendation}, author={Hou, Yupeng and Li, Jiacheng and He, Zhankui and Yan, An and Chen, "
    "Xiusi and McAuley, Julian}, journal={arXiv preprint arXiv:2403.03952}, year={2024}}"
)
_HOMEPAGE = "https://amazon-reviews-2023.github.io"

Log = Callable[[str], None]


class _Options(NamedTuple):
    """What a graph depends on beside its files."""

    strict: bool
    clusters: int
    pairs_per_user: int
    pairs_per_item: int
    seed: int
    fetch_images: bool


class _Source(NamedTuple):
    """Where the records and local images are, and where to fetch the records where not here.

    `state` changes with all of it.
    """

    reviews: Path
    items: Path
    image_paths: dict[str, Path]
    urls: list[str]
    state: list


def from_config(data: Any, cache: Path) -> RelationGraph:
    """The graph of `config.data`: the arguments of `load` under their names."""
    names = ("path", "strict", "clusters", "pairs_per_user", "pairs_per_item")
    options = {name: data[name] for name in names}
    return load(cache, data.domain, runner=Runner.from_config(data), **options)


def load(
    cache: str | Path,
    domain: str,
    *,
    path: str | Path = "",
    strict: bool = False,
    clusters: int = CLUSTERS,
    pairs_per_user: int = PAIRS_PER_USER,
    pairs_per_item: int = PAIRS_PER_ITEM,
    seed: int = 0,
    fetch_images: bool = True,
    runner: Runner = HERE,
    log: Log | None = None,
) -> RelationGraph:
    """The graph of a domain such as "Baby_Products"; prepared in `cache` the first time, then read.

    path: a folder with `<Domain>.jsonl.gz` and `meta_<Domain>.jsonl.gz`, or the same without `.gz`,
    there or in `review_categories` and `meta_categories` (in `raw`, too, as published); its folder
    `images` may hold files `<parent_asin>.jpg` or `.png`, which go before fetched ones. Without
    a path both files are fetched, several GB for a large domain. Images are fetched unless
    `fetch_images` is off, and stored with a longer side of 512 at most. `runner` says where images
    are decoded; this process fetches them.

    clusters: kinds of buyers (fewer if there are fewer distinct buyers). pairs_per_user (10) and
    pairs_per_item (50) are the caps, the latter over all sentences together. `seed` draws pairs and
    starts k-means. Labels are the second-level categories, -1 where there is none; in a domain
    without any, the main categories or, where those agree, words of the titles. No split is
    declared.

    Malformed lines, items without title or image and so on are left out, counted, and reported to
    `log` in one line; with `strict` a malformed line, or an item of the 5-core that lacks
    something, is an error. Users with one purchase are in every such file: counted, never an error.

    Raises:
      UserError: an option is wrong; a file is missing, or cut in the middle; scikit-learn or httpx
        is missing (extra `amazon`); the disk is full; a server cannot be reached; or as said under
        `strict`.
    """
    options = _Options(strict, clusters, pairs_per_user, pairs_per_item, seed, fetch_images)
    _check(domain, options)
    cache, log = user_path(cache), log or log_line
    folder = cache / "amazon"
    source = _local(user_path(path), domain) if path else _public(folder, domain)
    name, fingerprint = f"amazon_{domain}", digest([RECIPE, source.state, options])
    whole = functools.partial(
        images.decode_problems,
        read=read_file,
        kept=prepared.unfinished_folder(cache, name, fingerprint),
        runner=runner,
    )
    return prepared.load_or_prepare(
        cache,
        name,
        lambda: _build(folder, domain, source, options, whole, log),
        fingerprint=fingerprint,
        runner=runner,
        log=log,
        description=(
            f"Products of {domain} from records in the format of Amazon Reviews 2023: title and "
            f"main image. Relations: {clusters} kinds of buyers (k-means on second-level "
            "categories); pairs are products that one user of that kind bought. At most "
            f"{pairs_per_user} pairs of a user, drawn at random, and {pairs_per_item} of a "
            "product, those of the most buyers first."
        ),
        license=_LICENSE,
        citation=_CITATION,
        homepage=_HOMEPAGE,
    )


def _check(domain: str, options: _Options) -> None:
    if not re.fullmatch(r"\w+", domain, re.ASCII):
        raise UserError(f"There is no domain {domain!r}; use for instance {', '.join(DOMAINS)}.")
    for name in ("clusters", "pairs_per_user", "pairs_per_item"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be at least 1.")


def _local(path: Path, domain: str) -> _Source:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}; correct the path of the Amazon data.")
    reviews, items = (
        _file(path, kind, stem)
        for kind, stem in zip(_FOLDERS, (domain, f"meta_{domain}"), strict=True)
    )
    image_paths = local_images(path / "images")
    state = [file_state(file) for file in (reviews, items, *image_paths.values())]
    return _Source(reviews, items, image_paths, [], state)


def _file(path: Path, kind: str, stem: str) -> Path:
    for folder in (path, path / kind, path / "raw" / kind):
        for ending in (".jsonl.gz", ".jsonl"):
            if (file := folder / f"{stem}{ending}").is_file():
                return file
    raise UserError(
        f"{path} has neither {stem}.jsonl.gz nor {stem}.jsonl, nor has raw/{kind} in it; add the "
        "file, or correct the path or the domain."
    )


def _public(folder: Path, domain: str) -> _Source:
    """Published files do not change: the address is their state, and they may be deleted later."""
    names = f"{domain}.jsonl.gz", f"meta_{domain}.jsonl.gz"
    urls = [f"{SOURCE}/{kind}/{name}" for kind, name in zip(_FOLDERS, names, strict=True)]
    return _Source(folder / names[0], folder / names[1], {}, urls, urls)


def _build(
    folder: Path,
    domain: str,
    source: _Source,
    options: _Options,
    decode_problems: Callable[[list[str]], list[str]],
    log: Log,
) -> RelationGraph:
    if source.urls:
        _download(source, log)
    stages = Stages(folder / "stages")
    core, items, kinds = _stages(stages, domain, source, options, log)
    titles = unpack(items["titles"])  # an item without one needs no image
    ids, urls = (
        [value if title else "" for value, title in zip(unpack(items[name]), titles, strict=True)]
        for name in ("ids", "images")
    )
    image_paths, missing = find_images(
        ids,
        urls,
        source.image_paths,
        folder / "images",
        decode_problems=decode_problems,
        fetch=options.fetch_images,
        strict=options.strict,
        log=log,
    )
    graph, users = _graph(domain, core, items, kinds, image_paths, options)
    if (by := unpack(items["by"])) != CATEGORIES:
        log(
            f"Amazon {domain}: no item has a second-level category; the kinds of buyers and the "
            f"labels go by {by} ({counted(len(unpack(items['categories'])), 'values')})."
        )
    counts = unpack(core["counts"]) | unpack(items["counts"]) | missing | users
    reviews = counts.pop("reviews")
    problems = [counted(number, name) for name, number in counts.items() if number]
    log(
        f"Amazon {domain}: {counted(reviews, 'reviews')}; the {CORE}-core has "
        f"{counted(len(core['users']), 'users')}, {counted(len(core['items']), 'items')} and "
        f"{counted(len(core['user']), 'purchases')}; "
        f"{counted(len(graph), 'items have', 'item has')} a title and an image. Left out or "
        f"incomplete: {', '.join(problems) or 'nothing'}."
    )
    return graph


def _download(source: _Source, log: Log) -> None:
    from rcml_jax.data.download import download

    for file, url in zip((source.reviews, source.items), source.urls, strict=True):
        download(url, file, log=log)


def _stages(
    stages: Stages, domain: str, source: _Source, options: _Options, log: Log
) -> tuple[Arrays, Arrays, Arrays]:
    """The 5-core, its items and the kinds of its buyers: made, or taken from the cache."""
    strict = options.strict

    def purchases() -> Arrays:
        log(f"Reading the reviews of {domain} ({_size(source.reviews)})")
        return read_purchases(source.reviews, strict=strict)

    def records() -> Arrays:
        log(f"Reading the items of {domain} ({_size(source.items)})")
        return read_items(source.items, core["items"], strict=strict, local=source.image_paths)

    def buyers() -> Arrays:
        log(f"Clustering {counted(len(core['users']), 'buyers')}")
        names = unpack(items["categories"])
        bought = Purchases(core["users"], core["items"], core["user"], core["item"])
        cluster, sentences = kinds_of_buyers(
            bought, items["category"], names, clusters=options.clusters, seed=options.seed
        )
        return {"cluster": cluster, "sentences": pack(sentences)}

    key: list = [RECIPE, strict, file_state(source.reviews)]
    core = stages.get(f"{domain}-core", key, purchases)
    key = [*key, file_state(source.items)]
    items = stages.get(f"{domain}-items", key, records)
    key = [*key, options.clusters, options.seed]
    return core, items, stages.get(f"{domain}-buyers", key, buyers)


def _graph(
    domain: str,
    core: Arrays,
    items: Arrays,
    kinds: Arrays,
    image_paths: list[Path | None],
    options: _Options,
) -> tuple[RelationGraph, dict[str, int]]:
    """The graph of the items with title and image; and how many buyers give no pair."""
    ids, titles = unpack(items["ids"]), unpack(items["titles"])
    usable = np.array([bool(t and p) for t, p in zip(titles, image_paths, strict=True)])
    chosen = np.flatnonzero(usable)
    relations, cluster = merge_kinds(unpack(kinds["sentences"]), kinds["cluster"])
    keep = usable[core["item"]] & (cluster[core["user"]] >= 0)
    user = core["user"][keep]
    pairs = copurchase_pairs(
        user,
        (np.cumsum(usable, dtype=np.int32) - 1)[core["item"][keep]],
        cluster,
        items=len(chosen),
        per_user=options.pairs_per_user,
        per_item=options.pairs_per_item,
        seed=options.seed,
    )
    if not len(pairs):
        raise UserError(
            f"No user of {domain} has bought two items with title and image; allow fetching of "
            "images, or add images to the folder of images."
        )
    found, labels = np.unique(items["category"][chosen], return_inverse=True)
    labels -= found[0] < 0  # the unknown category has no name
    names = unpack(items["categories"])
    graph = RelationGraph(
        name=f"amazon_{domain}",
        ids=tuple(ids[i] for i in chosen),
        texts=tuple(titles[i] for i in chosen),
        labels=labels.astype(np.int32),
        label_names=tuple(names[i] for i in found if i >= 0),
        relations=tuple(relations),
        pairs=pairs,
        pair_split=np.full(len(pairs), -1, np.int8),
        images=EncodedImages([str(image_paths[i]) for i in chosen], encoded),
    )
    unknown = int(np.sum(cluster < 0))
    alone = len(cluster) - unknown - int(np.sum(np.bincount(user) > 1))
    return graph, {"users without a known category": unknown, "users without a pair": alone}


def _size(path: Path) -> str:
    return f"{path}, {path.stat().st_size / 1e6:,.1f} MB"
