"""RCML and its baselines with another text or image tower: sizes, checkpoints, what is trained."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers, pre_tokenizers

from rcml_jax.cli.commands import load_config_file
from rcml_jax.data.images import Framing
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.models.backbones import load_encoder
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.models.two_towers import PairConfig, load_pretrained
from rcml_jax.tasks.towers import (
    Inputs,
    frozen_parts,
    inputs,
    load_checkpoints,
    towers_config,
)
from rcml_jax.training import loop
from rcml_jax.training.checkpoint import read_params
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.models.test_checkpoints import tiny_siglip
from tests.models.test_classification_encoders import tiny
from tests.toy import CONFIG, KINDS, PLACES, read_metrics, tiny_config

WORDS = ["both", ".", *(f"kind{k}" for k in range(KINDS)), *(f"place{p}" for p in range(PLACES))]
SPECIAL = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "roberta": ["<s>", "<pad>", "</s>", "<u>"]}
UNKNOWN = {"bert": "[UNK]", "roberta": "<u>"}


def save_tokenizer(folder, family):
    vocabulary = {word: i for i, word in enumerate(SPECIAL[family] + WORDS)}
    tokenizer = Fast(models.WordPiece(vocabulary, unk_token=UNKNOWN[family]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories of a tiny BERT, RoBERTa, ViT and CLIP, as Hugging Face saved them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"vocab_size": len(WORDS) + 4, "layers": 1, "max_length": 14}
    clip = {"width": 8, "layers": 1, "heads": 2, "embed_dim": 12, "image_size": 24, "patch_size": 8}
    clip = small_clip_config(vocab_size=40, eos_token_id=3, max_length=12, **clip)
    towers = {
        "bert": tiny("bert", **sizes, pad_token_id=0),
        "roberta": tiny("roberta", **sizes),
        "vit": tiny("vit", width=24, layers=1, image_size=12),
        "clip": clip,
    }
    for name, config in towers.items():
        model = make_model(config, shake=lambda noise: 0.1 * noise)
        save_checkpoint(model, folder / name, layout="flax")
    for family in SPECIAL:
        save_tokenizer(folder / family, family)
    return folder


def model_of(checkpoints, **names):
    """`config.model` with checkpoints by their names."""
    values = {f"model.{key}": str(checkpoints / name) for key, name in names.items()}
    return tiny_config("anywhere", **values).model


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_configuration_file_freezes_what_is_given():
    for options, freeze in (("", ""), (",text=x", "text"), (",image=x", "image")):
        assert load_config_file(f"{CONFIG}:openmoji{options}").model.freeze == freeze
    config = load_config_file(f"{CONFIG}:folder,path=x,text=minilm,image=y")
    assert config.model.freeze == "both"
    assert (config.model.text_pretrained, config.model.image_pretrained) == ("minilm", "y")
    assert load_config_file(f"{CONFIG}:grocery,text=minilm").model.max_length == 32


def test_the_checkpoints_say_what_the_towers_take(checkpoints):
    ask = lambda **names: inputs(model_of(checkpoints, **names))  # noqa: E731
    bert, clip = str(checkpoints / "bert"), str(checkpoints / "clip")
    assert ask() == Inputs("", "CLIP", Framing(16), 16)
    assert ask(pretrained="clip") == Inputs(clip, "CLIP or SigLIP", Framing(24), 12)
    assert ask(text_pretrained="bert") == Inputs(bert, "BERT or RoBERTa", Framing(16), 14)
    assert ask(text_pretrained="roberta")[2:] == (Framing(16), 12)
    assert ask(image_pretrained="vit") == Inputs("", "CLIP", Framing(12), 16)
    both = {"pretrained": "clip", "text_pretrained": "bert"}
    assert ask(**both) == Inputs(bert, "BERT or RoBERTa", Framing(24), 14)
    found = ask(pretrained="clip", image_pretrained="vit")
    assert found == Inputs(clip, "CLIP or SigLIP", Framing(12), 12)
    assert ask(text_pretrained="bert", image_pretrained="vit")[2:] == (Framing(12), 14)


def tokenizer_of(checkpoints, family):
    return Tokenizer.from_pretrained_dir(checkpoints / family)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_pair_is_clip_with_one_tower_replaced(checkpoints, family):
    """RoBERTa's texts end in the id 2, which CLIP's text tower may not have."""
    model = model_of(checkpoints, text_pretrained=family)
    config = towers_config(model, tokenizer_of(checkpoints, family))
    assert isinstance(config, PairConfig)
    assert config.text_config.model_type == family
    assert config.vision_config.model_type == "clip_vision_model"
    assert (config.vision_config.image_size, config.projection_dim) == (16, 16)
    assert frozen_parts(config, "both") == {"text_model", "vision_model"}
    assert frozen_parts(config, "text") == {"text_model"}


def test_a_tower_of_a_pretrained_clip_is_replaced(checkpoints):
    names = {"pretrained": "clip", "text_pretrained": "bert"}
    model = model_of(checkpoints, **names)
    config = towers_config(model, tokenizer_of(checkpoints, "bert"))
    assert (config.vision_config.hidden_size, config.projection_dim) == (8, 12)
    random = {"text_model": 1, "text_projection": 2, "vision_model": 3, "visual_projection": 4}
    found = load_checkpoints(model, random)
    clip = load_pretrained(str(checkpoints / "clip"))[1]
    same(found["vision_model"], clip["vision_model"])
    same(found["visual_projection"], clip["visual_projection"])
    same(found["text_model"], load_encoder(str(checkpoints / "bert"))[1])
    assert found["text_projection"] == 2
    assert set(found) == set(random)
    # Without a replacement all of it is CLIP's.
    whole = load_checkpoints(model_of(checkpoints, pretrained="clip"), dict.fromkeys(clip))
    same(whole, clip)


def test_clips_projections_are_frozen_with_their_towers():
    config = small_clip_config(vocab_size=8, eos_token_id=3)
    assert frozen_parts(config, "") == set()
    assert frozen_parts(config, "image") == {"vision_model", "visual_projection"}


@pytest.mark.parametrize("option", [{"vocab_size": 20}, {"pad_token_id": 1}])
def test_a_tokenizer_of_another_model(checkpoints, tmp_path, option):
    sizes = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0} | option
    tiny("bert", **sizes).save_pretrained(tmp_path)
    model = tiny_config("anywhere", model__text_pretrained=str(tmp_path)).model
    wrong = "has 28 ids, its text tower embeds 20|pads with token 0, its text tower with 1"
    with pytest.raises(UserError, match=f"the tokenizer of .* ({wrong}); save both again"):
        towers_config(model, tokenizer_of(checkpoints, "bert"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            small_clip_config(vocab_size=20, eos_token_id=3),
            r"the tokenizer of .* has 28 ids, its text tower embeds 20; save both again into one",
        ),
        (
            small_clip_config(vocab_size=40, eos_token_id=7),
            r"ends a text at token 7, its tokenizer with token 3; give both the same end token",
        ),
        (
            tiny_siglip(text={"vocab_size": 20}),
            r"the tokenizer of .* has 28 ids, its text tower embeds 20; save both again into one",
        ),
    ],
)
def test_a_tokenizer_that_does_not_belong_to_clip_or_siglip(checkpoints, tmp_path, config, message):
    config.save_pretrained(tmp_path)
    model = tiny_config("anywhere", model__pretrained=str(tmp_path)).model
    with pytest.raises(UserError, match=message):
        towers_config(model, tokenizer_of(checkpoints, "bert"))


def test_the_oldest_clip_ends_a_text_at_the_largest_id(checkpoints, tmp_path):
    """Its config.json says 2, whatever the tokenizer's end token is."""
    config = small_clip_config(vocab_size=4, eos_token_id=3)
    config.text_config.eos_token_id = 2
    config.save_pretrained(tmp_path)
    model = tiny_config("anywhere", model__pretrained=str(tmp_path)).model
    tokens = Fast(models.WordLevel({"<pad>": 0, "<start>": 1, "<unused>": 2, "<end>": 3}, "<pad>"))
    assert towers_config(model, Tokenizer(tokens)).text_config.vocab_size == 4
    config.text_config.vocab_size = 50
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ends a text at token 49, its tokenizer with token 3"):
        towers_config(model, Tokenizer(tokens))


