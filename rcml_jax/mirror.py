"""A local directory that is kept the same as a remote one, snapshot by snapshot.

What is stored at an address:

    .rcml_jax/snapshots/<number>.json   each file's size, time and chunks; the highest one counts
    .rcml_jax/chunks/<SHA-256>          at most 16 MiB of a file, named by its content
    eval.json, metrics.jsonl, ...       copies of small texts for people; nothing here reads them

A chunk never changes, and a snapshot is written after all its chunks. A kill at any moment leaves
the former snapshot whole. Of a large array only the chunks that changed are sent. A snapshot is
made only where none has its number, which the storage decides, so of two writers one notices.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rcml_jax import files
from rcml_jax.errors import UserError
from rcml_jax.log import counted, log_line
from rcml_jax.parsing import read_json
from rcml_jax.storage import Storage

_CHUNK = 16 * 2**20  # bytes
_AT_ONCE = 8  # files in transfer; each has one chunk in memory
_TRIES = 5
_SNAPSHOTS, _CHUNKS = ".rcml_jax/snapshots", ".rcml_jax/chunks"
_HEX = re.compile("[0-9a-f]{64}")
_ORPHAN = 3600.0  # age in seconds of chunks that may be removed although no snapshot had them
_RACY = 100_000_000  # nanoseconds: a file as new as that may change without its time changing
_FOR_PEOPLE, _MOST_FOR_PEOPLE = (".json", ".jsonl", ".md"), 2**20


@dataclasses.dataclass(frozen=True)
class _File:
    size: int
    mtime_ns: int
    chunks: tuple[str, ...]

    def same(self, other: "_File | None") -> bool:
        """Whether the content is the same."""
        return other is not None and (self.size, self.chunks) == (other.size, other.chunks)


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """What one snapshot holds; number 0 for an address without any."""

    number: int = 0
    id: str = ""
    files: Mapping[str, _File] = dataclasses.field(default_factory=dict)
    writer: str = "another process"


@dataclasses.dataclass(frozen=True)
class _State:
    """What a mirror was when it was last the same as a snapshot; address: "" for no mirror."""

    address: str = ""
    id: str = ""
    files: Mapping[str, _File] = dataclasses.field(default_factory=dict)


class Conflict(UserError):
    """Another process has written to the address."""


class _Gone(Exception):
    """A chunk is no longer there."""


class Mirror:
    """A local directory and the address that it is the mirror of.

    shared: several processes write at once, so nothing is ever removed. filesystem: of fsspec, by
    default that of the scheme. me: what other processes are told of this one. Beside `local` stand
    its locks and `.<name>.state.json`, what it last had in common with the address.

    Raises UserError, here and in every method, where the address cannot be used: a missing package,
    no credentials, no permission, no bucket, no network.
    """

    def __init__(
        self,
        address: str,
        local: pathlib.Path,
        *,
        shared: bool = False,
        filesystem: Any = None,
    ):
        self.address, self.local, self.shared = address, local.absolute(), shared
        self.store = Storage(self.address, filesystem)
        self._base: _Snapshot | None = None
        self._sent: set[str] = set()
        self.me: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        }

    # Fetching

    def pull(self) -> int:
        """Make the local directory what the address holds, and return the number of its files.

        Where nothing was written to the address since this mirror was last the same, what is newer
        here stays: it is the work of a process that was killed before it could send it.
        """
        self.make()
        with self._locked():
            for _ in range(_TRIES):
                snapshot = self._newest()
                try:
                    self._take(snapshot)
                except _Gone:  # a new snapshot came, and the chunks of the old one went
                    continue
                self._base = snapshot
                return len(snapshot.files)
        raise UserError(
            f"{self.address} is damaged: chunks of its newest snapshot are missing; restore them "
            "(a bucket with versions keeps them), or remove the directory and start anew"
        )

    def _take(self, snapshot: _Snapshot) -> None:
        state, there = _read_state(self._state), _scan(self.local)
        if not state.address and there and snapshot.number:
            raise UserError(
                f"{self.local} holds files and is no mirror of {self.address}; move them away"
            )
        same = state.address == self.address and state.id == snapshot.id
        wanted = {
            name: file
            for name, file in snapshot.files.items()
            if name not in there
            or not (same or self._has(file, there[name], state.files.get(name)))
        }
        size = sum(file.size for file in wanted.values())
        if shutil.disk_usage(self.local).free < size:
            raise UserError(
                f"no room in {self.local} for {_size(size)} of {self.address}; free some, or set "
                "XDG_CACHE_HOME to a directory on another disk"
            )
        # Until all is done, nobody may take this for a state that the address had.
        self._write_state(state.files if same else {}, state.id if same else "unknown")
        if wanted:
            log_line(
                f"{self.address}: fetching {counted(len(wanted), 'files')}, {_size(size)}, into "
                f"{self.local}"
            )
        _parallel(self._fetch, wanted.items())
        if not same and not self.shared:
            self._remove_others(snapshot.files)
        self._write_state(self._now(snapshot.files, state.files, same), snapshot.id)

    def _has(self, file: _File, path: pathlib.Path, known: _File | None) -> bool:
        """Whether a local file has the content that a snapshot says."""
        state = path.stat()
        if known is not None and (state.st_size, state.st_mtime_ns) == (known.size, known.mtime_ns):
            return known.same(file)
        if state.st_size != file.size:
            return False
        return tuple(_digest(chunk) for chunk in _chunks(path, file.size)) == file.chunks

    def _fetch(self, name: str, file: _File) -> None:
        path = self.local / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_file(path) as out:
                for chunk in file.chunks:
                    content = self.store.read(f"{_CHUNKS}/{chunk}")
                    if content is None:
                        raise _Gone
                    if _digest(content) != chunk:
                        raise UserError(
                            f"{self.address} is damaged: {name} has another content than its "
                            "snapshot says; remove the directory and start anew"
                        )
                    out.write(content)
            # Stored pixels and others are found by the times of what they were made from.
            os.utime(path, ns=(file.mtime_ns, file.mtime_ns))
        except OSError as error:
            raise _unwritable(path, error) from error

    def _remove_others(self, wanted: Mapping[str, Any]) -> None:
        """Remove the files that a snapshot lacks, and folders that are empty then."""
        try:
            for folder, _, names in os.walk(self.local, topdown=False):
                for name in names:
                    path = pathlib.Path(folder, name)
                    relative = path.relative_to(self.local).as_posix()
                    if relative not in wanted and not _is_lock(name):
                        path.unlink(missing_ok=True)
                if pathlib.Path(folder) != self.local:
                    with contextlib.suppress(OSError):  # not empty
                        os.rmdir(folder)
        except OSError as error:
            raise _unwritable(self.local, error) from error

    def _now(
        self, content: Mapping[str, _File], before: Mapping[str, _File], same: bool
    ) -> dict[str, _File]:
        """The files as they are, with the chunks that they have; those of unknown content not."""
        found = {}
        for name, file in content.items():
            with contextlib.suppress(OSError):
                state = (self.local / name).stat()
                known = before.get(name)
                if (state.st_size, state.st_mtime_ns) == (file.size, file.mtime_ns) or not same:
                    found[name] = _File(state.st_size, state.st_mtime_ns, file.chunks)
                elif known is not None:
                    found[name] = known
        return found

    # Sending

    def push(self) -> bool:
        """Send what differs from the snapshot that was pulled; returns whether anything did.

        Raises Conflict, with nothing changed, where another process has made a snapshot since; with
        `shared` both are joined.
        """
        self.make()
        with self._locked():
            return self._push(_scan(self.local))

    def _push(self, paths: Mapping[str, pathlib.Path]) -> bool:
        state = _read_state(self._state)
        for _ in range(_TRIES):
            base = self._base
            if base is None or self.shared:
                base = self._newest()
            if self._base is None and not self.shared and base.id != state.id:
                raise self.conflict(base.writer)
            mine, racy = self._send(paths, state.files, base)
            known = {
                name: dataclasses.replace(file, mtime_ns=-1) if name in racy else file
                for name, file in mine.items()
            }
            content = {**base.files, **mine} if self.shared else mine
            if content.keys() == base.files.keys() and all(
                file.same(base.files[name]) for name, file in content.items()
            ):
                self._base = base
                self._write_state(known, base.id)
                return False
            made = _Snapshot(base.number + 1, uuid.uuid4().hex, content)
            if self._commit(made):
                self._base = made
                self._write_state(known, made.id)
                self._clean(base, made)
                if not self.shared:
                    self._copy_for_people(paths, base, made)
                return True
            if not self.shared:
                raise self.conflict(self._newest().writer)
        raise UserError(
            f"{self.address} is written to by too many processes at once; start again to go on"
        )

    def _send(
        self, paths: Mapping[str, pathlib.Path], known: Mapping[str, _File], base: _Snapshot
    ) -> tuple[dict[str, _File], set[str]]:
        """Send the chunks that the address lacks.

        Returns what the files are, and the names of those that are so new that another content
        could have the same time.
        """
        there = {chunk for file in base.files.values() for chunk in file.chunks} | self._sent
        found: dict[str, _File] = {}
        racy: set[str] = set()

        def send(name: str, path: pathlib.Path) -> None:
            try:
                state = path.stat()
                before = known.get(name)
                if (
                    before is not None
                    and (state.st_size, state.st_mtime_ns) == (before.size, before.mtime_ns)
                    and there.issuperset(before.chunks)
                ):
                    found[name] = before
                    return
                if time.time_ns() - state.st_mtime_ns < _RACY:
                    racy.add(name)
                chunks, size = [], 0
                for content in _chunks(path, state.st_size):
                    chunk, size = _digest(content), size + len(content)
                    if chunk not in there:
                        self.store.write(f"{_CHUNKS}/{chunk}", content)
                        there.add(chunk)
                        self._sent.add(chunk)
                    chunks.append(chunk)
                found[name] = _File(size, state.st_mtime_ns, tuple(chunks))
            except FileNotFoundError:
                pass  # removed since
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error

        _parallel(send, paths.items())
        return {name: found[name] for name in paths if name in found}, racy

    def _commit(self, made: _Snapshot) -> bool:
        """Make a snapshot, unless there is one of its number. Returns whether it is this one."""
        value = {
            "format": 1,
            "id": made.id,
            "writer": self.me,
            "files": {
                name: [file.size, file.mtime_ns, list(file.chunks)]
                for name, file in sorted(made.files.items())
            },
        }
        name = _snapshot_name(made.number)
        # Asked first: not every storage can refuse to write over an object.
        if max(self._numbers(), default=0) >= made.number:
            return False
        if self.store.create(name, json.dumps(value, indent=1).encode()):
            return True
        # The answer to a first try may have been lost.
        there = self.store.read(name)
        return there is not None and _read_snapshot(there, made.number, self.address).id == made.id

    def _clean(self, base: _Snapshot, made: _Snapshot) -> None:
        """Remove older snapshots, and chunks that only the one before had."""
        older = [_snapshot_name(number) for number in self._numbers() if number < made.number]
        self.store.remove(older)
        if not self.shared:
            before, now = (
                {chunk for file in x.files.values() for chunk in file.chunks} for x in (base, made)
            )
            self._sent &= now
            self.store.remove(f"{_CHUNKS}/{chunk}" for chunk in before - now)

    def remove_orphans(self) -> None:
        """Remove what a killed process has sent and no snapshot names, an hour later."""
        assert self._base is not None
        used = {chunk for file in self._base.files.values() for chunk in file.chunks}
        end = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=_ORPHAN)
        self.store.remove(
            name
            for name, since in self.store.names(_CHUNKS).items()
            if name.rpartition("/")[2] not in used and since is not None and since < end
        )

    def _copy_for_people(
        self, paths: Mapping[str, pathlib.Path], base: _Snapshot, made: _Snapshot
    ) -> None:
        """Small texts by their own names, so that one can read them without this library."""
        for name, file in made.files.items():
            if _is_for_people(name, file) and not file.same(base.files.get(name)):
                with contextlib.suppress(FileNotFoundError):
                    self.store.write(name, paths[name].read_bytes())
        self.store.remove(
            name
            for name, file in base.files.items()
            if name not in made.files and _is_for_people(name, file)
        )

    def conflict(self, writer: str) -> Conflict:
        """The error of a writer that another one, the subject of a sentence, has overtaken."""
        return Conflict(
            f"{writer} has written to {self.address} since this process began, so nothing "
            "more is sent there; let only one process write, and start again to go on from what "
            "is there"
        )

    # What is there

    def _numbers(self) -> list[int]:
        stems = (pathlib.PurePosixPath(name).stem for name in self.store.names(_SNAPSHOTS))
        return [int(stem) for stem in stems if stem.isdigit()]

    def _newest(self) -> _Snapshot:
        for _ in range(_TRIES):
            number = max(self._numbers(), default=0)
            if not number:
                return _Snapshot()
            content = self.store.read(_snapshot_name(number))
            if content is not None:  # or a newer one has replaced it
                return _read_snapshot(content, number, self.address)
        raise UserError(f"{self.address} changes all the time; start again when nobody writes")

    @property
    def _state(self) -> pathlib.Path:
        return beside(self.local, "state")

    def _write_state(self, content: Mapping[str, _File], id: str) -> None:
        value = {
            "address": self.address,
            "id": id,
            "files": {
                name: [file.size, file.mtime_ns, list(file.chunks)]
                for name, file in content.items()
            },
        }
        files.write_whole(self._state, json.dumps(value))

    def make(self) -> None:
        """Make the local directory. Raises UserError where it cannot be made."""
        try:
            self.local.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.local, error) from error

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes of this machine from changing the mirror meanwhile."""
        return files.exclusive(
            beside(self.local, "lock"),
            f"is fetching or sending {self.address}",
            wait=True,
            log=log_line,
        )

    def stage(self) -> dict[str, pathlib.Path]:
        """The files of this moment for `push_staged`: links, so that they stay when replaced."""
        folder = beside(self.local, "staged")
        found = {}
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for number, (name, path) in enumerate(_scan(self.local).items()):
                link = folder / str(number)
                with contextlib.suppress(FileNotFoundError):
                    if name.endswith(".jsonl") or not _linked(path, link):  # lines are appended
                        shutil.copy2(path, link)
                    found[name] = link
        except OSError as error:
            raise _unwritable(folder, error) from error
        return found

    def push_staged(self, paths: Mapping[str, pathlib.Path]) -> None:
        """As `push`, of what `stage` returned; may be called in another thread."""
        try:
            with self._locked():
                self._push(paths)
        finally:
            shutil.rmtree(beside(self.local, "staged"), ignore_errors=True)


