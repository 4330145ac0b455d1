"""Reading configurations: the argument of a file, and names that stand for other things."""

from collections.abc import Sequence

import jax.numpy as jnp

from rcml_jax.errors import UserError


def parse_argument(
    arg: str, *, sources: Sequence[str], options: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """ "source,name=value,..." → the source and its options; an empty source is the first one.

    Raises UserError for an unknown source or option.
    """
    first, *rest = arg.split(",") if arg else [""]
    if "=" in first:
        first, rest = "", [first, *rest]
    source = first or sources[0]
    if source not in sources:
        raise UserError(
            f"the configuration knows no data source {source!r}; choose one of {', '.join(sources)}"
        )
    found = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if name not in options or not equals or not value:
            raise UserError(
                f"the configuration knows no option {part!r}; write name=value with one of "
                f"{', '.join(options)}"
            )
        found[name] = value
    return source, found


def compute_dtype(name: str) -> jnp.dtype:
    """The type that `config.model.dtype` names. Raises UserError for another than two."""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"config.model.dtype={name!r} is unknown; choose float32 or bfloat16")
    return jnp.dtype(name)
