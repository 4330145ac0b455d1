"""Adam and AdamW, schedules, clipping, rates of parts and frozen parameters, from optax."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ReduceLROnPlateauState, reduce_on_plateau

from rcml_jax.errors import UserError


def schedule(config: Any, steps: int) -> optax.Schedule:
    """`_schedule` of a step as a float32: optax divides the step, an int32, by Python floats."""
    found = _schedule(config, steps)
    return lambda step: found(jnp.asarray(step, jnp.float32))


def _schedule(config: Any, steps: int) -> optax.Schedule:
    """The learning rate at a step, as `config.optimizer` says.

    cosine: linear warm-up from 0 over `warmup_steps`, then decay to 0 at the last step. step: times
    `factor` after every `step_size` steps (StepLR). constant, and plateau, whose reductions follow
    the validation measure: see `observe`. Raises UserError where the warm-up takes all steps.
    """
    kind, rate = config.get("schedule", "cosine"), config.learning_rate
    if kind == "cosine":
        if config.warmup_steps >= steps:
            raise UserError(
                f"config.optimizer.warmup_steps={config.warmup_steps} leaves no step of "
                f"config.steps={steps} for the decay; lower it"
            )
        return optax.warmup_cosine_decay_schedule(0.0, rate, config.warmup_steps, steps)
    if kind == "step":
        return optax.exponential_decay(rate, config.step_size, config.factor, staircase=True)
    return optax.constant_schedule(rate)


def build(
    config: Any, steps: int, frozen: Any, decayed: Any, absent: Collection[str] = ()
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The transformation and its schedule.

    config: `config.optimizer`. name "adamw" decays the weights that `decayed`, a tree of booleans
    like the parameters, says; "adam" adds weight_decay times every parameter to its gradient, as
    PyTorch's Adam does. clip_norm: 0 for none. rates: part of the model (the beginning of a name at
    the top of the parameters) → its learning rate at the start, for those that differ. frozen: a
    tree of booleans, true where nothing is trained. absent: parts that may have a rate although the
    model is without them.
    """
    rate = schedule(config, steps)
    name = config.get("name", "adamw")
    moments = {"b1": config.b1, "b2": config.b2}
    parts = []
    if config.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if name == "adam":
        adam = optax.chain(_scale_by_adam(**moments), optax.scale_by_learning_rate(rate))
        parts += [optax.add_decayed_weights(config.weight_decay), adam]
    else:
        decay = optax.add_decayed_weights(config.weight_decay, decayed)
        scale = optax.scale_by_learning_rate(rate)
        parts.append(optax.chain(_scale_by_adam(**moments), decay, scale))
    rates = dict(config.get("rates", {}))
    if rates:
        _check_rates(rates, frozen, absent)
        parts.append(_scale_parts({k: v / config.learning_rate for k, v in rates.items()}))
    if config.get("schedule", "cosine") == "plateau":
        parts.append(_plateau(config))
    transform = optax.chain(*parts) if len(parts) > 1 else parts[0]
    if not any(jax.tree.leaves(frozen)):
        return transform, rate
    labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
    return optax.partition({"trained": transform, "frozen": optax.set_to_zero()}, labels), rate


def _scale_by_adam(**moments: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that counts in float32 while it computes, and keeps an int32.

    It raises b1 and b2 to the power of the count, which JAX's strict promotion refuses of an int32.
    """
    adam = optax.scale_by_adam(**moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        counted = state._replace(count=state.count.astype(jnp.float32))
        updates, after = adam.update(updates, counted, params)
        return updates, after._replace(count=after.count.astype(jnp.int32))

    return optax.GradientTransformation(adam.init, update)


def _check_rates(rates: dict[str, float], params: dict[str, Any], absent: Collection[str]) -> None:
    known = [*params, *absent]
    unknown = [name for name in rates if not any(part.startswith(name) for part in known)]
    if unknown:
        raise UserError(
            f"config.optimizer.rates.{unknown[0]} names no part of the model, which has "
            f"{', '.join(sorted(params))}; correct it"
        )


def _scale_parts(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiply the updates of the parts that begin with a name by its factor.

    Of several names the longest counts.
    """
    longest_first = sorted(factors, key=len, reverse=True)

    def one(path: Any, update: jax.Array) -> jax.Array:
        part = path[0].key
        return next((factors[n] * update for n in longest_first if part.startswith(n)), update)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))


def _reducer(config: Any) -> optax.GradientTransformationExtraArgs:
    # PyTorch reduces after `patience` bad epochs are exceeded, optax when they are reached.
    return reduce_on_plateau(factor=config.factor, patience=config.plateau_patience + 1, rtol=1e-4)


def _plateau(config: Any) -> optax.GradientTransformation:
    """Scale the updates by the reductions so far; they change in `observe` only."""

    def update(updates: Any, state: ReduceLROnPlateauState, params: Any = None) -> tuple:
        del params
        return jax.tree.map(lambda u: state.scale * u, updates), state

    return optax.GradientTransformation(_reducer(config).init, update)


def observe(config: Any, opt_state: Any, measure: float) -> Any:
    """The optimizer's state after a look at the validation measure, which is to grow.

    Under the plateau schedule the learning rate is multiplied by `factor` once `plateau_patience`
    looks in a row are exceeded without a better one (ReduceLROnPlateau of PyTorch, mode max); under
    any other the state stays as it is.
    """
    reducer: Any = _reducer(config) if config.get("schedule", "cosine") == "plateau" else None

    def one(state: Any) -> Any:
        if not _is_plateau(state):
            return state
        return reducer.update({}, state, value=jax.numpy.float32(1 - measure))[1]

    return jax.tree.map(one, opt_state, is_leaf=_is_plateau)


def reduction(opt_state: Any) -> float | jax.Array:
    """What the plateau schedule has multiplied the learning rate by; 1 under any other."""
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(x)]
    return states[0].scale if states else 1.0


def _is_plateau(state: Any) -> bool:
    return isinstance(state, ReduceLROnPlateauState)
