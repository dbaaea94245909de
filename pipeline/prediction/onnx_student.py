"""An ONNX file of `kdpipe export` as a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.memory import is_out_of_memory
from kdpipe.pipeline.models.external.onnx_file import CLASSES, INPUT, first_line, open_session


class OnnxStudent(nn.Module):
    """
    From normalised images, float32 `(N, B, H, W)`, to logits, float32 `(N, C, H, W)`, computed by onnxruntime.

    Where the file answers with classes, the logits are 1 for its class and 0 for the others. Raises `CheckpointError` for a file that
    cannot be read, or whose answer has another form.
    """

    def __init__(self, path: Path, output: str, num_classes: int, provider: str) -> None:
        super().__init__()
        self._path, self._output, self._num_classes = path, output, num_classes
        self.session = open_session(path, [provider])
        self.img_size = self.session.get_inputs()[0].shape[2:]  # read by `limits.sizes.fixed_side`
        self.strict_img_size = all(isinstance(side, int) for side in self.img_size)

    def forward(self, inputs_NBHW: Tensor) -> Tensor:
        found = self._answer(inputs_NBHW)
        if self._output != CLASSES:
            return torch.from_numpy(found)
        if found.max() >= self._num_classes:
            raise CheckpointError(
                f"{self._path} answers with the class {found.max()}, and describes {self._num_classes} classes from 0"
            )
        return (torch.from_numpy(found)[:, None] == torch.arange(self._num_classes)[:, None, None]).float()

    def _answer(self, inputs_NBHW: Tensor) -> NDArray[Any]:
        try:
            (found,) = self.session.run([self._output], {INPUT: inputs_NBHW.contiguous().numpy()})
        except Exception as err:  # onnxruntime's errors have no class in common
            if is_out_of_memory(err):
                raise
            raise CheckpointError(
                f"{self._path} cannot predict images of {tuple(inputs_NBHW.shape)}: {first_line(err)}"
            ) from err
        of_classes = self._output == CLASSES
        expected = (len(inputs_NBHW), *([] if of_classes else [self._num_classes]), *inputs_NBHW.shape[2:])
        dtype = "uint8" if of_classes else "float32"
        if not isinstance(found, np.ndarray) or found.shape != expected or found.dtype != dtype:
            raise CheckpointError(
                f"{self._path} answers images of {tuple(inputs_NBHW.shape)} by {getattr(found, 'shape', type(found).__name__)}, "
                f"expected {dtype} {self._output} of {expected}: take a file that `kdpipe export` wrote"
            )
        return found
