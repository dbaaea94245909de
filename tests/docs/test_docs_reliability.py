"""What docs/reliability.md says of the tests is what they do."""

import ast
import re

from helpers.docs_pages import ROOT, page_text
from helpers.mutation_runs import LIMIT_BYTES, LIMIT_SECONDS, NUMBERS, REAL, RESIGNED, SAMPLE
from helpers.mutations import fuzzed

from kdpipe.configs.load import MAX_CONFIG_BYTES, MAX_NODES
from kdpipe.pipeline.models.external.onnx_file import TRIAL_BYTES

PAGE = " ".join(page_text("docs/reliability.md").split())


def source(name):
    return (ROOT / "tests" / name).read_text()


def test_every_test_file_that_is_named_is_there():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert len(named) > 20
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_numbers_of_mutations_are_those_of_the_tests():
    rows = {
        "teacher (zip": "teacher",
        "student's checkpoint": "student",
        "configuration": "config",
        "ONNX file, a fifth": "onnx",
    }
    for text, kind in rows.items():
        assert re.search(rf"mutations of an? {re.escape(text)}[^|]*\| {NUMBERS[kind]:,} \|", PAGE), kind
    assert sum(NUMBERS.values()) == 10_000
    assert f"real teacher of 41 MB | {REAL} |" in PAGE
    assert f"The default run tries {sum(SAMPLE.values())} of them" in PAGE
    assert RESIGNED == 5
    assert f"more than {LIMIT_SECONDS} seconds of CPU time, in {LIMIT_BYTES >> 30} GiB more" in PAGE


def test_limits_are_those_of_the_program():
    assert f"at most {MAX_CONFIG_BYTES >> 20} MiB, with aliases that expand to at most {MAX_NODES:,} values" in PAGE
    assert f"limited to {TRIAL_BYTES >> 30} GiB and four times its size" in PAGE


def test_numbers_of_other_tests_stand_in_them():
    flips = source("robustness/test_flipped_bytes.py")
    assert "flip_bytes(small, 7) > 900" in flips
    assert "> 6_000" in flips
    assert "every 7th, more than 900; `slow`: every single one, more than 6,000" in PAGE
    crashes = source("robustness/test_crashes.py")
    assert "assert points > 60" in crashes
    assert "assert reported > 30" in crashes
    assert "more than 60 points in each of 4 series" in PAGE
    assert "more than 30 reported in each of 4 series" in PAGE
    processes = source("robustness/test_processes.py")
    kills = re.findall(r"kill_again_and_again\(launcher, config_file, undisturbed, (\d+)\)", processes)
    assert f"{kills[0]} times; `slow`: {kills[1]} times" in PAGE
    assert "\nSECONDS = 10" in source("robustness/test_signals.py")
    assert "exit code 130 within 10 seconds" in PAGE


def test_kinds_of_damage_and_generators_are_counted():
    tree = ast.parse(source("robustness/test_damage.py"))
    sizes = {
        node.targets[0].id: len(node.value.keys)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    }
    assert f"{sizes['FILE_KINDS']} kinds of damage to {sizes['FILES']} kinds of files" in PAGE
    generators = sum(
        source(f"robustness/{name}.py").count("\n@fuzzed\n") for name in ("test_hostile", "test_hostile_configs")
    )
    assert f"{generators} generators of {fuzzed.max_examples} files each" in PAGE
    absurd = source("data/test_absurd_sizes.py")
    assert len(re.findall(r'^    "\w+\.(?:tif|png|jpg)": ', absurd, re.MULTILINE)) == 10
    assert "< 300" in absurd
    assert "10 files, as tile, mask, bands, header and scene: less than 300 MB more for all" in PAGE
