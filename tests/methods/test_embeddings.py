"""Embeddings from a file under the protocol of the trained methods."""

import dataclasses
import io
import json
import pathlib
import re

import numpy as np
import pytest

from rcml_jax.cli import commands, report
from rcml_jax.data.sources.folder import load as load_folder
from rcml_jax.errors import UserError
from rcml_jax.evaluation import display
from rcml_jax.methods import build, embeddings
from rcml_jax.methods.embeddings import embeddings_config
from rcml_jax.methods.tower_tables import SENTENCE_WEIGHTS as WEIGHTS
from rcml_jax.search.items import read_items
from rcml_jax.training import loop
from tests.cli.test_commands import fails, run
from tests.report.runs import relational_result, small_config, write_run
from tests.toy import CONFIG, ITEMS, KINDS, PLACES, ROOT, cache_of, tiny_config

RELATIONS = KINDS + PLACES
TASKS = ("retrieval", "retrieval_random", "retrieval_all", "relation_type")


@pytest.fixture(scope="module")
def graph(catalogue):
    return load_folder(catalogue, cache_of(catalogue), log=lambda line: None)


def save(path, graph, order=None, **arrays):
    """A file of random vectors, or the given ones; None leaves an array out."""
    rng = np.random.default_rng(0)
    made = {"text": rng.normal(size=(ITEMS, 6)), "image": rng.normal(size=(ITEMS, 6))}
    made |= {"ids": np.array(graph.ids), "relation": rng.normal(size=(RELATIONS, 6))}
    made |= arrays
    if order is not None:
        made |= {name: made[name][order] for name in ("ids", "text", "image")}
    np.savez(path, **{name: x for name, x in made.items() if x is not None})
    return path


def evaluate(catalogue, path, split="test", **options):
    """The evaluation of a file, without a work directory."""
    config = embeddings_config(tiny_config(catalogue, **options), str(path))
    return build(config, pathlib.Path()).evaluate({}, split)


def words(graph):
    """What a perfect model knows: the kind and the place of items and sentences, (n, 22) each."""
    names = [sentence.removeprefix("both ") for sentence in graph.relations]
    of_items = np.array([[name in text.split() for name in names] for text in graph.texts], float)
    return of_items + 1e-4, np.eye(len(names))


def test_vectors_of_a_baseline_have_its_own_figures(catalogue, graph, tmp_path):
    config = tiny_config(catalogue, method="clip")
    theirs = loop.train_and_evaluate(config, tmp_path / "clip")
    method = build(config, tmp_path / "clip")
    params = loop.read_params(tmp_path / "clip")
    table = method.tables(params, np.arange(ITEMS))["plain"]
    vectors = {"text": table.text[0], "image": table.image[0], "relation": table.relation}
    # Neither the order of the items nor the length of a vector has a say.
    order = np.random.default_rng(1).permutation(ITEMS)
    path = save(tmp_path / "f.npz", graph, order, **{k: 3 * v for k, v in vectors.items()})
    ours = evaluate(catalogue, path)
    plain = theirs["variants"]["plain"]
    for task in ("retrieval", "retrieval_random", "retrieval_all"):
        close(ours["variants"]["plain"][task], plain[task])
    assert ours["relation_validity"] == theirs["relation_validity"]
    close(ours["training_free_product"], theirs["training_free_product"])
    assert ours["controls"].keys() == theirs["controls"].keys()
    for name, row in theirs["controls"].items():
        close(ours["controls"][name], row)
    assert "relation_type" not in ours["variants"]["plain"]
    assert ours["left_out"] == {}
    again = evaluate(catalogue, save(tmp_path / "g.npz", graph, **vectors))
    for task in TASKS:
        close(again[task], ours[task])


