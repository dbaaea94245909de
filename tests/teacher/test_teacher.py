"""The teacher is loaded strictly and asked exactly."""

import argparse
import re
import textwrap
import warnings

import numpy as np
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
import yaml
from torch import nn

from kdpipe.configs.errors import CheckpointError, ConfigError, KdpipeError
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.models import windows
from kdpipe.pipeline.models.recognise import recognise
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.models.views import averaged_logits, padded_logits
from kdpipe.pipeline.models.windows import blended_bands, blended_logits
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.teacher.frozen import open_teacher, soft_targets
from kdpipe.pipeline.teacher.loading import load_teacher

CPU = torch.device("cpu")


def images(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def asked(config):
    recipe = complete_recipe(config, None, None)
    return open_teacher(config, recipe, CPU)


def test_soft_targets_are_softmax_at_t_and_then_the_map():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 4, 3, 5)).astype(np.float32) * 3
    class_map = rng.dirichlet(np.ones(3), size=4).astype(np.float32)
    expected = np.empty((2, 3, 3, 5))
    for n in range(2):
        for y in range(3):
            for x in range(5):
                e = np.exp(logits[n, :, y, x].astype(float) / 2.5)
                expected[n, :, y, x] = (e / e.sum()) @ class_map
    answer = soft_targets(torch.from_numpy(logits), torch.from_numpy(class_map), 2.5).numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-6)


def test_teacher_answers_as_smp_itself_on_a_size_that_needs_no_padding(make_config):
    config = make_config()
    picture = images(64, 96)
    model = create_smp_model("unet", "mobilenet_v2", 8, key="teacher").eval()
    model.load_state_dict(torch.load(config.teacher.checkpoint, weights_only=True))
    with torch.no_grad():
        logits = model(torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255)
    expected = torch.softmax(logits / 2.0, dim=1).permute(0, 2, 3, 1).numpy() @ config.class_map_matrix()
    np.testing.assert_allclose(asked(config).soft_targets(picture), expected.transpose(0, 3, 1, 2), atol=1e-5)


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


def softmax(z, axis):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@pytest.fixture
def nine_channels(tmp_path):
    """A network of nine channels with scSE attention, and its file."""
    torch.manual_seed(5)
    source = smp.Unet("mobilenet_v2", encoder_weights=None, classes=9, decoder_attention_type="scse").eval()
    with torch.no_grad():
        source.segmentation_head[0].weight *= 8
    torch.save(
        {"state_dict": {f"net.{name}": value.half() for name, value in source.state_dict().items()}},
        tmp_path / "nine.ckpt",
    )
    source.load_state_dict({name: value.half() for name, value in source.state_dict().items()})
    return source, str(tmp_path / "nine.ckpt")


def logits_of(network, picture):
    with torch.no_grad():
        return network(torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255).double().numpy()


def test_dropped_channels_leave_the_softmax_to_the_others(make_config, nine_channels):
    network, path = nine_channels
    config = make_config(
        teacher__checkpoint=path, teacher__classes=OPENEARTHMAP, teacher__drop_channels=[0, 3],
        class_map={name: row for name, row in NINE_TO_SIX.items() if name != "Developed"},
    )  # fmt: skip
    picture = images(64, 96)
    kept = softmax(logits_of(network, picture)[:, [1, 2, 4, 5, 6, 7, 8]] / 2.0, axis=1)
    columns = [[5], [2, 5], [4], [1], [0], [3], [4]]  # of the student, for each kept channel
    expected = np.zeros((1, 6, 64, 96))
    for channel, targets in enumerate(columns):
        for column, share in zip(targets, [0.7, 0.3] if len(targets) == 2 else [1], strict=True):
            expected[:, column] += share * kept[:, channel]
    np.testing.assert_allclose(asked(config).soft_targets(picture), expected, atol=1e-5)


