"""What the README shows runs as it stands."""

import pathlib
import re

import numpy as np

from tests.test_metadata import PROJECT

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert np.isfinite(names["loss"])
    assert names["terms"]["pairs"] == 5


def test_named_files_exist():
    text = README.read_text()
    for name in re.findall(r"--config (configs/\w+\.py)", text):
        assert (README.parent / name).is_file()
    for name in re.findall(r"python (\w+\.py)", text):
        assert (README.parent / name).is_file()
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert figures
    for name in figures:
        assert (README.parent / name).is_file()


def test_named_commands_exist():
    root = README.parent
    for path in (README, *root.glob("docs/**/*.md"), *root.glob("configs/*.py")):
        text = path.read_text()
        assert set(re.findall(r"\brcml-[a-z]+\b(?=[ `])", text)) <= set(PROJECT["scripts"])
        assert "python -m rcml_jax" not in text
    assert "rcml-search --embeddings" in README.read_text()
