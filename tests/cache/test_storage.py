"""A local write is durable and whole, from any number of threads."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdpipe.cache.storage import local
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.local import LocalStorage


def test_no_thread_uses_a_folder_before_it_is_durable(tmp_path, monkeypatch):
    """Otherwise a power cut could delete the folder, and with it a tile that was reported as finished."""
    storage = open_storage(str(tmp_path / "c"))
    made, go_on, sync = threading.Event(), threading.Event(), local.sync_folder

    def slow_once(folder):
        if not made.is_set():
            made.set()
            assert go_on.wait(60)
        sync(folder)

    monkeypatch.setattr(local, "sync_folder", slow_once)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(storage.write, "tiles/a/0", b"1")
        assert made.wait(60)
        second = threads.submit(storage.write, "tiles/b/0", b"2")
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        first.result()
        second.result()


def test_threads_delete_a_file_in_the_place_of_a_folder_once(tmp_path, monkeypatch):
    """All tiles below the folder are written at once, and every thread sees the file."""
    (tmp_path / "tiles").write_bytes(b"no folder")
    is_file = Path.is_file

    def seen_for_a_while(path):
        found = is_file(path)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(Path, "is_file", seen_for_a_while)
    storage = LocalStorage(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: storage.write(f"tiles/{n}/0.0.0", b"shard"), range(4)))
    assert [storage.read(f"tiles/{n}/0.0.0") for n in range(4)] == [b"shard"] * 4
