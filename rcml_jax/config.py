"""Recipes by name or file, their arguments, and what several of their options mean together."""

import importlib.util
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import ml_collections

from rcml_jax.errors import UserError
from rcml_jax.parsing import user_path
from rcml_jax.registry import is_path

_FROZEN = {"": (), "text": ("text",), "image": ("image",), "both": ("text", "image")}
#: Options that say how data are found and read, and change nothing of what is computed.
READING = (
    "data.dir",
    "data.threads",
    "data.workers",
    "data.pixels",
    "data.prepare_workers",
    "data.beam",
)
_PACKAGE = pathlib.Path(__file__).parent
#: The folder of the recipes: a wheel has it inside the package, a clone beside the package.
RECIPES = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def parse_argument(
    arg: str, *, sources: Collection[str], options: Collection[str]
) -> tuple[str, dict[str, str]]:
    """ "source,name=value,..." → the source and its options; an empty source is the first one.

    sources: names; an import path, "package.module:NAME", is a source, too.

    Raises UserError for an unknown source or option, and for an option that is given twice.
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
    found: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if name not in options or not equals or not value:
            raise UserError(
                f"the configuration knows no option {part!r}; write name=value with one of "
                f"{', '.join(options)}"
            )
        if name in found:
            raise UserError(
                f"the configuration's argument gives {name} twice ({found[name]!r} and {value!r}); "
                "leave one of them out"
            )
        found[name] = value
    return source, found


def load_config_file(path_and_argument: str) -> ml_collections.ConfigDict:
    """The configuration of a recipe, "NAME[:ARGUMENT]" or "FILE.py[:ARGUMENT]".

    NAME is that of a packaged recipe. Raises UserError where `get_config` cannot be called.
    """
    config = call_config_file(path_and_argument, "get_config")
    if not isinstance(config, ml_collections.ConfigDict):
        path = path_and_argument.partition(":")[0]
        raise UserError(f"get_config of {path} must return an ml_collections.ConfigDict")
    return config


def recipe_path(name: str) -> str:
    """The file of a packaged recipe such as "rcml"; any other name is a path and is returned as is.

    Raises UserError where there is no such file.
    """
    path = str(RECIPES / f"{name}.py" if name.isidentifier() else user_path(name))
    if not pathlib.Path(path).is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.py")))
        kind = "packaged recipe" if name.isidentifier() else "configuration file"
        raise UserError(
            f"there is no {kind} {name}; give a packaged recipe ({known}) or the path of a Python "
            "file"
        )
    return path


def call_config_file(path_and_argument: str, function: str) -> Any:
    """What a function of a recipe returns, which is named as for `load_config_file`.

    Raises UserError where it fails.
    """
    name, _, argument = path_and_argument.partition(":")
    path = recipe_path(name)
    spec = importlib.util.spec_from_file_location("rcml_jax_config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; give one with a function {function}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise UserError(f"{path} has no function {function}; {RECIPES / 'rcml.py'} has one")
        call = getattr(module, function)
        return call(argument) if argument else call()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{path} fails with {type(error).__name__}: {error}") from error


def leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted names → values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def fold_seed(seed: int) -> int:
    """A seed of up to 63 bits → one of 32, which random keys take; smaller seeds are unchanged."""
    return (seed & 0xFFFFFFFF) ^ (seed >> 32)


class Came(NamedTuple):
    """Which towers are from a checkpoint, and whether both are from one, with a joint space."""

    text: bool
    image: bool
    joint: bool


def from_checkpoint(model: Any) -> Came:
    """The towers of `config.model` that start from a checkpoint."""
    replaced = (model.text_pretrained, model.image_pretrained, model.text_tower, model.image_tower)
    return Came(
        text=bool(model.text_pretrained or (model.pretrained and not model.text_tower)),
        image=bool(model.image_pretrained or (model.pretrained and not model.image_tower)),
        joint=bool(model.pretrained) and not any(replaced),
    )


def frozen_modalities(freeze: str) -> tuple[str, ...]:
    """The modalities of `config.model.freeze`: text, image or both."""
    return _FROZEN[freeze]


def stored_modalities(model: Any) -> tuple[str, ...]:
    """Whose states are stored: frozen towers of a checkpoint under `config.model.store_frozen`."""
    if not model.store_frozen:
        return ()
    came = from_checkpoint(model)
    return tuple(name for name in frozen_modalities(model.freeze) if getattr(came, name))


def several_models(
    parallel: str, schedule: str, clip_norm: float, accumulation: str, micro_batch: int
) -> str | None:
    """What several models in one step cannot have, in a sentence; None where all is well."""
    if parallel == "pmap":
        return "several models train together in one jitted step; set config.parallel=jit"
    if schedule == "plateau" or clip_norm:
        return (
            "the plateau schedule and config.optimizer.clip_norm look at one model; set "
            "config.seeds=1, or config.optimizer.schedule=step and no clipping"
        )
    if micro_batch and accumulation == "exact":
        return (
            "exact accumulation trains one model; set config.accumulation=micro, "
            "config.micro_batch=0 or config.seeds=1"
        )
    return None
