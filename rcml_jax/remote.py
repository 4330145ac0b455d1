"""Directories on object storage, `gs://` and `s3://`, which are worked on in a local mirror.

Memory maps, locks, renames and Orbax need a local disk. So a remote directory has a mirror, a
local directory in the user's cache, and the library sees that alone. The commands call `pulled` for
what they read and `written` for what they write; prepared data are `shared`. How an address and its
mirror are kept the same is said in `rcml_jax.mirror`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rcml_jax import files
from rcml_jax.errors import UserError
from rcml_jax.log import log_line
from rcml_jax.mirror import Conflict, Mirror, beside, mirrored, subject
from rcml_jax.parsing import read_json, user_cache, user_path
from rcml_jax.storage import SCHEMES

_UNSAFE = re.compile(r"[\0-\x1f\x7f?#*\[\]\\]")
_WRITER = ".rcml_jax/writer.json"  # the process that writes, with the time of its last sign
_SILENT = 180.0  # seconds without a sign after which a writer counts as dead
_AGAIN = 60.0  # seconds after a failed push
_JOIN = 10.0  # seconds

# Addresses


def is_remote(given: object) -> bool:
    """Whether something is an address on object storage."""
    return isinstance(given, str) and "://" in given and given.partition("://")[0] in SCHEMES


def path_or_address(given: str) -> pathlib.Path | str:
    """An address as it is, without slashes at its end; anything else as a path.

    Raises UserError for neither.
    """
    return _address(given) if is_remote(given) else user_path(given)


def _address(given: str) -> str:
    address = given.rstrip("/")
    scheme, _, rest = address.partition("://")
    parts = rest.split("/")
    if _UNSAFE.search(rest) or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"{given!a} is no address of a directory; write {scheme.rstrip(':')}://BUCKET/NAME "
            "without empty parts, parts of dots alone, and any of ?#*[]\\"
        )
    return address


def local_directory(address: str) -> pathlib.Path:
    """The mirror of an address, below the user's cache; nothing is made or fetched."""
    address = _address(address)
    name = re.sub(r"[^\w.,=+-]", "_", address.rpartition("/")[2], flags=re.ASCII)
    name = name[:80].strip(".,") or "mirror"
    return _mirrors() / hashlib.sha256(address.encode()).hexdigest()[:12] / name


def _mirrors() -> pathlib.Path:
    cache = user_cache()
    place = pathlib.Path("rcml_jax_cache") if cache is None else user_path(cache) / "rcml_jax"
    return place.absolute() / "remote"


def address_of(directory: pathlib.Path | str) -> str | None:
    """The address that a directory is the mirror of; None where it is none."""
    return mirrored(pathlib.Path(directory))


def named(text: str) -> str:
    """A text for the user, with addresses in the place of their mirrors."""
    mirror = re.compile(re.escape(f"{_mirrors()}/") + r"[0-9a-f]{12}/[\w.,=+-]*[\w=+-]", re.ASCII)
    return mirror.sub(lambda match: address_of(match[0]) or match[0], text)


