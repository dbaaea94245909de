"""What is shipped: an sdist of what git tracks, and a wheel made from it that is installed and runs outside of the checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
GENERATED = {"PKG-INFO", "setup.cfg", "kdpipe.egg-info"}


def done(*command, **options):
    """What a command printed; it must succeed. Paths that the tests are run with do not reach it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, env=env, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tracked():
    names = done("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with an sdist built from what git tracks, and a wheel built from the sdist, by the build tools that are installed."""
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel in it; its dependencies are those of this one, and nothing is downloaded."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    done(sys.executable, "-m", "venv", "--without-pip", home)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
    done(*pip, "install", "--no-deps", "--no-index", "--quiet", next(built.glob("*.whl")))
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # A folder named by a .pth comes after the environment's own, and .pth files in it (an editable install's) are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def test_sdist_holds_what_git_tracks_and_nothing_stray(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    stray = {name for name in names - tracked() if name.split("/")[0] not in GENERATED}
    assert (stray, tracked() - names) == (set(), set())
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "cache/FORMAT.md", "docs/teachers.md"} <= names


def test_wheel_holds_all_modules_all_yaml_and_what_pages_are_made_of_and_nothing_stray(built):
    archive = zipfile.ZipFile(next(built.glob("*.whl")))
    names = {name for name in archive.namelist() if not name.startswith("kdpipe-")}
    expected = {
        f"kdpipe/{path.relative_to(ROOT)}"
        for package in ("configs", "data", "cache", "pipeline")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and (path.suffix in (".py", ".yaml", ".css", ".js") or path.name == "py.typed")
    }
    assert names == expected
    assert f"kdpipe-{VERSION}.dist-info/licenses/LICENSE" in archive.namelist()


def test_installed_wheel_runs_outside_of_the_checkout(installed, tmp_path):
    assert done(installed / "kdpipe", "--version", cwd=tmp_path).split()[-1] == VERSION
    assert "precompute-teacher" in done(installed / "kdpipe", "--help", cwd=tmp_path)
    code = f"""
import kdpipe.cache, kdpipe.configs
assert {str(installed.parent)!r} in kdpipe.cache.__file__, kdpipe.cache.__file__
for name in kdpipe.configs.shipped_configs():
    kdpipe.configs.load_config(name)
config = kdpipe.configs.load_config("dubai/linknet_kd")
cache = kdpipe.cache.SoftTargetCache.open({str(ROOT / "tests/golden/cache-4.0/8-bits.zarr")!r})
print(config.name, cache.read(cache.tile_ids[1]).shape)
"""
    assert done(installed / "python", "-c", code, cwd=tmp_path) == "dubai-linknet-kd (3, 70, 41)\n"


def test_installed_command_says_what_is_missing(installed, tmp_path):
    command = [str(installed / "kdpipe"), "train-student", "-c", "demo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "demo_output/data/Train" in result.stderr


def test_changelog_and_citation_are_of_this_version():
    heading = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (heading[1], heading[2]) == (citation["version"], citation["date-released"])
    assert citation["version"] == VERSION


def test_citation_has_what_version_1_2_0_of_its_format_asks_for():
    """Its required keys, and of the others only those that it knows (schema-guide.md of citation-file-format 1.2.0)."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    required, known = (
        {"authors", "cff-version", "message", "title"},
        {"abstract", "date-released", "keywords", "license", "type", "version"},
    )
    assert required <= set(citation) <= required | known
    assert citation["authors"] == [{"name": "The kdpipe authors"}]
    assert citation["type"] in ("software", "dataset")
    assert all(isinstance(citation[key], str) for key in set(citation) - {"authors", "keywords"})


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
