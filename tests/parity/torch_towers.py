"""Hugging Face's PyTorch models with random weights, saved, read by ours, and compared."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from rcml_jax.models.backbones import build_backbone, load_encoder
from rcml_jax.models.two_towers import TwoTowers, load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4


def random_model(kind, config):
    """A model in which no bias is 0, no norm 1, and attention is far from uniform."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif len(parameter) == 1:  # class token, probe, positions
                parameter.normal_()
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


# How a model is saved


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return model


def save_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return model


def save_half(model, folder, dtype):
    """The saved model, with weights rounded to `dtype` and calculating in float32."""
    return save(model.to(dtype), folder).float()


STORES = {
    "one_file": save,
    "sharded": save_sharded,
    "float16": lambda model, folder: save_half(model, folder, torch.float16),
    "bfloat16": lambda model, folder: save_half(model, folder, torch.bfloat16),
}
if "save_original_format" in inspect.signature(transformers.CLIPModel.save_pretrained).parameters:
    # The names of the classes of transformers 5, which by default writes those of version 4.
    STORES["new_names"] = lambda model, folder: save(model, folder, save_original_format=False)


# What is compared


class Family(NamedTuple):
    """How a family of checkpoints is read, and its outputs by name: PyTorch's and ours.

    load: directory → (configuration, parameters); inputs: configuration → arrays; theirs: (model,
    inputs) → tensors; ours: (configuration, parameters, inputs) → arrays.
    """

    load: Callable
    inputs: Callable
    theirs: Callable
    ours: Callable


def compare(family, model, folder, store="one_file"):
    """Save a model, read it here, and compare every output. Returns configuration, parameters.

    `pytest -s` shows the largest differences.
    """
    model = STORES[store](model, folder)
    config, params = family.load(str(folder))
    inputs = family.inputs(config)
    with torch.no_grad():
        theirs = family.theirs(model, inputs)
    ours = jax.jit(lambda params: family.ours(config, params, inputs))(params)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        expected = expected.numpy()
        assert np.abs(expected).mean() > 0.2, name  # So large that 1e-4 says something.
        print(f"{name}: {np.abs(ours[name] - expected).max():.1e}")
        np.testing.assert_allclose(ours[name], expected, atol=TOLERANCE, rtol=0, err_msg=name)
    return config, params


def compare_gradients(family, model, folder):
    """Compare the gradient of a random combination of all outputs, for each parameter."""
    config, params = family.load(str(save(model, folder / "model") and folder / "model"))
    inputs = family.inputs(config)
    theirs = family.theirs(model, inputs)
    rng = np.random.default_rng(3)
    weights = {name: rng.standard_normal(x.shape, np.float32) for name, x in theirs.items()}
    sum(torch.sum(torch.from_numpy(weights[name]) * x) for name, x in theirs.items()).backward()

    @jax.jit
    @jax.grad
    def gradient(params):
        ours = family.ours(config, params, inputs)
        return sum(jnp.sum(weights[name] * x) for name, x in ours.items())

    found = flatten_dict(gradient(params))
    with torch.no_grad():  # Saved and read like a model, gradients have our names and layout.
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    _, expected = family.load(str(save(model, folder / "gradient") and folder / "gradient"))
    expected = flatten_dict(expected)
    assert found.keys() == expected.keys()
    print(f"gradient: {max(np.abs(found[path] - x).max() for path, x in expected.items()):.1e}")
    for path, gradient in expected.items():
        # A key's bias shifts all logits of a query alike; the loss has scale and bias.
        if path[-2:] not in BIASES_OF_KEYS and not path[-1].startswith("logit_"):
            assert np.abs(gradient).max() > 100 * TOLERANCE, path
        np.testing.assert_allclose(
            found[path], gradient, atol=TOLERANCE, rtol=TOLERANCE, err_msg=".".join(path)
        )


BIASES_OF_KEYS = {("k_proj", "bias"), ("key", "bias")}


# Inputs


def padded_ids(rng, count, length, *, vocab, end, pad, start=None):
    """Token ids (count, length) of texts of 3 tokens to `length`, and where they end.

    Special tokens are among the first four of the vocabulary or the last two.
    """
    ids = rng.integers(4, vocab - 2, (count, length))
    if start is not None:
        ids[:, 0] = start
    ends = np.linspace(2, length - 1, count).astype(int)
    for row, last in enumerate(ends):
        ids[row, last:] = pad
        ids[row, last] = end
    return ids, ends


def float_pixels(rng, count, config):
    size = config.image_size
    return rng.standard_normal((count, size, size, 3), np.float32)


