"""`train.labelled_loss` and `train.class_weights`: the losses of smp and NumPy, and by default the very loss of before."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.configs import ENCODER
from helpers.doubles import Lines
from helpers.files import write_image
from helpers.runs import assert_same_weights, checkpoint, weights
from PIL import Image
from torch.nn import functional as F

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema.losses import LABELLED_LOSSES
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.losses import hard_loss
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training.objective import balanced, class_weights_of
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")
C = 5
SMP = {
    "dice": smp.losses.DiceLoss("multiclass", smooth=0.05, ignore_index=255),
    "jaccard": smp.losses.JaccardLoss("multiclass", smooth=0.05, ignore_index=255),
    "tversky": smp.losses.TverskyLoss("multiclass", smooth=0.05, ignore_index=255, alpha=0.3, beta=0.7),
    "focal": smp.losses.FocalLoss("multiclass", gamma=2.0, ignore_index=255),
    "lovasz": smp.losses.LovaszLoss("multiclass", ignore_index=255),
}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, C, 7, 9, generator=g) * 2
    mask = torch.randint(0, C - 1, (2, 7, 9), generator=g)  # the last class occurs nowhere
    mask[0, 0] = 255
    return logits.requires_grad_(), mask


def with_gradient(loss, logits):
    return loss, torch.autograd.grad(loss, logits)[0]


def loss_of_before(logits, mask, ignore_index):
    """`hard_loss` as it was before it could be chosen."""
    logits = logits.float()
    known = mask != ignore_index
    entropy = F.cross_entropy(logits, mask, ignore_index=ignore_index, label_smoothing=0.05, reduction="sum")
    probs = logits.softmax(dim=1) * known[:, None]
    labels = mask[:, None] == torch.arange(logits.shape[1])[:, None, None]
    over = (0, 2, 3)
    both, q, y = (probs * labels).sum(over), probs.sum(over), labels.sum(over)
    dice = 1 - (both + 0.05) / ((q + y) / 2 + 0.05)
    return (entropy / known.sum().clamp(min=1) + (dice * (y > 0)).mean()).float()


@pytest.mark.parametrize("given", [{}, {"losses": {"dice": 1.0, "ce": 1.0}}], ids=["default", "spelt out"])
def test_the_usual_loss_is_bit_for_bit_the_one_of_before(batch, given):
    logits, mask = batch
    found, expected = (
        with_gradient(loss, logits)
        for loss in (hard_loss(logits, mask, 255, **given), loss_of_before(logits, mask, 255))
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", SMP)
def test_a_loss_and_its_gradient_are_smps(batch, name):
    logits, mask = batch
    found, expected = (
        with_gradient(loss, logits) for loss in (hard_loss(logits, mask, 255, {name: 1.0}), SMP[name](logits, mask))
    )
    torch.testing.assert_close(found, expected)


def test_losses_are_summed_by_their_weights(batch):
    logits, mask = batch
    parts = {"ce": 0.5, "dice": 2.0, "focal": 3.0, "jaccard": 0.1, "lovasz": 0.7, "tversky": 1.3}
    assert set(parts) == set(LABELLED_LOSSES)
    alone = sum(weight * hard_loss(logits, mask, 255, {name: 1.0}) for name, weight in parts.items())
    torch.testing.assert_close(hard_loss(logits, mask, 255, parts), alone)


@pytest.mark.parametrize("name", LABELLED_LOSSES)
def test_a_loss_leaves_pixels_without_a_label_out_in_float32(batch, name):
    logits, mask = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = with_gradient(hard_loss(logits, mask, 255, {name: 1.0}), logits)
    assert loss.dtype == torch.float32
    assert loss > 0
    assert not gradient[0, :, 0].any()
    torch.testing.assert_close(loss, hard_loss(logits, mask, 255, {name: 1.0}), rtol=1e-6, atol=0)
    nothing, gradient = with_gradient(hard_loss(logits, torch.full_like(mask, 255), 255, {name: 1.0}), logits)
    assert nothing == 0
    assert not gradient.any()


def test_class_weights_weigh_pixels_by_their_label(batch):
    logits, mask = batch
    w = np.array([0.5, 2.0, 1.0, 4.0, 9.0])
    known = mask.numpy() != 255
    q = logits.detach().double().softmax(dim=1).numpy().transpose(0, 2, 3, 1)[known]
    y = mask.numpy()[known]
    pixels = -(0.95 * np.log(q[np.arange(len(y)), y]) + 0.05 / C * np.log(q).sum(axis=1))
    tensor = torch.tensor(w, dtype=torch.float32)
    assert hard_loss(logits, mask, 255, {"ce": 1.0}, tensor).item() == pytest.approx(
        np.average(pixels, weights=w[y]), rel=1e-5
    )
    focal = smp.losses.FocalLoss("multiclass", gamma=2.0, ignore_index=255, class_weights=list(w))(logits, mask)
    torch.testing.assert_close(hard_loss(logits, mask, 255, {"focal": 1.0}, tensor), focal.float())
    region = {"dice": 1.0, "jaccard": 1.0, "lovasz": 1.0}
    assert torch.equal(hard_loss(logits, mask, 255, region, tensor), hard_loss(logits, mask, 255, region))


def test_a_rare_label_alone_in_a_batch_counts_in_full():
    logits, mask = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    found = hard_loss(logits, mask, 255, {"ce": 1.0}, torch.tensor([1e-6, 1e6]))
    assert found.item() == pytest.approx(np.log(2))


def test_weights_of_one_and_the_usual_losses_train_the_same_bytes(cached, make_config, small_student):
    train(cached, CPU)
    spelt = {"train__labelled_loss": {"ce": 1, "dice": 1}, "train__class_weights": {"Forest": 1, "Cropland": 1.0}}
    train(make_config(name="spelt", **spelt), CPU)
    assert_same_weights(weights(), weights("spelt"))
    train(make_config(name="other", train__class_weights={"Forest": 3}), CPU)
    assert not torch.equal(weights()["student.head.weight"], weights("other")["student.head.weight"])


def test_a_run_with_other_losses_resumes_bit_for_bit(cached, make_config, small_student):
    options = {"train__labelled_loss": {"focal": 2, "lovasz": 1, "tversky": 1}, "train__class_weights": "auto"}
    train(make_config(name="whole", **options), CPU)
    train(make_config(train__max_steps=2, **options), CPU)
    said = Lines()
    train(make_config(**options), CPU, resume=True, progress=said)
    assert_same_weights(weights(), weights("whole"))
    assert not [line for line in said.said if "class_weights" in line], "they were counted when it began"


def test_usual_losses_leave_recorded_configurations_as_they_were(make_config):
    assert not {"labelled_loss", "class_weights"} & make_config().model_dump()["train"].keys()
    spelt = make_config(train__labelled_loss={"dice": 1, "ce": 1})
    assert spelt.model_dump() == make_config().model_dump()
    assert make_config(train__labelled_loss={"ce": 1}).model_dump()["train"]["labelled_loss"] == {"ce": 1.0}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "labelled_loss",
            {"ce": 1, "dyce": 1},
            r"train\.labelled_loss.*one or more of ce, dice, .*, tversky, found dyce",
        ),
        ("labelled_loss", {}, "one or more of ce, .*, found none"),
        ("labelled_loss", {"ce": 0}, r"train\.labelled_loss\.ce"),
        (
            "class_weights",
            {"Forrest": 2},
            r"train\.class_weights names \['Forrest'\], not among classes\.names \['Background'",
        ),
        (
            "class_weights",
            {"Forest": -1},
            r"train\.class_weights: expected auto, or .*, from 0\.000001 to 1000000, found Forest: -1",
        ),
        (
            "class_weights",
            "automatic",
            r"train\.class_weights: expected auto, or weights of classes such as .*, found .automatic",
        ),
    ],
)
def test_what_is_no_loss_or_class_is_refused(make_config, key, value, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**{f"train__{key}": value})


def test_class_weights_that_no_loss_would_take_are_refused(make_config):
    with pytest.raises(ConfigError, match="class_weights count in ce and focal, and labelled_loss has dice alone"):
        make_config(train__labelled_loss={"dice": 1}, train__class_weights="auto")


def test_median_frequency_balancing_is_that_of_the_paper_within_its_bounds():
    """Frequencies: 90 / 200, 100 / 200, 10 / 100, and 0.1 / 100 of tiles that show them; their median is 0.275."""
    counts = np.array([[600, 400, 0, 0, 0], [300, 600, 100, 0, 0], [0, 0, 0, 1999, 1]])
    # Class 0 has 900 of the 2000 pixels of two tiles, 1 has 1000 of them, 2 has 100 of 1000, 3 nearly all of its tile, 4 a 2000th.
    frequencies = np.array([0.45, 0.5, 0.1, 1999 / 2000, 1 / 2000])
    expected = np.clip(np.median(frequencies) / frequencies, 0.1, 10)
    np.testing.assert_allclose(balanced(counts), expected)
    assert balanced(counts)[4] == 10
    assert balanced(np.array([[7, 0]])) == [1, 1]
    assert balanced(np.zeros((0, 3), dtype=np.int64)) == [1, 1, 1]


def test_weights_are_counted_where_there_is_a_label_and_data(make_config, tmp_path):
    for number, side in enumerate((20, 40)):
        write_image(tmp_path / f"Mine/images/t{number}.png", side, side, seed=number)
        labels = np.full((side, side), 255, np.uint8)
        labels[: side // 2] = number
        labels[0] = 2
        (tmp_path / "Mine/masks").mkdir(exist_ok=True)
        Image.fromarray(labels).save(tmp_path / f"Mine/masks/t{number}.png")
    image = np.dstack([np.asarray(Image.open(tmp_path / "Mine/images/t1.png")), np.full((40, 40), 255, np.uint8)])
    image[10:, :, 3] = 0  # transparent
    Image.fromarray(image).save(tmp_path / "Mine/images/t1.png")
    config = make_config(data__train=[str(tmp_path / "Mine")], train__class_weights="auto")
    said = Lines()
    found = class_weights_of(config, list_tiles(config.data, "train"), None, said)
    # Labelled pixels: 20 x 9 of class 0 and 20 of class 2; 40 x 9 of class 1 and 40 of class 2.
    frequencies = {"Background": 180 / 200, "Forest": 360 / 400, "Grassland": 60 / 600}
    for name, weight in found.items():
        assert weight == pytest.approx(0.9 / frequencies[name] if name in frequencies else 1), name
    assert "train.class_weights auto: Background 1, Forest 1, Grassland 9, Cropland 1," in said.said[0]
    assert said.said[0].endswith("from 2 masks")
    assert class_weights_of(config, [], {"Forest": 5.0}, said) == {"Forest": 5.0}


def test_weights_are_recorded_in_the_run(cached, make_config, small_student):
    summary = train(make_config(train__class_weights="auto", train__max_steps=1), CPU)
    recorded = checkpoint()["kdpipe"]["class_weights"]
    assert list(recorded) == cached.classes.names
    assert len(set(recorded.values())) > 1
    assert read_run(summary.weights).class_weights == recorded


def test_a_real_network_trains_with_every_loss(cached, make_config):
    every = dict.fromkeys(LABELLED_LOSSES, 1.0)
    config = make_config(student__encoder=ENCODER, train__labelled_loss=every, train__max_steps=2, data__val=[])
    assert np.isfinite(train(config, CPU).losses).all()
