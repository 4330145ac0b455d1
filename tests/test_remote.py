"""Directories on object storage: the mirror on fsspec's memory, and s3:// on a local server."""

import contextlib
import json
import re
import socket
import threading
import time

import numpy as np
import pytest

from rcml_jax import mirror as mirrors
from rcml_jax import remote, storage
from rcml_jax.errors import UserError
from rcml_jax.mirror import Conflict, Mirror

fsspec = pytest.importorskip("fsspec")


class Counting:
    """A file system of fsspec that counts what is written, and can fail or wait."""

    def __init__(self, store):
        self.store, self.written, self.fail = store, [], None

    def pipe_file(self, path, value, mode="overwrite"):
        if self.fail is not None:
            self.fail(path)
        self.written.append(path)
        return self.store.pipe_file(path, value, mode=mode)

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.fixture
def store(request):
    """Fsspec's memory, whose objects go with the test."""
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    files.store.clear()
    yield Counting(files)
    files.store.clear()


def mirror_of(store, path, **options):
    return Mirror("memory://bucket/run", path, filesystem=store, **options)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def objects(store):
    return {name.removeprefix("/bucket/run/") for name in store.find("bucket/run")}


FILES = {"config.json": b"{}", "checkpoints/5/state": b"x" * 1000, "empty": b""}
UNFINISHED = (".lock", ".lock.json", "a.part", "7.orbax-checkpoint-tmp-1/state", "incomplete.x/a")


def test_what_is_pushed_is_pulled_elsewhere_with_its_times(store, tmp_path):
    a, b = mirror_of(store, tmp_path / "a"), mirror_of(store, tmp_path / "b" / "deep")
    assert a.pull() == 0
    assert not a.push()  # there is nothing
    assert objects(store) == set()
    write(a.local, FILES | dict.fromkeys(UNFINISHED, b"?"))
    assert a.push()
    assert b.pull() == 3
    assert contents(b.local) == FILES
    for name in FILES:
        assert (b.local / name).stat().st_mtime_ns == (a.local / name).stat().st_mtime_ns
    # People read small texts by their names.
    assert store.cat_file("bucket/run/config.json") == b"{}"
    assert not {name for name in objects(store) if name.startswith("checkpoints")}
    assert not a.push()
    assert not b.push()


def test_only_what_changed_is_sent_and_fetched(store, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "_CHUNK", 1000)
    a, b = mirror_of(store, tmp_path / "a"), mirror_of(store, tmp_path / "b")
    a.pull()
    array = np.zeros(10_000, np.uint8)
    write(a.local, FILES | {"array.npy": array.tobytes()})
    a.push()
    b.pull()
    # Ten chunks of zeros are one object; the files' four, a snapshot and a copy.
    assert len([x for x in store.written if "/chunks/" in x]) == 3
    with (a.local / "array.npy").open("r+b") as file:  # in place, of the same size
        file.seek(4500)
        file.write(b"1")
    store.written.clear()
    assert a.push()
    assert len([x for x in store.written if "/chunks/" in x]) == 1
    assert len(store.written) == 2
    kept = (b.local / "config.json").stat().st_ino
    assert b.pull() == 4
    assert contents(b.local) == contents(a.local)
    assert (b.local / "config.json").stat().st_ino == kept
    # A removed file goes, with its folder and the chunks that nothing names.
    (a.local / "checkpoints/5/state").unlink()
    (a.local / "checkpoints/5").rmdir()
    (a.local / "config.json").unlink()
    assert a.push()
    assert b.pull() == 2
    assert not (b.local / "checkpoints").exists()
    assert len([x for x in objects(store) if "/chunks/" in x]) == 2
    assert "config.json" not in objects(store)
    assert len([x for x in objects(store) if "/snapshots/" in x]) == 1


def at_write(number):
    """What raises at one write, as a kill would."""
    writes = iter(range(number))

    def fail(path):
        if next(writes, None) is None:
            raise OSError(5, "killed")

    return fail


