"""Our towers beside PyTorch's: the same checkpoint gives the same tokens, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.models.towers import clip, siglip
from rcml_jax.models.two_towers import TwoTowers, load_pretrained
from tests.parity.torch_towers import (
    BERT,
    CLIP,
    SIGLIP,
    STORES,
    TOLERANCE,
    VIT,
    compare,
    compare_gradients,
    features,
    random_model,
    tensor_of,
    torch,
    transformers,
)

TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 60,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def small_clip(text=(), vision=()):
    """A configuration whose two towers have nothing in common."""
    ids = {"bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59}
    return transformers.CLIPConfig(
        text_config=TEXT | ids | {"max_position_embeddings": 12} | dict(text),
        vision_config=VISION | dict(vision),
        projection_dim=20,
    )


def small_siglip(text=(), vision=()):
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = TEXT | ids | {"max_position_embeddings": 12, "projection_size": 32} | dict(text)
    return transformers.SiglipConfig(text_config=text, vision_config=VISION | dict(vision))


GELU = {"hidden_act": "gelu"}
UNUSUAL = {"num_attention_heads": 3, "hidden_size": 36, "layer_norm_eps": 1e-3}
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 30, "type_vocab_size": 1}

CASES = {
    "clip_vit_b_32": (CLIP, "CLIPModel", small_clip()),
    "clip_patch_14_336": (CLIP, "CLIPModel", small_clip({}, {"image_size": 42, "patch_size": 14})),
    # 3 heads and a projection of another width than both towers.
    "clip_gelu": (CLIP, "CLIPModel", small_clip(GELU | UNUSUAL, GELU | UNUSUAL)),
    "clip_legacy_end": (
        CLIP,
        "CLIPModel",
        small_clip({"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}),
    ),
    "clip_own_padding": (
        CLIP,
        "CLIPModel",
        small_clip({"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}),
    ),
    "siglip": (SIGLIP, "SiglipModel", small_siglip()),
    # Image sizes that are no multiple of the patch, as of siglip-so400m-patch14-384.
    "siglip_so400m": (
        SIGLIP,
        "SiglipModel",
        small_siglip(
            {"hidden_size": 36, "projection_size": 36},
            UNUSUAL | {"image_size": 29, "patch_size": 7},
        ),
    ),
    # A SigLIP 2 of fixed resolution is a SigLIP with Gemma's tokens.
    "siglip2": (
        SIGLIP,
        "SiglipModel",
        small_siglip({"bos_token_id": 2, "pad_token_id": 0, "vocab_size": 200}, {"patch_size": 4}),
    ),
    "vit": (VIT, "ViTModel", transformers.ViTConfig(**VISION)),
    "vit_classifier": (
        VIT,
        "ViTForImageClassification",
        transformers.ViTConfig(**VISION | UNUSUAL, qkv_bias=False, hidden_act="gelu_new"),
    ),
    "bert": (BERT, "BertModel", transformers.BertConfig(**TEXT)),
    "bert_masked_lm": (
        BERT,
        "BertForMaskedLM",
        transformers.BertConfig(**TEXT | UNUSUAL, hidden_act="relu", max_position_embeddings=24),
    ),
    "roberta": (BERT, "RobertaModel", transformers.RobertaConfig(**TEXT | ROBERTA)),
    "roberta_masked_lm": (
        BERT,
        "RobertaForMaskedLM",
        transformers.RobertaConfig(**TEXT | ROBERTA | UNUSUAL),
    ),
}
FAMILIES = ("clip_gelu", "siglip", "vit", "vit_classifier", "bert", "roberta")


def model_of(case):
    _, kind, config = CASES[case]
    return random_model(getattr(transformers, kind), config)


@pytest.mark.parametrize("case", CASES)
def test_small_towers_equal_pytorch(case, tmp_path):
    compare(CASES[case][0], model_of(case), tmp_path)


@pytest.mark.parametrize("store", [store for store in STORES if store != "one_file"])
@pytest.mark.parametrize("case", FAMILIES)
def test_checkpoints_of_every_form_are_read(case, store, tmp_path):
    compare(CASES[case][0], model_of(case), tmp_path, store)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_pytorch(case, tmp_path):
    compare_gradients(CASES[case][0], model_of(case), tmp_path)


@pytest.mark.parametrize(("case", "module"), [("clip_gelu", clip), ("siglip", siglip)])
def test_uint8_images_are_normalised_as_in_pytorch(case, module, tmp_path):
    model = model_of(case)
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), np.uint8)
    pixels = images / np.float32(255) - np.float32(module.IMAGE_MEAN)
    pixels = tensor_of(pixels / np.float32(module.IMAGE_STD))
    with torch.no_grad():
        expected = features(model.get_image_features(pixel_values=pixels)).numpy()
    config, params = load_pretrained(str(tmp_path))
    states = TwoTowers(config).apply({"params": params}, images, method="image_states")
    np.testing.assert_allclose(states.pooled, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("clip")])
def test_texts_end_where_pytorchs_do(case, tmp_path):
    model_of(case).save_pretrained(tmp_path)
    config, params = load_pretrained(str(tmp_path))
    ids, mask, _ = CLIP.inputs(config)
    states = TwoTowers(config).apply({"params": params}, jnp.asarray(ids), method="text_states")
    np.testing.assert_array_equal(states.pooled_index, mask.sum(1) - 1)
    np.testing.assert_array_equal(states.mask, mask)


# Real sizes. Where the vocabulary is not named, a small one saves memory and changes no layer.

BASE = {
    "clip": (
        CLIP,
        "CLIPModel",
        lambda: transformers.CLIPConfig(
            text_config={"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
        ),
        151_277_313,
    ),
    "siglip": (
        SIGLIP,
        "SiglipModel",
        lambda: transformers.SiglipConfig(
            text_config={"vocab_size": 1000, "eos_token_id": 1, "pad_token_id": 1}
        ),
        203_155_970 - 31_000 * 768,
    ),
    "vit": (VIT, "ViTModel", lambda: transformers.ViTConfig(layer_norm_eps=1e-12), 85_798_656),
    "bert": (
        BERT,
        "BertModel",
        lambda: transformers.BertConfig(vocab_size=1000),
        108_891_648 - 29_522 * 768,
    ),
    "roberta": (
        BERT,
        "RobertaModel",
        lambda: transformers.RobertaConfig(
            vocab_size=1000, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
        ),
        124_055_040 - 49_265 * 768,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASE)
def test_base_sizes_equal_pytorch(name, tmp_path):
    family, kind, config, count = BASE[name]
    _, params = compare(family, random_model(getattr(transformers, kind), config()), tmp_path)
    assert sum(x.size for x in jax.tree.leaves(params)) == count
