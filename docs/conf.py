"""
The site: `make docs` builds it from these pages, the docstrings, the commands and the schema.

Nothing is asked of the network, neither by the build nor by whoever reads the pages: formulas are MathML, made here.
"""

import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_extensions"))

project = "kdpipe"
author = "The kdpipe authors"
copyright = f"{author}, MIT licence"
version = release = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "configuration_keys",
    "mathml",
]
exclude_patterns = ["_*"]

# Pages are GitHub's Markdown: a fence of math is a formula, headings are anchors.
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# Docstrings are written for people and editors: what stands in single backticks is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"kdpipe {version}"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
templates_path: list[str] = []


def setup(app: Sphinx) -> None:
    """Help texts are plain text: a star in them is a star."""

    def escape(_app: Sphinx, _context: object, lines: list[str]) -> None:
        lines[:] = [line.replace("*", r"\*") for line in lines]

    app.connect("sphinx-click-process-description", escape)
