"""What the README shows runs as it stands."""

import pathlib
import re

import numpy as np

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
