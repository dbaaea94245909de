"""The optimizer of stage two: AdamW with two learning rates and no decay on biases, optionally within Lookahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.configs.schema import Train
from kdpipe.pipeline.models.student import encoder_parameters

LOOKAHEAD_STEPS, LOOKAHEAD_SHARE = 5, 0.5  # k and alpha, Zhang et al. 2019, arXiv 1907.08610, section 4


def make_optimizer(student: nn.Module, train: Train) -> torch.optim.AdamW:
    """
    AdamW, within Lookahead if `train.lookahead`; the encoder learns at `backbone_lr`, the rest at `lr`.

    Biases, by name, have no weight decay. Four parameter groups: the encoder's weights and biases, then the others'.
    """
    encoder = encoder_parameters(student)
    groups: list[dict[str, Any]] = []
    for in_encoder, lr in ((True, train.backbone_lr), (False, train.lr)):
        for is_bias, decay in ((False, train.weight_decay), (True, 0.0)):
            params = [
                parameter
                for name, parameter in student.named_parameters()
                if (id(parameter) in encoder) is in_encoder and (name.split(".")[-1] == "bias") is is_bias
            ]
            groups.append({"params": params, "lr": lr, "weight_decay": decay})
    return LookaheadAdamW(groups) if train.lookahead else torch.optim.AdamW(groups)


class LookaheadAdamW(torch.optim.AdamW):
    """
    AdamW with slow weights: every five steps they move half of the way to the fast ones, which continue from there.

    The slow weights are part of each parameter's state, so `state_dict` holds all that a resumed run needs.
    Source: Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back", arXiv 1907.08610, algorithm 1.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW, and every fifth time one of the slow weights."""
        before = {
            parameter: parameter.detach().clone()
            for parameter in self._learning()
            if "slow" not in self.state.get(parameter, {})
        }
        loss = super().step(closure)
        for parameter in self._learning():
            state = self.state[parameter]
            if parameter in before:
                state["slow"] = before[parameter]
            if int(state["step"].item()) % LOOKAHEAD_STEPS == 0:
                slow: Tensor = state["slow"]
                slow.lerp_(parameter, LOOKAHEAD_SHARE)
                parameter.copy_(slow)
        return loss

    def _learning(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]
