"""RCML: two towers under the relation-guided pooling head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from rcml_jax.data.packing import PackedTexts
from rcml_jax.models.relation_pooling import FoldedRelation, RelationPooling
from rcml_jax.models.towers.clip import text_ends
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.models.two_towers import build_towers, joint_width, takes_packed
from rcml_jax.ops.similarity import l2_normalize
from rcml_jax.ops.split import device_count, own_rows, rows_beside, shared_rows


class RCML(nn.Module):
    """Embeds texts and images under relations written in plain language (Eq. 3–6).

    config: a `CLIPConfig` or `SiglipConfig` of transformers, or a `PairConfig` of two other towers;
    pooling: options of `RelationPooling`; remat and implementation: as of `build_towers`;
    axis_name: where texts are given under `pmap`, the axis of devices, which then share the
    encoding of the sentences. On ViT-B/32 the model has 152,325,889 parameters: CLIP's and four
    512×512 matrices.
    """

    config: Any
    pooling: FrozenDict = FrozenDict()
    dtype: DTypeLike = jnp.float32
    remat: str = ""
    implementation: str = ""
    axis_name: str = ""

    def setup(self):
        """Create the towers and the head."""
        self.towers = build_towers(self.config, self.dtype, self.remat, self.implementation)
        self.head = RelationPooling(dim=joint_width(self.config), dtype=self.dtype, **self.pooling)

    def relation(self, ids: jax.Array) -> jax.Array:
        """Relation sentences (R, T) → h_E (R, d): the text tower's pooled states (CLIP's EOT)."""
        return self.towers.text_states(ids).pooled

    def pool_text(
        self, ids: jax.Array | PackedTexts, relation: jax.Array, intra: jax.Array
    ) -> jax.Array:
        """Texts (n, T) under relation embeddings (R, d) → z_T (n, R, d); packed: (n, k, R, d)."""
        return self.head(self.towers.text_states(ids), relation, intra)

    def pool_image(self, pixels: jax.Array, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """Images (n, H, W, 3) under relation embeddings (R, d) → z_I (n, R, d)."""
        return self.head(self.towers.image_states(pixels), relation, intra)

    def _relation_and_texts(self, sentences: jax.Array, texts: Any) -> tuple[jax.Array, Any]:
        """As `relation` of sentences (R, T), and as `text_states` of texts, None of no texts.

        Each of the devices that a program is split over would encode all sentences, and the tower's
        gradients of both passes would be there at once. So sentences are rows beside those of
        CLIP's texts where they fit and a device's share has no more tokens than all have.
        """
        if texts is None:
            return self.relation(sentences), None
        devices = self._shares(sentences, texts)
        if devices == 1:
            return self.relation(sentences), self.towers.text_states(texts)
        packed = isinstance(texts, PackedTexts)
        ids = texts.ids if packed else texts
        room = ids.shape[1] - sentences.shape[1]
        over: dict[str, Any] = {"devices": devices, "axis_name": self.axis_name}
        joined: Any = rows_beside(ids, jnp.pad(sentences, ((0, 0), (0, room))), **over)
        if packed:
            # A sentence is the first text of its row; none is between equal ends.
            ends: Any = text_ends(self.config.text_config, sentences)[:, None]
            ends = rows_beside(texts.ends, jnp.repeat(ends, texts.ends.shape[1], axis=1), **over)
            joined = PackedTexts(joined, ends)
        states = self.towers.text_states(joined)
        alone = shared_rows(states.pooled, len(ids), len(sentences), **over)
        found = TokenStates(*[own_rows(x, len(ids), **over) for x in states])
        return alone[:, 0] if packed else alone, found

    def _shares(self, sentences: jax.Array, texts: Any) -> int:
        """The number of devices whose rows of texts sentences should stand beside, 1 for none."""
        if self.is_initializing() or isinstance(texts, TokenStates):
            return 1
        if not takes_packed(self.config):
            return 1  # What follows the end of a text changes nothing in CLIP's tower alone.
        ids = texts.ids if isinstance(texts, PackedTexts) else texts
        count, length = sentences.shape
        if self.axis_name:
            devices, even = jax.lax.axis_size(self.axis_name), True
        else:
            devices = device_count(ids)
            even = len(ids) % devices == 0 and device_count(sentences) == devices
        # A share has rows as long as the texts', which may be more tokens than all sentences have.
        fewer = -(-count // devices) * ids.shape[1] <= count * length
        return devices if even and fewer and length <= ids.shape[1] else 1

    def text_states(self, ids: jax.Array) -> TokenStates:
        """Texts (n, T) → the states of their tokens, which `pool` takes."""
        return self.towers.text_states(ids)

    def image_states(self, pixels: jax.Array) -> TokenStates:
        """Images (n, H, W, 3) → the states of their tokens, which `pool` takes."""
        return self.towers.image_states(pixels)

    def pool(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """Token states of n items under relation embeddings (R, d) → z (n, R, d)."""
        return self.head(tokens, relation, intra)

    def attention(self, tokens: TokenStates, relation: jax.Array, intra: jax.Array) -> jax.Array:
        """The weights (n, R, T) of `pool`."""
        return self.head.attention(tokens, relation, intra)

    def fold(self, relation: jax.Array, intra: jax.Array) -> FoldedRelation:
        """The head under relation embeddings (R, d), as `RelationPooling.fold` gives it."""
        return self.head.fold(relation, intra)

    def __call__(
        self,
        relation_ids: jax.Array,
        ids: jax.Array | PackedTexts | None = None,
        pixels: jax.Array | None = None,
        intra: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> dict:
        """Embed texts, images or both under R relations.

        relation_ids: (R, T) tokens of the sentences; intra: (R,) bool, all false if left out;
        noise: (R, d), added to each h_E in multiples of its length, no part of the paper.
        Returns `relation` (R, d), normalised, and `text` and `image`, (n, R, d) each, for the
        inputs that are given; those of texts in n rows of k are (n, k, R, d).
        """
        if intra is None:
            intra = jnp.zeros(relation_ids.shape[0], bool)
        relation, tokens = self._relation_and_texts(relation_ids, ids)
        if noise is not None:
            length = jnp.linalg.norm(relation, axis=-1, keepdims=True)
            relation += noise.astype(relation.dtype) * length
        out = {"relation": l2_normalize(relation)}
        if tokens is not None:
            out["text"] = self.head(tokens, relation, intra)
        if pixels is not None:
            out["image"] = self.pool_image(pixels, relation, intra)
        return out
