"""Files that are whole or not there; locks between real processes, one of them killed."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from rcml_jax import files
from rcml_jax.errors import UserError
from tests.toy import ROOT

HOLD = """
    import pathlib, sys, time
    from rcml_jax import files
    with files.exclusive(pathlib.Path(sys.argv[1]), "is at work"):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def held(lock, seconds=300.0):
    """A process that holds a lock for some time, or until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(lock), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_process_says_who_holds_the_lock(tmp_path):
    lock = tmp_path / "lock"
    assert files.holder(lock) is None
    with held(lock) as process:
        with pytest.raises(UserError) as error, files.exclusive(lock, "is at work", remedy="wait"):
            raise AssertionError("inside")
        who = files.holder(lock)
        assert who.startswith(f"process {process.pid} on host {os.uname().nodename} (since 2")
        assert str(error.value) == f"{who} is at work; wait"


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    lock = tmp_path / "lock"
    with held(lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    note = tmp_path / "lock.json"
    assert json.loads(note.read_text())["pid"] == process.pid  # nobody took it away
    assert files.holder(lock) is None
    with files.exclusive(lock, ""):
        assert json.loads(note.read_text())["pid"] == os.getpid()
        assert files.holder(lock) is None  # this process is nobody else
    assert not note.exists()


def test_who_waits_says_so_once_and_goes_on(tmp_path):
    lines = []
    with held(tmp_path / "lock", 1.0) as process:
        with files.exclusive(tmp_path / "lock", "is at work", wait=True, log=lines.append):
            pass
        assert process.wait(10) == 0
    (line,) = lines
    assert line.startswith(f"process {process.pid} on host ")
    assert line.endswith(") is at work; waiting for it")


def test_the_note_of_a_dead_process_names_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_HOLDER_SECONDS", 0.0)
    with held(tmp_path / "lock"):
        (tmp_path / "lock.json").write_text("{")
        assert files.holder(tmp_path / "lock") == "another process"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refused(self, timeout):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.filelock.FileLock, "acquire", refused)
    code = errno.ENOLCK
    with files.exclusive(tmp_path / "lock", ""):
        pass
    code = errno.EACCES
    with (
        pytest.raises(UserError, match=r"cannot write .*lock: Permission denied"),
        files.exclusive(tmp_path / "lock", ""),
    ):
        pass


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_whole_or_not_there(tmp_path, shared):
    path = tmp_path / "file"

    def fail(error):
        with files.atomic_file(path, shared=shared) as file:
            file.write(b"half")
            raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
        assert list(tmp_path.iterdir()) == []
    with files.atomic_file(path, shared=shared, durable=True) as file:
        file.write(b"whole")
        assert not path.exists()
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"whole"


def test_a_path_without_a_name_is_no_file():
    with pytest.raises(UserError, match=r"cannot write \.: Is a directory"):
        files.write_whole(pathlib.Path("."), "x")


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "eval.json"
    files.write_whole(path, "old é")
    (tmp_path / "eval.json.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*eval.json: No space left on device"):
        files.write_whole(path, "new")
    assert path.read_text("utf-8") == "old é"
    assert [x.name for x in tmp_path.iterdir()] == ["eval.json"]
