"""The lock of a cache on S3: one of several writers has it, and one that lost it stops (moto's server on loopback)."""

import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.caches import RECIPE, distributions, objects

from kdpipe.cache import CacheLocked
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.storage import object_lock, remote
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import open_writer
from kdpipe.configs.errors import ShutOut

pytestmark = pytest.mark.timeout(300)


def test_a_lock_that_is_given_back_between_the_refusal_and_the_look_is_taken(s3, one_client, monkeypatch):
    """A server that refuses with 412 or 409 although the object is gone by now."""
    refused, create = iter([True, True]), remote.RemoteStorage.create

    def racing(self, name, data):
        if next(refused, False):
            raise FileExistsError(name)
        create(self, name, data)

    monkeypatch.setattr(remote.RemoteStorage, "create", racing)
    monkeypatch.setattr(object_lock, "WAIT_SECONDS", 0.01)
    with writer_lock(open_storage(s3.url)):
        assert json.loads(open_storage(f"{s3.url}.lock").read(""))["pid"] == os.getpid()


@pytest.fixture
def dead_lock(s3):
    """The lock object of a process of this host that has ended."""
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    lock = open_storage(f"{s3.url}.lock")
    lock.write("", json.dumps({"host": socket.gethostname(), "pid": int(child.stdout), "since": "yesterday"}).encode())
    return lock


def test_one_of_many_that_take_over_a_dead_lock_at_once_has_it(s3, one_client, dead_lock, monkeypatch):
    """Each sees the dead holder before any of them acts; the one whose condition holds is in, and nobody deletes its lock."""
    together, tagged = threading.Barrier(6), remote.RemoteStorage.tagged

    def at_once(self, name):
        found = tagged(self, name)
        if found and b"yesterday" in found[0]:
            together.wait(60)
        return found

    monkeypatch.setattr(remote.RemoteStorage, "tagged", at_once)
    held, refused, all_others_are_out = [], [], threading.Event()

    def attempt(number):
        try:
            with writer_lock(open_storage(s3.url)) as require:
                held.append(number)
                assert all_others_are_out.wait(60)
                require(now=True)
        except CacheLocked:
            refused.append(number)
            if len(refused) == 5:
                all_others_are_out.set()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(attempt, range(6)))
    assert (len(held), len(refused)) == (1, 5)
    assert dead_lock.info("") is None


@pytest.mark.long
def test_a_writer_whose_lock_was_taken_stores_nothing_more_and_leaves_the_other_lock(
    s3, one_client, images, monkeypatch
):
    """It returns after its lock was deleted by hand, and a run on another host has begun."""
    other = json.dumps({"host": "elsewhere", "pid": 7, "since": "noon"}).encode()
    lock, record = open_storage(f"{s3.url}.lock"), ImageDigest(size_bytes=1, sha256="0" * 64)
    monkeypatch.setattr(object_lock, "LOOK_SECONDS", 0.0)
    with (
        pytest.raises(
            ShutOut, match="its lock is held by process 7 on elsewhere since noon, so this run stores nothing more"
        ),
        open_writer(open_storage(s3.url), RECIPE, device="cpu", libraries={}) as writer,
    ):
        writer.begin()
        first = writer.write("Train/a", distributions(len(RECIPE.channels), 9, 9), record)
        lock.remove("")
        lock.write("", other)
        before = objects(s3.url)
        with pytest.raises(ShutOut):
            writer.write("Train/b", distributions(len(RECIPE.channels), 9, 9), record)
        with pytest.raises(ShutOut):
            writer.begin()
        assert objects(s3.url) == before
        writer.finish([first])
    assert objects(s3.url) == before
    assert lock.read("") == other


def test_on_a_server_that_ignores_conditions_the_writer_that_was_overwritten_stops(s3, one_client, monkeypatch):
    """Both have looked before either writes: the second overwrites the first, which notices at its next look."""
    client = open_storage(s3.url)._fs
    pipe_file = client.pipe_file
    monkeypatch.setattr(client, "pipe_file", lambda path, data, **conditions: pipe_file(path, data))
    monkeypatch.setattr(remote.RemoteStorage, "tagged", lambda self, name: None)  # as both saw it
    with (
        pytest.raises(ShutOut, match="its lock is held by"),
        writer_lock(open_storage(s3.url)) as first,
        writer_lock(open_storage(s3.url)) as second,
    ):
        second(now=True)
        first(now=True)


@pytest.mark.parametrize("code", ["NotImplemented", "InvalidArgument"])
def test_a_server_without_conditional_replacing_and_deleting_takes_plain_requests(
    s3, one_client, dead_lock, monkeypatch, code
):
    refused = []

    def unknown(self, doing, name, call):
        refused.append(doing)
        raise NotImplementedError(code)

    conditionally = remote.RemoteStorage._conditionally
    monkeypatch.setattr(
        remote.RemoteStorage,
        "_conditionally",
        lambda self, doing, name, call: (conditionally if doing == "creating" else unknown)(self, doing, name, call),
    )
    with writer_lock(open_storage(s3.url)) as require:
        require(now=True)
    assert refused == ["replacing", "deleting"]
    assert dead_lock.info("") is None


@pytest.mark.long
@pytest.mark.parametrize(
    "body",
    [
        {"pid": 10**30}, {"pid": 1.5}, {"pid": True}, {"pid": -1}, {"pid": 0}, {"pid": "1"}, {"host": ["a"]}, {"since": 5},
        {"host": "\x1b]0;owned\x07"}, {"since": "x\n\nkdpipe: done"}, b"[" * 200_000, b"\xff\xfe", b"", b"null",
    ],
    ids=lambda body: repr(body)[:24],
)  # fmt: skip
def test_a_lock_object_that_says_nonsense_is_somebodys_and_its_words_reach_no_terminal(s3, one_client, body):
    if isinstance(body, dict):
        body = json.dumps({"host": socket.gethostname(), "pid": 1, "since": "x"} | body).encode()
    lock = open_storage(f"{s3.url}.lock")
    lock.write("", body)
    with (
        pytest.raises(CacheLocked, match=r"is being written by another process; wait until") as raised,
        writer_lock(open_storage(s3.url)),
    ):
        pass
    assert str(raised.value).isprintable()
    assert lock.read("") == body
