"""Images from a server that misbehaves in the ways of the net."""

import asyncio
import errno
import io
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from rcml_jax.data import download
from rcml_jax.data.download import JOURNAL, OUTCOMES, alone, fetch_images, image_path
from rcml_jax.errors import UserError
from tests.data import misbehaving_server
from tests.data.misbehaving_server import image
from tests.toy import ROOT

# What becomes of one image of each behaviour, and how often it is asked for in two runs.
EXPECTED = {
    "ok": ("ok", 1),
    "moved": ("ok", 1),
    "error-once": ("ok", 2),
    "truncated-once": ("ok", 2),
    "not-found": ("not_found", 1),
    "gone": ("not_found", 1),
    "html": ("no_image", 1),
    "oversized": ("oversized", 1),
    "oversized-unannounced": ("oversized", 1),
    "truncated": ("truncated", 4),
    "hang-up-midway": ("truncated", 4),
    "half-an-image": ("truncated", 2),
    "empty": ("truncated", 2),
    "error": ("failed", 4),
    "hang-up": ("failed", 4),
    "slow": ("failed", 4),
    "forbidden": ("failed", 2),
}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with misbehaving_server.running() as running:
        yield running


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "images"


def run(urls, directory, **options):
    options = {"backoff": 0.005, "retries": 1, "log": lambda _: None} | options
    return fetch_images(urls, directory, **options)


def some(server, behaviour, count, **options):
    return [server.url(f"{behaviour}/{i}", **options) for i in range(count)]


def counts(**given):
    return dict.fromkeys(OUTCOMES, 0) | given


def test_every_misbehaviour_is_counted_and_only_what_may_change_is_asked_again(server, directory):
    urls = [server.url(f"{behaviour}/a") for behaviour in EXPECTED]
    bad = ["", "http://", "ftp://127.0.0.1/a.jpg", "http://[::1/a.jpg", "no url"]
    bad += ["http://127.0.0.1:99999/a.jpg", "https://xn--/x", "http://a..b/\ud83d"]
    urls += bad
    lines = []
    options = {"timeout": 0.4, "max_bytes": 50_000}
    reports = [run(urls, directory, log=lines.append, **options) for _ in range(2)]
    expected = [outcome for outcome, _ in EXPECTED.values()] + len(bad) * ["bad_address"]
    for report, got in zip(reports, ("ok", "cached"), strict=True):
        assert report.counts == counts(
            **{name: expected.count(name) for name in OUTCOMES[2:]}, **{got: expected.count("ok")}
        )
        for url, path, outcome in zip(urls, report.paths, expected, strict=True):
            assert (path is not None) == (outcome == "ok"), url
    assert {name: server.asked[f"{name}/a"] for name in EXPECTED} == {
        name: times for name, (_, times) in EXPECTED.items()
    }
    first = run([server.url("ok/a")], directory).paths[0]
    assert first.read_bytes() == image("ok/a")
    assert lines[0].startswith(
        "Images: 25 of 25: 4 ok, 2 not found, 4 truncated, 2 oversized, 1 no image, "
        "8 bad address, 4 failed"
    )
    journal = [json.loads(line) for line in (directory / JOURNAL).read_text().splitlines()]
    assert {line["outcome"] for line in journal} == {
        *("not_found", "oversized", "no_image", "bad_address"),
    }


def test_an_image_that_only_trickles_in_is_given_up(server, directory, monkeypatch):
    monkeypatch.setattr(download, "_SLOWEST", 2)
    start = time.monotonic()
    report = run([server.url("trickle/a")], directory, timeout=0.2, retries=0)
    assert report.counts == counts(failed=1)
    assert time.monotonic() - start < 2


def test_nothing_is_fetched_twice(server, directory):
    urls = some(server, "ok", 30)
    doubled = urls + urls[::-1]
    report = run(doubled, directory)
    assert report.counts == counts(ok=30)
    assert report.paths == [image_path(directory, url) for url in doubled]
    assert len(set(report.paths)) == 30
    again = run(urls[10:] + some(server, "brief", 3), directory)
    assert again.counts == counts(cached=20, ok=3)
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 33
    report.paths[4].write_bytes(b"")  # as a crash of the machine may leave it
    (directory / "part" / "leftover").write_bytes(b"half an image")
    assert run(urls, directory).counts == counts(cached=29, ok=1)
    assert list((directory / "part").iterdir()) == []


def test_no_more_requests_at_a_time_than_allowed(server, directory):
    here, there = some(server, "brief", 40), some(server, "brief", 40, host="localhost")
    report = run(here + there, directory, per_host=5, concurrency=8)
    assert report.counts == counts(ok=80)
    assert server.most["127.0.0.1"] == 5
    assert server.most["localhost"] <= 5
    assert server.most["all"] == 8


def test_one_host_does_not_hold_up_another(server, directory):
    slow, others = some(server, "slow", 8), some(server, "brief", 20, host="localhost")

    def release_when_the_others_are_done():
        while sum(path.startswith("brief") for path in server.asked.copy()) < 20:
            time.sleep(0.01)
        server.released.set()

    threading.Thread(target=release_when_the_others_are_done, daemon=True).start()
    start = time.monotonic()
    report = run(slow + others, directory, per_host=4, concurrency=6, timeout=8, retries=0)
    assert report.counts == counts(ok=20, failed=8)
    assert time.monotonic() - start < 5  # the server would hold the slow ones as long


def test_retry_after_holds_for_the_whole_host(server, directory):
    urls = some(server, "too-many-once", 1) + some(server, "brief", 12)
    report = run(urls, directory, per_host=2, retries=1)
    assert report.counts == counts(ok=13)
    times = [at for at, path, _ in server.log if path.startswith("too-many")]
    assert 1.0 <= times[1] - times[0] < 3.0
    between = [at for at, _, _ in server.log if times[0] + 0.1 < at < times[0] + 0.9]
    assert between == []


