"""Our towers beside PyTorch's CLIP: the same checkpoint gives the same features and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.models.clip import IMAGE_MEAN, IMAGE_STD
from rcml_jax.models.two_towers import TwoTowers, load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4

TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
    "bos_token_id": 58,
    "eos_token_id": 59,
    "pad_token_id": 59,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def small(text=(), vision=(), **options):
    """A configuration whose two towers have nothing in common."""
    config = {"projection_dim": 20} | options
    return transformers.CLIPConfig(
        text_config=TEXT | dict(text), vision_config=VISION | dict(vision), **config
    )


CASES = {
    "quick_gelu": small(),
    "gelu": small({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    # Checkpoints from before transformers 4.31: the largest id ends the text.
    "legacy_end": small({"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}),
    "own_padding": small({"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}),
}


def random_model(config):
    """A CLIPModel in which no bias is 0 and no norm is 1."""
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(config, count=4):
    """Token ids with padding, float pixels (n, H, W, 3), and where the texts end."""
    text, vision = config.text_config, config.vision_config
    rng = np.random.default_rng(0)
    legacy = text.eos_token_id == 2
    end = text.vocab_size - 1 if legacy else text.eos_token_id
    length = text.max_position_embeddings
    ids = rng.integers(4, text.vocab_size - 2, (count, length))
    ids[:, 0] = text.bos_token_id
    ends = np.linspace(2, length - 1, count).astype(int)
    for row, place in enumerate(ends):
        ids[row, place:] = text.pad_token_id
        ids[row, place] = end
    pixels = rng.standard_normal((count, vision.image_size, vision.image_size, 3))
    return ids, pixels.astype(np.float32), ends


@torch.no_grad()
def torch_states(model, ids, pixels, ends):
    """PyTorch's features and token states of both towers, in the joint space."""
    mask = torch.arange(ids.shape[1]) <= torch.from_numpy(ends)[:, None]
    texts = {"input_ids": torch.from_numpy(ids), "attention_mask": mask.long()}
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    text = model.text_model(**texts).last_hidden_state
    image = model.vision_model(pixel_values=pixels).last_hidden_state
    return {
        "text": model.get_text_features(**texts).numpy(),
        "image": model.get_image_features(pixel_values=pixels).numpy(),
        "text_tokens": model.text_projection(text).numpy(),
        "image_tokens": model.visual_projection(model.vision_model.post_layernorm(image)).numpy(),
    }


def compare(config, folder, count=4):
    """Save a random model as PyTorch does, load it here, and compare every state."""
    model = random_model(config)
    model.save_pretrained(folder)
    ids, pixels, ends = inputs(config, count)
    expected = torch_states(model, ids, pixels, ends)
    loaded, params = load_pretrained(str(folder))
    towers, variables = TwoTowers(loaded), {"params": jax.tree.map(jnp.asarray, params)}
    text = towers.apply(variables, ids, method="text_states")
    image = towers.apply(variables, pixels, method="image_states")
    np.testing.assert_array_equal(text.summary, ends)
    np.testing.assert_array_equal(np.sum(text.mask, axis=1), ends + 1)
    # So large that a tolerance of 1e-4 says something.
    assert all(np.abs(states).mean() > 0.2 for states in expected.values())
    # After the end token nothing is used, and only PyTorch is told what padding is.
    mask = np.asarray(text.mask)
    for ours, theirs in (
        (text.pooled, expected["text"]),
        (image.pooled, expected["image"]),
        (np.asarray(text.states)[mask], expected["text_tokens"][mask]),
        (image.states, expected["image_tokens"]),
    ):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    assert float(params["logit_scale"]) == model.logit_scale.item()
    return params


@pytest.mark.parametrize("case", CASES)
def test_small_towers_equal_pytorch(case, tmp_path):
    compare(CASES[case], tmp_path)


def test_uint8_pictures_are_normalised_as_in_pytorch(tmp_path):
    model = random_model(CASES["gelu"])
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (3, 24, 24, 3), np.uint8)
    pixels = (images / np.float32(255) - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    with torch.no_grad():
        pixels = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
        expected = model.get_image_features(pixel_values=pixels).numpy()
    config, params = load_pretrained(str(tmp_path))
    states = TwoTowers(config).apply({"params": params}, images, method="image_states")
    np.testing.assert_allclose(states.pooled, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_vit_b_32_equals_pytorch(tmp_path):
    text = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    config = transformers.CLIPConfig(text_config=text | {"pad_token_id": 49407})
    assert (config.vision_config.patch_size, config.vision_config.image_size) == (32, 224)
    params = compare(config, tmp_path, count=3)
    assert sum(x.size for x in jax.tree.leaves(params)) == 151_277_313
