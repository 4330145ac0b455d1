"""The relation-conditioned objective of RCML (Eq. 1–2), relation by relation."""

import functools

import jax
import jax.numpy as jnp

from rcml_jax.losses._chunked import lowest
from rcml_jax.ops.similarity import as_float
from rcml_jax.ops.split import split_over_devices

Terms = dict[str, tuple[jax.Array, jax.Array]]


def relation_contrastive(
    text: jax.Array,
    image: jax.Array,
    anchor: jax.Array,
    positive: jax.Array,
    *,
    pair_valid: jax.Array,
    related: jax.Array,
    valid: jax.Array,
    intra: jax.Array,
    temperature: float | jax.Array = 0.1,
    intra_modal_weight: float | jax.Array = 0.5,
    chunk_size: int | None = None,
    pair_chunk_size: int | None = None,
    remat: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """RCML's loss (L_ti + L_it)/2 + λ (L_tt + L_ii) of a batch (arXiv 2508.17497, Eq. 1–2).

    L_xy is the mean over pairs (i, j, e), in both directions, of
    −log [exp(z_x^i·z_y^j/τ) / Σ_{k ∈ {j} ∪ N(i)} exp(z_x^i·z_y^k/τ)], where z are the embeddings
    under the pair's own relation e and N(i) the valid items not related to i. The intra-modal means
    L_tt and L_ii leave the intra-sample pairs out: an item compared with itself has similarity 1
    and no gradient. A mean over no pairs is 0.

    text, image: (R, N, d) embeddings of all N items under each of R relations, L2-normalised by
        the pooling head (not normalised again here). They must also be finite at padding.
    anchor, positive: (R, G) indices of the items of each relation's pairs, within 0..N−1.
    pair_valid: (R, G) bool, false for padding. Pairs with an invalid item are ignored.
    related: (N, N) bool, true if two items are paired under any relation of the whole graph, as in
        the paper. Or (R, N, N), true if they are paired under that relation of the batch; items
        paired under another relation only are then negatives. Symmetric, true on the diagonal.
    valid: (N,) bool, false for padding.
    intra: (R,) bool, true for the intra-sample relation, whose pairs have anchor = positive.
    intra_modal_weight: λ.
    chunk_size: relations computed at a time. None computes all at once: the fastest form, which
        holds 8·R·G·N logits.
    pair_chunk_size: pairs of a relation computed at a time; None for all. With chunk_size=1 only
        8·pair_chunk_size·N logits are held, for any number of pairs and relations.
    remat: with chunks, compute their logits again in the backward pass instead of keeping them.

    Returns the loss and a dict of scalars: the terms `tt`, `ti`, `it` and `ii` (`ti` goes from the
    anchor's text to the positive's image), `pairs`, the number of valid pairs, and `accuracy`, the
    share of cross-modal rows whose positive is strictly above all its negatives.
    """
    terms = _terms_by_relation(
        {"text": text, "image": image, "related": jnp.asarray(related, bool)},
        (anchor, positive, pair_valid),
        functools.partial(relation_terms, valid=valid, temperature=temperature),
        chunk_size=chunk_size or len(text),
        pair_chunk_size=pair_chunk_size,
        remat=remat,
    )
    inter = ~jnp.asarray(intra, bool)
    means = {name: _mean(*terms[name]) for name in ("ti", "it", "accuracy")}
    means |= {name: _mean(*terms[name], where=inter) for name in ("tt", "ii")}
    rows = jnp.sum(terms["ti"][1])
    weight = jnp.asarray(intra_modal_weight, rows.dtype)
    loss = (means["ti"] + means["it"]) / 2 + weight * (means["tt"] + means["ii"])  # Eq. 1
    return loss, {**means, "pairs": rows / 2}


def relation_terms(
    text: jax.Array,
    image: jax.Array,
    anchor: jax.Array,
    positive: jax.Array,
    *,
    pair_valid: jax.Array,
    related: jax.Array,
    valid: jax.Array,
    temperature: float | jax.Array = 0.1,
) -> Terms:
    """Sums and counts of Eq. 2's four terms L_xy under one relation.

    text, image: (N, d); anchor, positive, pair_valid: (G,); related: (N, N); the rest as in
    `relation_contrastive`.
    Returns (sum, count) of `tt`, `ti`, `it`, `ii` and `accuracy`. Each valid pair is two rows, one
    a direction, so `count` of a term is twice the number of pairs; an intra-sample pair is the same
    row twice, which leaves its mean unchanged. All four terms are summed under any relation: the
    caller drops `tt` and `ii` of the intra-sample one.
    """
    text, image = as_float(text), as_float(image)
    # NumPy arrays cannot be indexed by traced ones.
    related, valid = jnp.asarray(related, bool), jnp.asarray(valid, bool)
    # Both directions of each pair: row i has the positive j and the negatives N(i).
    rows = jnp.concatenate([anchor, positive])
    columns = jnp.concatenate([positive, anchor])
    live = _live(anchor, positive, pair_valid, valid)
    live = jnp.concatenate([live, live])
    is_positive = columns[:, None] == jnp.arange(text.shape[0], dtype=columns.dtype)[None]
    is_negative = valid[None] & ~related[rows] & ~is_positive

    queries = jnp.concatenate([text[rows], image[rows]])
    # (modality of the anchor, row, modality of the candidate, candidate). The candidates of both
    # modalities are stacked, not joined: split over devices, they stay where they are.
    logits = jnp.einsum("qd,ynd->qyn", queries, jnp.stack([text, image]))
    logits = logits.reshape(2, len(rows), 2, len(text)) / jnp.asarray(temperature, text.dtype)
    is_positive, is_negative, live_row = (
        x[None, :, None] for x in (is_positive, is_negative, live)
    )
    masked = lowest(logits.dtype)
    target = jnp.sum(jnp.where(is_positive, logits, 0), axis=-1)
    kept = jnp.where(is_positive | is_negative, logits, masked)
    losses = jnp.where(live_row, jax.nn.logsumexp(kept, axis=-1) - target, 0)  # Eq. 2
    hardest = jnp.max(jnp.where(is_negative, logits, masked), axis=-1)
    wins = live_row & (target > hardest)

    count = jnp.sum(live).astype(losses.dtype)
    sums = jnp.sum(losses, axis=1)
    terms = {x + y: (sums[i, j], count) for i, x in enumerate("ti") for j, y in enumerate("ti")}
    cross_wins = jnp.sum(wins[0, :, 1]) + jnp.sum(wins[1, :, 0])
    return {**terms, "accuracy": (cross_wins.astype(losses.dtype), 2 * count)}


def relation_identification(
    text: jax.Array,
    image: jax.Array,
    anchor: jax.Array,
    positive: jax.Array,
    *,
    pair_valid: jax.Array,
    linked: jax.Array,
    valid: jax.Array,
    intra: jax.Array,
    temperature: float | jax.Array = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Contrast a pair's similarity under its own relation with that under the others.

    L = mean over inter-sample pairs (i, j, e) and over the four modality combinations (x, y) of
    −log [exp(z_x^i(e)·z_y^j(e)/τ) / Σ_{e' ∈ {e} ∪ U(i, j)} exp(z_x^i(e')·z_y^j(e')/τ)], where
    U(i, j) are the batch's relations under which i and j are not linked. Not in the paper: Eq. 2
    compares candidates under one relation and leaves the levels of different relations free, so
    that a pair's similarities under two relations cannot be compared.

    text, image, anchor, positive, pair_valid, valid, intra: as in `relation_contrastive`.
    linked: (R, G, R) bool, whether the pair is linked under each relation of the batch.

    Returns the loss and {"relation_accuracy"}: the share of rows whose own relation is strictly
    above all the others. Without inter-sample pairs both are 0.

    Where the number of devices divides d, each sums over its part of the d features, for all pairs.
    """
    text, image = as_float(text), as_float(image)
    linked, intra = jnp.asarray(linked, bool), jnp.asarray(intra, bool)
    live = _live(anchor, positive, pair_valid, valid) & ~intra[:, None]

    def similarities(embeddings):
        items = split_over_devices(jnp.stack(embeddings), 2)
        return jnp.einsum("xrgd,yrgd->xyrg", items[:, anchor], items[:, positive])

    # (x, y, R, G, R'): every pair under every relation of the batch.
    logits = jnp.moveaxis(jax.lax.map(similarities, (text, image)), 0, -1)
    logits = logits / jnp.asarray(temperature, text.dtype)
    own = jnp.eye(len(text), dtype=bool)[:, None]
    other = ~linked & ~own
    own, other, live = own[None, None], other[None, None], live[None, None]
    masked = lowest(logits.dtype)
    target = jnp.sum(jnp.where(own, logits, 0), axis=-1)
    kept = jnp.where(other | own, logits, masked)
    losses = jnp.where(live, jax.nn.logsumexp(kept, axis=-1) - target, 0)
    wins = live & (target > jnp.max(jnp.where(other, logits, masked), axis=-1))
    count = jnp.maximum(4 * jnp.sum(live, dtype=losses.dtype), 1)
    accuracy = jnp.sum(wins, dtype=losses.dtype) / count
    return jnp.sum(losses) / count, {"relation_accuracy": accuracy}


def _terms_by_relation(states, pairs, terms, *, chunk_size, pair_chunk_size, remat):
    """`terms` (R,) of every relation, computed in chunks of relations and of pairs.

    states: text and image (R, N, d), related (N, N) or (R, N, N). pairs: anchor, positive and
    pair_valid, (R, G). terms: `relation_terms` with its other options.
    """
    related = states["related"]
    if related.ndim == 2:  # The same under every relation.
        states = {"text": states["text"], "image": states["image"]}
    again = functools.partial(jax.checkpoint, prevent_cse=False) if remat else lambda f: f

    @again
    def of_pairs(text, image, related, anchor, positive, pair_valid):
        return terms(text, image, anchor, positive, pair_valid=pair_valid, related=related)

    def of_relation(relation):
        own, pairs = relation
        given = own["text"], own["image"], own.get("related", related)
        if pair_chunk_size is None:
            return of_pairs(*given, *pairs)
        parts = jax.lax.map(lambda part: of_pairs(*given, *part), _split(pairs, pair_chunk_size))
        return jax.tree.map(jnp.sum, parts)

    return jax.lax.map(of_relation, (states, pairs), batch_size=chunk_size)


def _split(pairs, size):
    """Arrays (G,) → (chunks, at most size); padded with zeros, which are no valid pair."""
    if size < 1:
        raise ValueError(
            f"pair_chunk_size={size} must be at least 1, or None for all pairs at once"
        )
    count = pairs[0].shape[0]
    chunks = -(-count // size)
    padding = chunks * -(-count // chunks) - count
    return [jnp.pad(x, (0, padding)).reshape(chunks, -1) for x in pairs]


def _live(anchor, positive, pair_valid, valid):
    """Which pairs count: they are no padding, and neither of their items is."""
    pair_valid, valid = jnp.asarray(pair_valid, bool), jnp.asarray(valid, bool)
    return pair_valid & valid[anchor] & valid[positive]


def _mean(sums, counts, *, where=None):
    """The mean over all relations, or 0 if nothing was counted."""
    return jnp.sum(sums, where=where) / jnp.maximum(jnp.sum(counts, where=where), 1)
