"""Retrieval between images and texts under every similarity: precision, recall, MRR, mAP, ranks.

Ties count against the model: among equal scores the wrong ones come first.
"""

import concurrent.futures
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation.top_k import Direction, TopK
from rcml_jax.ops.similarity import SIMILARITIES, get, prepare_rows, row_scores

# Which rows of a gallery are relevant for which query, as pairs of indices.


Positives = np.ndarray | Sequence[Sequence[int]]
_NAMED = 5


def named(kind: str, index: np.ndarray) -> str:
    """Name rows in an error message: "row 3", or "rows 3, 7, 8, 9, 12 and 40 more"."""
    listed = ", ".join(str(i) for i in index[:_NAMED])
    more = f" and {len(index) - _NAMED} more" if len(index) > _NAMED else ""
    plural = "queries" if kind == "query" else f"{kind}s"
    return f"{kind if len(index) == 1 else plural} {listed}{more}"


def pairs_of_positives(positives: Positives, queries: int, gallery: int) -> np.ndarray:
    """Distinct pairs (p, 2) of a query and a relevant item, sorted.

    positives: (q,) for one relevant item each, (q, p), or q sequences. Raises UserError for an
    index that is out of range and for a query without a relevant item.
    """
    if len(positives) != queries:
        raise UserError(f"positives has {len(positives)} rows for {queries} queries")
    rows = [np.reshape(row, -1) for row in positives]
    query = np.repeat(np.arange(queries), [len(row) for row in rows])
    items = [row for row in rows if len(row)] or [np.empty(0)]
    items = _integers("positives", np.concatenate(items))
    _check_range("positives", items, gallery, "gallery rows", "query", query)
    pairs = np.unique(np.stack([query, items], axis=1), axis=0)
    _check_relevant(pairs, queries, "query")
    return pairs


def pairs_of_texts(image_of_text: np.ndarray, images: int, texts: int) -> np.ndarray:
    """The pairs (texts, 2) of image and text, sorted.

    image_of_text: (texts,) index of each text's image. Raises UserError for an index that is out of
    range and for an image without a text, a query without a relevant item.
    """
    image_of_text = _integers("image_of_text", image_of_text)
    if image_of_text.shape != (texts,):
        raise UserError(
            f"image_of_text has shape {image_of_text.shape}; it must give one image for each of "
            f"the {texts} texts"
        )
    text = np.arange(texts)
    _check_range("image_of_text", image_of_text, images, "images", "text", text)
    pairs = np.stack([image_of_text, text], axis=1)
    _check_relevant(pairs, images, "image")
    return pairs[np.argsort(image_of_text, kind="stable")]


def _integers(name, values):
    values = np.asarray(values)
    if values.size and values.dtype.kind not in "iu":
        raise UserError(f"{name} must hold integers; its type is {values.dtype}")
    return values.astype(np.int64)


def _check_range(name, values, limit, of, kind, indices):
    wrong = np.flatnonzero((values < 0) | (values >= limit))
    if len(wrong):
        raise UserError(
            f"{name} is out of range for {named(kind, np.unique(indices[wrong]))}: it is "
            f"{values[wrong[0]]}, and there are {limit} {of}, counted from 0"
        )


def _check_relevant(pairs, queries, kind):
    without = np.flatnonzero(np.bincount(pairs[:, 0], minlength=queries) == 0)
    if len(without):
        raise UserError(f"a query with no relevant item: {named(kind, without)}")


# Rows of embeddings to search: arrays, memory-mapped files, or a model that embeds on demand.


_CHUNK_BYTES = 8 * 2**20


class Blocks(Protocol):
    """Rows that are read in blocks: `len()`, `width` and `block(start, stop)` in any float type."""

    width: int

    def __len__(self) -> int: ...

    def block(self, start: int, stop: int) -> np.ndarray:
        """The rows from start to before stop."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A matrix (n, d), in memory or memory-mapped; error messages call it by its name."""

    name: str
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.values.shape[1]

    def take(self, index: np.ndarray | slice, size: int) -> np.ndarray:
        """Rows of an index or a slice in float32, padded with zeros up to `size` rows."""
        values = self.values[index]
        block = np.zeros((size, self.width), np.float32)
        block[: len(values)] = values
        return block