def test_a_row_for_the_unknown_class_keeps_its_probability(make_config, nine_channels):
    network, path = nine_channels
    rows = {"Unknown": {"Background": 1}, **NINE_TO_SIX}
    config = make_config(teacher__checkpoint=path, teacher__classes=OPENEARTHMAP, class_map=rows)
    picture = images(64, 96)
    probs = softmax(logits_of(network, picture) / 2.0, axis=1)
    found = asked(config).soft_targets(picture)
    np.testing.assert_allclose(found[:, 0], probs[:, 0] + probs[:, 6], atol=1e-5)  # Unknown and Water
    np.testing.assert_allclose(found[:, 4], probs[:, [3, 4, 8]].sum(axis=1), atol=1e-5)  # Developed, Road, Building


EIGHT_OF_NINE = OPENEARTHMAP[1:]


@pytest.fixture
def two_teachers(make_config, nine_channels, tmp_path):
    """
    Two networks with their files, and a config that averages them with the weights 1 and 3.

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
            "classes": EIGHT_OF_NINE[::-1],
            "normalize": "imagenet",
            "weight": 3,
        },
    ]

    def make(**overrides):
        return make_config(teacher=None, teachers=members, class_map=NINE_TO_SIX, **overrides)

    return first, second, make


def test_several_teachers_are_averaged_as_logits_by_name_and_weight(two_teachers):
    first, second, make = two_teachers
    picture = images(64, 96)
    config = make()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = ((picture / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        theirs = second(torch.from_numpy(inputs)).double().numpy()[:, ::-1]
    logits = (logits_of(first, picture)[:, 1:] + 3 * theirs) / 4
    np.testing.assert_allclose(asked(config).logits(picture).numpy(), logits, atol=2e-5)
    expected = np.einsum("nthw,ts->nshw", softmax(logits / 2.0, axis=1), config.class_map_matrix().astype(float))
    np.testing.assert_allclose(asked(config).soft_targets(picture), expected, atol=1e-5)


def test_each_teacher_is_asked_in_its_own_views_and_windows(two_teachers):
    _, _, make = two_teachers
    config, picture = make(), images(96, 128)
    first, second = config.teachers
    changed = {"tta": "flips", "scales": [0.5, 1.0]}, {"window": 64}
    members = [member.model_copy(update=update) for member, update in zip((first, second), changed, strict=True)]
    found = asked(config.model_copy(update={"teachers": members})).logits(picture)
    alone = [
        asked(config.model_copy(update={"teachers": [member.model_copy(update={"weight": 1})]})).logits(picture)
        for member in members
    ]
    order = [members[1].kept_classes.index(name) for name in members[0].kept_classes]
    torch.testing.assert_close(found, (alone[0] + 3 * alone[1][:, order]) / 4, atol=1e-5, rtol=0)


def test_a_misfitting_member_is_named(two_teachers):
    _, _, make = two_teachers
    config = make()
    members = [config.teachers[0], config.teachers[1].model_copy(update={"encoder": "resnet34"})]
    with pytest.raises(
        CheckpointError, match=r"holds fpn with resnet18, 8 channels, but teachers\.1 says fpn with resnet34"
    ):
        asked(config.model_copy(update={"teachers": members}))
    members[1] = config.teachers[1].model_copy(update={"checkpoint": "absent.pth"})
    with pytest.raises(CheckpointError, match=r"teachers\.1\.checkpoint: no file at .*absent\.pth"):
        asked(config.model_copy(update={"teachers": members}))


def test_odd_sizes_are_mirrored_below_and_right_and_cropped_back():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x):
            seen["x"] = x
            return x

    picture = torch.arange(33 * 45, dtype=torch.float32).view(1, 1, 33, 45)
    answer = padded_logits(Spy(), picture)
    expected = np.pad(picture[0, 0].numpy(), ((0, 31), (0, 19)), mode="reflect")
    np.testing.assert_array_equal(seen["x"][0, 0].numpy(), expected)
    assert torch.equal(answer, picture)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3)])
def test_tiles_smaller_than_their_padding_are_answered(make_config, size):
    assert asked(make_config()).soft_targets(images(*size)).shape == (1, 6, *size)


class Local(nn.Module):
    """A network of one 3×3 convolution that is not symmetric: turning its input is not turning its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        return self.conv(x)


