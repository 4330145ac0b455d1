import importlib.util
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from rcml_jax.errors import UserError
from rcml_jax.evaluation import CLOSED, LEARNERS
from rcml_jax.evaluation.learned_similarity import maps, networks, training
from rcml_jax.evaluation.learned_similarity.training import fit, search

NETWORKS = tuple(name for name in LEARNERS if name not in CLOSED)
#: Options that make a fit of a second.
TINY = {"width": 8, "batch_size": 16, "steps": 6, "validate_every": 3}
needs_optuna = pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="no optuna")


def planted(seed=0, images=60, width=(6, 6), noise=0.02, texts_each=1):
    """Texts that are a fixed linear map of their images, both far from the origin."""
    rng = np.random.default_rng(seed)
    mapping = np.random.default_rng(99).normal(size=width)
    image = rng.normal(size=(images, width[0]))
    rows = np.repeat(np.arange(images), texts_each)
    text = image[rows] @ mapping + noise * rng.normal(size=(len(rows), width[1]))
    return (image + 1).astype(np.float32), (text - 1).astype(np.float32), rows


def recall(model, image, text, rows):
    """Recall@1 of images for texts, by sorting."""
    return np.mean(np.argmax(model.score(image, text), axis=0) == rows)


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def prepared(x, rows):
    """The NumPy twin of what every learner does first."""
    x = unit(x)
    x = x - x[rows].mean(axis=0)
    return x / np.sqrt(np.mean(x[rows] ** 2))


def test_procrustes_recovers_a_planted_rotation():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(50, 5)) + 1
    rotation = scipy.linalg.qr(rng.normal(size=(5, 5)))[0]
    text = 3 * image @ rotation
    model = fit("procrustes", image, text, np.arange(50))
    np.testing.assert_allclose(model.params["rotation"], rotation, atol=1e-5)
    assert recall(model, image, text, np.arange(50)) == 1
    noisy = text + rng.normal(size=text.shape)
    model = fit("procrustes", image, noisy, np.arange(50))
    expected = scipy.linalg.orthogonal_procrustes(
        prepared(image, np.arange(50)), prepared(noisy, np.arange(50))
    )[0]
    np.testing.assert_allclose(model.params["rotation"], expected, atol=1e-5)


@pytest.mark.parametrize("width", [(6, 4), (4, 6)])
def test_procrustes_of_unequal_widths_is_an_isometry(width):
    rotation = fit("procrustes", *planted(width=width)).params["rotation"]
    assert rotation.shape == width
    gram = rotation.T @ rotation if width[0] > width[1] else rotation @ rotation.T
    np.testing.assert_allclose(gram, np.eye(4), atol=1e-5)


