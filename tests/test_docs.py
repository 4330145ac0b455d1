"""The parts of the site's build that are ours: pages of the API, and docstrings."""

import importlib.util
import inspect
import pathlib
import re

from rcml_jax.cli.commands import load_config_file
from rcml_jax.losses import clip
from tests.toy import ROOT


def extension(name):
    """A module of docs/_ext."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_ext" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arguments_become_a_list():
    docstrings = extension("docstrings")
    lines = inspect.getdoc(clip.clip).splitlines()
    rendered = docstrings.render(lines, docstrings.described(clip.clip))
    assert rendered[0].startswith("CLIP: the average")  # the first line is no argument
    items = [line for line in rendered if line.startswith("- ")]
    assert items[0].startswith("- ``text``, ``image``: (n, d).")
    names = [name for item in items for name in re.findall(r"``(\w+)``", item.partition(":")[0])]
    assert {"text", "image", "where", "targets"} <= set(names) <= docstrings.described(clip.clip)
    assert any(line.startswith("Raises ValueError") for line in rendered)


def test_what_restructured_text_would_read_is_escaped():
    escape = extension("docstrings").escape
    assert escape("x_ * |y| of `a_b`") == r"x\_ \* \|y\| of ``a_b``" + "\\ "


def test_every_public_module_has_its_place():
    pages = extension("api_pages")
    for package, title in pages.PACKAGES.items():
        folder = ROOT / "rcml_jax" / pathlib.Path(*package.split("."))
        modules = {path.stem for path in folder.glob("[a-z]*.py")}
        assert modules
        text = pages.page(package, title)
        found = re.findall(rf"automodule:: rcml_jax\.{re.escape(package)}\.(\w+)\n", text)
        assert set(found) == modules
        assert f"api/{package.replace('.', '-')}" in (ROOT / "docs/reference/api.md").read_text()


def has(config, name):
    """Whether a configuration has an option, or a section, of a dotted name."""
    for part in name.split("."):
        if not hasattr(config, "get") or part not in config:
            return False
        config = config[part]
    return True


def test_named_options_exist():
    garments, news = "m3col:hm,path=x", "m3col:n24news,path=x"
    recipes = ("rcml", "rcml:amazon", "rcml:hm,path=x", "m3col", garments, news, "alignment")
    configs = [load_config_file(recipe) for recipe in recipes]
    assert has(configs[0], "model.gate")
    assert not has(configs[0], "model.gait")
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "api" not in path.parts]
    named = {
        (path.name, name.rstrip("."))
        for path in pages
        for name in re.findall(r"\bconfig\.([a-z_][\w.]*)", path.read_text())
    }
    assert len(named) > 50
    named = {(page, name) for page, name in named if name != "json"}  # the file config.json
    assert not {(page, name) for page, name in named if not any(has(c, name) for c in configs)}
