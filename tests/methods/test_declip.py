"""DeCLIP as a method: its terms, its second views under every text tower, and its parameters."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from rcml_jax.export.card import METHODS
from rcml_jax.methods import RELATIONAL, build
from rcml_jax.training.checkpoint import read_params
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.models.test_checkpoints import tiny_siglip
from tests.models.test_classification_encoders import tiny
from tests.tasks.test_towers import WORDS, save_tokenizer
from tests.toy import read_metrics, tiny_config
from tests.training.test_loop import assert_same_end, at, train

TERMS = {"clip", "simsiam", "masked_tokens", "multi_view", "nearest_neighbor"}


def opened(catalogue, folder, **options):
    """A method, a batch and its parameters, moved apart from where they start."""
    method = build(tiny_config(catalogue, method="declip", **options), folder)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    move = lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape)  # noqa: E731
    return method, batch, jax.tree.map(move, params)


def test_the_loss_is_the_mixture_of_its_terms(catalogue, tmp_path):
    weights = {"self_supervision": 0.1, "multi_view": 0.3, "nearest_neighbor": 0.2}
    options = {f"loss__declip__{name}": value for name, value in weights.items()}
    method, batch, params = opened(catalogue, tmp_path, **options)
    loss, terms = jax.jit(method.loss)(params, batch, jax.random.key(2), 0.0)
    assert set(terms) == TERMS
    own = 0.1 * (terms["simsiam"] + terms["masked_tokens"])
    expected = 0.4 * terms["clip"] + own + 0.3 * terms["multi_view"]
    np.testing.assert_allclose(loss, expected + 0.2 * terms["nearest_neighbor"], rtol=1e-5)
    # The views differ from what they are views of, and from step to step.
    assert terms["multi_view"] != terms["clip"]
    again = jax.jit(method.loss)(params, batch, jax.random.key(3), 0.0)[1]
    assert again["clip"] == terms["clip"]
    assert again["multi_view"] != terms["multi_view"]


def test_without_weights_it_is_clip(catalogue, tmp_path):
    zero = {f"loss__declip__{n}": 0.0 for n in ("self_supervision", "multi_view")}
    zero["loss__declip__nearest_neighbor"] = 0.0
    method, batch, params = opened(catalogue, tmp_path, **zero)
    plain = build(tiny_config(catalogue, method="clip"), tmp_path)
    found, slopes = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(
        params, batch, jax.random.key(2), 0.0
    )
    value, own = jax.jit(jax.value_and_grad(plain.loss, has_aux=True))(
        {"towers": params["towers"]}, batch, jax.random.key(2), 0.0
    )
    np.testing.assert_allclose(found[0], value[0], rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(close, slopes["towers"], own["towers"])
    heads = {name: slopes[name] for name in ("simsiam", "token_head")}
    assert all(np.all(x == 0) for x in jax.tree.leaves(heads))


def test_every_parameter_but_clips_scale_is_trained(catalogue, tmp_path):
    method, batch, params = opened(catalogue, tmp_path)
    grads = jax.jit(jax.grad(lambda *a: method.loss(*a)[0]))(params, batch, jax.random.key(2), 0.0)
    still = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(grads)
        if not np.any(x)
    }
    assert still == {"['towers']['logit_scale']"}
    assert not any(jax.tree.leaves(method.frozen(params)))


def test_frozen_towers_leave_the_heads_to_be_trained(catalogue, tmp_path):
    method, _, params = opened(catalogue, tmp_path, model__freeze="both")
    frozen = method.frozen(params)
    assert frozen["towers"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    heads = [frozen["simsiam"], frozen["token_head"]]
    assert not any(jax.tree.leaves(heads))


def options_of(tower, folder):
    """Options of a text tower; SigLIP's tokenizer has no start token, BERT's here no mask."""
    if tower == "bert":
        sizes = {"vocab_size": len(WORDS) + 4, "layers": 1, "max_length": 14}
        bert = make_model(tiny("bert", **sizes, pad_token_id=0))
        save_checkpoint(bert, folder / "bert", layout="flax")
        save_tokenizer(folder / "bert", "bert")
        return {"model__text_pretrained": str(folder / "bert")}
    if tower == "siglip":
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *WORDS]
        tokenizer = Fast(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))  # in the work directory: already fitted
        model = make_model(tiny_siglip(text={"vocab_size": len(words)}))
        save_checkpoint(model, folder / "siglip", layout="flax")
        return {"model__pretrained": str(folder / "siglip")}
    return {"clip": {}, "packed": {"batch__texts_per_row": 4}}[tower]


@pytest.mark.parametrize("tower", ["clip", "packed", "siglip", "bert"])
def test_the_second_text_under_every_tower(catalogue, tmp_path, tower):
    options = options_of(tower, tmp_path)
    method, batch, params = opened(catalogue, tmp_path, **options)
    found = jax.jit(method.embed)(params, batch, jax.random.key(2))
    shape = (4, 4) if tower == "packed" else (16,)
    assert found["token_loss"].shape == found["token_count"].shape == shape
    for side in ("text", "image"):
        first, second = found[side], found[f"{side}_view"]
        assert first.shape == second.shape
        assert first.shape[:-1] == shape
        np.testing.assert_allclose(jnp.linalg.norm(second, axis=-1), 1, rtol=1e-5)
        changed = np.abs(first - second).max(axis=-1) > 1e-6
        # Of packed texts 15% of a row's tokens are masked, which may spare one of them.
        assert changed.mean() > 0.5 if tower == "packed" or side == "image" else changed.all()
    count, loss = np.asarray(found["token_count"]), np.asarray(found["token_loss"])
    assert count.sum() >= 4
    assert np.all((loss > 0) == (count > 0))
    value, terms = method.objective(params, found, batch, 0.0)
    np.testing.assert_allclose(terms["masked_tokens"], loss.sum() / count.sum(), rtol=1e-5)
    assert np.isfinite(value)


def test_a_padding_row_counts_nowhere(catalogue, tmp_path):
    method, batch, params = opened(catalogue, tmp_path)
    found = jax.jit(method.embed)(params, batch, jax.random.key(2))
    valid = np.arange(16) < 11
    padded = {**batch, "shared": {**batch["shared"], "valid": valid}}
    short = {**batch, "shared": {**batch["shared"], "valid": valid[:11]}}
    whole, terms = method.objective(params, found, padded, 0.0)
    small, others = method.objective(params, {n: x[:11] for n, x in found.items()}, short, 0.0)
    np.testing.assert_allclose(whole, small, rtol=1e-5)
    for name in TERMS:
        np.testing.assert_allclose(terms[name], others[name], rtol=1e-4, err_msg=name)


def test_a_stopped_run_goes_on_to_the_bit_and_another_takes_its_towers(catalogue, tmp_path):
    options = {"steps": 6, "validate_every": 2, "log_every": 1}
    config = tiny_config(catalogue, method="declip", **options)
    assert train(config, tmp_path / "whole")
    assert not train(config, tmp_path / "stopped", after=at(3, signal.SIGTERM))
    assert train(config, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "whole", step=6)
    whole = read_params(tmp_path / "whole")
    assert set(whole) == {"towers", "simsiam", "token_head"}
    lines = [x for x in read_metrics(tmp_path / "whole") if x["kind"] == "train"]
    assert len(lines) == 6
    assert all(set(x) >= TERMS for x in lines)
    options["model__init_from"] = str(tmp_path / "whole")
    method = build(tiny_config(catalogue, method="rcml", **options), tmp_path / "whole")
    params = method.init(jax.random.key(0), next(method.batches()))
    adopted = method.adopt(params, whole)
    jax.tree.map(np.testing.assert_array_equal, adopted["towers"], whole["towers"])
    assert set(adopted) == {"towers", "head"}


def test_every_baseline_has_a_name_on_its_card():
    assert set(METHODS) == set(RELATIONAL)
