"""Pictures of Amazon's products: local files first, the others fetched."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rcml_jax.data import images
from rcml_jax.errors import UserError

#: The longer side of a stored picture; a larger one is scaled down.
STORED_SIZE = 512
# If more of the wanted pictures fail in a way that another run may mend, the set is not prepared.
MOST_FAILED = 0.05
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def local_pictures(directory: Path) -> dict[str, Path]:
    """The pictures of a folder by their names without the ending; none where there is no folder."""
    if not directory.is_dir():
        return {}
    found = {}
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, ending = os.path.splitext(entry.name)
            if ending.lower() in _ENDINGS and entry.is_file():
                found.setdefault(stem, Path(entry.path))
    return found


def find_pictures(
    ids: Sequence[str],
    urls: Sequence[str],
    local: dict[str, Path],
    cache: Path,
    *,
    fetch: bool,
    strict: bool,
    log: Callable[[str], None],
) -> tuple[list[Path | None], dict[str, int]]:
    """The picture of each item, or None where none can be had; and how many were not, by reason.

    An item has its local picture, if it can be decoded, else that of its URL ("": none), which is
    fetched into `cache` where it is not there yet. Nothing is fetched unless `fetch`: then only
    what is in `cache` counts. An item that is not to have one has the id and the URL "".

    Raises:
      UserError: so many pictures fail that another run is worthwhile; any at all with `strict`.
    """
    paths = _decodable([local.get(key) for key in ids])
    counts = {"damaged local pictures": sum(k in local for k in ids) - len(ids) + paths.count(None)}
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
        for place, path in zip(wanted, found, strict=True):
            paths[place] = path
    if strict and None in paths:
        first = paths.index(None)
        raise UserError(
            f"The picture of item {ids[first]} ({urls[first] or 'no address'}) cannot be had; add "
            "it to the folder of images, or turn strict off to leave such items out."
        )
    return paths, counts


def encoded(path: Path) -> bytes:
    """The bytes of a picture as the data set stores them; UserError if it cannot be read."""
    try:
        return images.storable(path.read_bytes(), STORED_SIZE)
    except images.DECODE_ERRORS as error:
        raise UserError(
            f"The picture {path} cannot be read ({error}); replace or remove it."
        ) from error


def _decodable(paths: list[Path | None]) -> list[Path | None]:
    """The same paths, None in place of a file that is no whole picture."""

    def checked(path: Path | None) -> Path | None:
        if path is None:
            return None
        try:
            images.check_decodes(path.read_bytes())
        except images.DECODE_ERRORS:
            return None
        return path

    with ThreadPoolExecutor() as pool:
        return list(pool.map(checked, paths))


def _fetch(
    urls: list[str], cache: Path, log: Callable[[str], None], counts: dict[str, int]
) -> list[Path | None]:
    from rcml_jax.data.fetch import fetch_images

    report = fetch_images(urls, cache, max_size=STORED_SIZE, log=log)
    failed = report.counts["failed"]
    if failed > MOST_FAILED * len(set(urls)):
        raise UserError(
            f"{failed:,} of {len(set(urls)):,} pictures could not be fetched; run the same command "
            "again later, which goes on with these, or turn the fetching of images off."
        )
    for reason, number in report.counts.items():
        if reason not in ("ok", "cached"):
            counts[f"pictures {reason.replace('_', ' ')}"] = number
    return report.paths


def _stored(urls: list[str], cache: Path, counts: dict[str, int]) -> list[Path | None]:
    from rcml_jax.data.fetch import image_path

    paths = [image_path(cache, url) for url in urls]
    found = [path if path.is_file() else None for path in paths]
    counts["pictures not fetched"] = found.count(None)
    return found
