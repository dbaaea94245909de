"""docs/own-loop.md: no trainer that it shows sees a crop twice, and its losses are those of the papers."""

import itertools

import numpy as np
import pytest
import torch
from helpers.docs_pages import blocks

from kdpipe.data.dataset import TrainTiles
from kdpipe.pipeline.precompute.run import precompute

pytestmark = pytest.mark.long

PYTHON = [block for block in blocks("docs/own-loop.md") if block.language == "python"]
CPU = torch.device("cpu")


def block_with(words):
    (found,) = [block for block in PYTHON if words in block.text]
    return found


def run(words, names):
    block = block_with(words)
    exec(compile(block.text, block.place, "exec"), names)


@pytest.fixture
def names(make_config, tmp_path, monkeypatch):
    """What the first block of the page leaves behind, and under `seen` the numbers of the samples that were made."""
    from kdpipe.configs import dump_config

    config = make_config(train__crop=32)
    precompute(config, CPU)
    (tmp_path / "mine.yaml").write_text(dump_config(config))
    seen = []
    original = TrainTiles.__getitem__

    def noted(self, k):
        seen.append(k)
        return original(self, k)

    monkeypatch.setattr(TrainTiles, "__getitem__", noted)
    names = {"seen": seen}
    run("for epoch in range(2):", names)
    return names


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")  # Lightning's
@pytest.mark.parametrize("words", ["for epoch in range(2):", "lightning.Trainer(", "Distiller(segformer"])
def test_no_crop_comes_twice(names, words):
    if words != "for epoch in range(2):":
        names["seen"].clear()
        run(words, names)
    samples = len(names["samples"])
    assert sorted(names["seen"]) == list(range(2 * samples)), "both epochs, each of its samples once"
    assert [k // samples for k in names["seen"]] == [0] * samples + [1] * samples


def test_channel_wise_distillation_is_that_of_the_paper(names, make_config):
    """Shu et al., section 3.2: T² / C times the sum over channels of KL between softmaxes over pixels."""
    precompute(make_config(cache__kind="logits", cache__path="caches/logits.zarr"), CPU)  # as the page's command does
    run("def channel_wise", names)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 2, 4, 3, 5))
    inside = np.ones((2, 3, 5), bool)
    inside[1, 2] = False
    expected = []
    for n, c in itertools.product(range(2), range(4)):
        p, q = (np.exp(scores[n, c][inside[n]] / 4) for scores in (teacher, student))
        p, q = p / p.sum(), q / q.sum()
        expected.append(16 * (p * np.log(p / q)).sum())
    found = names["channel_wise"](torch.tensor(student), torch.tensor(teacher), torch.tensor(inside))
    assert found.item() == pytest.approx(np.mean(expected))
    assert torch.isfinite(sum(names["terms"]))
    assert all(
        parameter.grad.abs().sum() > 0 for parameter in [*names["hint"].parameters(), *names["to_teacher"].parameters()]
    )
