"""verify-cache --reference: scores of an owner's own script agree, or the fault that was planted in the script is named."""

import json
import time

import numpy as np
import pytest
import torch
from helpers import owner_script as own
from PIL import Image
from torch.nn import functional as F

from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
SIZES = {"a": (64, 96), "b": (64, 64), "odd": (70, 90)}  # height, width
MEAN, STD = own.IMAGENET_MEAN, own.IMAGENET_STD


def write_tiles(folder):
    """Colour fields with edges and noise, without a symmetry."""
    for number, (stem, (height, width)) in enumerate(SIZES.items()):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=int)
        image = np.clip(image + rng.integers(-12, 13, image.shape), 0, 255).astype(np.uint8)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "images" / f"{stem}.png")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owner") / "Mine"
    write_tiles(folder)
    return folder


@pytest.fixture
def config(make_config, tiles):
    return make_config(data__train=[str(tiles)], data__val=[], data__allow_missing_masks=True)


@pytest.fixture(scope="module")
def net(teacher_file):
    return own.network(teacher_file)


def save(folder, tiles, script, stems=("a", "b")):
    folder.mkdir(exist_ok=True)
    for stem in stems:
        np.save(folder / f"{stem}.npy", script(tiles / "images" / f"{stem}.png"))
    return folder


def compared(config, folder):
    began = time.perf_counter()
    report = verify(config, "full", CPU, reference=folder)
    print(f"{time.perf_counter() - began:.1f} s", *[finding.message for finding in report.findings], sep="\n")
    return report


def right(net, path):
    return own.logits(net, own.pixels(path) / 255)


def test_a_right_script_agrees(config, net, tiles, tmp_path):
    report = compared(config, save(tmp_path / "r", tiles, lambda path: right(net, path), SIZES))
    assert report.passes
    assert not report.cache_checked
    for row in report.reference.tiles:
        assert row.max_abs.value < 1e-5
        assert row.argmax_agreement == 1


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        ("probabilities", own.softmax),
        ("log-probabilities", lambda z: np.log(own.softmax(z))),
        ("probabilities", lambda z: own.softmax(z).astype(np.float16)),
        ("logits", lambda z: z.astype(np.float16)),
        ("logits", lambda z: z.astype(np.float64) + 3),
    ],
)
def test_logits_and_probabilities_are_told_apart(config, net, tiles, tmp_path, kind, saved):
    report = compared(config, save(tmp_path / "r", tiles, lambda path: saved(right(net, path)), ["a"]))
    assert report.passes
    assert report.reference.tiles[0].kind == kind


def imagenet(pixels):
    return (pixels / 255 - MEAN) / STD


def mirrored(net, inputs):
    return own.logits(net, np.ascontiguousarray(inputs[:, ::-1]))[..., ::-1]


def flips(net, inputs):
    views = [own.logits(net, inputs), mirrored(net, inputs)]
    views += [own.logits(net, inputs[::-1])[:, ::-1], own.logits(net, inputs[::-1, ::-1])[:, ::-1, ::-1]]
    return views


def in_train_mode(net, inputs):
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    scores = own.logits(net, inputs)
    net.load_state_dict(before)
    net.eval()
    return scores


def in_half(net, inputs, dtype):
    with torch.autocast("cpu", dtype=dtype):
        return own.logits(net, inputs)


def resized(net, pixels, side):
    import cv2

    small = cv2.resize(pixels.astype(np.uint8), (side, side)).astype(np.float32)
    scores = torch.from_numpy(own.logits(net, small / 255))[None]
    return F.interpolate(scores, pixels.shape[:2], mode="bilinear")[0].numpy()


