"""Hugging Face's Flax classes, the oracle of our towers, where a transformers has them."""

import importlib.util
from typing import Any

import pytest
import transformers

#: Marks what compares with Hugging Face's Flax classes.
needs_flax_classes = pytest.mark.skipif(
    importlib.util.find_spec("transformers.models.clip.modeling_flax_clip") is None,
    reason=f"transformers {transformers.__version__} has no Flax classes; those before 5 have them",
)

#: What a test compares with: the modules of ours that it uses, or Hugging Face's.
ORACLES = ["ours", pytest.param("hugging face", marks=needs_flax_classes)]


def flax_model(name: str, config: Any, **options: Any) -> Any:
    """A model of theirs without parameters: give `params` to every call."""
    return getattr(transformers, name)(config, _do_init=False, **options)
