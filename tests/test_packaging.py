"""What is shipped: a wheel with the packages and their YAML, that runs outside of the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from what git tracks, with the build tools that are installed."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_all_modules_all_yaml_and_what_pages_are_made_of_and_nothing_stray(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("kdpipe-")}
    expected = {
        f"kdpipe/{path.relative_to(ROOT)}"
        for package in ("configs", "data", "cache", "pipeline")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and (path.suffix in (".py", ".yaml", ".css", ".js") or path.name == "py.typed")
    }
    assert names == expected


def test_wheel_runs_outside_of_the_checkout(wheel, tmp_path):
    """Unpacked elsewhere and put before the editable install, with the dependencies that are there."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.argv = ['kdpipe', 'train-student', '-c', 'demo']\n"
        "import kdpipe.pipeline.cli as cli\n"
        f"assert cli.__file__.startswith({str(tmp_path)!r}), cli.__file__\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "demo_output/data/Train" in done.stderr


def test_the_console_script_and_the_module_are_one():
    script = Path(sys.executable).with_name("kdpipe")
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in ([str(script), "--version"], [sys.executable, "-m", "kdpipe.pipeline", "--version"])
    ]
    assert outputs[0].split()[-1] == outputs[1].split()[-1]


def test_layers_are_kept():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
