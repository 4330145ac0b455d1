"""Small checkpoints on disk, as other people's are: a CLIP, a ViT, a ResNet, a BERT."""

import json

from transformers import ResNetConfig

from rcml_jax.data.tokenizer import train_tokenizer
from rcml_jax.models.towers.bert import small_bert_config
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.models.towers.vit import small_vit_config
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.models.test_classification_encoders import bert_tokenizer

WORDS = ["a dog runs", "two cats sleep", "a man is eating food"]
SIZES = {"width": 16, "layers": 1, "heads": 2}


def save(config, directory):
    """A model with every parameter away from its usual start, and its checkpoint on disk."""
    # Variances of a batch norm stay positive.
    model = make_model(config, seed=2, shake=lambda noise: 0.2 * abs(noise))
    save_checkpoint(model, directory, layout="flax")
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
    tokenizer.save(directory / "tokenizer.json")
    return save(config, directory)


def save_vit(directory):
    return save(small_vit_config(**SIZES, image_size=16, patch_size=8), directory)


def save_resnet(directory):
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_channels=3
    )
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 16}, "image_mean": [0.5, 0.4, 0.3]})
    )
    return save(config, directory)


def save_bert(directory, *, mean=False):
    config = small_bert_config(**SIZES, vocab_size=12, pad_token_id=0, max_length=32)
    bert_tokenizer(directory)
    if mean:
        (directory / "1_Pooling").mkdir()
        pooling = {"pooling_mode_mean_tokens": True}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return save(config, directory)
