"""On the site, a table of public names becomes their full documentation; on the forge it stays a table."""

import inspect
import re

from _tables.names import found
from sphinx.application import Sphinx

TABLE = re.compile(r"<!-- names: begin(?P<names>[^>]*)-->.*?<!-- names: end -->", re.DOTALL)


def _documented(match: re.Match[str]) -> str:
    directives = "\n".join(f".. auto{_kind(name)}:: {name}" for name in match["names"].split())
    return f"```{{eval-rst}}\n{directives}\n```"


def _kind(name: str) -> str:
    if not inspect.isclass(named := found(name)):
        return "function"
    return "exception" if issubclass(named, Exception) else "class"


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = TABLE.sub(_documented, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Replace the tables as a page is read."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
