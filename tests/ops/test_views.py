"""Second views: what they may change, what they never do, and that rows draw for themselves."""

import jax
import numpy as np
import pytest

from rcml_jax.ops.views import drop_states, drop_tokens, image_view, mask_tokens
from rcml_jax.training.gradcache import rows_of

START, END, PAD, MASK = 1, 3, 0, 2
# Three texts of 6, 3 and 0 tokens between start and end.
IDS = np.array(
    [[1, 10, 11, 12, 13, 14, 15, 3], [1, 20, 21, 22, 3, 0, 0, 0], [1, 3, 0, 0, 0, 0, 0, 0]]
)
ENDS = np.array([[7], [4], [1]])
BODY = IDS >= 10


def images(n=64, size=12):
    """Each pixel tells its position: red the row, green the column."""
    grid = np.stack([*np.mgrid[:size, :size], np.full((size, size), 9)], axis=-1)
    return np.broadcast_to(10 * grid, (n, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_view_is_a_crop_in_another_brightness(flip):
    view = jax.jit(lambda x, key: image_view(x, key, flip=flip))
    found = np.asarray(view(images(), jax.random.key(0)))
    assert found.dtype == np.uint8
    assert found.shape == images().shape
    mirrored, gains, sides = 0, set(), set()
    for view in found.astype(int):
        gain = view[0, 0, 2] / 90
        gains.add(round(gain, 2))
        rows, columns = (np.rint(view[..., c] / gain / 10).astype(int) for c in (0, 1))
        # Rows depend on the row alone, columns on the column: it is a box of the image.
        assert (rows == rows[:, :1]).all()
        assert (columns == columns[:1]).all()
        across = columns[0]
        if across[0] > across[-1]:
            mirrored, across = mirrored + 1, across[::-1]
        for line in (rows[:, 0], across):
            assert set(np.diff(line)) <= {0, 1}
        sides.add(np.ptp(rows[:, 0]) + 1)
    assert min(gains) >= 0.79
    assert max(gains) <= 1.21
    assert len(gains) > 10
    assert sides == {9, 10, 11, 12}
    assert (20 < mirrored < 44) if flip else mirrored == 0


def test_images_in_rows_are_rows_of_images():
    whole = image_view(images(8).reshape(4, 2, 12, 12, 3), jax.random.key(0))
    assert whole.shape == (4, 2, 12, 12, 3)
    assert len(np.unique(np.asarray(whole).reshape(8, -1), axis=0)) > 4


def test_dropped_tokens_leave_start_end_and_order():
    ids, ends = jax.jit(drop_tokens)(IDS, ENDS, BODY, jax.random.key(0), rate=0.5)
    lengths = set()
    for number in range(30):
        ids, ends = drop_tokens(IDS, ENDS, BODY, jax.random.key(number), rate=0.5)
        for row, end, whole in zip(np.asarray(ids), np.asarray(ends)[:, 0], IDS, strict=True):
            assert row[0] == START
            assert row[end] == END
            assert (row[end + 1 :] == PAD).all()
            inner = row[1:end]
            assert (np.diff(inner) > 0).all()
            assert set(inner) <= set(whole)
        lengths.add(int(ends[0, 0]))
        np.testing.assert_array_equal(ids[2], IDS[2])
    assert len(lengths) > 3
    same, ends = drop_tokens(IDS, ENDS, BODY, jax.random.key(0), rate=0.0)
    np.testing.assert_array_equal(same, IDS)
    np.testing.assert_array_equal(ends, ENDS)


def test_dropped_tokens_of_packed_texts():
    ids = np.array([[1, 10, 11, 3, 1, 12, 13, 14, 3, 0], [1, 3, 1, 20, 21, 22, 23, 24, 25, 3]])
    ends = np.array([[3, 8], [1, 9]])
    for number in range(10):
        key = jax.random.key(number)
        found, positions = (np.asarray(x) for x in drop_tokens(ids, ends, ids >= 10, key, rate=0.5))
        for row, (first, last) in zip(found, positions, strict=True):
            assert (row[[0, first + 1]] == START).all()
            assert (row[[first, last]] == END).all()
            assert np.isin(row, (START, END)).sum() == 4
            assert (row[last + 1 :] == PAD).all()
    assert set(found[0][: positions[0, 0]]) <= {1, 10, 11}


def test_masked_tokens():
    drawn = set()
    for number in range(30):
        key = jax.random.key(number)
        ids, positions, labels, chosen = (
            np.asarray(x) for x in mask_tokens(IDS, BODY, key, mask_id=MASK, percent=30)
        )
        assert positions.shape == labels.shape == chosen.shape == (3, 3)  # 30% of 8, rounded up
        np.testing.assert_array_equal(chosen.sum(axis=1), [2, 1, 0])
        np.testing.assert_array_equal((ids == MASK).sum(axis=1), [2, 1, 0])
        for i in range(3):
            np.testing.assert_array_equal(ids[i, positions[i][chosen[i]]], MASK)
            np.testing.assert_array_equal(labels[i], IDS[i, positions[i]])
            assert BODY[i, positions[i][chosen[i]]].all()
        drawn |= set(positions[0][chosen[0]].tolist())
        np.testing.assert_array_equal(np.where(ids == MASK, IDS, ids), IDS)
    assert drawn == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("name", ["image", "drop", "mask"])
def test_a_part_of_a_batch_draws_what_it_draws_in_the_whole(name):
    """Rows 1, 3 and 5 of six by themselves, as a micro-batch or a device has them."""
    ids, ends, body = (np.tile(x, (2, 1)) for x in (IDS, ENDS, BODY))
    view = {
        "image": lambda key, rows: image_view(images(6)[rows], key, flip=True),
        "drop": lambda key, rows: drop_tokens(ids[rows], ends[rows], body[rows], key, rate=0.5)[0],
        "mask": lambda key, rows: mask_tokens(ids[rows], body[rows], key, mask_id=MASK)[0],
    }[name]
    key = jax.random.key(4)
    whole, rows = view(key, np.arange(6)), np.array([1, 3, 5])
    np.testing.assert_array_equal(view(rows_of(key, 1, 2, 3), rows), whole[rows])
    assert not np.array_equal(view(jax.random.key(5), np.arange(6)), whole)


def test_a_view_of_states_is_the_mean_of_some_tokens():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(200, 9, 5)).astype(np.float32)
    mask = np.arange(9) < rng.integers(1, 10, (200, 1))
    states[:, 0] = np.where(mask[:, 1:, None], states[:, 1:], 0).sum(1) / mask[:, 1:].sum(
        1, keepdims=True
    ).clip(1)
    view = jax.jit(lambda *x: drop_states(*x, jax.random.key(0)))
    found, kept = map(np.asarray, view(states, mask, np.zeros(200, np.int32)))
    assert kept[:, 0].all()
    assert not (kept & ~mask).any()
    tokens = mask[:, 1:]
    assert 0.7 < kept[:, 1:][tokens].mean() < 0.8
    np.testing.assert_array_equal(found[:, 1:], states[:, 1:])
    for row, here, own in zip(found, kept, states, strict=True):
        expected = row[1:][here[1:]].mean(0) if here[1:].any() else own[0]
        np.testing.assert_allclose(row[0], expected, rtol=1e-5, atol=1e-6)