@pytest.mark.parametrize("texts_each", [1, 2])
def test_cca_finds_the_canonical_correlations(texts_each):
    image, text, rows = planted(width=(5, 4), noise=2, texts_each=texts_each)
    model = fit("cca", image, text, rows, options={"shrinkage": 0.0})
    x, y = prepared(image, rows)[rows], prepared(text, np.arange(len(text)))
    # Björck and Golub: the singular values of the product of orthonormal bases.
    expected = np.linalg.svd(np.linalg.qr(x)[0].T @ np.linalg.qr(y)[0], compute_uv=False)
    found = model.params["correlations"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    u, v = x @ np.asarray(model.params["image"]), y @ np.asarray(model.params["text"])
    for one, other in ((u, u), (v, v)):
        np.testing.assert_allclose(one.T @ other / len(x), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(u.T @ v / len(x), np.diag(found), atol=1e-4)
    weighted = [w * np.asarray(found) for w in (u, v)]
    twin = unit(weighted[0]) @ unit(weighted[1]).T
    np.testing.assert_allclose(model.score(image[rows], text), twin, atol=1e-4)
    best = fit("cca", image, text, rows, options={"shrinkage": 0.0, "width": 2})
    np.testing.assert_allclose(best.params["correlations"], found[:2])


def test_moments_are_added_up_in_blocks(monkeypatch):
    data = planted(width=(5, 4), texts_each=2)
    whole = fit("cca", *data)
    monkeypatch.setattr("rcml_jax.evaluation.learned_similarity.maps.CHUNK", 7)
    parts = fit("cca", *data)
    np.testing.assert_allclose(parts.score(*data[:2]), whole.score(*data[:2]), atol=1e-5)


@pytest.mark.parametrize("name", ["bilinear", "two_tower", "attention", "cca"])
def test_a_planted_map_is_learned(name):
    options = {"width": 16, "batch_size": 32, "steps": 200, "validate_every": 100, "tokens": 2}
    options["learning_rate"] = 1e-2
    train, validation, test = (planted(seed, n, (24, 20)) for seed, n in enumerate((300, 60, 60)))
    model = fit(name, *train, validation, options=options)
    assert recall(model, *test) > 0.9
    assert model.best["mrr"] > 0.9
    assert model.history[-1]["mrr"] > 0.9


def untrained(name, image, text, rows):
    """A learner before its training: nothing of it is zero but biases and the bilinear matrix."""
    options = networks.read_options(name, TINY | {"tokens": 2})
    widths = image.shape[1], text.shape[1]
    params = networks.initial(name, jax.random.key(0), *widths, options)
    prepare = maps.fit_preparation(image, text, rows)
    return training.Learned(name, options, params, prepare, [], None)


@pytest.mark.parametrize("name", ["mlp_mse", "attention"])
def test_pair_scores_in_blocks_are_those_of_each_pair(name, monkeypatch):
    image, text, rows = planted(images=9, texts_each=2, width=(6, 5))
    model = untrained(name, image, text, rows)
    params = jax.tree.map(np.asarray, model.params)
    x, y = prepared(image, rows), prepared(text, np.arange(18))
    expected = np.zeros((9, 18))
    for i, j in np.ndindex(9, 18):
        if name == "mlp_mse":
            h = np.concatenate([x[i], y[j]])
            for layer in params["layers"][:-1]:
                h = np.maximum(h @ layer["w"] + layer["b"], 0)
            expected[i, j] = (h @ params["layers"][-1]["w"])[0]
            continue
        keys, values = (np.einsum("d,dtw->tw", x[i], params[k]) for k in ("key", "value"))
        queries, texts = (np.einsum("d,dtw->tw", y[j], params[k]) for k in ("query", "text"))
        weights = np.exp(queries @ keys.T / np.sqrt(8))
        weights /= weights.sum(axis=1, keepdims=True)
        expected[i, j] = np.mean(np.sum(weights * (unit(texts) @ unit(values).T), axis=1))
    plain = jax.jit(networks.matrix, static_argnums=0)(
        name, model.params, *map(jnp.asarray, (x, y))
    )
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    np.testing.assert_allclose(model.score(image, text), expected, atol=1e-5)
    # Two rows at a time, then one: the number is read when a new shape is traced.
    for images, numbers in ((5, 2 * 8 * 18), (4, 1)):
        monkeypatch.setattr(networks, "PAIR_NUMBERS", numbers)
        np.testing.assert_allclose(model.score(image[:images], text), expected[:images], atol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_embedding_gives_the_score(name):
    if name == "optimal_transport":
        pytest.importorskip("ott", reason="needs the extra alignment")
    data = planted(images=20)
    model = fit(name, *data) if name in CLOSED else untrained(name, *data)
    image, text = data[0][:5], data[1][:7]
    scores = model.score(image, text)
    assert scores.shape == (5, 7)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(model.score)(image, text), scores, atol=1e-5)
    if model.embeds:
        product = model.embed_image(image) @ model.embed_text(text).T
        # The inverse root of a kernel makes rounding larger.
        np.testing.assert_allclose(product, scores, atol=1e-5 if name == "kernel_cca" else 1e-6)
    else:
        with pytest.raises(UserError, match=f"{name} scores pairs and has no embedding"):
            model.embed_image(image)
    with pytest.raises(UserError, match=rf"text has shape \(7, 5\); {name} was fitted on \(rows"):
        model.score(image, text[:, :5])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_finite_and_not_zero(name, dropout):
    params = untrained(name, *planted()).params
    prepare = {k: {"mean": jnp.ones(6), "scale": jnp.float32(0.1)} for k in ("image", "text")}
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(5, 6)).astype(np.float32) for _ in range(2))
    # A row that is all zero once prepared, the same row twice, and two texts of one image.
    x[0] = y[0] = 0
    x[2] = x[1]
    same = np.eye(5, dtype=bool)
    same[1, 2] = same[2, 1] = True

    @jax.jit
    def gradient(params):
        loss = partial(networks.loss, dropout=dropout)
        return jax.grad(loss, argnums=1)(name, params, prepare, x, y, same, jax.random.key(1))

    leaves = jax.tree.leaves(gradient(params))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)
    assert max(jnp.abs(leaf).max() for leaf in leaves) > 0


