"""M3CoL's model against its twin: scaling, layers, heads, initial values, dropout and size."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.models.m3col import MLP, SCALINGS, M3CoL, TableEncoder, column_moments, column_range
from tests import reference

WIDTHS = {"mrna": 5, "methylation": 4, "mirna": 3}
N, CLASSES = 6, 3


def tables(names, seed=0):
    rng = np.random.default_rng(seed)
    return {n: (rng.normal(1, 2, (N, WIDTHS[n])).astype(np.float32),) for n in names}


def build(names, hidden=(7,), **options):
    """A model, its inputs, and parameters that are nowhere 0 or 1."""
    # Embeddings of different widths, so that no two of them can be exchanged in silence.
    encoders = {n: TableEncoder((6, 2 + place)) for place, n in enumerate(names)}
    model = M3CoL(encoders, CLASSES, hidden, **options)
    inputs = tables(names)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(1)
    draw = lambda s: (0.5 + 0.3 * rng.normal(size=s.shape)).astype(s.dtype)  # noqa: E731
    return model, jax.tree.map(draw, shapes), inputs


def layers(mlp):
    return [(mlp[f"Dense_{k}"]["kernel"], mlp[f"Dense_{k}"]["bias"]) for k in range(len(mlp))]


def twin(params, inputs, names):
    encoders = {n: params[f"encoders_{n}"] for n in names}
    return reference.m3col(
        {n: np.asarray(inputs[n][0], np.float64) for n in names},
        {n: (part["low"], part["range"]) for n, part in encoders.items()},
        {n: layers(part["mlp"]) for n, part in encoders.items()},
        {n: layers(params[f"heads_{n}"]) for n in names if f"heads_{n}" in params},
        layers(params["fusion"]),
    )


@pytest.mark.parametrize(
    ("names", "hidden", "unimodal"),
    [
        (("mrna", "mirna"), (7,), True),
        (("mirna", "mrna", "methylation"), (7, 4), True),
        (("mrna", "mirna"), (7,), False),
        (("methylation",), (), False),
    ],
)
def test_embeddings_and_logits_are_those_of_the_twin(names, hidden, unimodal):
    model, params, inputs = build(names, hidden, unimodal=unimodal)
    embeddings, logits = jax.jit(model.apply)({"params": params}, inputs)
    expected = twin(params, inputs, names)
    for found, wanted in zip((embeddings, logits), expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-4, err_msg=name)
    heads = {f"heads_{n}" for n in names} if unimodal else set()
    assert params.keys() == {"fusion", *heads, *(f"encoders_{n}" for n in names)}
    assert set(logits) == {"fused", *(names if unimodal else ())}


def test_the_order_of_the_names_is_that_of_the_concatenation():
    names = ("mrna", "mirna")  # neither the alphabet's nor the order of the inputs
    model, params, inputs = build(names, hidden=())
    inputs = {n: inputs[n] for n in reversed(names)}
    # The fusion classifier passes the first two of the joint embedding's 2 + 3 columns through.
    params["fusion"] = {"Dense_0": {"kernel": np.eye(5, CLASSES), "bias": np.zeros(CLASSES)}}
    embeddings, logits = model.apply({"params": params}, inputs)
    np.testing.assert_allclose(logits["fused"][:, :2], embeddings["mrna"], rtol=1e-6)
    np.testing.assert_allclose(logits["fused"][:, 2], embeddings["mirna"][:, 0], rtol=1e-6)


def test_encoding_and_classifying_by_themselves_are_the_whole():
    names = ("mrna", "mirna")
    model, params, inputs = build(names)
    variables = {"params": params}
    embeddings, logits = model.apply(variables, inputs)
    alone = {n: model.apply(variables, n, inputs[n], method="encode") for n in names}
    jax.tree.map(np.testing.assert_array_equal, alone, embeddings)
    again = model.apply(variables, alone, method="classify")
    jax.tree.map(np.testing.assert_array_equal, again, logits)


def test_logits_are_float32_whatever_is_computed_in():
    encoders = {n: TableEncoder((4, 4), 0.0, jnp.bfloat16) for n in ("mrna", "mirna")}
    model = M3CoL(encoders, CLASSES, (4,), dtype=jnp.bfloat16)
    variables, (embeddings, logits) = jax.eval_shape(
        lambda key, x: (model.init(key, x), model.init_with_output(key, x)[0]),
        jax.random.key(0),
        tables(("mrna", "mirna")),
    )
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {x.dtype for x in embeddings.values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in logits.values()} == {jnp.dtype("float32")}


def test_column_range_is_of_the_rows_that_count():
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    x[:, 1] = 3.5  # constant everywhere,
    x[:6, 2] = -2.0  # and constant in the first rows
    wheres = np.array([np.ones(8), np.arange(8) < 6, np.arange(8) == 7, np.arange(8) % 2], bool)
    low, span = jax.jit(jax.vmap(column_range, (None, 0)))(x, wheres)
    for row, where in enumerate(wheres):
        expected = reference.column_range(x, where)
        np.testing.assert_allclose(low[row], expected[0], rtol=1e-6)
        np.testing.assert_allclose(span[row], expected[1], rtol=1e-6)
        scaled = (x[where] - low[row]) / span[row]
        assert scaled.min() >= 0
        assert scaled.max() <= 1
        constant = np.ptp(x[where], axis=0) == 0
        assert np.all(scaled[:, constant] == 0)
        # Rows that do not count may have anything there.
        assert np.all(np.abs((x - 1e4 - low[row]) / span[row])[:, constant] < 1e-30)
        assert constant[1]


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_column_moments_are_of_the_rows_that_count(offset):
    normal = np.random.default_rng(0).normal(size=(8, 5))
    x = (normal + offset).astype(np.float32)
    x[:, 1] = 0.1  # constant everywhere, though its mean rounds,
    x[:6, 2] = -2.0  # and constant in the first rows
    x[:, 3] = normal[:, 3] * 1e-30  # rounding, as a tower's dead units
    x[:, 4] = normal[:, 4] * 1e-4  # small, but no rounding
    wheres = np.array([np.ones(8), np.arange(8) < 6, np.arange(8) == 7, np.arange(8) % 2], bool)
    mean, deviation = jax.jit(jax.vmap(column_moments, (None, 0)))(x, wheres)
    for row, where in enumerate(wheres):
        expected = reference.column_moments(x, where)
        np.testing.assert_allclose(mean[row], expected[0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(deviation[row], expected[1], rtol=1e-4)
        constant = expected[1] > 1e30
        scaled = (x - mean[row]) / deviation[row]
        np.testing.assert_allclose(scaled[where][:, ~constant].std(axis=0), 1, rtol=1e-4)
        # A constant column is 0, whatever stands in it later.
        assert np.all(np.abs((x - 1e4 - mean[row]) / deviation[row])[:, constant] < 1e-30)
        single = where.sum() == 1
        assert list(constant) == [single, True, single or row == 1, True, single]


def test_column_moments_leave_out_what_is_rounding():
    normal = np.random.default_rng(0).normal(size=8237)
    constants = [0.1, 0.7, 3.3, 1000.1, 1000.1 + 1e-4 * normal, 1e-9 * normal, 1e-32 * normal]
    others = [1e-4 * normal, 1000.1 + 1e-2 * normal, 1e20 * normal]
    columns = [np.broadcast_to(column, 8237) for column in constants + others]
    x = np.stack(columns, axis=1).astype(np.float32)
    mean, deviation = jax.jit(column_moments)(x, np.ones(len(x), bool))
    assert np.all(deviation[: len(constants)] == np.finfo(np.float32).max)
    scaled = (x - mean) / deviation
    assert np.all(np.abs(scaled[:, : len(constants)]) < 1e-30)
    np.testing.assert_allclose(scaled[:, len(constants) :].std(axis=0), 1, rtol=1e-2)


def test_scalings_do_not_see_rows_that_do_not_count():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    where = np.arange(8) < 5
    for scaling, value in itertools.product(SCALINGS.values(), (1e6, np.nan, np.inf)):
        other = np.where(where[:, None], x, np.float32(value))
        for a, b in zip(scaling(x, where), scaling(other, where), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_scaling_has_no_gradient():
    encoder, x = TableEncoder((6, 2)), tables(("mrna",))["mrna"][0]
    params = encoder.init(jax.random.key(0), x)["params"]
    grads = jax.grad(lambda p: jnp.sum(encoder.apply({"params": p}, x) ** 2))(params)
    assert not np.any(grads["low"])
    assert not np.any(grads["range"])
    assert all(np.any(layer["kernel"]) for layer in grads["mlp"].values())


def test_weights_start_glorot_normal_and_biases_at_0():
    model = M3CoL({"mrna": TableEncoder((500, 300))}, 100, (200,), unimodal=False)
    x = {"mrna": (jnp.zeros((1, 400)),)}
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    encoder = params["encoders_mrna"]
    np.testing.assert_array_equal(encoder["low"], np.zeros(400))
    np.testing.assert_array_equal(encoder["range"], np.ones(400))
    for weight, bias in (*layers(encoder["mlp"]), *layers(params["fusion"])):
        # Var = 2 / (fan in + fan out), in a sample of 20,000 weights or more.
        expected = np.sqrt(2 / sum(weight.shape))
        assert abs(float(weight.std()) / expected - 1) < 0.02
        assert abs(float(weight.mean())) < 0.02 * expected
        assert np.all(bias == 0)


def test_dropout_is_between_the_layers_and_only_in_training():
    x = jnp.ones((2000, 3))
    plain, dropped = MLP((50, 4)), MLP((50, 4), dropout=0.5)
    variables = plain.init(jax.random.key(0), x)
    expected = plain.apply(variables, x)
    np.testing.assert_array_equal(dropped.apply(variables, x), expected)
    apply = jax.jit(
        lambda key: dropped.apply(variables, x, deterministic=False, rngs={"dropout": key})
    )
    one, same, other = (apply(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)
    assert np.all(one != 0)  # never after the last layer
    # Kept units are scaled up: the mean over many samples is what it is without dropout.
    np.testing.assert_allclose(one.mean(axis=0), expected[0], atol=0.05)


def test_dropout_reaches_encoders_and_classifiers():
    names = ("mrna", "mirna")
    encoders = {n: TableEncoder((6, 4), 0.5) for n in names}
    model = M3CoL(encoders, CLASSES, (7,), dropout=0.5)
    inputs = tables(names)
    variables = jax.jit(model.init)(jax.random.key(0), inputs)

    @jax.jit
    def apply(key):
        rngs = {"dropout": key}
        embeddings, _ = model.apply(variables, inputs, deterministic=False, rngs=rngs)
        fixed = {n: jnp.ones((N, 4)) for n in names}
        return embeddings, model.apply(
            variables, fixed, deterministic=False, rngs=rngs, method="classify"
        )

    first, second = apply(jax.random.key(1)), apply(jax.random.key(2))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), first, second)
    assert all(jax.tree.leaves(changed))


def test_rosmaps_parameters():
    f, w, classes = 200, 1000, 2
    model = M3CoL({n: TableEncoder((w, w)) for n in WIDTHS}, classes, (w,))
    inputs = {n: (jnp.zeros((1, f)),) for n in WIDTHS}
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]

    def linear(a, b):
        return a * b + b

    encoder = linear(f, w) + linear(w, w)
    head = linear(w, w) + linear(w, classes)
    fusion = linear(3 * w, w) + linear(w, classes)
    scaling = 2 * f
    expected = 3 * (encoder + scaling + head) + fusion
    assert sum(x.size for x in jax.tree.leaves(params)) == expected
