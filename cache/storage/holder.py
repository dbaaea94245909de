"""Who holds the lock of a cache, as the text in a file or object beside it says."""

from __future__ import annotations

import datetime
import json
import os
import socket
import uuid

MOST_CHARACTERS = 4096  # of such a text; a longer one is not kdpipe's
MOST_PID = 2**22  # the largest number that Linux gives to a process

_held: set[str] = set()  # the texts of the locks of this process


def this_process() -> str:
    """The text that names this process; no two of them are equal."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # The token distinguishes runs of the same second in containers, where every process has number 1.
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": uuid.uuid4().hex})


def names_a_holder(text: str) -> bool:
    """Whether a text is what a writer, or one that was killed while it wrote, has left."""
    return text.startswith('{"host": ')


def describe(holder: str) -> str:
    """`process 12 on host since time`, or `another process` for a text that says something else."""
    found = _parsed(holder)
    return f"process {found[1]} on {found[0]} since {found[2]}" if found else "another process"


def hold(holder: str) -> None:
    """Note that this process holds the lock of this text, until `let_go`."""
    _held.add(holder)


def let_go(holder: str) -> None:
    """The opposite of `hold`."""
    _held.discard(holder)


def is_dead(holder: str) -> bool:
    """Whether the holder ran on this host and has ended; nothing is known about processes of other hosts."""
    found = _parsed(holder)
    if found is None or found[0] != socket.gethostname():
        return False
    try:
        os.kill(found[1], 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    # In a container every run is process 1: a lock with our number that we do not hold belongs to an earlier run.
    return found[1] == os.getpid() and holder not in _held


def _parsed(holder: str) -> tuple[str, int, str] | None:
    """Host, number and time; None for a text that does not hold them as `this_process` writes them."""
    if len(holder) > MOST_CHARACTERS:
        return None
    try:
        content = json.loads(holder)
        host, pid, since = content["host"], content["pid"], content["since"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = all(isinstance(text, str) and text.isprintable() for text in (host, since))
    return (host, pid, since) if texts and type(pid) is int and 0 < pid <= MOST_PID else None