def centred(net, inputs):
    """Padded with zeros on all sides."""
    (height, width), (top, left) = inputs.shape[:2], [(-side % 32) // 2 for side in inputs.shape[:2]]
    inner = np.zeros((height + -height % 32, width + -width % 32, 3), dtype=np.float32)
    inner[top : top + height, left : left + width] = inputs
    return own.logits(net, inner)[:, top : top + height, left : left + width]


FAULTS = {
    "BGR": (lambda n, x: own.logits(n, x[..., ::-1] / 255), ["feeds BGR", "set data.bands: [3, 2, 1]"]),
    "another order of bands": (lambda n, x: own.logits(n, x[..., [1, 2, 0]] / 255), ["set data.bands: [2, 3, 1]"]),
    "ImageNet": (lambda n, x: own.logits(n, imagenet(x)), ["set teacher.normalize: imagenet;"]),
    "0..255": (lambda n, x: own.logits(n, x), ["feeds 0..255", "std: [0.003921568627,"]),
    "-1..1": (lambda n, x: own.logits(n, x / 127.5 - 1), ["feeds -1..1", "{mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"]),
    "ImageNet of 0..255": (lambda n, x: own.logits(n, (x - MEAN) / STD), ["without dividing by 255"]),
    "ImageNet twice": (lambda n, x: own.logits(n, (imagenet(x) - MEAN) / STD), ["twice"]),
    "own statistics": (lambda n, x: own.logits(n, (x - x.mean((0, 1))) / x.std((0, 1))), ["channel by channel"]),
    "BGR and ImageNet": (
        lambda n, x: own.logits(n, imagenet(x[..., ::-1])),
        ["feeds BGR and normalises by ImageNet", "data.bands: [3, 2, 1] and set teacher.normalize: imagenet;"],
    ),
    "train mode": (lambda n, x: in_train_mode(n, x / 255), ["train mode", "call model.eval()"]),
    "train mode and BGR": (lambda n, x: in_train_mode(n, x[..., ::-1] / 255), ["train mode", "call model.eval()", "BGR"]),
    "mirrored": (lambda n, x: own.logits(n, x / 255)[..., ::-1], ["saves its output mirrored left to right"]),
    "upside down": (lambda n, x: own.logits(n, x / 255)[:, ::-1], ["saves its output mirrored top to bottom"]),
    "half turn": (lambda n, x: own.logits(n, x / 255)[:, ::-1, ::-1], ["saves its output turned by 180°"]),
    "turned input": (lambda n, x: own.logits(n, x[::-1] / 255), ["predicts images mirrored top to bottom"]),
    "quarter turn": (lambda n, x: np.rot90(own.logits(n, x / 255), -1, (1, 2)), ["saves its output turned by 90° clockwise"]),
    "quarter turn of the input": (lambda n, x: own.logits(n, np.rot90(x) / 255), ["predicts images turned by 90° anticlockwise"]),
    "sigmoid": (lambda n, x: 1 / (1 + np.exp(-own.logits(n, x / 255))), ["applies a sigmoid"]),
    "softmax twice": (lambda n, x: own.softmax(own.softmax(own.logits(n, x / 255))), ["applies softmax twice"]),
    "softmax twice, ImageNet": (
        lambda n, x: own.softmax(own.softmax(own.logits(n, imagenet(x)))),
        ["applies softmax twice", "normalize: imagenet"],
    ),
    "bfloat16": (lambda n, x: in_half(n, x / 255, torch.bfloat16), ["half precision (bf16)", "teacher.precision: bf16"]),
    "float16": (lambda n, x: in_half(n, x / 255, torch.float16), ["half precision (fp16)", "teacher.precision: fp16"]),
    "flips": (lambda n, x: np.mean(flips(n, x / 255), axis=0), ["averages logits", "set teacher.tta: flips;"]),
    "flips of probabilities": (
        lambda n, x: np.mean([own.softmax(z) for z in flips(n, x / 255)], axis=0),
        ["averages probabilities over the 4 views"],
    ),
    "one mirror image": (
        lambda n, x: (own.logits(n, x / 255) + mirrored(n, x / 255)) / 2,
        ["averages logits over an image and its mirror image"],
    ),
    "resized": (lambda n, x: resized(n, x, 224), ["resizes images to 224 x 224 px"]),
    "resized, half": (lambda n, x: own_scale(n, x / 255, 0.5), ["by a factor of 0.5", "set teacher.scales: [0.5];"]),
}  # fmt: skip


def own_scale(net, inputs, factor):
    size = [round(side * factor) for side in inputs.shape[:2]]
    small = F.interpolate(torch.from_numpy(inputs).permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
    scores = torch.from_numpy(own.logits(net, small.numpy()))[None]
    return F.interpolate(scores, inputs.shape[:2], mode="bilinear")[0].numpy()


PADDED = {
    "zeros": (lambda n, x: own.logits(n, x / 255, "constant"), ["pads images with zeros on the right and below"]),
    "border": (lambda n, x: own.logits(n, x / 255, "edge"), ["pads images with the border's pixels"]),
    "centred": (lambda n, x: centred(n, x / 255), ["pads images with zeros on all sides"]),
    "zeros and ImageNet": (lambda n, x: own.logits(n, imagenet(x), "constant"), ["pads images with zeros", "normalize: imagenet"]),
}  # fmt: skip


# The search for these is the longest; each has a sibling that is found in a second.
SLOW = {
    "ImageNet twice", "train mode and BGR", "quarter turn of the input", "softmax twice, ImageNet", "bfloat16", "float16",
    "flips of probabilities", "one mirror image", "resized, half", "zeros and ImageNet",
}  # fmt: skip


def sampled(faults):
    return [pytest.param(fault, marks=pytest.mark.slow) if fault in SLOW else fault for fault in faults]


@pytest.mark.long
@pytest.mark.parametrize("fault", sampled(FAULTS))
def test_the_fault_of_a_script_is_named(config, net, tiles, tmp_path, fault):
    script, said = FAULTS[fault]
    stems = ("a", "odd") if fault == "resized" else ("a", "b")
    report = compared(config, save(tmp_path / "r", tiles, lambda path: script(net, own.pixels(path)), stems))
    (cause,) = report.reference.causes
    (finding,) = report.findings
    assert cause.complete
    assert cause.before > 1e-3
    assert cause.after < max(5e-4, cause.before / 500)
    assert len(cause.tiles) == 2
    for phrase in said:
        assert phrase in finding.message
    assert len(cause.script) == len(cause.remedies) == (2 if " and " in fault or fault.endswith(", ImageNet") else 1)


@pytest.mark.long
@pytest.mark.parametrize("fault", sampled(PADDED))
def test_another_padding_is_named_and_tiles_that_need_none_agree(config, net, tiles, tmp_path, fault):
    script, said = PADDED[fault]
    report = compared(config, save(tmp_path / "r", tiles, lambda path: script(net, own.pixels(path)), ["a", "odd"]))
    text = " ".join(finding.message for finding in report.findings)
    for phrase in said:
        assert phrase in text
    if "ImageNet" not in fault:
        assert [row.max_abs.passes for row in report.reference.tiles] == [True, False]


def test_json(config, net, tiles, tmp_path):
    report = compared(config, save(tmp_path / "r", tiles, lambda path: right(net, path)))
    json.dumps(report.as_dict())
