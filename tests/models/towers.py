"""Small checkpoints on disk, as other people's are: a CLIP, a ViT, a ResNet, a BERT."""

import json

import jax
import numpy as np
from transformers import (
    FlaxBertModel,
    FlaxCLIPModel,
    FlaxResNetModel,
    FlaxViTModel,
    ResNetConfig,
)

from rcml_jax.data.text import train_tokenizer
from rcml_jax.models.bert import small_bert_config
from rcml_jax.models.clip import small_clip_config
from rcml_jax.models.vit import small_vit_config
from tests.models.test_classification_encoders import bert_tokenizer

WORDS = ["a dog runs", "two cats sleep", "a man is eating food"]
SIZES = {"width": 16, "layers": 1, "heads": 2}


def shaken(model):
    """The model with every parameter away from its usual start."""
    rng = np.random.default_rng(2)
    model.params = jax.tree.map(
        lambda x: np.float32(x + 0.2 * np.abs(rng.normal(size=x.shape))), model.params
    )
    return model


def save_clip(directory, projection=8):
    tokenizer = train_tokenizer(WORDS, 300)
    config = small_clip_config(
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.end_id,
        embed_dim=projection,
        image_size=16,
        **SIZES,
    )
    model = shaken(FlaxCLIPModel(config, input_shape=((1, 1), (1, 16, 16, 3))))
    model.save_pretrained(directory)
    tokenizer.save(directory / "tokenizer.json")
    return model


def save_vit(directory):
    model = FlaxViTModel(small_vit_config(**SIZES, image_size=16, patch_size=8))
    model = shaken(model)
    model.save_pretrained(directory)
    return model


def save_resnet(directory):
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_channels=3
    )
    model = shaken(FlaxResNetModel(config, input_shape=(1, 16, 16, 3)))
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 16}, "image_mean": [0.5, 0.4, 0.3]})
    )
    return model


def save_bert(directory, *, mean=False):
    config = small_bert_config(**SIZES, vocab_size=11, pad_token_id=0, max_length=32)
    model = shaken(FlaxBertModel(config, add_pooling_layer=False))
    model.save_pretrained(directory)
    bert_tokenizer(directory)
    if mean:
        (directory / "1_Pooling").mkdir()
        pooling = {"pooling_mode_mean_tokens": True}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return model
