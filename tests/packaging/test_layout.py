"""The shape of the tree: short files, small rooms, and docstrings that begin with their subject."""

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES, MOST_FILES = 400, 12
RIDDLES = ("Of ", "As ", "That ")


def python_files():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    return [ROOT / name for name in names if name and (ROOT / name).exists()] or [
        path
        for room in ("configs", "data", "cache", "pipeline", "tests", "docs")
        for path in (ROOT / room).rglob("*.py")
    ]


def test_no_file_has_more_than_400_lines():
    assert {path: n for path in python_files() if (n := len(path.read_text().splitlines())) > MOST_LINES} == {}


def test_no_room_of_the_package_has_more_than_12_modules():
    rooms = Counter(
        path.parent.relative_to(ROOT)
        for path in python_files()
        if path.name != "__init__.py" and path.relative_to(ROOT).parts[0] in ("configs", "data", "cache", "pipeline")
    )
    assert {room: count for room, count in rooms.items() if count > MOST_FILES} == {}


@pytest.mark.long
def test_no_docstring_begins_with_a_riddle():
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if docstring.startswith(RIDDLES):
                    found.append(f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}")
    assert found == []
