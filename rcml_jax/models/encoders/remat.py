"""Rematerialisation: the backward pass computes parts of a layer again instead of keeping them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from jax import lax
from transformers.models.bert.modeling_flax_bert import FlaxBertLayer
from transformers.models.clip.modeling_flax_clip import FlaxCLIPEncoderLayer
from transformers.models.roberta.modeling_flax_roberta import FlaxRobertaLayer
from transformers.models.vit.modeling_flax_vit import FlaxViTLayer

from rcml_jax.errors import UserError

_LAYERS = (FlaxBertLayer, FlaxCLIPEncoderLayer, FlaxRobertaLayer, FlaxViTLayer)
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


@contextlib.contextmanager
def recomputed(remat: str) -> Iterator[None]:
    """While entered, not all that CLIP's, ViT's, BERT's and RoBERTa's layers compute is kept.

    remat: "layers" keeps a layer's inputs alone, and the backward pass computes the layer again;
    "dots" keeps its products with weights, too; "" keeps everything. Values, gradients, dropout and
    parameters are those without it, to rounding. Raises UserError for another name.
    """
    if not check_remat(remat):
        yield
        return
    with nn.intercept_methods(_Recompute(_POLICIES[remat])):
        yield


class _Recompute:
    """An interceptor of method calls that checkpoints each layer by itself.

    One checkpoint around a tower would not do: its backward pass would hold all layers at once. Of
    Hugging Face's classes only BERT's and RoBERTa's have a switch, and none a policy.
    """

    def __init__(self, policy: Callable[..., Any]):
        self._policy, self._inside = policy, False

    def __call__(self, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        other = not isinstance(module, _LAYERS) or context.method_name != "__call__"
        if other or self._inside or module.is_initializing():
            return call(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [x if isinstance(x, jax.Array) else None for x in leaves]

        def layer(variables: dict, rngs: dict, arrays: list) -> Any:
            """The layer as a pure function, under its own path, from which dropout is drawn."""
            outer = module.scope
            scope = Scope(variables, rngs, path=outer.path, flags=outer.flags)
            given = [x if a is None else a for x, a in zip(leaves, arrays, strict=True)]
            args, kwargs = jax.tree.unflatten(tree, given)
            self._inside = True
            try:
                return module.clone(parent=scope)(*args, **kwargs)
            finally:
                self._inside = False

        return _checkpoint(layer, self._policy)(module.variables, module.scope.rngs, arrays)


def _checkpoint(function: Callable, policy: Callable[..., Any]) -> Callable:
    """`jax.checkpoint` that holds on CPUs, too.

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
