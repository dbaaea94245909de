"""
Pages that read well on the forge as well as on the site.

A directive in a comment, `<!-- {toctree} … -->`, works on the site alone. A page that is nothing but a link to another
Markdown file shows that file on the site.
"""

import re

from sphinx.application import Sphinx

DIRECTIVE = re.compile(r"<!-- (?P<directive>\{\w+\}.*?)\n?-->", re.DOTALL)
FRAME = re.compile(r"\[[^\]]+\]\((?P<file>[^)\s]+\.md)\)\n")


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    if frame := FRAME.fullmatch(source[0]):
        source[0] = f"```{{include}} {frame['file']}\n```\n"
    else:
        source[0] = DIRECTIVE.sub(r"```\g<directive>\n```", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrite a page as it is read."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
