"""Tiles of a cache to look at beside its verification."""

from __future__ import annotations

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.schema import Config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.expected_recipe import configured_softening
from kdpipe.pipeline.reports.html.layers import TilePictures
from kdpipe.pipeline.reports.html.shown_tiles import (
    cached_targets,
    draw_subject,
    spread,
    training_noun,
    training_subjects,
)
from kdpipe.pipeline.verify.gate import Compared, Report


class ParityTiles:
    """Draws what parity compares, while both targets are there: with the difference, up to what is allowed."""

    def __init__(self, config: Config) -> None:
        self.drawn: list[TilePictures] = []
        self._config = config

    def __call__(self, compared: Compared) -> None:
        """Draw one tile."""
        config, allowed = self._config, compared.parity.max_abs.tolerance
        self.drawn.append(
            draw_subject(
                compared.subject, training_noun(config), config, {}, lambda *_: compared.cached_CHW,
                live_CHW=compared.live_CHW, largest_difference=allowed,
            )
        )  # fmt: skip


def cached_tiles(config: Config, report: Report, count: int) -> list[TilePictures]:
    """
    At most `count` tiles of a verified cache, without the teacher: none where a finding is about the cache as a whole, and
    none that a finding names.

    Raises `CorruptCache` for a damaged tile, which level quick does not notice.
    """
    if any(finding.tile is None for finding in report.findings):
        return []
    named = {finding.tile for finding in report.findings}
    stretch = resolve_stretch(config.data, list_tiles(config.data, "train"))
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    whole = [subject for subject in training_subjects(config, stretch, cache) if subject.id not in named]
    noun = training_noun(config)
    return [draw_subject(subject, noun, config, {}, cached_targets(cache)) for subject in spread(whole, count)]
