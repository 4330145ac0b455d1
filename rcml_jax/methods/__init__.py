"""A model, a loss, its batches and its evaluation, tied together by a configuration."""

import pathlib
from typing import Any

from rcml_jax.errors import UserError
from rcml_jax.methods.base import Method

RELATIONAL = ("rcml", "clip", "siglip", "unicl")


def build(config: Any, workdir: pathlib.Path) -> Method:
    """The method that `config.method` names, on the data that `config.data` names.

    Raises UserError for an unknown method and whatever the data and the model find wrong.
    """
    if config.method not in RELATIONAL:
        raise UserError(
            f"config.method={config.method!r} is unknown; choose one of {', '.join(RELATIONAL)}"
        )
    from rcml_jax.methods.baselines import BaselineMethod
    from rcml_jax.methods.rcml import RCMLMethod
    from rcml_jax.methods.task import RelationTask

    task = RelationTask.load(config, workdir)
    return (RCMLMethod if config.method == "rcml" else BaselineMethod)(config, task)
