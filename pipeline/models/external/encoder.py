"""Which part of a network is its encoder, which has a learning rate of its own."""

from __future__ import annotations

from torch import nn

NAMES = (
    "encoder",
    "backbone",
)  # of the encoder among a network's attributes: smp's, and those of torchvision, mmseg and UNetFormer
OF_MASKS = "pixel_level_module"  # holds the encoder in transformers' networks that predict masks


def encoder_of(network: nn.Module) -> nn.Module | None:
    """
    The encoder of a network: its attribute `encoder` or `backbone`, or the base model of a network of transformers; None without one.

    What wraps a single network as `network`, as kdpipe's own wrappers do, is looked into.
    """
    network = innermost(network)
    for owner in (network, getattr(getattr(network, "base_model", None), OF_MASKS, None)):
        for name in NAMES:
            if isinstance(found := getattr(owner, name, None), nn.Module):
                return found
    base = getattr(network, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not network else None


def innermost(network: nn.Module) -> nn.Module:
    """The network within wrappers that hold nothing but it, as `network`."""
    while [name for name, _ in network.named_children()] == ["network"]:
        network = network.get_submodule("network")
    return network
