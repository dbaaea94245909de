"""Stage one as text: its estimate, its result, and whether the cache is worth it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.text import duration_text, limit_text, pace_text, percent_text, size_text, stage_one_time_text

if TYPE_CHECKING:
    from kdpipe.pipeline.dry_run import Estimate
    from kdpipe.pipeline.precompute.plan import Summary
    from kdpipe.pipeline.precompute.worth import Worth


def estimate_text(forecast: Estimate) -> str:
    """The estimated size and time of stage one, and whether the cache is worth it."""
    temporary = ""
    if forecast.temporary_bytes:
        size = size_text(forecast.temporary_bytes)
        temporary = f", and {size} for a moment, as the largest scene is predicted in windows"
    free = "no limit known" if forecast.free_bytes is None else f"{size_text(forecast.free_bytes)} free"
    lines = [
        f"{count_text(forecast.tiles, forecast.noun)}{limit_text(forecast.limit, forecast.configured)}, {forecast.finished} finished, "
        f"{forecast.tiles - forecast.finished} to do ({forecast.pixels / 1e6:.1f} MP)",
        f"about {size_text(forecast.bytes)} in {forecast.cache}{temporary} ({free}: {'fits' if forecast.fits else 'DOES NOT FIT'})",
        f"{stage_one_time_text(forecast.seconds)} (estimate); nothing was written",
        *(f"unreadable: {reason}" for reason in forecast.unreadable.values()),
    ]
    if isinstance(forecast.worth, str):
        lines.append(f"worth it? {forecast.worth}")
    elif forecast.worth:
        lines += worth_lines(forecast.worth, forecast.bytes)
    return "\n".join(lines)


def precompute_text(summary: Summary) -> str:
    """What stage one computed."""
    if not summary.computed:
        if not summary.fingerprint:
            return "nothing computed"
        done = f"nothing to do: {count_text(summary.kept, summary.noun)}, fingerprint {summary.fingerprint}"
        return "\n".join([done, *_partial_lines(summary)])
    rate = (
        f"{summary.computed / summary.seconds:.2f} {summary.noun}/s, {summary.pixels / summary.seconds / 1e6:.2f} MP/s"
    )
    size = f"{size_text(summary.bytes_written)}, {summary.bytes_written / summary.pixels:.2f} bytes per pixel"
    # An earlier run computed the tiles that were kept, and took time of its own.
    time = duration_text(summary.seconds) if summary.kept else stage_one_time_text(summary.seconds)
    lines = [f"{count_text(summary.computed, summary.noun)}, {size}; {time} ({rate})"]
    if summary.paid_after_epochs is not None:
        online, crops = duration_text(summary.online_seconds), duration_text(summary.crops_seconds)
        live = (
            f"{online} (--kd online)"
            if online == crops
            else f"{online} (--kd online: whole tiles) or {crops} (crops alone)"
        )
        lines += [
            f"a live teacher would take {live} of each epoch;",
            f"the cache pays for itself after {summary.paid_after_epochs:.2g} epochs",
        ]
    whole = "finished for a trial" if summary.is_partial else "complete"
    state = f"{whole}, fingerprint {summary.fingerprint}" if summary.fingerprint else "not complete"
    return "\n".join([*lines, f"{summary.cache}: {state}", *_partial_lines(summary)])


def _partial_lines(summary: Summary) -> Iterator[str]:
    """What to do next with the cache of a trial."""
    if summary.is_partial and summary.limit is not None:
        yield (
            f"it holds {summary.cached} of {count_text(summary.configured, summary.noun)}: verify and train with --limit {summary.limit}, "
            "or "
            "run this command without it to compute the others"
        )


def worth_lines(found: Worth, size_bytes: int) -> list[str]:
    """The cost of a cache, and the time that it saves a training run; at most 80 columns wide."""
    whole, crops = (found.steps * seconds for seconds in (found.online_step_seconds, found.crops_step_seconds))
    share = 1 - found.step_seconds / found.cheapest_step_seconds
    teacher, without = f"{pace_text(found.crop_seconds)} per crop", f"{duration_text(crops)} (--kd online)"
    if found.teacher_view == "tile":
        teacher = f"{pace_text(found.tile_seconds)} per tile, {teacher}"
        without = f"{duration_text(whole)} (--kd online: whole tiles) or {duration_text(crops)} (crops alone)"
    saved = found.saved_share
    return [
        "",
        f"step: {pace_text(found.step_seconds)} for {count_text(found.samples_per_step, 'samples')}; teacher: {teacher}",
        f"{found.steps} steps ({found.epochs:.3g} epochs) take {duration_text(found.cached_seconds)} with the cache, stage one included,",
        f"without it {without}",
        f"worth it? {found.verdict}: a live teacher takes at least {percent_text(share)} of a step. The cache pays",
        f"for itself after {found.paid_after_epochs:.2g} epochs, "
        + (f"saves {percent_text(saved)}" if saved >= 0 else f"costs another {percent_text(-saved)}")
        + f" of the time, and takes {size_text(size_bytes)}",
    ]
