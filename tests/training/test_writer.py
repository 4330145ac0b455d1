"""metrics.jsonl, TensorBoard files and the progress line."""

import io
import json
import re

import pytest

from rcml_jax.errors import UserError
from rcml_jax.training.writer import MetricsWriter, Progress, flatten


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_flatten():
    metrics = {"loss": 1, "hit@5": {"tt": 0.5, "deep": {"x": 2.0}}, "probe": "linear", "ok": True}
    assert flatten(metrics) == {"loss": 1.0, "hit@5/tt": 0.5, "hit@5/deep/x": 2.0}


def test_one_object_a_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 0.1})
    writer.write(2, "validation", {"hit@5": {"avg": 0.25}})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 1, "kind": "train", "loss": 0.1},
        {"step": 2, "kind": "validation", "hit@5/avg": 0.25},
    ]


def test_lines_past_the_step_are_dropped_on_resuming(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, "train", {"loss": step / 3})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[3]\n{"loss": 1}\n{"step": 2, "kind": "tra')
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    writer = MetricsWriter(tmp_path, step=3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before
    writer.write(4, "train", {"loss": 9.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_no_room(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; free some"):
        writer.write(1, "train", {"loss": 0.1})


def test_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(1, "train", {"loss": 0.5})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_file_is_plain_lines():
    stream = io.StringIO()
    progress = Progress(0, 100, 32, stream)
    progress.update(1, 2.5)
    progress.update(11, 1.25)
    progress.note("step 11  validation 0.5")
    progress.close()
    first, second, note = stream.getvalue().splitlines()
    assert first == "step 1/100  loss 2.5000  compiled"
    pattern = r"step 11/100  loss 1\.2500  [\d,]+ examples/s  \d+:\d\d:\d\d left"
    assert re.fullmatch(pattern, second)
    assert note == "step 11  validation 0.5"


def test_progress_on_a_terminal_is_one_line_that_is_written_over():
    stream = Terminal()
    progress = Progress(0, 100, 32, stream)
    progress.update(1, 2.5)
    progress.update(2, 2.0)
    assert stream.getvalue().count("\n") == 0
    assert stream.getvalue().count("\r\x1b[K") == 2
    progress.note("a note stays")
    assert stream.getvalue().endswith("\r\x1b[Ka note stays\n")
    progress.close()
    assert stream.getvalue().endswith("\n\n")


def test_the_rate_counts_from_the_first_step_of_this_start(monkeypatch):
    clock = iter([0.0, 100.0, 101.0, 103.0])
    monkeypatch.setattr("rcml_jax.training.writer.time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(50, 4000, 32, stream)  # resumed at step 50; 100 seconds to compile
    progress.update(51, 1.0)
    progress.update(61, 1.0)  # 10 steps in one second
    progress.update(81, 1.0)  # 30 steps in three
    last = stream.getvalue().splitlines()
    assert last[0].endswith("compiled")
    assert last[1].endswith("320 examples/s  0:06:33 left")
    assert last[2].endswith("320 examples/s  0:06:31 left")


def test_a_step_shown_twice_is_no_division_by_zero():
    stream = io.StringIO()
    progress = Progress(0, 10, 32, stream)
    progress.update(1, 1.0)
    progress.update(1, 1.0)
    assert stream.getvalue() == 2 * "step 1/10  loss 1.0000  compiled\n"
