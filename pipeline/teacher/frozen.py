"""
The frozen teacher's predictions: logits, soft targets, and what a cache stores of them.

Shapes: N images, C_t classes of the teacher, C_s of the student, B bands that are read, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.cache import codec
from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe
from kdpipe.cache.tile import Encoded
from kdpipe.configs.errors import KdpipeError
from kdpipe.configs.schema import Config, MeanStd
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.views import averaged_logits
from kdpipe.pipeline.models.windows import blended_bands, blended_logits
from kdpipe.pipeline.teacher.cuda import Clock, PendingCopy, Transfers
from kdpipe.pipeline.teacher.fold import folded, with_cast_weights
from kdpipe.pipeline.teacher.loading import load_teacher
from kdpipe.pipeline.teacher.rounding import rounded
from kdpipe.pipeline.teacher.soft_targets import SoftTargets

# Pixels whose softmax is taken at once. On a CPU such a band stays in the core's cache; an accelerator takes larger bands, to avoid
# many small copies.
CPU_SOFTMAX_PX, SOFTMAX_PX = 2**16, 2**20
TRIAL_PX = 256  # side of the part of the first image on which an optimised network is compared with the original
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Images = NDArray[Any] | PendingCopy  # what `FrozenTeacher.send` returns


def open_teacher(
    config: Config, recipe: CacheRecipe, device: torch.device, say: Callable[[str], None] = lambda line: None
) -> FrozenTeacher:
    """The configured teacher, or the mean of several, on `device`; says and raises what `load_teacher` does."""
    softening = Softening(config.distill.temperature, config.class_map_matrix())
    if config.has_predictions:
        return StoredTeacher([], recipe, softening, torch.device("cpu"))
    places = [config.data.places(member.bands) for member in config.members.values()]
    models = [
        load_teacher(member, key, say, in_channels=len(seen))
        for (key, member), seen in zip(config.members.items(), places, strict=True)
    ]
    return FrozenTeacher(models, recipe, softening, device, places)


class FrozenTeacher:
    """
    A teacher that predicts soft targets (see `soft_targets.SoftTargets`).

    `recipe` holds, for each of `models`, its normalisation, precision, test-time augmentation and window, and which of its channels
    stands for which class; `places` holds where the bands that it sees lie in the images (None: it sees all of them, in their order).
    `softening` holds T and M. z is the weighted mean of the models' logits over the kept channels: dropped
    channels take no part in the softmax. The logits of different networks are on different scales; up to a constant, which softmax
    ignores, their mean is the logarithm of the geometric mean of the networks' probabilities.

    With a `window` the device holds one window of a scene at a time. Whole scenes take 4 bytes of main memory for each class and
    pixel; `cached_bands` takes that for one row of windows only.
    """

    def __init__(
        self, models: Sequence[nn.Module], recipe: CacheRecipe, softening: Softening, device: torch.device,
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self._models = [model.to(device).to(memory_format=torch.channels_last) for model in models]
        self._optimised: set[int] = set()  # numbers of the models that their first image has optimised
        self._recipe = recipe
        self._places = places
        self._device = device
        self._softened = SoftTargets(softening, device)
        self._mapped = SoftTargets(replace(softening, temperature=1.0), device)
        self._shares = [record.weight / sum(r.weight for r in recipe.teachers) for record in recipe.teachers]
        # Each model's channels in the order of the class map's rows; None where they already are in that order.
        self._channels = [
            None if record.classes == recipe.teacher_classes
            else torch.tensor([record.classes.index(name) for name in recipe.teacher_classes], device=device)
            for record in recipe.teachers
        ]  # fmt: skip
        # With windows, logits are summed in main memory: those of a whole scene do not fit on the device.
        windowed = any(record.window is not None for record in recipe.teachers)
        self._home = torch.device("cpu") if windowed else device
        self._transfers = Transfers(device) if self._home.type == "cuda" else None
        self._clock = Clock(device)

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The networks, in the order of the recipe's teachers."""
        return self._models

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return self._device

    @property
    def rounds_on_device(self) -> bool:
        """Whether `encoded` rounds on the device and returns before the device is done."""
        return self._transfers is not None

    def seconds_taken(self) -> float:
        """Device seconds that `encoded` took since the last call."""
        return self._clock.taken()

    @torch.inference_mode()
    def logits(self, images_NHWC: NDArray[Any] | Tensor) -> Tensor:
        """
        Logits, float32 `(N, C_t, H, W)`, averaged over views and teachers in the image's own frame.

        `images_NHWC` is uint8 `(N, H, W, B)` of any size; channels are in the order of the class map's rows. Raises `KdpipeError`
        if a logit is not finite.
        """
        return self._logits(images_NHWC, checked=True)

    def soft_targets(self, images_NHWC: NDArray[Any]) -> NDArray[np.float32]:
        """Soft targets, float32 `(N, C_s, H, W)`, which sum to one over axis 1, of uint8 images `(N, H, W, B)`."""
        return self.targets_of(self.logits(images_NHWC))

    @torch.inference_mode()
    def targets_of(self, logits_NTHW: Tensor) -> NDArray[np.float32]:
        """Soft targets, float32 `(N, C_s, H, W)`, of this teacher's logits `(N, C_t, H, W)`."""
        return self._in_bands(self._softened, logits_NTHW)

    @torch.inference_mode()
    def probabilities_of(self, logits_NTHW: Tensor) -> NDArray[np.float32]:
        """The teacher's probabilities of the student's classes: `targets_of` at T 1."""
        return self._in_bands(self._mapped, logits_NTHW)

    def _in_bands(self, soft_targets: SoftTargets, logits_NTHW: Tensor) -> NDArray[np.float32]:
        count, _, height, width = logits_NTHW.shape
        targets_NSHW = np.empty((count, soft_targets.num_classes, height, width), dtype=np.float32)
        pixels = CPU_SOFTMAX_PX if self._device.type == "cpu" else SOFTMAX_PX
        rows = max(1, pixels // (count * width))
        for top in range(0, height, rows):
            band_NThW = logits_NTHW[..., top : top + rows, :].to(self._device)
            targets_NSHW[..., top : top + rows, :] = soft_targets(band_NThW).cpu().numpy()
        return targets_NSHW

    def cached_values(self, images_NHWC: NDArray[Any]) -> NDArray[np.float32]:
        """The values that a cache of the recipe's kind stores, float32: soft targets `(N, C_s, H, W)` or logits `(N, C_t, H, W)`."""
        if predicts_in_bands(self._recipe, images_NHWC.shape):
            image_HWC = images_NHWC[0]
            bands = self.cached_bands(lambda top, bottom: image_HWC[top:bottom], *image_HWC.shape[:2])
            return np.concatenate(list(bands), axis=1)[None]
        return self._values_of(self.logits(images_NHWC))

    @torch.inference_mode()
    def cached_bands(
        self, rows: Callable[[int, int], NDArray[np.uint8]], height: int, width: int
    ) -> Iterator[NDArray[np.float32]]:
        """
        `cached_values` of one image in bands of rows `(C, h, W)` from the top, each as soon as it is final.

        `rows(top, bottom)` returns rows of the image, uint8 `(bottom - top, W, B)`, and is called from the top down.
        """

        def rows_1ChW(top: int, bottom: int) -> Tensor:
            return torch.from_numpy(rows(top, bottom))[None].permute(0, 3, 1, 2)

        streams = []
        for number, record in enumerate(self._recipe.teachers):
            assert record.window is not None
            predict = self._network(number, checked=True)
            streams.append(blended_bands(predict, rows_1ChW, height, width, record.window))
        for bands in zip(*streams, strict=True):
            logits_1ThW = sum(band * share for band, share in zip(bands, self._shares, strict=True))
            yield self._values_of(logits_1ThW)[0]

    def send(self, images_NHWC: NDArray[Any]) -> Images:
        """The images for `encoded`; to a CUDA device they are copied while it computes. May be called in any thread."""
        return images_NHWC if self._transfers is None else self._transfers.send(images_NHWC)

    def encoded(self, images: Images) -> list[Callable[[], Encoded]]:
        """
        For each image a function that returns what a cache stores of it, to be called once, in any thread.

        `images` are uint8 `(N, H, W, B)`, or what `send` made of them. A CUDA device rounds its predictions itself; this method returns
        before they are in main memory, and the functions wait for them. Elsewhere the functions encode.
        """
        if self._transfers is None:
            assert isinstance(images, np.ndarray)
            with self._clock.timed():
                values = self.cached_values(images)
            return [partial(codec.encode, values_CHW, self._recipe) for values_CHW in values]
        sent = self._transfers.send(images) if isinstance(images, np.ndarray) else images
        # Every thread starts with the first CUDA device as its current one, which need not be the teacher's.
        with torch.inference_mode(), torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            images_NHWC = self._transfers.receive(sent)
            with self._clock.timed():
                values_NCHW, finite = self._values(images_NHWC)
            with self._transfers.beside([values_NCHW]):
                fetched = self._transfers.fetch([*rounded(values_NCHW, self._recipe), finite])
        return [partial(_encoded_tile, fetched, number, self._recipe) for number in range(len(fetched.tensors[0]))]

    def _values(self, images_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """`cached_values` on the device, and one bool: whether the logits were finite. Does not wait for the device."""
        values_NCHW = self._logits(images_NHWC, checked=False)
        finite = torch.isfinite(values_NCHW).all()
        if not isinstance(self._recipe, LogitsRecipe):
            values_NCHW = self._softened(values_NCHW)
        return values_NCHW, finite

    def _values_of(self, logits_NTHW: Tensor) -> NDArray[np.float32]:
        if isinstance(self._recipe, LogitsRecipe):
            values_NTHW: NDArray[np.float32] = logits_NTHW.cpu().numpy()
            return values_NTHW
        return self.targets_of(logits_NTHW)

    def _logits(self, images_NHWC: NDArray[Any] | Tensor, *, checked: bool) -> Tensor:
        """`logits`; unless `checked`, it accepts logits that are not finite and does not wait for a CUDA device."""
        images_NCHW = torch.as_tensor(images_NHWC).permute(0, 3, 1, 2)
        total_NTHW: Tensor | None = None
        for number, (record, share) in enumerate(zip(self._recipe.teachers, self._shares, strict=True)):
            predict, window = self._network(number, checked=checked), record.window
            logits_NTHW = predict(images_NCHW) if window is None else blended_logits(predict, images_NCHW, window)
            logits_NTHW = logits_NTHW.to(self._home).mul_(share)
            total_NTHW = logits_NTHW if total_NTHW is None else total_NTHW.add_(logits_NTHW)
        assert total_NTHW is not None
        return total_NTHW

    def _network(self, number: int, *, checked: bool) -> Callable[[Tensor], Tensor]:
        """One network, as a function from uint8 images `(N, B, H, W)` to logits in the order of the class map's rows."""
        record = self._recipe.teachers[number]
        normalize = MeanStd(mean=tuple(record.normalize_mean), std=tuple(record.normalize_std))
        channels = self._channels[number]
        places = None if self._places is None else self._places[number]

        def predict(images_NCHW: Tensor) -> Tensor:
            inputs_NCHW = normalized(images_NCHW.to(self._device), normalize, places)
            if number not in self._optimised:
                self._models[number] = _optimised(self._models[number], inputs_NCHW, record.precision)
                self._optimised.add(number)
            with computing_in(record.precision, self._device):
                logits_NTHW = averaged_logits(self._models[number], inputs_NCHW, tta=record.tta, scales=record.scales)
            if channels is not None:
                logits_NTHW = logits_NTHW.index_select(1, channels)
            # The sum is finite only if every logit is, and takes a twentieth of the time of checking each.
            if checked and not torch.isfinite(logits_NTHW.sum()) and not torch.isfinite(logits_NTHW).all():
                raise KdpipeError(not_finite_text(record.precision))
            return logits_NTHW

        return predict


class StoredTeacher(FrozenTeacher):
    """
    A teacher that predicted before, in another program: it is given logits in place of images, float32 `(N, H, W, C)`.

    Pixels whose logits are all alike have no prediction, and `encoded` says so. On a CPU, as there is no network to run.
    """

    def encoded(self, images: Images) -> list[Callable[[], Encoded]]:
        assert isinstance(images, np.ndarray)  # `send` copies only to an accelerator
        with self._clock.timed():
            logits_NTHW = self.logits(images)
            gaps_NHW = (logits_NTHW.amax(dim=1) == logits_NTHW.amin(dim=1)).numpy()
            values_NCHW = self._values_of(logits_NTHW)
        return [
            lambda values=values_CHW, gaps=gaps_HW: (*codec.encode(values, self._recipe), gaps)  # type: ignore[misc]
            for values_CHW, gaps_HW in zip(values_NCHW, gaps_NHW, strict=True)
        ]

    def _network(self, number: int, *, checked: bool) -> Callable[[Tensor], Tensor]:
        channels = self._channels[number]

        def predict(logits_NTHW: Tensor) -> Tensor:
            logits_NTHW = logits_NTHW.to(self._device)
            return logits_NTHW.clone() if channels is None else logits_NTHW.index_select(1, channels)

        return predict


def predicts_in_bands(recipe: CacheRecipe, shape_NHWC: tuple[int, ...]) -> bool:
    """Whether `cached_bands` applies: one image, larger than the window, which is the same for all networks."""
    count, height, width, _ = shape_NHWC
    windows = {record.window for record in recipe.teachers}
    window = windows.pop()
    return count == 1 and not windows and window is not None and max(height, width) > window


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in exactly this precision (fp32 is not TF32), with deterministic kernels."""
    dtype = AUTOCAST[precision]
    autocast: Any = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), autocast:
        yield


def _optimised(model: nn.Module, inputs_NCHW: Tensor, precision: str) -> nn.Module:
    """The network with folded batch norms and cast weights, each only if its logits stay the same on part of the first image."""
    part_NCHW, dtype = inputs_NCHW[:1, :, :TRIAL_PX, :TRIAL_PX], AUTOCAST[precision]
    # Without cuDNN, which searches its kernels for seconds at every new shape and type.
    with computing_in("fp32", inputs_NCHW.device), torch.backends.cudnn.flags(enabled=False):
        model = folded(model, part_NCHW)
        return model if dtype is None else with_cast_weights(model, part_NCHW, dtype)


def _encoded_tile(fetched: PendingCopy, number: int, recipe: CacheRecipe) -> Encoded:
    """
    One tile of a batch that the device rounded, once it is in main memory.

    Raises `KdpipeError` if a logit of the batch is not finite, and `ValueError` for other values that cannot be stored.
    """
    units_NCHW, lost, valid, finite = fetched.arrays()
    if not finite:
        raise KdpipeError(not_finite_text(", ".join(sorted({record.precision for record in recipe.teachers}))))
    if not valid:
        raise ValueError("the teacher's soft targets do not sum to one")
    return codec.encode_units(units_NCHW[number], lost[number], recipe)


def not_finite_text(precision: str) -> str:
    """The message for logits that are not finite, computed in these precisions."""
    if precision == "fp32":
        remedy = "no precision holds them: check teacher.normalize, and whether the checkpoint is that of a finished training"
    else:
        remedy = "set teacher.precision to fp32 (or bf16), and check teacher.normalize"
    return f"the teacher predicted logits that are not finite, in precision {precision}; {remedy}"
