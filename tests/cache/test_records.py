"""A tile's record as text: the fast ways against Python's json, which is the rule."""

import hashlib
import json
import random

import pytest

from kdpipe.cache.index.records import MAX_TILE_PX, ImageDigest, TileRecord, compact, parse_record, read_record

IDS = [
    "Train/a", "Train/t1_001/view-0003-0a1b2c3d", "a/b/c.d", "x.y/.hidden", "Wälder/ö", 'quo"te/b', "tab\tx/y", "emoji/🌲", "a b/c d",
    "__x/y", "zarr.json/a", "a/zarr.json", "a/zarr.jsonx", "../a", "a/../b", "a//b", "back\\slash/x", "a/b\n", "a/-", "-/_", "A/0",
]  # fmt: skip


def sha(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def records():
    rng = random.Random(0)
    for number in range(400):
        tile_id = rng.choice(IDS)
        yield TileRecord(
            tile_id, rng.choice([0, 1, 70, 10**6, 2**30]), rng.choice([1, 41, 1000, 1074]),
            ImageDigest(rng.choice([0, 5, 10**12]), sha(f"i{number}")), rng.choice([0, 1, 777, 10**11]), sha("s"), sha(tile_id),
        )  # fmt: skip


def canonical_by_json(record):
    text = json.dumps(record.as_dict(), sort_keys=True, indent=1, ensure_ascii=True)
    return "\n".join(f"  {line}" for line in text.splitlines())


def is_valid(fields):
    try:
        parse_record(fields, newer=False)
    except ValueError:
        return False
    return True


def test_its_texts_are_those_of_json():
    for record in records():
        assert record.canonical() == canonical_by_json(record)
        assert record.compact() == compact(record.as_dict())


def test_it_is_read_back_only_if_it_is_valid_and_mostly_if_it_is():
    read = 0
    for record in records():
        found = read_record(record.canonical())
        assert found in (None, record)
        if found is not None:
            assert is_valid(record.as_dict()), record
            read += 1
        elif is_valid(record.as_dict()):
            assert not record.id.isascii() or not all(part[0].isalnum() or part[0] in "-_" for part in record.id.split("/")) or any(
                letter in record.id for letter in ' "\\\t\n'
            ), record  # fmt: skip
    assert read > 50


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"height": 70', '"height": 070'), ('"height": 70', '"height": 70.0'), ('"height": 70', '"height":  70'),
        ('"height": 70', '"height": -70'), ('"width": 41', '"width": 41,\n   "x": 1'), ('"width": 41', '"width": 4１'),
        ("Train/a", "Train\\u002fa"), ("Train/a", "Train/a\\n"), ("  }", "  }\n"), ("  {", "{"), ('"id"', '"ID"'),
    ],
)  # fmt: skip
def test_any_other_text_is_left_to_the_rule(before, after):
    text = TileRecord("Train/a", 70, 41, ImageDigest(3, sha("i")), 9, sha("s"), sha("m")).canonical()
    assert read_record(text) is not None
    assert before in text
    assert read_record(text.replace(before, after, 1)) is None


def test_a_size_beyond_the_limit_is_refused_both_ways():
    record = TileRecord("Train/a", MAX_TILE_PX, 2, ImageDigest(3, sha("i")), 9, sha("s"), sha("m"))
    assert read_record(record.canonical()) is None
    with pytest.raises(ValueError, match="a tile has at most"):
        parse_record(record.as_dict(), newer=True)
