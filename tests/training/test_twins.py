"""A run without a teacher has the steps, the schedule and the validations of its twin with one, also where tiles have no mask."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.doubles import Lines
from helpers.runs import Small

from kdpipe.configs.errors import DataError
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.compare import compare
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.training.targets import training_samples

CPU = torch.device("cpu")


@pytest.fixture
def mixed(make_config, landscape, monkeypatch):
    """Six labelled tiles of two crops each and two tiles without a mask of five: 22 samples an epoch."""
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: Small())
    unlabelled = [str(landscape / "Unlabelled")]
    return lambda **changes: make_config(
        data__unlabelled=unlabelled, train__crops_per_tile=2, train__unlabelled_crops_per_tile=5, **changes
    )


@pytest.mark.parametrize("view", [{}, {"distill__teacher_view": "crop", "cache__views": 5}], ids=["tile", "crop"])
def test_an_epoch_has_as_many_samples_and_each_labelled_tile_a_fair_share(mixed, view):
    config = with_mode(mixed(**view), "none")
    labelled = list_tiles(config.data, "train", labelled_only=True)
    samples = training_samples(config, labelled, None, None)
    assert len(samples) == len(TrainTiles(list_tiles(config.data, "train"), config)) == 22
    drawn = Counter(samples.tiles[number].id for number in samples._drawn)
    assert set(drawn) == {tile.id for tile in labelled}
    assert sorted(drawn.values()) == [3, 3, 4, 4, 4, 4]


@pytest.mark.long
def test_a_baseline_and_its_twin_are_compared_as_they_are(mixed):
    config = mixed(train__epochs=2, distill__mode="online", train__crop=32)
    progress = Lines()
    taught = train(config, CPU, progress=Lines())
    alone = train(with_mode(config, "none"), CPU, progress=progress)
    assert (
        "note: an epoch is as long as with a teacher: the labelled tiles, 6, take the turns of those without a mask, 2"
        in progress.said
    )
    assert taught.steps == alone.steps == 22
    runs = [read_run(Path("model_weights/tests") / name) for name in ("tiny", "tiny-none")]
    assert [point.steps for point in runs[0].history] == [point.steps for point in runs[1].history] == [11, 22]
    assert compare(runs).steps == 22


def test_the_command_of_the_refusal_makes_runs_comparable(mixed):
    train(with_mode(mixed(train__epochs=2, name="long"), "none"), CPU)
    short = mixed(train__epochs=1, train__max_steps=7, name="short", train__lr=2e-3)
    train(with_mode(short, "none"), CPU)
    folders = [Path("model_weights/tests") / name for name in ("long-none", "short-none")]
    with pytest.raises(DataError, match="long-none has 22") as caught:
        compare([read_run(folder) for folder in folders])
    command = " ".join(line.strip(" \\") for line in str(caught.value).splitlines() if line.startswith("    "))
    assert command == (
        "kdpipe train-student -c model_weights/tests/short-none/config.yaml --resume --set train.epochs=4 --set train.max_steps=22"
    )
    longer = short.model_copy(update={"train": short.train.model_copy(update={"epochs": 4, "max_steps": 22})})
    train(with_mode(longer, "none"), CPU, resume=True)
    assert compare([read_run(folder) for folder in folders]).steps == 22
