"""ONNX files as models of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema import Config, MeanStd
from kdpipe.pipeline.evaluation.evaluate import Model, Network
from kdpipe.pipeline.models.external.onnx_file import CLASSES
from kdpipe.pipeline.models.windows import blended_logits, full_taper, window_of
from kdpipe.pipeline.prediction.model import open_predictor


def exported_model(
    path: str | Path,
    config: Config,
    device: str | None,
    *,
    tta: str | None,
    window: int | None,
    say: Callable[[str], None] = lambda line: None,
) -> Model:
    """
    The student of an ONNX file; `config` says how tiles and masks are laid out, and what the network is where the file does not.

    A file that answers with classes has no calibration, and its windows are not blended. Raises what `open_predictor` raises, and
    `ConfigError` for a `window` of such a file, unless it takes one size alone.
    """
    predictor = open_predictor(path, device, tta=tta or "none", config=config, say=say)
    card = predictor.card
    window = window_of(predictor.side, window, str(path))
    if card.output == CLASSES and window is not None and predictor.side is None:
        raise ConfigError(
            f"--window blends logits, and {path} answers with classes: leave it out, or take a file that was exported without --argmax"
        )
    data = config.data.model_copy(
        update={"bands": card.bands, "band_names": card.band_names, "visible": None, "alpha": card.alpha}
    )
    student = config.student.model_copy(update={"bands": None, "normalize": MeanStd(mean=card.mean, std=card.std)})

    def predict(image_HWB: NDArray[np.uint8]) -> NDArray[np.float32]:
        image_NBHW = torch.from_numpy(image_HWB).permute(2, 0, 1)[None]
        logits_NCHW = (
            predictor.logits(image_NBHW)
            if window is None
            else blended_logits(predictor.logits, image_NBHW, window, None if card.output == CLASSES else full_taper)
        )
        probs_CHW: NDArray[np.float32] = torch.softmax(logits_NCHW, dim=1)[0].numpy()
        return probs_CHW

    return Model(
        description=Path(path).name,
        networks=[Network(str(path), window, tta or "none", scales=[1.0])],
        predict=predict,
        config=config.model_copy(update={"data": data, "student": student}),
        stretch=card.stretch,
        trained_on=[],  # unknown
        has_confidence=card.output != CLASSES,
    )
