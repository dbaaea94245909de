"""Scores on tiles: from a student's checkpoint or the teacher, against a few lines of NumPy, and what is left out said."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.files import write_image
from PIL import Image
from torch.nn import functional as F

from kdpipe.configs import dump_config, load_config
from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, KdpipeError
from kdpipe.data.rasters import read_image
from kdpipe.pipeline.commands.main import cli, main
from kdpipe.pipeline.evaluation import evaluate as evaluation
from kdpipe.pipeline.evaluation.evaluate import Model, Network, evaluate, student_model, teacher_model
from kdpipe.pipeline.models.student import build_student, load_student_weights
from kdpipe.pipeline.reports.plots import draw_confusion
from kdpipe.pipeline.reports.terminal.scores import evaluation_tables
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "evaluate.md").read_text()
BEST = "model_weights/tests/tiny-none/best.ckpt"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's


def stub(config, answers=None, probability=0.9):
    """A model that answers each pixel with its red value, or with `answers(image)`, with one probability."""

    def answer(image_HWC):
        chosen = image_HWC[..., 0] if answers is None else answers(image_HWC)
        hot = np.eye(len(config.classes.names))[chosen].transpose(2, 0, 1)
        rest = (1 - probability) / (len(config.classes.names) - 1)
        return (hot * (probability - rest) + rest).astype(np.float32)

    return Model("a stub", [Network("none", None, "none", [1.0])], answer, config, None, list(config.data.train))


def write_tile(root, stem, answers, labels):
    """A tile whose image holds the stub's answers in red, and its mask, if there is one."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    image = np.repeat(np.asarray(answers, np.uint8)[..., None], 3, axis=2)
    Image.fromarray(image).save(root / "images" / f"{stem}.png")
    if labels is not None:
        Image.fromarray(np.asarray(labels, np.uint8)).save(root / "masks" / f"{stem}.png")


def random_tile(seed, height=40, width=53, classes=6):
    rng = np.random.default_rng(seed)
    return rng.integers(classes, size=(height, width)), rng.choice([*range(classes), 255], size=(height, width))


