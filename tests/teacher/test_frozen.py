"""A frozen teacher's predictions, against smp itself and NumPy: channels, several teachers, views and windows."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from kdpipe.configs.errors import CheckpointError, KdpipeError
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.teacher.frozen import open_teacher

OPENEARTHMAP = ["Unknown", "Bareland", "Rangeland", "Developed", "Road", "Tree", "Water", "Cropland", "Building"]
NINE_TO_SIX = {
    "Bareland": {"SemiNatural": 1},
    "Rangeland": {"Grassland": 0.7, "SemiNatural": 0.3},
    "Developed": {"Settlement": 1},
    "Road": {"Settlement": 1},
    "Tree": {"Forest": 1},
    "Water": {"Background": 1},
    "Cropland": {"Cropland": 1},
    "Building": {"Settlement": 1},
}


def images(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def opened(config):
    return open_teacher(config, complete_recipe(config, None, None), torch.device("cpu"))


def softmax(z, axis):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def softened(probs_NTHW, class_map_TS, temperature=2.0):
    """The soft targets of probabilities at T 1: the class map, then the temperature."""
    mapped = np.einsum("nthw,ts->nshw", probs_NTHW, class_map_TS) ** (1 / temperature)
    return mapped / mapped.sum(axis=1, keepdims=True)


def logits_of(network, images_NHWC):
    """The logits of smp's own network, float64 `(N, C, H, W)`, of `x / 255`."""
    with torch.no_grad():
        return network(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 255).double().numpy()


@pytest.fixture
def network(teacher_file):
    """The configured teacher as smp has it."""
    model = create_smp_model("unet", "mobilenet_v2", 8, key="teacher").eval()
    model.load_state_dict(torch.load(teacher_file, weights_only=True))
    return model


def test_a_teacher_predicts_as_smp_itself_on_a_size_that_needs_no_padding(make_config, network):
    config, picture = make_config(), images(64, 96)
    expected = softened(softmax(logits_of(network, picture), axis=1), config.class_map_matrix())
    np.testing.assert_allclose(opened(config).soft_targets(picture), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3)])
def test_tiles_smaller_than_their_padding_are_predicted(make_config, size):
    assert opened(make_config()).soft_targets(images(*size)).shape == (1, 6, *size)


@pytest.fixture
def nine_channels(tmp_path):
    """A network of nine channels with scSE attention, and its file."""
    torch.manual_seed(5)
    source = smp.Unet("mobilenet_v2", encoder_weights=None, classes=9, decoder_attention_type="scse").eval()
    with torch.no_grad():
        source.segmentation_head[0].weight *= 8
    half = {name: value.half() for name, value in source.state_dict().items()}
    torch.save({"state_dict": {f"net.{name}": value for name, value in half.items()}}, tmp_path / "nine.ckpt")
    source.load_state_dict(half)
    return source, str(tmp_path / "nine.ckpt")


def test_dropped_channels_leave_the_softmax_to_the_others(make_config, nine_channels):
    source, path = nine_channels
    config = make_config(
        teacher__checkpoint=path, teacher__classes=OPENEARTHMAP, teacher__drop_channels=[0, 3],
        class_map={name: row for name, row in NINE_TO_SIX.items() if name != "Developed"},
    )  # fmt: skip
    picture = images(64, 96)
    kept = softmax(logits_of(source, picture)[:, [1, 2, 4, 5, 6, 7, 8]], axis=1)
    columns = [[5], [2, 5], [4], [1], [0], [3], [4]]  # the student's, for each kept channel
    mapped = np.zeros((1, 6, 64, 96))
    for channel, targets in enumerate(columns):
        for column, share in zip(targets, [0.7, 0.3] if len(targets) == 2 else [1], strict=True):
            mapped[:, column] += share * kept[:, channel]
    expected = np.sqrt(mapped) / np.sqrt(mapped).sum(axis=1)  # T is 2
    np.testing.assert_allclose(opened(config).soft_targets(picture), expected, atol=1e-5)


def test_a_row_for_the_unknown_class_keeps_its_probability(make_config, nine_channels):
    source, path = nine_channels
    rows = {"Unknown": {"Background": 1}, **NINE_TO_SIX}
    config = make_config(teacher__checkpoint=path, teacher__classes=OPENEARTHMAP, class_map=rows)
    picture = images(64, 96)
    probs = softmax(logits_of(source, picture), axis=1)
    found = opened(config).soft_targets(picture) ** 2  # T is 2
    found /= found.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found[:, 0], probs[:, 0] + probs[:, 6], atol=1e-5)  # Unknown and Water
    np.testing.assert_allclose(found[:, 4], probs[:, [3, 4, 8]].sum(axis=1), atol=1e-5)  # Developed, Road, Building


