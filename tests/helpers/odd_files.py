"""What can be in the place of a file, and mounts that only root may make."""

import os
import stat
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(place, *options):
    """A mount at a folder during the block; skips where that is not permitted."""
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fifo(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def folder(path):
    path.mkdir()


def socket(path):
    import socket

    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket is short
        bound.bind(path.name)
        os.chdir(here)


def endless(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


ODD = {"a FIFO": fifo, "a link to itself": loop, "a folder": folder, "a socket": socket, "an endless device": endless}
LONG = "x" * 300
