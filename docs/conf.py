"""
Sphinx builds the site from these pages and the docstrings: `make docs`.

Neither the build nor a reader needs a network: formulas are written as MathML.
"""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "_extensions")]

project = "kdpipe"
author = "The kdpipe authors"
copyright = f"{author}, MIT licence"
version = release = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "autodoc_names",
    "forge_pages",
    "mathml",
]
exclude_patterns = ["_*"]

# Pages are GitHub's Markdown: a fence of math is a formula, headings are anchors, two hyphens begin an option.
smartquotes = False
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# Docstrings are Markdown for editors: single backticks mean code.
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
