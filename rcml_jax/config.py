"""Reading the argument of a configuration file."""

from collections.abc import Sequence

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
