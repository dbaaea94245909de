"""What the operating system refuses ends in one paragraph that names the path, at once; what is the user's stays as it is."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.commands import arguments, run_command
from helpers.files import tree
from helpers.odd_files import LONG, ODD, fifo, loop

from kdpipe.cache import CacheError
from kdpipe.configs import dump_config
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.training.targets import open_fresh_cache

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(120)  # what waits for a FIFO waits for ever


def told(done, code=None):
    """Whether a command ended in one paragraph."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in ((1, 2, 3) if code is None else (code,)), (done.returncode, done.stderr, done.stdout)
    assert done.stderr.strip() or done.stdout.strip()
    return done.stderr


def outputs():
    """Every option of a command that names a file to write."""
    for name, command in cli.commands.items():
        for option in command.params:
            if getattr(option.callback, "__name__", "") == "_writable":
                yield name, option.opts[0]


@pytest.mark.parametrize(("command", "option"), list(outputs()), ids=lambda value: value)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(command, option, tmp_path, read_only):
    needed = ["-c", "demo"] if any(p.name == "source" and p.required for p in cli.commands[command].params) else ["x"]
    mine = tmp_path / "mine"
    mine.mkdir()
    for kind in ("a FIFO", "a link to itself", "a folder", "a socket"):
        ODD[kind](mine / kind)
    (mine / "file").write_text("my own")
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    (sealed / "old").write_text("my own")
    before = {path: (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in [*mine.iterdir(), sealed / "old"]}
    read_only(sealed)
    places = [mine / kind for kind in ("a FIFO", "a link to itself", "a folder", "a socket", LONG, "file/deep")]
    for place in [*places, sealed / "new", sealed / "old", sealed / "deep/new", "/proc/nothing"]:
        said = told(run_command(command, *needed, option, place, cwd=tmp_path), 2)
        assert "--" in said
    assert {
        path: (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in [*mine.iterdir(), sealed / "old"]
    } == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "sealed"]


@pytest.mark.parametrize("command", ["init x", "sample-data", "demo"])
def test_a_place_for_output_that_is_none_is_told(command, tmp_path, read_only):
    name, *rest = command.split()
    option = [] if name == "sample-data" else ["--out"]
    (tmp_path / "x/images").mkdir(parents=True)
    fifo(tmp_path / "fifo")
    loop(tmp_path / "loop")
    (tmp_path / "file").write_text("my own")
    (tmp_path / "sealed").mkdir()
    read_only(tmp_path / "sealed")
    for place in ("fifo", "loop", "file", "file/deep", LONG, "sealed/new"):
        if name == "init" and place == "file":
            continue  # it exists: --overwrite is asked for
        told(run_command(name, *rest, *option, place, cwd=tmp_path))
    assert (tmp_path / "file").read_text() == "my own"
    assert (tmp_path / "fifo").is_fifo()


def checkpoint_commands(path, folder):
    yield "inspect", path
    yield "evaluate", path
    yield "predict", path, folder, "--out", "maps"
    yield "export", path, "--format", "torchscript"
    yield "compare", path, path
    yield "report", path


@pytest.mark.parametrize("kind", [*ODD, "a name of 300 characters", "a file below a file"])
def test_an_input_that_is_no_file_is_refused_at_once(kind, make, tmp_path):
    config = make()
    path = tmp_path / "odd.pth"
    (tmp_path / "file").write_text("my own")
    if kind in ODD:
        ODD[kind](path)
    else:
        path = tmp_path / (LONG if "300" in kind else "file/odd.pth")
    told(run_command("verify-cache", "-c", path, cwd=tmp_path), 2)
    for given in checkpoint_commands(path, tmp_path):
        told(run_command(*given, cwd=tmp_path))
    told(run_command("predict", tmp_path / "file", path, "--out", "maps", cwd=tmp_path))
    for key in ("teacher.checkpoint", "student.checkpoint", "cache.path"):
        for command in ("precompute-teacher", "train-student"):
            if key == "cache.path" and kind == "a folder":
                continue
            if key == "student.checkpoint" and command == "precompute-teacher":
                continue
            set_ = [*arguments(config, command, "--set", f"{key}={path}", folder=tmp_path)]
            told(run_command(*set_, cwd=tmp_path))
    assert (tmp_path / "file").read_text() == "my own"
    assert not (tmp_path / "cache.zarr").exists()


@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("kind", ODD)
def test_an_image_or_a_mask_that_is_no_file_is_named(kind, part, make, tmp_path):
    config = make()
    tiles = tmp_path / "data/Mine"
    (tiles / "masks").mkdir()
    odd = tiles / part / ("t1.tif" if part == "images" else "t1.png")
    odd.unlink(missing_ok=True)
    ODD[kind](odd)
    if kind == "a folder":
        return  # passed over, like any folder
    for command in ("precompute-teacher", "train-student", "verify-cache"):
        said = run_command(*arguments(config, command, folder=tmp_path), cwd=tmp_path)
        told(said)
        assert command == "verify-cache" or "t1." in said.stderr, said.stderr
    assert odd.is_symlink() or not odd.is_file()


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["manifest.json", "zarr.json", "tiles/Mine/t1/zarr.json", "tiles/Mine/t1/0.0.0"])
def test_what_is_no_file_in_a_cache_is_found_and_mended(kind, name, finished, tmp_path):
    config = finished()
    before = tree(tmp_path / "cache.zarr")
    odd = tmp_path / "cache.zarr" / name
    odd.unlink()
    ODD[kind](odd)
    for level in ("quick", "full"):
        assert told(run_command(*arguments(config, "verify-cache", "--level", level, folder=tmp_path))) is not None
    if name != "zarr.json":  # which training does not read
        with pytest.raises(CacheError, match=re.escape(name.rpartition("/")[0] or name)):
            open_fresh_cache(config, list_tiles(config.data, "train"), None).read("Mine/t1")
    done = run_command(*arguments(config, "precompute-teacher", "--repair", folder=tmp_path))
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "cache.zarr") == before


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("suffix", [".lock", ".workers", ".costs.json", ".images"])
def test_what_is_no_file_beside_a_cache_is_left_alone(kind, suffix, make, tmp_path):
    odd = tmp_path / f"cache.zarr{suffix}"
    ODD[kind](odd)
    before = odd.lstat().st_mode, odd.lstat().st_mtime_ns
    done = run_command(*arguments(make(), "precompute-teacher", folder=tmp_path))
    if suffix in (".costs.json", ".images"):
        assert done.returncode == 0, done.stderr
    else:
        assert "is not kdpipe's" in told(done, 2)
    assert (odd.lstat().st_mode, odd.lstat().st_mtime_ns) == before


