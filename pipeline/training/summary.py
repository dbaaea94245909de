"""The result of a run of stage two."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kdpipe.configs.schema import DistillMode
from kdpipe.pipeline.precompute.worth import Worth


@dataclass
class Summary:
    """
    Result of a run of stage two; scores in 0..1.

    `wall_seconds` is the time of the whole run over all its resumes, `seconds_per_step` the median step since the last start, without
    warm-up, data loading included (None for a run too short to tell), `teacher_seconds_per_step` the live teacher's mean share of it
    (None without one), and `other_modes` the seconds per step of runs of the same config in other modes, by name. `worth` says what the
    cache saved (None where the cost of stage one is not recorded), `cache_bytes` the size of the cache, `limit` is `data.limit`.
    """

    name: str
    mode: DistillMode
    weights: str
    logs: str
    steps: int = 0
    epochs: float = 0.0
    best_miou: float | None = None
    best_step: int | None = None
    final: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0
    seconds_per_step: float | None = None
    teacher_seconds_per_step: float | None = None
    other_modes: dict[str, float] = field(default_factory=dict)
    fingerprint: str | None = None
    worth: Worth | None = None
    cache_bytes: int = 0
    limit: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "worth": self.worth.as_dict() if self.worth else None}
