"""Embeddings of items under relations, and the five scores of a pair (TT, II, TI, IT, AVG)."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.evaluation import SCORES
from rcml_jax.ops.similarity import l2_normalize, paired

#: Bytes of vectors gathered at a time: what a core's own cache holds; on accelerators more.
_CACHE_BYTES, _DEVICE_BYTES = 2**19, 2**26
_QUERIES = 2048  # whose scores are computed in one call


@dataclasses.dataclass(frozen=True)
class RelationEmbeddings:
    """L2-normalised embeddings of n items under R relations.

    items: (n,) identifiers, sorted; text, image: (R, n, d), or (1, n, d) where a modality does not
    depend on the relation; relation: (R, d) embeddings h_E of the sentences.

    sentence_weight: w ≥ 0. A pair then scores s(a, b) + w (s(h_E, a) + s(h_E, b)). With the
    cosine, the order of candidates is that of the query vector a + w h_E. The score is symmetric in
    a and b, so that it can also compare one pair under several relations.
    """

    items: np.ndarray
    text: np.ndarray
    image: np.ndarray
    relation: np.ndarray
    sentence_weight: float = 0.0

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Row indices of the given items."""
        rows = np.searchsorted(self.items, items)
        if np.any(self.items[np.minimum(rows, len(self.items) - 1)] != items):
            raise ValueError("an item is not among the embeddings")
        return rows


def _take(embeddings: jax.Array, relation: jax.Array, items: jax.Array) -> jax.Array:
    """Vectors of items under relations; the two index arrays broadcast to each other."""
    return embeddings[relation if embeddings.shape[0] > 1 else 0, items]


@functools.partial(jax.jit, static_argnames="similarity")
def scores_of_blocks(text, image, sentence, weight, a, b, relation, similarity):
    """The five scores, (m · block, c) each, of indices (m, block, 1 or c), one block at a time.

    text, image, sentence, weight: the fields of `RelationEmbeddings`; weight None for 0.
    """
    of_block: Callable[..., dict] = functools.partial(_similarity, similarity, weight)
    if similarity == "product":
        of_block = _product
    shape = jnp.broadcast_shapes(a.shape, b.shape, relation.shape)

    def scores(index):
        a, b, relation = index
        vectors = [_take(x, relation, rows) for rows in (a, b) for x in (text, image)]
        # Of what does not depend on the relation there is one score for all relations.
        found = of_block(*vectors, sentence[relation])
        return {name: jnp.broadcast_to(x, shape[1:]) for name, x in found.items()}

    found = jax.lax.map(scores, (a, b, relation))
    return {name: x.reshape(-1, shape[-1]) for name, x in found.items()}


def _similarity(similarity, weight, ta, ia, tb, ib, sentence):
    # The vectors have length one: there is nothing to divide by.
    score = paired("dot" if similarity == "cosine" else similarity)
    vectors = {
        "tt": (ta, tb),
        "ii": (ia, ib),
        "ti": (ta, ib),
        "it": (ia, tb),
        "avg": (l2_normalize(ta + ia), l2_normalize(tb + ib)),
    }
    found = {name: score(a, b) for name, (a, b) in vectors.items()}
    if weight is None:
        return found
    return {
        name: found[name] + weight * (score(sentence, a) + score(sentence, b))
        for name, (a, b) in vectors.items()
    }


def _product(ta, ia, tb, ib, sentence):
    cosine = paired("cosine")
    ta, ia, both_a = (cosine(x, sentence) for x in (ta, ia, l2_normalize(ta + ia)))
    tb, ib, both_b = (cosine(x, sentence) for x in (tb, ib, l2_normalize(tb + ib)))
    return {"tt": ta * tb, "ii": ia * ib, "ti": ta * ib, "it": ia * tb, "avg": both_a * both_b}


def block_sizes(queries: int, items: int, width: int, on_cpu: bool) -> tuple[int, int]:
    """Blocks of queries in one call, and queries in a block.

    items: those compared in a query, of either side; width: of their embeddings.
    """
    # Of each item a text and an image.
    most = _CACHE_BYTES if on_cpu else _DEVICE_BYTES
    block = max(1, most // (2 * items * width * 4))
    return max(1, min(_QUERIES // block, -(-queries // block))), block


def pair_scores(
    table: RelationEmbeddings,
    a: np.ndarray,
    b: np.ndarray,
    relation: np.ndarray,
    *,
    similarity: str = "cosine",
) -> dict[str, np.ndarray]:
    """The five scores, (q, c) each, of pairs (a, b) under relations.

    a, b, relation: (q, 1) or (q, c), or with one row for all; rows of the embeddings
    (`RelationEmbeddings.rows`) and relation indices. similarity: a name of
    `rcml_jax.ops.similarity`, or "product" for the training-free cos(z_A, h_E)·cos(z_B, h_E).
    Vectors are gathered for a few queries at a time, so that (q, c, d) is never in memory. A score
    depends on its two vectors and its relation only: equal candidates of a query tie to the last
    bit. Raises ValueError for an unknown similarity.
    """
    queries = max(map(len, (a, b, relation)))
    index = [np.broadcast_to(x, (queries, x.shape[1])).astype(np.int32) for x in (a, b, relation)]
    text, image, sentence = (jnp.asarray(x) for x in (table.text, table.image, table.relation))
    arrays = text, image, sentence, table.sentence_weight or None
    (device,) = text.devices()
    on_cpu = device.platform == "cpu"
    compared = [np.broadcast_shapes(x.shape, relation.shape)[1] for x in (a, b)]
    blocks, block = block_sizes(queries, sum(compared), table.text.shape[-1], on_cpu)
    rows = blocks * block

    def run(start: int) -> dict[str, np.ndarray]:
        indices = np.arange(start, start + rows).clip(max=queries - 1)
        places = (x[indices].reshape(-1, block, x.shape[1]) for x in index)
        # Each thread has these settings of its own; the indices come from the host.
        with jax.default_device(device), jax.transfer_guard("allow"):
            scores = scores_of_blocks(*arrays, *places, similarity=similarity)
            return {name: np.asarray(x)[: queries - start] for name, x in scores.items()}

    # A block is too small to be split over processors, so that several are worked on at once.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() if on_cpu else 1) as pool:
        parts = list(pool.map(run, range(0, queries, rows)))
    return {name: np.concatenate([part[name] for part in parts]) for name in SCORES}
