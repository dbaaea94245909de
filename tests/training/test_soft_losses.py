"""`distill.loss`, `targets`, `trust` and `class_trust`: the losses of NumPy, and by default the very loss of before."""

import numpy as np
import pytest
import torch
from helpers.doubles import Lines
from helpers.runs import assert_same_weights, checkpoint, weights

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.errors import ConfigError
from kdpipe.data.rasters import read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.losses import distillation_loss, hard_loss, soft_loss
from kdpipe.pipeline.losses.soft import hardened, soft_region_losses, trust_in
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training.objective import Objective, precisions
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")
N, C, H, W = 2, 5, 4, 7
REGIONS = {"dice": 1.0, "jaccard": 0.5}


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, C, H, W, generator=g) * 2
    raw = torch.randn(N, C, H, W, generator=g) * 3
    raw[:, 4] -= 12  # the last class has a little probability everywhere, and is nowhere the most likely one
    inside = torch.ones(N, H, W, dtype=torch.bool)
    inside[1, 2, 4:] = False
    return logits.requires_grad_(), raw.softmax(dim=1) * inside[:, None], inside


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def region_losses_of_numpy(logits, targets, inside, temperature, trust=None):
    """The soft Dice and Jaccard loss, float64."""
    weights = inside.numpy()[:, None] * (1.0 if trust is None else trust.numpy()[:, None])
    q, p = softmax(logits.detach().double().numpy() / temperature), targets.double().numpy()
    both, apart = ((q + p) * weights).sum((0, 2, 3)), (np.abs(q - p) * weights).sum((0, 2, 3))
    shown = [((p.argmax(1) == c) & (weights[:, 0] > 0)).any() for c in range(C)]
    dice = 1 - ((both - apart) / 2 + 0.05) / (both / 2 + 0.05)
    jaccard = 1 - ((both - apart) / 2 + 0.05) / ((both + apart) / 2 + 0.05)
    return (dice * shown).mean(), (jaccard * shown).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_region_losses_are_those_of_numpy(batch, temperature):
    logits, targets, inside = batch
    trust = torch.rand(N, H, W, generator=torch.Generator().manual_seed(1))
    trust[0, :2] = 0
    for given in (None, trust):
        dice, jaccard = region_losses_of_numpy(logits, targets, inside, temperature, given)
        for losses, expected in (({"dice": 1.0}, dice), ({"jaccard": 1.0}, jaccard), (REGIONS, dice + jaccard / 2)):
            found = soft_region_losses(logits, targets, inside, temperature, losses, given)
            assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["dice", "jaccard"])
