import jax
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import additive_chi2_kernel, pairwise_distances

from rcml_jax.errors import UserError
from rcml_jax.evaluation import cross_modal
from rcml_jax.evaluation.cross_modal import search, search_both
from rcml_jax.ops import similarity as similarities
from rcml_jax.ops.similarity import prepare_rows, row_scores
from tests import reference, reference_alignment

NAMES = sorted(similarities.SIMILARITIES)
SMALLEST = 2**19  # bytes; blocks of 64 × 64


def exact(name, n, m, d=16, seed=0):
    """Vectors whose scores are exact in float32, with many ties."""
    rng = np.random.default_rng(seed)
    values = [-1, 1] if name == "cosine" else [-1, 0, 1]  # norms of 4
    return [rng.choice(values, (rows, d)).astype(np.float32) for rows in (n, m)]


def scores_of(name, x, y):
    """Of exact vectors; rounded, for the ε of chi-square and norms of 4 may cost the last bit."""
    return np.round(reference.matrix(getattr(reference, name), x, y), 6)


def image_of_text(n, m, seed=1):
    rng = np.random.default_rng(seed)
    return rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, m - n)]))


def is_right(images, n):
    return images == np.arange(n)[:, None]


def assert_found(found, scores, right, k=10):
    lists, flags, ranks = reference_alignment.search(scores, right, k)
    np.testing.assert_array_equal(found.rank, ranks)
    np.testing.assert_array_equal(found.indices, lists)
    np.testing.assert_array_equal(found.relevance, flags)
    np.testing.assert_array_equal(found.relevant, right.sum(axis=1))
    expected = np.take_along_axis(scores, lists, axis=1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-5)


def assert_same(first, second):
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "m"), [(70, 150), (3, 131)])
def test_both_directions_with_ties(name, n, m):
    x, y = exact(name, n, m)
    images = image_of_text(n, m)
    scores, right = scores_of(name, x, y), is_right(images, n)
    options = {"similarity": name, "memory": SMALLEST}
    image, text = search_both(x, y, images, **options)
    assert_found(image, scores, right)
    assert_found(text, scores.T, right.T)
    # The same ranks from a full sort.
    wrong = np.sort(np.where(right, -np.inf, scores), axis=1)
    best = np.where(right, scores, -np.inf).max(axis=1)
    places = [m - np.searchsorted(row, bar) for row, bar in zip(wrong, best, strict=True)]
    np.testing.assert_array_equal(image.rank, places)
    # One direction by itself.
    assert_same(search(y, x, positives=images, **options), text)
    assert_same(search(x, y, positives=[np.flatnonzero(r) for r in right], **options), image)


@pytest.mark.parametrize("name", NAMES)
def test_memory_changes_nothing(name):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(rows, 64)).astype(np.float32) for rows in (430, 530))
    y[300:] = y[:230]
    images = image_of_text(430, 530)
    shapes = {cross_modal.block_shape(430, 530, 64, memory) for memory in (2**19, 2**21, 2**30)}
    assert len(shapes) == 3
    first, *others = (
        search_both(x, y, images, similarity=name, memory=memory)
        for memory in (2**19, 2**21, 2**30)
    )
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_depends_on_its_rows_alone(name):
    # Otherwise equal rows would not tie. The bits have to agree.
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(rows, 19)).astype(np.float32) for rows in (128, 192))
    score = jax.jit(lambda x, y: row_scores(name, *(prepare_rows(name, v) for v in (x, y))))
    rows, columns = rng.permutation(128), rng.permutation(192)
    scores = np.asarray(score(x, y))
    np.testing.assert_array_equal(score(x[rows], y[columns]), scores[rows][:, columns])
    equal = np.asarray(score(np.tile(x[:1], (128, 1)), np.tile(y[:1], (192, 1))))
    assert np.all(equal == scores[0, 0])


@pytest.mark.parametrize("signed", ["absolute", "shift"])
def test_chi_square_of_signed_vectors(signed):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(rows, 19)).astype(np.float32) for rows in (9, 12))
    images = image_of_text(9, 12)
    found, _ = search_both(x, y, images, similarity="chi_square", signed=signed)
    assert_found(
        found, reference.matrix(reference.chi_square, x, y, signed=signed), is_right(images, 9)
    )


@pytest.mark.parametrize(("n", "m", "d"), [(65, 190, 33), (7, 300, 5)])
def test_agreement_with_scipy_and_scikit_learn(n, m, d):
    rng = np.random.default_rng(0)
    x, y = (rng.uniform(size=(rows, d)).astype(np.float32) for rows in (n, m))
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    peers = {
        "cosine": 1 - pairwise_distances(x64, y64, metric="cosine"),
        "euclidean": -cdist(x64, y64),
        "manhattan": -pairwise_distances(x64, y64, metric="manhattan"),
        "chi_square": additive_chi2_kernel(x64, y64),
    }
    for name, expected in peers.items():
        found = search(x, y, positives=np.zeros(n, int), similarity=name, k=m, memory=SMALLEST)
        scores = np.zeros((n, m))
        np.put_along_axis(scores, found.indices, found.scores, axis=1)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


class Embedding:
    """Rows that are made when they are asked for."""

    def __init__(self, values):
        self.values, self.width, self.asked = values, values.shape[1], []

    def __len__(self):
        return len(self.values)

    def block(self, start, stop):
        self.asked += range(start, stop)
        return jax.numpy.asarray(self.values[start:stop])


