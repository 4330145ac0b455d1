"""Parts of other packages by their import paths: no file of the library knows them."""

import importlib
import json
import sys

import numpy as np
import pytest

from rcml_jax.cli import commands
from rcml_jax.errors import UserError
from rcml_jax.evaluation import SCORES, display, measures
from rcml_jax.export.card import figures
from rcml_jax.methods import EMBEDDINGS, LOSSES, METHODS, build, family_of, method_class
from rcml_jax.registry import resolve
from rcml_jax.schema import validate
from tests.cli.test_commands import fails
from tests.toy import CONFIG, ROOT, TINY, arguments, cache_of, read_metrics, tiny_config

PARTS = '''
"""A source, a loss, a tower, a method and a measure of a package that is not the library's."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from rcml_jax.data.classification import ClassificationData, Modality
from rcml_jax.data.sources import folder
from rcml_jax.evaluation.measures import Measure
from rcml_jax.methods.base import Method
from rcml_jax.tasks.relations import RelationTask
from rcml_jax.models.towers.transformer import TokenStates

NUMBER = 5


def graph(data, cache):
    return dataclasses.replace(folder.load(data.path, cache), name="mine")


def classes(data, cache):
    rng, labels = np.random.default_rng(data.split_seed), np.arange(30, dtype=np.int32) % 2
    table = Modality("view", "table", rng.normal(size=(30, 4)).astype(np.float32))
    split = np.repeat(np.int8([0, 2]), [20, 10])
    return ClassificationData("mine", (table,), labels, ("no", "yes"), split)


def loss(text, image, *, where):
    distances = jnp.sum((text - image) ** 2, axis=-1)
    return jnp.sum(jnp.where(where, distances, 0)) / jnp.sum(where)


def careless(text, image):
    return jnp.mean((text - image) ** 2)


class Tower(nn.Module):
    """The mean colour of an image."""

    config: object
    dtype: object = jnp.float32
    remat: str = ""

    @nn.compact
    def tokens(self, pixels):
        colours = pixels.astype(jnp.float32).mean(axis=(1, 2)) / 255
        return nn.Dense(self.config.hidden_size, name="colour")(colours)[:, None]

    def token_states(self, pixels, project):
        states = project(self.tokens(pixels))
        return TokenStates(states, jnp.ones((len(pixels), 1), bool), jnp.zeros(len(pixels), int))


def vector(text, image, *, where):
    return jnp.sum((text - image) ** 2, axis=-1)


def failing(data, cache):
    raise KeyError("lost")


def listing(data, cache):
    return [1, 2, 3]


class Bare(nn.Module):
    """No tower: it has no token states."""

    config: object
    dtype: object = jnp.float32
    remat: str = ""


class Plain(Tower):
    """A tower that returns an array in place of its states."""

    def token_states(self, pixels, project):
        return project(self.tokens(pixels))


class Half(Method):
    """A method that lacks nearly everything."""


class Brightness(Method):
    """Learns the mean brightness of images."""

    selection = "score"

    def __init__(self, config, task):
        self.config, self.task = config, task

    @classmethod
    def load(cls, config, workdir):
        return cls(config, RelationTask.load(config, workdir))

    def batches(self):
        return self.task.batches()

    def init(self, key, batch):
        return {"mean": jnp.zeros(())}

    def embed(self, params, batch, key):
        return batch["items"]["images"].astype(jnp.float32).mean(axis=(1, 2, 3)) / 255

    def objective(self, params, embedded, batch, progress):
        return jnp.mean((embedded - params["mean"]) ** 2), {}

    def validate(self, params):
        return {"score": -abs(float(params["mean"]) - 0.5)}

    def evaluate(self, params, split="test", history=()):
        mean = float(params["mean"])
        return {"method": self.config.method, "split": split, "mine": {"mean": mean}}


class Scalar(Brightness):
    """Returns a loss without its terms."""

    def objective(self, params, embedded, batch, progress):
        return jnp.mean(embedded)


class Unscored(Brightness):
    """Is selected by what it does not measure."""

    selection = "lost"


MEASURE = Measure(
    "retrieval/hit@10",
    "Hit@10",
    title="Hit@10",
    columns={"avg": "Hit@10 AVG"},
    chance="controls/chance/retrieval/hit@10",
    of_ranks=lambda ranks: ranks < 10,
)
'''


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The name of a module that holds `PARTS`, in a package on the path."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "parts.py").write_text(PARTS)
    (folder / "my_package" / "broken.py").write_text("1 / 0\n")
    (folder / "my_package" / "lacking.py").write_text("import no_such_module\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield "my_package.parts"
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def train(catalogue, workdir, source, **options):
    """Run train.py as a user does, and return its eval.json."""
    values = TINY | {"data.dir": cache_of(catalogue), "data.path": catalogue, "steps": 4}
    values |= {name.replace("__", "."): value for name, value in options.items()}
    args = [f"--config={CONFIG}:{source}", f"--workdir={workdir}"]
    args += [f"--config.{name}={value}" for name, value in values.items()]
    assert commands.train(["train.py", *args]) == 0
    return json.loads((workdir / "eval.json").read_text())


def test_a_source_a_tower_and_a_loss_of_another_package(parts, catalogue, tmp_path, capsys):
    options = {"model__image_tower": f"{parts}:Tower", "loss__function": f"{parts}:loss"}
    workdir = tmp_path / "run"
    result = train(catalogue, workdir, f"{parts}:graph", method="clip", **options)
    assert result["dataset"] == "mine"
    assert "clip on mine" in capsys.readouterr().out
    lines = [line["loss"] for line in read_metrics(workdir) if line["kind"] == "train"]
    # Squared distances of unit vectors are between 0 and 4, and they shrink.
    assert 0 <= lines[-1] < lines[0] <= 4
    config = tiny_config(catalogue, method="clip", data__name=f"{parts}:graph", **options)
    towers = build(config, workdir).init_params(*_key_and_batch(config, workdir))["towers"]
    assert set(towers["vision_model"]) == {"colour"}
    assert towers["vision_model"]["colour"]["kernel"].shape == (3, config.model.width)
    assert commands.evaluate(["eval.py", f"--workdir={workdir}"]) == 0


def _key_and_batch(config, workdir):
    import jax

    return jax.random.key(0), next(build(config, workdir).batches())


def test_a_method_of_another_package(parts, catalogue, tmp_path, capsys):
    name = f"{parts}:Brightness"
    result = train(catalogue, tmp_path / "run", "folder", method=name)
    assert result["method"] == name
    assert result["mine"]["mean"] > 0
    shown = capsys.readouterr().out
    assert "mine/mean" in shown
    assert f"{result['mine']['mean']:.4g}" in shown
    assert family_of(name) == ""


def test_classification_data_of_another_package(parts, tmp_path):
    source = f"{parts}:classes"
    config = commands.load_config_file(f"{ROOT / 'configs' / 'm3col.py'}:{source}")
    config.update_from_flattened_dict({"model.width": 8, "data.split_seed": 3})
    data = build(config, tmp_path).task.data
    assert data.name == "mine"
    expected = np.random.default_rng(3).normal(size=(30, 4)).astype(np.float32)
    np.testing.assert_array_equal(data.modalities[0].values, expected)


def test_one_more_line_in_the_list_of_measures(parts, catalogue, tmp_path, monkeypatch, capsys):
    """It is computed, printed, tabulated, put on the card and can pick the checkpoint."""
    measure = importlib.import_module(parts).MEASURE
    with pytest.raises(UserError, match=r"config\.selection='hit@10/avg' is unknown"):
        validate(tiny_config(catalogue, selection="hit@10/avg"))
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, measure))
    workdir = tmp_path / "run" / "seed42"
    result = train(catalogue, workdir, "folder", method="clip", selection="hit@10/avg")
    rate = result["retrieval"]["hit@10"]["avg"]
    assert result["retrieval"]["hit@5"]["avg"] <= rate <= 1
    assert set(result["retrieval"]["macro"]["hit@10"]) == {"tt", "ii", "ti", "it", "avg"}
    assert measures.chance_of(measure, result) == pytest.approx(10 / 21)
    assert result["controls"]["words"]["retrieval"]["hit@10"]["tt"] == 1
    found = [line for line in read_metrics(workdir) if line["kind"] == "validation"]
    assert all("hit@10/avg" in line for line in found)
    assert "Hit@10" in capsys.readouterr().out
    table = display.markdown(display.collect(tmp_path, {"one": "run"}, [42]))
    assert table.splitlines()[0].endswith(" | Hit@10 AVG |")
    assert f"| {100 * rate:.1f} |" in table.splitlines()[2]
    assert figures(result)["Hit@10 AVG"] == f"{100 * rate:.1f}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_where_the_registry_says(name):
    family = "classification" if name == "m3col" else "relational"
    assert family_of(name) == family
    assert callable(method_class(name).load)