def test_d4_averages_the_eight_views_in_the_images_own_frame():
    model = Local()
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    answers = []
    with torch.no_grad():
        for mirror in (False, True):
            for turns in range(4):
                view = np.rot90(x.numpy()[..., ::-1] if mirror else x.numpy(), turns, axes=(2, 3)).copy()
                back = np.rot90(model(torch.from_numpy(view)).numpy(), -turns, axes=(2, 3))
                answers.append(back[..., ::-1] if mirror else back)
        found = averaged_logits(model, x, tta="d4", scales=[1.0]).numpy()
        flips = averaged_logits(model, x, tta="flips", scales=[1.0]).numpy()
        plain = averaged_logits(model, x, tta="none", scales=[1.0]).numpy()
    np.testing.assert_allclose(found, np.mean(answers, axis=0), atol=1e-5)
    np.testing.assert_allclose(flips, np.mean([answers[i] for i in (0, 2, 4, 6)], axis=0), atol=1e-5)
    assert np.abs(found - plain).max() > 1e-2


def test_views_and_scales_of_an_odd_rectangle_are_padded_each_in_its_own_frame():
    """Against NumPy: turn, mirror the border up to a multiple of 32 px, ask, crop, turn back, at two sizes."""
    model, x = Local(), torch.randn(1, 3, 45, 70, generator=torch.Generator().manual_seed(4))
    answers = []
    with torch.no_grad():
        for size in ((34, 52), (45, 70)):  # 0.75 × 45 = 33.75, 0.75 × 70 = 52.5, which rounds to even
            scaled = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False).numpy()
            for turns in range(4):
                for mirror in (False, True):
                    view = np.rot90(scaled[..., ::-1] if mirror else scaled, turns, axes=(2, 3))
                    height, width = view.shape[2:]
                    border = [(0, 0), (0, 0), (0, -height % 32), (0, -width % 32)]
                    answer = model(torch.from_numpy(np.pad(view, border, mode="reflect"))).numpy()[..., :height, :width]
                    back = np.rot90(answer, -turns, axes=(2, 3))
                    back = torch.from_numpy((back[..., ::-1] if mirror else back).copy())
                    answers.append(nn.functional.interpolate(back, size=(45, 70), mode="bilinear", align_corners=False))
        found = averaged_logits(model, x, tta="d4", scales=[0.75, 1.0])
    torch.testing.assert_close(found, torch.stack(answers).mean(dim=0), atol=1e-5, rtol=0)


def test_scales_are_averaged_at_the_images_size():
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    half = nn.functional.interpolate(x, size=(32, 48), mode="bilinear", align_corners=False)
    back = nn.functional.interpolate(half, size=(64, 96), mode="bilinear", align_corners=False)
    found = averaged_logits(nn.Identity(), x, tta="none", scales=[0.5, 1.0])
    torch.testing.assert_close(found, (x + back) / 2)


@pytest.mark.parametrize("size", [(64, 200), (150, 64), (201, 133), (97, 65), (40, 300)])
def test_windows_of_a_local_network_blend_to_the_whole_image(size):
    """A network that sees one pixel answers the same in every window, so that any seam is the blending's fault."""
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    model = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        torch.testing.assert_close(blended_logits(model, x, 64), model(x))


def test_a_wide_scene_comes_in_few_rows_at_a_time_that_keep_nothing_else_in_memory(monkeypatch):
    monkeypatch.setattr(windows, "PIECE_PX", 7 * 200)
    x = torch.rand(1, 3, 133, 200, generator=torch.Generator().manual_seed(3))
    model = nn.Conv2d(3, 2, 1).requires_grad_(False)
    bands = list(blended_bands(model, lambda top, bottom: x[..., top:bottom, :], 133, 200, 64))
    assert max(band.shape[-2] for band in bands) == 7
    assert all(band.untyped_storage().nbytes() == band.nbytes for band in bands)
    torch.testing.assert_close(torch.cat(bands, dim=-2), model(x))


