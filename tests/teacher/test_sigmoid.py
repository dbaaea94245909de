"""A teacher of one channel, trained with a sigmoid, teaches its two classes, 1 - σ and σ, in everything that runs a teacher."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.configs import RECOGNISED
from helpers.first_config import init
from PIL import Image

from kdpipe.cache import Softening, SoftTargetCache
from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.evaluation.evaluate import evaluate, teacher_model
from kdpipe.pipeline.inspection.checkpoint import inspect_checkpoint
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.teacher.loading import load_teacher
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.class_map import suggest_map
from kdpipe.pipeline.verify.gate import verify
from kdpipe.pipeline.verify.reference import compare_with_reference

CPU = torch.device("cpu")
REST, FOUND = 0, 4  # the student's Background and Settlement


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(2)
    network = create_smp_model("unet", RECOGNISED, 1, key="teacher").eval()
    with torch.no_grad():
        network.segmentation_head[0].weight *= 20
    return network


@pytest.fixture
def make(make_config, network, tmp_path):
    """The configuration with the sigmoid as its teacher, on two tiles."""
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in network.state_dict().items()}},
        tmp_path / "sigmoid.ckpt",
    )
    base = make_config()
    for number, image in enumerate(sorted((Path(base.data.train[0]) / "images").iterdir())[:2]):
        for kind in ("images", "masks"):
            (tmp_path / "two" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(image.parents[1] / kind / image.name, tmp_path / "two" / kind / f"t{number}{image.suffix}")

    def make(**changes):
        teacher = {
            "architecture": "unet", "encoder": RECOGNISED, "checkpoint": str(tmp_path / "sigmoid.ckpt"), "classes": ["Rest", "Roof"]
        }  # fmt: skip
        own = {
            "class_map": {"Rest": {"Background": 1}, "Roof": {"Settlement": 1}},
            "data__train": [str(tmp_path / "two")],
            "data__val": [],
        }
        return make_config(teacher=teacher | changes.pop("teacher", {}), **own | changes)

    return make


def z_by_hand(network, config, number, views=((),)):
    """The network's own output `(H, W)`, mean over flips of these axes."""
    (path,) = (Path(config.data.train[0]) / "images").glob(f"t{number}.*")
    image = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 255
    height, width = image.shape[-2:]
    total = 0
    for axes in views:
        turned = torch.flip(image, axes).numpy()
        padded = np.pad(turned, ((0, 0), (0, 0), (0, -height % 32), (0, -width % 32)), mode="reflect")
        with torch.no_grad():
            total = (
                total + torch.flip(network(torch.from_numpy(padded))[..., :height, :width], axes)[0, 0].double().numpy()
            )
    return total / len(views)


def shares(z_HW, temperature):
    """`(2, H, W)`: 1 - σ and σ, softened."""
    found = 1 / (1 + np.exp(-z_HW))
    softened = np.stack([(1 - found) ** (1 / temperature), found ** (1 / temperature)])
    return softened / softened.sum(axis=0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({}, ((),)),
        ({"teacher": {"tta": "flips"}, "cache__bits": 16}, ((), (-1,), (-2,), (-2, -1))),
        ({"cache__kind": "logits", "cache__bits": 16, "distill__temperature": 3.0}, ((),)),
    ],
    ids=["soft", "flips", "logits"],
)
def test_stage_one_stores_one_minus_sigma_and_sigma_and_parity_agrees(make, network, changes, views):
    config = make(**changes)
    precompute(config, CPU)
    softening = (
        Softening(config.distill.temperature, config.class_map_matrix()) if config.cache.kind == "logits" else None
    )
    cache = SoftTargetCache.open(config.cache.path, softening)
    for number in (0, 1):
        expected = shares(z_by_hand(network, config, number, views), config.distill.temperature)
        found = cache.read(f"two/t{number}")
        np.testing.assert_allclose(found[[REST, FOUND]], expected, atol=1.01 / 255 if config.cache.bits == 8 else 2e-4)
        assert found[[1, 2, 3, 5]].max() == 0
    assert verify(config, "parity", device=CPU).findings == []


@pytest.mark.long
def test_a_student_learns_from_it_cached_and_online(make):
    config = make(train__max_steps=1, train__crop=32)
    precompute(config, CPU)
    cached = train(config, CPU).losses
    online = train(make(train__max_steps=1, train__crop=32, distill__mode="online", name="online"), CPU).losses
    assert cached == pytest.approx(online, rel=0.02)


@pytest.mark.long
def test_its_own_classes_are_scored_and_suggested(make, network):
    config = make()
    right = total = 0
    for number in (0, 1):
        mask = np.asarray(Image.open(next((Path(config.data.train[0]) / "masks").glob(f"t{number}.*"))))
        predicted = np.where(z_by_hand(network, config, number) > 0, FOUND, REST)
        right, total = right + (predicted == mask)[mask != 255].sum(), total + (mask != 255).sum()
    found = evaluate(teacher_model(config, CPU, tta=None, window=None), config.data.train).together
    assert found.scores.overall_accuracy == pytest.approx(right / total, abs=1e-3)
    assert {row.teacher_class for row in suggest_map(config, CPU).rows} == {"Rest", "Roof"}


@pytest.mark.parametrize("kind", ["z", "sigma"])
def test_a_script_that_saves_one_channel_is_compared(make, network, tmp_path, kind):
    config = make()
    (tmp_path / "reference").mkdir()
    for number in (0, 1):
        z = z_by_hand(network, config, number)[None]
        np.save(tmp_path / "reference" / f"t{number}.npy", np.float32(z if kind == "z" else 1 / (1 + np.exp(-z))))
    report = compare_with_reference(config, tmp_path / "reference", None, CPU, Silent())
    assert len(report.tiles) == 2
    assert report.findings == []


def test_the_file_is_recognised_and_init_asks_for_both_classes(make, tmp_path):
    make()
    path = str(tmp_path / "sigmoid.ckpt")
    assert inspect_checkpoint(path).network.channels == 1
    init(str(tmp_path / "two"), teacher=path)
    text = Path("mine.yaml").read_text()
    assert "Its one channel is a sigmoid's, σ, and stands for two." in " ".join(text.replace("#", " ").split())
    init(str(tmp_path / "two"), teacher=path, overwrite=True, teacher_classes=["Rest", "Roof"])
    assert "classes: [Rest, Roof]" in Path("mine.yaml").read_text()
    with pytest.raises(ConfigError, match="--teacher-classes names 3 classes"):
        init(str(tmp_path / "two"), teacher=path, overwrite=True, teacher_classes=["a", "b", "c"])


def test_another_number_of_classes_is_explained(make):
    teacher = make().teacher.model_copy(update={"classes": ["a", "b", "c"]})
    with pytest.raises(
        CheckpointError,
        match=r"(?s)1 channel, but teacher says .* one channel z is a sigmoid's: classes needs two names",
    ):
        load_teacher(teacher)
