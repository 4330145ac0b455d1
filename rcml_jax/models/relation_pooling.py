"""The relation-guided pooling head of RCML (Eq. 4–6)."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.ops.similarity import l2_normalize


def _identity(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    del key
    return jnp.eye(*shape, dtype=dtype)


class FoldedRelation(NamedTuple):
    """Everything that R relations do to token states, whichever these are (`RelationPooling.fold`).

    query: (R, d), what a state is multiplied with for its logit; pooled_logit: (R,), added to the
    logit of the pooled state; matrix: (R, d, d), applied to the weighted sum of states.
    """

    query: jax.Array
    pooled_logit: jax.Array
    matrix: jax.Array


class RelationPooling(nn.Module):
    """Pool token states under relations: z = norm(a · H W_Vᵀ · W_o) (Eq. 4–6).

    a = softmax((1 − β) · (W_Q h_E)·(W_K H)/√d + β · pooled_logit · B + pooled_prior · S), where S
    is 1 at the pooled state and B = S under an intra-sample relation, 0 under any other. The four
    d×d matrices have no bias and serve both modalities.

    In the paper's Eq. 5 the pooled state is one of CLIP's tokens, EOT or CLS. Of a tower whose
    pooled state is no token (SigLIP's attention pooling, the mean of BERT) H is its tokens and that
    state: the relation then weighs the tower's own embedding against each token, as it does CLIP's.

    β = 1 with a large `pooled_logit` (1e4) selects the pooled state: the tower's own embedding.
    `pooled_prior` is no part of the paper: with it the pooled state leads under every relation,
    so that a pretrained tower starts from the embedding it was trained for. 0 is the paper's form.
    With `gate`, also no part of the paper, the pooled vector is scaled under each relation:
    z = norm((a · H W_Vᵀ) ∘ (1 + √d · W_G h_E/‖h_E‖) · W_o), where W_G starts at 0. Attention alone
    picks tokens; the gate also picks what of them counts, so that one state serves several
    respects.
    `head_init` is "identity" (W_V and W_o the identity, W_Q and W_K small and random) or "plain"
    (all four Xavier uniform).
    """

    dim: int
    beta: float = 0.6
    pooled_logit: float = 1.0
    pooled_prior: float = 0.0
    learn_pooled_prior: bool = False
    gate: bool = False
    head_init: str = "identity"
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Create W_Q, W_K, W_V, W_o and, where they are asked for, W_G and the prior."""
        if self.head_init not in ("identity", "plain"):
            raise ValueError(f"head_init is {self.head_init!r}; it must be 'identity' or 'plain'")
        plain = nn.initializers.xavier_uniform()
        attend = nn.initializers.normal(0.02) if self.head_init == "identity" else plain
        carry = _identity if self.head_init == "identity" else plain
        shape = (self.dim, self.dim)
        self.query = self.param("query", attend, shape, jnp.float32)
        self.key = self.param("key", attend, shape, jnp.float32)
        self.value = self.param("value", carry, shape, jnp.float32)
        self.output = self.param("output", carry, shape, jnp.float32)
        if self.gate:
            self.scale = self.param("gate", nn.initializers.zeros, shape, jnp.float32)
        if self.learn_pooled_prior:
            prior = jnp.float32(self.pooled_prior)
            self.prior: jax.Array | float = self.param("pooled_prior", lambda _: prior)
        else:
            self.prior = self.pooled_prior

    def attention(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """Attention weights (n, R, T) of n items under R relations (Eq. 5–6).

        relation: (R, d) embeddings h_E; intra: (R,) bool, true for the intra-sample relation.
        Padding gets no weight. Of rows of k packed texts the weights are (n, k, R, T), each text's
        on its own tokens.
        """
        # (W_Q h)·(W_K H) = (W_Kᵀ W_Q h)·H: no key is ever formed, however many tokens there are.
        query = relation.astype(self.dtype) @ self.query.T.astype(self.dtype)
        query = query @ self.key.astype(self.dtype)
        scores = jnp.einsum("ntd,rd->nrt", tokens.states, query).astype(jnp.float32)
        if tokens.mask.ndim > 2:
            scores = scores[:, None]  # The same tokens for every text of a row.
        index = tokens.pooled_index[..., None, None]
        positions = jnp.arange(tokens.states.shape[1], dtype=index.dtype)
        pooled = jnp.expand_dims(positions, range(index.ndim - 1)) == index
        intra = jnp.expand_dims(intra[:, None], range(index.ndim - 2))
        logits = (1.0 - self.beta) * scores / math.sqrt(self.dim)
        logits += jnp.where(pooled & intra, self.beta * self.pooled_logit, 0.0)
        logits += jnp.where(pooled, self.prior, 0.0)
        return nn.softmax(logits, axis=-1, where=tokens.mask[..., None, :])

    def __call__(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """L2-normalised float32 embeddings (n, R, d) of n items under each of R relations.

        Those of rows of k packed texts are (n, k, R, d).
        """
        weights = self.attention(tokens, relation, intra).astype(self.dtype)
        pooled = jnp.einsum("n...rt,ntd->n...rd", weights, tokens.states)
        # The values are linear in the tokens, so W_V and W_o act once a relation, after pooling.
        pooled = pooled @ self.value.T.astype(self.dtype)
        if self.gate:
            change = l2_normalize(relation).astype(self.dtype) @ self.scale.T.astype(self.dtype)
            change = jnp.expand_dims(change, range(pooled.ndim - 2))
            pooled *= 1.0 + math.sqrt(self.dim) * change
        return l2_normalize(pooled @ self.output.astype(self.dtype))

    def fold(self, relation: jax.Array, intra: jax.Array) -> FoldedRelation:
        """Fold the head and relations (R, d) into a vector, a number and a matrix each, in float32.

        Pooling an item under a relation is linear in its states but for softmax and length:
        a = softmax(H · query + pooled_logit · S), z = norm(a · H · matrix). A sentence that comes
        after the states of a catalogue were computed thus costs one pass over them.
        """
        query = relation.astype(jnp.float32) @ self.query.T @ self.key
        logit = jnp.where(intra, self.beta * self.pooled_logit, 0.0) + self.prior
        value = jnp.broadcast_to(self.value.T, (len(relation), self.dim, self.dim))
        if self.gate:
            change = l2_normalize(relation) @ self.scale.T
            value = value * (1.0 + math.sqrt(self.dim) * change[:, None, :])
        scale = (1.0 - self.beta) / math.sqrt(self.dim)
        return FoldedRelation(query * scale, logit, value @ self.output)
