"""The real tiles and their real teacher."""

import numpy as np
import pytest
import torch

from kdpipe.configs import load_config
from kdpipe.pipeline.precompute import precompute
from kdpipe.pipeline.training import train, with_mode
from kdpipe.pipeline.verify import verify

CPU = torch.device("cpu")
TRAIN, VAL = ("t1_002", "t1_006"), ("t2_001", "t6_001")


@pytest.fixture(scope="module")
def few_tiles(dubai, tmp_path_factory):
    """Links to a few of the real tiles, so that the real teacher can be run many times."""
    root = tmp_path_factory.mktemp("dubai")
    for split, stems in (("Train", TRAIN), ("Val", VAL)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
            for stem in stems:
                source = next((dubai / "data" / "dubai" / split / kind).glob(f"{stem}.*"))
                (root / split / kind / source.name).symlink_to(source)
    return root


@pytest.fixture
def config(dubai, few_tiles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = dubai / "pretrain_weights" / "u-efficientnet-b4_s0_CELoss_pretrained.pth"
    return load_config(
        "dubai/linknet_kd",
        [f"data.train=[{few_tiles}/Train]", f"data.val=[{few_tiles}/Val]", f"teacher.checkpoint={checkpoint}"],
    )


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
    assert "where the teacher answers Water" in messages
    assert "where the teacher answers Bareland" in messages


@pytest.mark.timeout(1200)
def test_cached_and_online_agree_at_every_one_of_thirty_steps(config, tmp_path):
    """
    Losses within 1e-3 at either width; validation mIoU within 0.2 points; a cached step is faster.

    The learning rates are a tenth of the config's: from random weights,
    AdamW at 1e-3 magnifies a difference of 1e-7 to 1e-3 within five steps, whatever the cache holds.
    """
    changes = {
        "batch_size": 4,
        "max_steps": 30,
        "epochs": 15,
        "val_every_epochs": 99,
        "lr": 1e-4,
        "backbone_lr": 1e-5,
        "mosaic": 0.0,
    }
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
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
