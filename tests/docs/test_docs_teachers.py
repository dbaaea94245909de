"""docs/teachers.md: its YAML says what the headings say, its names exist. Its blocks are run in test_docs.py."""

import re

import pytest
from helpers.docs_pages import blocks, page_text, with_snippet

from kdpipe.configs import load_config
from kdpipe.pipeline.models.weights import PREFIXES

SNIPPETS = [block.text for block in blocks("docs/teachers.md") if block.language == "yaml"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet {i}" for i in range(len(SNIPPETS))])
def test_snippets_change_something_or_are_the_guides(snippet):
    config = with_snippet(snippet)
    guide = load_config("biodiversity/ftunetformer_kd")
    assert (config == guide) == ("checkpoint: pretrain_weights" in snippet and "teachers:" not in snippet)


def test_there_is_a_snippet_for_each_topic():
    assert len(SNIPPETS) == 6


def test_the_page_says_that_nine_channels_are_shipped_as_they_are():
    shipped = load_config("biodiversity/ftunetformer_kd_openearthmap")
    config = with_snippet(SNIPPETS[1])
    assert (config.members, config.class_map) == (shipped.members, shipped.class_map)


def test_prefixes_of_the_page_are_those_that_are_removed():
    row = next(line for line in page_text("docs/teachers.md").splitlines() if line.startswith("| prefix"))
    assert set(re.findall(r"`(\w+\.)`", row)) == set(PREFIXES)