@pytest.fixture
def two_teachers(make_config, nine_channels, tmp_path):
    """
    Two networks, and a configuration that averages them with the weights 1 and 3.

    The second has another architecture, encoder, channel order and normalisation.
    """
    torch.manual_seed(6)
    second = smp.FPN("resnet18", encoder_weights=None, classes=8).eval()
    torch.save(second.state_dict(), tmp_path / "second.pth")
    first, path = nine_channels
    members = [
        {
            "architecture": "unet",
            "encoder": "mobilenet_v2",
            "checkpoint": path,
            "classes": OPENEARTHMAP,
            "drop_channels": [0],
        },
        {
            "architecture": "fpn",
            "encoder": "resnet18",
            "checkpoint": str(tmp_path / "second.pth"),
            "classes": OPENEARTHMAP[:0:-1],
            "normalize": "imagenet",
            "weight": 3,
        },
    ]
    return first, second, make_config(teacher=None, teachers=members, class_map=NINE_TO_SIX)


@pytest.mark.long
def test_several_teachers_are_averaged_as_logits_by_name_and_weight(two_teachers):
    first, second, config = two_teachers
    picture = images(64, 96)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = ((picture / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        theirs = second(torch.from_numpy(inputs)).double().numpy()[:, ::-1]
    logits = (logits_of(first, picture)[:, 1:] + 3 * theirs) / 4
    np.testing.assert_allclose(opened(config).logits(picture).numpy(), logits, atol=2e-5)
    expected = softened(softmax(logits, axis=1), config.class_map_matrix().astype(float))
    np.testing.assert_allclose(opened(config).soft_targets(picture), expected, atol=1e-5)


@pytest.mark.long
def test_each_teacher_predicts_in_its_own_views_and_windows(two_teachers):
    *_, config = two_teachers
    picture = images(96, 128)
    changed = {"tta": "flips", "scales": [0.5, 1.0]}, {"window": 64}
    members = [member.model_copy(update=update) for member, update in zip(config.teachers, changed, strict=True)]
    found = opened(config.model_copy(update={"teachers": members})).logits(picture)
    alone = [
        opened(config.model_copy(update={"teachers": [member.model_copy(update={"weight": 1})]})).logits(picture)
        for member in members
    ]
    order = [members[1].kept_classes.index(name) for name in members[0].kept_classes]
    torch.testing.assert_close(found, (alone[0] + 3 * alone[1][:, order]) / 4, atol=1e-5, rtol=0)


def test_a_misfitting_member_is_named(two_teachers):
    *_, config = two_teachers
    for change, message in (
        ({"encoder": "resnet34"}, r"fpn with resnet18, 8 channels, but teachers\.1 says fpn with resnet34"),
        ({"checkpoint": "absent.pth"}, r"teachers\.1\.checkpoint: no file at .*absent\.pth"),
    ):
        members = [config.teachers[0], config.teachers[1].model_copy(update=change)]
        with pytest.raises(CheckpointError, match=message):
            opened(config.model_copy(update={"teachers": members}))


def test_windows_are_weighted_as_a_hand_made_blend_of_smps_own_logits(make_config, network):
    """Windows of 64 px over 96 × 128: tops 0 and 32, lefts 0, 32 and 64; weights fall to the borders and sum to one."""
    config, picture = make_config(teacher__window=64), images(96, 128)
    fall = np.minimum(np.arange(64) + 0.5, 63.5 - np.arange(64))
    total, weights = np.zeros((1, 8, 96, 128)), np.zeros((96, 128))
    for top in (0, 32):
        for left in (0, 32, 64):
            window = (..., slice(top, top + 64), slice(left, left + 64))
            total[window] += logits_of(network, picture[:, top : top + 64, left : left + 64]) * np.outer(fall, fall)
            weights[window] += np.outer(fall, fall)
    np.testing.assert_allclose(opened(config).logits(picture).numpy(), total / weights, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["soft", "logits"])
def test_a_scenes_bands_are_what_its_windows_blend_to(make_config, kind):
    teacher, picture = opened(make_config(teacher__window=64, cache__kind=kind)), images(200, 130)
    bands = list(teacher.cached_bands(lambda top, bottom: picture[0, top:bottom], *picture.shape[1:3]))
    assert len(bands) > 2
    logits = teacher.logits(picture)
    expected = logits.numpy() if kind == "logits" else teacher.targets_of(logits)
    np.testing.assert_allclose(np.concatenate(bands, axis=1), expected[0], atol=1e-5)
    np.testing.assert_array_equal(teacher.cached_values(picture)[0], np.concatenate(bands, axis=1))


def test_logits_that_are_not_finite_stop_with_advice(make_config, teacher_file, tmp_path):
    state = torch.load(teacher_file, weights_only=True)
    state["segmentation_head.0.weight"].fill_(3e38)  # finite, and no sum of them is
    torch.save(state, tmp_path / "t.pth")
    teacher = opened(make_config(teacher__checkpoint=str(tmp_path / "t.pth")))
    with pytest.raises(KdpipeError, match="not finite, in precision fp32"):
        teacher.soft_targets(images(32, 32))