@pytest.mark.parametrize("name", ["mlp_mse", "mlp_cosine"])
def test_squared_errors_are_against_their_targets(name):
    image, text, rows = planted(images=3, texts_each=2)
    prepare = maps.fit_preparation(image, text, rows)
    x, y = (maps.prepared(prepare[k], v) for k, v in (("image", image[rows]), ("text", text)))
    params = untrained(name, image, text, rows).params
    same = rows[:, None] == rows
    # As many negatives as it takes to have seen each shift about equally often.
    loss = jax.jit(partial(networks.loss, name, negatives=5000))
    found = loss(params, prepare, x, y, same, jax.random.key(0))
    targets = same if name == "mlp_mse" else unit(image[rows]) @ unit(text).T
    scores = jax.jit(networks.matrix, static_argnums=0)(name, params, x, y)
    errors = (np.asarray(scores) - targets) ** 2
    others = errors[~np.eye(6, dtype=bool)]
    assert found == pytest.approx(others.mean(), rel=0.05)


def test_the_seed_makes_the_result():
    data, validation = planted(), planted(seed=1)
    options = TINY | {"dropout": 0.2}
    runs = [
        fit("two_tower", *data, validation, options=options, seed=seed).history
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_early_stopping_takes_the_best_back(monkeypatch):
    measures = iter([0.1, 0.3, 0.5, 0.4, 0.5, 0.2, 0.9])
    seen = []

    def validate(name, params, *arrays):
        seen.append(params)
        return {"mrr": next(measures), "recall@1": 0.0}

    monkeypatch.setattr(training, "_validate", validate)
    data = planted()
    model = fit("bilinear", *data, data, options=TINY | {"steps": 100, "patience": 3})
    assert [entry["mrr"] for entry in model.history] == [0.1, 0.3, 0.5, 0.4, 0.5, 0.2]
    assert [entry["step"] for entry in model.history] == [0, 3, 6, 9, 12, 15]
    assert model.best == model.history[2]
    np.testing.assert_array_equal(model.params["w"], seen[2]["w"])
    assert (seen[2]["w"] != seen[5]["w"]).any()


def test_the_measure_counts_ties_against_the_model(monkeypatch):
    scores = jnp.asarray([[3.0, 1.0, 1.0], [2.0, 1.0, 0.0], [0.0, 0.0, jnp.nan]])
    monkeypatch.setattr(networks, "score", lambda *arguments: scores)
    # Images in rows; image 2 has no text. Texts: 0 first of three, 1 tied with image 0, 2 behind
    # image 0 and the NaN. Images: 0 has text 0, 1 has texts 1 and 2, the better of them behind 0.
    found = training._validate("x", {}, {}, np.zeros((3, 1)), np.zeros((3, 1)), np.array([0, 1, 1]))
    forward, backward = (1 + 1 / 2 + 1 / 3) / 3, (1 + 1 / 2) / 2
    assert found["mrr"] == pytest.approx((forward + backward) / 2)
    assert found["recall@1"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_validation_takes_some_texts_with_their_images():
    image, text, rows = planted(images=10, texts_each=3)
    x, y, own = training._some(image, text, rows, 7, seed=0)
    assert len(y) == 7
    assert sorted(set(own)) == list(range(len(x)))
    for row, vector in zip(own, y, strict=True):
        (place,) = np.flatnonzero((text == vector).all(axis=1))
        np.testing.assert_array_equal(x[row], image[rows[place]])


def test_the_best_of_a_grid_is_kept(monkeypatch):
    data, validation = planted(width=(8, 6), noise=0.5), planted(seed=1, width=(8, 6), noise=0.5)
    monkeypatch.setitem(training.GRIDS, "cca", {"shrinkage": (0.999, 0.01)})
    tried = [fit("cca", *data, validation, options={"shrinkage": s}) for s in (0.999, 0.01)]
    figures = [model.best["mrr"] for model in tried]
    assert figures[0] != figures[1]
    best = tried[int(np.argmax(figures))].options
    assert training.fit_best("cca", *data, validation).options == best
    given = training.fit_best("cca", *data, validation, options={"shrinkage": 0.5})
    assert given.options.shrinkage == 0.5
    assert training.fit_best("procrustes", *data, validation).best["mrr"] > 0


def test_pairs_are_drawn_images_first_and_more_contain_fewer():
    image, text, rows = planted(images=10, texts_each=3)
    draw = partial(training.draw_pairs, image, text, rows)
    found = {n: draw(n, seed=1) for n in (4, 10, 14, 30)}
    texts = {n: {tuple(t) for t in y} for n, (_, y, _) in found.items()}
    assert texts[4] < texts[10] < texts[14] < texts[30]
    assert [len(x) for x, _, _ in found.values()] == [4, 10, 10, 10]
    for n, (x, y, own) in found.items():
        assert len(y) == len(own) == n
        for vector, row in zip(y, own, strict=True):
            (place,) = np.flatnonzero((text == vector).all(axis=1))
            np.testing.assert_array_equal(x[row], image[rows[place]])
    assert texts[4] != {tuple(t) for t in draw(4, seed=2)[1]}
    with pytest.raises(UserError, match="31 pairs cannot be drawn from 30"):
        draw(31, seed=0)


def test_the_sigmoid_learner_scores_its_logit():
    model = untrained("two_tower_sigmoid", *planted())
    image, text, _ = planted()
    towers = untrained("two_tower", *planted())
    params = {k: v for k, v in model.params.items() if k != "bias"}
    cosines = networks.score("two_tower", params, towers.prepare, image, text)
    expected = np.exp(params["log_scale"]) * np.asarray(cosines) - 10
    np.testing.assert_allclose(model.score(image, text), expected, atol=1e-4)
    assert (expected < 0).mean() > 0.5


def test_batches_go_through_all_pairs():
    batches = training._endless_batches(np.random.default_rng(0), 10, 3)
    passes = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(2)]
    assert all(len(set(one)) == 9 for one in passes)
    assert (passes[0] != passes[1]).any()


@needs_optuna
def test_search_keeps_the_best_trial():
    data, validation = planted(), planted(seed=1)
    space = {"width": [4, 8], "depth": (0, 1)}
    runs = [
        search(
            "two_tower", *data, validation, trials=2, options=TINY | {"dropout": 0.1}, space=space
        )
        for _ in range(2)
    ]
    assert runs[0].trials == runs[1].trials
    assert len(runs[0].trials) == 2
    for trial in runs[0].trials:
        assert set(trial["options"]) == {"width", "depth", "learning_rate"}
    best = max(runs[0].trials, key=lambda trial: trial["mrr"])
    assert runs[0].best.best["mrr"] == best["mrr"]
    for key, value in best["options"].items():
        assert getattr(runs[0].best.options, key) == value


@needs_optuna
def test_search_prunes_trials_that_start_badly():
    data, validation = planted(), planted(seed=1)
    options = TINY | {"steps": 18, "validate_every": 2, "depth": 0, "dropout": 0.0}
    space = {"width": [8], "learning_rate": (1e-6, 1.0)}
    told = []
    found = search(
        "two_tower", *data, validation, trials=8, options=options, space=space, note=told.append
    )
    assert told == list(range(1, 9))
    assert {trial["pruned"] for trial in found.trials} == {False, True}
    kept = [trial["mrr"] for trial in found.trials if not trial["pruned"]]
    assert found.best.best["mrr"] == max(kept)


def test_a_note_ends_a_training():
    entries = []

    def stop(entry):
        entries.append(entry)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fit("two_tower", *planted(), planted(seed=1), options=TINY, note=stop)
    assert [entry["step"] for entry in entries] == [3]


@needs_optuna
def test_a_trial_that_diverges_counts_as_0(monkeypatch, capsys):
    import optuna

    level = optuna.logging.get_verbosity()
    data, calls = planted(), []

    original = training._fit

    def sometimes(name, options, *rest):
        calls.append(options)
        if len(calls) == 1 or options.steps == 1:
            raise training.Diverged("the loss is not finite")
        return original(name, options, *rest)

    monkeypatch.setattr(training, "_fit", sometimes)
    found = search("cca", *data, data, trials=2)
    assert found.trials[0]["mrr"] == 0 < found.trials[1]["mrr"]
    with pytest.raises(UserError, match="cca was not finite in any trial"):
        search("cca", *data, data, trials=2, options={"steps": 1})
    assert optuna.logging.get_verbosity() == level
    assert capsys.readouterr() == ("", "")


def test_without_optuna_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r'pip install "rcml_jax\[search\]"'):
        search("cca", *planted(), planted())


