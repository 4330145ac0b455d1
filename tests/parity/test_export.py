"""An exported run in PyTorch: its CLIP, its processor, and the code of its model card."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rcml_jax.cli.export import export_run
from rcml_jax.data.images import to_array
from rcml_jax.models.two_towers import TwoTowers, load_pretrained
from rcml_jax.training.checkpoint import read_params
from tests.parity.vocabulary import write_vocabulary
from tests.test_export import SENTENCES, TEXTS, write_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rcml(catalogue, tmp_path_factory):
    """(method, parameters, exported directory) of RCML, towers and tokenizer from scratch."""
    options = {"model__pooled_logit": 3.0, "model__pooled_prior": 1.5}
    return exported(catalogue, tmp_path_factory.mktemp("rcml"), **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A PyTorch CLIP with CLIP's own vocabulary, from before transformers 4.31."""
    folder = write_vocabulary(tmp_path_factory.mktemp("pretrained"))
    tokenizer = transformers.CLIPTokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text = sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(catalogue, checkpoint, tmp_path_factory):
    """The same of the CLIP baseline, started from the checkpoint."""
    options = {"model__pretrained": str(checkpoint), "model__max_length": 77}
    return exported(catalogue, tmp_path_factory.mktemp("clip"), method="clip", **options)


def exported(catalogue, folder, **options):
    method = write_run(catalogue, folder / "run", **options)
    export_run(folder / "run", folder / "exported")
    params = jax.tree.map(jnp.asarray, read_params(folder / "run"))
    return method, params, folder / "exported"


def item_images(method, count=5):
    """Images of items as files have them: of other sizes than the tower takes."""
    arrays = method.task.images(np.arange(count))
    sizes = [(40, 25), (16, 16), (31, 64), (17, 18), (200, 90)][:count]
    return [
        Image.fromarray(array).resize(size, Image.Resampling.BICUBIC)
        for array, size in zip(arrays, sizes, strict=True)
    ]


def arrays_of(method, items):
    return np.stack([to_array(image, method.task.images.size) for image in items])


def code_of(folder):
    """What the Python of a model card defines, run in the exported directory."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("run", ["rcml", "pretrained"])
@torch.no_grad()
def test_clip_model_and_processor(run, request):
    method, params, folder = request.getfixturevalue(run)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder, use_fast=False)
    items = item_images(method)
    inputs = processor(text=TEXTS, images=items, return_tensors="pt", padding=True, truncation=True)
    out = model(**inputs)
    ids, images = method.task.encode(TEXTS), arrays_of(method, items)
    towers = TwoTowers(load_pretrained(str(folder))[0])
    ours = towers.apply({"params": params["towers"]}, ids, images)
    np.testing.assert_allclose(ours["text"], out.text_embeds.numpy(), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours["image"], out.image_embeds.numpy(), atol=TOLERANCE, rtol=0)
    # The logits are those of the loss: cosines over the temperature.
    logits = ours["image"] @ ours["text"].T / method.temperature(params)
    np.testing.assert_allclose(logits, out.logits_per_image.numpy(), atol=1e-3, rtol=0)


def test_the_cards_code_gives_rcmls_embeddings(rcml, monkeypatch, capsys):
    method, params, folder = rcml
    monkeypatch.chdir(folder)
    names = code_of(folder)
    assert capsys.readouterr().out.startswith("tensor([[")  # what its example prints
    items = item_images(method)
    sentences = method.task.encode(SENTENCES)
    ids, images = method.task.encode(TEXTS), arrays_of(method, items)
    variables = {"params": params}
    ours = method.model.apply(variables, sentences, ids, images)
    text = names["embed"](names["text_tokens"](TEXTS), SENTENCES).numpy()
    image = names["embed"](names["image_tokens"](items), SENTENCES).numpy()
    np.testing.assert_allclose(text, ours["text"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(image, ours["image"], atol=TOLERANCE, rtol=0)
    # Under the intra-sample relation, which is another embedding.
    own = names["options"]["intra_relation"]
    assert own == method.task.sentence(-1)
    inputs = method.task.encode([own]), ids, images, jnp.array([True])
    ours = method.model.apply(variables, *inputs)
    text = names["embed"](names["text_tokens"](TEXTS), [own], intra=True).numpy()
    image = names["embed"](names["image_tokens"](items), [own], intra=True).numpy()
    np.testing.assert_allclose(text, ours["text"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(image, ours["image"], atol=TOLERANCE, rtol=0)
    other = names["embed"](names["text_tokens"](TEXTS), [own]).numpy()
    assert np.abs(text - other).max() > 100 * TOLERANCE


def test_the_cards_code_gives_a_baselines_embeddings(pretrained, monkeypatch):
    method, params, folder = pretrained
    monkeypatch.chdir(folder)
    names = code_of(folder)
    items = item_images(method)
    inputs = method.task.encode(TEXTS), arrays_of(method, items)
    ours = method.model.apply({"params": params["towers"]}, *inputs)
    for name, found in (
        ("text", names["embed_texts"](TEXTS)),
        ("image", names["embed_images"](items)),
    ):
        np.testing.assert_allclose(found.numpy(), ours[name], atol=TOLERANCE, rtol=0)


def test_clips_own_vocabulary_comes_back_as_clips_tokenizer(pretrained, checkpoint):
    method, _, folder = pretrained
    own = method.task.tokenizer
    texts = [*TEXTS, "été &amp; 漢字", "a <|endoftext|> b"]
    rows = zip(*own.encode(texts, 20), strict=True)
    ids = [row[mask.astype(bool)].tolist() for row, mask in rows]
    for name in ("CLIPTokenizerFast", "CLIPTokenizer", "AutoTokenizer"):
        tokenizer = getattr(transformers, name).from_pretrained(folder)
        # The slow one takes accents off, and knows no `split_special_tokens`.
        count = len(TEXTS) if name == "CLIPTokenizer" else len(texts)
        assert tokenizer(texts[:count], truncation=True)["input_ids"] == ids[:count], name
        assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (20, own.pad_id)
    assert isinstance(tokenizer, transformers.CLIPTokenizerFast)
    # The checkpoint had the old sign for the end token, 2.
    text = transformers.CLIPConfig.from_pretrained(folder).text_config
    assert text.eos_token_id == own.end_id == tokenizer.eos_token_id
    assert transformers.CLIPConfig.from_pretrained(checkpoint).text_config.eos_token_id == 2
    card = (folder / "README.md").read_text()
    assert f"from the checkpoint `{checkpoint.name}`" in card
    assert str(checkpoint.parent) not in card
