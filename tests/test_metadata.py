"""What an installation asks for."""

import re
import tomllib

from tests.toy import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
