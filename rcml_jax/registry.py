"""Parts by name: an entry of one of the library's registries, or anything by its import path.

A registry is a dict from a short name to an import path, "package.module:NAME", so that reading it
imports nothing. A configuration may give such a path itself, in the place of a name.
"""

import importlib
import inspect
import textwrap
import traceback
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


def call(
    name: str,
    function: Callable[..., Any],
    option: str,
    wanted: str,
    *args: Any,
    accepts: Callable[[Any], bool] = lambda found: True,
    **options: Any,
) -> Any:
    """What a part returns for these arguments; one by its import path is checked.

    name, option: as of `resolve`. wanted: what the part takes and returns, in words. accepts: a
    test of what it returns.

    Raises UserError where a part of the user's does not take the arguments, fails, or returns
    something else.
    """
    if not is_path(name):
        return function(*args, **options)

    def refuse(problem: str) -> UserError:
        return UserError(f"{option}={name!r} {problem}; {wanted}")

    try:
        inspect.signature(function).bind(*args, **options)
    except TypeError as error:
        raise refuse(f"takes other arguments ({error})") from error
    except ValueError:  # a function of C that does not tell its arguments
        pass
    try:
        found = function(*args, **options)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise refuse(f"fails with {type(error).__name__}: {reason}{_place(error)}") from error
    if not accepts(found):
        raise refuse(f"returns a {type(found).__name__}")
    return found


def _place(error: Exception) -> str:
    """Where an error was raised below `call`, in parentheses."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if not frames:  # a function of C
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"
