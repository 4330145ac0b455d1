"""Configuration of the documentation site: `sphinx-build -W -n docs build/docs`."""

import importlib.metadata
import pathlib
import sys
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "_ext"))
sys.path.insert(0, str(ROOT))
# Of packages that the modules import; those of Sphinx itself are errors (-W).
warnings.filterwarnings("ignore", category=DeprecationWarning)

project = "rcml_jax"
author = "The rcml_jax developers"
copyright = author  # the name that Sphinx reads
try:
    release = importlib.metadata.version("rcml_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    from rcml_jax import __version__ as release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api_pages",
    "docstrings",
    "option_tables",
    "outside_links",
]
exclude_patterns = ["_ext"]
nitpicky = True
# Types of other packages and type variables have no page here; no inventory is fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!rcml_jax\b).*"),
    (r"py:class", r".*\._\w+"),  # private protocols in signatures
]

html_theme = "furo"
html_title = f"rcml_jax {release}"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]

# Markdown and notebooks
myst_enable_extensions = ["dollarmath", "deflist", "attrs_block"]
myst_heading_anchors = 4
nb_execution_mode = "cache"  # a tutorial is executed again when its code changes
nb_execution_timeout = 1800  # seconds of a cell; a busy machine is no error
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress, and warnings about the machine that builds

# API
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
add_module_names = False
