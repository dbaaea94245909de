"""
The integers of a cache, computed on the teacher's device, so that only a quarter of the bytes is copied from it.

They equal those of `kdpipe.cache.codec` bit for bit, which tests check; the `encoding` modules explain the method. This code takes few
large steps over a whole batch; on a CPU the codec is faster, as its bands stay in a core's cache.

Shapes: N tiles, C classes, H W their pixels, K blocks of R rows.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdpipe.cache.encoding import logits, many_classes, simplex, steady_rounding
from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe


class Rounded(NamedTuple):
    """
    A batch as integers, `(N, C, H, W)`, uint8 or uint16; the entropy that rounding took from each block, float64 (see
    `simplex.entropy_error`; empty for logits); and one bool, whether the values can be stored.
    """

    units_NCHW: Tensor
    lost: Tensor
    valid: Tensor


def rounded(values_NCHW: Tensor, recipe: CacheRecipe) -> Rounded:
    """`codec.units_of` of every tile of a float32 batch, without waiting for the device."""
    storage = torch.uint8 if recipe.dtype == np.uint8 else torch.uint16
    if isinstance(recipe, LogitsRecipe):
        units_NCHW, lost = _logits(values_NCHW, recipe.bits), values_NCHW.new_empty(len(values_NCHW), 0, 0)
        return Rounded(units_NCHW.to(storage), lost.double(), torch.isfinite(values_NCHW).all())
    sums_NHW, tolerance = values_NCHW.sum(dim=1), simplex.SUM_TOLERANCE
    valid = ((sums_NHW - 1).abs() <= tolerance).all() & (values_NCHW >= -tolerance).all()
    units_NCHW = (_with_parts if recipe.has_parts else _plain)(values_NCHW, recipe.levels)
    if not recipe.has_parts and recipe.bits <= steady_rounding.MAX_BITS:
        units_NCHW = _steady(values_NCHW, units_NCHW, recipe.bits, recipe.levels)
    return Rounded(units_NCHW.to(storage), _entropy_error(values_NCHW, units_NCHW, recipe.levels), valid)


def _logits(logits_NCHW: Tensor, bits: int) -> Tensor:
    exact_NCHW, top = logits_NCHW.double(), simplex.total(bits)
    depth_NCHW = exact_NCHW.amax(dim=1, keepdim=True) - exact_NCHW
    return (top - (top * (depth_NCHW / logits.DEPTH[bits]).clamp(max=1).sqrt()).round()).int()


def _plain(probs_NCHW: Tensor, levels: int) -> Tensor:
    """Integers by largest remainder, int32."""
    if levels * simplex.SUM_TOLERANCE > simplex.MOST_OFF:
        sums_N1HW = probs_NCHW.sum(dim=1, keepdim=True)
        off_N1HW = (sums_N1HW - 1).abs() * levels > simplex.MOST_OFF
        probs_NCHW = probs_NCHW / torch.where(off_N1HW, sums_N1HW, torch.ones_like(sums_N1HW))
    remainders_NCHW = probs_NCHW.clamp(0, 1) * levels
    floors_NCHW = remainders_NCHW.floor()
    remainders_NCHW -= floors_NCHW
    missing_N1HW = levels - floors_NCHW.sum(dim=1, keepdim=True)
    if probs_NCHW.shape[1] > simplex.MOST_PAIRED:
        return floors_NCHW.int() + _sorted(remainders_NCHW, missing_N1HW)
    rank_NCHW = torch.zeros_like(probs_NCHW, dtype=torch.int16)
    for i in range(probs_NCHW.shape[1]):
        for j in range(i):
            lower_first_NHW = remainders_NCHW[:, j] >= remainders_NCHW[:, i]
            rank_NCHW[:, i] += lower_first_NHW
            rank_NCHW[:, j] += ~lower_first_NHW
    return floors_NCHW.int() + (rank_NCHW < missing_N1HW)


def _sorted(remainders_NCHW: Tensor, missing_N1HW: Tensor) -> Tensor:
    """Which classes get one of the missing units, as `simplex` finds them for many classes."""
    rising_NCHW = remainders_NCHW.sort(dim=1).values
    last_N1HW = remainders_NCHW.shape[1] - missing_N1HW.clamp(min=1).long()
    least_N1HW = rising_NCHW.take_along_dim(last_N1HW, dim=1).masked_fill(missing_N1HW < 1, torch.inf)
    served_NCHW, equal_NCHW = remainders_NCHW > least_N1HW, remainders_NCHW == least_N1HW
    left_N1HW = missing_N1HW - served_NCHW.sum(dim=1, keepdim=True)
    return served_NCHW | (equal_NCHW & (equal_NCHW.cumsum(dim=1, dtype=torch.int16) <= left_N1HW))


def _with_parts(probs_NCHW: Tensor, levels: int) -> Tensor:
    """Integers, int32, as `many_classes.encode` rounds them."""
    first, *finer = many_classes.STEPS
    units_NCHW = _plain(probs_NCHW, levels // first) * first
    for step in finer:
        finer_N1HW = _moves_too_much(probs_NCHW, units_NCHW, levels)
        units_NCHW = torch.where(finer_N1HW, _plain(probs_NCHW, levels // step) * step, units_NCHW)
    return units_NCHW


def _moves_too_much(probs_NCHW: Tensor, units_NCHW: Tensor, levels: int) -> Tensor:
    """`simplex.moves_too_much` of every tile, bool `(N, 1, H, W)`; classes are added up in the same order."""
    moved_N1HW = torch.zeros_like(probs_NCHW[:, :1])
    for channel in range(probs_NCHW.shape[1]):
        this = slice(channel, channel + 1)
        moved_N1HW += (probs_NCHW[:, this] * levels - units_NCHW[:, this]).abs()
    return moved_N1HW > float(np.float32(2 * simplex.MOST_MOVED * levels))


def _steady(probs_NCHW: Tensor, plain_NCHW: Tensor, bits: int, levels: int) -> Tensor:
    """Integers, int16, that repeat the row above wherever the error bound allows; `plain_NCHW` is the result of `_plain`."""
    height = probs_NCHW.shape[2]
    whole = height - height % KEY_ROW_PX
    room = steady_rounding.room(bits, levels, probs_NCHW.shape[1])
    parts = [
        _steady_blocks(probs_NCHW[:, :, part], plain_NCHW[:, :, part].short(), levels, room)
        for part in (slice(0, whole), slice(whole, height))
        if part.stop > part.start
    ]
    units_NCHW = torch.cat(parts, dim=2)
    if not steady_rounding.may_move_too_much(bits, levels, probs_NCHW.shape[1]):
        return units_NCHW
    return torch.where(_moves_too_much(probs_NCHW, units_NCHW, levels), plain_NCHW.short(), units_NCHW)


def _steady_blocks(probs_NCHW: Tensor, plain_NCHW: Tensor, levels: int, room: np.float32) -> Tensor:
    """Encode blocks of equal height, row by row in all of them at once. No step branches on values, which would wait for the device."""
    count, num_classes, height, width = probs_NCHW.shape
    rows = min(KEY_ROW_PX, height)
    probs_NCKRW, plain_NCKRW = (x.reshape(count, num_classes, -1, rows, width) for x in (probs_NCHW, plain_NCHW))
    scaled_NCKRW = probs_NCKRW * levels + float(room)
    highest_NCKRW = scaled_NCKRW.short()
    lowest_NCKRW = (scaled_NCKRW + float(1 - 2 * room)).short()
    order_NCK11 = (-highest_NCKRW.sum(dim=(3, 4), keepdim=True, dtype=torch.int64)).argsort(dim=1, stable=True)
    upwards_W = torch.arange(width, device=probs_NCHW.device) // steady_rounding.STRIPE_PX % 2 == 1

    def turned(values_NCKRW: Tensor) -> Tensor:
        return torch.where(upwards_W, values_NCKRW.flip(3), values_NCKRW)

    def by_rows(values_NCKRW: Tensor) -> Tensor:
        return turned(values_NCKRW.take_along_dim(order_NCK11, dim=1)).permute(3, 1, 0, 2, 4).contiguous()

    lowest_RCNKW, highest_RCNKW, plain_RCNKW = map(by_rows, (lowest_NCKRW, highest_NCKRW, plain_NCKRW))
    units_RCNKW = plain_RCNKW.clone()
    for row in range(1, rows):
        lowest_CNKW, highest_CNKW = lowest_RCNKW[row], highest_RCNKW[row]
        units_CNKW = units_RCNKW[row - 1].clamp(lowest_CNKW, highest_CNKW)
        excess_NKW = units_CNKW.sum(dim=0, dtype=torch.int16) - levels
        for units_NKW, lowest_NKW, highest_NKW in zip(units_CNKW, lowest_CNKW, highest_CNKW, strict=True):
            wanted_NKW = units_NKW - excess_NKW
            torch.clamp(wanted_NKW, lowest_NKW, highest_NKW, out=units_NKW)
            excess_NKW = units_NKW - wanted_NKW
        # Where float32 leaves no room, plain rounding stays.
        torch.where(excess_NKW == 0, units_CNKW, units_RCNKW[row], out=units_RCNKW[row])
    units_NCKRW = turned(units_RCNKW.permute(2, 1, 3, 0, 4))
    return units_NCKRW.take_along_dim(order_NCK11.argsort(dim=1), dim=1).flatten(2, 3)


def _entropy_error(probs_NCHW: Tensor, units_NCHW: Tensor, levels: int) -> Tensor:
    side = simplex.ENTROPY_BLOCK_PX
    unit_terms = _entropy_terms(levels, probs_NCHW.device)
    lost_NHW = unit_terms[units_NCHW.int()].sum(dim=1) - (probs_NCHW.clamp(min=1e-30).log() * probs_NCHW).sum(dim=1)

    def sums(values_NHW: Tensor) -> Tensor:
        count, height, width = values_NHW.shape
        padded = torch.nn.functional.pad(values_NHW.double(), (0, -width % side, 0, -height % side))
        return padded.reshape(count, -(-height // side), side, -(-width // side), side).sum(dim=(2, 4))

    return sums(lost_NHW) / sums(torch.ones_like(lost_NHW[:1]))


@cache  # because a copy to a GPU waits for all of its pending work
def _entropy_terms(levels: int, device: torch.device) -> Tensor:
    return torch.from_numpy(simplex.entropy_terms(levels)).to(device)
