"""metrics.jsonl and TensorBoard files."""

import json
import math

import pytest

from rcml_jax.errors import UserError
from rcml_jax.training.writer import MetricsWriter, flatten


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_flatten():
    metrics = {"lost": math.nan, "most": math.inf}
    metrics |= {"loss": 1, "hit@5": {"tt": 0.5, "deep": {"x": 2.0}}, "probe": "linear", "ok": True}
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
