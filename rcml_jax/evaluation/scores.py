"""Embeddings of items under relations, and the five scores of a pair (TT, II, TI, IT, AVG)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rcml_jax.similarity import l2_normalize, paired

#: Text-text, image-image, A's text with B's image, A's image with B's text, and the similarity of
#: the averaged and renormalised embeddings.
SCORES = ("tt", "ii", "ti", "it", "avg")
_BLOCK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """L2-normalised embeddings of n items under R relations.

    items: (n,) identifiers, sorted; text, image: (R, n, d), or (1, n, d) where a modality does not
    depend on the relation; relation: (R, d) embeddings h_E of the sentences.
    """

    items: np.ndarray
    text: np.ndarray
    image: np.ndarray
    relation: np.ndarray

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Places of the given items in the table."""
        rows = np.searchsorted(self.items, items)
        if np.any(self.items[np.minimum(rows, len(self.items) - 1)] != items):
            raise ValueError("an item is not in the embedding table")
        return rows


def _take(embeddings: jax.Array, relation: jax.Array, items: jax.Array) -> jax.Array:
    """Vectors of items under relations; the two index arrays broadcast to each other."""
    return embeddings[relation if embeddings.shape[0] > 1 else 0, items]


@functools.partial(jax.jit, static_argnames="similarity")
def _similarity_block(text, image, a, b, relation, similarity):
    score = paired(similarity)
    ta, tb = _take(text, relation, a), _take(text, relation, b)
    ia, ib = _take(image, relation, a), _take(image, relation, b)
    return {
        "tt": score(ta, tb),
        "ii": score(ia, ib),
        "ti": score(ta, ib),
        "it": score(ia, tb),
        "avg": score(l2_normalize(ta + ia), l2_normalize(tb + ib)),
    }


@jax.jit
def _product_block(text, image, sentence, a, b, relation):
    cosine = paired("cosine")
    h = sentence[relation]
    ta, tb = cosine(_take(text, relation, a), h), cosine(_take(text, relation, b), h)
    ia, ib = cosine(_take(image, relation, a), h), cosine(_take(image, relation, b), h)
    both_a = cosine(l2_normalize(_take(text, relation, a) + _take(image, relation, a)), h)
    both_b = cosine(l2_normalize(_take(text, relation, b) + _take(image, relation, b)), h)
    return {"tt": ta * tb, "ii": ia * ib, "ti": ta * ib, "it": ia * tb, "avg": both_a * both_b}


def pair_scores(
    table: EmbeddingTable,
    a: np.ndarray,
    b: np.ndarray,
    relation: np.ndarray,
    *,
    similarity: str = "cosine",
) -> dict[str, np.ndarray]:
    """The five scores of pairs (a, b) under relations.

    a, b, relation: (q, c) after broadcasting; rows of the table (`EmbeddingTable.rows`) and
    relation indices. similarity: a name of `rcml_jax.similarity`, or "product" for the
    training-free cos(z_A, h_E)·cos(z_B, h_E). Worked off in blocks of queries, so that at most a
    few hundred megabytes of gathered vectors are held.
    """
    a, b, relation = (np.asarray(x) for x in np.broadcast_arrays(a, b, relation))
    queries, width = a.shape
    block = max(1, _BLOCK_BYTES // (width * table.text.shape[-1] * 4))
    text, image, sentence = (jnp.asarray(x) for x in (table.text, table.image, table.relation))
    out: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        rows = np.minimum(np.arange(start, start + min(block, queries)), queries - 1)
        index = a[rows], b[rows], relation[rows]
        if similarity == "product":
            scores = _product_block(text, image, sentence, *index)
        else:
            scores = _similarity_block(text, image, *index, similarity=similarity)
        for name in SCORES:
            out[name].append(np.asarray(scores[name])[: stop - start])
    return {name: np.concatenate(parts) for name, parts in out.items()}
