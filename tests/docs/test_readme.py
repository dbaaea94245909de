"""The README's length and the command that CI runs. Its blocks are run in test_docs.py."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len(README.split()) <= 780
    assert max(map(len, README.splitlines())) <= 120


def test_ci_runs_the_readmes_test_command():
    assert "`make test` and `make test-long`" in README
    assert "\nmake test\nmake test-long\n" in (ROOT / ".ci" / "run").read_text()
