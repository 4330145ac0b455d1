import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcml_jax.ops import similarity
from tests import reference

NAMES = sorted(similarity.SIMILARITIES)


def vectors(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(m, d)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 3, 4), (33, 7, 6), (64, 2, 3)])
def test_values(name, n, m, d):
    x, y = vectors(n, m, d)
    expected = reference.matrix(getattr(reference, name), x, y)
    np.testing.assert_allclose(similarity.get(name)(x, y), expected, rtol=1e-5, atol=1e-5)
    # Both forms agree, whether the candidates are broadcast or gathered.
    pairs = similarity.paired(name)(x[:, None], y)
    np.testing.assert_allclose(pairs, expected, rtol=1e-5, atol=1e-5)
    picked = np.arange(n) % m
    gathered = similarity.paired(name)(x, y[picked])
    np.testing.assert_allclose(gathered, expected[np.arange(n), picked], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    x, y = vectors(5, 3, 4)
    mix = np.random.default_rng(1).normal(size=(5, 3))

    def twin(x, y):
        return np.sum(mix * reference.matrix(getattr(reference, name), x, y))

    expected = reference.gradient(twin, x, y)
    mix32 = mix.astype(np.float32)
    for form in (similarity.get(name), lambda x, y: similarity.paired(name)(x[:, None], y)):
        actual = jax.jit(jax.grad(lambda x, y, f=form: jnp.sum(mix32 * f(x, y)), (0, 1)))(x, y)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signed", ["absolute", "shift"])
def test_chi_square_of_signed_vectors(signed):
    x, y = vectors(5, 3, 4)
    options = {"signed": signed, "epsilon": 1e-3}

    def twin(x, y):
        return reference.matrix(reference.chi_square, x, y, **options)

    def ours(x, y):
        return similarity.chi_square(x, y, **options, block_size=2)

    np.testing.assert_allclose(ours(x, y), twin(x, y), rtol=1e-5)
    expected = reference.gradient(lambda *xy: twin(*xy).sum(), x, y)
    actual = jax.jit(jax.grad(lambda *xy: ours(*xy).sum(), (0, 1)))(x, y)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3)
    # A score depends on its pair alone: other rows do not move it.
    np.testing.assert_allclose(ours(x[:2], y[1:]), ours(x, y)[:2, 1:], rtol=1e-6)


def test_shifted_chi_square_ignores_a_common_offset():
    x, y = vectors(4, 3, 5)
    moved = similarity.chi_square(x + 2, y + 2, signed="shift")
    np.testing.assert_allclose(moved, similarity.chi_square(x, y, signed="shift"), rtol=1e-4)


@pytest.mark.parametrize("name", ["euclidean", "manhattan", "chi_square"])
@pytest.mark.parametrize("block_size", [4, 100])
def test_block_size_changes_nothing(name, block_size):
    x, y = vectors(13, 6, 4)
    form = similarity.get(name)

    def total(x, y, **options):
        return jnp.sum(jnp.sin(form(x, y, **options)))

    np.testing.assert_allclose(form(x, y, block_size=block_size), form(x, y), rtol=1e-6)
    blocked = jax.jit(jax.grad(lambda *xy: total(*xy, block_size=block_size), (0, 1)))
    for a, e in zip(blocked(x, y), jax.jit(jax.grad(total, (0, 1)))(x, y), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["euclidean", "manhattan", "chi_square"])
def test_no_array_of_pairs_by_dimension_is_held(name):
    n, d, block = 256, 64, 4
    x, y = vectors(n, n, d)

    def total(x, y):
        return similarity.get(name)(x, y, block_size=block).sum()

    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(x, y).compile()
    array_of_pairs = 4 * n * n * d
    assert compiled.memory_analysis().temp_size_in_bytes < array_of_pairs / 4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_equal_and_zero_vectors(name):
    x = np.array([[0, 0, 0], [1, -2, 3], [1e-30, 0, 0], [1e15, -1e15, 0]], np.float32)
    y = np.array([[0, 0, 0], [1, -2, 3], [-1e-30, 0, 0]], np.float32)
    form = similarity.get(name)
    assert np.isfinite(form(x, y)).all()
    for gradient in jax.jit(jax.grad(lambda x, y: form(x, y).sum(), (0, 1)))(x, y):
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


def test_cosine_of_zero_tiny_and_huge_vectors():
    x = np.array([[0, 0], [3e-30, 4e-30], [3e30, 4e30]], np.float32)
    y = np.array([[1, 0], [0, 0]], np.float32)
    np.testing.assert_allclose(similarity.cosine(x, y), [[0, 0], [3 / 5, 0], [3 / 5, 0]], rtol=1e-6)


@pytest.mark.parametrize("name", ["euclidean", "manhattan", "chi_square"])
def test_distance_of_a_vector_to_itself_is_exactly_zero(name):
    x, _ = vectors(6, 1, 40)
    assert np.all(np.diagonal(similarity.get(name)(x, x)) == 0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name):
    x, y = (jnp.asarray(v, jnp.bfloat16) for v in vectors(5, 3, 4))
    scores = similarity.get(name)(x, y)
    assert scores.dtype == similarity.paired(name)(x, x).dtype == jnp.float32
    expected = reference.matrix(
        getattr(reference, name), *(np.asarray(v, np.float64) for v in (x, y))
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_vmap(name):
    x, y = (np.stack(v) for v in zip(*(vectors(4, 3, 5, seed) for seed in range(3)), strict=True))
    form = similarity.get(name)
    expected = np.stack([form(a, b) for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(form))(x, y), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_strict_promotion(name):
    x, y = (jnp.asarray(v) for v in vectors(5, 3, 4))
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(jax.grad(lambda x: similarity.get(name)(x, y).sum()))(x)


def test_unknown_names_are_refused_with_the_known_ones():
    assert list(similarity.SIMILARITIES) == list(similarity.PAIRED)
    for look_up in (similarity.get, similarity.paired):
        with pytest.raises(ValueError, match=r"'cosin'.*cosine, dot, .*chi_square"):
            look_up("cosin")
    with pytest.raises(ValueError, match="signed is 'none'"):
        similarity.chi_square(*vectors(2, 2, 2), signed="none")
