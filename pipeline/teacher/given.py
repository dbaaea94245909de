"""
Networks that a program hands over in Python, for a teacher that the configuration names as `given`.

Whoever calls `precompute(config, teacher=network)` holds the network, and the configuration only the user's name for it. The network is
known here for as long as that call takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

GivenTeacher = Callable[[Any], Any]
"""An `nn.Module`, or any callable, from normalised images, float32 `(N, B, H, W)`, to logits `(N, C, h, w)`."""

_HANDED: ContextVar[GivenTeacher | None] = ContextVar("handed", default=None)


@contextmanager
def handed(config: Config, network: GivenTeacher | None) -> Iterator[None]:
    """
    Make `network` the one that `config` names as `given`, within the block; None changes nothing.

    Raises `ConfigError` where the configuration names none, or several.
    """
    if network is None:
        yield
        return
    keys = [key for key, member in config.members.items() if member.given is not None]
    if len(keys) != 1:
        raise ConfigError(
            f"a network was passed as teacher, and the configuration should name exactly one teacher as given: your name and version of "
            f"it, such as teacher: {{given: my-network-3, classes: [...]}}; found {len(keys)}"
        )
    if not callable(network):
        raise ConfigError(
            f"teacher should be an nn.Module or a function from images to logits, found {type(network).__name__}"
        )
    token = _HANDED.set(network)
    try:
        yield
    finally:
        _HANDED.reset(token)


def given_network(key: str, name: str) -> nn.Module:
    """The network handed over for `key`, as a module of its own that may be moved; raises `ConfigError` where there is none."""
    import copy

    from torch import nn

    network = _HANDED.get()
    if network is None:
        raise ConfigError(no_network_text(key, name))
    return copy.deepcopy(network) if isinstance(network, nn.Module) else _called(network)


def given_fields(key: str, name: str, *, required: bool) -> dict[str, str | None]:
    """
    The fields of a recipe that a handed network adds to its name: the digests of its weights and of the file of its class.

    Both are None for a function, of which the name must say everything. Without a network there are none, or with `required` a
    `ConfigError`.
    """
    network = _HANDED.get()
    if network is None:
        if required:
            raise ConfigError(no_network_text(key, name))
        return {}
    from torch import nn

    if not isinstance(network, nn.Module):
        return {"checkpoint_sha256": None, "source_sha256": None, "source_version": None}
    from kdpipe.pipeline.models.external.own_module import find_source

    source = find_source(f"{type(network).__module__}:{type(network).__qualname__}")
    return {
        "checkpoint_sha256": digest_of_weights(network),
        "source_sha256": source.sha256 if source else None,
        "source_version": source.version if source else None,
    }


def digest_of_weights(network: nn.Module) -> str:
    """The sha256 of the parameters and buffers of a network: their names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def no_network_text(key: str, name: str) -> str:
    """The message where a network is needed, and none was handed over."""
    return (
        f"{key}.given: {name} is a network that is passed in Python, and none was: call precompute(config, teacher=network) or "
        "verify(config, teacher=network), or name it by model, file or pretrained for the commands"
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _called(function: GivenTeacher) -> nn.Module:
    import torch
    from torch import Tensor, nn

    class Called(nn.Module):
        """A function as a network, which has no weights to move or to copy."""

        def forward(self, images_NBHW: Tensor) -> Any:
            output = function(images_NBHW)
            is_array = not isinstance(output, Tensor) and hasattr(output, "__array__")  # of NumPy or another library
            return torch.as_tensor(output, device=images_NBHW.device) if is_array else output

        def __deepcopy__(self, memo: dict[int, Any]) -> Called:
            return self

    return Called()
