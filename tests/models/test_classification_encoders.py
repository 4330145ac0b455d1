"""The encoders for classification: Hugging Face's numbers, checkpoints on disk, and errors."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPConfig,
    RobertaConfig,
    RobertaTokenizerFast,
    ViTConfig,
)

from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.models.backbones import encoder_config, load_encoder
from rcml_jax.models.checkpoints import pretrained_directory
from rcml_jax.models.towers.bert import Bert, max_text_length, small_bert_config
from rcml_jax.models.towers.vit import ViT, small_vit_config
from tests.models.checkpoints_on_disk import LAYOUTS, make_model, save_checkpoint
from tests.models.hugging_face import flax_model, needs_flax_classes

WIDTH, VOCABULARY, LENGTH = 16, 30, 9
CLASSES = {"vit": "FlaxViTModel", "bert": "FlaxBertModel", "roberta": "FlaxRobertaModel"}
FAMILIES = tuple(CLASSES)


def tiny(family, **options):
    if family == "vit":
        sizes = {"image_size": 8, "patch_size": 4}
        return small_vit_config(**{"width": WIDTH, "layers": 2, "heads": 2} | sizes | options)
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 1, "max_length": 12}
    config = small_bert_config(**{"width": WIDTH, "layers": 2, "heads": 2} | sizes | options)
    if family == "bert":
        return config
    return RobertaConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})


@pytest.fixture(scope="module")
def models_of():
    """A model of each family, every parameter away from its usual start."""
    return {name: make_model(tiny(name), shake=lambda noise: 0.2 * noise) for name in FAMILIES}


@pytest.fixture(scope="module")
def inputs():
    """Images, and ids with mask of three texts, padded with the id 1."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY, (3, LENGTH))
    mask = np.arange(LENGTH) < np.array([[4], [9], [6]])
    text = (jnp.asarray(np.where(mask, ids, 1)), jnp.asarray(mask, jnp.int32))
    image = (jnp.asarray(rng.integers(0, 256, (3, 8, 8, 3)), jnp.uint8),)
    return {"vit": image, "bert": text, "roberta": text}


def encoder(family, config, dtype=jnp.float32):
    return (ViT if family == "vit" else Bert)(config, dtype)


def theirs(family, config):
    """Hugging Face's model and what it takes."""
    model = flax_model(CLASSES[family], config, add_pooling_layer=False)

    def states(params, *inputs):
        if family == "vit":
            inputs = (jnp.moveaxis(inputs[0] / 255.0 * 2 - 1, 3, 1),)
        return model(*inputs, params=params).last_hidden_state

    return model, states


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedding_is_the_first_state(family, models_of, inputs):
    model, given = models_of[family], inputs[family]
    tokens = model.apply(*given, method="tokens")
    assert tokens.shape == (3, 5 if family == "vit" else LENGTH, WIDTH)
    np.testing.assert_array_equal(model.apply(*given), tokens[:, 0])


@needs_flax_classes
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_hugging_faces(family, activation, models_of, inputs):
    model, given = models_of[family], inputs[family]
    config = type(model.config)(**model.config.to_dict() | {"hidden_act": activation})
    ours = encoder(family, config)
    apply = lambda params: ours.apply({"params": params}, *given, method="tokens")  # noqa: E731
    states = theirs(family, config)[1]

    def graded(states):
        def value(params):
            out = states(params)
            return jnp.sum(jnp.sin(out + jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)

    (_, tokens), gradient = graded(apply)
    (_, expected), theirs_gradient = graded(lambda params: states(params, *given))
    np.testing.assert_allclose(tokens, expected, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs_gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest),
        gradient,
        theirs_gradient,
    )


@needs_flax_classes
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_hugging_faces_names_and_shapes(family, models_of):
    model = models_of[family]
    shapes = dict(theirs(family, model.config)[0].params_shape_tree)
    assert jax.tree.map(np.shape, model.params) == jax.tree.map(lambda x: x.shape, shapes)


def test_encoders_inside_a_model_keep_their_layout(models_of, inputs):
    class Both(nn.Module):
        parts: dict

        def __call__(self, inputs):
            return {name: part(*inputs[name]) for name, part in self.parts.items()}

    parts = {name: encoder(name, models_of[name].config) for name in ("vit", "bert")}
    given = {name: inputs[name] for name in parts}
    params = {f"parts_{name}": models_of[name].params for name in parts}
    out = Both(parts).apply({"params": params}, given)
    for name in parts:
        expected = models_of[name].apply(*inputs[name])
        np.testing.assert_allclose(out[name], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "config", "count"),
    [
        ("vit", ViTConfig(), 85_798_656),
        ("bert", BertConfig(), 108_891_648),
        (
            "roberta",
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
            124055040,
        ),
    ],
)
def test_published_sizes(family, config, count):
    """ViT-B/16, bert-base-uncased and roberta-base, each without pooling layer."""
    text = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    given = (image,) if family == "vit" else (text, text)
    shapes = jax.eval_shape(encoder(family, config).init, jax.random.key(0), *given)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_pixels_are_normalised_as_vits_processor_does(models_of, inputs):
    model, (images,) = models_of["vit"], inputs["vit"]
    pixels = images / np.float32(127.5) - np.float32(1)
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, (np.asarray(images) / 255 - 0.5) / 0.5, atol=1e-6)
    encode = ViT(model.config).apply
    variables = {"params": model.params}
    np.testing.assert_allclose(encode(variables, pixels), encode(variables, images), atol=1e-6)


