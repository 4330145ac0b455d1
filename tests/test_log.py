"""How far long work is: plain lines at a slow rate in a file, a bar on a terminal."""

import io
import re
import sys

import pytest

from rcml_jax import log
from rcml_jax.log import Progress, counted


class Clock:
    """Both clocks of the progress, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(log.time, name, lambda: self.now)


def training(lines, done=0, total=100):
    return Progress(
        total,
        done=done,
        count=lambda step, steps: f"step {step}/{steps}",
        rate=lambda speed: f"{32 * speed:,.0f} examples/s",
        log=lines.append,
    )


def test_the_time_left_counts_from_the_first_step_of_this_start(monkeypatch):
    clock, lines = Clock(monkeypatch), []
    progress = training(lines, done=50, total=4000)  # resumed at step 50
    for now, step in ((100, 51), (101, 61), (103, 81)):  # 100 seconds to compile
        clock.now = now
        progress.update(step, f"loss {1 / step:.4f}")
    assert lines == [
        "step 51/4000  loss 0.0196",
        "step 61/4000  loss 0.0164  320 examples/s  0:06:34 left",
        "step 81/4000  loss 0.0123  320 examples/s  0:06:32 left",
    ]


def test_slow_steps_tell_the_time_left_from_the_second_on(monkeypatch):
    clock, lines = Clock(monkeypatch), []
    progress = training(lines, total=500)
    for step in (1, 2, 3):
        clock.now += 60
        progress.update(step)
    assert lines == [f"step {k}/500  1 examples/s  {(500 - k) // 60}:{(500 - k) % 60:02d}:00 left"
                     for k in (2, 3)]  # fmt: skip


@pytest.mark.parametrize("detail", ["", "loss 1"])
def test_quick_steps_do_not_flood_a_file(monkeypatch, detail):
    clock, lines = Clock(monkeypatch), []
    progress = training(lines, total=100_000)
    for step in range(1, 100_001):
        clock.now += 0.01
        progress.update(step, detail)
    assert 30 < len(lines) < 110  # of 1,000 seconds
    assert lines[-1].startswith("step 100000/100000")
    assert "left" not in lines[-1]


def test_a_step_shown_twice_is_no_division_by_zero():
    lines = []
    progress = training(lines, total=10)
    for _ in range(2):
        progress.update(1, "loss 1")
    assert lines == ["step 1/10  loss 1"] * 2


def test_without_an_end_there_is_no_time_left(monkeypatch):
    clock, lines = Clock(monkeypatch), []
    progress = Progress(None, unit="rows", log=lines.append)
    for done in (10, 2010):
        clock.now += 5
        progress.update(done)
    assert lines == ["2,010 rows  400 rows/s"]


def test_plain_lines_and_notes_are_on_stderr(capsys):
    with Progress(2) as progress:
        progress.update(2)
        progress.note("a note [stays]")
    assert capsys.readouterr() == ("", "2 of 2 items\na note [stays]\n")


def test_a_terminal_has_a_bar_with_notes_above_it(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with training([]) as hidden, Progress(3) as progress:
        hidden.update(1)
        progress.update(1)
        print("stdout stays")
        progress.note("a note [stays]")
        progress.update(3)
        shown = sys.stderr
    # While the bar is shown, rich stands in front of the stream.
    written = getattr(shown, "rich_proxied_file", shown).getvalue()
    text = re.sub(r"\x1b\[[\d;?]*\w", "", written)
    assert "━" in text
    assert text.count("a note [stays]\n") == 1
    assert "3 of 3 items" in text
    assert capsys.readouterr().out == "stdout stays\n"


@pytest.mark.parametrize(
    ("count", "words", "said"),
    [
        (1, ("items",), "1 item"),
        (0, ("items",), "0 items"),
        (1204, ("items without a title",), "1,204 items without a title"),
        (1, ("malformed review lines",), "1 malformed review line"),
        (1, ("transactions of articles",), "1 transaction of articles"),
        (1, ("queries", "query"), "1 query"),
        (2, ("sentences have", "sentence has"), "2 sentences have"),
        (1, ("sentences have", "sentence has"), "1 sentence has"),
    ],
)
def test_counts_have_their_words(count, words, said):
    assert counted(count, *words) == said