def test_siglip_takes_its_special_tokens_from_the_tokenizer(checkpoints, tmp_path):
    """The config.json of SigLIP's checkpoints has the ids of another tokenizer."""
    tiny_siglip(text={"eos_token_id": 49407, "pad_token_id": 9}).save_pretrained(tmp_path)
    model = tiny_config("anywhere", model__pretrained=str(tmp_path)).model
    text = towers_config(model, tokenizer_of(checkpoints, "bert")).text_config
    assert (text.eos_token_id, text.pad_token_id) == (3, 0)


def test_a_tower_of_the_other_modality_is_refused(checkpoints):
    with pytest.raises(UserError, match="type 'vit', which is no text encoder"):
        inputs(model_of(checkpoints, text_pretrained="vit"))
    with pytest.raises(UserError, match="type 'clip', which is no image encoder"):
        inputs(model_of(checkpoints, image_pretrained="clip"))


def matrices(towers, *names):
    """The matrices under those names of the towers; keys' biases have no gradient."""
    return [x for name in names for x in jax.tree.leaves(towers[name]) if x.ndim > 1]


@pytest.mark.slow
def test_rcml_learns_beside_a_frozen_bert(catalogue, checkpoints, tmp_path):
    bert = str(checkpoints / "bert")
    options = {"steps": 2, "validate_every": 2, "log_every": 1, "optimizer.warmup_steps": 0}
    options |= {"model.text_pretrained": bert, "model.freeze": "text"}
    config = tiny_config(catalogue, **options)
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert 0 <= result["retrieval"]["hit@5"]["avg"] <= 1
    lines = [x for x in read_metrics(tmp_path / "run") if x["kind"] == "train"]
    assert len(lines) == 2
    assert all(np.isfinite(x["loss"]) and x["gradient_norm"] > 0 for x in lines)
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").vocab_size == len(WORDS) + 4

    method, end = build(config, tmp_path / "run"), read_params(tmp_path / "run")
    same(end["towers"]["text_model"], load_encoder(bert)[1])
    key = jax.random.split(jax.random.key(config.seed))[0]
    start = jax.jit(method.init_params)(key, next(method.batches()))
    names = ("text_projection", "vision_model", "visual_projection")
    before, after = (matrices(params["towers"], *names) for params in (start, end))
    # By more than another rounding.
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(before, after, strict=True))
    assert np.abs(end["head"]["output"] - np.eye(16)).max() > 1e-4