def test_at_one_hot_targets_a_region_loss_is_the_one_of_labels(batch, loss):
    logits, targets, inside = batch
    labels = targets.argmax(dim=1).masked_fill(~inside, 255)
    found = soft_region_losses(logits, hardened(targets), inside, 1.0, {loss: 1.0})
    expected = hard_loss(logits, labels, 255, {loss: 1.0})
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0].numpy() for value in (found, expected)]
    np.testing.assert_allclose(*gradients, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_soft_loss_is_zero_where_the_student_says_what_the_teacher_says(batch, temperature):
    _, targets, inside = batch
    logits = targets.clamp(min=1e-30).log() * temperature

    def loss(logits):
        return distillation_loss(
            logits, torch.full((N, H, W), 255), inside, targets, alpha=1.0, temperature=temperature, ignore_index=255,
            soft_losses={"kl": 1.0, **REGIONS},
        ).total.item()  # fmt: skip

    assert loss(logits) == pytest.approx(0, abs=1e-5)
    g = torch.Generator().manual_seed(4)
    assert min(loss(logits + 0.01 * torch.randn(logits.shape, generator=g)) for _ in range(20)) > 1e-4
    # The Dice loss of labels, `1 - 2 Σ q p / (Σ q + Σ p)`, is far from it.
    plain = 1 - 2 * (targets**2).sum((0, 2, 3)) / (2 * targets.sum((0, 2, 3)))
    assert plain.max() > 0.3


def test_a_class_that_is_nowhere_the_most_likely_one_adds_nothing(batch):
    logits, targets, inside = batch
    assert targets[:, 4].sum() > 0
    shifted = logits.detach().clone()
    shifted[:, 4] += 3  # more of the class: only what it takes from the others counts
    found = soft_region_losses(shifted, targets, inside, 1.0, {"jaccard": 1.0}).item()
    _, expected = region_losses_of_numpy(shifted, targets, inside, 1.0)
    assert found == pytest.approx(expected, rel=1e-5)
    with_it = targets.clone()
    with_it[0, :, 0, 0] = torch.eye(C)[4]  # one pixel of the class
    assert soft_region_losses(shifted, with_it, inside, 1.0, {"jaccard": 1.0}).item() > expected + 0.1


def test_the_parts_add_up_with_alpha_and_the_square_of_the_temperature(batch):
    logits, targets, inside = batch
    mask = torch.randint(0, C, (N, H, W), generator=torch.Generator().manual_seed(2))
    terms = distillation_loss(
        logits,
        mask,
        inside,
        targets,
        alpha=0.6,
        temperature=2.0,
        ignore_index=255,
        soft_losses={"kl": 3.0, "dice": 2.0},
    )
    soft = 3 * 4 * soft_loss(logits, targets, inside, 2.0) + 2 * soft_region_losses(
        logits, targets, inside, 2.0, {"dice": 1.0}
    )
    assert terms.soft.item() == pytest.approx(soft.item(), rel=1e-6)
    assert terms.total.item() == pytest.approx(0.4 * hard_loss(logits, mask, 255).item() + 0.6 * soft.item(), rel=1e-6)


def test_without_a_pixel_inside_the_losses_are_zero_with_a_gradient_of_zero(batch):
    logits, targets, inside = batch
    found = soft_region_losses(logits, targets * 0, inside & False, 1.0, REGIONS)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == 0
    assert gradient.abs().max() == 0


def test_trust_is_confidence_or_entropy_at_temperature_one(batch):
    _, targets, inside = batch
    p = targets.double().numpy()
    softened = p ** (1 / 2.5) / np.maximum((p ** (1 / 2.5)).sum(1, keepdims=True), 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), axis=1)
    expected = {
        "confidence": p.max(1),
        "entropy": 1 - entropy / np.log(C),
        "threshold": (p.max(1) >= 0.8).astype(float),
    }
    for trust, values in expected.items():
        for given, temperature in ((targets, 1.0), (torch.from_numpy(softened).float(), 2.5)):
            found = trust_in(given, temperature, trust, 0.8, None).numpy()
            np.testing.assert_allclose(found[inside], values[inside.numpy()], atol=1e-5)
    assert trust_in(targets, 1.0, "none", 0.8, None) is None
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    by_class = trust_in(targets, 1.0, "confidence", 0.8, shares).numpy()
    np.testing.assert_allclose(by_class[inside], (p.max(1) * shares.numpy()[p.argmax(1)])[inside.numpy()], atol=1e-6)


def test_trust_weighs_the_pixels_of_the_kl_and_the_mean_stays_over_all(batch):
    logits, targets, inside = batch
    trust = torch.zeros(N, H, W)
    trust[0, 1:, 2:5] = 0.5
    alone = torch.zeros_like(inside)
    alone[0, 1:, 2:5] = True
    found = soft_loss(logits, targets, inside, 2.0, trust_NHW=trust)
    expected = 0.5 * soft_loss(logits, targets, alone, 2.0) * alone.sum() / inside.sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_precisions_are_shares_of_what_was_predicted():
    confusion = np.array([[6, 2, 0], [1, 2, 0], [3, 0, 0]])
    assert precisions(confusion) == pytest.approx([0.6, 0.5, 8 / 14])
    assert precisions(np.zeros((2, 2), int)) == [1, 1]


def terms_of(config, batch, entropy_error=None, **given):
    logits, targets, inside = batch
    mask = torch.full((N, H, W), 255)
    return Objective(config, CPU, **given)(logits, mask, inside, targets, entropy_error).total.item()


@pytest.fixture
def six():
    """A batch with the classes of the configuration."""
    g = torch.Generator().manual_seed(3)
    inside = torch.ones(N, H, W, dtype=torch.bool)
    logits, raw = (torch.randn(N, 6, H, W, generator=g) * 3 for _ in range(2))
    return logits, raw.softmax(dim=1), inside