def test_image_statistics_are_vits():
    constants = pytest.importorskip("transformers.image_utils")
    assert constants.IMAGENET_STANDARD_MEAN == constants.IMAGENET_STANDARD_STD == [0.5] * 3


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_changes_nothing(family, models_of, inputs):
    model, (ids, mask) = models_of[family], inputs[family]
    encode, variables = Bert(model.config).apply, {"params": model.params}
    out = encode(variables, ids, mask)
    np.testing.assert_allclose(encode(variables, ids[:1, :4], mask[:1, :4]), out[:1], atol=2e-5)
    longer = jnp.pad(ids, ((0, 0), (0, 1)), constant_values=1), jnp.pad(mask, ((0, 0), (0, 1)))
    np.testing.assert_allclose(encode(variables, *longer), out, atol=2e-5)
    np.testing.assert_array_equal(encode(variables, ids, mask.astype(bool)), out)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_longest_text_has_positions_and_no_longer_one(family, models_of):
    model = models_of[family]
    longest = max_text_length(model.config)
    assert longest == {"bert": 12, "roberta": 12 - 2}[family]
    encode, variables = Bert(model.config).apply, {"params": model.params}
    ids = jnp.full((1, longest + 1), 5)
    assert np.isfinite(encode(variables, ids[:, 1:], ids[:, 1:] > 0)).all()
    with pytest.raises(UserError, match=f"{longest + 1} tokens is too long"):
        encode(variables, ids, ids > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout(family, inputs):
    module = encoder(family, tiny(family, dropout=0.3))
    given = inputs[family]
    variables = module.init(jax.random.key(0), *given)
    still = module.apply(variables, *given)

    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, *given, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(train(1), train(1))
    for other in (still, train(2)):
        assert np.abs(train(1) - other).max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_computes_near_float32(family, models_of, inputs):
    model, given = models_of[family], inputs[family]
    full, half = (
        encoder(family, model.config, dtype).apply({"params": model.params}, *given)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.bfloat16
    half = half.astype(jnp.float32)
    norms = jnp.linalg.norm(full, axis=1) * jnp.linalg.norm(half, axis=1)
    assert (jnp.sum(full * half, axis=1) / norms).min() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter(family, models_of, inputs):
    model, given = models_of[family], inputs[family]

    def loss(params):
        return jnp.sum(encoder(family, model.config).apply({"params": params}, *given)[:, 0])

    flat = flatten_dict(jax.grad(loss)(model.params), sep="/")
    dead = [name for name, g in flat.items() if not np.abs(g).max() > 0]
    # Keys' biases shift every logit of a softmax alike.
    assert all(name.endswith("key/bias") for name in dead)


def test_small_vit_starts_with_matrices_of_the_usual_size(inputs):
    config = tiny("vit", width=64)
    params = ViT(config).init(jax.random.key(0), *inputs["vit"])["params"]
    query = params["encoder"]["layer"]["0"]["attention"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(np.std(query), 0.02, rtol=0.1)


@pytest.mark.parametrize("layout", [*LAYOUTS, "torch with prefix", "sharded with prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_load_in_every_layout(tmp_path, family, layout, models_of):
    model = models_of[family]
    layout, _, prefix = layout.partition(" with ")
    save_checkpoint(model, tmp_path, layout=layout, prefix=f"{family}." if prefix else "")
    config, params = load_encoder(str(tmp_path))
    assert type(config) is type(model.config)
    assert encoder_config(str(tmp_path)).to_dict() == config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 for x in jax.tree.leaves(params))


def test_old_pytorch_names_of_the_layer_norm_load(tmp_path, models_of):
    """bert-base-uncased's own file says gamma and beta, and has a head."""
    model = models_of["bert"]
    save_checkpoint(model, tmp_path, prefix="bert.")
    file = tmp_path / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in load_file(file).items()
    }
    renamed |= {"cls.predictions.bias": np.zeros(VOCABULARY, np.float32)}
    save_file(renamed, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_encoder(str(tmp_path))[1], model.params)


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_pooling_layer_and_head_are_left_out(tmp_path, models_of, layout):
    model = models_of["bert"]
    dense = {"kernel": np.ones((WIDTH, WIDTH), np.float32), "bias": np.ones(WIDTH, np.float32)}
    params = {"bert": model.params | {"pooler": {"dense": dense}}, "classifier": dense}
    save_checkpoint(dataclasses.replace(model, params=params), tmp_path, layout=layout)
    jax.tree.map(np.testing.assert_array_equal, load_encoder(str(tmp_path))[1], model.params)


@needs_flax_classes
@pytest.mark.parametrize("safe", [False, True])
def test_what_hugging_faces_class_wrote_is_read(tmp_path, models_of, safe):
    """With its pooling layer and head."""
    model = models_of["bert"]
    theirs = flax_model("FlaxBertForSequenceClassification", tiny("bert"))
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), dict(theirs.params_shape_tree))
    assert "pooler" in params["bert"]
    params["bert"] = dict(params["bert"]) | model.params
    theirs.save_pretrained(tmp_path, params=params, safe_serialization=safe)
    jax.tree.map(np.testing.assert_array_equal, load_encoder(str(tmp_path))[1], model.params)


def test_a_checkpoint_that_lacks_a_layer_is_refused(tmp_path, models_of):
    config = tiny("bert", layers=3)
    save_checkpoint(models_of["bert"], tmp_path)
    (tmp_path / "config.json").write_text(config.to_json_string())
    with pytest.raises(UserError, match=r"lacks 16 arrays .*encoder\.layer\.2"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, "no model.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "never unpickled"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "names no shards"),
        ({"config.json": "{", "model.safetensors": "x"}, "cannot load"),
        ({"config.json": '{"model_type": "new"}', "model.safetensors": "x"}, "cannot load.*new"),
        (
            {"config.json": json.dumps(CLIPConfig().to_dict()), "model.safetensors": "x"},
            "type 'clip', which is no known encoder; give one of the type bert",
        ),
        ({"config.json": tiny("vit").to_json_string(), "model.safetensors": "x"}, "cannot load"),
        ({"config.json": tiny("vit").to_json_string(), "flax_model.msgpack": "x"}, "cannot load"),
    ],
)
def test_unusable_checkpoints_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("read", [load_encoder, encoder_config])
@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder"])
def test_a_name_that_is_nowhere_is_one_sentence(read, name):
    with pytest.raises(UserError, match=f"cannot load a ViT, BERT or RoBERTa .* '{name}'") as error:
        read(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "modality"), [("vit", "text"), ("bert", "image")])
