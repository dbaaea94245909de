"""Reading from S3 through obstore, and through s3fs where it is not installed."""

import threading

import pytest
from helpers.caches import RECIPE, fill

from kdpipe.cache import CacheUnreachable, SoftTargetCache
from kdpipe.cache.storage import remote, s3_reader
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import finished_tiles


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 10)], [(90, 10), (0, 10), (5, 50)], [(-10, 10), (0, 3)], [(-10, 4)], [(-200, 200)], [(95, 50)], [(100, 5), (7, 2)],
        [(300, 5)], [(3, 0)], [],
    ],
)  # fmt: skip
def test_ranges_of_a_file_are_those_of_its_bytes(s3, reader, spans, monkeypatch):
    monkeypatch.setattr(s3_reader, "GAP_BYTES", 8)
    storage, data = open_storage(s3.url), bytes(range(100))
    storage.write("a", data)
    assert storage.read("a") == data
    if reader == "obstore" or all(length and start < 100 for start, length in spans):  # s3fs refuses the others
        expected = [data[start if start >= 0 else max(0, 100 + start) :][:length] for start, length in spans]
        assert storage.read_ranges("a", spans) == expected
    with pytest.raises(FileNotFoundError):
        storage.read_ranges("b", [(0, 1)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503", "3 attempts failed .*503 Service Unavailable.*check the network"),
        ("slow", "3 attempts failed .*check the network"),
        ("cut", "3 attempts failed .*check the network"),
        ("lost", "3 attempts failed .*check the network"),
        ("denied", "access was refused .*may list, read, write and delete"),
    ],
)
def test_a_server_that_stops_responding_is_named_with_advice(s3, images, monkeypatch, caplog, fault, said):
    pytest.importorskip("obstore")
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    if fault == "slow":
        monkeypatch.setattr(remote, "ANSWER_SECONDS", 1)
    fill(s3.url, images)
    cache = SoftTargetCache.open(s3.url)
    s3.fault = lambda method, path: fault
    s3.count()
    with pytest.raises(CacheUnreachable, match=said) as caught:
        cache.read("Other/d")
    assert str(caught.value).count("\n") == 0
    # For the metadata and the shard at once. Of a refusal s3fs is asked too, perhaps alone for the second.
    assert s3.count().total() in ((3, 4) if fault == "denied" else (6,))
    assert len(caplog.records) == 2 * (fault != "denied")
    s3.fault = lambda method, path: None
    assert cache.read("Other/d").shape == (3, 300, 257)


@pytest.mark.parametrize("name", ["tiles/ä [1]/b%20c", "tiles/a#b?c=d&e", "tiles/.x/y+z ~'(1)*", "tiles/ü🌲/100%"])
def test_names_of_odd_characters_are_read_in_one_request(s3, reader, name):
    storage = open_storage(s3.url)
    storage.write(name, b"content")
    storage.write(f"{name}/zarr.json", b"{}")
    storage.read(name)
    s3.count()
    assert storage.read(name) == b"content"
    assert storage.read_ranges(name, [(1, 3)]) == [b"ont"]
    assert s3.count() == {"GET": 2}


def test_what_obstore_cannot_do_is_read_through_s3fs_and_said(s3, monkeypatch, caplog):
    pytest.importorskip("obstore")
    storage = open_storage(s3.url)
    storage.write("a", b"content")

    def fails(self, key):
        raise ValueError("no such setting\nat line 3")

    monkeypatch.setattr(s3_reader.S3Reader, "read", fails)
    with caplog.at_level("INFO"):
        assert storage.read("a") == b"content"
    (record,) = caplog.records
    assert (
        f"{s3.url} is read through s3fs alone, which is slower, as obstore cannot (no such setting)" in record.message
    )


def test_receipts_are_read_at_once_and_only_those_that_are_there(s3, reader, images):
    fill(s3.url, images, tiles=["Train/a", "Other/c", "Other/d"], finish=False)
    storage, together = open_storage(s3.url), threading.Barrier(3)
    storage.read("zarr.json")

    def meet(method, path):
        if "/tiles/" in path and path.endswith("zarr.json"):
            together.wait(timeout=20)

    s3.fault = meet
    s3.count()
    found = finished_tiles(storage, RECIPE, images, None)
    assert list(found) == ["Train/a", "Other/c", "Other/d"]
    asked = [path for _, path, _ in s3.requests if "/tiles/" in path and path.endswith("zarr.json")]
    assert len(asked) == 3, "none of the tile that is not there"
