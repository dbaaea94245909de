"""
Running a `Script`: from a tile's file to the scores that it would save, compared with those that were saved.

Shapes: C channels of the teacher, H W pixels of a tile, h w of what the network sees, N sampled pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdpipe.configs.schema import Config, Teacher
from kdpipe.data.declared.header import read_declared
from kdpipe.data.rasters import Stretch, read_image
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.models.views import STRIDE, TTA_VIEWS, averaged_logits
from kdpipe.pipeline.teacher.frozen import computing_in
from kdpipe.pipeline.teacher.loading import load_teacher
from kdpipe.pipeline.verify.reference_files import Scores
from kdpipe.pipeline.verify.scripts import BACKS, EXIF, TURNS, Given, Scaling, Script, Size, configured

SAMPLED_PX = 4096  # on which hypotheses are ranked; what explains a difference is compared on all pixels
SMALLEST_PROBABILITY = 1e-6  # below it channels are not told apart
MIRRORED = [(0, False), (0, True)]


class Target:
    """A tile, what was saved of it, and the pixels, evenly spread, on which hypotheses are ranked."""

    def __init__(self, tile: Tile, scores: Scores) -> None:
        self.tile, self.scores = tile, scores
        self.pixels = scores.values_CHW[0].size
        self.sample_N = torch.linspace(0, self.pixels - 1, min(self.pixels, SAMPLED_PX)).round().long()
        self._sampled: dict[str, Tensor] = {}

    def saved(self, activation: str) -> Tensor:
        """What was saved `(C, H, W)`, as a script with this `activation` saves it: probabilities, unless it takes a sigmoid."""
        return self._probs(torch.from_numpy(self.scores.values_CHW), activation)

    def sampled(self, activation: str) -> Tensor:
        """`saved` in the sampled pixels `(C, N)`."""
        if activation not in self._sampled:
            values_CN = torch.from_numpy(self.scores.values_CHW).flatten(1)[:, self.sample_N]
            self._sampled[activation] = self._probs(values_CN, activation)
        return self._sampled[activation]

    def fits(self, frame: tuple[int, int], shown: int) -> bool:
        """Whether scores of the size `frame`, turned as they are `shown`, have the size of those that were saved."""
        return (frame[::-1] if shown >= 5 else frame) == self.scores.values_CHW.shape[1:]

    @property
    def activations(self) -> list[str]:
        """The activations that may have led to values of this kind."""
        if self.scores.kind == "probabilities":
            return ["softmax", "softmax twice", "softmax of sigmoid", "normalised sigmoid"]
        return ["softmax", "sigmoid"] if self.scores.kind == "values in 0..1" else ["softmax"]

    def _probs(self, values: Tensor, activation: str) -> Tensor:
        as_they_are = self.scores.kind == "probabilities" or activation != "softmax"
        return values if as_they_are else torch.softmax(values, dim=0)


@dataclass(frozen=True)
class Difference:
    """How far probabilities differ from the saved ones; where the sizes differ nothing agrees: 1, 1, 0."""

    largest: float
    mean: float
    agreement: float


@dataclass(frozen=True)
class Attempt:
    """A script, and how far its scores differ from the saved ones on the sampled pixels."""

    script: Script
    largest: float
    mean: float


def difference(probs_CHW: Tensor, saved_CHW: Tensor) -> Difference:
    """The difference of two arrays of probabilities."""
    if probs_CHW.shape != saved_CHW.shape:
        return Difference(1.0, 1.0, 0.0)
    moved_CHW = (probs_CHW - saved_CHW).abs()
    agree_HW = probs_CHW.argmax(dim=0) == saved_CHW.argmax(dim=0)
    return Difference(moved_CHW.max().item(), moved_CHW.mean().item(), agree_HW.float().mean().item())


class Runner:
    """Runs scripts with one teacher, whose `model` is as it was loaded: hypotheses are tried on the network itself."""

    def __init__(
        self, model: nn.Module, key: str, teacher: Teacher, config: Config, stretch: Stretch, device: torch.device
    ) -> None:
        self.base = configured(teacher, config.data.numbers(teacher.bands))
        self._range_of = dict(zip(config.data.bands, stretch, strict=True)) if stretch else None
        self._models: dict[tuple[tuple[str, Any], ...], nn.Module] = {(): model}
        self._key, self._teacher = key, teacher
        self._alpha, self._device = config.data.alpha, device
        self._pixels: dict[tuple[str, str, tuple[int, ...]], NDArray[np.uint8]] = {}

    def given(self, target: Target) -> Given:
        """The facts about a tile on which the alternatives depend."""
        header = read_declared(target.tile.image)
        own = self._read(target.tile, self.base)
        decoders: list[Literal["Pillow", "GDAL"]] = []
        for decoder in ("Pillow", "GDAL"):
            pixels = self._read(target.tile, replace(self.base, decoder=decoder))
            if pixels.shape == own.shape and not np.array_equal(pixels, own):
                decoders.append(decoder)
        return Given(
            key=self._key,
            teacher=self._teacher,
            height=header.height,
            width=header.width,
            orientation=header.orientation,
            num_bands=header.bands,
            any_bands=self._range_of is None,
            decoders=tuple(decoders),
            precisions=("bf16", "fp16", *(["tf32"] if self._device.type == "cuda" else [])),
        )

    def attempts(self, script: Script, target: Target) -> list[Attempt]:
        """What becomes of a script's scores, as they are and with one more decision after the network's output, or two."""
        scores_Chw, frame = self.scores(script, target.tile)
        found, at_size = [], {}
        for back in BACKS if script.size.resizes else BACKS[:1]:
            at_size[back] = _resized_back(scores_Chw, frame, back)
            turns = [shown for shown in (1, *TURNS) if target.fits(frame, shown)]
            found += [_attempt(replace(script, back=back, shown=shown), at_size[back], target) for shown in turns]
        if not found:
            return []
        upright = min(found, key=lambda attempt: (attempt.script.shown != 1, attempt.mean)).script
        others = [replace(upright, activation=name) for name in target.activations[1:]]
        found += [_attempt(other, at_size[other.back], target) for other in others]
        best = min(found, key=lambda attempt: attempt.mean).script
        for start in {upright, best}:
            order = _best_order([(_sampled(start, at_size[start.back], target), target.sampled(start.activation))])
            if order is not None:
                found.append(_attempt(replace(start, order=order), at_size[start.back], target))
        return found

    def common_order(self, script: Script, targets: list[Target]) -> Script:
        """The script with the order of channels that fits all targets best together."""
        pairs = []
        for target in targets:
            scores_Chw, frame = self.scores(script, target.tile)
            if target.fits(frame, script.shown):
                tried_CN = _sampled(replace(script, order=None), _resized_back(scores_Chw, frame, script.back), target)
                pairs.append((tried_CN, target.sampled(script.activation)))
        return replace(script, order=_best_order(pairs))

    def difference(self, script: Script, target: Target) -> Difference:
        """How far a script's scores differ from the saved ones, over all pixels."""
        scores_Chw, frame = self.scores(script, target.tile)
        scores_CHW = turned(_resized_back(scores_Chw, frame, script.back), script.shown)
        return difference(_activated(script, scores_CHW), target.saved(script.activation))

    def scores(self, script: Script, tile: Tile) -> tuple[Tensor, tuple[int, int]]:
        """Logits `(C, h, w)`, or logs of averaged probabilities, float32, and the size `(H, W)` to which they are resized back."""
        pixels_HWB = self._read(tile, script)
        turn = read_declared(tile.image).orientation if script.turn == EXIF else int(script.turn)
        pixels_HWB = np.ascontiguousarray(turned(pixels_HWB.transpose(2, 0, 1), turn).transpose(1, 2, 0))
        frame = (pixels_HWB.shape[0], pixels_HWB.shape[1])
        target = script.size.target(*frame)
        values_hwB = pixels_HWB if target == frame else _resized(pixels_HWB, *target, script.interpolation)
        unit_Bhw = torch.from_numpy(np.ascontiguousarray(values_hwB)).permute(2, 0, 1).float() / 255
        inputs_1Bhw, black_1B11 = _normalised(unit_Bhw[None], script.scaling)
        model = self._model(script)
        if script.mode == "train":
            model = copy.deepcopy(model)  # batch norms in train mode change their running means
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        with torch.inference_mode(), _precision(script.precision, self._device):
            return self._averaged(model, inputs_1Bhw.to(self._device), script, black_1B11)[0].float().cpu(), frame

    def _model(self, script: Script) -> nn.Module:
        """The network with the script's options."""
        if script.options not in self._models:
            options = {**self._teacher.options, **dict(script.options)}
            teacher = self._teacher.model_copy(update={"options": options})
            self._models[script.options] = load_teacher(teacher, self._key, in_channels=len(self.base.bands)).to(
                self._device
            )
        return self._models[script.options]

    def _averaged(self, model: nn.Module, inputs_1Bhw: Tensor, script: Script, black_1B11: Tensor) -> Tensor:
        def predict(view_1Bhw: Tensor) -> Tensor:
            padded_1Bhw, (top, left) = _padded(view_1Bhw, script.size, black_1B11.to(view_1Bhw.device))
            logits: Tensor = model(padded_1Bhw)
            height, width = view_1Bhw.shape[-2:]
            return logits[..., top : top + height, left : left + width].float()

        name, mean_of = script.views
        if name == "configured":
            return averaged_logits(model, inputs_1Bhw, tta=self._teacher.tta, scales=self._teacher.scales)
        views = MIRRORED if name == "mirror" else TTA_VIEWS["none" if name == "one" else name]
        total: Tensor | float = 0.0
        for turns, mirror in views:
            view = torch.rot90(inputs_1Bhw.flip(-1) if mirror else inputs_1Bhw, turns, dims=(-2, -1))
            logits = torch.rot90(predict(view), -turns, dims=(-2, -1))
            logits = logits.flip(-1) if mirror else logits
            total = total + (torch.softmax(logits, dim=1) if mean_of == "probabilities" else logits)
        assert isinstance(total, Tensor)
        return (total / len(views)).log() if mean_of == "probabilities" else total / len(views)

    def _read(self, tile: Tile, script: Script) -> NDArray[np.uint8]:
        """The pixels `(H, W, B)` in the script's order of bands; those of another decoder are empty where it does not apply."""
        key = (tile.id, script.decoder, script.bands)
        if key not in self._pixels:
            if len(self._pixels) >= 32:
                self._pixels.clear()
            self._pixels[key] = self._decoded(tile, script)
        return self._pixels[key]

    def _decoded(self, tile: Tile, script: Script) -> NDArray[np.uint8]:
        if script.decoder == "kdpipe":
            if sorted(script.bands) != sorted(self.base.bands):
                return read_image(tile.image, script.bands, None, self._alpha)  # tried without a stretch alone
            stretch = [self._range_of[band] for band in self.base.bands] if self._range_of else None
            own_HWB = read_image(tile.image, self.base.bands, stretch, self._alpha)
            return own_HWB[..., [self.base.bands.index(band) for band in script.bands]]
        nothing = np.empty((0, 0, 3), dtype=np.uint8)
        if self._range_of is not None or tile.image.suffix.lower() in (".tif", ".tiff") or max(script.bands) > 3:
            return nothing
        read = _by_pillow if script.decoder == "Pillow" else _by_gdal
        pixels_HWB = read(tile)
        return nothing if pixels_HWB.shape[-1] != 3 else pixels_HWB[..., [band - 1 for band in script.bands]]


