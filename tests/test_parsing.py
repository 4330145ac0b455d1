"""What comes from outside: texts, lines, JSON, CSV and paths."""

import csv
import io
import os
import pathlib
import re

import pytest

from rcml_jax import parsing
from rcml_jax.errors import UserError
from rcml_jax.tasks.relations import cache_directory
from tests.toy import ROOT


def test_each_kind_of_input_has_one_gate():
    """Nothing in `data` and `search` goes around them."""
    around = r"\.splitlines\(|csv\.(?:Dict)?[Rr]eader\(|Image\.open\(|\.expanduser\("
    found = [
        (path.name, use)
        for path in [*ROOT.glob("rcml_jax/data/**/*.py"), *ROOT.glob("rcml_jax/search/*.py")]
        # A tokenizer's files are no text of a user's.
        if path.stem not in ("images", "tokenizer")
        for use in re.findall(around, path.read_text("utf-8"))
    ]
    assert not found
    # What the library wrote itself may be read by `json` alone.
    ours = ("stages", "prepared", "download", "tokenizer", "images")
    loads = re.compile(r"(or)?json\.load")
    found = {
        (path.stem, match[0])
        for path in ROOT.glob("rcml_jax/data/**/*.py")
        for match in loads.finditer(path.read_text("utf-8"))
        if path.stem not in ours
    }
    # Of a line that orjson refuses `read_json` has the last word.
    assert found == {("amazon_records", "orjson.load")}


@pytest.mark.parametrize("bad", ["\ud83d", "\0"])
def test_no_unicode_text_is_replaced_and_counted_or_refused(bad):
    gate, lines = parsing.TextGate(), []
    assert gate("café \N{TEACUP WITHOUT HANDLE}", "f, line 1") == "café \N{TEACUP WITHOUT HANDLE}"
    gate.report(lines.append)
    assert lines == []
    assert gate(f"red{bad}cup{bad}", "f, line 2") == "red\ufffdcup\ufffd"
    assert gate(bad, "f, line 3") == "\ufffd"
    gate.report(lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("2 texts held a NUL")
    assert lines[0].endswith("the first is in f, line 2.")
    with pytest.raises(UserError, match=r"^f, line 2: 'red.*leave `strict` off"):
        parsing.TextGate(strict=True)(f"red{bad}cup", "f, line 2")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        parsing.argument_text(f"caf{bad}")


def test_lines_end_at_newlines_only():
    odd = "a\u2028b\x85c\x0cd\x0be\x1cf\rg"
    assert parsing.text_lines(f"{odd}\r\n\nlast") == [odd, "", "last"]
    assert parsing.text_lines("a\n") == ["a"]
    assert parsing.text_lines("") == []


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": Infinity}', "1e999", "[" * 10**5])
def test_json_has_no_nan_and_no_end(text):
    with pytest.raises(ValueError, match=r"no JSON number|too large|too deeply"):
        parsing.read_json(text)


def test_json_of_text_and_bytes():
    for text in ('{"a": 1.5e3, "b": "é"}', '{"a": 1.5e3, "b": "é"}'.encode()):
        assert parsing.read_json(text) == {"a": 1500.0, "b": "é"}


def test_csv_values_may_be_long_and_errors_do_not_end_the_file():
    before = csv.field_size_limit()
    text = 'a,b\n\n"x\ny",' + "z" * 200_000 + '\n"a"b,c\nq,r\n'
    rows, found = parsing.CsvRows(io.StringIO(text)), []
    while True:
        try:
            found.append(next(rows))
        except csv.Error:
            found.append(rows.line)
        except StopIteration:
            break
    assert found == [(1, ["a", "b"]), (3, ["x\ny", "z" * 200_000]), 5, (6, ["q", "r"])]
    assert csv.field_size_limit() == before


def test_a_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsing.user_path("~/x") == tmp_path / "x"
    assert parsing.user_path(pathlib.Path("~/x")) == tmp_path / "x"
    assert parsing.checkpoint_name("~/clip") == str(tmp_path / "clip")
    for plain in ("runs/é", "./~", "C:/x", "a:b"):
        assert parsing.user_path(plain) == pathlib.Path(plain)
    assert [parsing.checkpoint_name(x) for x in ("", "openai/clip")] == ["", "openai/clip"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gs://bucket/run", "gs:// is not supported"),
        (pathlib.Path("s3://bucket/run"), "s3:// is not supported"),
        ("file:///tmp/x", "file:// is not supported"),
        ("https://x.org/a.npz", "https:// is not supported"),
        ("~nobody-of-this-name/x", "home directory of '~nobody-of-this-name' is unknown"),
        ("run\udcff", "cannot be encoded as a file name"),
        ("a" * 256, "more than 255 bytes"),
        ("a/" * 3000, "more than 4,095 bytes"),
        ("a\0b", "NUL"),
        ("", "a path is empty"),
    ],
)
def test_what_is_no_local_path_is_refused(path, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        parsing.user_path(path)
    str(caught.value).encode("ascii")


def test_names_that_the_locale_cannot_encode_are_refused(monkeypatch):
    def ascii_only(path):
        return os.fspath(path).encode("ascii")

    monkeypatch.setattr(os, "fsencode", ascii_only)
    with pytest.raises(UserError, match="set PYTHONUTF8=1"):
        parsing.user_path("runs/é")


def test_without_a_home_directory_the_cache_is_beside_the_run(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_directory("", tmp_path / "run") == tmp_path / "rcml_jax_cache"
    assert cache_directory("/given", tmp_path / "run") == pathlib.Path("/given")
    with pytest.raises(UserError, match="home directory of '~' is unknown; set HOME"):
        cache_directory("~/data")


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert parsing.read_file(tmp_path / "file") == b"content"
    with pytest.raises(OSError, match="more than 6 bytes"):
        parsing.read_file(tmp_path / "file", 6)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, tmp_path / "nowhere", "/dev/zero"):
        with pytest.raises(OSError, match=str(other)):
            parsing.read_file(other)
