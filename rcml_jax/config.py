"""Reading configurations: the argument of a file, and names that stand for other things."""

from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp

from rcml_jax.errors import UserError
from rcml_jax.registry import is_path


def parse_argument(
    arg: str, *, sources: Collection[str], options: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """ "source,name=value,..." → the source and its options; an empty source is the first one.

    sources: names; an import path, "package.module:NAME", is a source, too.

    Raises UserError for an unknown source or option.
    """
    first, *rest = arg.split(",") if arg else [""]
    if "=" in first:
        first, rest = "", [first, *rest]
    source = first or next(iter(sources))
    if source not in sources and not is_path(source):
        raise UserError(
            f"the configuration knows no data source {source!r}; choose one of "
            f"{', '.join(sources)}, or give an import path, package.module:NAME"
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


def block_size(loss: Any, name: str = "block") -> int | None:
    """`config.loss.block`, or another of its kind, as the losses take it: None for all at once.

    The configurations of older runs have none. Raises UserError for a negative one.
    """
    size = loss.get(name, 0)
    if size < 0:
        raise UserError(f"config.loss.{name}={size} must not be negative; 0 compares all at once")
    return size or None


def compute_dtype(name: str) -> jnp.dtype:
    """The type that `config.model.dtype` names. Raises UserError for another than two."""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"config.model.dtype={name!r} is unknown; choose float32 or bfloat16")
    return jnp.dtype(name)
