"""
No mutated teacher, student, ONNX file or config ends in a traceback, a crash, code of the file's own, ten seconds or a gigabyte.

The default run samples the numbers that docs/reliability.md names.
"""

from functools import partial

import pytest
from helpers.configs import tiny_config
from helpers.mutation_runs import LIMIT_BYTES, NUMBERS, REAL, SAMPLE, run_mutations, write_sources

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def sources(landscape, teacher_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    write_sources(folder, partial(tiny_config, landscape, teacher_file, folder))
    return folder


def check(report, counts):
    assert report["failures"] == {}
    assert report["tried"] == report["refused"] + report["read"] == sum(counts.values())
    assert report["refused"] > report["tried"] / 2
    assert report["peak_bytes"] < LIMIT_BYTES


def test_some_hundred_mutations_are_read_or_refused_in_one_paragraph(sources):
    report = run_mutations(sources, SAMPLE)
    check(report, SAMPLE)
    assert report["read"] > 0


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_ten_thousand_mutations_are_read_or_refused_in_one_paragraph(sources):
    assert sum(NUMBERS.values()) == 10_000
    check(run_mutations(sources, NUMBERS, seed=1), NUMBERS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_teacher_is_read_or_refused_in_one_paragraph(sources, dubai):
    (teacher,) = (dubai / "pretrain_weights").glob("*.pth")
    (sources / "real.pth").write_bytes(teacher.read_bytes())
    check(run_mutations(sources, {"real": REAL}), {"real": REAL})