def turned(array: Any, turn: int) -> Any:
    """An array or tensor `(..., H, W)` turned as EXIF's orientation `turn` says that a stored image is to be shown."""
    if turn >= 5:
        array = array.swapaxes(-2, -1)
    # Of the transposed image for 5 to 8: 6 is a quarter turn clockwise, 8 anticlockwise.
    flips = {2: (False, True), 3: (True, True), 4: (True, False), 6: (False, True), 7: (True, True), 8: (True, False)}
    vertical, horizontal = flips.get(turn, (False, False))
    axes = tuple(axis for axis, flipped in ((-2, vertical), (-1, horizontal)) if flipped)
    return torch.flip(array, axes) if isinstance(array, Tensor) else np.flip(array, axes)


_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, dim=0),
    "sigmoid": torch.sigmoid,
    "softmax twice": lambda z: torch.softmax(torch.softmax(z, dim=0), dim=0),
    "softmax of sigmoid": lambda z: torch.softmax(torch.sigmoid(z), dim=0),
    "normalised sigmoid": lambda z: torch.sigmoid(z) / torch.sigmoid(z).sum(dim=0, keepdim=True),
}


def _activated(script: Script, scores: Tensor) -> Tensor:
    """What a script makes of scores `(C, …)`: probabilities in the order in which it saves them."""
    probs = _ACTIVATE[script.activation](scores)
    return probs if script.order is None else probs[list(script.order)]


