"""ViT checkpoints with the names of transformers 5's classes, which need no torch to be read."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rcml_jax.models.backbones import load_encoder
from rcml_jax.models.checkpoints import to_torch
from rcml_jax.models.towers.vit import ViT, small_vit_config

NEW = {
    "encoder.layer.0.attention.attention.query.weight": "layers.0.attention.q_proj.weight",
    "encoder.layer.0.attention.attention.key.bias": "layers.0.attention.k_proj.bias",
    "encoder.layer.0.attention.attention.value.weight": "layers.0.attention.v_proj.weight",
    "encoder.layer.0.attention.output.dense.weight": "layers.0.attention.o_proj.weight",
    "encoder.layer.0.intermediate.dense.weight": "layers.0.mlp.fc1.weight",
    "encoder.layer.0.output.dense.bias": "layers.0.mlp.fc2.bias",
    "encoder.layer.0.layernorm_before.weight": "layers.0.layernorm_before.weight",
    "layernorm.bias": "layernorm.bias",
}
RENAMED = (
    ("encoder.layer", "layers"),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def new_name(name):
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_the_names_of_transformers_5_are_read(prefix, tmp_path):
    config = small_vit_config(width=8, layers=2, heads=2, image_size=8, patch_size=4)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    params = ViT(config).init(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
    tensors = to_torch(params)
    assert {name: new_name(name) for name in NEW} == NEW
    assert NEW.keys() < tensors.keys()
    save_file(
        {prefix + new_name(name): value for name, value in tensors.items()},
        tmp_path / "model.safetensors",
    )
    config.save_pretrained(tmp_path)
    _, found = load_encoder(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found, params)
