"""
Overlapping windows over an image of any size, and the blending of their logits into those of the whole image.

Logits of a window differ from those of the whole image for three reasons: the window starts off the network's grid, its border
is padded where the image goes on, and near its border the network has not seen what lies beyond. Windows therefore start at
multiples of `STRIDE`, the last one ends where the image does, and the weights of a window fall towards its borders. `full_taper` is for
teachers, `tapered_overlap` for maps.

Shapes: N images, C classes, H W pixels of the image, h w of a band of rows or of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.models.views import STRIDE

# A teacher's windows share this part of their side. Half would cost twice as much and come no nearer to the whole image's logits.
OVERLAP = 0.25
# Pixels per yielded band: bounds the memory of the steps that follow, however wide the image is.
PIECE_PX = 2**20
# Part of the overlap that `tapered_overlap` ignores at each border; the quarter that remains in the middle is cross-faded. Measured
# with a LinkNet (RegNetX-200MF) on a real scene of 2514 × 2577 px, windows of 1024 px that share 128: the class differs from the whole
# scene's on 0.024 % of the pixels without a margin, 0.007 % with a quarter, 0.003 % with this; 4.3 % where windows start off the grid.
MARGIN = 0.375

Weights = Callable[[int, int, bool, bool], Tensor]
"""(side, overlap, has a neighbour before, has one behind) to the unnormalised weight of each pixel, float32 `(side,)`."""


def full_taper(side: int, overlap: int, before: bool, behind: bool) -> Tensor:
    """
    Weights that fall linearly from the middle of a window to half a pixel's at both borders, so that they are never all zero.

    Most teachers pool over the whole window, so neighbours differ in context everywhere, and a long cross-fade shows least of it.
    Measured with the EfficientNet-B4 U-Net on a real tile (644 × 797 px, windows of 256, T 2): across the lines where windows
    begin and end, the sum of |Δp| from one pixel to the next is 0.0194, against 0.0187 for the whole tile and 0.148 without
    weights. Mean |Δp| from the whole tile is 0.0092, with windows of 384 px 0.0073 and of 512 px 0.0029: the rest is the context
    that the encoder pools over.
    """
    ramp = torch.arange(side, dtype=torch.float32) + 0.5
    return torch.minimum(ramp, side - ramp)


def tapered_overlap(side: int, overlap: int, before: bool, behind: bool) -> Tensor:
    """Weights that are zero within `MARGIN` of the overlap at a border with a neighbour, and rise linearly from there."""
    place = torch.arange(side, dtype=torch.float32) + 0.5
    margin = overlap * MARGIN
    weight = torch.full((side,), float(side))
    if before:
        weight = torch.minimum(weight, place - margin)
    if behind:
        weight = torch.minimum(weight, side - place - margin)
    return weight.clamp(min=0)


@dataclass(frozen=True)
class Span:
    """A window along one axis: its start in px, and its share of each of its pixels, float32 `(side,)`. Shares of a pixel sum to one."""

    start: int
    shares: Tensor


def window_of(side: int | None, window: int | None, origin: str) -> int | None:
    """
    The side of windows for a network that takes images of `side` px alone: its own, or the multiple of `STRIDE` below.

    For a network of any size (None) it is `window` as given, which may be None: no windows. Raises `ConfigError`, which names `origin`,
    where another size was given.
    """
    if side is None or side < STRIDE:
        return window
    only = side // STRIDE * STRIDE
    if window not in (None, only):
        raise ConfigError(
            f"{origin} takes images of {side} x {side} px only, and --window is {window}: leave it out, or set --window {only}"
        )
    return only


def spans(size: int, side: int, overlap: int, weights: Weights) -> list[Span]:
    """
    Windows of `side` px over `size` px, all of one length; neighbours share at least `overlap` px.

    `side` and `overlap` are multiples of `STRIDE`, and `overlap` is at most half of `side`. The last window ends at the first
    multiple of `STRIDE` at or beyond `size`; a size below `side` is one window of that length.
    """
    padded = -(-size // STRIDE) * STRIDE
    side = min(side, padded)
    starts = _starts(padded, side, overlap)
    drawn = [weights(side, overlap, start > 0, start + side < padded) for start in starts]
    total = torch.zeros(padded)
    for start, weight in zip(starts, drawn, strict=True):
        total[start : start + side] += weight
    return [Span(start, weight / total[start : start + side]) for start, weight in zip(starts, drawn, strict=True)]


def cut_spans(size: int, side: int, overlap: int) -> list[Span]:
    """
    The windows of `spans`, with shares 0 and 1: two neighbours part in the middle of the pixels that they share.

    For networks that answer with classes, which cannot be averaged.
    """
    starts = [span.start for span in spans(size, side, overlap, full_taper)]
    padded = -(-size // STRIDE) * STRIDE
    side = min(side, padded)
    cuts = [0, *((before + side + behind) // 2 for before, behind in pairwise(starts)), padded]
    place = torch.arange(padded)
    return [
        Span(start, ((place >= first) & (place < end)).float()[start : start + side])
        for start, first, end in zip(starts, cuts[:-1], cuts[1:], strict=True)
    ]


def blended_logits(
    model: Callable[[Tensor], Tensor], images_NCHW: Tensor, window: int, weights: Weights | None = full_taper
) -> Tensor:
    """
    Logits `(N, C, H, W)` in main memory, blended from overlapping windows of `window` px; see `blended_bands`.

    Without `weights` they are not blended: each pixel is that of one window, as `cut_spans` parts them.
    """
    rows = lambda top, bottom: images_NCHW[..., top:bottom, :]  # noqa: E731
    height, width = images_NCHW.shape[-2:]
    bands = list(blended_bands(model, rows, height, width, window, weights))
    return bands[0] if len(bands) == 1 else torch.cat(bands, dim=-2)


def blended_bands(
    model: Callable[[Tensor], Tensor],
    rows: Callable[[int, int], Tensor],
    height: int,
    width: int,
    window: int,
    weights: Weights | None = full_taper,
) -> Iterator[Tensor]:
    """
    Logits in bands `(N, C, h, W)` from the top, blended from windows of `window` px, a multiple of `STRIDE`.

    `rows(top, bottom)` returns these rows of the images, `(N, 3, bottom - top, W)`, and is called from the top down. An image no
    larger than a window is passed to `model` as a whole.
    """
    if height <= window and width <= window:
        yield model(rows(0, height))
        return
    overlap = -(-round(window * OVERLAP) // STRIDE) * STRIDE
    rows_of_windows, columns = (
        cut_spans(size, window, overlap) if weights is None else spans(size, window, overlap, weights)
        for size in (height, width)
    )

    def logits_of(row: Span) -> Iterator[tuple[Span, Tensor]]:
        images_NChW = rows(row.start, min(row.start + len(row.shares), height))
        for column in columns:
            yield column, model(images_NChW[..., column.start : column.start + len(column.shares)]).cpu()

    yield from blended_rows(logits_of, rows_of_windows, height, width)


def blended_rows(
    logits_of: Callable[[Span], Iterable[tuple[Span, Tensor]]], rows: Sequence[Span], height: int, width: int
) -> Iterator[Tensor]:
    """
    Logits of an image of `height` × `width` px in bands `(N, C, h, W)` from the top, each once no further window adds to it.

    `logits_of(row)` returns the windows of one row: the column of each, and its logits `(N, C, h, w)`, cut off where the image
    ends. Windows that it leaves out count as zero; it returns at least one.
    """
    ends = [row.start for row in rows[1:]] + [height]
    piece = max(1, PIECE_PX // width)
    # Allocated once: freeing and allocating blocks of changing sizes fragments the memory.
    kept_NCHW: Tensor | None = None
    below_NChW: Tensor | None = None  # sums so far of rows that the next row of windows adds to
    for row, end in zip(rows, ends, strict=True):
        shares_h = row.shares[: height - row.start]
        if kept_NCHW is not None:
            kept_NCHW.zero_()
        for column, logits_NChw in logits_of(row):
            shares_w = column.shares[: width - column.start]
            if kept_NCHW is None:
                kept_NCHW = logits_NChw.new_zeros(*logits_NChw.shape[:2], len(shares_h), width)
            sums_NChw = kept_NCHW[..., : len(shares_h), column.start : column.start + len(shares_w)]
            sums_NChw.addcmul_(logits_NChw, torch.outer(shares_h, shares_w))
        assert kept_NCHW is not None
        strip_NChW = kept_NCHW[..., : len(shares_h), :]
        if below_NChW is not None:
            strip_NChW[..., : below_NChW.shape[-2], :] += below_NChW
        final = end - row.start
        for first in range(0, final, piece):
            yield strip_NChW[..., first : min(first + piece, final), :].clone()
        below_NChW = strip_NChW[..., final:, :].clone()


def _starts(padded: int, side: int, overlap: int) -> list[int]:
    """Evenly spread starts of windows of `side` px that share at least `overlap` px; all are multiples of `STRIDE`."""
    if side == padded:
        return [0]
    last, step = (padded - side) // STRIDE, max(1, (side - overlap) // STRIDE)
    count = -(-last // step)
    # Rounded down: no two are farther apart than a step, because a step is a whole number of strides.
    return [i * last // count * STRIDE for i in range(count + 1)]