def test_clip_on_a_roberta_and_a_frozen_vit(catalogue, checkpoints, tmp_path):
    names = {"text": "roberta", "image": "vit"}
    options = {f"model.{k}_pretrained": str(checkpoints / v) for k, v in names.items()}
    options |= {"method": "clip", "model.freeze": "image"}
    method = build(tiny_config(catalogue, **options), tmp_path)
    batch = next(method.batches())
    assert batch["items"]["images"].shape == (16, 12, 12, 3)
    shapes = jax.eval_shape(method.init_params, jax.random.key(0), batch)["towers"]
    assert shapes["visual_projection"]["kernel"].shape == (24, 16)
    rng = np.random.default_rng(0)
    random = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    params = {"towers": load_checkpoints(method.config.model, random)}
    frozen = method.frozen(params)["towers"]
    assert {name for name, part in frozen.items() if all(jax.tree.leaves(part))} == {"vision_model"}
    assert not any(jax.tree.leaves({k: v for k, v in frozen.items() if k != "vision_model"}))

    grads = jax.jit(jax.grad(method.loss, has_aux=True))(params, batch, jax.random.key(1), 0.0)
    grads = grads[0]["towers"]
    assert not any(np.any(x) for x in jax.tree.leaves(grads["vision_model"]))
    trained = matrices(grads, "text_projection", "visual_projection", "text_model")
    assert all(np.abs(x).max() > 0 for x in trained)

    items = np.arange(4)
    needed = np.zeros((len(method.task.sentences), 4), bool)
    needed[3] = True
    tables = method.tables(params, items, needed)
    assert np.abs(tables["sentence"].text[3] - tables["plain"].text[0]).max() > 1e-3


def test_texts_share_a_row_in_clips_tower_alone(catalogue, checkpoints, tmp_path):
    options = {"model.text_pretrained": str(checkpoints / "bert"), "batch.texts_per_row": 2}
    with pytest.raises(UserError, match=r"texts_per_row above 1 is for CLIP's text tower"):
        build(tiny_config(catalogue, **options), tmp_path)


def test_towers_of_clip_are_not_taken_for_a_pair(catalogue, checkpoints, tmp_path):
    bert = str(checkpoints / "bert")
    method = build(tiny_config(catalogue, model__text_pretrained=bert), tmp_path)
    shapes = {"towers": {"text_model": np.zeros(3)}}
    ours = jax.eval_shape(method.init_params, jax.random.key(0), next(method.batches()))
    with pytest.raises(UserError, match="its towers have other sizes"):
        method.adopt(ours, shapes)
