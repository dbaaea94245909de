"""The cache of arrays keeps to its limit, hands out read-only arrays, and is empty after pickling."""

import pickle

import numpy as np
import pytest

from kdpipe.data.lru import Recent


class Reader:
    def __init__(self, size_bytes):
        self.size_bytes, self.reads = size_bytes, []

    def __call__(self, key):
        def read():
            self.reads.append(key)
            return np.full(self.size_bytes, key, dtype=np.uint8)

        return read


def test_a_cached_array_is_not_read_again():
    recent, reader = Recent(limit_bytes=30), Reader(10)
    for key in (1, 2, 3, 1, 2, 3, 1):
        assert (recent.get(key, reader(key)) == key).all()
    assert reader.reads == [1, 2, 3]


def test_the_least_recently_used_array_is_dropped_first():
    recent, reader = Recent(limit_bytes=30), Reader(10)
    for key in (1, 2, 3, 1, 4, 1, 3, 2):
        recent.get(key, reader(key))
    assert reader.reads == [1, 2, 3, 4, 2]


def test_an_array_larger_than_the_limit_is_kept_alone():
    recent, reader = Recent(limit_bytes=5), Reader(10)
    for key in (1, 1, 2, 2, 1):
        recent.get(key, reader(key))
    assert reader.reads == [1, 2, 1]


def test_cached_arrays_are_read_only():
    array = Recent(100).get("a", Reader(4)(1))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 7


def test_a_failed_read_is_not_kept():
    recent = Recent(100)
    with pytest.raises(OSError, match="gone"):
        recent.get("a", lambda: (_ for _ in ()).throw(OSError("gone")))
    assert recent.get("a", Reader(3)(9)).tolist() == [9, 9, 9]


def test_a_pickled_cache_is_empty():
    recent = Recent(100)
    recent.get("a", Reader(50)(1))
    copy, reader = pickle.loads(pickle.dumps(recent)), Reader(50)
    for key in ("a", "b", "c"):
        copy.get(key, reader(2))
    assert len(reader.reads) == 3
    assert len(pickle.dumps(recent)) < 200


def test_arrays_under_one_key_count_together_and_are_dropped_together():
    recent, reads = Recent(limit_bytes=30), []

    def pair(key):
        def read():
            reads.append(key)
            return np.zeros(10, np.uint8), None, np.zeros(5, np.uint8)

        return read

    for key in (1, 2, 1, 2):  # 15 bytes each
        first, second, third = recent.get_all(key, pair(key))
        assert second is None
        assert not first.flags.writeable and not third.flags.writeable
    recent.get_all(3, pair(3))
    recent.get_all(2, pair(2))
    recent.get_all(1, pair(1))
    assert reads == [1, 2, 3, 1]