def png_size(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def run(monkeypatch, *arguments):
    """`kdpipe evaluate ARGUMENTS` in this process, where torch is imported already; its exit code."""
    monkeypatch.setattr(sys, "argv", ["kdpipe", "evaluate", *arguments])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def text_of(result):
    from rich.console import Console

    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        for table in evaluation_tables(result):
            console.print(table, highlight=False, soft_wrap=True)
    return capture.get()


@pytest.fixture
def trained(make_config):
    """A config whose student was trained for two steps without its teacher."""
    config = make_config(train__epochs=1, train__max_steps=2)
    train(with_mode(config, "none"), CPU)
    return config


def numpy_iou(answers, masks, num_classes=6):
    """IoU by class over tiles in six lines, NaN where neither occurs."""
    answers = np.concatenate([a[m != 255] for a, m in zip(answers, masks, strict=True)])
    labels = np.concatenate([m[m != 255] for m in masks])
    with np.errstate(invalid="ignore"):
        return np.array([
            np.sum((answers == c) & (labels == c)) / np.float64(np.sum((answers == c) | (labels == c)))
            for c in range(num_classes)
        ])  # fmt: skip


def read_root(root):
    images = sorted((Path(root) / "images").iterdir())
    return [
        (np.asarray(Image.open(path)), np.asarray(Image.open(path.parents[1] / "masks" / path.name))) for path in images
    ]


def padded(inputs_NCHW):
    height, width = inputs_NCHW.shape[-2:]
    return F.pad(inputs_NCHW, (0, -width % 32, 0, -height % 32), mode="reflect")


def test_a_students_scores_are_those_of_its_network_in_a_few_lines(trained, landscape):
    student = build_student("unet", 6, encoder="mobilenet_v2")
    load_student_weights(student, BEST)
    student.eval()
    answers, masks, right, confidence = [], [], [], []
    for image, mask in read_root(landscape / "Val"):
        inputs = torch.from_numpy((image / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
        with torch.inference_mode():
            probs = student(padded(inputs)).softmax(dim=1)[0, :, : mask.shape[0], : mask.shape[1]]
        answers.append(probs.argmax(dim=0).numpy())
        masks.append(mask)
        right.append((answers[-1] == mask)[mask != 255])
        confidence.append(probs.amax(dim=0).numpy()[mask != 255])
    result = evaluate(student_model(BEST, CPU, tta=None, window=None)).together
    expected = numpy_iou(answers, masks)
    for name, value in zip(trained.classes.names, expected, strict=True):
        assert result.scores.iou[name] == pytest.approx(value, abs=1e-6)
    assert result.scores.overall_accuracy == pytest.approx(np.concatenate(right).mean())
    bins = np.minimum((np.concatenate(confidence) * 15).astype(int), 14)
    gaps = [np.sum((np.concatenate(right) - np.concatenate(confidence))[bins == b]) for b in range(15)]
    assert result.calibration.error == pytest.approx(np.abs(gaps).sum() / len(bins), abs=1e-6)


def test_it_agrees_with_the_validation_of_the_training_that_wrote_the_checkpoint(trained):
    summary = train(with_mode(trained, "none"), CPU, overwrite=True)
    result = evaluate(student_model(BEST, CPU, tta=None, window=None))
    assert result.together.scores.miou == pytest.approx(summary.best_miou, abs=1e-6)
    assert result.together.scores.as_dict().keys() == summary.final.keys()


def test_the_teacher_is_scored_as_mapped_at_t_1_whatever_the_configs_temperature(make_config, landscape, teacher_file):
    model = smp.Unet("mobilenet_v2", encoder_weights=None, classes=8)
    model.load_state_dict(torch.load(teacher_file, weights_only=True))
    model.eval()
    config = make_config()
    shares = torch.from_numpy(config.class_map_matrix())
    answers, masks = [], []
    for image, mask in read_root(landscape / "Val"):
        with torch.inference_mode():
            logits = model(padded(torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]))[0]
        probs = torch.einsum("thw,ts->shw", logits.softmax(dim=0), shares)
        answers.append(probs.argmax(dim=0).numpy()[: mask.shape[0], : mask.shape[1]])
        masks.append(mask)
    expected = numpy_iou(answers, masks)
    for temperature in (1.0, 4.0):
        result = evaluate(teacher_model(make_config(distill__temperature=temperature), CPU, tta=None, window=None))
        found = [result.together.scores.iou[name] for name in config.classes.names]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_d4_averages_logits_of_eight_views_in_the_images_frame(trained):
    student = build_student("unet", 6, encoder="mobilenet_v2")
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


def test_a_teacher_is_asked_as_its_config_says_unless_told_otherwise(make_config):
    config = make_config(teacher__tta="flips", teacher__window=64)
    as_configured = teacher_model(config, CPU, tta=None, window=None)
    assert as_configured.networks == [Network(config.teacher.checkpoint, 64, "flips", [1.0])]
    told = teacher_model(config, CPU, tta="none", window=256)
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    plain = teacher_model(make_config(), CPU, tta=None, window=None)
    np.testing.assert_array_equal(told.predict(image), plain.predict(image))
    assert np.abs(as_configured.predict(image) - plain.predict(image)).max() > 1e-4


def test_several_teachers_answer_as_one_by_the_mean_of_their_logits(make_config, teacher_file, tmp_path):
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
    # The mean of logits is the logarithm of the geometric mean of the answers, normalised anew.
    expected = np.sqrt(one * two)
    np.testing.assert_allclose(found, expected / expected.sum(axis=0), atol=1e-5)
    told = teacher_model(several, CPU, tta="flips", window=64)
    assert [(n.checkpoint, n.tta, n.window) for n in told.networks] == [
        (member["checkpoint"], "flips", 64) for member in members
    ]


def test_every_root_has_its_own_scores_and_together_is_all_their_pixels(make_config, tmp_path):
    config = make_config()
    tiles = {"A": [random_tile(1), random_tile(2, 31, 77)], "B": [random_tile(3, 64, 33)]}
    for root, pairs in tiles.items():
        for i, (answers, labels) in enumerate(pairs):
            write_tile(tmp_path / root, f"t{i}", answers, labels)
    result = evaluate(stub(config), [str(tmp_path / "A"), str(tmp_path / "B")])
    for root in result.roots:
        pairs = tiles[Path(root.root).name]
        assert root.tiles == len(pairs)
        np.testing.assert_allclose(list(root.scores.iou.values()), numpy_iou(*zip(*pairs, strict=True)))
    everything = [pair for pairs in tiles.values() for pair in pairs]
    np.testing.assert_allclose(list(result.together.scores.iou.values()), numpy_iou(*zip(*everything, strict=True)))
    np.testing.assert_array_equal(result.together.confusion_LP, sum(root.confusion_LP for root in result.roots))
    # Not the mean of the roots: their pixels count.
    assert result.together.scores.miou != pytest.approx(np.mean([root.scores.miou for root in result.roots]), abs=1e-6)


def test_a_class_that_is_answered_but_not_labelled_costs_others_and_is_left_out_by_name(make_config, tmp_path):
    labels = np.zeros((40, 40), int)
    labels[20:] = 1
    answers = labels.copy()
    answers[:10] = 3
    write_tile(tmp_path / "A", "t", answers, labels)
    result = evaluate(stub(make_config(classes__not_scored=["Background"])), [str(tmp_path / "A")])
    scores = result.together.scores
    assert scores.iou["Background"] == 0.5
    assert scores.iou["Cropland"] is None
    assert scores.precision["Cropland"] is scores.recall["Cropland"] is None
    assert scores.miou == 1.0
    assert scores.left_out["Background"] == "not scored"
    assert scores.left_out["Cropland"] == "absent from the labels"
    text = text_of(result)
    assert "left out of the means: Background (not scored), Grassland, Cropland, Settlement" in text
    assert re.search(r"Cropland .* 0\.0 │ +25\.0 │", text)  # labelled, answered
    assert max(len(line) for line in text.splitlines() if line[0] in "┏┃┡│├└") <= 80


def test_a_tile_without_a_labelled_pixel_changes_no_score_and_is_named(make_config, tmp_path):
    answers, labels = random_tile(5)
    write_tile(tmp_path / "A", "t1", answers, labels)
    alone = evaluate(stub(make_config()), [str(tmp_path / "A")])
    write_tile(tmp_path / "A", "t2", answers, np.full_like(labels, 255))
    both = evaluate(stub(make_config()), [str(tmp_path / "A")])
    assert both.together.scores == alone.together.scores
    assert both.together.boundary == alone.together.boundary
    assert both.together.calibration == alone.together.calibration
    assert (both.together.tiles, both.together.without_label) == (2, ["A/t2"])
    assert "without one labelled pixel: 1 tile (A/t2)" in text_of(both)


def test_tiles_without_a_mask_are_left_out_and_named(make_config, tmp_path):
    for i in range(8):
        write_tile(tmp_path / "A", f"t{i}", *random_tile(i)[:1], random_tile(i)[1] if i == 0 else None)
    result = evaluate(stub(make_config()), [str(tmp_path / "A")])
    assert result.together.tiles == 1
    assert result.roots[0].without_mask == [f"A/t{i}" for i in range(1, 8)]
    assert "left out, without a mask: 7 tiles (A/t1, A/t2, A/t3, A/t4, A/t5 and 2 more)" in text_of(result)


def test_tiles_that_the_student_was_trained_on_are_said_to_be_so(make_config):
    config = make_config()
    blind = stub(config, lambda image: np.zeros(image.shape[:2], int))
    result = evaluate(blind, [*config.data.train, *config.data.val])
    assert [root.trained_on for root in result.roots] == [True, False]
    assert text_of(result).count("the student was trained on these tiles") == 2  # that root, and all together


@pytest.mark.parametrize("case", ["no labels", "no masks", "sizes", "missing", "twice", "none", "nan"])
def test_what_cannot_be_scored_is_refused_by_name(make_config, tmp_path, case):
    config = make_config()
    root = tmp_path / "A"
    answers, labels = random_tile(1)
    roots = [str(root)]
    model = stub(config)
    error = DataError
    if case == "no labels":
        write_tile(root, "t", answers, np.full_like(labels, 255))
        message = r"A has nothing to score in its 1 tiles with a mask: Background absent from the labels, Forest"
    elif case == "no masks":
        write_tile(root, "t", answers, None)
        message = r"none of the 1 images of .*A has a mask: scores need .*A/masks, with masks named like the images"
    elif case == "sizes":
        write_tile(root, "t", answers, labels[:-1])
        message = r"the mask .*t\.png is 39 x 53 px, and its image .*t\.png 40 x 53"
    elif case == "missing":
        message = "there is no folder .*A, which data names as a root of tiles"
    elif case == "twice":
        write_tile(root, "t", answers, labels)
        roots = [str(root), f"{tmp_path}/B/../A"]
        error, message = ConfigError, "A is given twice: its tiles would count twice"
    elif case == "none":
        roots, model = [], stub(make_config(data__val=[]))
        error, message = ConfigError, "nothing to evaluate on: name a ROOT, .*, as data.val names none"
    else:
        write_tile(root, "t", answers, labels)
        model = stub(config, probability=np.nan)
        error, message = KdpipeError, "a stub predicts A/t with numbers that are not finite"
    with pytest.raises(error, match=message):
        evaluate(model, roots)


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
    whole["kdpipe"]["config"] = whole["kdpipe"]["config"].replace("alpha:", "alfa:")
    torch.save(whole, tmp_path / "foreign.ckpt")
    with pytest.raises(ConfigError, match=r"the configuration in .*foreign\.ckpt: unknown key distill\.alfa"):
        student_model(tmp_path / "foreign.ckpt", CPU, tta=None, window=None)


def test_images_go_through_the_stretch_that_training_recorded(make_config, landscape):
    config = make_config(train__epochs=1, train__max_steps=1, data__stretch={"percentiles": [2, 98]})
    train(with_mode(config, "none"), CPU)
    recorded = torch.load(BEST, weights_only=True)["kdpipe"]["stretch"]
    model = student_model(BEST, CPU, tta=None, window=None)
    assert model.stretch == [tuple(pair) for pair in recorded]
    assert model.stretch == teacher_model(config, CPU, tta=None, window=None).stretch
    seen = []

    def answer(image_HWC):
        seen.append(image_HWC)
        return model.predict(image_HWC)

    evaluate(Model(**{**vars(model), "answer": answer}))
    image = read_root(landscape / "Val")[0][0].astype(np.float64)
    low, high = np.array(recorded).T
    np.testing.assert_array_equal(seen[0], np.rint(np.clip((image - low) / (high - low), 0, 1) * 255))


def test_the_picture_is_a_png_with_one_panel_a_root_and_one_of_all(make_config, tmp_path):
    config = make_config()
    for name in "AB":
        write_tile(tmp_path / name, "t", *random_tile(ord(name)))
    one = evaluate(stub(config), [str(tmp_path / "A")])
    two = evaluate(stub(config), [str(tmp_path / "A"), str(tmp_path / "B")])
    draw_confusion(one, tmp_path / "one.png")
    draw_confusion(two, tmp_path / "two.png")
    (width, height), (wide, high) = png_size(tmp_path / "one.png"), png_size(tmp_path / "two.png")
    assert wide > 1.6 * width
    assert high > 1.6 * height


def test_the_command_prints_and_writes_what_the_library_finds(trained, tmp_path, monkeypatch, capsys):
    roots = [*trained.data.val, *trained.data.train]
    options = ["--tta", "flips", "--boundary-width", "5", "--json", "e.json", "--png", "deep/e.png"]
    assert run(monkeypatch, BEST, *roots, *options) == 0
    content = json.loads(Path("e.json").read_text(), parse_constant=pytest.fail)  # no NaN
    expected = evaluate(student_model(BEST, CPU, tta="flips", window=None), roots, boundary_width_px=5)
    assert content == json.loads(json.dumps(expected.as_dict()))
    assert content["roots"][0]["boundary"]["width_px"] == 5
    assert sum(b["pixels"] for b in content["together"]["calibration"]["bins"]) == content["together"]["pixels"]
    printed = capsys.readouterr().out
    assert "F1 5 px" in printed
    assert f"all roots: {expected.together.tiles} tiles" in printed
    assert png_size("deep/e.png")
    (tmp_path / "c.yaml").write_text(dump_config(trained))
    assert run(monkeypatch, "--teacher", "-c", "c.yaml") == 0
    assert "the teacher of tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'CHECKPOINT'"),
        (["-c", "demo"], "--teacher and -c CONFIG go together"),
        (["x.ckpt", "--teacher"], "--teacher and -c CONFIG go together"),
        (["x.ckpt"], "no checkpoint at "),
        (["x.ckpt", "--tta", "d8"], "'d8' is not one of"),
        (["x.ckpt", "--window", "3"], "3 is not in the range"),
        (["x.ckpt", "--boundary-width", "0"], "0 is not in the range"),
        (["--teacher", "-c", "demo"], "demo_output/teacher.pth"),
        (["x.ckpt", "--json", "file/scores.json"], "--json file/scores.json: its folder cannot be made: "),
        (["x.ckpt", "--png", "locked.png"], "--png locked.png: there is no permission to write it"),
    ],
)
def test_mistakes_end_with_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("locked.png").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path).name != "locked.png")
    assert run(monkeypatch, *arguments) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert "Traceback" not in complaint