def test_a_loss_that_is_not_finite_is_said():
    data = planted()
    with pytest.raises(UserError, match="loss of mlp_mse is not finite at step 3; lower learning"):
        fit("mlp_mse", *data, data, options=TINY | {"learning_rate": 1e30})


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("svm", {}, "learner 'svm' is unknown; choose one of mlp_mse"),
        ("bilinear", {"widht": 3}, "option 'widht' is unknown; choose among width, depth"),
        ("bilinear", {"width": 2.5}, "width=2.5 must be a whole number"),
        ("bilinear", {"learning_rate": "big"}, "learning_rate='big' must be a number"),
        ("mlp_mse", {"depth": 0}, "depth=0 must be at least 1"),
        ("two_tower", {"depth": -1}, "depth=-1 must be at least 0"),
        ("two_tower", {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ("two_tower", {"temperature": 0}, "temperature=0 must be above 0"),
        ("two_tower", {"weight_decay": -1}, "weight_decay=-1 must not be negative"),
        ("cca", {"shrinkage": 2}, "shrinkage=2 must be from 0 to 1"),
        ("cca", {"batch_size": 1}, "batch_size=1 must be at least 2"),
    ],
)
def test_options_that_cannot_be_are_said(name, options, sentence):
    with pytest.raises(UserError, match=sentence):
        fit(name, *planted(), planted(), options=options)


