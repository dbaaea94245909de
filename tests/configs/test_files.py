"""A file is whole or absent: it is synced before it is renamed, and its folder afterwards."""

import os
from pathlib import Path

import pytest

from kdpipe.configs.files import partial_path, publish, write_atomically


@pytest.fixture
def operations(monkeypatch):
    """What is synced and renamed, in order: `sync NAME`, `rename NAME NAME`."""
    seen, replace = [], Path.replace

    def fsync(descriptor):
        seen.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")

    def renamed(path, target):
        seen.append(f"rename {path.name} {Path(target).name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    return seen


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, operations):
    with write_atomically(tmp_path / "a") as file:
        file.write(b"new")
        assert not (tmp_path / "a").exists()
    durable = ["sync .a.partial", "rename .a.partial a", f"sync {tmp_path.name}"]
    assert operations == durable
    assert (tmp_path / "a").read_bytes() == b"new"
    operations.clear()
    partial_path(tmp_path / "a").write_bytes(b"newer")
    publish(partial_path(tmp_path / "a"), tmp_path / "a")
    assert operations == durable
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"newer")]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, operations, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), write_atomically(tmp_path / "a") as file:
        file.write(b"half of the ne")
        raise error
    assert operations == []
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