def test_an_encoder_of_the_other_modality(tmp_path, family, modality):
    (tmp_path / "config.json").write_text(tiny(family).to_json_string())
    with pytest.raises(UserError, match=f"type '{family}', which is no {modality} encoder"):
        encoder_config(str(tmp_path), modality=modality)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("vit", {"width": 15}, "model.width=15 is not a multiple of model.heads=2"),
        ("vit", {"image_size": 15}, "model.image_size=15"),
        ("bert", {"width": 15}, "model.width=15 is not a multiple of model.heads=2"),
    ],
)
def test_sizes_that_do_not_fit(family, sizes, message):
    with pytest.raises(UserError, match=message):
        tiny(family, **sizes)


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (1, 3, 8, 8), (1, 8, 8, 1)])
def test_images_of_another_size(shape, models_of):
    model = models_of["vit"]
    with pytest.raises(UserError, match="takes 8×8 images, not"):
        ViT(model.config).apply({"params": model.params}, jnp.zeros(shape))


TEXTS = ["A man is eating food.", "someone [SEP] eats </s> it", ""]


def bert_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "is", "eat", "##ing", "food", "."]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Fast(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return BertTokenizerFast.from_pretrained(folder)


def roberta_tokenizer(folder):
    tokenizer = Fast(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    RobertaTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return RobertaTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("make", [bert_tokenizer, roberta_tokenizer])
def test_tokenizer_of_a_checkpoint_is_read_as_transformers_does(tmp_path, make):
    theirs = make(tmp_path)
    ours = Tokenizer.from_pretrained_dir(pretrained_directory(str(tmp_path)))
    ids, mask = ours.encode(TEXTS[:1] + TEXTS[2:], 32)
    expected = theirs(TEXTS[:1] + TEXTS[2:], padding="max_length", max_length=ids.shape[1])
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert set(ids[:, 0]) == {theirs.cls_token_id}
    assert ours.pad_id == theirs.pad_token_id
    # A special token that a text spells does not become one.
    assert list(ours.encode(TEXTS[1:2], 64)[0][0]).count(ours.end_id) == 1