def test_a_host_that_wants_hours_is_left_for_the_next_run(server, directory):
    urls = some(server, "too-many-for-hours", 9)
    assert run(urls, directory, per_host=1).counts == counts(failed=9)
    assert server.asked.total() == 1


def test_a_host_that_answers_nothing_but_errors_is_left_for_the_next_run(server, directory):
    lines = []
    report = run(some(server, "error", 200), directory, retries=0, per_host=4, log=lines.append)
    assert report.counts == counts(failed=200)
    assert 50 <= server.asked.total() <= 54
    assert "left for the next run" in lines[0]


def test_a_run_of_errors_in_the_list_does_not_hide_the_rest(server, directory):
    urls = some(server, "error", 55) + some(server, "ok", 30) + some(server, "error/b", 55)
    report = run(urls, directory, retries=0, per_host=1)
    assert report.counts == counts(ok=30, failed=110)


def test_no_connection(directory):
    report = run([f"http://127.0.0.1:9/{i}" for i in range(3)], directory)
    assert report.counts == counts(failed=3)
    assert report.paths == [None] * 3


def test_images_are_stored_scaled_down(server, directory):
    urls = [server.url("large/a"), server.url("ok/a")]
    large, small = run(urls, directory, max_size=64).paths
    with Image.open(large) as stored:
        assert (stored.format, stored.size) == ("JPEG", (64, 43))
    assert small.read_bytes() == image("ok/a")
    [whole] = run(urls[:1], directory / "whole", max_size=None).paths
    with Image.open(io.BytesIO(whole.read_bytes())) as stored:
        assert stored.size == (300, 200)


def test_a_higher_limit_lets_in_what_was_oversized(server, directory):
    urls = [server.url("oversized/a"), server.url("not-found/a")]
    for limit, expected in ((50_000, "oversized"), (40_000, "oversized"), (100_000, "ok")):
        report = run(urls, directory, max_bytes=limit)
        assert report.counts == counts(**{expected: 1}, not_found=1)
    assert server.asked == {"oversized/a": 2, "not-found/a": 1}


def known(directory, urls):
    """What a run has settled so far."""
    journal = directory / JOURNAL
    hashes = journal.read_text() if journal.exists() else ""
    return {
        url
        for url in urls
        if image_path(directory, url).exists() or image_path(directory, url).name in hashes
    }


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_cut_off_goes_on(server, directory, number):
    urls = some(server, "not-found", 3) + some(server, "held", 24)
    code = "from rcml_jax.data.download import fetch_images; import sys; "
    code += "fetch_images(sys.argv[2:], sys.argv[1])"
    command = [sys.executable, "-c", code, str(directory), *urls]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 20
        while len(known(directory, urls)) < 12:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(10) != 0
    settled = known(directory, urls)
    assert 12 <= len(settled) < 27
    server.released.set()
    server.asked.clear()
    report = run(urls, directory)
    stored = sum("held" in url for url in settled)
    assert report.counts == counts(cached=stored, ok=24 - stored, not_found=3)
    rest = [url for url in urls if url not in settled]
    assert server.asked == {url.removeprefix(server.url("")): 1 for url in rest}
    assert list((directory / "part").iterdir()) == []


def test_a_journal_cut_off_in_a_line_is_read(server, directory):
    urls = some(server, "not-found", 3)
    run(urls, directory)
    journal = directory / JOURNAL
    journal.write_text('[1]\n"ok"\n' + journal.read_text()[:-10])
    assert run([*urls, server.url("html/a")], directory).counts == counts(not_found=3, no_image=1)
    assert sorted(server.asked.values()) == [1, 1, 1, 2]
    run([*urls, server.url("html/a")], directory)
    assert server.asked.total() == 5


def test_a_full_disk_says_so_and_the_next_run_goes_on(server, directory, monkeypatch):
    urls = some(server, "ok", 20)
    write, room = pathlib.Path.write_bytes, [9]

    def full(path, data):
        room[0] -= 1
        if room[0] < 0:
            write(path, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"No room is left .* \d+ images are still to be"):
            run(urls, directory, per_host=4)
    report = run(urls, directory)
    assert report.counts == counts(cached=9, ok=11)
    assert all(path.read_bytes() for path in report.paths)


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken"):
        run([server.url("ok/a")], tmp_path / "taken" / "x")


def test_two_processes_do_not_fetch_into_one_folder(server, directory):
    directory.mkdir()
    with alone(directory / ".lock", ""), pytest.raises(UserError, match="Another process fetches"):
        run([server.url("ok/a")], directory)
    assert run([server.url("ok/a")], directory).counts == counts(ok=1)


def test_within_a_running_loop_as_in_a_notebook(server, directory):
    async def cell():
        return run([server.url("ok/a")], directory)

    assert asyncio.run(cell()).counts == counts(ok=1)


def test_nothing_to_fetch(directory):
    report = run([], directory)
    assert (report.paths, report.counts) == ([], counts())


@pytest.mark.parametrize("name", ["concurrency", "per_host", "max_bytes"])
def test_limits_of_nothing_are_refused(directory, name):
    with pytest.raises(UserError, match=f"{name}=0"):
        run(["http://127.0.0.1:9/"], directory, **{name: 0})


def test_without_httpx_the_extra_is_named(monkeypatch, directory):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r'pip install "rcml_jax\[amazon\]"'):
        fetch_images(["http://127.0.0.1:9/"], directory)
