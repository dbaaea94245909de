"""
A disk on which every file operation can be the last one, or fail, and which knows what is left after a power cut.

Below `root`, each operation of Python's `open`, `write`, `fsync`, `replace`, `unlink`, `mkdir`, `rmdir`, `scandir` and `listdir`
is counted. What is durable is modelled apart from the real disk, as the least that POSIX promises: a file's bytes once it was
synced, and a name in a folder (new, renamed or deleted) once the folder was. A rename is atomic.
"""

import contextlib
import errno
import io
import os
import re
import threading
from pathlib import Path

ALLOCATING = {"open for writing", "write", "sync", "mkdir"}


class Killed(BaseException):
    """Raised in a thread whose process is killed."""


class File:
    def __init__(self, content=b"", written_ns=None):
        self.content = self.durable = content
        self.written_ns = written_ns  # kept, as an image may be newer than its tile

    def sync(self):
        self.durable = self.content


class Folder:
    def __init__(self):
        self.entries, self.durable = {}, {}

    def sync(self):
        self.durable = dict(self.entries)


class Disk:
    """`kill_at`: the number of the operation before which the process dies; `fail_at`: that of the one that raises `failure`."""

    def __init__(self, root, *, kill_at=None, torn=False, fail_at=None, failure=None, lasting=False):
        self.root = Path(root)
        self.kill_at, self.torn = kill_at, torn
        self.fail_at, self.failure, self.lasting = fail_at, failure, lasting
        self.operations = []
        self._lock = threading.RLock()
        self._nodes = {}  # by file descriptor
        self._opened = []
        self._top = Folder()
        for path in sorted(self.root.rglob("*")):
            self._parent(path).entries[path.name] = (
                Folder() if path.is_dir() else File(path.read_bytes(), path.stat().st_mtime_ns)
            )
        self._sync_all(self._top)

    def _sync_all(self, node):
        node.sync()
        for child in getattr(node, "entries", {}).values():
            self._sync_all(child)

    @contextlib.contextmanager
    def installed(self, monkeypatch):
        """Count operations in the block; at its end the process is over, and its files are closed."""
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", self._hook("open", io.open))
            for name in ("open", "fsync", "replace", "unlink", "mkdir", "rmdir", "scandir", "listdir"):
                patch.setattr(os, name, self._hook(f"os.{name}", getattr(os, name)))
            try:
                yield self
            finally:
                for file in self._opened:
                    with contextlib.suppress(Exception):
                        file.close()

    def after_power_loss(self, folder, rng=None):
        """Write what is left into `folder`: the least, or with `rng` at random some of what the disk may have kept beyond that."""
        self._lay_out(self._top, Path(folder), rng)

    def _lay_out(self, node, path, rng):
        if isinstance(node, File):
            path.write_bytes(node.content if rng and rng.random() < 0.5 else node.durable)
            if node.written_ns is not None:
                os.utime(path, ns=(node.written_ns, node.written_ns))
            return
        path.mkdir()
        for name in sorted({**node.entries, **node.durable}):
            before, now = node.durable.get(name), node.entries.get(name)
            kept = now if rng and rng.random() < 0.5 else before
            if kept is not None:
                self._lay_out(kept, path / name, rng)

    def _step(self, what, path):
        """Count an operation, and raise if it is killed or fails; returns whether only half of it is done before a kill."""
        number = len(self.operations)
        if self.kill_at is not None and number >= self.kill_at:
            if number == self.kill_at and self.torn and what == "write":
                self.operations.append((what, path))
                return True
            raise Killed
        self.operations.append((what, path))
        due = self.fail_at is not None and (number == self.fail_at or (self.lasting and number > self.fail_at))
        if due and (not self.lasting or (what in ALLOCATING and ".zarr/" in f"{path}/")):
            raise self.failure
        return False

    def _inside(self, path):
        return isinstance(path, (str, Path)) and Path(path).is_relative_to(self.root)

    def _find(self, path):
        node = self._top
        for part in Path(path).relative_to(self.root).parts:
            node = node.entries[part]
        return node

    def _parent(self, path):
        return self._find(Path(path).parent)

    def _hook(self, name, real):
        def run(path, *args, **kwargs):
            with self._lock:
                folder = self._nodes.get(kwargs.get("dir_fd"))
                known = self._inside(path) or folder is not None or (name == "os.fsync" and path in self._nodes)
                if not known:
                    return real(path, *args, **kwargs)
                if name == "open":
                    return self._open(real, path, *args, **kwargs)
                self._step("sync" if name == "os.fsync" else name.removeprefix("os."), path)
                done = real(path, *args, **kwargs)
                parent = folder or (self._parent(path) if name != "os.fsync" and Path(path) != self.root else None)
                key = Path(path).name if parent else None
                if name == "os.fsync":
                    self._nodes[path].sync()
                elif name == "os.open":
                    self._nodes[done] = parent.entries.setdefault(key, File()) if parent else self._top
                elif name == "os.replace":
                    self._parent(args[0]).entries[Path(args[0]).name] = parent.entries.pop(key)
                elif name in ("os.unlink", "os.rmdir"):
                    del parent.entries[key]
                elif name == "os.mkdir":
                    parent.entries[key] = Folder()
                return done

        return run

    def _open(self, real, path, mode="r", *args, **kwargs):
        writing = any(letter in mode for letter in "wa+")
        self._step("open for writing" if writing else "open", path)
        file = real(path, mode, *args, **kwargs)
        if not writing:
            return file
        nameless = Path(path).is_dir()  # a temporary file that is in no folder
        node = File() if nameless else self._parent(path).entries.setdefault(Path(path).name, File())
        if "w" in mode:
            node.content = b""
        self._nodes[file.fileno()] = node
        self._opened.append(file)
        return _Writing(self, file, node, path)


class _Writing:
    """An open file whose writes are counted."""

    def __init__(self, disk, file, node, path):
        self._disk, self._file, self._node, self._path = disk, file, node, path

    def write(self, data):
        with self._disk._lock:
            torn = self._disk._step("write", self._path)
            part = data[: len(data) // 2] if torn else data
            written = self._file.write(part)
            self._file.flush()
            self._node.content += part.encode() if isinstance(part, str) else part
            if torn:
                raise Killed
            return written

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def state_of(folder):
    """The content of a folder, equal for two folders that a run finds alike: random names and lock holders are left out."""
    found = set()
    for path in Path(folder).rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        name = re.sub("[0-9a-f]{32}", "*", str(path.relative_to(folder)))
        found.add((name, len(content) if name.endswith(".lock") else content))
    return frozenset(found)


def full():
    return OSError(errno.ENOSPC, "No space left on device")
