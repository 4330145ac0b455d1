"""Random second views of images and texts, drawn inside a compiled step (jax alone).

All arithmetic is on integers, so that a view is the same to the bit on any number of devices.
Draws have the rows on their leading axis, as `training.gradcache.row_keys` needs it.
"""

import jax
import jax.numpy as jnp

_SMALLEST_CROP = 3, 4  # of a side, as a fraction
_GAIN = 205, 307  # brightness in 256ths


def image_view(images: jax.Array, key: jax.Array, *, flip: bool = False) -> jax.Array:
    """A random crop of each image, enlarged to its size, brighter or darker by up to a fifth.

    images: (..., H, W, 3) uint8. The crop has 3/4 to all of each side; pixels are repeated, not
    interpolated. flip: mirror half of the images left to right.
    """
    *rows, height, width, _ = images.shape
    draws = jax.random.uniform(key, (*rows, 5), jnp.float32).reshape(-1, 5).T
    pixels = images.reshape(-1, height, width, 3)
    least = -(-height * _SMALLEST_CROP[0] // _SMALLEST_CROP[1])
    tall = least + _below(draws[0], height - least + 1)
    wide = tall * width // height
    top, left = _below(draws[1], height - tall + 1), _below(draws[2], width - wide + 1)
    row = top[:, None] + _range(height) * tall[:, None] // height
    column = left[:, None] + _range(width) * wide[:, None] // width
    if flip:
        column = jnp.where(draws[3][:, None] < 0.5, column[:, ::-1], column)
    pixels = jnp.take_along_axis(pixels, row[:, :, None, None], axis=1)
    pixels = jnp.take_along_axis(pixels, column[:, None, :, None], axis=2)
    gain = _GAIN[0] + _below(draws[4], _GAIN[1] - _GAIN[0] + 1)
    brighter = (pixels.astype(jnp.int32) * gain[:, None, None, None] + 128) >> 8
    return brighter.clip(max=255).astype(jnp.uint8).reshape(images.shape)


def drop_tokens(
    ids: jax.Array,
    ends: jax.Array,
    body: jax.Array,
    key: jax.Array,
    *,
    rate: float = 0.1,
    pad_id: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Texts without some of their tokens, and where each now ends.

    ids: (n, T). ends: (n, k), the position of the last token of each text in a row. body: (n, T)
    bool, the tokens that may be dropped, each with the probability `rate`. The tokens that remain
    move up, and the rest of the row is `pad_id`.
    """
    inside = _range(ids.shape[1]) <= ends[:, -1:]
    kept = inside & ~(body & (jax.random.uniform(key, ids.shape, jnp.float32) < rate))
    order = jnp.argsort(~kept, axis=1, stable=True)
    count = jnp.cumsum(kept, axis=1, dtype=jnp.int32)
    ids = jnp.take_along_axis(ids, order, axis=1)
    ids = jnp.where(_range(ids.shape[1]) < count[:, -1:], ids, pad_id)
    return ids, jnp.take_along_axis(count, ends, axis=1) - 1


def drop_states(
    states: jax.Array,
    mask: jax.Array,
    pooled_index: jax.Array,
    key: jax.Array,
    *,
    rate: float = 0.25,
) -> tuple[jax.Array, jax.Array]:
    """States and mask without some of the tokens, for towers whose inputs are not at hand.

    states: (n, T, d); mask: (n, T) bool; pooled_index: (n,), the pooled state, which is the mean of
    the other tokens. Each of those is masked with the probability `rate`, and the pooled state
    becomes the mean of the ones that remain.
    """
    pooled = _range(mask.shape[1]) == pooled_index[:, None]
    kept = mask & ~pooled & (jax.random.uniform(key, mask.shape, jnp.float32) >= rate)
    # An input that loses all of its tokens keeps its pooled state.
    weights = jnp.where(kept.any(axis=1, keepdims=True), kept, pooled).astype(jnp.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    found = jnp.einsum("nt,ntd->nd", weights, states.astype(jnp.float32))
    states = jnp.where(pooled[..., None], found[:, None].astype(states.dtype), states)
    return states, kept | pooled


def mask_tokens(
    ids: jax.Array, body: jax.Array, key: jax.Array, *, mask_id: int, percent: int = 15
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Texts with tokens replaced by `mask_id`: (ids, positions, labels, chosen).

    ids: (n, T). body: (n, T) bool, the tokens that may be masked. `percent` of those of each row
    are masked, rounded up. positions, labels and chosen are (n, k), k that share of T: where a
    masked token is, what it was, and whether it counts, because rows have different numbers.
    """
    most = -(-ids.shape[1] * percent // 100)
    scores = jnp.where(body, jax.random.uniform(key, ids.shape, jnp.float32), -1.0)
    _, positions = jax.lax.top_k(scores, most)
    count = -(-jnp.sum(body, axis=1, keepdims=True, dtype=jnp.int32) * percent // 100)
    chosen = _range(most) < count
    labels = jnp.take_along_axis(ids, positions, axis=1)
    rows = jnp.arange(len(ids))[:, None]
    masked = jnp.asarray(ids).at[rows, positions].set(jnp.where(chosen, mask_id, labels))
    return masked, positions, labels, chosen


def _below(draw: jax.Array, count: jax.Array | int) -> jax.Array:
    """Uniform draws from [0, 1) → integers from 0 to count − 1."""
    scaled = draw * jnp.asarray(count, draw.dtype)
    return jnp.minimum(jnp.floor(scaled).astype(jnp.int32), count - 1)


def _range(count: int) -> jax.Array:
    """0, 1, ... as a row (1, count) int32."""
    return jnp.arange(count, dtype=jnp.int32)[None]
