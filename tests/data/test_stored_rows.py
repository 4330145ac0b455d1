"""Rows kept as they come: computed once, and gone on with after a kill."""

import numpy as np
import pytest

from rcml_jax.data.stages import stored_rows
from rcml_jax.errors import UserError


class Squares:
    """2500 rows; remembers what it was asked for, and stops where it is told to."""

    shape, dtype = (3,), np.float32

    def __init__(self, stop_at=None):
        self.asked, self.stop_at = [], stop_at

    def __len__(self):
        return 2500

    def block(self, start, stop):
        if self.stop_at is not None and stop > self.stop_at:
            raise KeyboardInterrupt
        self.asked += range(start, stop)
        return np.arange(start, stop)[:, None] ** 2 + np.arange(3)


def expected():
    return np.arange(2500)[:, None] ** 2 + np.arange(3)


def test_rows_are_computed_once(tmp_path):
    path = tmp_path / "new" / "rows.npy"
    blocks = Squares()
    np.testing.assert_array_equal(stored_rows(path, blocks), expected().astype(np.float32))
    assert blocks.asked == list(range(2500))
    again = Squares(stop_at=0)
    np.testing.assert_array_equal(stored_rows(path, again), np.load(path))
    assert sorted(p.name for p in path.parent.iterdir()) == ["rows.npy", "rows.npy.lock"]


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        stored_rows(path, Squares(stop_at=2100))
    assert not path.exists()
    rest = Squares()
    np.testing.assert_array_equal(stored_rows(path, rest), expected().astype(np.float32))
    assert rest.asked == list(range(2048, 2500))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        stored_rows(tmp_path / "file" / "rows.npy", Squares())