def test_every_heading_and_path_is_of_one_measure():
    paths = [measure.path for measure in measures.MEASURES]
    headings = [h for measure in measures.MEASURES for h in measure.columns.values()]
    assert len(set(paths)) == len(paths)
    assert len(set(headings)) == len(headings) == len(measures.columns())
    for measure in measures.MEASURES:
        assert measure.family in ("relational", "classification")
        assert set(measure.columns) <= {"", *SCORES}
    tasks = [measure.task for measure in measures.main_measures()]
    assert len(set(tasks)) == len(tasks)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "config.x='nothing' is unknown; choose one of a, b, or give an import path"),
        ("my_package.parts", "config.x='my_package.parts' is unknown"),
        ("no_such_package.parts:loss", "the module no_such_package.parts cannot be imported"),
        ("my_package.lacking:loss", "cannot be imported (No module named 'no_such_module')"),
        ("my_package.broken:loss", "importing my_package.broken fails with ZeroDivisionError"),
        ("my_package.parts:lost", "the module my_package.parts has no 'lost'"),
        ("my_package.parts:NUMBER", "is of type int; name a function"),
        (":loss", "config.x=':loss'"),
    ],
)
def test_what_cannot_be_resolved_is_said_in_one_sentence(parts, name, said):
    with pytest.raises(UserError) as error:
        resolve(name, {"a": "os:getcwd", "b": "os:getpid"}, "config.x")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_of_the_registry_and_a_path_are_the_same():
    import os

    assert resolve("a", {"a": "os:getcwd"}, "x") is resolve("os:getcwd", {}, "x") is os.getcwd


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "my_package.parts:loss"}, "name a subclass of rcml_jax.methods.base.Method"),
        ({"method": EMBEDDINGS}, "eval.py --embeddings FILE.npz"),
        ({"loss.function": "my_package.parts:loss"}, "config.loss.function is for the baselines"),
        (
            {"method": "clip", "loss.function": "hinge"},
            f"choose one of {', '.join(LOSSES)}, or give an import path",
        ),
        (
            {"method": "clip", "loss.function": "my_package.parts:careless"},
            "takes no argument where, the mask of a batch's items",
        ),
        ({"model.image_tower": "vit"}, "image_tower='vit' must be an import path"),
        ({"model.image_tower": "my_package.parts:NUMBER"}, "name a flax module or a function"),
        (
            {"model.image_tower": "my_package.parts:Tower", "model.image_pretrained": "x"},
            "both name the image tower",
        ),
        ({"data.name": "my_package.parts:NUMBER"}, "config.data.name='my_package.parts:NUMBER'"),
        (
            {"data.name": "os:getcwd"},
            "config.data.name='os:getcwd' takes other arguments (too many positional arguments); a "
            "data source takes (config.data, directory of the cache) and returns an "
            "rcml_jax.data.relation_graph.RelationGraph",
        ),
        ({"data.name": "my_package.parts:listing"}, "returns a list; a data source takes"),
        ({"data.name": "my_package.parts:failing"}, "fails with KeyError: 'lost' ("),
        ({"method": "my_package.parts:Half"}, "fails with TypeError: Can't instantiate abstract"),
        (
            {"method": "clip", "loss.function": "my_package.parts:vector"},
            "config.loss.function='my_package.parts:vector' returns a",
        ),
        ({"model.image_tower": "my_package.parts:Bare"}, "returns a Bare; a tower is made of"),
        ({"model.image_tower": "my_package.parts:loss"}, "takes other arguments (too many"),
        (
            {"model.image_tower": "my_package.parts:Plain"},
            "its token_states takes (inputs, project) and returns an",
        ),
        ({"method": "my_package.parts:Scalar"}, "its loss takes (params, batch, key, progress)"),
        ({"method": "my_package.parts:Unscored"}, "returns no 'lost'"),
    ],
)
def test_train_py_says_which_option_is_wrong(parts, catalogue, tmp_path, capsys, options, said):
    fails(commands.train, arguments(catalogue, tmp_path / "run", **options), capsys, said)
