import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rcml_jax.evaluation.relation_probes import fit_classifier, minimise


def problem(seed=0, examples=120, features=6):
    """Two overlapping classes; features of very different scale, one of them constant."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, features))
    y = (x[:, 0] - x[:, 1] + rng.normal(size=examples) > 0.4).astype(np.int32)
    x[:, -1] = 3.0
    return (x * [1, 100, 0.01, 1, 1, 1] + [0, 5, 0, -7, 0, 0]).astype(np.float32), y


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_the_linear_probe_is_logistic_regression(l2):
    x, y = problem()
    predict = fit_classifier(x, y, l2=l2)
    scaled = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
    model = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=1000).fit(scaled, y)
    other, _ = problem(seed=1, examples=2000)
    logits = model.decision_function((other - x.mean(axis=0)) / (x.std(axis=0) + 1e-6))
    agree = predict(other) == (logits > 0)
    # Only where the decision hangs on rounding may the two differ.
    assert agree[np.abs(logits) > 1e-2].all()
    assert 0.4 < np.mean(logits > 0) < 0.7 or l2 == 30.0
    accuracy = np.mean(predict(x) == y)
    assert accuracy == pytest.approx(model.score(scaled, y), abs=1 / len(y))
    assert accuracy > 0.7


def test_minimise_finds_the_coefficients_of_logistic_regression():
    x, y = problem()
    x = ((x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)).astype(np.float32)

    def loss(params):
        margin = (2 * y - 1) * (x @ params["w"] + params["b"])
        return (jnp.sum(jax.nn.softplus(-margin)) + jnp.sum(params["w"] ** 2) / 2) / len(y)

    found = minimise(loss, {"w": jnp.zeros(6), "b": jnp.zeros(())}, steps=200, tolerance=1e-6)
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(found["w"], model.coef_[0], atol=2e-3)
    np.testing.assert_allclose(found["b"], model.intercept_[0], atol=2e-3)


def test_minimise_stops_at_the_number_of_steps():
    loss = lambda x: jnp.sum((x - 3.0) ** 4)  # noqa: E731
    near, far = (minimise(loss, jnp.zeros(2), steps=n) for n in (100, 1))
    assert jnp.abs(near - 3).max() < 0.05 < jnp.abs(far - 3).max()


def test_the_mlp_learns_what_no_line_can_tell():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)
    train, test = slice(0, 200), slice(200, None)
    accuracy = {
        kind: np.mean(fit_classifier(x[train], y[train], kind=kind, width=32)(x[test]) == y[test])
        for kind in ("linear", "mlp")
    }
    assert accuracy["linear"] < 0.7
    assert accuracy["mlp"] > 0.85


def test_the_seed_of_the_mlp_makes_its_predictions():
    x, y = problem()
    runs = [fit_classifier(x, y, kind="mlp", width=8, seed=s, steps=20)(x) for s in (1, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])


def test_an_unknown_probe_is_named():
    with pytest.raises(ValueError, match="probe 'svm' is unknown"):
        fit_classifier(*problem(), kind="svm")