def tensor_of(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def features(found):
    """What `get_text_features` means: transformers 5 returns it among other outputs."""
    return found if torch.is_tensor(found) else found.pooler_output


# CLIP


def clip_inputs(config, count=4):
    text, rng = config.text_config, np.random.default_rng(0)
    ids, ends = padded_ids(
        rng,
        count,
        min(text.max_position_embeddings, 24),
        vocab=text.vocab_size,
        # Checkpoints from before transformers 4.31: the largest id ends the text.
        end=text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id,
        pad=text.pad_token_id,
        start=text.bos_token_id,
    )
    mask = np.arange(ids.shape[1]) <= ends[:, None]
    return ids, mask, float_pixels(rng, count, config.vision_config)


def torch_clip(model, inputs):
    ids, mask, pixels = inputs
    texts = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
    text = model.text_model(**texts).last_hidden_state
    image = model.vision_model(pixel_values=tensor_of(pixels)).last_hidden_state
    return {
        "text": features(model.get_text_features(**texts)),
        "image": features(model.get_image_features(pixel_values=tensor_of(pixels))),
        "text_tokens": text[torch.from_numpy(mask)],
        # CLIP itself normalises CLS alone.
        "image_tokens": model.vision_model.post_layernorm(image),
    }


def our_clip(config, params, inputs):
    ids, mask, pixels = inputs

    def call(towers):
        return {
            "text": towers.text_states(ids).pooled,
            "image": towers.image_states(pixels).pooled,
            "text_tokens": towers.text_model.tokens(ids)[mask],
            "image_tokens": towers.vision_model.tokens(pixels),
        }

    return TwoTowers(config).apply({"params": params}, method=call)


CLIP = Family(load_pretrained, clip_inputs, torch_clip, our_clip)


# SigLIP


def siglip_inputs(config, count=4):
    text, rng = config.text_config, np.random.default_rng(0)
    sizes = {"vocab": text.vocab_size, "end": text.eos_token_id, "pad": text.pad_token_id}
    length = text.max_position_embeddings
    ids, ends = padded_ids(rng, count, length - 2, **sizes)
    mask = np.arange(length - 2) <= ends[:, None]
    return ids, mask, float_pixels(rng, count, config.vision_config)


def torch_siglip(model, inputs):
    ids, mask, pixels = inputs
    text, vision = model.text_model, model.vision_model
    # Without a mask and padded to all positions, as Hugging Face's documentation has it.
    full = np.pad(ids, ((0, 0), (0, 2)), constant_values=model.config.text_config.pad_token_id)
    text_tokens = text(input_ids=torch.from_numpy(full)).last_hidden_state
    image_tokens = vision(pixel_values=tensor_of(pixels)).last_hidden_state
    alone = image_tokens.reshape(-1, 1, image_tokens.shape[-1])
    return {
        "text": features(model.get_text_features(input_ids=torch.from_numpy(full))),
        "image": features(model.get_image_features(pixel_values=tensor_of(pixels))),
        "text_tokens": text_tokens,
        "image_tokens": image_tokens,
        "text_states": text.head(text_tokens)[:, :-2][torch.from_numpy(mask)],
        "image_states": vision.head(alone).reshape(image_tokens.shape),
    }


def our_siglip(config, params, inputs):
    ids, mask, pixels = inputs

    def call(towers):
        text, image = towers.text_states(ids), towers.image_states(pixels)
        return {
            "text": text.pooled,
            "image": image.pooled,
            "text_tokens": towers.text_model.tokens(ids),
            "image_tokens": towers.vision_model.tokens(pixels),
            "text_states": text.states[:, 1:][mask],
            "image_states": image.states[:, 1:],
        }

    return TwoTowers(config).apply({"params": params}, method=call)


SIGLIP = Family(load_pretrained, siglip_inputs, torch_siglip, our_siglip)


# ViT, BERT and RoBERTa


def torch_vit(model, inputs):
    states = model.base_model(pixel_values=tensor_of(inputs)).last_hidden_state
    return {"tokens": states, "first": states[:, 0]}


def our_vit(config, params, inputs):
    vit, variables = build_backbone(config), {"params": params}
    return {
        "tokens": vit.apply(variables, inputs, method="tokens"),
        "first": vit.apply(variables, inputs),
    }


VIT = Family(
    load_encoder,
    lambda config: float_pixels(np.random.default_rng(0), 3, config),
    torch_vit,
    our_vit,
)


def bert_inputs(config, count=4):
    roberta = config.model_type == "roberta"
    ids, ends = padded_ids(
        np.random.default_rng(0),
        count,
        24,
        vocab=config.vocab_size,
        start=0 if roberta else 2,
        end=2 if roberta else 3,
        pad=config.pad_token_id,
    )
    return ids, np.arange(ids.shape[1]) <= ends[:, None]


def torch_bert(model, inputs):
    ids, mask = (torch.from_numpy(x) for x in inputs)
    states = model.base_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return {"tokens": states[mask], "first": states[:, 0], "mean": mean}


def our_bert(config, params, inputs):
    ids, mask = inputs
    bert, variables = build_backbone(config), {"params": params}
    states = bert.apply(variables, ids, lambda x: x, method="token_states")
    return {
        "tokens": bert.apply(variables, ids, mask, method="tokens")[mask],
        "first": bert.apply(variables, ids, mask),
        "mean": states.pooled,
    }


BERT = Family(load_encoder, bert_inputs, torch_bert, our_bert)
