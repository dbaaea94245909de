"""
The decisions that an inference script takes between an image file and saved scores, and what else it may have decided.

A `Script` is one set of decisions. Its defaults are kdpipe's own, so that a field that differs names what another script does
otherwise, and `remedies` says what to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations, permutations
from typing import Any, Literal

from kdpipe.configs.schema import MeanStd, Teacher
from kdpipe.pipeline.models.normalize import IMAGENET_MEAN, IMAGENET_STD, mean_std
from kdpipe.pipeline.models.views import STRIDE

# What EXIF's orientations do to a stored image, and `turned` in script_runs.py does to any.
TURNS = {
    2: "mirrored left to right",
    3: "turned by 180°",
    4: "mirrored top to bottom",
    5: "transposed",
    6: "turned by 90° clockwise",
    7: "mirrored along its other diagonal",
    8: "turned by 90° anticlockwise",
}
EXIF = "EXIF"  # in the place of a turn: each tile by its own orientation
SQUARES_PX = (224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)
MOST_PERMUTED = 4  # bands whose orders are all tried: 24
MOST_ENLARGED = 3  # times a side: nobody resizes further
# Of options that leave no trace in the weights; those that the network is built with anyway change nothing.
UNTRACED_VALUES: dict[str, tuple[Any, ...]] = {
    "decoder_interpolation": ("nearest", "bilinear", "bicubic"),
    "encoder_output_stride": (8, 16, 32),
    "decoder_atrous_rates": ((6, 12, 18), (12, 24, 36)),
}
INTERPOLATIONS = (
    "OpenCV's linear", "Pillow's bilinear", "torch's bilinear", "torch's antialiased bilinear", "Pillow's bicubic",
    "OpenCV's cubic", "OpenCV's area", "OpenCV's nearest",
)  # fmt: skip
BACKS = ("logits", "probabilities", "nearest")


@dataclass(frozen=True)
class Scaling:
    """
    How pixels of 0..255 become the network's input: `(x / 255 - mean) / std`, or by each tile's own statistics.

    `text` completes "the script"; `key` is the value of `normalize`, None if kdpipe has none.
    """

    text: str
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    key: str | None = None
    per_tile: Literal["channels", "all", "range"] | None = None


def _linear(text: str, mean: Sequence[float], std: Sequence[float]) -> Scaling:
    shown = [", ".join(f"{value:.10g}" for value in values) for values in (mean, std)]
    return Scaling(text, tuple(mean), tuple(std), f"{{mean: [{shown[0]}], std: [{shown[1]}]}}")


UNIT = Scaling("feeds x / 255", key="unit")
IMAGENET = Scaling("normalises by ImageNet's mean and deviation", IMAGENET_MEAN, IMAGENET_STD, "imagenet")
_PAIRS = tuple(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
SCALINGS = (
    UNIT,
    IMAGENET,
    _linear("feeds 0..255 as they are", (0, 0, 0), (1 / 255,) * 3),
    _linear("feeds -1..1 (x / 127.5 - 1)", (0.5,) * 3, (0.5,) * 3),
    _linear(
        "normalises by ImageNet's mean and deviation without dividing by 255",
        [m / 255 for m in IMAGENET_MEAN],
        [s / 255 for s in IMAGENET_STD],
    ),
    _linear("subtracts ImageNet's mean from 0..255", IMAGENET_MEAN, (1 / 255,) * 3),
    _linear(
        "normalises by ImageNet's mean and deviation twice", [m + s * m for m, s in _PAIRS], [s * s for _, s in _PAIRS]
    ),
    _linear("divides by 255 twice", (0, 0, 0), (255,) * 3),
    Scaling("normalises each tile by its own mean and deviation, channel by channel", per_tile="channels"),
    Scaling("normalises each tile by its own mean and deviation", per_tile="all"),
    Scaling("scales each tile from its smallest to its largest value", per_tile="range"),
)
"""The normalisations that scripts use, of images of three bands."""


@dataclass(frozen=True)
class Size:
    """
    How an image of any size becomes one of a multiple of 32 px.

    `way` is a padding (of `np.pad`, or `zeros` before normalisation) or a resizing to `value`: `square` px, a `factor`, or the next
    `multiple` of 32 px up (1) or down (-1).
    """

    way: Literal["reflect", "symmetric", "edge", "constant", "zeros", "square", "factor", "multiple"] = "reflect"
    value: float = 0
    centred: bool = False

    @property
    def resizes(self) -> bool:
        """Whether it changes the scale of what the network sees."""
        return self.way in ("square", "factor", "multiple")

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size `(h, w)` that an image is resized to; its own if it is padded."""
        if self.way == "square":
            return int(self.value), int(self.value)
        if self.way == "factor":
            return max(1, round(height * self.value)), max(1, round(width * self.value))
        if self.way == "multiple":
            return _multiple(height, self.value > 0), _multiple(width, self.value > 0)
        return height, width