def test_a_push_that_is_killed_leaves_the_former_snapshot_whole(store, tmp_path):
    a, b, c = (mirror_of(store, tmp_path / name) for name in "abc")
    a.pull()
    write(a.local, {"one": b"1", "two": b"2", "same": b"0"})
    a.push()
    write(a.local, {"one": b"11", "two": b"22", "three": b"33"})
    for number in range(4):  # of three chunks and the snapshot the one that is not written
        store.fail = at_write(number)
        with pytest.raises(UserError, match=r"memory://bucket/run cannot be used \(OSError"):
            mirror_of(store, a.local).push()
        b.pull()
        assert contents(b.local) == {"one": b"1", "two": b"2", "same": b"0"}
    store.fail = None
    mirror_of(store, a.local).push()
    c.pull()
    assert (
        contents(c.local)
        == contents(a.local)
        == {"one": b"11", "two": b"22", "three": b"33", "same": b"0"}
    )


def test_chunks_that_no_snapshot_names_go_after_an_hour(store, tmp_path, monkeypatch):
    a = mirror_of(store, tmp_path / "a")
    a.pull()
    write(a.local, FILES)
    a.push()
    store.pipe_file("bucket/run/.rcml_jax/chunks/" + "0" * 64, b"orphan")
    before = objects(store)
    a.remove_orphans()
    assert objects(store) == before
    monkeypatch.setattr(mirrors, "_ORPHAN", -1.0)
    a.remove_orphans()
    assert objects(store) == before - {".rcml_jax/chunks/" + "0" * 64}


def test_work_that_was_not_sent_stays_until_the_address_changes(store, tmp_path):
    a, b = mirror_of(store, tmp_path / "a"), mirror_of(store, tmp_path / "b")
    a.pull()
    write(a.local, {"metrics.jsonl": b"1\n"})
    a.push()
    write(a.local, {"metrics.jsonl": b"1\n2\n", "checkpoints/2/state": b"2"})
    # Killed here; the next process goes on with what is on this disk.
    a = mirror_of(store, a.local)
    a.pull()
    assert contents(a.local) == {"metrics.jsonl": b"1\n2\n", "checkpoints/2/state": b"2"}
    # But where another machine has gone on meanwhile, that is what counts.
    b.pull()
    write(b.local, {"metrics.jsonl": b"1\nb\n"})
    b.push()
    a = mirror_of(store, a.local)
    a.pull()
    assert contents(a.local) == {"metrics.jsonl": b"1\nb\n"}
    # A missing file comes back; an address that was emptied empties its mirrors.
    (a.local / "metrics.jsonl").unlink()
    mirror_of(store, a.local).pull()
    assert contents(a.local) == {"metrics.jsonl": b"1\nb\n"}
    store.store.store.clear()
    assert mirror_of(store, a.local).pull() == 0
    assert contents(a.local) == {}


def test_a_pull_that_failed_is_no_state_of_the_address(store, tmp_path):
    a, b = mirror_of(store, tmp_path / "a"), mirror_of(store, tmp_path / "b")
    a.pull()
    write(a.local, {"one": b"1", "two": b"2"})
    a.push()
    b.pull()
    write(a.local, {"one": b"11", "two": b"22"})
    a.push()
    chunk = next(x for x in objects(store) if store.cat_file(f"bucket/run/{x}") == b"22")
    store.pipe_file(f"bucket/run/{chunk}", b"33")
    with pytest.raises(UserError, match="is damaged: two has another content than its snapshot"):
        b.pull()
    assert (b.local / "two").read_bytes() == b"2"
    with pytest.raises(Conflict):
        mirror_of(store, b.local).push()
    store.rm_file(f"bucket/run/{chunk}")
    with pytest.raises(UserError, match="chunks of its newest snapshot are missing"):
        b.pull()
    store.pipe_file(f"bucket/run/{chunk}", b"22")
    b.pull()
    assert contents(b.local) == contents(a.local)


def test_files_of_others_are_neither_overwritten_nor_escaped_to(store, tmp_path):
    a = mirror_of(store, tmp_path / "a")
    a.pull()
    write(a.local, FILES)
    a.push()
    write(tmp_path / "mine", {"thesis": b"!"})
    with pytest.raises(UserError, match=r"mine holds files and is no mirror of memory://"):
        mirror_of(store, tmp_path / "mine").pull()
    assert contents(tmp_path / "mine") == {"thesis": b"!"}
    name = ".rcml_jax/snapshots/000000000001.json"
    good = store.cat_file(f"bucket/run/{name}")
    for bad in (
        good.replace(b"config.json", b"../config.json"),
        good.replace(b"config.json", b"/config.json"),
        good.replace(b'"format": 1', b'"format": 2'),
        good[:-20],
        b"[]",
    ):
        assert bad != good
        store.pipe_file(f"bucket/run/{name}", bad)
        with pytest.raises(UserError, match=re.escape(f"memory://bucket/run/{name} is damaged (")):
            mirror_of(store, tmp_path / "b").pull()
        assert contents(tmp_path / "b") == {}


