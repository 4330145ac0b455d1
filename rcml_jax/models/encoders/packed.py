"""CLIP's text tower on rows of several texts, each of which sees itself alone."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers.models.clip.modeling_flax_clip import FlaxCLIPAttention

from rcml_jax.data.packing import PackedTexts


def owners(texts: PackedTexts) -> jax.Array:
    """Which of a row's k texts each of its tokens is of, (n, L) int32; k for padding."""
    places = jnp.arange(texts.ids.shape[1])
    return jnp.sum(places > texts.ends[..., None], axis=1, dtype=jnp.int32)


def positions(texts: PackedTexts, owner: jax.Array) -> jax.Array:
    """The place of each token in its own text, (n, L) int32; 0 for padding."""
    first = jnp.pad(texts.ends + 1, ((0, 0), (1, 0)))
    places = jnp.arange(texts.ids.shape[1]) - jnp.take_along_axis(first, owner, axis=1)
    return jnp.where(owner < texts.ends.shape[1], places, 0)


@contextlib.contextmanager
def apart(owner: jax.Array) -> Iterator[None]:
    """While entered, CLIP's attention is causal within the tokens (n, L) of one owner.

    Hugging Face's module takes a mask of keys alone, and is causal over no more tokens than the
    tower has positions.
    """
    length = owner.shape[1]
    mask = owner[:, None, :, None] == owner[:, None, None, :]
    mask &= jnp.tril(jnp.ones((length, length), bool))

    def attend(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if not isinstance(module, FlaxCLIPAttention) or context.method_name != "__call__":
            return call(*args, **kwargs)
        return (_attention(module, *args[:1], mask=mask, **kwargs),)

    with nn.intercept_methods(attend):
        yield


def _attention(
    module: FlaxCLIPAttention, hidden_states: jax.Array, *, mask: jax.Array, **_: Any
) -> jax.Array:
    """What the module computes, (n, L, width), under another mask (n, 1, L, L)."""
    heads = (module.num_heads, module.head_dim)
    query, key, value = (
        project(hidden_states).reshape(*hidden_states.shape[:2], *heads)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    found = jax.nn.dot_product_attention(query, key, value, mask=mask)
    return module.out_proj(found.reshape(hidden_states.shape))