def test_windows_are_weighed_as_a_hand_made_blend_of_smps_own_answers(make_config):
    """Windows of 64 px over 96 × 128: tops 0 and 32, lefts 0, 32 and 64; weights fall to the borders and sum to one."""
    config, picture = make_config(teacher__window=64), images(96, 128)
    model = create_smp_model("unet", "mobilenet_v2", 8, key="teacher").eval()
    model.load_state_dict(torch.load(config.teacher.checkpoint, weights_only=True))
    fall = np.minimum(np.arange(64) + 0.5, 63.5 - np.arange(64))
    total, weights = np.zeros((1, 8, 96, 128)), np.zeros((96, 128))
    for top in (0, 32):
        for left in (0, 32, 64):
            window = (..., slice(top, top + 64), slice(left, left + 64))
            total[window] += logits_of(model, picture[:, top : top + 64, left : left + 64]) * np.outer(fall, fall)
            weights[window] += np.outer(fall, fall)
    np.testing.assert_allclose(asked(config).logits(picture).numpy(), total / weights, atol=1e-4)


def test_no_window_is_larger_than_asked_for():
    """What bounds the device's memory on a scene; the smaller side may be below it."""
    seen = set()

    def ask(part):
        seen.add(tuple(part.shape[-2:]))
        return part.float()

    scene = torch.randint(0, 256, (1, 3, 300, 50), dtype=torch.uint8)
    torch.testing.assert_close(blended_logits(ask, scene, 64), scene.float())
    assert seen == {(64, 50), (44, 50)}, "the last one ends with the image"
    blended_logits(ask, scene[..., :40], 300)
    assert seen == {(64, 50), (44, 50), (300, 40)}


def test_teacher_of_another_number_of_channels_is_refused_in_the_users_words(make_config):
    config = make_config()
    teacher = config.teacher.model_copy(update={"classes": config.teacher.classes[:7]})
    with pytest.raises(
        CheckpointError, match=r"holds unet with mobilenet_v2, 8 channels, but teacher says .* 7 channels"
    ):
        load_teacher(teacher)


