"""
The blocks of every page of the docs: commands and Python run, configurations load, the output shown is the program's.

A block that is not run has a comment above it that says why: `<!-- not run: needs S3 -->`. Its commands must still parse.
"""

import io
import json
import re
import shlex
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import click
import numpy as np
import pytest
from helpers import docs_world
from helpers.docs_pages import COMMANDS, PAGES, ROOT, blocks, inline_code, page_text, with_snippet

from kdpipe.cache import SoftTargetCache
from kdpipe.configs import load_config

pytestmark = pytest.mark.long

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
DUBAI = load_config("dubai/linknet_kd")
NAMES = {*DUBAI.classes.names, *DUBAI.teacher_classes}
WRITTEN = {"docs/report.md": ["report.html", "both.html", "cache.html", "parity.html", "comparison/comparison.html"]}
LANGUAGES = {"sh", "bash", "python", "yaml", "json", "text", "math"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return docs_world.build(tmp_path_factory.mktemp("world"), monkeypatch)


def given(page):
    """The names that a page's Python finds: those of a tile's stored values on the format's page."""
    if page != "cache/FORMAT.md":
        return {}
    import zarr

    golden = ROOT / "tests/golden/cache-4.0/8-bits.zarr"
    cache = SoftTargetCache.open(str(golden))
    tile = cache.tile_ids[0]
    value = zarr.open_group(golden, mode="r")[f"tiles/{tile}"][:]
    return {"np": np, "value": value, "R": 255, "N": cache.manifest.recipe.levels, "expected": cache.read(tile)}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # the tutorial's scenes have no place
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")  # Lightning's
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in {"sh", "bash", "python"} for b in blocks(page))]
)
def test_commands_and_python_of_a_page_run(page, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(docs_world.copy_of(world, tmp_path, page))
    names = given(page)
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, block.place, "exec")
            if not block.reason:
                with redirect_stdout(io.StringIO()) as printed:
                    exec(code, names)
                if block.output is not None:
                    assert printed.getvalue() == block.output, block.place
        elif block.language in {"sh", "bash"}:
            said = "".join(run_command(words, block, monkeypatch, capsys) for words in block.commands())
            if block.output is not None and not block.reason:
                strangers = words_of(block.output) - words_of(said)
                assert not strangers, f"{block.place} shows {strangers}, and the program said\n{said}"
    if page == "cache/FORMAT.md":
        np.testing.assert_allclose(names["p"], names["expected"], rtol=1e-6)
    for written in WRITTEN.get(page, ()):
        assert Path(written).stat().st_size > 10_000, written
    if page == "docs/report.md":
        assert "|Δp|" in Path("parity.html").read_text()
        assert Path("report.json").is_file()


def run_command(words, block, monkeypatch, capsys):
    """What a line printed; a line that cannot be run is checked as far as possible."""
    program, *arguments = words
    if program.endswith("kdpipe"):
        parse(arguments)
        if block.reason or "--help" in arguments:
            return ""
        code = docs_world.run(monkeypatch, arguments)
        out, err = capsys.readouterr()
        assert code == 0, f"{block.place}: kdpipe {shlex.join(arguments)} ended with {code}: {err}\n{out}"
        return out
    if program.endswith("pip"):
        for extra in re.findall(r"\[([\w,]+)\]", shlex.join(arguments)):
            assert set(extra.split(",")) <= set(EXTRAS), block.place
    elif program == "make":
        assert set(arguments) <= set(TARGETS), block.place
    else:
        assert block.reason, f"{block.place}: {shlex.join(words)} is not run, and nothing above the block says why"
    return ""


def parse(arguments):
    """Raise `click.UsageError` if `kdpipe ARGUMENTS` would refuse to read them."""
    if arguments == ["--help"]:
        return
    command = COMMANDS[arguments[0]]
    with click.Context(command, resilient_parsing="--help" in arguments) as context:
        command.parse_args(context, arguments[1:])


def words_of(text):
    """The words of an output that do not depend on the data: no numbers, paths and names of classes."""
    return set(re.findall(r"(?<![\w/.-])[a-zA-Z]{4,}(?![\w/])", re.sub(r"\S*/\S*", " ", text))) - NAMES


@pytest.mark.parametrize("page", PAGES)
def test_languages_of_fences_are_known(page):
    for block in blocks(page):
        assert block.language in LANGUAGES or block.language.startswith("{"), block.place


@pytest.mark.parametrize(
    "block", [b for p in PAGES for b in blocks(p) if b.language == "yaml" and not b.reason], ids=lambda b: b.place
)
def test_configurations_are_accepted(block):
    with_snippet(block.text)


@pytest.mark.parametrize("block", [b for p in PAGES for b in blocks(p) if b.language == "json"], ids=lambda b: b.place)
def test_json_is_json(block):
    json.loads(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_commands_options_and_files_named_in_prose_exist(page):
    for code in inline_code(page):
        words = code.replace("…", "").split()
        if words[:1] == ["make"] and len(words) == 2:
            assert words[1] in TARGETS, code
        if words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), code
        if words[:1] != ["kdpipe"] or len(words) == 1 or not re.fullmatch(r"[a-z][a-z-]+", words[1]):
            continue
        command = COMMANDS[words[1]]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if re.fullmatch(r"--[a-z-]+", word)} <= options, code


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_repository_named_on_a_page_exist(page):
    for path in re.findall(r"\b(?:tests|pipeline|cache|configs)/[\w/]+\.(?:py|md|yaml)\b", page_text(page)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page_text(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            name = str(target.resolve().relative_to(ROOT))
            headings = re.findall(r"^#+ (.+)$", page_text(name), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_reasons_are_given_only_where_they_are_needed():
    reasons = {block.reason for page in PAGES for block in blocks(page) if block.reason}
    assert all(len(reason) > 5 for reason in reasons)
    assert "not run:" not in re.sub(
        r"<!-- not run: .+? -->\n```", "", "".join(page_text(page) for page in PAGES if page != "docs/release.md")
    )


def test_the_tutorial_shows_the_real_teacher(dubai, monkeypatch, capsys):
    """Compared whole, because this file does not change; other outputs depend on the machine, and only their words are compared."""
    block = next(block for block in blocks("docs/tutorial.md") if "kdpipe inspect" in block.text)
    monkeypatch.chdir(ROOT)
    said = run_command(block.commands()[0], block, monkeypatch, capsys)
    assert said.split() == block.output.split()
