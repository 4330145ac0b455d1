"""What the terminal shows of an evaluation on a relation graph."""

import io

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
