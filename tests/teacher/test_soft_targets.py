"""The order of class map and temperature: the map first, so that T changes no class and the best student is the teacher at T 1."""

import numpy as np
import pytest
import torch

from kdpipe.cache import Softening
from kdpipe.cache.encoding import logits as cached_logits
from kdpipe.pipeline.losses import soft_loss
from kdpipe.pipeline.teacher.soft_targets import SoftTargets

CPU = torch.device("cpu")
# Two teacher classes are roofs and roads, which a student calls settlement; one class is divided.
TO_THREE = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0.25, 0.75]], dtype=np.float32)
RENAMED = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32)


def by_hand(logits_TP, class_map_TS, temperature):
    """Soft targets of pixels, float64 `(C_s, P)`, pixel by pixel."""
    columns = []
    for z in logits_TP.T.astype(float):
        probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        powers = (probs @ class_map_TS.astype(float)) ** (1 / temperature)
        columns.append(powers / powers.sum())
    return np.stack(columns, axis=1)


def computed(logits_TP, class_map_TS, temperature):
    soft_targets = SoftTargets(Softening(temperature, class_map_TS), CPU)
    return soft_targets(torch.from_numpy(logits_TP)[None, :, :, None])[0, :, :, 0].numpy()


def random_logits(channels, scale=4.0, pixels=500):
    return (np.random.default_rng(channels).standard_normal((channels, pixels)) * scale).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("class_map", [TO_THREE, RENAMED], ids=["to three", "renamed"])
def test_the_map_comes_first_and_the_temperature_after(class_map, temperature):
    logits = random_logits(len(class_map))
    found = computed(logits, class_map, temperature)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(logits, class_map, temperature), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_temperature_changes_no_class_and_the_best_student_predicts_as_the_teacher_at_t_1(temperature):
    logits = random_logits(4, scale=1.0)
    targets, at_1 = computed(logits, TO_THREE, temperature), by_hand(logits, TO_THREE, 1)
    assert (targets.argmax(axis=0) == at_1.argmax(axis=0)).all()
    student_logits = temperature * np.log(targets.astype(float))  # softmax(s / T) is the target
    student = np.exp(student_logits) / np.exp(student_logits).sum(axis=0)
    np.testing.assert_allclose(student, at_1, atol=1e-5)


def test_the_other_order_would_change_classes():
    """The reason for this order, and the proof that the test above can fail."""
    logits = random_logits(4, scale=1.0)
    powers = np.exp(logits / 4)
    before_map = TO_THREE.T @ (powers / powers.sum(axis=0))
    assert (before_map.argmax(axis=0) != by_hand(logits, TO_THREE, 1).argmax(axis=0)).mean() > 0.1


def test_where_the_map_only_renames_classes_the_target_is_that_of_the_renamed_logits():
    logits = random_logits(3)
    renamed = torch.softmax(torch.from_numpy(logits[[1, 2, 0]]) / 3, dim=0).numpy()
    found = computed(logits, RENAMED, 3.0)
    np.testing.assert_allclose(found[:3], renamed, atol=1e-7)
    assert (found[3] == 0).all()  # no teacher class maps to it


def test_classes_too_unlikely_for_float32_keep_their_place_at_a_high_temperature():
    logits = np.array([[0.0], [-200.0], [-210.0], [-400.0]], dtype=np.float32)
    np.testing.assert_allclose(
        computed(logits, TO_THREE, 100.0), by_hand(logits.astype(np.longdouble), TO_THREE, 100.0), atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_a_cache_of_logits_computes_the_same_in_numpy(temperature):
    logits = random_logits(4)
    softening = Softening(temperature, TO_THREE)
    read = cached_logits.soft_targets(cached_logits.encode(logits[:, :, None], 16), 16, softening)[:, :, 0]
    bound = cached_logits.error_bound(16, 4, 3, temperature)
    assert np.abs(read - computed(logits, TO_THREE, temperature)).max() <= bound < 2e-3


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_the_limits_of_the_temperature_give_finite_targets_and_gradients(temperature):
    student_NSHW = torch.tensor([[-300.0, 0.0, 300.0]]).T[None, :, :, None].requires_grad_()
    softening = Softening(temperature, np.asarray([[0.7, 0.3, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32))
    targets_NSHW = SoftTargets(softening, CPU)(torch.tensor([[300.0, 0.0, -300.0]]).T[None, :, :, None])
    inside_NHW = torch.ones(1, 1, 1, dtype=torch.bool)
    loss = temperature**2 * soft_loss(student_NSHW, targets_NSHW, inside_NHW, temperature)
    loss.backward()
    assert torch.isfinite(targets_NSHW).all()
    assert torch.isfinite(loss)
    assert torch.isfinite(student_NSHW.grad).all()
