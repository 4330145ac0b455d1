"""Saved numbers: what is read back is what was saved, and nothing is unpickled."""

import numpy as np
import pytest

from rcml_jax.errors import UserError
from rcml_jax.report.page import load, save, slug


def test_a_table_keeps_numbers_and_texts(tmp_path):
    columns = {
        "run": ["a, b", 'say "x"', "line\nbreak"],
        "value": [0.1 + 0.2, float("nan"), -1e-9],
        "count": [1, 2, 3],
    }
    found = save(tmp_path / "new" / "table.csv", columns)
    assert found["run"].tolist() == columns["run"]
    np.testing.assert_array_equal(found["value"], columns["value"])
    np.testing.assert_array_equal(found["count"], columns["count"])
    assert list(load(tmp_path / "new" / "table.csv")) == ["run", "value", "count"]


def test_a_table_without_rows_keeps_its_columns(tmp_path):
    assert {n: len(c) for n, c in save(tmp_path / "t.csv", {"a": [], "b": []}).items()} == {
        "a": 0,
        "b": 0,
    }


def test_arrays_keep_shapes_types_and_texts(tmp_path):
    arrays = {"points": np.ones((2, 3), np.float32), "names": ["größe", "a"], "n": 3}
    found = save(tmp_path / "a.npz", arrays)
    assert found["points"].dtype == np.float32
    assert found["points"].shape == (2, 3)
    assert found["names"].tolist() == ["größe", "a"]
    assert int(found["n"]) == 3


def test_objects_are_not_unpickled(tmp_path):
    with (tmp_path / "bad.npz").open("wb") as file:
        np.savez(file, x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load(tmp_path / "bad.npz")


def test_columns_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        save(tmp_path / "t.csv", {"a": [1, 2], "b": [1]})


def test_where_nothing_can_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save(tmp_path / "file" / "t.csv", {"a": [1]})


@pytest.mark.parametrize(
    ("text", "name"), [("Hit@5 AVG", "hit-5-avg"), ("α/β", "x"), ("../up", "up"), ("a_b", "a-b")]
)
def test_names_of_files(text, name):
    assert slug(text) == name
