import pytest

from kdpipe.configs.errors import count_text


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (0, "tiles", "0 tiles"),
        (1, "tiles", "1 tile"),
        (2, "tiles", "2 tiles"),
        (1, "teacher classes", "1 teacher class"),
        (1, "batches", "1 batch"),
        (1, "entries", "1 entry"),
        (1, "boxes", "1 box"),
        (1, "images", "1 image"),
        (1, "px", "1 px"),
    ],
)
def test_one_thing_is_not_said_in_the_plural(count, nouns, text):
    assert count_text(count, nouns) == text