def test_sources(tmp_path):
    x, y = exact("dot", 1200, 70, d=16)
    positives = np.arange(1200) % 70
    expected = search(x, y, positives=positives, similarity="dot")
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_same(
        search(mapped, jax.numpy.asarray(y), positives=positives, similarity="dot"), expected
    )
    # Kept in memory, or, as the budget is too small, in a temporary file.
    for memory in (2**30, 2**18):
        sources = Embedding(x), Embedding(y)
        found = search(*sources, positives=positives, similarity="dot", memory=memory)
        assert_same(found, expected)
        assert [source.asked for source in sources] == [list(range(1200)), list(range(70))]


def test_equal_rows_tie_wherever_they_stand():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(70, 33)), np.tile(rng.normal(size=33), (150, 1))
    for name in NAMES:
        found = search(x, y, positives=[[140, 3]] * 70, similarity=name, memory=SMALLEST)
        assert np.all(found.rank == 148)
        assert np.all(found.indices == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10])
        assert not found.relevance.any()
        assert np.all(found.scores == found.scores[:, :1])


@pytest.mark.parametrize("k", [1, 20, 70, 400])
@pytest.mark.parametrize("towards", [1, -1])
def test_sorted_galleries_and_long_lists(k, towards):
    # Scores that rise with the place in the gallery: every block replaces all the lists.
    x = np.ones((70, 1), np.float32)
    y = (towards * np.arange(1, 200, dtype=np.float32) // 3)[:, None]
    images = image_of_text(70, 199)
    scores, right = x @ y.T, is_right(images, 70)
    options = {"similarity": "dot", "k": k, "memory": SMALLEST}
    image, text = search_both(x, y, images, **options)
    assert_found(image, scores, right, k)
    assert_found(text, scores.T, right.T, k)
    assert image.indices.shape == (70, min(k, 199))


def test_positives_in_every_form():
    x, y = exact("dot", 5, 9)
    options = {"similarity": "dot"}
    by_list = search(x, y, positives=[[3, 1, 3], [2], (0, 8), np.array([4]), [7]], **options)
    np.testing.assert_array_equal(by_list.relevant, [2, 1, 2, 1, 1])
    pairs = np.array([[1, 3], [2, 2], [0, 8], [4, 4], [7, 7]])
    assert_same(search(x, y, positives=pairs, **options), by_list)


def refuse(message, *args, **options):
    with pytest.raises(UserError, match=message):
        search_both(*args, **{"similarity": "dot", **options})


def test_bad_input():
    x, y = exact("dot", 3, 8)
    images = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    refuse("image has width 16 and text 15.*project", x, y[:, :15], images)
    bad = y.copy()
    bad[[1, 2, 3, 4, 5, 7], 0] = np.nan, np.inf, np.nan, np.nan, -np.inf, np.inf
    refuse("text has NaN or infinite entries in rows 1, 2, 3, 4, 5 and 1 more", x, bad, images)
    bad = np.eye(3, 16) * np.array([[1], [1e30], [1]])
    refuse("image has entries whose scores could overflow in row 1$", bad, y, images)
    search_both(bad, y, images, similarity="cosine")
    bad = np.where(np.arange(3)[:, None] == 1, 0, x)
    refuse("image has only zeros, .*cosine.* in row 1$", bad, y, images, similarity="cosine")
    search_both(bad, y, images, similarity="manhattan")
    refuse(
        "out of range for texts 2, 5: it is 3, and there are 3 images",
        x,
        y,
        np.where(images == 2, 3, images),
    )
    refuse("out of range for text 7: it is -1", x, y, np.array([0, 1, 2, 0, 1, 2, 0, -1]))
    refuse("a query with no relevant item: image 1$", x, y, np.where(images == 1, 0, images))
    refuse(r"image_of_text has shape \(3,\).*8 texts", x, y, images[:3])
    refuse("image_of_text must hold integers", x, y, images.astype(float))
    refuse("image must be a matrix", x[0], y, images)
    refuse("text must be a matrix", x, y.astype(str), images)
    refuse("text is empty", x, y[:0], images[:0])
    refuse("k is 0", x, y, images, k=0)
    refuse(
        "memory is 1000 bytes; a search in 16 dimensions needs at least", x, y, images, memory=1000
    )
    with pytest.raises(ValueError, match="unknown similarity 'cos'"):
        search_both(x, y, images, similarity="cos")
    with pytest.raises(ValueError, match="signed is 'no'"):
        search_both(x, y, images, similarity="chi_square", signed="no")


def test_bad_positives():
    x, y = exact("dot", 3, 8)
    for positives, message in (
        ([[0], [], [1]], "a query with no relevant item: query 1$"),
        ([[], [], []], "no relevant item: queries 0, 1, 2$"),
        ([[0], [1]], "positives has 2 rows for 3 queries"),
        ([[0], [9, 8], [1]], "positives is out of range for query 1: it is 9"),
        ([[0], [0.5], [1]], "positives must hold integers"),
    ):
        with pytest.raises(UserError, match=message):
            search(x, y, positives=positives, similarity="dot")


def test_a_block_of_another_shape_is_refused():
    x, y = exact("dot", 3, 8)
    source = Embedding(y)
    source.block = lambda start, stop: y[start:stop, :4]
    with pytest.raises(UserError, match=r"gallery gave a block of shape \(8, 4\)"):
        search(x, source, positives=np.zeros(3, int), similarity="dot")
