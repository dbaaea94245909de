"""The frozen teacher: loading it, and asking it for soft targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.cache import codec as values
from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe
from kdpipe.configs.errors import CheckpointError, KdpipeError
from kdpipe.configs.schema import Config, MeanStd, Teacher
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.views import averaged_logits, blended_bands, blended_logits
from kdpipe.pipeline.models.weights import bare_state, check_tensors, load_strictly, read_checkpoint
from kdpipe.pipeline.teacher.cuda import Clock, OnItsWay, Transfers
from kdpipe.pipeline.teacher.fold import folded, lowered
from kdpipe.pipeline.teacher.graphs import Replay
from kdpipe.pipeline.teacher.rounding import rounded

if TYPE_CHECKING:
    from kdpipe.pipeline.models.recognise import Network

# The orders that teachers with these numbers of channels most often have: the lines for it, and the shipped config with its
# class map. The first is the guide's, the second OpenEarthMap's own.
KNOWN_ORDERS = {
    8: (
        {"classes": "[Tree, Rangeland, Cropland, Developed, Road, Bareland, Water, Background]"},
        "biodiversity/ftunetformer_kd",
    ),
    9: (
        {
            "classes": "[Unknown, Bareland, Rangeland, Developed, Road, Tree, Water, Cropland, Building]",
            "drop_channels": "[0]",
        },
        "biodiversity/ftunetformer_kd_openearthmap",
    ),
}
WITH_ATTENTION = ("unet", "unetplusplus")  # the architectures of smp whose decoder may have it
# Pixels whose softmax is taken at once, which bounds what is held beside a scene's logits and targets: on a processor few, which stay
# in its cache, elsewhere many, so that what is copied from there is no row of small transfers.
CPU_SOFTMAX_PX, SOFTMAX_PX = 2**16, 2**20
READY_PX = 256  # of the first image, on which a network made ready is compared with itself
Images = NDArray[np.uint8] | OnItsWay  # what `FrozenTeacher.send` gives
Ask = Callable[[Callable[[Tensor], Sequence[Tensor]], Tensor], Sequence[Tensor]]
Encoded = tuple[NDArray[Any], NDArray[np.float64] | None]  # what `values.encode` makes of a tile's answer
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_teacher(teacher: Teacher, key: str = "teacher") -> nn.Module:
    """
    The teacher's network with its weights, frozen, in eval mode, float32, on the CPU.

    The weights may lie under `state_dict` or `model`, with a trainer's prefix, in any floating-point type; scSE attention in
    the decoder is recognised from its tensors. `key` is the section of the config that an error points to. Raises
    `CheckpointError` where any tensor does not fit, saying what the file holds and which lines would fit it.
    """
    # They bring timm, which takes longer to import than a run with nothing to do.
    from kdpipe.pipeline.models.recognise import attention_of, recognise
    from kdpipe.pipeline.models.smp import create_smp_model

    state = bare_state(read_checkpoint(teacher.checkpoint))
    check_tensors(state, origin=teacher.checkpoint)
    attention = attention_of(state) if teacher.architecture.lower() in WITH_ATTENTION else None
    model = create_smp_model(teacher.architecture, teacher.encoder, len(teacher.classes), key=key, attention=attention)
    try:
        load_strictly(model, state, origin=teacher.checkpoint)
    except CheckpointError as err:
        found = recognise(state, likely_encoder=teacher.encoder)
        raise CheckpointError(_misfit_text(teacher, key, found, str(err))) from err
    return model.eval().requires_grad_(False)


def open_teacher(config: Config, recipe: CacheRecipe, device: torch.device) -> FrozenTeacher:
    """The configured teacher, or several as one, ready to be asked by `recipe`; raises what `load_teacher` raises."""
    models = [load_teacher(member, key) for key, member in config.members.items()]
    return FrozenTeacher(models, recipe, Softening(config.distill.temperature, config.class_map_matrix()), device)


class FrozenTeacher:
    """
    A teacher that answers images with soft targets: `p = softmax(z / T) @ M`, in float32, T before M.

    `recipe` says how each of `models` is asked (normalisation, precision, test-time augmentation, window) and which of its
    channels stand for which class, `softening` what T and M are. z is the weighted mean of their logits over the channels that are
    kept: those that are dropped take no part in the softmax. The logits of different networks are on different scales; their
    mean is the logarithm of the geometric mean of their answers (but for a constant, which softmax does not see).

    With a `window` the device holds one window of a scene at a time. Asked for whole scenes, main memory holds 4 bytes of each class
    and pixel; `cached_bands` holds those of one row of windows.
    """

    def __init__(
        self, models: Sequence[nn.Module], recipe: CacheRecipe, softening: Softening, device: torch.device
    ) -> None:
        self._models = [model.to(device).to(memory_format=torch.channels_last) for model in models]
        self._ready: set[int] = set()  # those made ready to answer sooner, at the first image
        self._recipe = recipe
        self._device = device
        self._temperature = softening.temperature
        self._class_map_TS = torch.tensor(softening.class_map, dtype=torch.float32, device=device)
        self._shares = [record.weight / sum(r.weight for r in recipe.teachers) for record in recipe.teachers]
        # Each network's channels that are the class map's rows, None where they are all of them in their order.
        self._channels = [
            None if record.classes == recipe.teacher_classes
            else torch.tensor([record.classes.index(name) for name in recipe.teacher_classes], device=device)
            for record in recipe.teachers
        ]  # fmt: skip
        # Where whole scenes of logits are added up: such as need windows do not fit on the device.
        windowed = any(record.window is not None for record in recipe.teachers)
        self._home = torch.device("cpu") if windowed else device
        self._transfers = Transfers(device) if self._home.type == "cuda" else None
        self._clock = Clock(device)
        self._asking: Ask = _ask_as_it_is
        self._rounding: Ask = _ask_as_it_is
        if self._transfers is not None:
            self._asking, self._rounding = (Replay(self._transfers.recording) for _ in range(2))

    @property
    def rounds(self) -> bool:
        """Whether `encoded` leaves rounding to the device, and does not wait for it."""
        return self._transfers is not None

    def drop_graphs(self) -> None:
        """Give back the device memory that `encoded` keeps for its next call."""
        for replay in (self._asking, self._rounding):
            if isinstance(replay, Replay):
                replay.drop()

    def seconds_taken(self) -> float:
        """Those that `encoded` took, of the device alone, since this was last called."""
        return self._clock.taken()

    @torch.inference_mode()
    def logits(self, images_NHWC: NDArray[np.uint8] | Tensor) -> Tensor:
        """
        The class scores, float32 `(N, C_t, H, W)`, averaged over views and teachers in the image's own frame.

        `images_NHWC` is uint8 `(N, H, W, 3)` of any size; the channels are in the order of the class map's rows. Raises
        `KdpipeError` if a score is not finite.
        """
        return self._logits(images_NHWC, checked=True)

    def _logits(self, images_NHWC: NDArray[np.uint8] | Tensor, *, checked: bool) -> Tensor:
        """As `logits`; unless they are `checked`, without waiting for a CUDA device."""
        total_NTHW: Tensor | None = None
        for number, share in enumerate(self._shares):
            answer_NTHW = self._answer(number, images_NHWC, checked=checked).mul_(share)
            total_NTHW = answer_NTHW if total_NTHW is None else total_NTHW.add_(answer_NTHW)
        assert total_NTHW is not None
        return total_NTHW

    def _answer(self, number: int, images_NHWC: NDArray[np.uint8] | Tensor, *, checked: bool) -> Tensor:
        """One network's logits in the order of the class map's rows."""
        ask, window = self._asker(number, checked=checked), self._recipe.teachers[number].window
        images_NCHW = torch.as_tensor(images_NHWC).permute(0, 3, 1, 2)
        answer_NTHW = ask(images_NCHW) if window is None else blended_logits(ask, images_NCHW, window)
        return answer_NTHW.to(self._home)

    def _asker(self, number: int, *, checked: bool) -> Callable[[Tensor], Tensor]:
        """One network as a function of uint8 images `(N, 3, H, W)`."""
        record = self._recipe.teachers[number]
        normalize = MeanStd(mean=tuple(record.normalize_mean), std=tuple(record.normalize_std))
        channels = self._channels[number]

        def ask(images_NCHW: Tensor) -> Tensor:
            inputs_NCHW = normalized(images_NCHW.to(self._device), normalize)
            if number not in self._ready:
                self._models[number] = _ready(self._models[number], inputs_NCHW, record.precision)
                self._ready.add(number)
            with _exactly(record.precision, self._device):
                logits_NTHW = averaged_logits(self._models[number], inputs_NCHW, tta=record.tta, scales=record.scales)
            if channels is not None:
                logits_NTHW = logits_NTHW.index_select(1, channels)
            # Their sum is finite only if they are, and is had in a twentieth of the time.
            if checked and not torch.isfinite(logits_NTHW.sum()) and not torch.isfinite(logits_NTHW).all():
                raise KdpipeError(_not_finite_text(record.precision))
            return logits_NTHW

        return ask

    def soft_targets(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The soft targets, float32 `(N, C_s, H, W)`, that sum to one over axis 1, of uint8 images `(N, H, W, 3)`."""
        return self.targets_of(self.logits(images_NHWC))

    def cached_values(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What a cache of the recipe's kind stores: the soft targets, or the logits, float32 `(N, C_t, H, W)`."""
        if answers_in_bands(self._recipe, images_NHWC.shape):
            image_HWC = images_NHWC[0]
            bands = self.cached_bands(lambda top, bottom: image_HWC[top:bottom], *image_HWC.shape[:2])
            return np.concatenate(list(bands), axis=1)[None]
        return self._values_of(self.logits(images_NHWC))

    def send(self, images_NHWC: NDArray[np.uint8]) -> Images:
        """The images for `encoded`, which a CUDA device receives while it computes something else; in any thread."""
        return images_NHWC if self._transfers is None else self._transfers.send(images_NHWC)

    def encoded(self, images: Images) -> list[Callable[[], Encoded]]:
        """
        What a cache stores of each image, each to be called once, in a thread that has time: it encodes, or waits for the device.

        `images` are uint8 `(N, H, W, 3)`, or what `send` made of them. A CUDA device rounds what it has answered itself, and returns
        before that is in main memory.
        """
        if self._transfers is None:
            assert isinstance(images, np.ndarray)
            with self._clock.timed():
                values_NCHW = self.cached_values(images)
            return [partial(values.encode, values_CHW, self._recipe) for values_CHW in values_NCHW]
        sent = self._transfers.send(images) if isinstance(images, np.ndarray) else images
        # A thread's current CUDA device is the first one, whatever it is that is asked.
        with torch.inference_mode(), torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            images_NHWC = self._transfers.take(sent)
            with self._clock.timed():
                answer_NCHW, finite = self._asking(self._values, images_NHWC)
            with self._transfers.beside([answer_NCHW, finite]) as (own_NCHW, own_finite):
                made = self._rounding(partial(rounded, recipe=self._recipe), own_NCHW)
                fetched = self._transfers.fetch([*made, own_finite])
        return [partial(encoded_tile, fetched, number, self._recipe) for number in range(len(fetched.tensors[0]))]

    def _values(self, images_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache of the recipe's kind stores, where it was computed, and whether the logits were finite, one bool."""
        values_NCHW = self._logits(images_NHWC, checked=False)
        finite = torch.isfinite(values_NCHW).all()
        if not isinstance(self._recipe, LogitsRecipe):
            values_NCHW = soft_targets(values_NCHW, self._class_map_TS, self._temperature)
        return values_NCHW, finite

    @torch.inference_mode()
    def cached_bands(
        self, rows: Callable[[int, int], NDArray[np.uint8]], height: int, width: int
    ) -> Iterator[NDArray[np.float32]]:
        """
        `cached_values` of one image in bands of rows `(C, h, W)` from the top, each as soon as it is final.

        `rows(top, bottom)` gives its rows, uint8 `(bottom - top, W, 3)`, and is asked from the top down.
        """

        def rows_1ChW(top: int, bottom: int) -> Tensor:
            return torch.from_numpy(rows(top, bottom))[None].permute(0, 3, 1, 2)

        streams = []
        for number, record in enumerate(self._recipe.teachers):
            assert record.window is not None
            streams.append(blended_bands(self._asker(number, checked=True), rows_1ChW, height, width, record.window))
        for bands in zip(*streams, strict=True):
            logits_1ThW = sum(band * share for band, share in zip(bands, self._shares, strict=True))
            yield self._values_of(logits_1ThW)[0]

    def _values_of(self, logits_NTHW: Tensor) -> NDArray[np.float32]:
        if isinstance(self._recipe, LogitsRecipe):
            values_NTHW: NDArray[np.float32] = logits_NTHW.cpu().numpy()
            return values_NTHW
        return self.targets_of(logits_NTHW)

    @torch.inference_mode()
    def targets_of(self, logits_NTHW: Tensor) -> NDArray[np.float32]:
        """The soft targets, float32 `(N, C_s, H, W)`, that stand for this teacher's logits `(N, C_t, H, W)`."""
        count, _, height, width = logits_NTHW.shape
        targets_NSHW = np.empty((count, self._class_map_TS.shape[1], height, width), dtype=np.float32)
        pixels = CPU_SOFTMAX_PX if self._device.type == "cpu" else SOFTMAX_PX
        rows = max(1, pixels // (count * width))
        for top in range(0, height, rows):
            band_NThW = logits_NTHW[..., top : top + rows, :].to(self._device)
            band_NShW = soft_targets(band_NThW, self._class_map_TS, self._temperature)
            targets_NSHW[..., top : top + rows, :] = band_NShW.cpu().numpy()
        return targets_NSHW


def _ask_as_it_is(function: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    return function(x)


def _ready(model: nn.Module, inputs_NCHW: Tensor, precision: str) -> nn.Module:
    """The network as it answers soonest, compared with itself on a part of what it is asked first."""
    part_NCHW, dtype = inputs_NCHW[:1, :, :READY_PX, :READY_PX], AUTOCAST[precision]
    # For every new shape and type cuDNN looks for its kernels, which takes seconds; torch has some of its own.
    with _exactly("fp32", inputs_NCHW.device), torch.backends.cudnn.flags(enabled=False):
        model = folded(model, part_NCHW)
        return model if dtype is None else lowered(model, part_NCHW, dtype)


def encoded_tile(fetched: OnItsWay, number: int, recipe: CacheRecipe) -> Encoded:
    """
    One tile of what a device made of a batch and is sending.

    Raises `KdpipeError` if a score of the batch is not finite, and `ValueError` for other values that cannot be stored.
    """
    units_NCHW, lost, valid, finite = fetched.arrays()
    if not finite:
        raise KdpipeError(_not_finite_text(", ".join(sorted({record.precision for record in recipe.teachers}))))
    if not valid:
        raise ValueError("the teacher's answer is not soft targets that sum to one")
    return values.encode_units(units_NCHW[number], lost[number], recipe)


def _not_finite_text(precision: str) -> str:
    return (
        f"the teacher answered with numbers that are not finite in precision {precision}; "
        "set teacher.precision to fp32 (or bf16), and check teacher.normalize"
    )


def answers_in_bands(recipe: CacheRecipe, shape_NHWC: tuple[int, ...]) -> bool:
    """Whether images of this shape are one that is asked in windows, the same for all networks, so that `cached_bands` can be had."""
    count, height, width, _ = shape_NHWC
    windows = {record.window for record in recipe.teachers}
    window = windows.pop()
    return count == 1 and not windows and window is not None and max(height, width) > window


def soft_targets(logits_NTHW: Tensor, class_map_TS: Tensor, temperature: float) -> Tensor:
    """
    `softmax(z / T) @ M`, float32 `(N, C_s, H, W)`, from teacher logits `(N, C_t, H, W)` and a class map `(C_t, C_s)`.

    T is applied before M, because the two do not commute. Source: Hinton et al. 2015, arXiv 1503.02531, section 2; the
    map is a linear change of classes.
    """
    probs_NTHW = torch.softmax(logits_NTHW.float() / temperature, dim=1)
    return torch.einsum("nthw,ts->nshw", probs_NTHW, class_map_TS)


@contextmanager
def _exactly(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in the stated precision and nothing else: fp32 is not TF32, and kernels are the deterministic ones."""
    dtype = AUTOCAST[precision]
    autocast: Any = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), autocast:
        yield


def _misfit_text(teacher: Teacher, key: str, found: Network, reason: str) -> str:
    """What the file holds in the place of what the config says, and the lines of the config that would fit it."""
    lines = {}
    if found.architecture is not None and found.architecture != teacher.architecture.lower():
        lines["architecture"] = found.architecture
    if found.encoder is not None and found.encoder != teacher.encoder:
        lines["encoder"] = found.encoder
    hint = ""
    known = found.architecture is not None or found.encoder is not None
    if known and found.channels is not None and found.channels != len(teacher.classes):
        order, shipped = KNOWN_ORDERS.get(found.channels, ({"classes": "[...]"}, None))
        lines |= order
        hint = (
            f"\n\nclasses needs one name for each of the file's {found.channels} channels, in the file's own order"
            + (f"; this one is that of the shipped {shipped}, whose class_map fits it" if shipped else "")
        )
    says = (
        f"{teacher.architecture} with {teacher.encoder}, {len(teacher.classes)} channels ({', '.join(teacher.classes)})"
    )
    holds = f"{teacher.checkpoint} holds {found}, but {key} says {says}"
    if found.architecture is None or not lines:
        holds += f": {reason.removeprefix(f'{teacher.checkpoint} ')}. `kdpipe inspect {teacher.checkpoint}` says more"
    return holds + (f". Lines that fit it:\n\n{_yaml(key, lines)}{hint}" if lines else "")


def _yaml(key: str, lines: dict[str, str]) -> str:
    return "\n".join([f"    {key}:", *(f"      {name}: {value}" for name, value in lines.items())])