def test_weights_are_never_dropped_in_silence(make_config, tmp_path):
    config = make_config()
    state = torch.load(config.teacher.checkpoint, weights_only=True)
    name = next(name for name in state if name.startswith("decoder"))
    state["decoder.odd"] = state.pop(name)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=rf"1 missing: {re.escape(name)}; 1 unexpected: decoder.odd"):
        load_teacher(config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_width_load_as_float32(make_config, tmp_path, dtype):
    config = make_config()
    state = torch.load(config.teacher.checkpoint, weights_only=True)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "t.pth")
    model = load_teacher(config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_quantised_integers_are_not_taken_for_weights(make_config, tmp_path):
    config = make_config()
    state = torch.load(config.teacher.checkpoint, weights_only=True)
    state["segmentation_head.0.weight"] = state["segmentation_head.0.weight"].to(torch.int8)
    torch.save(state, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=r"1 not floating-point: segmentation_head.0.weight \(int8\)"):
        load_teacher(config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")}))


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_that_executes_code_is_refused_and_not_executed(make_config, tmp_path, capsys):
    torch.save({"a": Harmful()}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=r"holds more than weights: .* could execute code .*\(builtins.print\)"):
        load_teacher(make_config().teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")}))
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("form", ["module", "module under model", "more than weights", "older file", "TorchScript"])
def test_the_advice_on_a_refused_checkpoint_makes_one_that_loads(make_config, tmp_path, form):
    config = make_config()
    source = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8).eval()
    state, path = source.state_dict(), tmp_path / "t.pth"
    message = "is a whole pickled model" if "module" in form else "holds more than weights"
    if form == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of tracing
            torch.jit.trace(source, torch.zeros(1, 3, 64, 64)).save(path)
        message = "is a TorchScript archive"
    elif form == "older file":
        torch.save({"state_dict": state, "x": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    else:
        contents = {"module": source, "module under model": {"model": source}}
        torch.save(contents.get(form, {"state_dict": state, "hparams": argparse.Namespace()}), path)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_teacher(config.teacher.model_copy(update={"checkpoint": str(path)}))
    advice = textwrap.dedent(str(refused.value).partition("\n\n")[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(advice, {})
    loaded = load_teacher(
        config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t_weights.pth")})
    ).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no checkpoint at"),
        (b"", "not a readable"),
        (b"PK\x03\x04rubbish", "not a readable"),
        (b"hello" * 99, "not a readable"),
    ],
)
def test_unreadable_checkpoints_are_named(make_config, tmp_path, content, message):
    path = tmp_path / "t.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_teacher(make_config().teacher.model_copy(update={"checkpoint": str(path)}))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "teacher.model."])
@pytest.mark.parametrize("form", ["t.pth", "state_dict in t.ckpt", "model in t.pth", "t.safetensors"])
def test_a_teacher_loads_in_every_form_that_people_hold_it(make_config, tmp_path, prefix, form):
    config = make_config()
    plain = torch.load(config.teacher.checkpoint, weights_only=True)
    state = {prefix + name: value for name, value in plain.items()}
    nest, _, name = form.rpartition(" in ")
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({nest: state, "epoch": 3} if nest else state, path)
    loaded = load_teacher(config.teacher.model_copy(update={"checkpoint": str(path)})).state_dict()
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], value) for name, value in plain.items())


def test_a_nest_under_another_name_is_pointed_out(make_config, tmp_path):
    config = make_config()
    torch.save({"weights": torch.load(config.teacher.checkpoint, weights_only=True), "epoch": 3}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="save just its 'weights' entry"):
        load_teacher(config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")}))


def test_scse_attention_is_recognised_from_the_tensors(make_config, tmp_path):
    config = make_config()
    torch.manual_seed(1)
    source = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8, decoder_attention_type="scse").eval()
    torch.save(source.state_dict(), tmp_path / "t.pth")
    model = load_teacher(config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")}))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


def misfit(make_config, tmp_path, network, **teacher):
    """The error's text for a file that holds another network than the config says."""
    torch.save(network.state_dict(), tmp_path / "t.pth")
    update = {"checkpoint": str(tmp_path / "t.pth"), **teacher}
    with pytest.raises(CheckpointError) as refused:
        load_teacher(make_config().teacher.model_copy(update=update))
    return str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "encoder", "channels", "attention"),
    [
        ("unet", "efficientnet-b0", 8, None),
        ("unet", "resnet18", 9, "scse"),
        ("fpn", "mobilenet_v2", 8, None),
        ("unetplusplus", "resnet18", 5, "scse"),
        ("segformer", "mit_b0", 8, None),
        ("deeplabv3plus", "mobilenet_v2", 9, None),
    ],
)
def test_the_lines_that_an_error_gives_fit_the_file(make_config, tmp_path, architecture, encoder, channels, attention):
    network = create_smp_model(architecture, encoder, channels, key="teacher", attention=attention)
    message = misfit(make_config, tmp_path, network)
    assert (
        f"holds {architecture} with {encoder}{' and scSE attention' if attention else ''}, {channels} channels"
        in message
    )
    lines = yaml.safe_load(message.split("\n\n")[1])["teacher"]
    if channels == 5:
        assert lines.pop("classes") == [...] or "one name for each of the file's 5 channels" in message
        lines["classes"] = ["a", "b", "c", "d", "e"]
    load_teacher(make_config().teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth"), **lines}))


def test_a_file_of_nine_channels_is_explained_by_openearthmaps_order(make_config, tmp_path):
    message = misfit(make_config, tmp_path, create_smp_model("unet", "mobilenet_v2", 9, key="teacher"))
    assert "classes: [Unknown, Bareland, Rangeland, Developed, Road, Tree, Water, Cropland, Building]" in message
    assert "the shipped biodiversity/ftunetformer_kd_openearthmap, whose class_map fits it" in message
    assert "architecture:" not in message
    assert "encoder:" not in message


def test_what_is_not_recognised_is_said_to_be_so(make_config, tmp_path, monkeypatch):
    # All of smp's encoders are built where none fits, which takes ten seconds.
    monkeypatch.setattr(smp.encoders, "get_encoder_names", lambda: ["mobilenet_v2", "resnet18", "timm-efficientnet-b0"])
    decoder = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8, decoder_channels=(128, 64, 32, 16, 8))
    message = misfit(make_config, tmp_path, decoder)
    assert "holds a network with mobilenet_v2 whose decoder is not recognised, 8 channels, but teacher says" in message
    assert "of another shape: decoder." in message
    assert "`kdpipe inspect" in message
    bands = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8, in_channels=4)
    message = misfit(make_config, tmp_path, bands)
    assert "holds a network that is not recognised, 8 channels" in message
    assert "1 of another shape: encoder.features.0.0.weight ((32, 4, 3, 3) in the file" in message


