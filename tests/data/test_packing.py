"""Several texts in a row of tokens: nothing is lost, and rows are about equally long."""

import numpy as np
import pytest

from rcml_jax.data.packing import LENGTHS, pack, pack_order


def padded(rng, lengths):
    """Random texts of these lengths, ids and mask (N, T)."""
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    return np.where(mask, rng.integers(1, 100, mask.shape), 0).astype(np.int32), mask.astype(int)


@pytest.mark.parametrize("per_row", [1, 2, 3, 6])
def test_each_text_is_found_again(per_row):
    rng = np.random.default_rng(per_row)
    lengths = rng.integers(2, 20, 12)
    ids, mask = padded(rng, lengths)
    packed = pack(ids, mask, per_row)
    assert packed.ids.dtype == packed.ends.dtype == np.int32
    assert len(packed.ids) == len(packed.ends) == 12 // per_row
    found = []
    for row, ends in zip(packed.ids, packed.ends, strict=True):
        found += np.split(row, ends + 1)[:-1]
        assert not row[ends[-1] + 1 :].any()
    for text, length, original in zip(found, lengths, ids, strict=True):
        np.testing.assert_array_equal(text, original[:length])


def test_rows_have_one_of_a_few_lengths():
    rng = np.random.default_rng(0)
    seen = set()
    for scale in range(2, 60):
        ids, mask = padded(rng, rng.integers(2, scale + 2, 8))
        packed = pack(ids, mask, 4)
        fullest = packed.ends.max() + 1
        length = packed.ids.shape[1]
        assert fullest <= length < fullest + 16
        seen.add(length)
    assert all(length in LENGTHS or length % 8 == 0 for length in seen)


@pytest.mark.parametrize("per_row", [2, 4])
def test_rows_are_about_equally_long(per_row):
    """Product titles: most are short, a few are long."""
    rng = np.random.default_rng(1)
    lengths = np.exp(3 + 0.5 * rng.standard_normal(256)).astype(int).clip(4, 77)
    order = pack_order(lengths, per_row)
    np.testing.assert_array_equal(np.sort(order), np.arange(256))
    sums = lengths[order].reshape(-1, per_row).sum(axis=1)
    # Beside the longest texts stand some of the shortest fifth.
    assert sums.max() <= lengths.max() + (per_row - 1) * np.quantile(lengths, 0.2)
    drawn = lengths.reshape(-1, per_row).sum(axis=1)
    assert sums.max() < 0.8 * drawn.max()


def test_the_longest_text_shares_its_row_with_the_shortest():
    assert sorted(map(tuple, pack_order(np.array([9, 1, 4, 5]), 2).reshape(2, 2))) == [
        (0, 1),
        (3, 2),
    ]
    np.testing.assert_array_equal(pack_order(np.array([3, 5, 4]), 1), [1, 2, 0])
