"""Columns of strings beside tuples of the same strings."""

import pickle

import numpy as np
import pytest

from rcml_jax.data import strings
from rcml_jax.data.strings import StringColumn

TEXTS = ("one", "", "é and 漢字", "one two", "half \ud83d", "\0", "x" * 5000, "😀")


@pytest.fixture(params=["memory", "file"])
def column(request, tmp_path):
    made = StringColumn.of(TEXTS)
    if request.param == "memory":
        return made
    made.save(tmp_path / "texts.strings")
    return StringColumn.open(tmp_path / "texts.strings")


def test_it_reads_as_a_tuple(column):
    assert len(column) == len(TEXTS)
    assert [*column] == [*TEXTS]
    assert [column[i] for i in range(-8, 8)] == [TEXTS[i] for i in range(-8, 8)]
    assert column[np.int64(2)] == TEXTS[2]
    for part in (slice(None), slice(2, 5), slice(5, 2), slice(None, None, -2), slice(6, 99)):
        assert column[part] == [*TEXTS[part]]
    assert column[np.array([5, 0, -1, 0])] == [TEXTS[i] for i in (5, 0, -1, 0)]
    assert column[np.arange(8) % 3 == 0] == [TEXTS[i] for i in (0, 3, 6)]
    for wrong in (8, -9):
        with pytest.raises(IndexError):
            column[wrong]
    with pytest.raises(TypeError):
        column["one"]


def test_it_equals_the_same_strings(column):
    assert column == TEXTS
    assert TEXTS.__ne__(column) is NotImplemented  # so that the column is asked
    assert column == StringColumn.of(TEXTS)
    assert column != TEXTS[:-1]
    assert column != (*TEXTS[:-1], "y")
    assert column != StringColumn.of(TEXTS[::-1])
    assert column != [*TEXTS]  # as of a tuple


def test_strings_are_found(column):
    for i, text in enumerate(TEXTS):
        assert column.index(text) == i
        assert text in column
    for text in ("tw", "on", "one ", "two", 3):
        assert text not in column
    with pytest.raises(ValueError, match="'two' is not in the column"):
        column.index("two")
    assert StringColumn.of(["b", "a", "b", "a"]).index("a") == 1


def test_copies(column):
    again = pickle.loads(pickle.dumps(column))
    assert again == TEXTS
    if column._path is not None:
        assert len(pickle.dumps(column)) < 500  # the path, not the strings
    np.testing.assert_array_equal(np.array(column), np.array(TEXTS))


def test_take_puts_strings_in_another_order(column, monkeypatch):
    order = np.array([7, 0, 0, 6, 1, 2])
    for size in (1, 7, strings._BLOCK):
        monkeypatch.setattr(strings, "_BLOCK", size)
        assert column.take(order) == tuple(TEXTS[i] for i in order)
    assert column.take(order[:0]) == ()


def test_unique_strings(monkeypatch):
    many = [f"id{i}" for i in range(3000)]
    for size in (5, strings._BLOCK):
        monkeypatch.setattr(strings, "_BLOCK", size)
        assert StringColumn.of(many).is_unique()
        assert not StringColumn.of([*many, "id7"]).is_unique()
        assert StringColumn.of([]).is_unique()
    # What has one hash and differs is compared as it is.
    monkeypatch.setattr(StringColumn, "_hashes", lambda self: np.zeros(len(self), np.uint64))
    assert StringColumn.of(many[:50]).is_unique()
    assert not StringColumn.of([*many[:50], "id7"]).is_unique()
    assert StringColumn.of(many[:50]).index("id7") == 7


def test_hashes_depend_on_order_length_and_each_byte():
    texts = ["ab", "ba", "a", "aa", "aab", "aba", "baa", "\0", "\0\0", ""]
    assert len({*StringColumn.of(texts)._hashes().tolist()}) == len(texts)


def test_damaged_files(tmp_path):
    path = tmp_path / "a.strings"
    StringColumn.of(TEXTS).save(path)
    whole = path.read_bytes()
    for content in (b"", b"x" * 300, whole[:100], whole[:150], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            StringColumn.open(path)
    # The header of an array is read as Python's source.
    for byte in (b"\0", b"\x1b"):
        path.write_bytes(whole[:20] + byte + whole[21:])
        with pytest.raises(ValueError, match=r"a\.strings is damaged"):
            StringColumn.open(path)
    StringColumn.of([]).save(path)
    assert [*StringColumn.open(path)] == []
