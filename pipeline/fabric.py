"""Lightning Fabric as stage two uses it: one device, and the precision that the config asks for."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema import Config, Precision

LIGHTNING_NAMES: dict[Precision, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def computed_precision(config: Config, device: torch.device) -> Precision:
    """What `train.precision` means on a device; `auto` is bf16 where a GPU computes it natively, else fp32."""
    precision = config.train.precision
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision fp16 needs a GPU (its loss scaling is not there on the CPU); use bf16 or fp32"
        )
    return precision


def open_fabric(config: Config, device: torch.device) -> Fabric:
    """A Fabric of its own state (loss scaling in fp16) on one device."""
    return Fabric(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=LIGHTNING_NAMES[computed_precision(config, device)],
    )
