"""Loss, scores and the class-map check against a few lines of NumPy, torchmetrics and smp."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_jaccard_index

from kdpipe.configs import load_config
from kdpipe.pipeline.evaluation.confusion import count_pairs, scores
from kdpipe.pipeline.losses import distillation_loss, hard_loss, soft_loss
from kdpipe.pipeline.verify.class_map import check_class_map

N, C, H, W, T = 2, 5, 3, 7, 2.5


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(N, C, H, W, generator=g, dtype=torch.float32) * 2
    targets = torch.softmax(torch.randn(N, C, H, W, generator=g) * 3, dim=1)
    targets[0, :, 0, 0] = torch.tensor([1.0, 0, 0, 0, 0])
    mask = torch.randint(0, C, (N, H, W), generator=g)
    mask[1, 0, :3] = 255
    inside = torch.ones(N, H, W, dtype=torch.bool)
    inside[1, 2, 4:] = False
    targets[1, :, 2, 4:] = 0
    return logits.requires_grad_(), targets, mask, inside


def softmax(z, axis):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def test_soft_loss_is_kl_summed_over_classes_and_averaged_over_inside_pixels(batch):
    logits, targets, _, inside = batch
    z, p = logits.detach().double().numpy(), targets.double().numpy()
    values = []
    for n, y, x in np.argwhere(inside.numpy()):
        q = softmax(z[n, :, y, x] / T, 0)
        values.append(sum(a * np.log(a / b) for a, b in zip(p[n, :, y, x], q, strict=True) if a > 0))
    assert soft_loss(logits, targets, inside, T).item() == pytest.approx(np.mean(values), rel=1e-5)


def test_the_gradient_is_alpha_t_times_the_difference_of_probabilities(batch):
    logits, targets, mask, inside = batch
    terms = distillation_loss(logits, mask, inside, targets, alpha=1.0, temperature=T, ignore_index=255)
    (gradient,) = torch.autograd.grad(terms.total, logits)
    expected = (
        T * (softmax(logits.detach().numpy() / T, 1) - targets.numpy()) * inside.numpy()[:, None] / inside.sum().item()
    )
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-6)


def test_hard_loss_is_smoothed_cross_entropy_plus_dice_over_labelled_pixels(batch):
    logits, _, mask, _ = batch
    known = mask.numpy() != 255
    q = softmax(logits.detach().double().numpy(), 1).transpose(0, 2, 3, 1)[known]
    labels = mask.numpy()[known]
    log_q = np.log(q)
    cross_entropy = (-0.95 * log_q[np.arange(len(labels)), labels] - 0.05 / C * log_q.sum(axis=1)).mean()
    onehot = np.eye(C)[labels]
    # smp since 0.6: Tversky with 0.5 and 0.5, so that the smoothing stands beside half the sum of both areas.
    dice = 1 - ((q * onehot).sum(0) + 0.05) / ((q.sum(0) + onehot.sum(0)) / 2 + 0.05)
    assert hard_loss(logits, mask, 255).item() == pytest.approx(
        cross_entropy + (dice * (onehot.sum(0) > 0)).mean(), rel=1e-5
    )


def test_hard_loss_is_smps_own_if_every_pixel_is_labelled(batch):
    logits, _, mask, _ = batch
    mask = mask.clamp(max=C - 1)
    own = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.05)(logits, mask)
    own = own + smp.losses.DiceLoss(mode="multiclass", smooth=0.05)(logits, mask)
    assert hard_loss(logits, mask, 255).item() == pytest.approx(own.item(), rel=1e-6)


def test_hard_loss_and_its_gradient_are_smps_dice_beside_cross_entropy_with_ignored_pixels():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, 9, generator=g, requires_grad=True)
    mask = torch.randint(0, 4, (2, 7, 9), generator=g)
    mask[0, 0] = 255
    cross_entropy = F.cross_entropy(logits, mask, ignore_index=255, label_smoothing=0.05)
    expected = cross_entropy + smp.losses.DiceLoss("multiclass", smooth=0.05, ignore_index=255)(logits, mask)
    found = hard_loss(logits, mask, 255)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_total_weighs_hard_and_soft_and_is_hard_alone_without_targets(batch):
    logits, targets, mask, inside = batch
    terms = distillation_loss(logits, mask, inside, targets, alpha=0.7, temperature=T, ignore_index=255)
    assert terms.total.item() == pytest.approx(0.3 * terms.hard.item() + 0.7 * T**2 * terms.soft.item(), rel=1e-6)
    alone = distillation_loss(logits, mask, inside, None, alpha=0.7, temperature=T, ignore_index=255)
    assert alone.total.item() == terms.hard.item()


def test_padding_never_enters_the_loss(batch):
    logits, targets, mask, inside = batch
    mask = mask.masked_fill(~inside, 255)
    before = distillation_loss(logits, mask, inside, targets, alpha=0.7, temperature=T, ignore_index=255).total
    changed = torch.where(inside[:, None], logits, logits + 50 * torch.rand(N, C, H, W))
    after = distillation_loss(changed, mask, inside, targets, alpha=0.7, temperature=T, ignore_index=255).total
    assert before.item() == pytest.approx(after.item(), rel=1e-6)


def test_a_batch_without_a_label_or_without_an_inside_pixel_yields_no_nan(batch):
    logits, targets, mask, inside = batch
    for marked in (inside, torch.zeros_like(inside)):
        unlabelled, padded = torch.full_like(mask, 255), targets * marked[:, None]
        terms = distillation_loss(logits, unlabelled, marked, padded, alpha=0.7, temperature=T, ignore_index=255)
        (gradient,) = torch.autograd.grad(terms.total, logits)
        assert terms.hard.item() == 0
        assert torch.isfinite(terms.total)
        assert torch.isfinite(gradient).all()


def test_entropy_error_moves_the_value_and_not_the_gradient(batch):
    logits, targets, _, inside = batch
    lost = torch.tensor([0.01, 0.03])
    plain, corrected = soft_loss(logits, targets, inside, T), soft_loss(logits, targets, inside, T, lost)
    pixels = inside.sum(dim=(1, 2)).double()
    assert (plain - corrected).item() == pytest.approx(((lost * pixels).sum() / pixels.sum()).item(), abs=1e-6)
    one, two = (torch.autograd.grad(loss, logits)[0] for loss in (plain, corrected))
    assert torch.equal(one, two)


def test_auxiliary_logits_add_two_fifths_of_their_hard_loss(batch):
    logits, targets, mask, inside = batch
    options = {"alpha": 0.7, "temperature": T, "ignore_index": 255}
    auxiliary = torch.roll(logits.detach(), 1, dims=1)
    plain = distillation_loss(logits, mask, inside, targets, **options)
    both = distillation_loss(logits, mask, inside, targets, **options, auxiliary_NCHW=auxiliary)
    added = 0.4 * hard_loss(auxiliary, mask, 255)
    assert (both.hard - plain.hard).item() == pytest.approx(added.item(), rel=1e-5)
    assert (both.total - plain.total).item() == pytest.approx(0.3 * added.item(), rel=1e-5)
    assert both.soft.item() == plain.soft.item()


def test_half_precision_logits_are_computed_in_float32(batch):
    logits, targets, mask, inside = batch
    half = logits.detach().bfloat16()
    terms = distillation_loss(half, mask, inside, targets, alpha=0.7, temperature=T, ignore_index=255)
    exact = distillation_loss(half.float(), mask, inside, targets, alpha=0.7, temperature=T, ignore_index=255)
    assert terms.total.dtype == torch.float32
    assert terms.total.item() == exact.total.item()


def test_scores_equal_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, C, (2, 20, 30))
    labels[0, :9] = 255
    names = list("abcde")
    found = scores(count_pairs(labels, answers, C, C, 255), names, [])
    a, b = torch.from_numpy(answers), torch.from_numpy(labels)
    np.testing.assert_allclose(
        list(found.iou.values()), multiclass_jaccard_index(a, b, C, average=None, ignore_index=255), atol=1e-6
    )
    np.testing.assert_allclose(
        list(found.f1.values()), multiclass_f1_score(a, b, C, average=None, ignore_index=255), atol=1e-6
    )
    assert found.overall_accuracy == pytest.approx(
        multiclass_accuracy(a, b, C, average="micro", ignore_index=255).item()
    )
    assert found.miou == pytest.approx(np.mean(list(found.iou.values())))


def test_absent_and_unscored_classes_are_left_out_and_named():
    confusion = np.array([[8, 2, 0], [1, 9, 3], [0, 0, 0]])
    found = scores(confusion, ["a", "b", "c"], ["a"])
    assert found.left_out == {"a": "not scored", "c": "absent from the labels"}
    assert found.iou == {"a": 8 / 11, "b": 9 / 15, "c": None}
    assert found.miou == 9 / 15
    assert found.overall_accuracy == 17 / 23


def counts_by_tile(config, order, tiles=8, right=0.8):
    """Pixel counts (K, S, T) of a teacher that is mostly right and whose channels come in `order`."""
    rng = np.random.default_rng(0)
    num_labels, num_answers = len(config.classes.names), len(config.teacher_classes)
    truth = config.class_map_matrix().argmax(axis=1)
    counts = np.zeros((tiles, num_labels, num_answers), dtype=np.int64)
    for k in range(tiles):
        for t in range(num_answers):
            counts[k, truth[t], order[t]] += int(1000 * right)
            counts[k, :, order[t]] += rng.integers(0, int(2000 * (1 - right) / num_labels), num_labels)
    return counts


def test_a_right_class_map_is_not_questioned():
    config = load_config("dubai/linknet_kd")
    assert not [row for row in check_class_map(counts_by_tile(config, range(8)), config) if row.clearly_better]


def test_two_channels_in_each_others_place_are_both_named():
    config = load_config("dubai/linknet_kd")
    found = {
        r.name: r.fitting
        for r in check_class_map(counts_by_tile(config, [6, 1, 2, 3, 4, 5, 0, 7]), config)
        if r.clearly_better
    }
    assert found == {"Tree": "Background", "Water": "Forest"}


def test_one_odd_tile_and_rare_classes_do_not_question_the_map():
    config = load_config("dubai/linknet_kd")
    counts = counts_by_tile(config, range(8))
    counts[0] = counts_by_tile(config, [6, 1, 2, 3, 4, 5, 0, 7])[0] * 10
    assert not [row for row in check_class_map(counts, config) if row.clearly_better]
    counts = counts_by_tile(config, range(8))
    counts[:, :, 0] = 0
    counts[:, 5, 0] = 1
    assert "Tree" not in {row.name for row in check_class_map(counts, config)}
