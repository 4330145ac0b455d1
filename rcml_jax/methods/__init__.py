"""A model, a loss, its batches and its evaluation, tied together by a configuration."""

import pathlib
from typing import Any

from rcml_jax.losses import LOSSES
from rcml_jax.methods.base import Method
from rcml_jax.registry import call, is_path, resolve

#: The method of `eval.py --embeddings`: vectors from a file, scored like the relational methods.
EMBEDDINGS = "embeddings"
#: Methods by their name in `config.method`; to add one, add a subclass of `Method` and a line.
METHODS = {
    "rcml": "rcml_jax.methods.rcml:RCMLMethod",
    **dict.fromkeys(LOSSES, "rcml_jax.methods.baselines:BaselineMethod"),
    "declip": "rcml_jax.methods.declip:DeCLIPMethod",
    "m3col": "rcml_jax.methods.seeds:SeedEnsemble",
    EMBEDDINGS: "rcml_jax.methods.embeddings:EmbeddingsMethod",
}
#: Methods that train towers on a relation graph.
RELATIONAL = ("rcml", *LOSSES, "declip")


def method_class(name: str) -> type[Method]:
    """The class of `METHODS`, or of an import path "package.module:NAME".

    Raises UserError for an unknown name and what cannot be imported or is no `Method`.
    """
    return resolve(
        name,
        METHODS,
        "config.method",
        accepts=lambda found: isinstance(found, type) and issubclass(found, Method),
        wanted="a subclass of rcml_jax.methods.base.Method",
    )


def build(config: Any, workdir: pathlib.Path) -> Method:
    """The method that `config.method` names, on the data that `config.data` names.

    Raises UserError for an unknown method and whatever the data and the model find wrong.
    """
    return call(
        config.method,
        method_class(config.method).load,
        "config.method",
        "its load takes (config, work directory) and returns a method, see rcml_jax.methods.base",
        config,
        pathlib.Path(workdir),
        accepts=lambda found: isinstance(found, Method),
    )


def family_of(name: str) -> str:
    """The family of a method's measures: "relational", "classification", "alignment", or "".

    Raises UserError for an import path that cannot be imported.
    """
    if name == "alignment":
        return name
    return method_class(name).family if name in METHODS or is_path(name) else ""
