"""
Soft targets from a teacher's logits: the class map first, the temperature after.

Every soft target that is not read from a cache is computed here: those of soft caches, of online distillation, of parity and of
reports. Caches of logits do the same in NumPy (`kdpipe.cache.encoding.logits.soft_targets`), as `kdpipe.cache` does not need torch.

Shapes: N images, C_t classes of the teacher, C_s of the student, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdpipe.cache.encoding.logits import Softening, is_one_to_one


class SoftTargets:
    """
    `normalise((softmax(z) @ M)^(1/T))`, float32 `(N, C_s, H, W)`, from teacher logits z `(N, C_t, H, W)` of any float type.

    T does not change the order of the classes, and a student that learns the target exactly, `softmax(s / T) = p`, predicts the
    teacher's probabilities at T 1, `softmax(s) = softmax(z) @ M`. `softmax(z / T) @ M` has neither property where several teacher
    classes share a student class. Computed in logs, in which no probability is too small for float32. Source: the temperature is
    that of Hinton et al. 2015, arXiv 1503.02531, section 2, applied to the distribution that the student is to learn.
    """

    def __init__(self, softening: Softening, device: torch.device) -> None:
        self._temperature = softening.temperature
        self._class_map_TS = torch.tensor(softening.class_map, dtype=torch.float32, device=device)
        # At T 1, and where the map only renames classes, the order does not matter, and this one takes less time.
        self._linear = softening.temperature == 1 or is_one_to_one(softening.class_map)
        # For each student class the teacher classes that map to it, and the logarithms of their shares.
        self._parts = [
            (rows.squeeze(1), shares[rows.squeeze(1)].log()[None, :, None, None])
            for shares in self._class_map_TS.unbind(dim=1)
            for rows in [shares.nonzero()]
        ]

    @property
    def num_classes(self) -> int:
        """The number of the student's classes, C_s."""
        return self._class_map_TS.shape[1]

    def __call__(self, logits_NTHW: Tensor) -> Tensor:
        """The soft targets of logits, which sum to one over axis 1."""
        logits_NTHW = logits_NTHW.float()
        if self._linear:
            probs_NTHW = torch.softmax(logits_NTHW / self._temperature, dim=1)
            return torch.einsum("nthw,ts->nshw", probs_NTHW, self._class_map_TS)
        count, _, height, width = logits_NTHW.shape
        mapped_NSHW = logits_NTHW.new_full((count, self.num_classes, height, width), -torch.inf)
        for number, (rows, log_shares_1T11) in enumerate(self._parts):
            if len(rows) == 1:
                mapped_NSHW[:, number] = (logits_NTHW[:, rows] + log_shares_1T11).squeeze(1)
            elif len(rows) > 1:
                mapped_NSHW[:, number] = torch.logsumexp(logits_NTHW[:, rows] + log_shares_1T11, dim=1)
        return torch.softmax(mapped_NSHW / self._temperature, dim=1)
