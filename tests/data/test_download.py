"""Big files from a server that breaks off, changes its mind and lies."""

import errno
import hashlib
import io
import json
import signal
import subprocess
import sys
import time

import pytest

from rcml_jax.data import download as downloads
from rcml_jax.data.download import Temporary, bytes_text, download, retry_after
from rcml_jax.errors import UserError
from tests.data import misbehaving_server
from tests.data.misbehaving_server import BODY
from tests.toy import ROOT


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with misbehaving_server.running() as running:
        yield running


@pytest.fixture
def path(tmp_path):
    return tmp_path / "files" / "reviews.jsonl.gz"


def get(server, behaviour, path, **options):
    lines = []
    options = {"backoff": 0.005, "log": lines.append} | options
    assert download(server.url(behaviour), path, **options) == path
    assert path.read_bytes() == server.body
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return lines


def refused(server, behaviour, path, **options):
    with pytest.raises(UserError) as error:
        download(server.url(behaviour), path, backoff=0.005, log=lambda _: None, **options)
    assert not path.exists()
    assert not path.with_name(path.name + ".lock").exists()
    return str(error.value)


def ranges(server):
    return [headers.get("Range") for _, _, headers in server.log]


def part_of(path):
    return path.with_name(path.name + ".part")


def test_a_file_is_downloaded_once(server, path):
    lines = get(server, "file", path, sha256=hashlib.sha256(BODY).hexdigest().upper())
    assert lines[0] == f"Downloading {server.url('file')} (3.0 MB)"
    assert [line.partition("  ")[0] for line in lines[1:]] == [f"{path.name}: 3.0 MB of 3.0 MB"]
    assert get(server, "file", path) == []
    assert server.asked["file"] == 1


@pytest.mark.parametrize("behaviour", ["file-in-pieces", "file-by-date"])
def test_what_breaks_off_goes_on_where_it_was(server, path, behaviour):
    lines = get(server, behaviour, path, sha256=hashlib.sha256(BODY).hexdigest(), retries=0)
    assert ranges(server) == [None, "bytes=1200000-", "bytes=2400000-"]
    assert "(1.2 MB of 3.0 MB are there)" in lines[1]


@pytest.mark.parametrize(
    "behaviour", ["file-of-unknown-length", "file-called-compressed", "file-busy-once"]
)
def test_unusual_answers(server, path, behaviour):
    get(server, behaviour, path)


@pytest.mark.parametrize("behaviour", ["file-without-tag", "file-wrong-part"])
def test_what_cannot_be_continued_begins_again(server, path, behaviour):
    get(server, behaviour, path)
    expected = [None, None] if behaviour == "file-without-tag" else [None, "bytes=1200000-", None]
    assert ranges(server) == expected


def test_a_server_that_always_breaks_off_at_the_same_place_is_given_up(server, path):
    message = refused(server, "file-cut-always", path, retries=2)
    assert server.asked["file-cut-always"] == 4
    assert "it ended" in message or "closed connection" in message
    server.body = BODY[:1_000_000]  # now it is short enough
    get(server, "file-cut-always", path, retries=0)


def test_the_next_call_goes_on(server, path):
    message = refused(server, "file-cut-then-error", path, retries=0)
    assert "500 Internal Server Error" in message
    assert "the same command again, which goes on after the 1.2 MB that are there" in message
    get(server, "file-cut-then-error", path)
    assert ranges(server) == [None, "bytes=1200000-", "bytes=1200000-"]
    assert server.log[2][2]["If-Range"] == '"one"'


@pytest.mark.parametrize("change", ["tag", "url", "state", "longer"])
def test_a_part_of_another_file_is_not_continued(server, path, change):
    behaviour = "file-cut-then-error"
    refused(server, behaviour, path, retries=0)
    if change == "tag":
        server.tag, server.body = '"two"', BODY[::-1]
    elif change == "url":
        behaviour = "file"
    elif change == "state":
        part_of(path).with_name(path.name + ".part.json").write_text('{"url": "http')
    else:
        part_of(path).write_bytes(bytes(len(BODY) + 1))
    get(server, behaviour, path)
    assert ranges(server)[2] == ("bytes=1200000-" if change == "tag" else None)


