"""A student's checkpoint from a stranger makes kdpipe fetch nothing."""

import pytest
import timm
import torch
from helpers.configs import tiny_config

from kdpipe.configs import dump_config
from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.runs.checkpoint import FORMAT, load_trained


@pytest.mark.parametrize(
    "encoder", ["tu-hf-hub:stranger/net", "tu-hf_hub:stranger/net", "tu-local-dir:/srv/net", "tu-timm:resnet18"]
)
def test_an_encoder_that_would_be_fetched_is_refused(landscape, teacher_file, tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: pytest.fail("timm was asked"))
    config = dump_config(tiny_config(landscape, teacher_file, tmp_path, student__encoder=encoder))
    content = {
        "format": FORMAT, "kdpipe": {"config": config, "mode": "none", "fingerprint": None, "stretch": None},
        "position": {"batches": 0, "steps": 0, "best_miou": None}, "state_dict": {"student.e": torch.zeros(1)},
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="which timm would fetch from elsewhere"):
        load_trained(tmp_path / "last.ckpt")