def _attempt(script: Script, scores_CHW: Tensor, target: Target) -> Attempt:
    moved_CN = (_sampled(script, scores_CHW, target) - target.sampled(script.activation)).abs()
    if not torch.isfinite(moved_CN).all():
        return Attempt(script, 1.0, 1.0)
    return Attempt(script, moved_CN.max().item(), moved_CN.mean().item())


def _sampled(script: Script, scores_CHW: Tensor, target: Target) -> Tensor:
    """What a script saves `(C, N)` in the sampled pixels; the scores are not turned yet."""
    sample_N = target.sample_N
    if script.shown != 1:
        places_HW = torch.arange(scores_CHW[0].numel()).view(scores_CHW.shape[1:])
        sample_N = turned(places_HW, script.shown).reshape(-1)[sample_N]
    return _activated(script, scores_CHW.flatten(1)[:, sample_N])


def _best_order(pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, ...] | None:
    """
    The channel that is saved as the jth, for each j, from pairs of scores `(C, N)` and saved scores; None if it is j for all.

    Channels are matched one to one so that the logs of their probabilities differ least.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    logs = [[tensor.clamp(min=SMALLEST_PROBABILITY).log().numpy() for tensor in pair] for pair in pairs]
    if not pairs or not all(np.isfinite(array).all() for pair in logs for array in pair):
        return None
    distances_CC = sum(cdist(saved_CN, tried_CN, "cityblock") / tried_CN.shape[1] for tried_CN, saved_CN in logs)
    channels = len(distances_CC)
    # Channels that cannot be told apart stay in their places.
    _, order = linear_sum_assignment(distances_CC - 1e-6 * np.eye(channels))
    return None if list(order) == list(range(channels)) else tuple(int(channel) for channel in order)


def _normalised(unit_1Bhw: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """The network's input from `x / 255`, and what a black pixel becomes `(1, B, 1, 1)`."""
    bands = unit_1Bhw.shape[1]
    mean, std = (torch.tensor(values).view(1, bands, 1, 1) for values in (scaling.mean, scaling.std))
    if scaling.per_tile == "range":
        mean = unit_1Bhw.amin(dim=(1, 2, 3), keepdim=True).expand(1, bands, 1, 1)
        std = unit_1Bhw.amax(dim=(1, 2, 3), keepdim=True) - mean
    elif scaling.per_tile is not None:
        axes = (2, 3) if scaling.per_tile == "channels" else (1, 2, 3)
        mean = unit_1Bhw.mean(dim=axes, keepdim=True).expand(1, bands, 1, 1)
        std = unit_1Bhw.std(dim=axes, keepdim=True, correction=0).expand(1, bands, 1, 1)
    std = std.clamp(min=1e-12)
    return (unit_1Bhw - mean) / std, -mean / std


