"""Omics files downloaded from a server on this machine, kept in a cache, and verified."""

import http.server
import threading

import numpy as np
import pytest

from rcml_jax import files
from rcml_jax.data.sources import omics
from rcml_jax.errors import UserError
from tests.data.sources.test_omics import made_up, read, write


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; files in `broken` as the function there says."""

    def do_GET(self):
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if name in self.broken:
            return self.broken[name](self, (self.root / name).read_bytes())
        return super().do_GET()

    def head(self, length=None):
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The made-up set, published as ROSMAP by a server on this machine."""
    folder = write(tmp_path / "served" / "ROSMAP", made_up())
    members = {"root": folder, "asked": [], "broken": {}, "released": threading.Event()}
    handler = type("Served", (Files,), members)

    def start(*args):
        return handler(*args, directory=str(folder.parent))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), start) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(omics, "SOURCE", f"http://127.0.0.1:{running.server_port}")
        blobs = {path.name: omics.blob_id(path.read_bytes()) for path in folder.iterdir()}
        monkeypatch.setitem(omics.BLOBS, "rosmap", blobs)
        yield handler
        handler.released.set()
        running.shutdown()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def fetch(cache, lines=None):
    return omics.load("rosmap", cache, log=(lines if lines is not None else []).append)


def refused(cache):
    with pytest.raises(UserError) as error:
        fetch(cache)
    assert not list(cache.rglob("*.part"))
    return str(error.value)


def test_files_are_downloaded_once(server, cache):
    lines = []
    first = fetch(cache, lines)
    assert sorted(server.asked) == sorted(f"/ROSMAP/{name}" for name in omics.BLOBS["rosmap"])
    assert len(server.asked) == len(lines) == 11
    assert lines[0] == f"Downloading {omics.SOURCE}{server.asked[0]} (1 of 11)"
    for path in server.root.iterdir():
        assert (cache / "omics" / "ROSMAP" / path.name).read_bytes() == path.read_bytes()
    assert len(list(cache.rglob("*.*"))) == 11
    second = fetch(cache, lines)
    assert len(server.asked) == len(lines) == 11
    for a, b, c in zip(
        first.modalities, second.modalities, read(server.root).modalities, strict=True
    ):
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.values, c.values)


def test_a_copy_placed_in_the_cache_needs_no_network(server, cache, monkeypatch):
    monkeypatch.setattr(omics, "SOURCE", "http://127.0.0.1:9")
    folder = write(cache / "omics" / "ROSMAP", made_up())
    (folder / "4_tr.csv").write_text("no view of the published set")
    assert len(fetch(cache).modalities) == 3
    assert not server.asked


@pytest.mark.parametrize("damage", [b"", b"0.5\n", None])
def test_a_damaged_file_in_the_cache_is_fetched_anew(server, cache, damage):
    expected = fetch(cache).modalities[1].values
    path = cache / "omics" / "ROSMAP" / "2_tr.csv"
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    np.testing.assert_array_equal(fetch(cache).modalities[1].values, expected)
    assert server.asked[11:] == ["/ROSMAP/2_tr.csv"]
    path.unlink()
    fetch(cache)
    assert server.asked[12:] == ["/ROSMAP/2_tr.csv"]


def cut_short(handler, body):
    handler.head(len(body))
    handler.wfile.write(body[: len(body) // 2])


def cut_short_of_unknown_length(handler, body):
    handler.head()
    handler.wfile.write(body[: len(body) // 2])


def another_body(handler, body):
    handler.head(len(body))
    handler.wfile.write(b"9" + body[1:])


def not_found(handler, body):
    handler.send_error(404)


def no_answer(handler, body):
    pass


def stalled(handler, body):
    handler.head(len(body))
    handler.wfile.flush()
    handler.released.wait(10)


FAILURES = {
    cut_short: "cannot be downloaded (IncompleteRead",
    cut_short_of_unknown_length: "is not the published file",
    another_body: "is not the published file",
    not_found: "cannot be downloaded (HTTP Error 404",
    stalled: "cannot be downloaded (timed out)",
    no_answer: "cannot be downloaded (Remote end closed connection",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_download_that_fails_leaves_nothing_and_goes_on_later(
    server, cache, monkeypatch, failure
):
    server.broken["2_te.csv"] = failure
    if failure is stalled:
        monkeypatch.setattr(omics, "TIMEOUT_SECONDS", 0.2)
    text = refused(cache)
    assert f"{omics.SOURCE}/ROSMAP/2_te.csv " in text
    assert FAILURES[failure] in text
    assert "try again later or name a folder with a copy" in text
    assert text.endswith("--config.data.path=DIRECTORY.")
    folder = cache / "omics" / "ROSMAP"
    done = {path.name for path in folder.iterdir()}
    assert "2_te.csv" not in done
    server.broken.clear()
    server.asked.clear()
    assert len(fetch(cache)) == 10
    assert {path.rpartition("/")[2] for path in server.asked} == set(omics.BLOBS["rosmap"]) - done


def test_a_damaged_file_stays_until_the_right_one_is_there(server, cache):
    fetch(cache)
    path = cache / "omics" / "ROSMAP" / "1_te.csv"
    path.write_text("my own")
    server.broken["1_te.csv"] = another_body
    assert "is not the published file" in refused(cache)
    assert path.read_text() == "my own"


def test_no_server_at_all(server, cache, monkeypatch):
    del server
    monkeypatch.setattr(omics, "SOURCE", "http://127.0.0.1:9")
    text = refused(cache)
    assert text.startswith("http://127.0.0.1:9/ROSMAP/")
    assert "Connection refused" in text


@pytest.mark.parametrize("call", ["replace", "getpid"])
def test_interrupted_while_writing(server, cache, monkeypatch, call):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(cache)
    folder = cache / "omics" / "ROSMAP"
    assert not list(folder.iterdir())
    (folder / "1_tr.csv.1.part").write_text("left by a killed process")
    assert len(fetch(cache)) == 10
    assert len(server.asked) == 12


def test_a_cache_that_cannot_be_written(server, tmp_path):
    del server
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"set --config\.data\.dir to a folder that can"):
        fetch(tmp_path / "file")


def test_progress_goes_to_standard_error_by_default(server, cache, capsys):
    del server
    omics.load("rosmap", cache)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("Downloading ") == 11
