"""Controls of classification against their twins, scikit-learn, and on planted data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rcml_jax.evaluation import class_controls, controls
from rcml_jax.evaluation.classification import measures
from tests import reference

NAMES = ("Dresses and Skirts", "Trousers", "Trousers Denim", "Accessories")


def test_the_largest_class_is_predicted_whatever_is_asked():
    found = class_controls.majority(np.array([2, 0, 2, 1]), 4, 3)
    np.testing.assert_allclose(found, [[0.25, 0.25, 0.5, 0]] * 3)
    rates = measures(found[:, :2] / found[:, :2].sum(1, keepdims=True), np.array([0, 1, 1]))
    assert rates["auc"] == 0.5


def test_class_words_are_those_of_the_twin():
    labels = np.array([0, 1, 1, 2, 2, 2, 3])
    texts = [
        "A dress", "a skirt and a DRESS", "blue trouser", "Denim trousers", "denim", "accessory",
        "", "nothing of the kind", "skirt with an accessory", "and of the or with",
    ]  # fmt: skip
    found = class_controls.class_word_probabilities(texts, NAMES, labels)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    counts = np.bincount(labels)
    expected = [reference.class_words(text, NAMES, counts) for text in texts]
    assert found.argmax(axis=1).tolist() == expected
    # All words of a class beat some of another's; without any word the largest class is left.
    assert expected == [0, 0, 1, 2, 2, 3, 2, 2, 3, 2]


def planted(rng, rows, features=6, classes=3):
    labels = rng.integers(classes, size=rows)
    centres = np.random.default_rng(7).normal(size=(classes, features))
    return centres[labels] + rng.normal(size=(rows, features)), labels


def test_the_loss_and_its_gradient_are_those_of_the_twin():
    rng = np.random.default_rng(0)
    x, y = planted(rng, 5, 3)
    w, b = rng.normal(size=(3, 3)), rng.normal(size=3)
    loss = lambda w, b: class_controls.regression_loss({"w": w, "b": b}, x, y, 2.5)  # noqa: E731
    twin = lambda w, b: reference.regression_loss(w, b, x, y, 2.5)  # noqa: E731
    np.testing.assert_allclose(loss(jnp.asarray(w), jnp.asarray(b)), twin(w, b), rtol=1e-5)
    found = jax.grad(loss, (0, 1))(jnp.asarray(w), jnp.asarray(b))
    for one, expected in zip(found, reference.gradient(twin, w, b), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("penalty", [100.0, 1.0])
def test_the_fit_is_that_of_scikit_learn(penalty):
    rng = np.random.default_rng(1)
    train, test = planted(rng, 90), planted(rng, 30)
    (found,), chosen = class_controls.linear_probabilities(
        train, test, [test[0]], 3, penalties=[penalty]
    )
    assert chosen == penalty
    mean, deviation = train[0].mean(0), train[0].std(0)
    model = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=1000)
    model.fit((train[0] - mean) / deviation, train[1])
    expected = model.predict_proba((test[0] - mean) / deviation)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_penalty_is_chosen_on_validation_alone():
    rng = np.random.default_rng(2)
    # 60 columns of noise beside 40 rows: little is learned without a strong penalty.
    widen = lambda x: np.concatenate([x, rng.normal(size=(len(x), 60)) * 3], axis=1)  # noqa: E731
    train, validation = ((widen(x), y) for x, y in (planted(rng, 40), planted(rng, 200)))
    train, validation = tuple(train), tuple(validation)
    rates = {}
    for penalty in class_controls.PENALTIES:
        (found,), _ = class_controls.linear_probabilities(
            train, validation, [validation[0]], 3, penalties=[penalty]
        )
        rates[penalty] = np.mean(found.argmax(axis=1) == validation[1])
    _, chosen = class_controls.linear_probabilities(train, validation, [], 3)
    assert rates[chosen] == pytest.approx(max(rates.values()), abs=0.011)
    assert rates[chosen] > min(rates.values()) + 0.02


def test_columns_that_are_constant_in_training_are_left_out():
    rng = np.random.default_rng(3)
    (x, y), (other, labels) = planted(rng, 60), planted(rng, 30)
    held_out = (other, labels)
    (plain,), _ = class_controls.linear_probabilities((x, y), held_out, [other], 3, penalties=[1.0])
    more = lambda x, value: np.concatenate([x, np.full((len(x), 1), value)], axis=1)  # noqa: E731
    (found,), _ = class_controls.linear_probabilities(
        (more(x, 1e4), y), (more(other, 5.0), labels), [more(other, -3e3)], 3, penalties=[1.0]
    )
    np.testing.assert_allclose(found, plain, atol=1e-4)
    dead = lambda x, value: np.concatenate([x, value * rng.normal(size=(len(x), 1))], axis=1)  # noqa: E731
    (found,), _ = class_controls.linear_probabilities(
        (dead(x, 1e-32), y), (dead(other, 1.0), labels), [dead(other, 1.0)], 3, penalties=[1.0]
    )
    np.testing.assert_allclose(found, plain, atol=1e-4)


def test_rows_gains_and_labels():
    rates = lambda value: {"accuracy": value, "macro_f1": value / 2}  # noqa: E731
    rows = {
        "majority": class_controls.row(rates(0.3), None),
        "linear_image": class_controls.row(rates(0.6), rates(0.7)),
    }
    summary = {"mean": 0.6, "std": 0.0, "values": [0.6]}
    assert rows["linear_image"]["classification"]["last"]["accuracy"] == summary
    assert rows["linear_image"]["validation"]["last"]["accuracy"]["mean"] == 0.7
    assert "validation" not in rows["majority"]
    result = {"classification": {"last": {"accuracy": {"mean": 0.5}}}}
    gain = class_controls.gain(result, rows)["classification"]
    assert gain == {
        "measure": "last/accuracy", "control": "linear_image", "gain": pytest.approx(-0.1),
    }  # fmt: skip
    listed = controls.rows_of({"a": [{"controls": rows}], "b": [{"controls": rows}]})
    assert [(m, label) for m, label, _ in listed] == [
        ("a", "largest class"),
        ("a", "logistic regression, image"),
    ]
