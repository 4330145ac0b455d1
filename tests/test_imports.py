"""Imports go one way, heavy packages stay where they belong, and no module grows too long."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest

from tests.test_metadata import BASE
from tests.toy import ROOT

PACKAGE = ROOT / "rcml_jax"
# Layers from the ground up; a module may import those of its own layer and of the ones before.
LAYERS = (
    ("errors",),
    ("registry", "files", "log", "parsing", "storage", "mirror", "remote"),
    ("ops",),
    ("losses",),
    ("models", "data", "config"),
    ("evaluation",),
    ("methods.base",),
    ("tasks",),
    ("methods",),
    ("options", "schema"),
    ("training",),
    ("methods.alignment", "search"),
    ("cli", "export", "report"),
)
JAX_ALONE = ("ops", "losses")


def name_of(path: pathlib.Path) -> str:
    """rcml_jax/losses/rcml.py → losses.rcml; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str) -> list[str]:
    """Full names of what a module imports, wherever in it; for `from a import b` the name a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> int:
    """The layer of a module, or of a name in one; the most specific entry counts."""
    matches = [
        (len(entry), number)
        for number, entries in enumerate(LAYERS)
        for entry in entries
        if within(name, entry)
    ]
    assert matches, f"{name} belongs to no layer"
    return max(matches)[1]


def registered_in(source: str) -> list[str]:
    """Full names of what the registries of a module import by a path "rcml_jax.a.b:NAME"."""
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    paths = [x for x in strings if isinstance(x, str) and re.fullmatch(r"rcml_jax[.\w]+:\w+", x)]
    return [path.replace(":", ".") for path in paths]


def own_imports(path: pathlib.Path) -> list[str]:
    """Names without the package's, of import statements and registries."""
    source = path.read_text()
    names = [*imports_of(source), *registered_in(source)]
    return [name.removeprefix("rcml_jax.") for name in names if within(name, "rcml_jax")]


def test_the_walk_sees_what_it_should():
    assert "losses.rcml" in MODULES
    assert "ops.similarity.as_float" in own_imports(MODULES["losses.rcml"])
    assert imports_of("def f():\n    import a.b\n    from c import d, e") == ["a.b", "c.d", "c.e"]
    assert registered_in("X = {'a': 'rcml_jax.a.b:C', 'd': 'e'}") == ["rcml_jax.a.b.C"]
    assert "methods.rcml.RCMLMethod" in own_imports(MODULES["methods"])
    assert layer_of("ops.ranking.hit_at") < layer_of("models") < layer_of("evaluation.scores")
    with pytest.raises(AssertionError, match="no layer"):
        layer_of("plotting")


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_one_way(module):
    for name in own_imports(MODULES[module]):
        assert layer_of(name) <= layer_of(module), f"{module} imports {name}"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that can be reached from themselves."""
    found = []
    for start in graph:
        reached, waiting = set(), list(graph[start])
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += graph[node]
        if start in reached:
            found.append(start)
    return found


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions count, too: a late import must not hide a circle."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    graph = {}
    for module, path in MODULES.items():
        # The longest prefix of a name that is a module.
        parts = [name.split(".") for name in own_imports(path)]
        prefixes = [[".".join(x[:k]) for k in range(len(x), 0, -1)] for x in parts]
        found = {next((p for p in names if p in MODULES), "") for names in prefixes}
        graph[module] = found - {module, ""}
    assert circles(graph) == []


def test_the_package_itself_imports_nothing():
    assert imports_of(MODULES[""].read_text()) == []


@pytest.mark.parametrize(
    "module", [name for name in MODULES if any(within(name, part) for part in JAX_ALONE)]
)
def test_what_others_take_along_imports_jax_alone(module):
    allowed = {"jax", "numpy", *sys.stdlib_module_names}
    for name in imports_of(MODULES[module].read_text()):
        if within(name, "rcml_jax"):
            own = name.removeprefix("rcml_jax.")
            assert any(within(own, part) for part in JAX_ALONE), f"{module} imports {name}"
        else:
            assert name.split(".")[0] in allowed, f"{module} imports {name}"


def test_training_methods_and_models_know_their_place():
    for module, path in MODULES.items():
        for name in imports_of(path.read_text()):
            top = name.split(".")[0]
            if top == "transformers":
                # For configurations and tokenizers alone.
                known = within(module, "models") or module == "data.tokenizer"
                assert known, f"{module} imports {name}"
            if top == "orbax":
                assert module == "training.checkpoint", f"{module} imports {name}"
            assert top not in ("torch", "tensorflow", "cloudpickle"), module
            if top == "pickle":
                # Its unpickler is restricted: it calls nothing that a file names.
                assert module == "models.towers.efficientnet", f"{module} imports {name}"
            if within(module, "models"):
                assert not within(name, "rcml_jax.losses"), "models know no loss"


def test_no_folder_holds_too_many_modules():
    """A reader takes in about a dozen at a glance; what outgrows that gets folders."""
    names = [name.rpartition(".")[0] for name in MODULES if MODULES[name].stem != "__init__"]
    counts = collections.Counter(names)
    assert counts["losses"] >= 8
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_the_commands_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= 15


def loaded_by(imports: str, packages: str) -> list[str]:
    found = f"[p for p in {packages!r}.split() if p in sys.modules]"
    code = f"import sys; import {imports}; print(*{found})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return process.stdout.split()


def test_no_tensorflow_and_no_torch_is_loaded():
    modules = ("cli.commands", "training.loop", "data.sources.openmoji", "cli.sweep")
    modules = ", ".join(f"rcml_jax.{name}" for name in modules)
    assert loaded_by(modules, "tensorflow torch jax") == ["jax"]


def test_losses_load_neither_flax_nor_optax():
    modules = "rcml_jax.losses.rcml, rcml_jax.losses.unicl, rcml_jax.ops.ranking"
    assert loaded_by(modules, "flax optax orbax ml_collections transformers jax") == ["jax"]


LIGHT = """
import importlib, re, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("no " + name)

sys.meta_path.insert(0, Missing())
for name in {modules!r}:
    importlib.import_module("rcml_jax." + name)
names = {{}}
exec(re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[0], names)
print(float(names["loss"]))
importlib.import_module({last!r})
"""


def test_losses_and_pooling_need_jax_flax_and_optax_alone():
    """As in a light install; what flax and optax bring along is there, but for Orbax."""
    blocked = sorted(BASE - {"absl", "flax", "jax", "numpy", "optax", "rich", "scipy"})
    assert {"transformers", "orbax", "grain", "tensorflow_datasets", "PIL"} < set(blocked)
    modules = [name for name in MODULES if any(within(name, part) for part in JAX_ALONE)]
    modules += ["models.relation_pooling", "models.towers.transformer"]
    assert {"losses.rcml", "ops.similarity"} < set(modules)
    code = LIGHT.format(blocked=blocked, modules=modules, last="rcml_jax.cli.commands")
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert 0 < float(process.stdout) < 100, process.stderr
    # The last import shows that the others are indeed missing.
    assert process.returncode == 1
    assert process.stderr.endswith("ModuleNotFoundError: no ml_collections\n")
