"""URLs at which no cache can be are refused, and no password or key in one reaches an output."""

import json
import os

import pytest
from helpers.commands import arguments, run_command

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs import dump_config
from kdpipe.configs.errors import CacheUnreachable, ConfigError
from kdpipe.configs.urls import hide_secrets, refuse_address
from kdpipe.pipeline.commands.console import write_json
from kdpipe.pipeline.text import printable

NO_PLACE = ["s3://", "s3:///", "memory://", "gs://", "file://", "local://", "sftp:///"]
NO_URL = ["://", "://bucket/x", "simplecache::s3://bucket/x", "blockcache::file:///x", "1s3://bucket/x"]
NO_STORE = [
    "http://host/x.zarr",
    "https://host/x.zarr",
    "ftp://host/x",
    "FTP://host/x",
    "zip://x.zip",
    "github://a:b@c/x",
    "data://x",
]
LOST_SLASH = ["s3:/bucket/x", "gs:/bucket/x", "file:/data/x"]
MACHINES = ["file://server/x", "local://x"]
GOOD = [
    "s3://bucket/c.zarr",
    "gs://bucket/a:b/c.zarr",
    "sftp://me@host/c.zarr",
    "file:///data/c.zarr",
    "caches/mine.zarr",
    "/a:/b",
    "~/c.zarr",
]
SECRETS = [
    "s3://KEY:hunter2@bucket/c.zarr",
    "s3://KEY:hun/ter2@bucket/c.zarr",
    "sftp://me:hunter2@host/c.zarr",
    "sftp://me:p@hunter2@host:22/c.zarr",
    "http://me:hunter2@host/c.zarr",
    "ftp://me:hunter2@host/c.zarr",
    "file:///data/c.zarr?key=hunter2",
    "gs://bucket/c.zarr?X-Goog-Signature=hunter2",
    "https://bucket.s3.amazonaws.com/c.zarr?X-Amz-Credential=hunter2&X-Amz-Signature=hunter2",
    "az://box/c.zarr?sv=2024&sig=hunter2%2B",
    "simplecache::s3://KEY:hunter2@bucket/x",
]


@pytest.mark.parametrize("url", [*NO_PLACE, *NO_URL, *NO_STORE, *LOST_SLASH, *MACHINES, "", " "])
def test_an_address_where_no_cache_can_be_is_refused_and_no_folder_is_made_of_it(url, make_config, tmp_path):
    with pytest.raises(ConfigError, match="cache.path"):
        make_config(cache__path=url)
    for opened in (open_storage, SoftTargetCache.open):
        with pytest.raises(ConfigError, match="cache.path"):
            opened(url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", GOOD)
def test_an_address_where_a_cache_can_be_is_taken(url):
    refuse_address(url)


def test_an_empty_variable_is_named_as_the_cause():
    with pytest.raises(
        ConfigError, match=r"s3:// names no place: is a variable in it empty\? Expected such as s3://bucket/caches"
    ):
        open_storage("s3://")


@pytest.mark.parametrize("url", SECRETS)
def test_a_password_in_the_address_of_a_cache_is_refused_and_shown_nowhere(url, make_config, tmp_path):
    args = arguments(
        make_config(),
        "precompute-teacher",
        "--set",
        f"cache.path={url}",
        "--json",
        tmp_path / "x.json",
        folder=tmp_path,
    )
    for options in ([], ["--debug"]):
        done = run_command(*args, *options)
        assert done.returncode == 2
        assert "hunter2" not in done.stderr + done.stdout
        assert "…" in done.stderr
    done = run_command("inspect", url)
    assert done.returncode in (2, 3)
    assert "hunter2" not in done.stderr + done.stdout
    assert not any("hunter2" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_secrets_are_left_out_of_terminal_and_json(tmp_path):
    scene = "https://me:hunter2@host/scene.tif?X-Amz-Signature=hunter2&X-Amz-Date=1"
    write_json(str(tmp_path / "x.json"), {"failed": {scene: f"cannot open {scene} (HTTP 403)"}})
    shown = "https://…@host/scene.tif?X-Amz-Signature=…&X-Amz-Date=…"
    assert json.loads((tmp_path / "x.json").read_text()) == {"failed": {shown: f"cannot open {shown} (HTTP 403)"}}
    assert printable(f"cannot open {scene}") == f"cannot open {shown}"
    assert hide_secrets("no URL: a@b:c, s3://bucket/x, 12:30") == "no URL: a@b:c, s3://bucket/x, 12:30"


def test_a_scene_with_a_signature_that_cannot_be_opened_is_told_without_it(tmp_path):
    """`predict` takes such URLs; here nobody answers."""
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    url = "https://127.0.0.1:9/scene.tif?X-Amz-Signature=hunter2"
    done = run_command("predict", tmp_path / "x.ckpt", url, "--out", tmp_path / "maps", "--json", tmp_path / "x.json")
    assert done.returncode != 0
    assert "hunter2" not in done.stderr + done.stdout


def test_a_cache_in_memory_is_refused_by_commands(make_config, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(make_config(cache__path="memory://bucket/x")))
    done = run_command("precompute-teacher", "-c", tmp_path / "c.yaml")
    assert done.returncode == 2
    assert "ends with the process that writes it" in done.stderr


def test_a_file_system_that_does_not_answer_when_it_is_opened_is_named(monkeypatch):
    def refused(url, **options):
        raise ConnectionRefusedError(111, os.strerror(111))

    monkeypatch.setattr("fsspec.core.url_to_fs", refused)
    with pytest.raises(
        CacheUnreachable, match=r"opening sftp://me@host/c\.zarr: there is no connection .*Connection refused"
    ):
        open_storage("sftp://me@host/c.zarr")