def _scan(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a directory by their relative names, but locks and what is being written."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_unfinished(name)]
        for name in names:
            path = pathlib.Path(parent, name)
            if not (_is_lock(name) or _is_unfinished(name)) and path.is_file():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _linked(path: pathlib.Path, link: pathlib.Path) -> bool:
    """Make a link; returns whether the file system can."""
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def _is_lock(name: str) -> bool:
    return name.endswith((".lock", ".lock.json"))


def _is_unfinished(name: str) -> bool:
    """Whether a name is that of a part, or of what Orbax or TFDS have not finished."""
    return (
        name.endswith(".part") or "orbax-checkpoint-tmp" in name or name.startswith("incomplete.")
    )


def _is_for_people(name: str, file: _File) -> bool:
    text = name.endswith(_FOR_PEOPLE) and file.size <= _MOST_FOR_PEOPLE
    return text and "checkpoints/" not in name


def _chunks(path: pathlib.Path, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, which may have grown since, in pieces."""
    with path.open("rb") as file:
        while size > 0 and (content := file.read(min(_CHUNK, size))):
            size -= len(content)
            yield content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parallel(do: Callable[..., None], items: Iterable[tuple]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        tasks = [pool.submit(do, *item) for item in items]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _snapshot_name(number: int) -> str:
    return f"{_SNAPSHOTS}/{number:012d}.json"


def _read_snapshot(content: bytes, number: int, address: str) -> _Snapshot:
    try:
        value = read_json(content)
        if value["format"] != 1:
            raise ValueError(f"its format is {value['format']}, which needs a newer version")
        found = _read_files(value["files"])
        return _Snapshot(number, str(value["id"]), found, subject(value["writer"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{address}/{_snapshot_name(number)} is damaged ({error}); restore it, or remove it to "
            "use the snapshot before, if there is one"
        ) from error


def _read_files(value: Mapping[str, Any]) -> dict[str, _File]:
    found = {}
    for name, (size, mtime_ns, chunks) in value.items():
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name:
            raise ValueError(f"{name!a} is no name of a file in a directory")
        if not all(_HEX.fullmatch(chunk) for chunk in chunks):
            raise ValueError(f"a chunk of {name!a} has no name of a chunk")
        found[name] = _File(int(size), int(mtime_ns), tuple(chunks))
    return found


def mirrored(local: pathlib.Path) -> str | None:
    """The address that a directory is the mirror of; None where it is none."""
    return _read_state(beside(local.absolute(), "state")).address or None


def _read_state(path: pathlib.Path) -> _State:
    try:
        value = json.loads(path.read_text("utf-8"))
        return _State(value["address"], value["id"], _read_files(value["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _State()


def beside(local: pathlib.Path, what: str) -> pathlib.Path:
    """A file or folder of a mirror's own, which stands beside it."""
    suffix = ".json" if what == "state" else ""
    return local.with_name(f".{local.name}.{what}{suffix}")


def subject(writer: Mapping[str, Any]) -> str:
    """A writer as the subject of a sentence."""
    return f"process {writer['pid']} on host {writer['host']} (since {writer['since']})"


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _unwritable(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}")
