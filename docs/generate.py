"""
Write the tables of commands, keys, public names and options into their pages: `make docs` runs this.

A page keeps such a table between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

import re
from pathlib import Path

from _tables import commands, keys, names, options

HERE = Path(__file__).resolve().parent
TABLES = {"commands": commands.section, "keys": keys.section, "names": names.section, "options": options.section}
PAGES = ["commands.md", "configuration.md", "api.md", "teachers.md"]


def current(page: str) -> str:
    """The text of a page with its generated parts as they should be today."""

    def fill(match: re.Match[str]) -> str:
        return f"{match['begin']}\n\n{TABLES[match['name']](match['given'])}\n\n{match['end']}"

    pattern = r"(?P<begin><!-- (?P<name>\w+): begin(?P<given>[^>]*?)-->)\n.*?(?P<end><!-- (?P=name): end -->)"
    return re.sub(pattern, fill, (HERE / page).read_text(encoding="utf-8"), flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        (HERE / page).write_text(current(page), encoding="utf-8")
