"""Exact search of a gallery in blocks: top-K lists and ranks; queries × gallery is never held.

Ties count against the model. The scores of the right answers come from the same compiled product,
in blocks of the same shape, as the scores they are compared with, so that equal rows tie to the
last bit.
"""

import concurrent.futures
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.errors import UserError
from rcml_jax.evaluation import blocks
from rcml_jax.evaluation.answers import Positives, pairs_of_positives, pairs_of_texts
from rcml_jax.evaluation.rows import Rows, Source, check_rows, check_widths, open_rows
from rcml_jax.evaluation.toplists import Direction, Found
from rcml_jax.similarity import get

#: Bytes that a search plans with unless told.
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
) -> Found:
    """The best k of the gallery for each query, and the rank of the best of its right answers.

    queries (q, d), gallery (n, d): arrays, memory-mapped files or `rows.Blocks`, computed in
    float32. positives: the places in the gallery of each query's right answers, (q,) for one each,
    (q, p), or q sequences. memory: bytes to plan with; they set the size of the blocks. The lists
    themselves, 12 bytes an entry, come on top. signed: an option of "chi_square". Raises UserError
    for rows that have no score, a query without a right answer, an index out of range.
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
) -> tuple[Found, Found]:
    """Texts searched for each image and images for each text, from one pass over the scores.

    image (n, d), text (m, d); image_of_text: (m,) index of each text's image. Returns what was
    found for the images, among the texts, and for the texts, among the images. Options and errors
    as in `search`; an image without a text is a query without a right answer.
    """
    x, y = _open(("image", image), ("text", text), similarity, memory)
    pairs = pairs_of_texts(image_of_text, len(x), len(y))
    images, texts = _run(x, y, pairs, k, memory, True, similarity=similarity, signed=signed)
    return images, texts


def block_shape(queries: int, gallery: int, width: int, memory: int) -> tuple[int, int]:
    """Rows and columns of the blocks: powers of two, at least 64, for which memory has room.

    Raises UserError if it has none for the smallest.
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


def _run(queries: Rows, gallery: Rows, pairs, k, memory, both, **options) -> list[Found]:
    """Search one direction, or both, in one pass; pairs (p, 2) are sorted, with every query."""
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    lengths = len(queries), len(gallery)
    shape = block_shape(*lengths, queries.width, memory)
    prepare = functools.partial(_prepare, similarity=options["similarity"])
    score = functools.partial(_scores, **options)
    right = _RightPairs(pairs, shape, lengths)

    scores = _pair_scores(queries, gallery, pairs, shape, prepare, score, right.none)
    directions = [Direction(pairs, scores, *lengths, k, shape[0])]
    if both:
        directions.append(Direction(pairs[:, ::-1], scores, *lengths[::-1], k, shape[1]))

    # As many queries as there is room for are held, prepared, while the gallery goes by.
    held = max(1, memory // 4 // (4 * queries.width * shape[0])) * shape[0]

    def of_blocks():
        for group in range(0, lengths[0], held):
            starts = range(group, min(group + held, lengths[0]), shape[0])
            x = [prepare(queries.take(slice(i, i + shape[0]), shape[0])) for i in starts]
            for j in range(0, lengths[1], shape[1]):
                y = prepare(gallery.take(slice(j, j + shape[1]), shape[1]))
                for i, rows in zip(starts, x, strict=True):
                    at = i // shape[0], j // shape[1]
                    block = score(rows, y, right.of(*at))
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


class _RightPairs:
    """Where in each block the right pairs stand: rows and columns, equally many for every block."""

    def __init__(self, pairs, shape, lengths):
        across = -(-lengths[1] // shape[1])
        number = pairs // shape @ [across, 1]
        order = np.argsort(number, kind="stable")
        self._numbers, self._places = number[order], (pairs % shape)[order]
        self._across = across
        most = np.bincount(number).max()
        #: What stands for no pair: places outside of a block.
        self.none = np.tile(np.array(shape, np.int32), (1 << int(most - 1).bit_length(), 1))

    def of(self, row: int, column: int) -> np.ndarray:
        number = row * self._across + column
        first, last = np.searchsorted(self._numbers, [number, number + 1])
        places = self.none.copy()
        places[: last - first] = self._places[first:last]
        return places


def _pair_scores(queries, gallery, pairs, shape, prepare, score, none) -> np.ndarray:
    """Scores (p,) of the pairs, by the product that the search uses."""
    scores = np.empty(len(pairs), np.float32)
    start = 0
    while start < len(pairs):
        first = pairs[start, 0]
        stop = min(start + shape[1], np.searchsorted(pairs[:, 0], first + shape[0]))
        query, answer = pairs[start:stop].T
        x = prepare(queries.take(slice(first, first + shape[0]), shape[0]))
        y = prepare(gallery.take(answer, shape[1]))
        part = np.asarray(score(x, y, none))
        scores[start:stop] = part[query - first, np.arange(stop - start)]
        start = stop
    return scores


@functools.partial(jax.jit, static_argnames="similarity")
def _prepare(rows, similarity):
    return blocks.prepare(similarity, rows)


@functools.partial(jax.jit, static_argnames=("similarity", "signed"))
def _scores(x, y, right, *, similarity, signed):
    """Scores (n, m) of prepared rows (n, d), (m, d); minus infinity at the places right (p, 2)."""
    scores = blocks.scores(similarity, x, y, signed=signed)
    return scores.at[right[:, 0], right[:, 1]].set(-jnp.inf, mode="drop")


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
    """The k highest of each row, or column, (·, k) and their places; of equals the first."""
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


def _take_up(at: tuple[int, int], scores, marks, number: int, direction: Direction) -> None:
    """Add a block to the counts of a direction's queries, and marked scores to their lists."""
    words = np.asarray(marks).view(np.uint64)
    direction.count[at[number]] += _count(words, 2 + number, axis=1 - number)
    best = direction.best[at[number]]
    place = _places(words, number)
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


def _places(words: np.ndarray, bit: int) -> np.ndarray | None:
    """Places of the marks with a bit; None if they are many."""
    words = words.reshape(-1)
    bits = _EACH << np.uint64(bit)
    some = np.flatnonzero((words & bits) != 0)
    if len(some) * _SPARSE > 8 * len(words):
        return None
    place = np.flatnonzero((words[some] & bits).view(np.uint8))
    return some[place >> 3] * 8 + (place & 7)