# What the commands use


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory that is written.

    path: where it is on this machine. after_step: None for a local directory; otherwise to be
    called now and then with a number that is new after each checkpoint, or None while one is being
    written; it has what is on the disk sent in the background, and raises UserError where another
    process has written to the address.
    """

    path: pathlib.Path
    after_step: Callable[[int | None], None] | None = None


@contextlib.contextmanager
def written(given: pathlib.Path | str, *, every: float = 0.0) -> Iterator[Place]:
    """A directory to write to: a path as it is, or the mirror of an address.

    The mirror is brought up to date first, and sent in the end, also where the block raises. every:
    the least number of seconds between two snapshots of `Place.after_step`. Raises UserError where
    another process writes there.
    """
    if is_remote(given):
        address = _address(str(given))
        mirror = Mirror(address, local_directory(address))
        with writing(mirror, every) as after_step:
            yield Place(mirror.local, after_step)
    else:
        yield Place(user_path(given))


def pulled(given: pathlib.Path | str) -> pathlib.Path:
    """A directory to read: a path as it is, or the mirror of an address, brought up to date.

    While a process of this machine writes there, its mirror is read as it is. Raises UserError for
    an address where there is nothing.
    """
    if not is_remote(given):
        return user_path(given)
    address = _address(str(given))
    mirror = Mirror(address, local_directory(address))
    if writer := files.holder(_lock(mirror)):
        log_line(f"{writer} is writing to {address}; what it has on this machine is read")
    elif not mirror.pull():
        raise UserError(
            f"there is nothing of rcml_jax in {address}; correct the address, or train or embed "
            "there first"
        )
    return mirror.local


@contextlib.contextmanager
def shared(given: str) -> Iterator[None]:
    """Fetch a directory of prepared data before a block, and send what the block added to it.

    Several processes may do so at once: nothing is removed, neither here nor there. Nothing happens
    for a local directory.
    """
    if not is_remote(given):
        yield
        return
    address = _address(given)
    mirror = Mirror(address, local_directory(address), shared=True)
    mirror.pull()
    yield
    mirror.push()


# One writer at a time


@contextlib.contextmanager
def writing(mirror: Mirror, every: float = 0.0) -> Iterator[Callable[[int | None], None]]:
    """Be the only writer of an address while a block runs; yields what `Place.after_step` is.

    A lock keeps out the processes of this machine, and an object those of others: it holds the time
    of the last sign of the writer. Raises UserError where another process writes.
    """
    mirror.make()
    lock = files.exclusive(
        _lock(mirror),
        f"is writing to {mirror.address}",
        remedy="wait until it ends, or give another address",
    )
    with lock:
        _claim(mirror)
        stop, sender = threading.Event(), _Sender(mirror, every)
        signs = threading.Thread(target=_give_signs, args=(mirror, stop, sender), daemon=True)
        signs.start()
        try:
            mirror.pull()
            mirror.remove_orphans()
            try:
                yield sender
            except KeyboardInterrupt:  # a second one: the user does not want to wait
                raise
            except BaseException:
                sender.close()
                if sender.failure is None:
                    try:
                        mirror.push()
                    except UserError as error:
                        log_line(f"not all of it was sent: {error}")
                raise
            sender.close()
            sender.check()
            mirror.push()
        finally:
            stop.set()
            signs.join(_JOIN)  # or it would write its sign again
            _release(mirror)


def _lock(mirror: Mirror) -> pathlib.Path:
    return beside(mirror.local, "writer.lock")


def _claim(mirror: Mirror) -> None:
    found = _read_writer(mirror)
    if found is not None and _may_live(found):
        left = max(1, round(_SILENT - _age(found)))
        raise UserError(
            f"{subject(found)} is writing to {mirror.address}; wait until it ends, or {left} "
            "seconds if it was killed, or give another address"
        )
    _give_sign(mirror)


def _give_sign(mirror: Mirror) -> None:
    sign = {**mirror.me, "time": time.time()}
    mirror.store.write(_WRITER, json.dumps(sign).encode())


def _give_signs(mirror: Mirror, stop: threading.Event, sender: "_Sender") -> None:
    """Say now and then that this process lives, until it stops or another has taken over."""
    while not stop.wait(_SILENT / 4):
        with contextlib.suppress(UserError):  # no network: the next one may come through
            found = _read_writer(mirror)
            if found is not None and found["id"] != mirror.me["id"]:
                sender.failure = mirror.conflict(subject(found))
                return
            if not stop.is_set():
                _give_sign(mirror)


def _release(mirror: Mirror) -> None:
    with contextlib.suppress(UserError):
        found = _read_writer(mirror)
        if found is not None and found["id"] == mirror.me["id"]:
            mirror.store.remove([_WRITER])


def _read_writer(mirror: Mirror) -> dict[str, Any] | None:
    content = mirror.store.read(_WRITER)
    try:
        found = {} if content is None else read_json(content)
        return {name: found[name] for name in ("id", "pid", "host", "since", "time")}
    except (ValueError, KeyError, TypeError):
        return None


def _age(writer: Mapping[str, Any]) -> float:
    try:
        return time.time() - float(writer["time"])
    except (TypeError, ValueError):
        return _SILENT


def _may_live(writer: Mapping[str, Any]) -> bool:
    # This very process has just taken the lock; a restarted container has the same number and name.
    me = (writer["host"], writer["pid"]) == (socket.gethostname(), os.getpid())
    return not me and _age(writer) < _SILENT and files.may_live(writer)


class _Sender:
    """Sends a mirror in a thread of its own; see `Place.after_step`."""

    def __init__(self, mirror: Mirror, every: float):
        self._mirror, self._every = mirror, every
        self._step: int | None = None
        self._next = time.monotonic() + every
        self._work: queue.Queue = queue.Queue()
        self._idle = threading.Event()
        self._idle.set()
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, step: int | None) -> None:
        self.check()
        if step is None or step == self._step or not self._idle.is_set():
            return
        if time.monotonic() >= self._next:
            # Linked now, while nobody removes a checkpoint.
            staged = self._mirror.stage()
            self._step = step
            self._idle.clear()
            self._work.put(staged)

    def check(self) -> None:
        """Raise what went wrong for good."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Wait for what is on its way."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (staged := self._work.get()) is not None:
            try:
                self._mirror.push_staged(staged)
                self._next = time.monotonic() + self._every
            except Conflict as error:
                self.failure = error
            except UserError as error:  # training goes on: a network that is down comes back
                log_line(f"{error}; it is tried again in a minute")
                self._step, self._next = None, time.monotonic() + _AGAIN
            except Exception as error:
                self.failure = error
            finally:
                self._idle.set()