def test_the_slower_of_two_writers_notices(store, tmp_path):
    a, b, c = (mirror_of(store, tmp_path / name) for name in "abc")
    a.pull()
    b.pull()
    write(a.local, {"one": b"a"})
    write(b.local, {"one": b"b"})
    assert a.push()
    with pytest.raises(
        Conflict, match=r"process \d+ on host .* has written to memory://bucket/run"
    ):
        b.push()
    c.pull()
    assert contents(c.local) == {"one": b"a"}
    # Also where both have seen that the number is free: the storage takes one of them.
    write(c.local, {"one": b"c"})
    write(a.local, {"one": b"aa"})
    listing = a.store.names
    a.store.names = lambda prefix: {} if "snapshots" in prefix else listing(prefix)
    assert c.push()
    with pytest.raises(UserError):
        a.push()
    d = mirror_of(store, tmp_path / "d")
    d.pull()
    assert contents(d.local) == {"one": b"c"}


def test_prepared_data_of_several_machines_are_joined(store, tmp_path):
    a, b, c = (mirror_of(store, tmp_path / name, shared=True) for name in "abc")
    a.pull()
    b.pull()
    write(a.local, {"emoji/graph": b"a", "same": b"1"})
    write(b.local, {"grocery/graph": b"b", "same": b"1"})
    assert a.push()
    assert b.push()
    assert c.pull() == 3
    (a.local / "same").unlink()
    assert not a.push()  # nothing is removed
    assert a.pull() == 3
    assert contents(a.local) == contents(c.local)


@contextlib.contextmanager
def on_another_machine(store, path, pid=1):
    """A mirror whose process seems to run elsewhere."""
    mirror = mirror_of(store, path)
    mirror.me |= {"host": "elsewhere", "pid": pid}
    yield mirror


def test_a_second_writer_is_refused_until_the_first_is_silent(store, tmp_path, monkeypatch):
    mine = mirror_of(store, tmp_path / "mine")
    with on_another_machine(store, tmp_path / "theirs") as theirs, remote.writing(theirs):
        with (
            pytest.raises(UserError, match=r"process 1 on host elsewhere .* is writing to memory:"),
            remote.writing(mine),
        ):
            raise AssertionError
        write(theirs.local, {"one": b"1"})
    with remote.writing(mine):  # they have ended
        assert contents(mine.local) == {"one": b"1"}
        with (
            pytest.raises(UserError, match=r"is writing to memory://.*; wait until it ends, or gi"),
            remote.writing(mirror_of(store, mine.local)),
        ):
            raise AssertionError
        write(mine.local, {"two": b"2"})
    assert ".rcml_jax/writer.json" not in objects(store)
    # One that was killed elsewhere is waited for, one of this machine is not.
    sign = dict(theirs.me, time=time.time())
    store.pipe_file("bucket/run/.rcml_jax/writer.json", json.dumps(sign).encode())
    with (
        pytest.raises(UserError, match=r"or 1[78]\d seconds if it was killed"),
        remote.writing(mine),
    ):
        raise AssertionError
    sign["time"] -= 181
    store.pipe_file("bucket/run/.rcml_jax/writer.json", json.dumps(sign).encode())
    with remote.writing(mine):
        pass
    sign |= {"host": socket.gethostname(), "pid": 2**22 + 1, "time": time.time()}
    store.pipe_file("bucket/run/.rcml_jax/writer.json", json.dumps(sign).encode())
    with remote.writing(mine):
        pass


