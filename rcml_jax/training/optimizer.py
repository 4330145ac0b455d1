"""AdamW with warm-up and cosine decay, clipping and frozen parameters, from optax."""

from typing import Any

import jax
import optax

from rcml_jax.errors import UserError


def schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay to 0 at the last step."""
    if warmup_steps >= steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup_steps} leaves no step of config.steps={steps} "
            "for the decay; lower it"
        )
    if not learning_rate > 0:
        raise UserError(f"config.optimizer.learning_rate={learning_rate} must be above 0")
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)


def build(config: Any, steps: int, frozen: Any) -> tuple[optax.GradientTransformation, Any]:
    """The transformation and its schedule.

    config: learning_rate, warmup_steps, weight_decay, b1, b2 and clip_norm (0 for none); frozen: a
    tree of booleans like the parameters. Weight decay leaves vectors and scalars (biases, norms,
    temperatures) alone.
    """
    rate = schedule(config.learning_rate, config.warmup_steps, steps)
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    if config.clip_norm > 0:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    if not any(jax.tree.leaves(frozen)):
        return adamw, rate
    labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
    return optax.multi_transform({"trained": adamw, "frozen": optax.set_to_zero()}, labels), rate