def _padded(inputs_1Bhw: Tensor, size: Size, black_1B11: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Inputs of a multiple of 32 px, and where the image starts in them."""
    more = [-side % STRIDE for side in inputs_1Bhw.shape[-2:]]
    if not any(more):
        return inputs_1Bhw, (0, 0)
    top, left = (rest // 2 if size.centred else 0 for rest in more)
    width = ((0, 0), (0, 0), (top, more[0] - top), (left, more[1] - left))
    if size.way == "zeros":
        padded = np.pad((inputs_1Bhw - black_1B11).cpu().numpy(), width)
        return torch.from_numpy(padded).to(inputs_1Bhw.device) + black_1B11, (top, left)
    way: Any = "reflect" if size.resizes else size.way
    padded = np.pad(inputs_1Bhw.cpu().numpy(), width, mode=way)
    return torch.from_numpy(padded).to(inputs_1Bhw.device), (top, left)


def _resized(pixels_HWB: NDArray[np.uint8], height: int, width: int, interpolation: str) -> NDArray[Any]:
    """Pixels of 0..255 `(h, w, B)`, rounded to uint8 where the library does that."""
    if pixels_HWB.shape[-1] != 3:  # Pillow and OpenCV resize few other numbers of bands at once
        parts = [_resized(np.repeat(band_HW[..., None], 3, axis=-1), height, width, interpolation)[..., :1]
                 for band_HW in pixels_HWB.transpose(2, 0, 1)]  # fmt: skip
        return np.concatenate(parts, axis=-1)
    library, _, kind = interpolation.partition("'s ")
    if library == "torch":
        image = torch.from_numpy(pixels_HWB).permute(2, 0, 1)[None].float()
        resized = F.interpolate(image, (height, width), mode="bilinear", antialias="antialiased" in kind)
        return resized[0].permute(1, 2, 0).numpy()
    if library == "Pillow":
        from PIL import Image

        how = Image.Resampling.BICUBIC if kind == "bicubic" else Image.Resampling.BILINEAR
        return np.array(Image.fromarray(pixels_HWB).resize((width, height), how))
    import cv2

    ways = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA, "nearest": cv2.INTER_NEAREST}
    return np.asarray(cv2.resize(pixels_HWB, (width, height), interpolation=ways[kind]))


def _resized_back(scores_Chw: Tensor, frame: tuple[int, int], back: str) -> Tensor:
    """Scores `(C, H, W)` at a tile's own size."""
    if scores_Chw.shape[1:] == frame:
        return scores_Chw
    if back == "nearest":
        return F.interpolate(scores_Chw[None], frame, mode="nearest")[0]
    values_Chw = torch.softmax(scores_Chw, dim=0) if back == "probabilities" else scores_Chw
    values_CHW = F.interpolate(values_Chw[None], frame, mode="bilinear", align_corners=False)[0]
    return values_CHW.log() if back == "probabilities" else values_CHW


def _by_pillow(tile: Tile) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(tile.image) as image:
        return np.array(image.convert("RGB"))


def _by_gdal(tile: Tile) -> NDArray[np.uint8]:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tile.image) as raster:
            pixels_BHW: NDArray[np.uint8] = raster.read()
    return np.ascontiguousarray(pixels_BHW[:3].transpose(1, 2, 0))


@contextmanager
def _precision(name: str, device: torch.device) -> Iterator[None]:
    if name != "tf32":
        with computing_in(name, device):
            yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield
