"""The transformer of every tower: attention, layers, packed texts, rematerialisation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from jax import lax

from rcml_jax.data.packing import PackedTexts
from rcml_jax.errors import UserError

_MASKED = -1e9  # Added to a logit: its exponential is 0, and a row without a key is no NaN.


class TokenStates(NamedTuple):
    """What a tower returns: token states of n inputs in one space.

    states: (n, T, d); mask: (n, T) bool, false on padding; pooled_index: (n,) int32, the position
    in `states` of the pooled state. Of n rows of k packed texts mask is (n, k, T), the tokens of
    each text, and pooled_index (n, k).

    The pooled state is the tower's own embedding of the input: CLIP's EOT, the CLS of CLIP and ViT,
    the mean of BERT, RoBERTa and EfficientNet, the attention-pooled state of SigLIP. Where it is no
    token of the tower it is an additional state before the tokens.
    """

    states: jax.Array
    mask: jax.Array
    pooled_index: jax.Array

    @property
    def pooled(self) -> jax.Array:
        """The pooled states, (n, d) or (n, k, d), not normalised."""
        index = self.pooled_index.reshape(len(self.states), -1, 1)
        found = jnp.take_along_axis(self.states, index, axis=1)
        return found.reshape(*self.pooled_index.shape, -1)


def with_pooled(states: jax.Array, mask: jax.Array, pooled: jax.Array | None = None) -> TokenStates:
    """Tokens (n, T, d) and mask (n, T) with a pooled state before them, by default their mean."""
    if pooled is None:
        pooled = jnp.mean(states, axis=1, where=mask[..., None])
    return TokenStates(
        jnp.concatenate([pooled[:, None], states], axis=1),
        jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True),
        jnp.zeros(len(states), jnp.int32),
    )


# Activations


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x), CLIP's approximation of GELU.

    Written with tanh, which on CPUs takes 0.8 to 1.0 times the time of a sigmoid. `0.5 * x` first
    would cost a second array of the MLP's width there.
    """
    return x * (0.5 + 0.5 * jnp.tanh(0.851 * x))


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation by the name that Hugging Face's configurations use.

    Raises UserError for an unknown name.
    """
    if name not in _ACTIVATIONS:
        raise UserError(
            f"the activation {name!r} is unknown; a tower's hidden_act is one of "
            f"{', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]


# Attention


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(q·k/√d)·v of (n, T, heads, d) arrays → (n, T, heads, d).

    mask: bool, broadcasts to (n, heads, T, T), false where a key is not seen; causal: no query sees
    a later key; dropout: applied to the weights. Half-precision arrays on an NVIDIA GPU take
    cuDNN's fused kernel, unless weights are dropped.
    """
    plain = functools.partial(_plain_attention, causal=causal, dropout=dropout)
    if dropout is not None or not _fused(query, mask):
        return plain(query, key, value, mask)
    fused = functools.partial(_fused_attention, causal=causal)
    return lax.platform_dependent(query, key, value, mask, cuda=fused, default=plain)


def _fused(query: jax.Array, mask: jax.Array | None) -> bool:
    """Whether cuDNN has a kernel for such arrays; it needs a GPU to be asked at all."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and query.shape[-1] % 8 == 0 and jax.default_backend() == "gpu"


def _fused_attention(query, key, value, mask, *, causal):
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation="cudnn"
    )


def _plain_attention(query, key, value, mask, *, causal, dropout=None):
    # On CPUs faster than jax.nn.dot_product_attention, and than products with the heads third.
    query, key, value = (
        jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value)
    )
    logits = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32)
    if causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        mask = seen[None, None] if mask is None else mask & seen[None, None]
    if mask is not None:
        logits += jnp.where(mask, 0.0, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.swapaxes(weights @ value, 1, 2)


# Packed texts


def segment_ids(texts: PackedTexts) -> jax.Array:
    """The number of the text that each token of a row belongs to, (n, L) int32; k for padding."""
    index = jnp.arange(texts.ids.shape[1], dtype=jnp.int32)
    return jnp.sum(index[None, None] > texts.ends[..., None], axis=1, dtype=jnp.int32)


def packed_positions(texts: PackedTexts, segments: jax.Array) -> jax.Array:
    """The position of each token in its own text, (n, L) int32; 0 for padding."""
    first = jnp.pad(texts.ends + 1, ((0, 0), (1, 0)))
    index = jnp.arange(texts.ids.shape[1], dtype=jnp.int32)[None]
    index = index - jnp.take_along_axis(first, segments, axis=1)
    return jnp.where(segments < texts.ends.shape[1], index, 0)


def segment_mask(segments: jax.Array) -> jax.Array:
    """(n, L) → (n, 1, L, L) bool: whether two tokens belong to one text."""
    return segments[:, None, :, None] == segments[:, None, None, :]


# Layers


class LayerNames(NamedTuple):
    """Where the parameters of a layer lie under it, in the tree of one family of checkpoints."""

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    out: tuple[str, ...]
    attention_norm: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]
    mlp_norm: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What all layers of a transformer have in common.

    width: of the states; hidden: of the MLP; dropout: of what attention and MLP add;
    attention_dropout: of the attention weights; init: of matrices; qkv_bias: whether queries, keys
    and values have a bias. Raises UserError where the heads do not divide the width.
    """

    width: int
    hidden: int
    heads: int
    activation: str
    epsilon: float
    names: LayerNames
    init: Callable
    pre_norm: bool = True
    causal: bool = False
    qkv_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        activation(self.activation)
        if self.width % self.heads:
            raise UserError(
                f"a tower's width of {self.width} is not a multiple of its {self.heads} heads; "
                "use a configuration in which it is"
            )


class Layer(nn.Module):
    """Self-attention and an MLP with residuals: (n, T, width) → (n, T, width).

    Pre-norm: x + A(norm(x)), then x + M(norm(x)); post-norm: norm(x + A(x)), then norm(x + M(x)).
    """

    config: LayerConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """mask: as of `attention`; dropout draws from the random stream "dropout"."""
        config = self.config
        names = config.names
        norm = functools.partial(nn.LayerNorm, epsilon=config.epsilon, dtype=config.dtype)
        dense = functools.partial(nn.Dense, dtype=config.dtype, kernel_init=config.init)
        at = functools.partial(_scope, self.scope)
        drop = lambda x: nn.Dropout(config.dropout)(x, deterministic=deterministic)  # noqa: E731
        drop_weights = None
        if config.attention_dropout and not deterministic:
            drop_weights = lambda x: nn.Dropout(config.attention_dropout)(  # noqa: E731
                x, deterministic=False
            )

        def attend(x: jax.Array) -> jax.Array:
            heads = (*x.shape[:2], config.heads, config.width // config.heads)
            query, key, value = (
                dense(config.width, use_bias=config.qkv_bias, parent=at(path))(x).reshape(heads)
                for path in (names.query, names.key, names.value)
            )
            found = attention(
                query, key, value, mask=mask, causal=config.causal, dropout=drop_weights
            )
            return drop(dense(config.width, parent=at(names.out))(found.reshape(x.shape)))

        def transform(x: jax.Array) -> jax.Array:
            hidden = activation(config.activation)(dense(config.hidden, parent=at(names.up))(x))
            return drop(dense(config.width, parent=at(names.down))(hidden))

        attention_norm = norm(parent=at(names.attention_norm))
        mlp_norm = norm(parent=at(names.mlp_norm))
        if config.pre_norm:
            x = x + attend(attention_norm(x))
            return x + transform(mlp_norm(x))
        x = attention_norm(x + attend(x))
        return mlp_norm(x + transform(x))


# Any: a module's `parent` may be a scope, which Flax's annotation of it leaves out.
def _scope(scope: Any, path: tuple[str, ...]) -> Any:
    """The scope at a path below another one, so that a module can lie deeper than its caller."""
    for name in path:
        scope = scope.push(name, reuse=True)
    return scope


class Encoder(nn.Module):
    """Layers one after another: (n, T, width) → (n, T, width).

    collection: the name under which the layers lie, each under its number. remat: "layers" keeps a
    layer's inputs alone, and the backward pass computes the layer again; "dots" keeps its products
    with weights, too; "" keeps everything. Values, gradients and dropout are the same, to rounding.
    """

    config: LayerConfig
    layers: int
    collection: str = "layers"
    remat: str = ""

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """mask: as of `attention`."""
        check_remat(self.remat)
        for number in range(self.layers):
            scope = _scope(self.scope, (self.collection, str(number)))
            layer = Layer(self.config, parent=scope)
            if self.remat and not self.is_initializing():
                x = _rematerialized(layer, _POLICIES[self.remat], deterministic)(x, mask)
            else:
                x = layer(x, mask, deterministic)
        return x


# Rematerialisation

_POLICIES = {
    "layers": jax.checkpoint_policies.nothing_saveable,
    # The products with weights, not those of attention, which grow with the square of the length.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_remat(remat: str) -> str:
    """The name of a policy as it is. Raises UserError for an unknown one."""
    if remat and remat not in _POLICIES:
        raise UserError(
            f"config.model.remat={remat!r} is unknown; choose {' or '.join(_POLICIES)}, or leave "
            "it empty to compute nothing again"
        )
    return remat


def _rematerialized(layer: Layer, policy: Callable[..., Any], deterministic: bool) -> Callable:
    """The call of a bound layer whose backward pass computes again what the policy drops."""
    scope: Any = layer.scope

    def pure(variables: dict, rngs: dict, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        inner: Any = Scope(variables, rngs, path=scope.path, flags=scope.flags)
        return Layer(layer.config, parent=inner)(x, mask, deterministic)

    call = _checkpoint(pure, policy)
    return lambda x, mask: call(layer.variables, scope.rngs, x, mask)


def _checkpoint(function: Callable, policy: Callable[..., Any]) -> Callable:
    """`jax.checkpoint` that also saves memory on CPUs.

    There the compiler drops the barriers of `jax.checkpoint`, finds that it has computed the same
    before, and keeps that. So what was kept on purpose is made to depend on the cotangent.
    """
    kept = jax.checkpoint(function, policy=policy)
    run = jax.custom_vjp(kept)
    run.defvjp(
        lambda *args: jax.vjp(kept, *args),
        lambda pullback, cotangent: lax.platform_dependent(
            pullback, cotangent, cpu=_tied, default=lambda pullback, _: pullback
        )(cotangent),
    )
    return run


def _tied(kept: Any, cotangent: Any) -> Any:
    """Arrays as they are, plus a zero that the compiler cannot see to be one."""
    first = next(x for x in jax.tree.leaves(cotangent) if jnp.issubdtype(x.dtype, jnp.floating))
    zero = 0 * first[(0,) * first.ndim]

    def tie(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                tie(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        if x.dtype == bool:
            return x
        return x + zero.astype(x.dtype)

    return jax.tree.map(tie, kept)