def test_options_and_keys_of_the_docs_exist(make_config, tmp_path):
    options = {option for parameter in cli.commands["evaluate"].params for option in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", DOCS)) <= options
    write_tile(tmp_path / "A", "t", *random_tile(1))
    content = evaluate(stub(make_config()), [str(tmp_path / "A")]).as_dict()
    table = re.findall(r"^\| `([a-z_0-9.]+)`", DOCS, flags=re.MULTILINE)
    assert len(table) >= 9
    for path in table:
        value = content["roots"][0]
        for key in path.split("."):
            assert key in value, path
            value = value[key]


@pytest.mark.timeout(300)
def test_the_real_teacher_scores_as_in_ten_lines_of_numpy(dubai, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = dubai / "pretrain_weights" / "u-efficientnet-b4_s0_CELoss_pretrained.pth"
    network = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network.eval()
    answers, masks = [], []
    for stem in ("t2_001", "t6_001"):
        for kind in ("images", "masks"):
            source = next((dubai / "data" / "dubai" / "Val" / kind).glob(f"{stem}.*"))
            (tmp_path / "Val" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "Val" / kind / source.name).symlink_to(source)
        # Decoders of JPEG differ: Pillow's gives Forest 0.1 points more here.
        image = read_image(tmp_path / "Val" / "images" / f"{stem}.jpg")
        masks.append(np.asarray(Image.open(tmp_path / "Val" / "masks" / f"{stem}.png")))
        with torch.inference_mode():
            logits = network(padded(torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)[None]))
        tree, rangeland, cropland, developed, road, bare, water, background = logits[0].softmax(dim=0).numpy()
        mapped = [water + background, tree, 0.7 * rangeland, cropland, developed + road, 0.3 * rangeland + bare]
        answers.append(np.argmax(mapped, axis=0)[: image.shape[0], : image.shape[1]])
    config = load_config("dubai/linknet_kd", [f"teacher.checkpoint={checkpoint}"])
    result = evaluate(teacher_model(config, CPU, tta=None, window=None), ["Val"])
    expected = numpy_iou(answers, masks)
    for name, value in zip(config.classes.names, expected, strict=True):
        if name in ("Grassland", "Cropland"):
            assert result.together.scores.left_out[name] == "absent from the labels"
        else:
            assert result.together.scores.iou[name] == pytest.approx(value, abs=1e-5)


def test_an_image_that_is_cut_off_is_an_error_that_names_it(make_config, tmp_path):
    write_tile(tmp_path / "A", "t", *random_tile(1))
    write_image(tmp_path / "A" / "images" / "u.png", 40, 53)
    Image.fromarray(np.zeros((40, 53), np.uint8)).save(tmp_path / "A" / "masks" / "u.png")
    file = tmp_path / "A" / "images" / "u.png"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cannot read .*u\.png, which is damaged"):
        evaluate(stub(make_config()), [str(tmp_path / "A")])


def test_the_default_boundary_width_of_command_and_library_are_one():
    (option,) = (p for p in cli.commands["evaluate"].params if p.name == "boundary_width")
    assert option.default == evaluation.BOUNDARY_WIDTH_PX
