"""Scores of a student's checkpoint and of a teacher, against a few lines of NumPy."""

from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.configs import ENCODER
from helpers.dubai import link_tiles
from helpers.reference_teacher import teacher_logits
from helpers.scored_tiles import numpy_iou, random_tile, stub, write_tile
from PIL import Image
from torch.nn import functional as F

from kdpipe.configs import load_config
from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.data.rasters import read_image
from kdpipe.pipeline.evaluation.evaluate import Model, Network, evaluate, student_model, teacher_model
from kdpipe.pipeline.models.student import build_student, load_student_weights
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "evaluate.md").read_text()
BEST = "model_weights/tests/tiny-none/best.ckpt"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's


def read_root(root):
    images = sorted((Path(root) / "images").iterdir())
    return [
        (np.asarray(Image.open(path)), np.asarray(Image.open(path.parents[1] / "masks" / path.name))) for path in images
    ]


def padded(inputs_NCHW):
    height, width = inputs_NCHW.shape[-2:]
    return F.pad(inputs_NCHW, (0, -width % 32, 0, -height % 32), mode="reflect")


def test_a_students_scores_are_those_of_its_network_in_a_few_lines(trained, landscape):
    student = build_student("unet", 6, encoder=ENCODER)
    load_student_weights(student, BEST)
    student.eval()
    predicted, masks, right, confidence = [], [], [], []
    for image, mask in read_root(landscape / "Val"):
        inputs = torch.from_numpy((image / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            probs = student(padded(inputs)).softmax(dim=1)[0, :, : mask.shape[0], : mask.shape[1]]
        predicted.append(probs.argmax(dim=0).numpy())
        masks.append(mask)
        right.append((predicted[-1] == mask)[mask != 255])
        confidence.append(probs.amax(dim=0).numpy()[mask != 255])
    result = evaluate(student_model(BEST, CPU, tta=None, window=None)).together
    expected = numpy_iou(predicted, masks)
    for name, value in zip(trained.classes.names, expected, strict=True):
        assert result.scores.iou[name] == pytest.approx(value, abs=1e-6)
    assert result.scores.overall_accuracy == pytest.approx(np.concatenate(right).mean())
    bins = np.minimum((np.concatenate(confidence) * 15).astype(int), 14)
    gaps = [np.sum((np.concatenate(right) - np.concatenate(confidence))[bins == b]) for b in range(15)]
    assert result.calibration.error == pytest.approx(np.abs(gaps).sum() / len(bins), abs=1e-6)


def test_it_agrees_with_the_validation_of_the_training_that_wrote_the_checkpoint(trained, student_run):
    summary = student_run[2]
    result = evaluate(student_model(BEST, CPU, tta=None, window=None))
    assert result.together.scores.miou == pytest.approx(summary.best_miou, abs=1e-6)
    assert vars(result.together.scores).keys() == summary.final.keys()


def test_the_teacher_is_scored_as_mapped_at_t_1_whatever_the_configs_temperature(make_config, landscape, teacher_file):
    config = make_config()
    shares = torch.from_numpy(config.class_map_matrix())
    predicted, masks = [], []
    for image, mask in read_root(landscape / "Val"):
        probs = torch.einsum("thw,ts->shw", teacher_logits(teacher_file, image).softmax(dim=0), shares)
        predicted.append(probs.argmax(dim=0).numpy())
        masks.append(mask)
    expected = numpy_iou(predicted, masks)
    for temperature in (1.0, 4.0):
        result = evaluate(teacher_model(make_config(distill__temperature=temperature), CPU, tta=None, window=None))
        found = [result.together.scores.iou[name] for name in config.classes.names]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_d4_averages_logits_of_eight_views_in_the_images_frame(trained):
    student = build_student("unet", 6, encoder=ENCODER)
    load_student_weights(student, BEST)
    student.eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    total = 0
    with torch.inference_mode():
        for turns in range(4):
            for mirror in (False, True):
                view = np.rot90(image[:, ::-1] if mirror else image, turns)
                inputs = torch.from_numpy((view / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
                logits = np.rot90(student(inputs)[0].numpy(), -turns, axes=(1, 2))
                total = total + (logits[..., ::-1] if mirror else logits)
    expected = torch.from_numpy(total / 8).softmax(dim=0).numpy()
    found = student_model(BEST, CPU, tta="d4", window=None).predict(image)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = student_model(BEST, CPU, tta=None, window=None).predict(image)
    assert np.abs(found - plain).max() > 1e-4


def test_a_window_that_holds_the_tile_changes_nothing_and_a_smaller_one_does(trained):
    image = np.random.default_rng(0).integers(0, 256, (100, 90, 3), dtype=np.uint8)
    whole, large, small = (student_model(BEST, CPU, tta=None, window=w).predict(image) for w in (None, 128, 64))
    np.testing.assert_array_equal(whole, large)
    assert small.shape == whole.shape
    assert np.abs(small - whole).max() > 1e-4
    np.testing.assert_allclose(small.sum(axis=0), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="--window must be a multiple of 32 px, .* found 100"):
        student_model(BEST, CPU, tta=None, window=100)


@pytest.mark.long
def test_a_teacher_runs_as_its_config_says_unless_options_say_otherwise(make_config):
    config = make_config(teacher__tta="flips", teacher__window=64)
    as_configured = teacher_model(config, CPU, tta=None, window=None)
    assert as_configured.networks == [Network(config.teacher.checkpoint, 64, "flips", [1.0])]
    given = teacher_model(config, CPU, tta="none", window=256)
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    plain = teacher_model(make_config(), CPU, tta=None, window=None)
    np.testing.assert_array_equal(given.predict(image), plain.predict(image))
    assert np.abs(as_configured.predict(image) - plain.predict(image)).max() > 1e-4


@pytest.mark.long
def test_several_teachers_predict_as_one_by_the_mean_of_their_logits(make_config, teacher_file, tmp_path):
    state = torch.load(teacher_file, weights_only=True)
    state["segmentation_head.0.weight"] = 3 * state["segmentation_head.0.weight"]
    torch.save(state, tmp_path / "other.pth")
    first = make_config().teacher.model_dump()
    members = [first, {**first, "checkpoint": str(tmp_path / "other.pth")}]
    names = first["classes"]
    as_it_is = {"classes": {"names": names}, "class_map": {name: {name: 1} for name in names}}
    several = make_config(teacher=None, teachers=members, **as_it_is)
    single = [make_config(teacher=member, **as_it_is) for member in members]
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found, one, two = (teacher_model(c, CPU, tta=None, window=None).predict(image) for c in (several, *single))
    # The mean of logits is the logarithm of the geometric mean of the probabilities, normalised anew.
    expected = np.sqrt(one * two)
    np.testing.assert_allclose(found, expected / expected.sum(axis=0), atol=1e-5)
    given = teacher_model(several, CPU, tta="flips", window=64)
    assert [(n.checkpoint, n.tta, n.window) for n in given.networks] == [
        (member["checkpoint"], "flips", 64) for member in members
    ]


def test_every_root_has_its_own_scores_and_together_is_all_their_pixels(make_config, tmp_path):
    config = make_config()
    tiles = {"A": [random_tile(1), random_tile(2, 31, 77)], "B": [random_tile(3, 64, 33)]}
    for root, pairs in tiles.items():
        for i, (predicted, labels) in enumerate(pairs):
            write_tile(tmp_path / root, f"t{i}", predicted, labels)
    result = evaluate(stub(config), [str(tmp_path / "A"), str(tmp_path / "B")])
    for root in result.roots:
        pairs = tiles[Path(root.root).name]
        assert root.tiles == len(pairs)
        np.testing.assert_allclose(list(root.scores.iou.values()), numpy_iou(*zip(*pairs, strict=True)))
    everything = [pair for pairs in tiles.values() for pair in pairs]
    np.testing.assert_allclose(list(result.together.scores.iou.values()), numpy_iou(*zip(*everything, strict=True)))
    np.testing.assert_array_equal(result.together.confusion_LP, sum(root.confusion_LP for root in result.roots))
    # Not the mean over roots: pixels count.
    assert result.together.scores.miou != pytest.approx(np.mean([root.scores.miou for root in result.roots]), abs=1e-6)


def test_files_that_are_no_checkpoint_of_a_student_are_refused(trained, teacher_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of `kdpipe train-student` \(format None\)"):
        student_model(teacher_file, CPU, tta=None, window=None)
    with pytest.raises(CheckpointError, match=r"tiny-none is a folder, .* such as .*tiny-none/best\.ckpt"):
        student_model("model_weights/tests/tiny-none", CPU, tta=None, window=None)
    content = Path(BEST).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"half\.ckpt is not a readable checkpoint"):
        student_model(tmp_path / "half.ckpt", CPU, tta=None, window=None)
    whole = torch.load(BEST, weights_only=True)
    whole["kdpipe"]["config"] = whole["kdpipe"]["config"].replace("temperature:", "temperatur:")
    torch.save(whole, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigError, match=r"the configuration in .*foreign\.ckpt: unknown key distill\.temperatur"):
        student_model(tmp_path / "foreign.ckpt", CPU, tta=None, window=None)


@pytest.mark.long
def test_images_go_through_the_stretch_that_training_recorded(make_config, landscape):
    config = make_config(train__epochs=1, train__max_steps=1, data__stretch={"percentiles": [2, 98]})
    train(with_mode(config, "none"), CPU)
    recorded = torch.load(BEST, weights_only=True)["kdpipe"]["stretch"]
    model = student_model(BEST, CPU, tta=None, window=None)
    assert model.stretch == [tuple(pair) for pair in recorded]
    assert model.stretch == teacher_model(config, CPU, tta=None, window=None).stretch
    seen = []

    def predict(image_HWC):
        seen.append(image_HWC)
        return model.predict(image_HWC)

    evaluate(Model(**{**vars(model), "predict": predict}))
    image = read_root(landscape / "Val")[0][0].astype(np.float64)
    low, high = np.array(recorded).T
    np.testing.assert_array_equal(seen[0], np.rint(np.clip((image - low) / (high - low), 0, 1) * 255))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_real_teacher_scores_as_in_ten_lines_of_numpy(dubai, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = dubai / "pretrain_weights" / "u-efficientnet-b4_s0_CELoss_pretrained.pth"
    network = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.eval()
    stems, predicted, masks = ("t2_001", "t6_001"), [], []
    link_tiles(dubai, tmp_path, "Val", stems)
    for stem in stems:
        # Decoders of JPEG differ: Pillow's gives Forest 0.1 points more here.
        image = read_image(tmp_path / "Val" / "images" / f"{stem}.jpg")
        masks.append(np.asarray(Image.open(tmp_path / "Val" / "masks" / f"{stem}.png")))
        with torch.inference_mode():
            logits = network(padded(torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]))
        tree, rangeland, cropland, developed, road, bare, water, background = logits[0].softmax(dim=0).numpy()
        mapped = [water + background, tree, 0.7 * rangeland, cropland, developed + road, 0.3 * rangeland + bare]
        predicted.append(np.argmax(mapped, axis=0)[: image.shape[0], : image.shape[1]])
    config = load_config("dubai/linknet_kd", [f"teacher.checkpoint={checkpoint}"])
    result = evaluate(teacher_model(config, CPU, tta=None, window=None), ["Val"])
    expected = numpy_iou(predicted, masks)
    for name, value in zip(config.classes.names, expected, strict=True):
        if name in ("Grassland", "Cropland"):
            assert result.together.scores.left_out[name] == "absent from the labels"
        else:
            assert result.together.scores.iou[name] == pytest.approx(value, abs=1e-5)
