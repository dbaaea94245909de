"""The network that an exporter traces: one graph for images of any size, or for one size alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.models.limits.sizes import fixed_side
from kdpipe.pipeline.models.views import STRIDE

LEAST_PX = 2 * STRIDE


class AnySize(nn.Module):
    """A student in one graph for all sizes: pads to multiples of `STRIDE` as `views.padded_logits` does, and crops back."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.eval()  # otherwise torch.onnx.export would return the student to training mode

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits `(N, C, H, W)` of normalised images `(N, B, H, W)`."""
        height, width = images_NCHW.shape[-2:]
        padded = images_NCHW
        for dim, size in ((-2, height), (-1, width)):
            # No branch on sizes. Rounded up without negative quotients, which ONNX rounds up and Python down.
            target = (size + STRIDE - 1) // STRIDE * STRIDE
            last = torch.arange(size, device=padded.device)[-1]
            period = (2 * last).clamp(min=1)
            position = torch.arange(target, device=padded.device) % period
            padded = padded.index_select(dim, torch.minimum(torch.minimum(position, period - position), last))
        logits: Tensor = self.student(padded)
        return logits[..., :height, :width]


def one_size(student: nn.Module) -> nn.Module:
    """
    A copy of a student for a graph of one size, a multiple of `STRIDE`.

    Exporters know `adaptive_avg_pool2d` only for sizes that its output divides, and UPerNet and BEiT pool to 6 x 6. In the copy it is a
    product with constant matrices, equal up to the order of its sums.
    """
    student = copy.deepcopy(student).eval()
    for module in student.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            pool: Callable[[Tensor], Tensor] = partial(_pooled, module.output_size)
            module.forward = pool  # type: ignore[method-assign, assignment]
    return student


def _pooled(size: int | tuple[int | None, ...] | None, x_NCHW: Tensor) -> Tensor:
    """Means over the cells of a grid, as `adaptive_avg_pool2d` cuts them: from `floor(i H / h)` to `ceil((i + 1) H / h)`."""
    wanted = size if isinstance(size, tuple) else (size, size)
    rows_hH, columns_wW = (
        _cells(int(side), side if count is None else count)
        for side, count in zip(x_NCHW.shape[-2:], wanted, strict=True)
    )
    return rows_hH.to(x_NCHW) @ x_NCHW @ columns_wW.to(x_NCHW).T


def _cells(side: int, count: int) -> Tensor:
    """The share of each of `side` pixels in each of `count` means, `(count, side)`."""
    shares = torch.zeros(count, side)
    for cell in range(count):
        first, end = cell * side // count, -(-(cell + 1) * side // count)
        shares[cell, first:end] = 1 / (end - first)
    return shares


def require_side(side: int | None, student: nn.Module) -> None:
    """Raise `ConfigError` for a `--size` that windows cannot have, or that the student does not take."""
    only = fixed_side(student)
    if side is not None and (side % STRIDE or side < LEAST_PX):
        raise ConfigError(
            f"--size must be a multiple of {STRIDE} px, from {LEAST_PX} up, so that windows of it lie in the network's grid; found {side}"
        )
    if side is not None and only not in (None, side):
        raise ConfigError(
            f"the student takes images of {only} x {only} px only, and --size is {side}: set --size {only}"
        )