def close(found, expected):
    """Nested measures of 40 queries, of which rounding may turn two."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            close(found[name], value)
        else:
            assert found[name] == pytest.approx(value, abs=0.055), name


def test_perfect_vectors_reach_100(catalogue, graph, tmp_path):
    items, sentences = words(graph)
    path = save(tmp_path / "f.npz", graph, text=items, image=items, relation=sentences)
    result = evaluate(catalogue, path)
    for task, measure in (
        ("retrieval", "hit@1"),
        ("retrieval_all", "map"),
        ("relation_type", "top1"),
    ):
        assert result[task][measure] == dict.fromkeys(result[task][measure], 1.0), task
        assert len(result[task][measure]) == 5
    # The items alone do not say which relation is asked for.
    assert result["variants"]["plain"]["retrieval"]["hit@1"]["avg"] < 0.5
    scoring = result["protocol"]["scoring"]
    assert scoring["weight"] in WEIGHTS
    tried = scoring["weights_on_validation"]
    assert len(tried) == len(WEIGHTS)
    assert tried[f"{scoring['weight']:g}"] == max(tried.values())
    under = (items[None] * sentences[:, None]) + 1e-4 * np.random.default_rng(0).random(
        (1, ITEMS, 22)
    )
    path = save(tmp_path / "u.npz", graph, text_under=under, text=items, image=items, relation=None)
    result = evaluate(catalogue, path)
    assert set(result["variants"]) == {"under", "plain"}
    assert result["retrieval"]["hit@1"]["tt"] == result["relation_type"]["top1"]["tt"] == 1
    # Images do not depend on the relation: nothing is said of relation type by II.
    assert set(result["relation_type"]["top1"]) == {"tt", "ti", "it", "avg"}
    assert list(result["left_out"]) == ["training_free_product"]


def test_the_weight_is_chosen_on_validation(catalogue, graph, tmp_path):
    """Items know the kind, sentences the opposite direction: the smallest weight is the best."""
    items, sentences = words(graph)
    path = save(tmp_path / "f.npz", graph, text=items, image=items, relation=-sentences)
    config = embeddings_config(tiny_config(catalogue), str(path))
    method = build(config, tmp_path)
    assert method.sentence_weight == WEIGHTS[0]
    assert method.weights_tried[WEIGHTS[0]] > method.weights_tried[WEIGHTS[-1]]
    table = method.tables({}, np.arange(ITEMS))["sentence"]
    assert table.sentence_weight == WEIGHTS[0]


def test_spaces_of_two_widths_score_no_pair_across_them(catalogue, graph, tmp_path):
    items, sentences = words(graph)
    image = np.random.default_rng(2).normal(size=(ITEMS, 9))
    path = save(tmp_path / "f.npz", graph, text=items, image=image, relation=sentences)
    result = evaluate(catalogue, path)
    assert set(result["retrieval"]["hit@5"]) == {"tt", "ii", "avg"}
    assert set(result["relation_type"]["top3"]) == {"tt", "avg"}
    assert set(result["training_free_product"]["retrieval"]["hit@5"]) == {"tt", "avg"}
    assert set(result["controls"]["relation_only"]["retrieval"]["hit@5"]) == {"tt", "ii", "avg"}
    assert result["left_out"] == {"scores": "TI, IT: the file has two widths, no joint space"}
    method = build(embeddings_config(tiny_config(catalogue), str(path)), tmp_path)
    table = method.tables({}, np.arange(ITEMS))["plain"]
    both = (table.text + table.image)[0] / np.sqrt(2)
    cosines = [x @ x.T for x in (table.text[0], table.image[0])]
    np.testing.assert_allclose(both @ both.T, sum(cosines) / 2, atol=1e-6)
    np.testing.assert_allclose(table.text[0] @ table.image[0].T, 0)


@pytest.mark.parametrize("side", ["text", "image"])
def test_one_modality_alone(catalogue, graph, tmp_path, side):
    other = {"text": "image", "image": "text"}[side]
    name = {"text": "tt", "image": "ii"}[side]
    vectors = words(graph)[0]
    path = save(tmp_path / "f.npz", graph, **{other: None, side: vectors, "relation": None})
    result = evaluate(catalogue, path)
    assert set(result["retrieval"]["hit@5"]) == {name}
    both = evaluate(catalogue, save(tmp_path / "g.npz", graph, **{side: vectors, "relation": None}))
    assert result["retrieval"]["hit@5"][name] == both["retrieval"]["hit@5"][name]
    for missing in ("relation_type", "relation_validity", "training_free_product"):
        assert missing not in result
        assert missing in result["left_out"]
    assert "relation_type" not in result["controls"]["relation_only"]
    assert set(result["controls"]["words"]["retrieval"]["hit@5"]) == {"tt"}


def test_a_relation_of_another_width_serves_the_probe_alone(catalogue, graph, tmp_path):
    path = save(
        tmp_path / "f.npz", graph, relation=np.random.default_rng(3).normal(size=(RELATIONS, 4))
    )
    result = evaluate(catalogue, path)
    assert set(result["left_out"]) == {"relation_type", "training_free_product"}
    assert "accuracy" in result["relation_validity"]
    assert "variants" not in result


def test_unseen_sentences(catalogue, graph, tmp_path, monkeypatch):
    said = tuple((s, f"{s} too", f"{s} indeed") for s in graph.relations)
    turned = dataclasses.replace(graph, paraphrases=said, held_out=2).validate()
    items, sentences = words(graph)
    unseen = np.stack([sentences, np.roll(sentences, 1, axis=0)])
    arrays = {"text": items, "image": items, "relation": sentences}
    results = []
    for given in (unseen, None):
        path = save(tmp_path / "f.npz", graph, relation_unseen=given, **arrays)
        monkeypatch.setattr(embeddings, "load_graph", lambda data, workdir: turned)
        results.append(evaluate(catalogue, path))
    right, wrong = results[0]["unseen_sentences"]
    assert right["relation_type"] == results[0]["relation_type"]
    assert right["relation_type"]["top1"]["avg"] == 1
    assert wrong["relation_type"]["top1"]["avg"] < 0.5
    assert "unseen_sentences" not in results[1]
    assert "relation_unseen" in results[1]["left_out"]["unseen_sentences"]


# --- The command ----------------------------------------------------------------------------------


def arguments(catalogue, path, workdir, **options):
    values = {
        "data.disjoint": "pair",
        "data.queries": 40,
        "data.dir": cache_of(catalogue),
    } | options
    return [
        f"--config={CONFIG}:folder,path={catalogue}",
        f"--embeddings={path}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def test_the_command_writes_what_it_prints(catalogue, graph, tmp_path, capsys):
    arrays = {name: np.ones((ITEMS + 1, 6)) + np.eye(ITEMS + 1, 6) for name in ("text", "image")}
    path = save(tmp_path / "mine.npz", graph, ids=np.array([*graph.ids, "new"]), **arrays)
    args = arguments(catalogue, path, tmp_path / "deep" / "run")
    status, out, err = run(commands.evaluate, args, capsys)
    assert status == 0, err
    assert "embeddings of mine.npz on catalogue: test, 40 queries" in out
    assert f"note: {path} has items that catalogue lacks: 1 ignored" in err
    for part in ("– relation only", "– words, relation only", "Hit@5, scored sentence"):
        assert part in out
    directory = tmp_path / "deep" / "run"
    assert {p.name for p in directory.iterdir()} == {".lock", "config.json", "eval.json"}
    result = json.loads((directory / "eval.json").read_text())
    assert result["embeddings"]["ignored"] == 1
    assert (result["method"], result["split"]) == ("embeddings", "test")
    # Again by the work directory alone, and with the same command.
    for again in ([f"--workdir={directory}"], args):
        assert run(commands.evaluate, again, capsys)[:2] == (0, out)
    assert json.loads((directory / "eval.json").read_text()) == result
    # Another file, another split seed, or a run of another method: nothing is overwritten.
    before = (directory / "eval.json").read_text()
    other = save(tmp_path / "other.npz", graph)
    for args in (
        arguments(catalogue, other, directory),
        arguments(catalogue, path, directory, **{"data.split_seed": 1}),
    ):
        fails(commands.evaluate, args, capsys, directory, "was evaluated with another", "--workdir")
    save(path, graph)
    fails(commands.evaluate, [f"--workdir={directory}"], capsys, path, "has changed since")
    assert (directory / "eval.json").read_text() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "eval.json").write_text("{}")
    fails(commands.evaluate, arguments(catalogue, other, tmp_path / "full"), capsys, "not empty")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_table_of_a_sweep_takes_the_result(catalogue, graph, tmp_path, seed):
    result = evaluate(
        catalogue, save(tmp_path / "f.npz", graph, relation=None, image=None), data__split_seed=seed
    )
    assert result["protocol"]["split_seed"] == seed
    (tmp_path / "theirs" / "seed0").mkdir(parents=True)
    (tmp_path / "theirs" / "seed0" / "eval.json").write_text(json.dumps(result))
    table = display.collect(tmp_path, {"theirs": "theirs"}, [0])
    assert table["rows"][0]["Hit@5 TT"]["mean"] == result["retrieval"]["hit@5"]["tt"]
    assert "Top-3" not in table["rows"][0]
    assert "| theirs | 1 |" in display.markdown(table)


def test_a_report_takes_the_result_beside_a_trained_runs(catalogue, graph, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = save(tmp_path / "f.npz", graph, relation=None, image=None)
    directories = tmp_path / "theirs", tmp_path / "ours"
    assert run(commands.evaluate, arguments(catalogue, path, directories[0]), capsys)[0] == 0
    write_run(directories[1], small_config("clip"), relational_result("clip"))
    for given in (directories, directories[:1]):
        args = [f"--workdir={directory}" for directory in given]
        status, _, err = run(report.main, [*args, f"--out={tmp_path / 'report'}"], capsys)
        assert status == 0, err
        page = (tmp_path / "report" / "index.html").read_text("utf-8")
        assert "theirs is of a file of embeddings and has no model" in page
        assert "Retrieval: Hit@5" in page
        none = "no run has relation validity; eval.json says why (left_out)"
        assert (none in page) == (len(given) == 1)
        table = (tmp_path / "report" / "data" / "retrieval.csv").read_text()
        assert table.count("theirs") == 1  # TT alone


def one_array():
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


def bad(**arrays):
    return lambda path, graph: save(path, graph, **arrays)


def spoiled(name, value, index):
    def make(path, graph):
        vectors = np.random.default_rng(0).normal(size=(ITEMS, 6))
        vectors[index] = value
        return save(path, graph, **{name: vectors})

    return make


def without_item_7(path, graph):
    return save(path, graph, order=np.delete(np.arange(ITEMS), 7))


WRONG = {
    "no file": (lambda path, graph: path, "there is no file|cannot read .*No such file"),
    "no npz": (lambda path, graph: path.write_text("no zip"), r"is no \.npz file"),
    "one array": (lambda path, graph: path.write_bytes(one_array()), "holds one array"),
    "pickled": (bad(text=np.array([{}] * ITEMS, object)), "holds pickled objects"),
    "no ids": (bad(ids=None), "lacks the array 'ids'"),
    "no vectors": (bad(text=None, image=None), "has neither text nor image"),
    "ids are numbers": (bad(ids=np.arange(ITEMS)), r"must be one row of strings, not int64"),
    "an id twice": (bad(ids=np.array(["i0"] * ITEMS)), "has the id 'i0' more than once"),
    "rows": (bad(text=np.ones((ITEMS - 1, 6))), r"text of .* shape \(59, 6\), not \(60, width\)"),
    "flat": (bad(image=np.ones(ITEMS)), r"image of .* shape \(60,\), not \(60, width\)"),
    "relations": (bad(relation=np.ones((3, 6))), r"shape \(3, 6\), not \(22, width\)"),
    "under": (bad(text_under=np.ones((22, ITEMS, 5))), r"not \(22, 60, 6\)"),
    "unseen": (bad(relation_unseen=np.ones((1, 22, 6))), r"not \(0, 22, 6\)"),
    "under without": (bad(image=None, image_under=np.ones((22, 60, 6))), "without image"),
    "words": (bad(text=np.full((ITEMS, 6), "a")), "text of .* is of type <U1"),
    "nan": (spoiled("image", np.nan, (4, 2)), "image of .* 1 vector that is NaN .* index 4"),
    "infinite": (spoiled("text", np.inf, (5, 2)), "text of .* NaN or infinite"),
    "zero": (spoiled("text", 0, [1, 7]), "text of .* 2 vectors that are zero, .* index 1"),
    "items": (without_item_7, r"lacks 1 of the 60 items .* such as 'i7' \(1 of them training"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(catalogue, graph, tmp_path, capsys, name):
    make, message = WRONG[name]
    path = tmp_path / "wrong.npz"
    make(path, graph)
    args = arguments(catalogue, path, tmp_path / "run")
    line = fails(commands.evaluate, args, capsys, "wrong.npz")
    assert re.search(message, line), line
    # The work directory is free for the mended file.
    assert not (tmp_path / "run" / "eval.json").exists()
    if name == "nan":
        assert (
            run(
                commands.evaluate, arguments(catalogue, save(path, graph), tmp_path / "run"), capsys
            )[0]
            == 0
        )


def test_wrong_command_lines(catalogue, graph, tmp_path, capsys):
    path = save(tmp_path / "f.npz", graph)
    workdir = f"--workdir={tmp_path / 'run'}"
    fails(
        commands.evaluate, [f"--embeddings={path}", workdir], capsys, "--embeddings needs --config"
    )
    args = [f"--config={CONFIG}", f"--embeddings={path}"]
    fails(commands.evaluate, args, capsys, "the evaluation needs --workdir")
    args = [f"--config={ROOT / 'configs' / 'm3col.py'}", f"--embeddings={path}", workdir]
    fails(commands.evaluate, args, capsys, "are scored on a relation graph")
    args = arguments(catalogue, path, tmp_path / "run", **{"data.split_seed": -1})
    fails(commands.evaluate, args, capsys, "split_seed=-1 must be from 0")
    args = [*arguments(catalogue, path, tmp_path / "run"), "--split=tests"]
    fails(commands.evaluate, args, capsys, "--split=tests is unknown")
    args = arguments(catalogue, path, tmp_path / "run", **{"evaluation.similarity": "cosin"})
    fails(commands.evaluate, args, capsys, "similarity='cosin' is unknown")


def test_every_similarity(catalogue, graph, tmp_path):
    path = save(tmp_path / "f.npz", graph)
    result = evaluate(catalogue, path, evaluation__similarity="all")
    assert next(iter(result["similarities"])) == "cosine"
    assert result["similarities"]["cosine"]["retrieval"] == result["retrieval"]
    assert result["similarities"]["manhattan"]["relation_type"]["pairs"] == 40


# --- Making the file ------------------------------------------------------------------------------


def test_the_list_of_what_to_embed(catalogue, graph, tmp_path, capsys):
    args = [
        f"--config={CONFIG}:folder,path={catalogue}",
        f"--config.data.dir={cache_of(catalogue)}",
    ]
    args.append(f"--list={tmp_path / 'deep' / 'list'}")
    status, out, err = run(commands.evaluate, args, capsys)
    assert (status, err) == (0, "")
    assert out == f"{tmp_path / 'deep' / 'list'}: 60 items, 22 relations\n"
    items = read_items(tmp_path / "deep" / "list")
    assert (items.ids, items.texts) == (graph.ids, graph.texts)
    assert all(items.read(i) == graph.images.encoded(i) for i in range(ITEMS))
    lines = (tmp_path / "deep" / "list" / "relations.jsonl").read_text().splitlines()
    assert tuple(json.loads(line)["sentence"] for line in lines) == graph.relations
    fails(commands.evaluate, args, capsys, "is not empty", "--list")
    fails(commands.evaluate, [args[-1]], capsys, "--list needs --config")
    other = ["--config=m3col", f"--list={tmp_path / 'other'}"]
    fails(commands.evaluate, other, capsys, "the items of a relation graph; give --config rcml")
    assert not (tmp_path / "other").exists()


def test_the_documented_example_runs(catalogue, graph, tmp_path, monkeypatch):
    """The block that is the same for every model, with a trivial one in the place of CLIP."""
    text = (ROOT / "docs" / "embeddings.md").read_text()
    model, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    functions = re.findall(r"def (embed_\w+)\(", model)
    assert functions == ["embed_texts", "embed_images"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_catalogue").symlink_to(catalogue)
    names = {
        "embed_texts": lambda texts: [[len(t), t.count("1") + 1, len(set(t))] for t in texts],
        "embed_images": lambda images: [np.asarray(x).mean(axis=(0, 1)) + 1 for x in images],
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exec(compile(code, "embeddings.md", "exec"), names)
    with np.load("embeddings.npz") as arrays:
        assert {n: x.shape for n, x in arrays.items()} == {
            "ids": (60,), "text": (60, 3), "image": (60, 3), "relation": (22, 3),
        }  # fmt: skip
    assert evaluate(catalogue, "embeddings.npz")["retrieval"]["queries"] == 40


def test_nothing_is_trained(catalogue, graph, tmp_path):
    config = embeddings_config(tiny_config(catalogue), str(save(tmp_path / "f.npz", graph)))
    with pytest.raises(UserError, match=r"are not trained; score them with rcml-eval"):
        loop.train_and_evaluate(config, tmp_path / "run")
