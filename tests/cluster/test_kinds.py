"""Two workers make the bytes of one process, whatever the teacher is."""

import pytest
from helpers.cluster_runs import run
from helpers.files import tree
from helpers.teacher_kinds import KINDS

pytestmark = pytest.mark.long


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_two_workers_make_the_bytes_of_one_process(two_workers, config_of, tmp_path):
    config = config_of(cache__path=str(tmp_path / "of_two.zarr"))
    assert run(config, two_workers.address).computed == 6
    assert tree(tmp_path / "of_two.zarr") == tree(config_of.original)
    assert len(two_workers.predicted()) == 6