RESIZINGS = (
    Size("multiple", 1), Size("multiple", -1), *(Size("factor", factor) for factor in FACTORS),
    *(Size("square", side) for side in SQUARES_PX),
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """
    The decisions of a script, in the order in which it takes them.

    `turn` and `shown`, of the image and of the output, are EXIF orientations (1: as it is); `order[j]` is the network's channel that is
    saved as the jth.
    """

    decoder: Literal["kdpipe", "Pillow", "GDAL"] = "kdpipe"
    turn: int | str = 1
    bands: tuple[int, ...] = (1, 2, 3)
    scaling: Scaling = UNIT
    size: Size = Size()
    interpolation: str = INTERPOLATIONS[0]
    options: tuple[tuple[str, Any], ...] = ()
    mode: Literal["eval", "train"] = "eval"
    precision: str = "fp32"
    views: tuple[str, str] = ("one", "logits")
    back: str = BACKS[0]
    shown: int = 1
    activation: str = "softmax"
    order: tuple[int, ...] | None = None

    def changes(self, base: Script) -> list[str]:
        """The names of the decisions that differ from `base`; how a resizing interpolates is part of the resizing."""
        names = [field.name for field in fields(self) if field.name not in ("interpolation", "back")]
        return [name for name in names if getattr(self, name) != getattr(base, name)]


@dataclass(frozen=True)
class Given:
    """The facts about a tile and a teacher on which it depends what a script may have done otherwise."""

    key: str
    teacher: Teacher
    height: int
    width: int
    orientation: int
    num_bands: int
    any_bands: bool
    decoders: tuple[Literal["Pillow", "GDAL"], ...]
    precisions: tuple[str, ...]


def scalings_of(count: int) -> list[Scaling]:
    """`SCALINGS` of images of `count` bands: with other than three, those that treat all bands alike."""
    if count == len(IMAGENET_MEAN):
        return list(SCALINGS)
    alike = [scaling for scaling in SCALINGS if len(set(scaling.mean)) == len(set(scaling.std)) == 1]
    return [
        _linear(scaling.text, scaling.mean[:1] * count, scaling.std[:1] * count)
        if scaling.key and scaling.key.startswith("{")
        else replace(scaling, mean=scaling.mean[:1] * count, std=scaling.std[:1] * count)
        for scaling in alike
    ]


def configured(teacher: Teacher, bands: Sequence[int]) -> Script:
    """Kdpipe's own script: the configured normalisation and the `bands` that the teacher sees, one view of the whole tile, float32."""
    mean, std = mean_std(teacher.normalize, len(bands))
    key = "{...}" if isinstance(teacher.normalize, MeanStd) else teacher.normalize
    return Script(bands=tuple(bands), scaling=Scaling("normalises as configured", tuple(mean), tuple(std), key))


def alternatives(script: Script, base: Script, given: Given) -> Iterator[Script]:
    """Scripts that take one more decision before the network's output otherwise than `base` does; likely ones first."""
    if script.size.resizes:
        for interpolation in INTERPOLATIONS:
            if interpolation != script.interpolation:
                yield replace(script, interpolation=interpolation)
    if script.scaling == base.scaling:
        for scaling in scalings_of(len(base.bands)):
            if (scaling.mean, scaling.std) != (base.scaling.mean, base.scaling.std) or scaling.per_tile:
                yield replace(script, scaling=scaling)
    if script.bands == base.bands:
        for bands in _band_orders(base.bands, given):
            yield replace(script, bands=bands)
    if script.decoder == base.decoder:
        for decoder in given.decoders:
            yield replace(script, decoder=decoder)
    if script.turn == base.turn:
        turns: list[int | str] = [turn for turn in TURNS if turn != given.orientation]
        for turn in ([EXIF] if given.orientation != 1 else []) + turns:
            yield replace(script, turn=turn)
    if script.options == base.options:
        # Slow to import, and `verify-cache --level quick` imports this file.
        from kdpipe.pipeline.models.options import untraced_options

        for name in untraced_options(given.teacher.architecture):
            for value in UNTRACED_VALUES.get(name, ()):
                if given.teacher.options.get(name) != value:
                    yield replace(script, options=((name, value),))
    if script.mode == base.mode:
        yield replace(script, mode="train")
    if script.precision == base.precision:
        for precision in given.precisions:
            yield replace(script, precision=precision)
    if script.size == base.size:
        for size in _sizes(given):
            yield replace(script, size=size)
    if script.views == base.views:
        teacher = given.teacher
        if teacher.tta != "none" or teacher.scales != [1.0]:
            yield replace(script, views=("configured", "logits"))
        for views in ("mirror", "flips", "d4"):
            for mean_of in ("logits", "probabilities"):
                yield replace(script, views=(views, mean_of))


def sizes_like(size: Size, given: Given) -> list[Size]:
    """The resizings that do to this tile what `size` does, and may do something else to others; `size` itself if it pads."""
    target = size.target(given.height, given.width)
    return (
        [other for other in RESIZINGS if other.target(given.height, given.width) == target] if size.resizes else [size]
    )


def remedies(script: Script, base: Script, given: Given) -> tuple[list[str], list[str]]:
    """What a script does otherwise, each completing "the script", and what to do about it, in the same order."""
    pairs = [_remedy(name, script, base, given) for name in script.changes(base)]
    return [said for said, _ in pairs], [todo for _, todo in pairs]


def reordered(classes: Sequence[str], order: Sequence[int]) -> list[str]:
    """`teacher.classes` as the network's channels are, where the saved ones, channel `order[j]` as the jth, are in its present order."""
    result = list(classes)
    for saved, channel in enumerate(order):
        result[channel] = classes[saved]
    return result


def _remedy(name: str, script: Script, base: Script, given: Given) -> tuple[str, str]:
    key = given.key
    if name == "scaling":
        value = script.scaling.key
        return script.scaling.text, (
            f"set {key}.normalize: {value}" if value else f"normalise by fixed values in it, as {key}.normalize says"
        )
    if name == "bands":
        reverse = len(base.bands) == 3 and script.bands == base.bands[::-1]
        return (
            f"feeds {'BGR' if reverse else f'the bands {list(script.bands)}'}",
            f"set {'data' if given.teacher.bands is None else key}.bands: {list(script.bands)}",
        )
    if name == "decoder":
        return (
            f"reads pixels as {script.decoder} decodes them",
            f"read the images in it as kdpipe does, with {_own(script)}",
        )
    if name == "turn":
        if script.turn == EXIF:
            return (
                f"turns images by their EXIF orientation ({given.orientation})",
                "read the pixels in it as they are stored, as kdpipe does, or store the images turned, and their masks with them",
            )
        return f"predicts images {TURNS[int(script.turn)]}", "undo that in its output"
    if name == "size":
        return _size_remedy(script, given)
    if name == "options":
        changed = ", ".join(f"{option}: {_yaml(value)}" for option, value in script.options)
        options = {**given.teacher.options, **dict(script.options)}
        both = ", ".join(f"{option}: {_yaml(value)}" for option, value in options.items())
        return f"builds its network with {changed}", f"set {key}.options: {{{both}}}"
    if name == "mode":
        return "runs the network in train mode, where batch norms and dropout differ", "call model.eval() in it"
    if name == "precision":
        if script.precision == "tf32":
            return "computes convolutions in TF32", "set torch.backends.cudnn.allow_tf32 = False in it"
        return (
            f"computes in half precision ({script.precision})",
            f"compute in float32 in it, or set {key}.precision: {script.precision}",
        )
    if name == "views":
        return _views_remedy(script, given)
    if name == "shown":
        return f"saves its output {TURNS[script.shown]}", "undo that before it saves"
    if name == "activation":
        return _ACTIVATIONS[script.activation]
    assert script.order is not None
    classes = reordered(given.teacher.classes, script.order)
    dropped = [classes.index(given.teacher.classes[channel]) for channel in given.teacher.drop_channels]
    also = f" and {key}.drop_channels: {sorted(dropped)}" if dropped else ""
    return "saves channels in another order than the network's", f"set {key}.classes: [{', '.join(classes)}]{also}"


def _size_remedy(script: Script, given: Given) -> tuple[str, str]:
    size = script.size
    if size.resizes:
        if size.way == "factor":
            return f"resizes images by a factor of {size.value:g}", f"set {given.key}.scales: [{size.value:g}]"
        height, width = size.target(given.height, given.width)
        return (
            f"resizes images to {height} x {width} px ({script.interpolation})",
            "predict images at their own size in it",
        )
    ways = {
        "constant": "zeros",
        "zeros": "black pixels",
        "edge": "the border's pixels",
        "symmetric": "mirrored pixels, the border's twice",
    }
    where = "on all sides" if size.centred else "on the right and below"
    return f"pads images with {ways.get(size.way, 'mirrored pixels')} {where}", (
        "pad in it as kdpipe does, with np.pad(..., mode='reflect') on the right and below, or cut tiles to multiples of 32 px"
    )


_ACTIVATIONS = {
    "sigmoid": (
        "applies a sigmoid to each channel, where kdpipe applies a softmax to all",
        "save its logits; a network that was trained with a sigmoid (several classes for one pixel) does not fit kdpipe's soft targets",
    ),
    "softmax twice": ("applies softmax twice", "apply it once, or save logits"),
    "softmax of sigmoid": ("applies softmax to the results of a sigmoid", "apply softmax to logits, or save logits"),
    "normalised sigmoid": ("divides the results of a sigmoid by their sum", "apply softmax to logits, or save logits"),
}  # fmt: skip


def _views_remedy(script: Script, given: Given) -> tuple[str, str]:
    views, mean_of = script.views
    if views == "configured":
        return f"averages the configured views ({given.key}.tta: {given.teacher.tta})", f"keep {given.key}.tta"
    names = {
        "mirror": "an image and its mirror image",
        "flips": "the 4 views of both flips",
        "d4": "the 8 symmetries of the square",
    }
    said = f"averages {mean_of} over {names[views]}"
    if views == "mirror":
        return said, f"average none or more of them in it, as {given.key}.tta: flips does"
    if mean_of == "probabilities":
        return said, f"average logits in it, as {given.key}.tta: {views} does"
    return said, f"set {given.key}.tta: {views}"


def _yaml(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _own(script: Script) -> str:
    return "GDAL (rasterio)" if script.decoder == "Pillow" else "Pillow"


def _multiple(side: int, up: bool) -> int:
    return max(1, -(-side // STRIDE) if up else side // STRIDE) * STRIDE


def _band_orders(bands: Sequence[int], given: Given) -> Iterator[tuple[int, ...]]:
    """The reverse, then other orders, of many bands those with two of them swapped; with a file of four bands other bands too."""
    given_bands = range(1, given.num_bands + 1) if given.any_bands and given.num_bands == 4 else bands
    own, reverse = tuple(bands), tuple(bands[::-1])
    if len(bands) > MOST_PERMUTED:
        orders: Iterator[tuple[int, ...]] = (
            tuple(j if band == i else i if band == j else band for band in own) for i, j in combinations(own, 2)
        )
    else:
        orders = permutations(given_bands, len(bands))
    yield reverse
    yield from (order for order in orders if order not in (own, reverse))


def _sizes(given: Given) -> Iterator[Size]:
    height, width = given.height, given.width
    if height % STRIDE or width % STRIDE:
        yield from (Size("constant"), Size("zeros"), Size("edge"), Size("symmetric"))
        yield from (Size("reflect", centred=True), Size("constant", centred=True), Size("zeros", centred=True))
    seen = {(height, width)}
    for size in RESIZINGS:
        target = size.target(height, width)
        if target not in seen and max(target) <= MOST_ENLARGED * max(height, width):
            seen.add(target)
            yield size
