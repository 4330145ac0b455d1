"""UniCL's loss: CLIP with all items of one label as positives (Yang et al., 2022)."""

import jax
import jax.numpy as jnp

from rcml_jax.losses.clip import chunked_clip, clip
from rcml_jax.losses.softmax import check_paired, prepare


def label_supervised(
    text: jax.Array,
    image: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
    normalize: bool = True,
    chunk_size: int | None = None,
) -> jax.Array:
    """UniCL: CLIP with every item of the same label as a positive (Yang et al., 2022, Eq. 2–4).

    text, image: (n, d). labels: (n,) integers; the target is spread evenly over the items of the
    row's label. A negative label is unknown: only the item itself is positive. where: as in `clip`.
    chunk_size: texts compared at a time, or None.
    Raises ValueError if text and image differ in shape.
    """
    labels = jnp.asarray(labels)
    everyone = jnp.arange(len(labels))

    def same_label(index, own):
        same = (own[:, None] == labels[None]) & (labels >= 0)[None]
        return same | (index[:, None] == everyone[None])

    if chunk_size is None:
        return clip(
            text,
            image,
            temperature=temperature,
            where=where,
            targets=same_label(everyone, labels),
            normalize=normalize,
        )
    check_paired(text, image)
    text, image = prepare(text, image, normalize)
    return chunked_clip(text, image, temperature, where, labels, chunk_size, same_label)
