"""The project's pages as blocks that can be run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import click
import yaml

from kdpipe.configs import Config, load_config, parse_config
from kdpipe.pipeline.commands.main import cli

ROOT = Path(__file__).resolve().parents[2]
FRAME = re.compile(r"\[[^\]]+\]\(([^)\s]+\.md)\)\n")  # a page that is a link alone shows another file on the site
PAGES = ["README.md", "CHANGELOG.md", "cache/FORMAT.md"] + sorted(
    f"docs/{path.name}"
    for path in (ROOT / "docs").glob("*.md")
    if not FRAME.fullmatch(path.read_text(encoding="utf-8"))
)
FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n)?^(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
COMMANDS = {name: cli.get_command(click.Context(cli), name) for name in cli.list_commands(click.Context(cli))}


@dataclass(frozen=True)
class Block:
    """A fenced block, with the reason why it is not run, and the text block right below it: the output that the page shows."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None
    output: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The lines of a shell block, each split into words, without comments; continued lines are joined."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def page_text(page: str) -> str:
    """The source of a page, or of the file that it includes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    included = FRAME.fullmatch(text)
    return (ROOT / page).parent.joinpath(included[1]).read_text(encoding="utf-8") if included else text


def blocks(page: str) -> list[Block]:
    text = page_text(page)
    found = list(FENCE.finditer(text))
    result = []
    for i, match in enumerate(found):
        below = found[i + 1] if i + 1 < len(found) else None
        adjacent = below and below["language"] == "text" and not text[match.end() : below.start()].strip()
        line = text.count("\n", 0, match.start("text")) + 1
        output = below["text"] if adjacent else None
        result.append(Block(page, line, match["language"], dedent(match["text"]), match["reason"], output))
    return result


def inline_code(page: str) -> list[str]:
    """Text in single backticks, outside of fences."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page_text(page)))


def with_snippet(snippet: str) -> Config:
    """The guide's configuration with the keys of a YAML snippet."""
    given = yaml.safe_load(snippet)
    raw = load_config("biodiversity/ftunetformer_kd").model_dump(mode="json")
    named = {"model", "pretrained", "file", "predictions", "given"} & (given.get("teacher") or {}).keys()
    if named:  # in place of the guide's network
        raw["teacher"] = {key: raw["teacher"][key] for key in ("classes", "normalize")}
    if "pretrained" in named:
        del raw["teacher"]["normalize"]
    if {"model", "pretrained"} & (given.get("student") or {}).keys():
        del raw["student"]
    for key, value in given.items():
        merge = isinstance(value, dict) and isinstance(raw.get(key), dict) and key != "class_map"
        raw[key] = {**raw[key], **value} if merge else value
    if "teachers" in given:
        raw["teacher"] = None
    return parse_config(raw, "the snippet")
