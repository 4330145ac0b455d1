"""A model, a loss, its batches and its evaluation, tied together by a configuration."""

import pathlib
from typing import Any

from rcml_jax.errors import UserError
from rcml_jax.methods.base import Method

RELATIONAL = ("rcml", "clip", "siglip", "unicl", "declip")
#: The method of `eval.py --embeddings`: vectors from a file, scored as the relational methods are.
EMBEDDINGS = "embeddings"


def build(config: Any, workdir: pathlib.Path) -> Method:
    """The method that `config.method` names, on the data that `config.data` names.

    Raises UserError for an unknown method and whatever the data and the model find wrong.
    """
    if config.method == "m3col":
        return _classifier(config, workdir)
    if config.method == EMBEDDINGS and "embeddings" in config:
        from rcml_jax.methods.embeddings import EmbeddingsMethod

        return EmbeddingsMethod.load(config)
    if config.method not in RELATIONAL:
        raise UserError(
            f"config.method={config.method!r} is unknown; choose one of {', '.join(RELATIONAL)}, "
            "m3col"
        )
    from rcml_jax.methods.baselines import BaselineMethod
    from rcml_jax.methods.declip import DeCLIPMethod
    from rcml_jax.methods.rcml import RCMLMethod
    from rcml_jax.methods.task import RelationTask

    own = {"rcml": RCMLMethod, "declip": DeCLIPMethod}
    return own.get(config.method, BaselineMethod)(config, RelationTask.load(config, workdir))


def _classifier(config: Any, workdir: pathlib.Path) -> Method:
    """M3CoL: one model, or one for each seed (and fold, where there is no validation split)."""
    from rcml_jax.methods.classification import ClassificationTask
    from rcml_jax.methods.m3col import M3CoLMethod
    from rcml_jax.methods.seeds import Members

    if config.seeds < 1:
        raise UserError(f"config.seeds={config.seeds} must be at least 1")
    task = ClassificationTask.load(config, workdir)
    single = M3CoLMethod(config, task)
    declared = len(task.data.rows("validation")) > 0
    alone = config.seeds == 1 and (declared or config.data.folds < 2)
    return single if alone else Members(single)
