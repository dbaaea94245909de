"""`kdpipe inspect CACHE` shows how a cache was made, and --diff where a configuration differs."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.commands import run_command

from kdpipe.configs import dump_config
from kdpipe.pipeline import versions
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.inspection.cache import inspect_cache


@pytest.fixture
def cached(cached, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(cached))
    return cached


def inspected(*arguments):
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)


def test_the_manifest_is_printed_and_written_whole(cached, tmp_path):
    result = inspected(cached.cache.path, "--json", tmp_path / "c.json")
    assert result.exit_code == 0
    manifest = json.loads(Path(cached.cache.path, "manifest.json").read_text())
    for shown in (manifest["fingerprint"], "6, ", "soft, 8 bits, T 2, |Δp| at most 0.0039", "unet, mobilenet_v2, 8 channels",
                  "Grassland 0.7, SemiNatural 0.3", f"torch {manifest['libraries']['torch']}"):  # fmt: skip
        assert shown in result.output
    content = json.loads((tmp_path / "c.json").read_text())
    del manifest["checksum"]
    assert content["manifest"] == manifest
    assert content["size_bytes"] == sum(p.stat().st_size for p in Path(cached.cache.path).rglob("0.0.0"))
    assert content["differences"] is None


def test_a_configuration_that_describes_the_cache_has_no_difference(cached, tmp_path):
    result = inspected(cached.cache.path, "--diff", tmp_path / "config.yaml")
    assert result.exit_code == 0
    assert "the configuration describes this cache" in result.output


def test_each_difference_is_named_and_the_exit_code_is_1(cached, tmp_path, landscape):
    result = inspected(
        cached.cache.path, "--diff", tmp_path / "config.yaml", "--set", "distill.temperature=3", "--set",
        "teacher.tta=d4", "--set", f"data.unlabelled=[{landscape / 'Unlabelled'}]",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "temperature: the cache has 2.0, the configuration says 3.0" in result.output
    assert 'teacher.tta: the cache has "none", the configuration says "d4"' in result.output
    assert result.output.count("is in the data, but its tile is not in the cache") == 2


def test_another_version_of_a_library_is_a_note_and_no_difference(cached, monkeypatch):
    now = versions.library_versions()
    monkeypatch.setattr(versions, "library_versions", lambda: {**now, "timm": "99.0"})
    found = inspect_cache(cached.cache.path, cached)
    assert found.differences == []
    assert found.other_libraries == {"timm": (now["timm"], "99.0")}
    assert f"computed with timm {now['timm']}, installed is 99.0" in inspected(cached.cache.path).output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere://x/c.zarr"], 2, "nowhere"),
        (["empty"], 3, "does not exist"),
        (["teacher.pth", "--diff", "demo"], 2, "--diff compares a cache with CONFIG"),
    ],
)
def test_something_else_than_a_cache_is_refused(tmp_path, arguments, code, message):
    (tmp_path / "empty").mkdir()
    done = run_command("inspect", *arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr
