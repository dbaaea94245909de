"""Names from files reach a terminal or a spreadsheet as text: no markup, no control character, no formula."""

import csv
import io

import pytest
from rich.table import Table

from kdpipe.pipeline.commands.console import Terminal
from kdpipe.pipeline.commands.options import complain
from kdpipe.pipeline.text import csv_cell, printable

TITLE = "\x1b]0;owned\x07\x1b[2J"
SHOWN_TITLE = r"\x1b]0;owned\x07\x1b[2J"


def test_a_name_is_neither_markup_nor_obeyed_by_the_terminal(capsys):
    terminal = Terminal()
    table = Table("a[/b]", TITLE, title="[link=http://evil]x[/link] :tree:")
    table.add_row(f"[red]{TITLE}", "\u202egpj.exe")
    terminal.show(table, wrap_tables=True)
    terminal.say(f"the class a[/b] of {TITLE} :tree:")
    with terminal.bar("[bold]Train/a[/b]", 2, "tiles") as advance:
        advance(2)
    complain(f"the run {TITLE} is done")
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & set(out + err)
    for text in (
        "a[/b]",
        "[link=http://evil]x[/link] :tree:",
        f"[red]{SHOWN_TITLE}",
        r"\u202egpj.exe",
        "[bold]Train/a[/b]: 2/2",
    ):
        assert text in out
    assert f"the class a[/b] of {SHOWN_TITLE} :tree:\n" in out
    assert err == f"kdpipe: the run {SHOWN_TITLE} is done\n"


def test_words_of_any_language_stay_as_they_are():
    text = "Süd, 森林, غابة, नदी, \N{DECIDUOUS TREE}, a\tb\nc, \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert printable(text) == text


@pytest.mark.parametrize("cell", ["=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)", "\t=1", "a\x1b[2J"])
def test_a_spreadsheet_takes_no_name_for_a_formula(cell):
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(cell), csv_cell(-2.5)])
    ((name, number),) = csv.reader(io.StringIO(file.getvalue()))
    assert name[0] not in "=+-@\t"
    assert "\x1b" not in name
    assert number == "-2.5"