@pytest.mark.parametrize("length", [len(BODY), None])
def test_a_whole_part_needs_no_byte_more(server, path, length):
    path.parent.mkdir()
    part_of(path).write_bytes(BODY)
    known = {"url": server.url("file"), "validator": '"one"', "length": length}
    path.with_name(path.name + ".part.json").write_text(json.dumps(known))
    get(server, "file", path)
    assert ranges(server) == ([] if length else [f"bytes={len(BODY)}-"])


def test_another_file_than_expected_is_removed(server, path):
    message = refused(server, "file", path, sha256="0" * 64)
    assert hashlib.sha256(BODY).hexdigest() in message
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{}not-found", "404 Not Found"),
        ("{}forbidden", "403 Forbidden"),
        ("{}error", "500 Internal Server Error"),
        ("{}too-many-for-hours", "429 Too Many Requests"),
        ("http://127.0.0.1:9/file", "check the connection"),
        ("ftp://127.0.0.1/file", "cannot be fetched"),
        ("file", "cannot be fetched"),
        ("http://[::1/file", "cannot be fetched"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(server, path, address, words):
    url = address.format(server.url(""))
    with pytest.raises(UserError, match=words) as error:
        download(url, path, retries=1, backoff=0.005, log=lambda _: None)
    assert url in str(error.value)
    assert list(path.parent.iterdir()) == []
    assert max(server.asked.values(), default=0) <= 2
    assert server.asked["too-many-for-hours"] <= 1


class Full(io.FileIO):
    """A file on a disk with room for a million bytes."""

    room = 1_000_000

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_says_so_and_the_next_call_goes_on(server, path, monkeypatch):
    def small(name, mode, buffering=-1):
        return io.BufferedWriter(Full(name, mode), 2**16) if "b" in mode else open(name, mode)

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "open", small, raising=False)
        message = refused(server, "file", path)
    have = part_of(path).stat().st_size
    assert 0 < have <= Full.room
    assert f"{bytes_text(len(BODY) - have)} more are needed for reviews.jsonl.gz" in message
    assert "the same command again" in message
    get(server, "file", path)
    assert ranges(server) == [None, f"bytes={have}-"]


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken"):
        download(server.url("file"), tmp_path / "taken" / "x", log=lambda _: None)


def test_two_processes_do_not_write_one_file(server, path):
    path.parent.mkdir()
    lock = path.with_name(path.name + ".lock")
    with downloads.alone(lock, ""), pytest.raises(UserError, match="Another process downloads"):
        download(server.url("file"), path, log=lambda _: None)
    get(server, "file", path)


def test_a_lock_that_its_owner_has_just_removed_is_made_anew(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    lock, flock = tmp_path / "lock", fcntl.flock
    removed = []

    def late(file, operation):
        if not removed:
            removed.append(lock.unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with downloads.alone(lock, ""):
        assert removed
        assert lock.exists()
    assert not lock.exists()


def test_a_part_does_not_outlive_its_state(server, path, monkeypatch):
    refused(server, "file-cut-then-error", path, retries=0)
    server.tag, server.body = '"two"', BODY[::-1]
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            download(server.url("file-cut-then-error"), path, log=lambda _: None)
    server.tag = '"one"'  # as if the old state fitted again
    get(server, "file-cut-then-error", path)
    assert ranges(server)[-1] is None


def test_a_killed_download_goes_on(server, path):
    code = "import sys; from rcml_jax.data.download import download; download(*sys.argv[1:])"
    command = [sys.executable, "-c", code, server.url("file-held"), str(path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while not (part_of(path).exists() and part_of(path).stat().st_size):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    have = part_of(path).stat().st_size
    get(server, "file-held", path)
    assert ranges(server) == [None, f"bytes={have}-"]


def test_without_httpx_the_extra_is_named(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r'pip install "rcml_jax\[amazon\]"'):
        download("http://127.0.0.1:9/", path)


def test_retry_after_is_seconds_or_a_date():
    assert retry_after({"Retry-After": "120"}) == 120
    assert retry_after({}) is None
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"Retry-After": "Wed, 21 Oct 2150 07:28:00 GMT"}) > 1e9
    assert Temporary("busy").wait is None


def test_sizes_are_readable():
    assert [bytes_text(n) for n in (0, 999, 1500, 3_100_000, 15.5e9, None)] == [
        "0 bytes",
        "999 bytes",
        "1.5 KB",
        "3.1 MB",
        "15.5 GB",
        "an unknown size",
    ]