def test_the_configuration_chooses_the_loss(make_config, six):
    logits, targets, inside = six
    at_one = {"distill__temperature": 1.0, "distill__alpha": 1.0}

    def kl(target):
        return soft_loss(logits, target, inside, 1.0).item()

    assert terms_of(make_config(**at_one, distill__loss="kl"), six, torch.ones(N)) == pytest.approx(kl(targets) - 1)
    assert terms_of(make_config(**at_one, distill__targets="hard"), six, torch.ones(N)) == pytest.approx(
        kl(hardened(targets)), rel=1e-6
    )
    at_two = make_config(distill__temperature=2.0, distill__alpha=1.0, distill__targets="hard")
    assert terms_of(at_two, six) == pytest.approx(kl(hardened(targets)), rel=1e-6)
    both = soft_region_losses(logits, targets, inside, 1.0, {"dice": 2.0, "jaccard": 1.0}).item()
    found = terms_of(make_config(**at_one, distill__loss={"dice": 2, "jaccard": 1}), six)
    assert found == pytest.approx(both, rel=1e-6)
    sure = targets.amax(dim=1) >= 0.7
    found = terms_of(make_config(**at_one, distill__trust="threshold", distill__trust_threshold=0.7), six)
    assert found == pytest.approx(soft_loss(logits, targets, inside, 1.0, trust_NHW=sure.float()).item(), rel=1e-6)
    names = make_config().classes.names
    config = make_config(**at_one, distill__class_trust={names[1]: 0.25})
    shares = {name: 0.25 if name == names[1] else 1.0 for name in names}
    weights = torch.where(targets.argmax(dim=1) == 1, 0.25, 1.0)
    found = terms_of(config, six, class_trust=shares)
    assert found == pytest.approx(soft_loss(logits, targets, inside, 1.0, trust_NHW=weights).item(), rel=1e-6)


def test_a_run_with_every_key_resumes_to_the_same_weights(make_config, cached, small_student):
    options = {"distill__loss": {"kl": 1, "dice": 1}, "distill__trust": "confidence", "distill__class_trust": "auto"}
    said = Lines()
    whole = train(make_config(name="whole", **options), CPU, progress=said)
    (line,) = [line for line in said.said if "class_trust" in line]
    assert line.startswith("distill.class_trust auto: Background ")
    train(make_config(name="parts", train__max_steps=2, **options), CPU)
    said = Lines()
    train(make_config(name="parts", **options), CPU, resume=True, progress=said)
    assert not [line for line in said.said if "class_trust" in line], "it was found when the run began"
    assert_same_weights(weights("whole"), weights("parts"))
    assert read_run(whole.weights).class_trust == checkpoint("whole")["kdpipe"]["class_trust"]


def test_auto_trust_is_the_precision_of_the_cached_targets(make_config, cached, small_student):
    """With crops that are whole tiles at scale 1, the pixels are those of the files."""
    plain = {"train__scales": [1.0], "train__mosaic": 0.0, "train__max_class_share": 1.0, "train__crop": 128}
    config = make_config(distill__class_trust="auto", train__max_steps=1, **plain)
    train(config, CPU)
    cache, names = SoftTargetCache.open(config.cache.path), config.classes.names
    labels, classes = [], []
    for tile in list_tiles(config.data, "train"):
        if tile.mask is not None:
            labels.append(read_mask(tile.mask, len(names), 255, config.mask_codes).ravel())
            classes.append(cache.read(tile.id).argmax(0).ravel())
    labels, classes = np.concatenate(labels), np.concatenate(classes)[np.concatenate(labels) != 255]
    labels = labels[labels != 255]
    found = checkpoint(config.name)["kdpipe"]["class_trust"]
    overall = (labels == classes).mean()
    for number, name in enumerate(names):
        said = classes == number
        assert found[name] == pytest.approx((labels[said] == number).mean() if said.any() else overall), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loss", {"ce": 1}, r"distill\.loss: needs one or more of kl, dice, jaccard, found ce"),
        ("loss", {"kl:1": None}, r"found kl:1; YAML needs a space after a colon: \{name: 1\}"),
        ("loss", {}, r"distill\.loss: needs one or more of kl, dice, jaccard, found none"),
        ("loss", {"kl": -1}, r"distill\.loss: expected weights from 0\.000001 to 1000000, found kl: -1"),
        ("loss", "huber", r"distill\.loss: expected kl, dice, jaccard, weights of them such as \{kl: 1\.0, dice: 1\.0\}, or"),
        ("targets", "one", r"distill\.targets: "),
        ("class_trust", {"Forrest": 0.5}, r"distill\.class_trust names \['Forrest'\], not among classes\.names"),
        ("class_trust", {"Forest": 2}, r"distill\.class_trust: .*from 0\.000000 to 1, found Forest: 2"),
        ("trust_threshold", 0.5, r"distill: trust_threshold is 0\.5, and trust is none: it counts with trust: threshold alone"),
        ("trust", "yes", r"distill\.trust: "),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(make_config, key, value, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**{f"distill__{key}": value})


def test_a_loss_of_ones_own_weighs_its_own_pixels(make_config):
    with pytest.raises(
        ConfigError, match="trust and class_trust weigh the pixels of kl, dice and jaccard, and loss is"
    ):
        make_config(distill__loss="my_losses:mse", distill__trust="confidence")


def test_the_usual_loss_leaves_no_key_in_the_configuration(make_config):
    kept = make_config().model_dump()["distill"].keys()
    assert not {"loss", "targets", "trust", "trust_threshold", "class_trust"} & kept
