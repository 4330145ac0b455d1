"""The states of frozen towers: the same losses and tables with them as without, computed once."""

import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.schema import validate
from rcml_jax.tasks import stored_states
from rcml_jax.tasks.relations import RelationTask
from rcml_jax.tasks.towers import load_checkpoints
from tests.tasks.test_towers import WORDS, checkpoints  # noqa: F401
from tests.toy import tiny_config

CLOSE = {"rtol": 5e-3, "atol": 5e-3}  # float16 has 11 bits


def config_of(catalogue, folder, cache, towers, freeze, **options):
    """A configuration with checkpoints by `towers`, their states stored below `cache`."""
    names = {f"model.{k}": str(folder / v) for k, v in towers.items()}
    fixed = {"data.dir": str(cache), "model.freeze": freeze, "batch.image_shift": 0}
    options = {**fixed, **names, **options}
    return tiny_config(catalogue, **options)


@pytest.fixture(scope="module")
def towers_on_disk(checkpoints):  # noqa: F811
    """The checkpoints, and a tokenizer for the CLIP among them."""
    names = ["<pad>", "<start>", "<unused>", "<end>", *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Fast(models.WordLevel(vocabulary, unk_token="<unused>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoints / "clip" / "tokenizer.json"))
    return checkpoints


def random_params(method, batch):
    shapes = jax.eval_shape(method.init_params, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    return {**params, "towers": load_checkpoints(method.config.model, params["towers"])}


PAIR = {"text_pretrained": "bert", "image_pretrained": "vit"}


@pytest.mark.parametrize(
    ("method", "towers", "freeze", "options"),
    [
        ("rcml", PAIR, "both", {}),
        ("clip", PAIR, "text", {}),
        ("rcml", {"pretrained": "clip"}, "both", {}),
        # Texts that the image tower's items share rows with are not stored themselves.
        ("rcml", {"image_pretrained": "vit"}, "image", {"batch.texts_per_row": 2}),
    ],
)
def test_losses_gradients_and_tables_are_those_of_the_towers(
    catalogue, towers_on_disk, tmp_path, method, towers, freeze, options
):
    options = {"method": method, **options}
    plain, stored = (
        build(
            config_of(
                catalogue,
                towers_on_disk,
                tmp_path,
                towers,
                freeze,
                model__store_frozen=on,
                **options,
            ),
            tmp_path,
        )
        for on in (False, True)
    )
    batches = [next(x.batches()) for x in (plain, stored)]
    params = random_params(plain, batches[0])
    names = {"text": "ids", "image": "images"}
    for modality, name in names.items():
        is_stored = freeze in (modality, "both")
        assert (len(batches[1]["items"][name]) == 3) == is_stored, modality
    losses, grads = zip(
        *(
            jax.jit(jax.value_and_grad(x.loss, has_aux=True))(params, batch, jax.random.key(1), 0.0)
            for x, batch in zip((plain, stored), batches, strict=True)
        ),
        strict=True,
    )
    np.testing.assert_allclose(losses[0][0], losses[1][0], **CLOSE)
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-3 * max(np.abs(a).max(), 1e-2))
    if method == "clip":
        needed = np.ones((len(stored.task.sentences), 3), bool)
        assert set(stored.tables(params, np.arange(3), needed)) == {"plain", "added"}
    items = np.arange(5)
    for a, b in zip(*(x.tables(params, items).values() for x in (plain, stored)), strict=True):
        np.testing.assert_allclose(a.text, b.text, **CLOSE)
        np.testing.assert_allclose(a.image, b.image, **CLOSE)
    ours, theirs = (x.checkpoint_states(params, items) for x in (stored, plain))
    for modality, found in theirs[0].items():
        np.testing.assert_allclose(ours[0][modality], found, **CLOSE)


def test_a_second_run_reads_what_the_first_computed(
    catalogue, towers_on_disk, tmp_path, monkeypatch
):
    config = config_of(catalogue, towers_on_disk, tmp_path, PAIR, "both", model__store_frozen=True)
    first = build(config, tmp_path).stored
    files = sorted((tmp_path / "token_states").glob("*.npy"))
    assert [x.name.split("-")[1] for x in files] == ["image", "text"]
    monkeypatch.setattr(stored_states._Blocks, "block", None)
    again = build(config, tmp_path).stored
    for modality, states in first.items():
        for a, b in zip(states(np.arange(3)), again[modality](np.arange(3)), strict=True):
            np.testing.assert_array_equal(a, b)
    # Other texts, images or weights are other states.
    keys = {
        stored_states.params_digest({"a": np.zeros(2)}),
        stored_states.params_digest({"a": np.ones(2)}),
        stored_states.params_digest({"b": np.zeros(2)}),
        stored_states.params_digest({"a": np.zeros((2, 1))}),
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch.image_shift": 1}, "cannot be moved or mirrored; set config.batch.image_shift=0"),
        ({"model.init_from": "runs/other"}, "brings towers of its own, whose states are not"),
    ],
)
def test_what_stored_states_cannot_give(catalogue, towers_on_disk, tmp_path, options, message):
    options = {"model.store_frozen": True, **options}
    with pytest.raises(UserError, match=message):
        validate(config_of(catalogue, towers_on_disk, tmp_path, PAIR, "both", **options))


def test_declip_has_views_of_stored_states(catalogue, towers_on_disk, tmp_path):
    options = {"method": "declip", "model.store_frozen": True}
    with pytest.raises(UserError, match="no second view of stored image states"):
        build(config_of(catalogue, towers_on_disk, tmp_path, PAIR, "both", **options), tmp_path)
    config = config_of(catalogue, towers_on_disk, tmp_path, PAIR, "text", **options)
    method = build(config, tmp_path)
    batch = next(method.batches())
    params = random_params(method, batch)
    embedded = jax.jit(method.embed)(params, batch, jax.random.key(1))
    for modality in ("text", "image"):
        first, second = (embedded[name] for name in (modality, f"{modality}_view"))
        assert first.shape == second.shape
        assert np.abs(first - second).max() > 1e-3
    # A frozen text tower without its texts has no masked tokens to predict.
    assert not np.any(embedded["token_count"])
    loss, terms = method.loss(params, batch, jax.random.key(1), 0.0)
    assert np.isfinite(loss)
    assert terms["masked_tokens"] == 0
    assert terms["simsiam"] != 0


def test_texts_are_tokenized_once_or_in_every_batch(catalogue, tmp_path, capsys):
    """The same batches, whether token ids can be kept beside the prepared data or not."""
    config = tiny_config(catalogue, data__dir=str(tmp_path / "cache"))
    ids = tmp_path / "cache" / "token_ids"
    first = next(RelationTask.load(config, tmp_path).batches())
    assert len(list(ids.glob("*.npy"))) == 1
    shutil.rmtree(ids)
    ids.write_text("")
    second = next(RelationTask.load(config, tmp_path).batches())
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert "Texts are tokenized in every batch: cannot write" in capsys.readouterr().err