@pytest.mark.parametrize("place", ["/", "~", "a file", "below a file", LONG])
@pytest.mark.parametrize("options", [[], ["--repair"]], ids=["", "repair"])
def test_a_path_where_no_cache_can_be_is_refused(make, tmp_path, monkeypatch, place, options):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis").write_text("my own")
    monkeypatch.setenv("HOME", str(home))
    config = make(
        cache__path=str({"a file": home / "thesis", "below a file": home / "thesis/c.zarr"}.get(place, place))
    )
    before = tree(tmp_path)
    said = told(run_command(*arguments(config, "precompute-teacher", *options, folder=tmp_path)), 2)
    assert "cache.path: " in said
    (tmp_path / "config.yaml").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--repair"]], ids=["", "repair"])
def test_a_folder_of_other_things_is_no_cache_and_stays(make, tmp_path, options):
    (tmp_path / "cache.zarr/photos").mkdir(parents=True)
    (tmp_path / "cache.zarr/photos/1.jpg").write_text("x")
    (tmp_path / "cache.zarr/notes.txt").write_text("my own")
    before = tree(tmp_path / "cache.zarr")
    assert "holds files, but no zarr.json" in told(
        run_command(*arguments(make(), "precompute-teacher", *options, folder=tmp_path)), 3
    )
    assert tree(tmp_path / "cache.zarr") == before


def test_output_that_nobody_reads_any_more_ends_quietly(make, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(make()))
    done = subprocess.run(
        ["bash", "-c", "set -o pipefail; kdpipe precompute-teacher --help | head -c 1"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PATH": f"{Path(shutil.which('python') or '').parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
