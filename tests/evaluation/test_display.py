"""What the terminal shows of an evaluation on a relation graph."""

import io
import re

from rcml_jax.evaluation.display import print_evaluation
from tests.report.runs import rates, relational_result


def test_the_controls_stand_under_the_method():
    result = relational_result(base=0.8)
    one = {name: result[name] for name in ("retrieval", "relation_type")}
    result["training_free_product"] = one
    result["retrieval_random"] = result["retrieval"]
    result["controls"] = {
        "relation_only": {"retrieval": {"hit@5": rates(0.3)}},
        "words": {"retrieval": {"hit@5": {"tt": 0.25}}, "relation_type": {"top3": {"tt": 0.5}}},
        "relation_one_hot": {"relation_validity": {"accuracy": 0.5}},
    }
    stream = io.StringIO()
    print_evaluation(result, stream)
    lines = [line.replace("│", " ").split() for line in stream.getvalue().splitlines()]
    first = next(i for i, line in enumerate(lines) if line[:1] == ["Hit@5"])
    assert lines[first + 1][:3] == ["–", "relation", "only"]
    assert lines[first + 1][3] == f"{100 * rates(0.3)['tt']:.1f}"
    assert lines[first + 2] == ["–", "word", "overlap", "25.0"]
    kind = next(i for i, line in enumerate(lines) if line[:2] == ["relation", "type,"])
    assert lines[kind + 1] == ["–", "word", "overlap", "50.0"]
    assert "one-hot of the relation 50.0" in " ".join(stream.getvalue().split())


def test_a_measure_without_a_value_is_a_dash():
    result = relational_result(base=0.8)
    result["retrieval"]["hit@5"] = rates(0.8) | {"ti": None}
    stream = io.StringIO()
    print_evaluation(result, stream)
    lines = [line.replace("│", " ").split() for line in stream.getvalue().splitlines()]
    assert ["Hit@5", "80.0", "82.0", "–", "86.0", "88.0"] in lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def long_labels():
    result = relational_result(base=0.8)
    result["variants"] = {"by a [method] of a very long name": result}
    return result


def test_what_is_no_terminal_has_whole_rows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    stream = io.StringIO()
    print_evaluation(long_labels(), stream)
    lines = [line.replace("│", " ").split() for line in stream.getvalue().splitlines()]
    rates = ["80.0", "82.0", "84.0", "86.0", "88.0"]
    label = "Hit@5, scored by a [method] of a very long name"
    assert [*label.split(), *rates] in lines
    assert "…" not in stream.getvalue()


def test_a_narrow_terminal_folds_labels_and_cuts_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    print_evaluation(long_labels(), stream)
    shown = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert max(map(len, shown.splitlines())) <= 60
    words = " ".join(shown.replace("│", " ").split())
    for word in ("measure (%)", "[method]", "80.0 82.0 84.0 86.0 88.0"):
        assert word in words
    assert "…" not in words
