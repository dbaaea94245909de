"""The README's examples that are no blocks of code, and the command that CI runs. Its blocks are run in test_docs.py."""

from pathlib import Path

from kdpipe.configs import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_stretches_of_the_readme_are_accepted():
    for stretch in ("{range: [0, 3000]}", "{percentiles: [2, 98]}"):
        assert stretch in README
        load_config("demo", ["data.bands=[4, 3, 2]", f"data.stretch={stretch}"])


def test_ci_runs_the_readmes_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
