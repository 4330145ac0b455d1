"""Imports go one way, heavy packages stay where they belong, and no module grows too long."""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.toy import ROOT

PACKAGE = ROOT / "rcml_jax"
# Layers from the ground up; a module may import those of its own layer and of the ones before.
LAYERS = (
    ("errors",),
    ("similarity", "mixup", "views"),
    ("losses", "evaluation.ranking"),
    ("models", "data", "config"),
    ("evaluation",),
    ("methods",),
    ("training",),
    ("alignment", "alignment_sources", "catalogue"),
    ("commands", "sweep_table", "sweep", "export", "report", "embed", "related", "related_page"),
)
JAX_ALONE = ("similarity", "mixup", "views", "losses", "evaluation.ranking")


def name_of(path: pathlib.Path) -> str:
    """rcml_jax/losses/relation.py → losses.relation; the package itself is the empty name."""
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


def own_imports(path: pathlib.Path) -> list[str]:
    names = imports_of(path.read_text())
    return [name.removeprefix("rcml_jax.") for name in names if within(name, "rcml_jax")]


def test_the_walk_sees_what_it_should():
    assert "losses.relation" in MODULES
    assert "similarity.as_float" in own_imports(MODULES["losses.relation"])
    assert imports_of("def f():\n    import a.b\n    from c import d, e") == ["a.b", "c.d", "c.e"]
    assert layer_of("evaluation.ranking.hit_at") < layer_of("models") < layer_of("evaluation.probe")
    with pytest.raises(AssertionError, match="no layer"):
        layer_of("plotting")


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_one_way(module):
    for name in own_imports(MODULES[module]):
        assert layer_of(name) <= layer_of(module), f"{module} imports {name}"


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
                known = within(module, "models") or module == "data.text"
                assert known, f"{module} imports {name}"
            if top == "orbax":
                assert module == "training.checkpoint", f"{module} imports {name}"
            assert top not in ("torch", "tensorflow", "cloudpickle"), module
            if top == "pickle":
                # Its unpickler is restricted: it calls nothing that a file names.
                assert module == "models.efficientnet", f"{module} imports {name}"
            if within(module, "models"):
                assert not within(name, "rcml_jax.losses"), "models know no loss"


@pytest.mark.parametrize(
    "path", [*MODULES.values(), *ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]
)
def test_no_module_is_over_700_lines(path):
    assert len(path.read_text().splitlines()) <= 700


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_the_commands_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) < 60


def loaded_by(imports: str, packages: str) -> list[str]:
    found = f"[p for p in {packages!r}.split() if p in sys.modules]"
    code = f"import sys; import {imports}; print(*{found})"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return process.stdout.split()


def test_no_tensorflow_and_no_torch_is_loaded():
    modules = "rcml_jax.commands, rcml_jax.training.loop, rcml_jax.data.openmoji, rcml_jax.sweep"
    assert loaded_by(modules, "tensorflow torch jax") == ["jax"]


def test_losses_load_neither_flax_nor_optax():
    modules = "rcml_jax.losses.relation, rcml_jax.losses.contrastive, rcml_jax.evaluation.ranking"
    assert loaded_by(modules, "flax optax orbax ml_collections transformers jax") == ["jax"]
