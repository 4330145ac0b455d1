"""Intermediate results: made once, made anew where damaged, whole or not there."""

import errno

import numpy as np
import pytest

from rcml_jax.data import stages
from rcml_jax.data.stages import Stages, file_state, pack, unpack
from rcml_jax.errors import UserError


class Work:
    """Counts how often it is done."""

    def __init__(self, **arrays):
        self.arrays, self.done = arrays, 0

    def __call__(self):
        self.done += 1
        return self.arrays


def test_a_stage_is_made_once_for_a_key(tmp_path):
    stages, work = Stages(tmp_path / "new"), Work(x=np.arange(4), names=pack(["é", "b"]))
    for _ in range(2):
        arrays = stages.get("core", [1, "a"], work)
        np.testing.assert_array_equal(arrays["x"], np.arange(4))
        assert unpack(arrays["names"]) == ["é", "b"]
    assert work.done == 1
    stages.get("core", [2, "a"], work)
    stages.get("items", [1, "a"], work)
    assert work.done == 3


@pytest.mark.parametrize("damage", [b"", b"PK nothing"])
def test_a_damaged_stage_is_made_anew(tmp_path, damage):
    stages, work = Stages(tmp_path), Work(x=np.arange(4))
    stages.get("core", 1, work)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage or path.read_bytes()[:100])
    np.testing.assert_array_equal(stages.get("core", 1, work)["x"], np.arange(4))
    assert work.done == 2


def test_objects_are_never_unpickled(tmp_path):
    stages = Stages(tmp_path)
    stages.get("core", 1, Work(x=np.arange(4)))
    (path,) = tmp_path.iterdir()
    with path.open("wb") as file:
        np.savez(file, x=np.array([{}], object))
    assert stages.get("core", 1, Work(x=np.arange(2)))["x"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "No room is left on the disk"), (errno.EROFS, "cannot be written")],
)
def test_a_disk_error_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, code, message):
    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(code, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(stages.np, "savez", savez)
        with pytest.raises(UserError, match=message):
            Stages(tmp_path).get("core", 1, Work(x=np.arange(4)))
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_work_itself_is_not_the_disks(tmp_path):
    def work():
        raise OSError("of the work")

    with pytest.raises(OSError, match="of the work"):
        Stages(tmp_path).get("core", 1, work)


def test_the_state_of_a_file_changes_with_it(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    before = file_state(path)
    assert before == file_state(path)
    path.write_bytes(b"abcd")
    assert before != file_state(path)
