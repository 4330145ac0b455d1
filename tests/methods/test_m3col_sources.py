"""M3CoL on encoders that other runs have trained, as one of each modality alone."""

import jax
import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.methods import build
from rcml_jax.models.towers.vit import small_vit_config
from rcml_jax.training import loop
from rcml_jax.training.checkpoint import read_params
from tests.data.imagetext import write_news
from tests.methods.m3col_data import news_config, omics_config, write_tables
from tests.models.checkpoints_on_disk import make_model, save_checkpoint

VIEWS = ("mrna", "methylation", "mirna")
SHORT = {"epochs": 3, "data.folds": 0, "loss.contrastive": "none", "loss.unimodal_weight": 0.0}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("data") / "tables")


@pytest.fixture(scope="module")
def alone(tables, tmp_path_factory):
    """The runs of each view alone, two seeds in each."""
    folder = tmp_path_factory.mktemp("runs")
    for view in VIEWS:
        config = omics_config(tables, **SHORT, **{"data.modalities": view})
        loop.train_and_evaluate(config, folder / view)
    return folder


def together(tables, alone, **options):
    runs = ",".join(str(alone / view) for view in VIEWS)
    return omics_config(tables, **SHORT | {"model.init_from": runs} | options)


def encoders(params):
    return {name: value for name, value in params.items() if name.startswith("encoders_")}


def test_frozen_encoders_are_those_of_the_runs(tables, alone, tmp_path):
    options = {"epochs": 12, "model.freeze": "encoders", "model.dropout": 0.5}
    config = together(tables, alone, **options)
    result = loop.train_and_evaluate(config, tmp_path / "run")
    params = read_params(tmp_path / "run")
    theirs = {f"encoders_{view}": read_params(alone / view)[f"encoders_{view}"] for view in VIEWS}
    jax.tree.map(np.testing.assert_array_equal, encoders(params), theirs)
    method = build(config, tmp_path / "run")
    before = method.init(None, next(method.batches()))
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, params["fusion"], before["fusion"])
    assert all(jax.tree.leaves(changed))
    # Two classes of equal size, seen by each view.
    assert result["classification"]["last"]["accuracy"]["mean"] > 0.7


def test_frozen_encoders_have_no_dropout_and_no_gradient(tables, alone, tmp_path):
    options = {"seeds": 1, "model.freeze": "encoders", "model.dropout": 0.5}
    method = build(together(tables, alone, **options), tmp_path)
    batch = method.prepare(next(method.batches()), jax.random.key(0))
    params = method.init(jax.random.key(1), batch)
    found = method.embed(params, batch, jax.random.key(2))["clean"]
    for name in VIEWS:
        expected = method.encode(params, name, batch["items"][name])
        np.testing.assert_array_equal(found[name], expected)
    grads = jax.grad(method.loss, has_aux=True)(params, batch, jax.random.key(2), 0.0)[0]
    assert not any(np.any(x) for x in jax.tree.leaves(encoders(grads)))
    assert all(np.any(x) for x in jax.tree.leaves(grads["fusion"]))
    assert all(jax.tree.leaves(encoders(method.frozen(params))))


def test_encoders_that_are_not_frozen_start_there(tables, alone, tmp_path):
    """One view's encoder is another run's, the others are random."""
    config = omics_config(tables, **SHORT, **{"model.init_from": str(alone / "mirna")})
    method = build(config, tmp_path)
    params = method.init(None, next(method.batches()))
    theirs = read_params(alone / "mirna")
    adopted = method.adopt(params, theirs)
    expected = {**params, "encoders_mirna": theirs["encoders_mirna"]}
    jax.tree.map(np.testing.assert_array_equal, adopted, expected)
    loop.train_and_evaluate(config, tmp_path / "run")
    after = read_params(tmp_path / "run")["encoders_mirna"]
    scaling = ("low", "range")
    for name, value in theirs["encoders_mirna"].items():
        moved = any(
            np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (value, after[name])), strict=True)
        )
        assert moved == (name not in scaling)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model.width": 8}, "its encoder of mrna has other sizes than this run's"),
        ({"seeds": 3}, "give the same model options and config.seeds to both"),
        ({"data.folds": 4}, "may bring encoders that have seen a held-out fold"),
        (
            {"model.init_from": "mirna", "model.freeze": "encoders"},
            "no encoder of mrna, methylation",
        ),
        ({"model.init_from": "mirna", "data.modalities": "mrna"}, "no encoder of mrna"),
        ({"model.init_from": "", "model.freeze": "encoders"}, "at its random values; name trained"),
        ({"model.init_from": "nowhere"}, "nowhere holds no checkpoints"),
    ],
)
def test_encoders_that_cannot_be_taken(tables, alone, tmp_path, options, said):
    if options.get("model.init_from") == "mirna":
        options = options | {"model.init_from": str(alone / "mirna")}
    with pytest.raises(UserError, match=said):
        loop.train_and_evaluate(together(tables, alone, **options), tmp_path / "run")


def test_a_pretrained_encoder_needs_no_run(tmp_path):
    """The image's is a checkpoint's and the text's another run's; both are frozen."""
    news = write_news(tmp_path / "data")
    sizes = small_vit_config(width=16, layers=1, heads=2, image_size=16, patch_size=8)
    save_checkpoint(make_model(sizes, seed=3), tmp_path / "vit", layout="flax")
    options = {"epochs": 1, "loss__contrastive": "none", "data__patch_size": 4}
    text = news_config(news, **options, data__modalities="text")
    loop.train_and_evaluate(text, tmp_path / "text")
    options |= {"model__image_pretrained": str(tmp_path / "vit"), "model__freeze": "encoders"}
    with pytest.raises(UserError, match="leaves the encoder of text at its random values"):
        loop.train_and_evaluate(news_config(news, **options), tmp_path / "none")
    options["model__init_from"] = str(tmp_path / "text")
    method = build(news_config(news, **options), tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    theirs = read_params(tmp_path / "text")
    expected = {**params, "encoders_text": theirs["encoders_text"]}
    jax.tree.map(np.testing.assert_array_equal, method.adopt(params, theirs), expected)


def test_a_text_encoder_that_has_learned_other_tokens_is_refused(tmp_path):
    news = write_news(tmp_path / "data")
    options = {"epochs": 1, "loss__contrastive": "none", "data__modalities": "text"}
    loop.train_and_evaluate(news_config(news, **options), tmp_path / "text")
    options |= {"model__init_from": str(tmp_path / "text")}
    loop.train_and_evaluate(news_config(news, **options), tmp_path / "same")
    other = news_config(news, **options, data__text="abstract")
    with pytest.raises(UserError, match="splits texts into other tokens"):
        loop.train_and_evaluate(other, tmp_path / "other")