def test_a_writer_whose_place_was_taken_sends_nothing_more(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_SILENT", 0.04)  # a sign every hundredth of a second
    mine = mirror_of(store, tmp_path / "mine")
    sign = {"id": "x", "pid": 5, "host": "elsewhere", "since": "now", "time": time.time() + 1e6}

    def work():
        with remote.writing(mine) as after_step:
            write(mine.local, {"one": b"1"})
            store.pipe_file("bucket/run/.rcml_jax/writer.json", json.dumps(sign).encode())
            for _ in range(1000):
                after_step(None)
                time.sleep(0.01)

    with pytest.raises(Conflict, match=r"process 5 on host elsewhere .* has written to"):
        work()
    assert objects(store) == {".rcml_jax/writer.json"}


def wait_for(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_checkpoints_are_sent_in_the_background(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "_AGAIN", 0.0)
    mine, other = mirror_of(store, tmp_path / "mine"), mirror_of(store, tmp_path / "other")
    go = threading.Event()

    def wait(path):
        assert "/chunks/" not in path or go.wait(60)

    with remote.writing(mine) as after_step:
        store.fail = wait
        write(mine.local, {"checkpoints/1/state": b"1", "metrics.jsonl": b"1\n"})
        after_step(None)  # being written
        after_step(1)
        # Nothing waits for it; what changes meanwhile is not part of it.
        write(mine.local, {"checkpoints/2/state": b"2"})
        with (mine.local / "metrics.jsonl").open("ab") as file:
            file.write(b"2\n")
        (mine.local / "checkpoints/1/state").unlink()
        after_step(2)
        go.set()
        wait_for(lambda: any("/snapshots/" in x for x in store.written))
        other.pull()
        assert contents(other.local) == {"checkpoints/1/state": b"1", "metrics.jsonl": b"1\n"}
        after_step(2)
        wait_for(lambda: any("000002.json" in x for x in store.written))

        def no_network(path):
            raise ConnectionError("no route")

        store.fail = no_network
        write(mine.local, {"checkpoints/3/state": b"3"})
        wait_for(
            lambda: (after_step(3), "cannot be reached (no route)" in capsys.readouterr().err)[1]
        )
        store.fail = None
        wait_for(lambda: (after_step(3), any("000003.json" in x for x in store.written))[1])
    assert not mine.push()
    other.pull()
    assert contents(other.local) == contents(mine.local)
    assert not (tmp_path / ".mine.staged").exists()


def test_what_failed_is_sent_and_a_push_that_fails_hides_no_error(store, tmp_path, capsys):
    mine, other = mirror_of(store, tmp_path / "mine"), mirror_of(store, tmp_path / "other")

    def work(name):
        with remote.writing(mine):
            write(mine.local, {name: b"1"})
            raise UserError("the loss is not finite")

    with pytest.raises(UserError, match="not finite"):
        work("one")
    other.pull()
    assert contents(other.local) == {"one": b"1"}

    def refuse(path):
        if "/chunks/" in path or "/snapshots/" in path:
            raise PermissionError("Access Denied")

    store.fail = refuse
    with pytest.raises(UserError, match="not finite"):
        work("two")
    assert "not all of it was sent: memory://bucket/run is refused" in capsys.readouterr().err


class HttpError(Exception):
    """As of gcsfs."""

    def __init__(self, code):
        super().__init__(f"{code}: Anonymous caller")
        self.code = code


class DefaultCredentialsError(Exception):
    """As of google.auth."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DefaultCredentialsError("none"), "there are no credentials for gs://b/x (none); run `gcl"),
        (HttpError(401), "there are no valid credentials for gs://b/x (401: Anonymous caller); ru"),
        (HttpError(403), "gs://b/x is refused to these credentials (403: Anonymous caller); ask"),
        (OSError("Forbidden: b/x"), "gs://b/x is refused to these credentials (Forbidden: b/x);"),
        (HttpError(404), "there is no bucket b for gs://b/x (404: Anonymous caller); make it"),
        (FileNotFoundError("b"), "there is no bucket b for gs://b/x (b); make it, or correct the"),
        (TimeoutError(), "gs://b/x cannot be reached (TimeoutError); look at the network"),
        (ValueError("a\nb"), "gs://b/x cannot be used (ValueError: a b); mend that and start"),
    ],
)
def test_what_google_says_is_a_sentence(error, sentence):
    def fail(*args, **options):
        raise error

    class Failing:
        find = fail

    with pytest.raises(UserError, match=re.escape(sentence)):
        storage.Storage("gs://b/x", Failing()).names("a")


def test_names_of_mirrors(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = [
        remote.local_directory(x)
        for x in ("s3://a/run", "gs://a/run", "s3://b/run", "s3://a/run/..x", "s3://a", "s3://a/é.")
    ]
    assert len(set(places)) == 6
    assert [x.name for x in places] == ["run", "run", "run", "x", "a", "_"]
    assert remote.local_directory("s3://a/run/") == places[0]
    assert remote.path_or_address("s3://a/run/") == "s3://a/run"
    assert remote.named(f"{places[0]}, {places[1]}") == f"{places[0]}, {places[1]}"  # no mirrors