@pytest.mark.parametrize(("architecture", "options"), [("ftunetformer", {}), ("unetformer", {"encoder": "resnet18"})])
def test_students_of_the_paper_are_recognised(architecture, options):
    found = recognise(build_student(architecture, 6, **options).state_dict())
    assert (found.architecture, found.encoder, found.channels) == (architecture, options.get("encoder"), 6)


def test_a_broken_safetensors_file_is_named(make_config, tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"t\.safetensors is not a readable safetensors file"):
        load_teacher(make_config().teacher.model_copy(update={"checkpoint": str(tmp_path / "t.safetensors")}))


def test_numbers_that_are_not_finite_stop_with_advice(make_config, tmp_path):
    config = make_config()
    state = torch.load(config.teacher.checkpoint, weights_only=True)
    state["segmentation_head.0.bias"] += torch.inf
    torch.save(state, tmp_path / "t.pth")
    broken = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"checkpoint": str(tmp_path / "t.pth")})}
    )
    with pytest.raises(KdpipeError, match="not finite, in precision fp32"):
        asked(broken).soft_targets(images(32, 32))


@pytest.mark.parametrize(
    ("architecture", "encoder", "message"),
    [
        ("unett", "resnet18", "did you mean unet"),
        ("unet", "resnet19", "did you mean resnet1"),
        ("unet", "tu-nothing", "teacher: "),
    ],
)
def test_unknown_networks_are_refused_with_the_nearest(architecture, encoder, message):
    with pytest.raises(ConfigError, match=message):
        create_smp_model(architecture, encoder, 3, key="teacher")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--device nonsense"):
        resolve_device("nonsense")


@pytest.mark.parametrize("size", [(200, 330), (321, 96)])
def test_windows_start_on_the_networks_own_grid(size):
    """A network that looks at its place in squares of 32 px and at nothing else: windows that start elsewhere answer otherwise."""

    def ask(part):
        means = nn.functional.avg_pool2d(padded_to_grid(part), 32)
        return nn.functional.interpolate(means, scale_factor=32)[..., : part.shape[-2], : part.shape[-1]]

    def padded_to_grid(part):
        bottom, right = (-side % 32 for side in part.shape[-2:])
        return nn.functional.pad(part, (0, right, 0, bottom), mode="replicate")

    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(blended_logits(ask, x, 96), ask(x))


def test_a_band_is_given_out_before_the_windows_below_it_are_asked():
    """What is held of a scene does not grow with its height."""
    asked_tops = []

    def ask(part):
        asked_tops.append(part.storage_offset() // 64)
        return part.float()

    scene = torch.randint(0, 256, (1, 1, 640, 64), dtype=torch.uint8)
    rows = 0
    for band in blended_bands(ask, lambda top, bottom: scene[..., top:bottom, :], 640, 64, 128):
        rows += band.shape[-2]
        assert rows <= asked_tops[-1] + 128
        assert rows >= asked_tops[-1] + 1
    assert rows == 640
    assert len(asked_tops) > 5


@pytest.mark.parametrize("kind", ["soft", "logits"])
def test_a_scenes_bands_are_what_its_windows_blend_to(make_config, kind):
    config = make_config(teacher__window=64, cache__kind=kind)
    teacher, picture = asked(config), images(200, 130)
    bands = list(teacher.cached_bands(lambda top, bottom: picture[0, top:bottom], *picture.shape[1:3]))
    assert len(bands) > 2
    logits = teacher.logits(picture)
    expected = logits.numpy() if kind == "logits" else teacher.targets_of(logits)
    np.testing.assert_allclose(np.concatenate(bands, axis=1), expected[0], atol=1e-5)
    np.testing.assert_array_equal(teacher.cached_values(picture)[0], np.concatenate(bands, axis=1))
