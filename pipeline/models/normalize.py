"""
What a network takes of an image: its bands, normalised, and a first layer of as many channels.

torch is imported where it computes, as recipes need only the two statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from kdpipe.configs.errors import count_text
from kdpipe.configs.schema import Config, MeanStd
from kdpipe.configs.schema.student import StudentNormalize

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# The statistics that torchvision's, smp's and timm's ImageNet weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
COLOURS = 3  # channels of published weights


def mean_std(normalize: StudentNormalize, num_bands: int = COLOURS) -> tuple[list[float], list[float]]:
    """
    The mean and standard deviation of `x / 255` for each of `num_bands` bands that a configured `normalize` stands for.

    ImageNet's are repeated in turn (red, green, blue, red, …), as the filters of published weights are; one band has their mean.
    """
    assert normalize != "pretrained", "`pretrained_student.with_own_normalization` has not been called"
    if isinstance(normalize, MeanStd):
        return list(normalize.mean), list(normalize.std)
    if normalize == "imagenet":
        return _repeated(IMAGENET_MEAN, num_bands), _repeated(IMAGENET_STD, num_bands)
    return [0.0] * num_bands, [1.0] * num_bands


def normalized(images_NCHW: Tensor, normalize: StudentNormalize, places: Sequence[int] | None = None) -> Tensor:
    """`(x / 255 - mean) / std`, float32, of the bands at `places` of uint8 images `(N, B, H, W)`, in that order; None is all of them."""
    if places is not None and tuple(places) != tuple(range(images_NCHW.shape[1])):
        images_NCHW = images_NCHW.index_select(1, _indices(tuple(places), images_NCHW.device))
    mean, std = mean_std(normalize, images_NCHW.shape[1])
    return (images_NCHW.float() / 255 - _on_device(tuple(mean), images_NCHW.device)) / _on_device(
        tuple(std), images_NCHW.device
    )


def student_inputs(images_NBHW: Tensor, config: Config) -> Tensor:
    """What the configured student sees of uint8 images with all of `data.bands`: `normalized` of its own."""
    return normalized(images_NBHW, config.student.normalize, config.data.places(config.student.bands))


def adapted_to_bands(
    encoder: nn.Module, state: Mapping[str, Any], origin: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """
    The encoder's weights with filters for as many bands as the encoder sees, where those of the file are for three.

    `say` is called with a sentence on what became of them. The filters are repeated in turn (red, green, blue, red, …), or summed for
    one band, and scaled so that their outputs keep their size, as timm does (`timm.models.adapt_input_conv`) and smp too.
    """
    from timm.models import adapt_input_conv
    from torch import Tensor

    own, adapted = encoder.state_dict(), dict(state)
    for name, value in own.items():
        found = state.get(name)
        if not isinstance(found, Tensor) or found.ndim != 4 or value.ndim != 4 or not found.is_floating_point():
            continue
        if found.shape[1] == COLOURS != value.shape[1] and found.shape[::2] == value.shape[::2]:
            adapted[name] = adapt_input_conv(value.shape[1], found.float()).to(found.dtype)
            say(adapted_text(origin, value.shape[1]))
    return adapted


def adapted_text(origin: str, num_bands: int) -> str:
    """The sentence on published weights for three bands in a network that sees `num_bands`."""
    how = (
        "their sum is the filter of its one band"
        if num_bands == 1
        else f"they are repeated in turn ({', '.join(_repeated(('red', 'green', 'blue'), num_bands))}) and scaled by 3/{num_bands}"
    )
    return (
        f"{origin}: the filters of the first layer are for red, green and blue, and the student sees {num_bands} "
        f"band{'s' if num_bands > 1 else ''}: {how}, as timm does"
    )


def other_bands_text(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """A sentence where weights `state` do not fit tensors `own` as they are for another number of bands; empty otherwise."""
    first = next((name for name, value in own.items() if name.endswith("weight") and value.ndim == 4), "")
    found, ours = list(getattr(state.get(first), "shape", ())), list(own[first].shape) if first else []
    if len(found) != 4 or found[1] == ours[1] or found[::2] != ours[::2]:
        return ""
    return (
        f"It is for images of {count_text(found[1], 'bands')}, and the network sees {ours[1]}: set the bands of teacher or student, or "
        "data.bands, to "
        "as many, in the order that it was trained on"
    )


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    if count == 1 and not isinstance(values[0], str):
        return [sum(values) / len(values)]
    return [values[i % len(values)] for i in range(count)]


@cache
def _on_device(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """`(1, C, 1, 1)`; cached, because a copy to a GPU waits for all that the GPU still has to do."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(channels, device=device).view(1, -1, 1, 1)


@cache
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    """`(C,)`; cached for the same reason."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(places, device=device)
