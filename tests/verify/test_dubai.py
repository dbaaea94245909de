"""The real tiles and their real teacher."""

import numpy as np
import pytest
import torch
from helpers.dubai import link_tiles
from PIL import Image

from kdpipe.configs import load_config
from kdpipe.data.rasters import read_image
from kdpipe.pipeline.models.windows import blended_logits, full_taper
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
TRAIN, VAL = ("t1_002", "t1_006"), ("t2_001", "t6_001")


@pytest.fixture(scope="module")
def few_tiles(dubai, tmp_path_factory):
    """Links to a few of the real tiles, so that the real teacher can be run many times."""
    root = tmp_path_factory.mktemp("dubai")
    for split, stems in (("Train", TRAIN), ("Val", VAL)):
        link_tiles(dubai, root, split, stems)
    return root


@pytest.fixture
def config(dubai, few_tiles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = dubai / "pretrain_weights" / "u-efficientnet-b4_s0_CELoss_pretrained.pth"
    return load_config(
        "dubai/linknet_kd",
        [f"data.train=[{few_tiles}/Train]", f"data.val=[{few_tiles}/Val]", f"teacher.checkpoint={checkpoint}"],
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_real_cache_passes_at_parity_and_a_wrong_channel_order_does_not(config, dubai, tmp_path):
    precompute(config, CPU)
    report = verify(config, "parity", CPU, sample=2)
    assert report.findings == []
    assert all(row.max_abs.value <= report.error_bound for row in report.parity)
    assert report.labels is not None
    assert report.labels.miou > 0.5
    assert report.labels.left_out == {"Grassland": "absent from the labels", "Cropland": "absent from the labels"}

    order = list(config.teacher.classes)
    order[5], order[6] = order[6], order[5]  # Bareland and Water change places
    wrong = config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update={"classes": order}),
            "cache": config.cache.model_copy(update={"path": str(tmp_path / "wrong.zarr")}),
        }
    )
    precompute(wrong, CPU)
    findings = verify(wrong, "parity", CPU, sample=2).findings
    assert {finding.code for finding in findings} == {"class-map"}
    messages = " ".join(finding.message for finding in findings)
    assert "where the teacher predicts Water" in messages
    assert "where the teacher predicts Bareland" in messages


@pytest.mark.long
@pytest.mark.timeout(900)
def test_no_seam_of_windows_shows_in_the_targets(config, few_tiles):
    """
    Windows of 256 px against the whole image: at the borders of windows, targets change no more than those of the whole image.

    Without blending they change at least twice as much, so that the test would notice a seam.
    """
    image_HWC = read_image(next((few_tiles / "Train" / "images").glob("t1_002.*")))[:448, :480]
    teacher = open_teacher(config, complete_recipe(config, None, None), CPU)
    answers = {}

    def ask(part_NCHW):
        place = (part_NCHW.storage_offset(), part_NCHW.shape)
        if place not in answers:
            answers[place] = teacher.logits(np.ascontiguousarray(part_NCHW.permute(0, 2, 3, 1).numpy()))
        return answers[place]

    def targets(weights):
        image_1CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
        return teacher.targets_of(blended_logits(ask, image_1CHW, 256, weights))[0]

    whole, blended = teacher.soft_targets(image_HWC[None])[0], targets(full_taper)
    cut = targets(lambda side, *_: torch.ones(side))
    lines_y, lines_x = [95, 191, 255, 351], [95, 223, 255, 351]  # windows start at 0, 96, 192 and at 0, 96, 224

    def change(probs_CHW):
        across_y = np.abs(np.diff(probs_CHW, axis=1)).sum(axis=0)[lines_y].mean()
        across_x = np.abs(np.diff(probs_CHW, axis=2)).sum(axis=0)[:, lines_x].mean()
        return (across_y + across_x) / 2

    difference = np.abs(blended - whole)
    agreement = (blended.argmax(axis=0) == whole.argmax(axis=0)).mean()
    print(f"change across seams: whole {change(whole):.4f}, blended {change(blended):.4f}, cut {change(cut):.4f}")
    print(
        f"|Δp| of windows from the whole: mean {difference.mean():.4f}, max {difference.max():.2f}; argmax {agreement:.4f}"
    )
    assert change(blended) < 1.1 * change(whole)
    assert change(cut) > 2 * change(whole)
    near = np.zeros(whole.shape[1:], dtype=bool)
    for line in lines_y:
        near[line - 3 : line + 5] = True
    for line in lines_x:
        near[:, line - 3 : line + 5] = True
    assert (
        difference[:, near].mean() < 1.2 * difference[:, ~near].mean()
    )  # the context differs everywhere, not at seams
    assert difference.mean() < 0.02


@pytest.fixture
def parts(few_tiles, tmp_path):
    """A part of 256 px of each training tile: online, the teacher predicts the whole tile for every sample."""
    for kind in ("images", "masks"):
        for source in (few_tiles / "Train" / kind).iterdir():
            target = tmp_path / "Parts" / kind / f"{source.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(source) as tile:
                tile.crop((0, 0, 256, 256)).save(target)
    return tmp_path / "Parts"


@pytest.mark.long
def test_cached_and_online_agree_at_every_one_of_thirty_steps(config, parts, tmp_path):
    """
    Losses agree within 1e-3 at either width, validation mIoU within 0.2 points, and a cached step is faster.

    The learning rates are a tenth of the config's: from random weights, AdamW at 1e-3 magnifies a difference of 1e-7 to
    1e-3 within five steps, whatever the cache holds.
    """
    changes = {
        "batch_size": 2,
        "max_steps": 30,
        "epochs": 15,
        "val_every_epochs": 99,
        "lr": 1e-4,
        "backbone_lr": 1e-5,
        "mosaic": 0.0,
    }
    data = config.data.model_copy(update={"train": [str(parts)]})
    config = config.model_copy(update={"train": config.train.model_copy(update=changes), "data": data})
    online = train(with_mode(config, "online"), CPU)
    assert len(online.losses) == 30
    for bits in (16, 8):
        cache = config.cache.model_copy(update={"bits": bits, "path": str(tmp_path / f"{bits}.zarr")})
        cached_config = config.model_copy(update={"cache": cache, "name": f"cached-{bits}"})
        precompute(cached_config, CPU)
        cached = train(cached_config, CPU)
        np.testing.assert_allclose(cached.losses, online.losses, rtol=1e-3)
        assert abs(cached.final["miou"] - online.final["miou"]) < 0.002
        assert cached.seconds_per_step < online.seconds_per_step
        print(
            f"{bits} bits: largest relative difference {np.abs(np.divide(cached.losses, online.losses) - 1).max():.1e}"
        )
        print(f"seconds a step: cached {cached.seconds_per_step:.2f}, online {online.seconds_per_step:.2f}")
