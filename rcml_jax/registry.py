"""Parts by name: an entry of one of the library's registries, or anything by its import path.

A registry is a dict from a short name to an import path, "package.module:NAME", so that reading it
imports nothing. A configuration may give such a path itself, in the place of a name.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from rcml_jax.errors import UserError


def is_path(name: str) -> bool:
    """Whether a name is an import path, "package.module:NAME"."""
    return ":" in name


def resolve(
    name: str,
    known: Mapping[str, str],
    option: str,
    *,
    accepts: Callable[[Any], bool] = callable,
    wanted: str = "a function",
) -> Any:
    """Import what `name` stands for: an entry of `known`, or an import path itself.

    option: the configuration's name for it, such as "config.method", for errors. accepts, wanted:
    a test of what was found, and what it has to be, in words.

    Raises UserError for an unknown name, a module that cannot be imported, an attribute that it
    does not have, and one that is not accepted.
    """
    path = name if is_path(name) else known.get(name)
    if path is None:
        raise UserError(
            f"{option}={name!r} is unknown; choose one of {', '.join(known)}, or give an import "
            "path, package.module:NAME"
        )
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{option}={name!r}: the module {module} cannot be imported ({error}); install its "
            "package, or add its folder to PYTHONPATH"
        ) from error
    except Exception as error:  # whatever the user's own code raises
        raise UserError(
            f"{option}={name!r}: importing {module} fails with {type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, attribute):
        raise UserError(f"{option}={name!r}: the module {module} has no {attribute!r}; correct it")
    found = getattr(found, attribute)
    if not accepts(found):
        raise UserError(f"{option}={name!r} is of type {type(found).__name__}; name {wanted}")
    return found
