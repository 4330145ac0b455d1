"""Files that are whole or not there, and locks that keep other processes out."""

import contextlib
import datetime
import errno
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import filelock

from rcml_jax.errors import UserError

#: What a file system without locks answers; its users are on their own, as without this module.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_POLL_SECONDS = 0.1
_HOLDER_SECONDS = 1.0


@contextlib.contextmanager
def atomic_file(
    path: pathlib.Path, *, shared: bool = False, durable: bool = False
) -> Iterator[BinaryIO]:
    """A new binary file that becomes `path` when the block ends; a failure leaves nothing behind.

    Until then it is `<path>.part`. shared: other processes may write the same path, so the part has
    the number of this process in its name. durable: the file is on the disk before it is renamed.
    Raises OSError.
    """
    if not path.name:  # such as "."
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: pathlib.Path, content: str | bytes | memoryview) -> None:
    """Write a file whole or not at all. Raises UserError where the disk refuses it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with atomic_file(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def exclusive(
    lock: pathlib.Path,
    use: str,
    *,
    remedy: str = "wait until it ends",
    wait: bool = False,
    log: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Keep other processes out of a directory or a file while the block runs.

    lock: the lock file. It stays where it is; the operating system frees the lock of a process that
    was killed. Beside it `<lock>.json` names the holder, for messages alone. use: what a holder
    does, the predicate of a sentence: "is training in runs/a". wait: wait for another holder, and
    say so to `log`, instead of raising.

    Raises:
      UserError: another process holds the lock (with `remedy`), or the lock cannot be made.
    """
    with contextlib.ExitStack() as stack:
        taken = _lock(lock)
        told = False
        while not _acquire(taken):
            if not wait:
                raise UserError(f"{_describe(lock)} {use}; {remedy}")
            if not told and log is not None:
                log(f"{_describe(lock)} {use}; waiting for it")
            told = True
            time.sleep(_POLL_SECONDS)
        stack.callback(taken.release)
        note = _note(lock)
        with contextlib.suppress(OSError), atomic_file(note) as file:
            file.write(json.dumps(_this_process()).encode())
        stack.callback(_forget, note)
        yield


def holder(lock: pathlib.Path) -> str | None:
    """Who else holds a lock, as the subject of a sentence; None for nobody and this process."""
    if not lock.is_file():
        return None
    taken = _lock(lock)
    if _acquire(taken):
        taken.release()
        return None
    found = _read_note(lock)
    mine = found is not None and _is_here(found) and found["pid"] == os.getpid()
    return None if mine else _describe(lock)


def abandoned(lock: pathlib.Path) -> bool:
    """Whether a lock was held by a process of this machine that was killed.

    Locks without a note, and those of other machines, count as held.
    """
    found = _read_note(lock)
    return found is not None and not may_live(found)


def _lock(path: pathlib.Path) -> filelock.BaseFileLock:
    return filelock.FileLock(path, timeout=0, thread_local=False)


def _acquire(lock: filelock.BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            reason = error.strerror or error
            raise UserError(f"cannot write {lock.lock_file}: {reason}") from error
    return True


def _note(lock: pathlib.Path) -> pathlib.Path:
    return lock.with_name(lock.name + ".json")


def _forget(note: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        note.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _describe(lock: pathlib.Path) -> str:
    """The holder of a lock: "process 17 on host a (since 2030-01-31 12:00:00+00:00)"."""
    # It may have taken the lock a moment ago, and the note still be that of a dead one.
    end = time.monotonic() + _HOLDER_SECONDS
    found = _read_note(lock)
    while (found is None or not may_live(found)) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        found = _read_note(lock)
    if found is None:
        return "another process"
    return "process {pid} on host {host} (since {since})".format(**found)


def _read_note(lock: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(_note(lock).read_text("utf-8"))
        return {name: found[name] for name in ("pid", "host", "since")}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_here(found: Mapping[str, Any]) -> bool:
    return found["host"] == socket.gethostname()


def may_live(found: Mapping[str, Any]) -> bool:
    """Whether a process, {"host", "pid"}, may be alive: unknown of those of other hosts."""
    if not _is_here(found) or os.name != "posix":
        return True
    try:
        os.kill(found["pid"], 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return True
