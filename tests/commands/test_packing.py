"""The commands pack and unpack, and the others on a pack."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import run_command

from kdpipe.configs import dump_config

PACK = "mine.zarr.zip"


@pytest.fixture
def packed(cached, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(cached))
    done = run_command("pack", cached.cache.path, PACK, "--json", "packed.json")
    assert done.returncode == 0, done.stderr
    assert f"6 tiles: {tmp_path / PACK} (" in " ".join(done.stdout.split())
    found = json.loads(Path("packed.json").read_text())
    assert found == {
        "files": [str(tmp_path / PACK)], "tiles": [6], "size_bytes": Path(PACK).stat().st_size, "kept_bytes": 0
    }  # fmt: skip
    return cached


def test_it_is_inspected_verified_and_found_complete(packed):
    assert "6, " in run_command("inspect", PACK).stdout
    with_pack = ["-c", "c.yaml", "--set", f"cache.path={PACK}"]
    assert "nothing to do: 6 tiles" in run_command("precompute-teacher", *with_pack).stdout
    assert "PASS (full): 6 tiles" in run_command("verify-cache", *with_pack).stdout


@pytest.mark.long
def test_a_student_is_trained_from_it_to_the_same_weights(packed, tmp_path):
    import torch

    found = []
    for path in (packed.cache.path, PACK):
        options = ["--set", f"cache.path={path}", "--set", f"name=run-{len(found)}", "--set", "train.workers=2"]
        done = run_command("train-student", "-c", "c.yaml", "--kd", "cached", *options)
        assert done.returncode == 0, done.stderr
        last = tmp_path / "model_weights" / "tests" / f"run-{len(found)}" / "last.ckpt"
        found.append(torch.load(last, weights_only=True)["state_dict"])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_it_is_not_written_to(packed):
    content = Path(PACK).read_bytes()
    with_pack = ["-c", "c.yaml", "--set", f"cache.path={PACK}"]
    done = run_command("precompute-teacher", *with_pack, "--repair")
    assert done.returncode == 2
    assert (
        f"is a pack, which is only read: make a folder of it with `kdpipe unpack {Path(PACK).absolute()} mine.zarr`"
        in done.stderr
    )
    assert Path(PACK).read_bytes() == content
    done = run_command("pack", packed.cache.path, PACK)
    assert (done.returncode, "add --overwrite" in done.stderr) == (2, True)


def test_damage_is_a_finding(packed):
    content = bytearray(Path(PACK).read_bytes())
    content[10] ^= 1  # the time of the first member, which no digest covers
    Path(PACK).write_bytes(content)
    done = run_command("verify-cache", "-c", "c.yaml", "--set", f"cache.path={PACK}", "--json", "report.json")
    findings = json.loads(Path("report.json").read_text())["findings"]
    assert (done.returncode, [each["code"] for each in findings]) == (1, ["damaged-tile", "damaged-pack"])


def test_parts_are_joined_to_the_cache(packed):
    done = run_command("pack", packed.cache.path, "parts.zarr.zip", "--size", "1MB")
    assert done.returncode == 0, done.stderr
    done = run_command("unpack", *sorted(map(str, Path().glob("parts-*.zarr.zip"))), "back.zarr", "--json", "u.json")
    assert done.returncode == 0, done.stderr
    assert f"6 tiles in {Path('back.zarr').absolute()}" in " ".join(done.stdout.split())
    assert json.loads(Path("u.json").read_text()) == {
        "cache": str(Path("back.zarr").absolute()), "tiles": 6, "kept": 0, "partial_of": None
    }  # fmt: skip
    for path in Path(packed.cache.path).rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (Path("back.zarr") / path.relative_to(packed.cache.path)).read_bytes()
    assert "6 tiles were there already" in run_command("unpack", PACK, "back.zarr").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pack", "none.zarr", "a.zarr.zip"], 3, "none.zarr does not exist"),
        (["pack", "none.zarr", "a.zip"], 2, "a pack is named NAME.zarr.zip"),
        (["pack", "c.zarr", "a.zarr.zip", "--size", "5"], 2, "expected a size of at least 1MB, such as 50GB"),
        (["unpack", "none.zarr.zip", "x.zarr"], 3, "there is no file"),
        (["unpack", "c.yaml", "x.zarr"], 2, "is no pack: give the NAME.zarr.zip"),
        (["unpack", "only.zarr.zip"], 2, "Missing argument"),
    ],
)
def test_mistakes_end_in_one_paragraph(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("mine")
    done = run_command(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with it ignored
from kdpipe.cache.packing import pack
put = pack._Writer.put
def slow(self, name, content):
    put(self, name, content)
    print(name, flush=True)
    time.sleep(0.5)
pack._Writer.put = slow
from kdpipe.pipeline.commands.main import main
sys.argv = ["kdpipe", *sys.argv[1:]]
main()
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_pack_goes_on(number, packed):
    command = [sys.executable, "-c", SLOW, "pack", packed.cache.path, "again.zarr.zip"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(5):
        process.stdout.readline()
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), error
    assert "Traceback" not in error
    assert not Path("again.zarr.zip").exists()
    time.sleep(0.1)
    done = run_command("pack", packed.cache.path, "again.zarr.zip")
    assert done.returncode == 0, done.stderr
    assert "an earlier run had written" in done.stdout
    assert Path("again.zarr.zip").read_bytes() == Path(PACK).read_bytes()