def test_data_that_cannot_be_fitted_is_said():
    image, text, rows = planted(width=(6, 4))
    with pytest.raises(UserError, match="bilinear needs validation="):
        fit("bilinear", image, text, rows)
    with pytest.raises(UserError, match="image has width 6 and text 4; project"):
        fit("mlp_cosine", image, text, rows, (image, text, rows))
    with pytest.raises(UserError, match="validation text has width 6 and training 4; they must"):
        fit("cca", image, text, rows, planted())
    with pytest.raises(UserError, match=r"^image_of_text is .* shape \(59,\)"):
        fit("cca", image, text, rows[1:])
    with pytest.raises(UserError, match=r"^validation: image_of_text\[0\] is 60, but image has"):
        fit("cca", image, text, rows, (image, text, rows + 60))
    with pytest.raises(UserError, match="rows of image all point the same way"):
        fit("cca", np.arange(1, 61)[:, None] * np.ones(6), text, rows)
    with pytest.raises(UserError, match="covariance of image is singular"):
        fit("cca", image[:3], text[:3], rows[:3], options={"shrinkage": 0.0})
    with pytest.raises(UserError, match="procrustes has nothing to search; fit it"):
        search("procrustes", image, text, rows, (image, text, rows))
    with pytest.raises(UserError, match="trials=0 must be at least 1"):
        search("cca", image, text, rows, (image, text, rows), trials=0)


@needs_optuna
def test_a_space_that_cannot_be_is_said():
    data = planted()
    with pytest.raises(UserError, match=r"space of width is \(8, 4\); give a list of choices"):
        search("cca", *data, data, space={"width": (8, 4)})
    with pytest.raises(UserError, match="option 'widht' is unknown"):
        search("cca", *data, data, space={"widht": [8]})
