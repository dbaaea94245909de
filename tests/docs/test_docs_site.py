"""`make docs`: its tables are current, and the site is built strictly, completely, and readable without a network."""

import importlib
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from helpers.docs_pages import COMMANDS, ROOT

from kdpipe import cache as cache_package
from kdpipe.configs.schema import Config, Section

pytestmark = pytest.mark.long

PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


class Tags(HTMLParser):
    """The tags of a page, each with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", out / "doctrees"]
    done = subprocess.run([*command, ROOT / "docs", out / "html"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def tags(site):
    return {page: Tags((site / f"{page}.html").read_text()).found for page in PAGES}


def text_of(site, page):
    return unescape(re.sub(r"<[^>]+>", "", (site / f"{page}.html").read_text()))


def test_make_docs_is_as_strict():
    makefile = (ROOT / "Makefile").read_text()
    assert "docs/generate.py" in makefile
    assert "-m sphinx -W --keep-going" in makefile


@pytest.mark.parametrize("page", ["api.md", "commands.md", "configuration.md", "teachers.md"])
def test_generated_tables_of_a_page_are_current(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    generate = importlib.import_module("generate")
    assert page in generate.PAGES
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == generate.current(page), f"docs/{page} is out of date: run `make docs`, and commit the page"


def test_every_page_is_in_the_navigation(tags):
    links = {attrs.get("href") for tag, attrs in tags["index"] if tag == "a"}
    assert {f"{page}.html" for page in PAGES} - {"index.html"} <= links


@pytest.mark.parametrize("page", PAGES)
def test_a_page_asks_the_network_for_nothing(tags, page):
    for tag, attrs in tags[page]:
        loaded = attrs.get("src") or (attrs.get("href") if tag == "link" else None)
        assert loaded is None or not re.match(r"(\w+:)?//", loaded), (tag, attrs)


def test_styles_and_scripts_ask_the_network_for_nothing(site):
    for file in [*site.rglob("*.css"), *site.rglob("*.js")]:
        assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]https?:|fetch\(['\"]https?:", file.read_text()), (
            file
        )


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_built_page_lead_somewhere(site, tags, page):
    """Also those that Sphinx does not check: anchors that a page gives itself, and files outside of the docs."""
    for tag, attrs in tags[page]:
        link = attrs.get("href", "") if tag == "a" else attrs.get("src", "") if tag == "img" else ""
        if not link or re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = site / unquote(path.split("?")[0]) if path else site / f"{page}.html"
        assert target.is_file(), link
        if anchor and target.stem in PAGES and target.suffix == ".html":
            assert unquote(anchor) in {a.get("id") for _, a in tags[target.stem]}, link


def test_formulas_are_mathml(site):
    page = (site / "maths.html").read_text()
    formulas = len(re.findall(r"^```math$", (ROOT / "docs/maths.md").read_text(), flags=re.MULTILINE))
    assert formulas >= 7
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == formulas


def test_every_key_and_its_sentence_are_on_the_page(site):
    page = re.sub(r"\s+", " ", text_of(site, "configuration"))
    keys = [
        (key, field) for section in [Config, *Section.__subclasses__()] for key, field in section.model_fields.items()
    ]
    assert len(keys) > 60
    for key, field in keys:
        assert f" {key} " in page, key
        plain = re.sub(r"[`'\"\\-]", "", field.description)
        assert plain in re.sub(r"[`’‘“”'\"\\–-]", "", page), field.description


def test_every_command_and_option_is_on_the_page(site):
    page = text_of(site, "commands")
    for name, command in COMMANDS.items():
        assert f"kdpipe {name} [OPTIONS]" in page
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("--")), (name, parameter.opts)


def test_every_public_name_of_the_cache_is_explained(site, tags):
    ids = {attrs.get("id") for _, attrs in tags["api"]}
    for name in cache_package.__all__:
        qualified = next((i for i in ids if i and i.endswith(f".{name}")), None)
        assert qualified, name
        first_line = getattr(cache_package, name).__doc__.strip().splitlines()[0]
        assert re.sub(r"\W", "", first_line)[:40] in re.sub(r"\W", "", text_of(site, "api")), name


def test_the_format_is_the_caches_own_page(site):
    assert "The cache on disk, formats" in text_of(site, "format")
    assert "entropy_error" in text_of(site, "format")