Source = np.ndarray | jax.Array | Blocks | Rows


def open_rows(name: str, source: Source, *, memory: int) -> Rows:
    """Open a source of rows. Raises UserError if it is empty or not a matrix of numbers.

    A `Blocks` is asked for each of its rows once, in order. They are kept in memory if they need at
    most `memory` bytes, else in a temporary file.
    """
    if isinstance(source, Rows):
        return source
    if hasattr(source, "block"):
        values = _collect(name, cast(Blocks, source), memory)
    else:
        values = source if isinstance(source, np.ndarray) else np.asarray(source)
    if values.ndim != 2 or not (values.dtype.kind in "fiu" or values.dtype == jnp.bfloat16):
        raise UserError(
            f"{name} must be a matrix of numbers with a row for each vector; its shape is "
            f"{values.shape} and its type {values.dtype}"
        )
    if 0 in values.shape:
        raise UserError(f"{name} is empty: its shape is {values.shape}")
    return Rows(name, values)


def check_rows(rows: Rows, similarity: str) -> None:
    """Raise UserError, naming them, for rows that have no score under a similarity.

    Such rows have NaN or infinite entries, are zero vectors under "cosine", or, under the other
    similarities, have entries so large that a score could overflow.
    """
    limits = np.finfo(np.float32)
    cosine = similarity == "cosine"
    most = np.inf if cosine else np.sqrt(limits.max / (4 * rows.width))
    faults: dict[str, list[np.ndarray]] = {}
    step = max(1, _CHUNK_BYTES // (4 * rows.width))
    for start in range(0, len(rows), step):
        with np.errstate(over="ignore"):  # of float64 that float32 cannot hold
            part = np.asarray(rows.values[start : start + step], np.float32)
        largest = np.abs(part).max(axis=1)
        finite = np.isfinite(largest)
        for fault, wrong in (
            ("NaN or infinite entries", ~finite),
            ("entries whose scores could overflow", finite & (largest > most)),
            ("only zeros, whose cosine is not defined,", (largest < limits.tiny) & cosine),
        ):
            if wrong.any():
                faults.setdefault(fault, []).append(start + np.flatnonzero(wrong))
    for fault, parts in faults.items():
        raise UserError(f"{rows.name} has {fault} in {named('row', np.concatenate(parts))}")


def check_widths(first: Rows, second: Rows) -> None:
    """Raise UserError unless both have the same width."""
    if first.width != second.width:
        raise UserError(
            f"{first.name} has width {first.width} and {second.name} {second.width}; similarities "
            "need the same width: project the wider one"
        )


def _collect(name: str, source: Blocks, memory: int) -> np.ndarray:
    shape = len(source), source.width
    if 4 * shape[0] * shape[1] <= memory:
        values = np.empty(shape, np.float32)
    else:
        with tempfile.TemporaryFile() as file:  # gone with the map
            values = np.memmap(file, np.float32, "w+", shape=shape)
    step = max(1, min(1024, _CHUNK_BYTES // (4 * max(1, shape[1]))))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = np.asarray(source.block(start, stop))
        if block.shape != (stop - start, shape[1]):
            raise UserError(
                f"{name} gave a block of shape {block.shape} for its rows {start} to {stop} of "
                f"width {shape[1]}"
            )
        values[start:stop] = block
    return values


# Exact search of a gallery in blocks: top-K lists and ranks; queries × gallery is never held.


#: Default memory of a search, in bytes.
MEMORY = 2**30
_LARGEST, _SMALLEST = (1024, 2048), 64
#: Bytes a score needs while two blocks are in work: itself, its mark, copies, partial counts.
_SCORE_BYTES = 24
#: One in so many scores of a block may enter the lists one by one; more are sorted as a whole.
_SPARSE = 64
_GROUP = 16
_EACH = np.uint64(0x0101010101010101)


def search(
    queries: Source,
    gallery: Source,
    *,
    similarity: str,
    positives: Positives,
    k: int = 10,
    memory: int = MEMORY,
    signed: str = "absolute",
) -> TopK:
    """Top-k results of the gallery for each query, and the rank of its best relevant item.

    queries (q, d), gallery (n, d): arrays, memory-mapped files or `rows.Blocks`, computed in
    float32. positives: the gallery indices of each query's relevant items, (q,) for one each,
    (q, p), or q sequences. memory: bytes to plan with; they set the size of the blocks. The lists
    themselves, 12 bytes an entry, come on top. signed: an option of "chi_square". Raises UserError
    for rows that have no score, a query without a relevant item, an index out of range.
    """
    x, y = _open(("queries", queries), ("gallery", gallery), similarity, memory)
    pairs = pairs_of_positives(positives, len(x), len(y))
    (found,) = _run(x, y, pairs, k, memory, False, similarity=similarity, signed=signed)
    return found


def search_both(
    image: Source,
    text: Source,
    image_of_text: np.ndarray,
    *,
    similarity: str,
    k: int = 10,
    memory: int = MEMORY,
    signed: str = "absolute",
) -> tuple[TopK, TopK]:
    """Search texts by image and images by text, in one pass over the scores.

    image (n, d), text (m, d); image_of_text: (m,) index of each text's image. Returns the
    results of image queries among the texts, then those of text queries among the images. Options
    and errors are those of `search`; an image without a text is a query without a relevant item.
    """
    x, y = _open(("image", image), ("text", text), similarity, memory)
    pairs = pairs_of_texts(image_of_text, len(x), len(y))
    images, texts = _run(x, y, pairs, k, memory, True, similarity=similarity, signed=signed)
    return images, texts


def block_shape(queries: int, gallery: int, width: int, memory: int) -> tuple[int, int]:
    """Rows and columns of a block: powers of two, at least 64, that fit into memory.

    Raises UserError if not even the smallest block fits.
    """
    rows, columns = (
        min(largest, max(_SMALLEST, 1 << (length - 1).bit_length()))
        for length, largest in zip((queries, gallery), _LARGEST, strict=True)
    )
    needed = functools.partial(_bytes_needed, width)
    while needed(rows, columns) > memory and max(rows, columns) > _SMALLEST:
        rows, columns = (rows, columns // 2) if columns >= rows else (rows // 2, columns)
    if needed(rows, columns) > memory:
        raise UserError(
            f"memory is {memory} bytes; a search in {width} dimensions needs at least "
            f"{needed(_SMALLEST, _SMALLEST)}"
        )
    return rows, columns


def _bytes_needed(width, rows, columns):
    # The other half is for the rows that are held.
    return 2 * (_SCORE_BYTES * rows * columns + 12 * width * (rows + columns))


def _open(first, second, similarity, memory) -> tuple[Rows, Rows]:
    x, y = (open_rows(name, source, memory=memory // 4) for name, source in (first, second))
    get(similarity)  # refuses a name that is not known
    check_widths(x, y)
    for rows in (x, y):
        check_rows(rows, similarity)
    return x, y


def _run(queries: Rows, gallery: Rows, pairs, k, memory, both, **options) -> list[TopK]:
    """Search one direction, or both, in one pass; pairs (p, 2) are sorted, with every query."""
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    lengths = len(queries), len(gallery)
    shape = block_shape(*lengths, queries.width, memory)
    prepare = functools.partial(_prepare, similarity=options["similarity"])
    score = functools.partial(_scores, **options)
    relevant = _RelevantPairs(pairs, shape, lengths)

    scores = _pair_scores(queries, gallery, pairs, shape, prepare, score, relevant.none)
    directions = [Direction(pairs, scores, *lengths, k, shape[0])]
    if both:
        directions.append(Direction(pairs[:, ::-1], scores, *lengths[::-1], k, shape[1]))

    # Hold as many prepared queries as fit, and stream the gallery past them.
    held = max(1, memory // 4 // (4 * queries.width * shape[0])) * shape[0]

    def of_blocks():
        for group in range(0, lengths[0], held):
            starts = range(group, min(group + held, lengths[0]), shape[0])
            x = [prepare(queries.take(slice(i, i + shape[0]), shape[0])) for i in starts]
            for j in range(0, lengths[1], shape[1]):
                y = prepare(gallery.take(slice(j, j + shape[1]), shape[1]))
                for i, rows in zip(starts, x, strict=True):
                    at = i // shape[0], j // shape[1]
                    block = score(rows, y, relevant.of(*at))
                    sizes = lengths[0] - i, lengths[1] - j
                    if sizes[0] < shape[0] or sizes[1] < shape[1]:
                        block = _existing(block, sizes)
                    states = tuple(d.state(b) for d, b in zip(directions, at, strict=False))
                    yield at, block, _marks(block, states)

    # The directions share the processor evenly: its cores also work on the next block, half each.
    with concurrent.futures.ThreadPoolExecutor(len(directions)) as pool:
        for block in _one_ahead(of_blocks()):
            take_up = functools.partial(_take_up, *block)
            list(pool.map(take_up, range(len(directions)), directions))
    return [direction.found() for direction in directions]


def _one_ahead(items: Iterable) -> Iterator:
    """The items; each is asked for, and so begun, before the one before it is given out."""
    items = iter(items)
    waiting = next(items)
    for item in items:
        yield waiting
        waiting = item
    yield waiting


class _RelevantPairs:
    """Row and column of the relevant pairs in each block, equally many for every block."""

    def __init__(self, pairs, shape, lengths):
        across = -(-lengths[1] // shape[1])
        number = pairs // shape @ [across, 1]
        order = np.argsort(number, kind="stable")
        self._numbers, self._indices = number[order], (pairs % shape)[order]
        self._across = across
        most = np.max(np.bincount(number))
        #: What stands for no pair: indices outside of a block.
        self.none = np.tile(np.array(shape, np.int32), (1 << int(most - 1).bit_length(), 1))

    def of(self, row: int, column: int) -> np.ndarray:
        number = row * self._across + column
        first, last = np.searchsorted(self._numbers, [number, number + 1])
        indices = self.none.copy()
        indices[: last - first] = self._indices[first:last]
        return indices


def _pair_scores(queries, gallery, pairs, shape, prepare, score, none) -> np.ndarray:
    """Scores (p,) of the pairs, by the product that the search uses."""
    scores = np.empty(len(pairs), np.float32)
    start = 0
    while start < len(pairs):
        first = pairs[start, 0]
        stop = min(start + shape[1], np.searchsorted(pairs[:, 0], first + shape[0]))
        query, item = pairs[start:stop].T
        x = prepare(queries.take(slice(first, first + shape[0]), shape[0]))
        y = prepare(gallery.take(item, shape[1]))
        part = np.asarray(score(x, y, none))
        scores[start:stop] = part[query - first, np.arange(stop - start)]
        start = stop
    return scores


@functools.partial(jax.jit, static_argnames="similarity")
def _prepare(rows, similarity):
    return prepare_rows(similarity, rows)


@functools.partial(jax.jit, static_argnames=("similarity", "signed"))
def _scores(x, y, relevant, *, similarity, signed):
    """Scores (n, m) of prepared rows (n, d), (m, d); minus infinity at relevant pairs (p, 2)."""
    scores = row_scores(similarity, x, y, signed=signed)
    return scores.at[relevant[:, 0], relevant[:, 1]].set(-jnp.inf, mode="drop")


@jax.jit
def _existing(scores, sizes):
    """Scores of a block of which only the first rows and columns exist; the rest loses to all."""
    row, column = (jnp.arange(n) < size for n, size in zip(scores.shape, sizes, strict=True))
    return jnp.where(row[:, None] & column, scores, -jnp.inf)


@jax.jit
def _marks(scores, state):
    """Marks (n, m) uint8 of the scores of a block.

    state: for the rows and, if wanted, the columns, scores to exceed and scores to reach. Bit s of
    a mark says that its score exceeds that of direction s, bit 2 + s that it reaches it.
    """
    marks = jnp.zeros(scores.shape, jnp.uint8)
    for direction, vectors in enumerate(state):
        floor, bar = (jnp.expand_dims(vector, 1 - direction) for vector in vectors)
        marks |= (scores > floor).astype(jnp.uint8) << direction
        marks |= (scores >= bar).astype(jnp.uint8) << (2 + direction)
    return marks


@functools.partial(jax.jit, static_argnames=("k", "direction"))
def _top(scores, k, direction):
    """The k highest of each row, or column, (·, k) and their indices; of equals the first."""
    length = scores.shape[1 - direction]
    if k * _GROUP >= length:
        return jax.lax.top_k(scores if direction == 0 else scores.T, min(k, length))
    # They are in the k groups of neighbours with the highest maxima, of equals the first.
    if direction == 0:
        highest = scores.reshape(len(scores), -1, _GROUP).max(axis=2)
    else:
        highest = scores.reshape(-1, _GROUP, scores.shape[1]).max(axis=1).T
    group = jnp.sort(jax.lax.top_k(highest, k)[1], axis=1)
    place = (group[:, :, None] * _GROUP + jnp.arange(_GROUP)).reshape(len(group), -1)
    own = jnp.arange(len(group))[:, None]
    values, chosen = jax.lax.top_k(scores[own, place] if direction == 0 else scores[place, own], k)
    return values, jnp.take_along_axis(place, chosen, axis=1)


@jax.transfer_guard("allow")  # each thread has this setting of its own
def _take_up(at: tuple[int, int], scores, marks, number: int, direction: Direction) -> None:
    """Add a block to the counts of a direction's queries, and marked scores to their lists."""
    words = np.asarray(marks).view(np.uint64)
    direction.count[at[number]] += _count(words, 2 + number, axis=1 - number)
    best = direction.best[at[number]]
    place = _set_bits(words, number)
    if place is not None:
        values = np.asarray(scores).reshape(-1)[place]
        row, index = np.divmod(place, scores.shape[1])[:: 1 - 2 * number]
    else:
        values, index = (np.asarray(v) for v in _top(scores, best.scores.shape[1], number))
        exists = values > -np.inf
        row, values, index = np.nonzero(exists)[0], values[exists], index[exists]
    best.add(row, index + at[1 - number] * scores.shape[1 - number], values)


def _count(words: np.ndarray, bit: int, axis: int) -> np.ndarray:
    """How many marks have a bit, along an axis of the marks; words (n, m) hold eight each."""
    if axis == 1:
        return np.bitwise_count(words & (_EACH << np.uint64(bit))).sum(axis=1, dtype=np.int64)
    # Eight counts in a word, as 64 rows cannot overflow them.
    counts = (words >> np.uint64(bit) & _EACH).reshape(-1, 64, words.shape[1]).sum(axis=1)
    return counts.view(np.uint8).sum(axis=0, dtype=np.int64)


def _set_bits(words: np.ndarray, bit: int) -> np.ndarray | None:
    """Places of the marks with a bit; None if they are many."""
    words = words.reshape(-1)
    bits = _EACH << np.uint64(bit)
    some = np.flatnonzero((words & bits) != 0)
    if len(some) * _SPARSE > 8 * len(words):
        return None
    place = np.flatnonzero((words[some] & bits).view(np.uint8))
    return some[place >> 3] * 8 + (place & 7)


KS = (1, 5, 10)


#: Measures with an interval; of the others the queries' values are not kept.
INTERVALS = ("r@1", "r@5", "r@10", "mrr", "map@10", "median_rank")


def measures(
    found: TopK,
    ks: tuple[int, ...] = KS,
    *,
    groups: np.ndarray | None = None,
    bootstrap: int = 0,
) -> dict[str, Any]:
    """The measures of one direction, means over its queries as fractions.

    For each K of ks, of which the lists of `found` must have the largest: `p@K`, the share of the
    top K that is relevant (with n relevant items at most n / K), and `r@K`, whether any of them is.
    `mrr`: 1 / rank of the best relevant item in the whole gallery. `map@K` for the largest K:
    average precision over the top K, Σ_i≤K relevance_i · p@i / min(K, n). `median_rank` of the best
    relevant item, 1 at best; `queries`, their number. With `bootstrap` samples also
    `interval`, {measure: [low, high]} as in `bootstrap_intervals`; groups: (q,) as there.
    """
    values = _per_query(found, ks)
    result: dict[str, Any] = {name: float(x.mean()) for name, x in values.items()}
    ranks = found.rank + 1
    result["median_rank"] = float(np.median(ranks))
    result["queries"] = len(ranks)
    if bootstrap:
        chosen = {name: x for name, x in values.items() if name in INTERVALS}
        result["interval"] = bootstrap_intervals(chosen, ranks, groups, samples=bootstrap)
    return result


def _per_query(found: TopK, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Each measure but the median for each query, (q,)."""
    longest = max(ks)
    queries, listed = found.relevance.shape
    # A list is shorter than K if the whole gallery is; the columns left over hold nothing relevant.
    relevance = np.zeros((queries, max(longest, listed)))
    relevance[:, :listed] = found.relevance
    hits = relevance.cumsum(axis=1)
    values = {f"p@{k}": hits[:, k - 1] / k for k in ks}
    values |= {f"r@{k}": (hits[:, k - 1] > 0).astype(float) for k in ks}
    precision = hits[:, :longest] / np.arange(1, longest + 1)
    average = (relevance[:, :longest] * precision).sum(axis=1) / np.minimum(longest, found.relevant)
    values["mrr"] = 1 / (found.rank + 1)
    values[f"map@{longest}"] = average
    return values


def bootstrap_intervals(
    values: Mapping[str, np.ndarray],
    ranks: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile intervals [low, high] of means of values (q,), and of the median rank.

    Queries are drawn with replacement; where `groups` (q,) are given, whole groups are, such as all
    texts of an image, which are not independent of each other. Equal seeds draw the same queries,
    so that intervals of one gallery can be compared. ranks: (q,), 1 at best; of an even number of
    queries the lower median counts.
    """
    rng = np.random.default_rng(seed)
    own = np.arange(len(ranks)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(np.max(own)) + 1
    size = np.bincount(own)
    sums = {name: np.bincount(own, x) for name, x in values.items()}
    order = np.argsort(ranks, kind="stable")
    drawn: dict[str, list[Any]] = {name: [] for name in (*sums, "median_rank")}
    for _ in range(samples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        queries = times @ size
        for name, total in sums.items():
            drawn[name].append(times @ total / queries)
        below = np.cumsum(times[own[order]])
        drawn["median_rank"].append(ranks[order[np.searchsorted(below, queries / 2)]])
    tails = (1 - level) / 2, (1 + level) / 2
    return {name: [float(x) for x in np.quantile(v, tails)] for name, v in drawn.items()}


def check_pairs(
    image: Source,
    text: Source,
    image_of_text: np.ndarray,
    *,
    similarities: Iterable[str] = tuple(SIMILARITIES),
) -> None:
    """Raise UserError, with the row numbers, unless images and texts can search each other.

    Refused are widths that differ, rows with NaN or infinite entries, an index in `image_of_text`
    (m,) that is out of range, an image without a text, and rows that have no score under one of the
    similarities, such as zero vectors under "cosine".
    """
    images = open_rows("image", image, memory=MEMORY)
    texts = open_rows("text", text, memory=MEMORY)
    check_widths(images, texts)
    pairs_of_texts(image_of_text, len(images), len(texts))
    for similarity in similarities:
        check_rows(images, similarity)
        check_rows(texts, similarity)


def retrieval(
    image: Source,
    text: Source,
    image_of_text: np.ndarray,
    *,
    similarities: Iterable[str] = tuple(SIMILARITIES),
    ks: tuple[int, ...] = KS,
    memory: int = MEMORY,
    signed: str = "absolute",
    bootstrap: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """The measures of both directions under each similarity.

    image (n, d), text (m, d), image_of_text (m,), memory and signed as in `search_both`. bootstrap:
    samples for intervals, of images with all their texts, or none. Returns {"image_to_text":
    {similarity: measures}, "text_to_image": {...}}; the first's queries are the images. Raises
    UserError as `check_pairs` does.
    """
    similarities = tuple(similarities)
    # Opened once, so that a model that embeds on demand runs once for all similarities.
    image = open_rows("image", image, memory=memory // 4)
    text = open_rows("text", text, memory=memory // 4)
    check_pairs(image, text, image_of_text, similarities=similarities)
    result: dict[str, dict] = {"image_to_text": {}, "text_to_image": {}}
    for similarity in similarities:
        found = search_both(
            image,
            text,
            image_of_text,
            similarity=similarity,
            k=max(ks),
            memory=memory,
            signed=signed,
        )
        groups = (None, image_of_text)
        for direction, of_direction, own in zip(result, found, groups, strict=True):
            result[direction][similarity] = measures(
                of_direction, ks, groups=own, bootstrap=bootstrap
            )
    return result


# Search with a score of pairs that is not a product of embeddings, strip by strip.


#: Bytes a score needs in work: itself, its order, whether it is relevant.
_QUERY_BYTES = 32


def pair_retrieval(
    score: Callable[[Any, Any], Any],
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    *,
    memory: int = 2**29,
    bootstrap: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measures of both directions under a learned score, in the form of `retrieval`.

    score: (n, d), (m, d) → (n, m), larger for more similar. Of queries × gallery only a strip that
    fits `memory` bytes is held. Raises UserError for an image without a text.
    """
    pairs_of_texts(image_of_text, len(image), len(text))
    rows = np.asarray(image_of_text)
    images, texts = np.arange(len(image)), np.arange(len(text))

    def of_images(part: np.ndarray) -> TopK:
        return _top_k(np.asarray(score(image[part], text)), rows == images[part][:, None])

    def of_texts(part: np.ndarray) -> TopK:
        return _top_k(np.asarray(score(image, text[part])).T, rows[texts[part]][:, None] == images)

    found = {
        "image_to_text": (_in_strips(of_images, len(image), len(text), memory), None),
        "text_to_image": (_in_strips(of_texts, len(text), len(image), memory), rows),
    }
    return {
        direction: measures(of_direction, groups=groups, bootstrap=bootstrap)
        for direction, (of_direction, groups) in found.items()
    }


def _in_strips(
    search: Callable[[np.ndarray], TopK], queries: int, gallery: int, memory: int
) -> TopK:
    size = max(1, memory // (_QUERY_BYTES * gallery))
    parts = [search(np.arange(i, min(i + size, queries))) for i in range(0, queries, size)]
    names = ("indices", "scores", "relevance", "rank", "relevant")
    return TopK(*(np.concatenate([getattr(part, n) for part in parts]) for n in names))


def _top_k(scores: np.ndarray, relevance: np.ndarray) -> TopK:
    """A strip (q, n); irrelevant first in ties, NaN as in `ranking.candidate_ranks`."""
    best = np.max(np.where(relevance, scores, -np.inf), axis=1, keepdims=True)
    rank = np.sum(~relevance & ~(scores < best), axis=1)
    sortable = np.where(np.isnan(scores) & ~relevance, np.inf, scores)
    order = np.lexsort((relevance, -sortable), axis=1)[:, : max(KS)]
    take = lambda x: np.take_along_axis(x, order, axis=1)  # noqa: E731
    return TopK(order, take(scores), take(relevance), rank, relevance.sum(axis=1))
