"""Results as tables and text for people: what the commands print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.cache.codec import probability_bound
from kdpipe.cache.manifest import Manifest
from kdpipe.cache.recipe import LogitsRecipe
from kdpipe.configs.errors import summarise
from kdpipe.pipeline.inspection.statistics import MIN_TILES
from kdpipe.pipeline.text import duration_text, percent_text, size_text

if TYPE_CHECKING:
    from kdpipe.data.landscape.labels import SampleData
    from kdpipe.pipeline import dry_run as estimate
    from kdpipe.pipeline.inspection import cache as cache_inspection
    from kdpipe.pipeline.inspection import checkpoint as inspection
    from kdpipe.pipeline.inspection import statistics as cache_statistics
    from kdpipe.pipeline.precompute import plan
    from kdpipe.pipeline.training import run as training
    from kdpipe.pipeline.training import worth
    from kdpipe.pipeline.verify import gate as verify
    from kdpipe.pipeline.verify import suggestion
    from kdpipe.pipeline.verify.parity import TileParity

SHOWN_SHARE = 0.005  # of a teacher class's labels: less would be shown as 0 %
SHOWN_OUTLIERS = 12
SHOWN_TEMPERATURES = (1, 2, 4)  # at which the bound of a cache of logits is said
TILE_COLUMN = 19  # characters of a tile's id beside the figures of parity
SHOWN_FINDINGS = 20  # the rest is in --json


def estimate_text(forecast: estimate.Estimate) -> str:
    """What stage one will cost, and whether it fits."""
    temporary = forecast.temporary_bytes
    besides = (
        f", and {size_text(temporary)} for a moment besides, as the largest scene is asked in windows"
        if temporary
        else ""
    )
    free = "no limit known" if forecast.free_bytes is None else f"{size_text(forecast.free_bytes)} free"
    lines = [
        f"{forecast.tiles} {forecast.noun}, {forecast.finished} finished, {forecast.tiles - forecast.finished} to do "
        f"({forecast.pixels / 1e6:.1f} MP)",
        f"about {size_text(forecast.bytes)} in {forecast.cache}{besides} ({free}: {'fits' if forecast.fits else 'DOES NOT FIT'})",
        f"about {duration_text(forecast.seconds)}; nothing was written",
    ]
    lines += [f"unreadable: {reason}" for reason in forecast.unreadable.values()]
    if isinstance(forecast.worth, str):
        lines.append(f"worth it? {forecast.worth}")
    elif forecast.worth:
        lines += worth_lines(forecast.worth, forecast.bytes)
    return "\n".join(lines)


def worth_lines(found: worth.Worth, size_bytes: int) -> list[str]:
    """What a cache saves of a training run, judged by the cheaper way to ask a live teacher; narrow enough for 80 columns."""
    whole, crops = (found.steps * seconds for seconds in (found.online_step_seconds, found.crops_step_seconds))
    share = 1 - found.step_seconds / found.cheapest_step_seconds
    if found.teacher_view == "tile":
        teacher = f"teacher {found.tile_seconds:.3g} s a tile, {found.crop_seconds:.3g} s a crop"
        without = f"{duration_text(whole)} (--kd online: whole tiles), {duration_text(crops)} (crops alone)"
    else:
        teacher, without = f"teacher {found.crop_seconds:.3g} s a crop", f"{duration_text(crops)} (--kd online)"
    return [
        "",
        f"student {found.step_seconds:.3g} s a step of {found.samples_per_step} samples; {teacher}",
        f"{found.steps} steps ({found.epochs:.3g} epochs): {duration_text(found.cached_seconds)} with the cache, stage one included;",
        f"without it {without}",
        f"worth it? {found.verdict}: a live teacher is {percent_text(share)} of a step at least; the cache has paid",
        f"for itself after {found.paid_after_epochs:.2g} epochs, {_saved_text(found.saved_share)} of the time, and takes "
        f"{size_text(size_bytes)}",
    ]


def _saved_text(share: float) -> str:
    return f"saves {percent_text(share)}" if share >= 0 else f"costs another {percent_text(-share)}"


def precompute_text(summary: plan.Summary) -> str:
    """What stage one did."""
    if not summary.computed:
        return (
            f"nothing to do: {summary.kept} {summary.noun}, fingerprint {summary.fingerprint}"
            if summary.fingerprint
            else "nothing computed"
        )
    rate = (
        f"{summary.computed / summary.seconds:.2f} {summary.noun}/s, {summary.pixels / summary.seconds / 1e6:.2f} MP/s"
    )
    size = f"{size_text(summary.bytes_written)}, {summary.bytes_written / summary.pixels:.2f} bytes a pixel"
    state = f"complete, fingerprint {summary.fingerprint}" if summary.fingerprint else "not complete"
    lines = [f"{summary.computed} {summary.noun} in {duration_text(summary.seconds)} ({rate}), {size}"]
    if summary.paid_after_epochs is not None:
        online, crops = duration_text(summary.online_seconds), duration_text(summary.crops_seconds)
        asked = (
            f"{online} (--kd online: whole tiles), {crops} (crops alone)"
            if online != crops
            else f"{online} (--kd online)"
        )
        lines.append(
            f"a live teacher would take of each epoch: {asked};\nthe cache has paid for itself after {summary.paid_after_epochs:.2g} epochs"
        )
    return "\n".join([*lines, f"{summary.cache}: {state}"])


def verify_tables(report: verify.Report) -> Iterator[Table | str]:
    """What verification measured and found."""
    if report.parity:
        yield _parity_table(report.parity)
    if report.teacher_classes:
        table = Table(title="Teacher classes against the labels", title_justify="left")
        texts = ("teacher says", "configured", "labels fit best")
        for column in ("teacher says", "configured", "agree", "labels fit best", "share", "gain"):
            table.add_column(column, justify="left" if column in texts else "right")
        for row in report.teacher_classes:
            table.add_row(
                row.name, row.configured, percent_text(row.configured_share), row.fitting,
                percent_text(row.fitting_share), f"{100 * row.gain:+.1f}" + (" !" if row.clearly_better else ""),
            )  # fmt: skip
        yield table
    if report.labels:
        table = Table(
            title=f"Cached targets against the labels of {report.label_tiles} {report.noun}", title_justify="left"
        )
        table.add_column("class")
        table.add_column("IoU", justify="right")
        table.add_column("F1", justify="right")
        table.add_column("")
        for name, iou in report.labels.iou.items():
            table.add_row(
                name, percent_text(iou), percent_text(report.labels.f1[name]), report.labels.left_out.get(name, "")
            )
        table.add_row(
            "mean", percent_text(report.labels.miou), percent_text(report.labels.mean_f1), "", end_section=True
        )
        yield table
    if report.findings:
        yield f"{len(report.findings)} finding{'s' if len(report.findings) > 1 else ''} in {report.cache}:"
        for finding in report.findings[:SHOWN_FINDINGS]:
            yield f"  {finding.code}{f' {finding.tile}' if finding.tile else ''}: {finding.message}"
        if len(report.findings) > SHOWN_FINDINGS:
            yield f"  and {len(report.findings) - SHOWN_FINDINGS} more; all of them with --json FILE"
    else:
        bound = f", |Δp| at most {report.error_bound:.5f} by encoding" if report.error_bound else ""
        yield f"PASS ({report.level}): {report.tiles} {report.noun}, fingerprint {(report.fingerprint or '')[:16]}{bound}"


def suggestion_tables(result: suggestion.Suggestion) -> Iterator[Table | str]:
    """The configured map beside the labels', and the suggested one to paste."""
    table = Table(
        title=f"Labels where the teacher answers, {result.pixels:,} labelled px of {result.tiles} tiles",
        title_justify="left",
    )
    for column in ("teacher says", "px", "labels say, %", "configured, %"):
        table.add_column(column, justify="right" if column == "px" else "left", no_wrap=column == "px")
    for row in result.rows:
        labels = {name: n / row.pixels for name, n in row.counts.items() if n}
        common = sorted(labels, key=labels.__getitem__, reverse=True)
        shown = {name: labels[name] for name in common if labels[name] >= SHOWN_SHARE}
        table.add_row(
            row.teacher_class, f"{row.pixels:,}", _shares_text(shown) + (" !" if row.disagrees else ""),
            _shares_text(row.configured) or "to be filled in",
        )  # fmt: skip
    yield table
    if any(row.disagrees for row in result.rows):
        yield "!: most labels are of another class."
        yield "Is the order of teacher.classes that of the checkpoint's channels?"
    yield f"Shares below {result.min_entry} are dropped and the others scaled up."
    if any(row.kept for row in result.rows):
        yield f"Classes on less than {100 * result.min_share:g} % of the pixels keep their configured row."
    if any(row.unfilled for row in result.rows):
        yield "Is a class found where you expect it? If not, its channel is another one: see teacher.classes."
    yield "Shares hold the teacher's mistakes too: leave {Class: 1} where that is plain."
    yield ""
    yield result.as_yaml()


def _shares_text(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f}" for name, share in shares.items())


def training_tables(summary: training.Summary) -> Iterator[Table | str]:
    """What stage two reached."""
    final = summary.final
    if final:
        table = Table(title=f"{summary.name}: validation after step {summary.steps}", title_justify="left")
        table.add_column("class")
        table.add_column("IoU", justify="right")
        table.add_column("F1", justify="right")
        table.add_column("")
        for name, iou in final["iou"].items():
            table.add_row(name, percent_text(iou), percent_text(final["f1"][name]), final["left_out"].get(name, ""))
        table.add_row(
            "mean",
            percent_text(final["miou"]),
            percent_text(final["mean_f1"]),
            f"overall accuracy {percent_text(final['overall_accuracy'])}",
        )
        yield table
    best = (
        f", best mIoU {percent_text(summary.best_miou)} at step {summary.best_step}"
        if summary.best_miou is not None
        else ""
    )
    pace = f", {summary.seconds_per_step:.3f} s a step" if summary.seconds_per_step else ""
    yield f"{summary.steps} steps in {duration_text(summary.seconds)}{pace}{best}"
    if summary.teacher_seconds_per_step:
        yield f"the live teacher took {summary.teacher_seconds_per_step:.3f} s of a step, which a cache pays once"
    if summary.other_modes:
        others = ", ".join(f"{seconds:.3f} s in {name}" for name, seconds in summary.other_modes.items())
        yield f"a step beside it: {others}"
    yield f"weights in {summary.weights}, logs in {summary.logs}"
    if summary.worth:
        yield from worth_lines(summary.worth, summary.cache_bytes)


def _parity_table(rows: list[TileParity]) -> Table:
    """One row a tile, and last the strictest of what is allowed; narrow enough for a terminal of 80 columns."""
    table = Table(title="Cached against live targets", title_justify="left", padding=(0, 0, 0, 1))
    columns = ("tile", "max |Δp|", "mean |Δp|", "KL", "argmax", "Δ loss", "grad. cos")
    for column in columns:
        table.add_column(column, justify="left" if column == "tile" else "right")
    for row in rows:
        table.add_row(_end_of(row.tile), *_parity_figures(row.max_abs.value, row.mean_abs.value, row.kl.value, row.argmax_agreement,
                                                 row.loss_difference.value, row.gradient_cosine.value))  # fmt: skip
    table.add_section()
    mean_agreement = sum(row.argmax_agreement for row in rows) / len(rows)
    table.add_row("worst", *_parity_figures(
        max(row.max_abs.value for row in rows), max(row.mean_abs.value for row in rows), max(row.kl.value for row in rows),
        min(row.argmax_agreement for row in rows), max(row.loss_difference.value for row in rows),
        min(row.gradient_cosine.value for row in rows)))  # fmt: skip
    table.add_row("allowed", *_parity_figures(
        min(row.max_abs.tolerance for row in rows), min(row.mean_abs.tolerance for row in rows),
        min(row.kl.tolerance for row in rows), None, min(row.loss_difference.tolerance for row in rows),
        max(row.gradient_cosine.tolerance for row in rows)))  # fmt: skip
    decided = min(row.decided_agreement.value for row in rows)
    table.caption = (
        f"argmax agrees on {percent_text(mean_agreement, 2)} of all pixels, "
        f"and on {percent_text(decided, 2)} of those that are decided by more than |Δp| allows"
    )
    table.caption_justify = "left"
    return table


def _end_of(tile_id: str) -> str:
    """An id as far as the narrow table has room for it: its end tells tiles and views apart."""
    return tile_id if len(tile_id) <= TILE_COLUMN else f"…{tile_id[1 - TILE_COLUMN :]}"


def _parity_figures(
    max_abs: float, mean_abs: float, kl: float, agreement: float | None, loss: float, cosine: float
) -> tuple[str, ...]:
    return f"{max_abs:.1e}", f"{mean_abs:.1e}", f"{kl:.1e}", percent_text(agreement, 2), f"{loss:.1e}", f"{cosine:.5f}"


def inspection_table(found: inspection.Inspection) -> Table:
    """What a checkpoint file is, a line for each thing."""
    network, run = found.network, found.student
    unknown = "not recognised (no network of smp with default options, no FTUNetFormer)"
    rows = {
        "what": "weights of a network" if run is None else "a student's checkpoint of kdpipe train-student",
        "architecture": network.architecture or unknown,
        "encoder": network.encoder or ("its own" if network.architecture == "ftunetformer" else "not recognised"),
        "attention": network.attention or "none",
        "channels": "not recognised" if network.channels is None else str(network.channels),
        "weights": f"{found.tensors} tensors, {found.parameters / 1e6:.2f} M numbers, "
        + ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items()),
        "lie under": (found.nest or "nothing: the file is a bare state dict")
        + (f", names begin with {found.prefix}" if found.prefix else ""),
    }
    if found.other_keys:
        rows["beside"] = summarise(found.other_keys, 8)
    if run is not None:
        best = "" if run.best_miou is None else f", best validation mIoU {percent_text(run.best_miou)}"
        rows["run"] = f"{run.name}, mode {run.mode}, after step {run.steps}{best}"
        rows["cache"] = run.fingerprint or "none"
    rows |= {"size": f"{size_text(found.size_bytes)} ({found.size_bytes} bytes)", "sha256": found.sha256}
    table = Table(title=found.path, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def cache_tables(found: cache_inspection.CacheInspection) -> Iterator[Table | str]:
    """What a cache says of itself, its class map, and what a configuration would have otherwise."""
    manifest, recipe = found.manifest, found.manifest.recipe
    sizes = sorted((tile.height, tile.width) for tile in manifest.tiles)
    rows = {
        "format": manifest.format_version,
        "fingerprint": manifest.fingerprint,
        "tiles": f"{len(manifest.tiles)}, {found.pixels / 1e6:.1f} MP, from {sizes[0][0]} x {sizes[0][1]} to "
        f"{sizes[-1][0]} x {sizes[-1][1]} px",
        "size": f"{size_text(found.size_bytes)}, {found.size_bytes / found.pixels:.2f} bytes a pixel",
        "values": f"{recipe.kind}, {recipe.bits} bits, {_bound_text(manifest)}",
    }
    if recipe.views is not None:
        scales = ", ".join(f"{scale:g}" for scale in recipe.views.scales)
        rows["views"] = (
            f"augmented crops, scales {scales}, mosaic {recipe.views.mosaic:g}, photometric {recipe.views.photometric:g}, "
            f"max_class_share {recipe.views.max_class_share:g}"
        )
    for i, teacher in enumerate(recipe.teachers):
        views = f"tta {teacher.tta}, scales {', '.join(f'{scale:g}' for scale in teacher.scales)}"
        rows["teacher" if len(recipe.teachers) == 1 else f"teacher {i}"] = (
            f"{teacher.architecture}, {teacher.encoder}, {len(teacher.classes)} channels, {teacher.precision}, {views}, "
            f"window {teacher.window or 'none'}; sha256 {teacher.checkpoint_sha256[:16]}"
        )
    rows["computed"] = f"on {manifest.device} by " + ", ".join(f"{n} {v}" for n, v in manifest.libraries.items())
    table = Table(title=found.url, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    yield table
    if isinstance(recipe, LogitsRecipe):
        yield f"channels: {', '.join(recipe.channels)}"
        yield "temperature and class map are those of the configuration that reads it"
    else:
        shares = Table(title="Class map", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, row in zip(recipe.teacher_classes, recipe.class_map, strict=True):
            text = ", ".join(f"{to} {share:g}" for to, share in zip(recipe.classes, row, strict=True) if share)
            shares.add_row(name, text)
        yield shares
    for name, (then, now) in found.other_libraries.items():
        yield f"note: computed with {name} {then}, installed is {now}; the values are not recomputed for that"
    if found.differences is not None:
        yield from found.differences or ["the configuration describes this very cache"]


def _bound_text(manifest: Manifest) -> str:
    if isinstance(manifest.recipe, LogitsRecipe):
        by_temperature = ", ".join(f"{probability_bound(manifest, t):.5f} at T {t}" for t in SHOWN_TEMPERATURES)
        return f"|Δz| at most {manifest.error_bound:.4f}, |Δp| at most {by_temperature}"
    return f"T {manifest.recipe.temperature:g}, |Δp| at most {manifest.error_bound:.5f}"


def statistics_tables(found: cache_statistics.CacheStatistics) -> Iterator[Table | str]:
    """A cache's numbers: shares by class, both histograms, what rounding took, and the tiles unlike the others."""
    of_logits = found.kind == "logits"
    shares = Table(title="The teacher's classes, at T 1" if of_logits else "Classes", title_justify="left")
    for column in ("class", "mean probability", "likeliest"):
        shares.add_column(column, justify="left" if column == "class" else "right")
    for name, share, argmax in zip(found.classes, found.shares, found.argmax_shares, strict=True):
        shares.add_row(name, percent_text(share, 2), percent_text(argmax, 2))
    yield shares
    bins = [sum(found.confidence_histogram[start:end]) for start, end in ((0, 10), (10, 14), (14, 18), (18, 20))]
    parts = [percent_text(count / found.pixels) for count in bins]
    yield (
        f"entropy {found.entropy:.4f} nats (ln {len(found.classes)} = {math.log(len(found.classes)):.4f} is the most); "
        f"confidence {found.confidence:.4f}: below 0.5 {parts[0]}, to 0.7 {parts[1]}, to 0.9 {parts[2]}, above {parts[3]}"
    )
    yield (
        f"rounding: |Δp| at most {found.error_bound:.5f} as stated (what is reached needs the teacher: verify-cache --level "
        "parity)"
        + (
            ""
            if of_logits
            else f"; entropy lost {found.entropy_lost:+.1e} nats, in a block of 64 px at most {found.largest_entropy_lost:+.1e}"
        )
    )
    sizes = sorted(tile.bytes_per_pixel for tile in found.tiles)
    yield (
        f"{found.shard_bytes / found.pixels:.3f} bytes a pixel; by tile {sizes[0]:.3f} to {sizes[-1]:.3f}, "
        f"median {statistics.median(sizes):.3f}"
    )
    if found.outliers:
        table = Table(title="Tiles unlike the others (robust z-score beyond 3.5)", title_justify="left")
        for column in ("tile", "in", "value", "median", "z"):
            table.add_column(column, justify="left" if column in ("tile", "in") else "right")
        for outlier in found.outliers[:SHOWN_OUTLIERS]:
            table.add_row(
                outlier.tile, outlier.figure, f"{outlier.value:.3g}", f"{outlier.median:.3g}", f"{outlier.score:+.1f}"
            )
        yield table
        if len(found.outliers) > SHOWN_OUTLIERS:
            yield f"and {len(found.outliers) - SHOWN_OUTLIERS} more, in --json and --table"
    else:
        few = f"{len(found.tiles)} tiles are too few to say" if len(found.tiles) < MIN_TILES else "none"
        yield f"tiles unlike the others: {few}"
    if found.without_spread:
        yield f"not judged by {', '.join(found.without_spread)}, in which more than half of the tiles agree"


def sample_data_text(summary: SampleData) -> str:
    """What the generator wrote."""
    tiles = ", ".join(f"{count} {split}" for split, count in summary.tiles.items())
    return f"{tiles} tiles, {sum(summary.pixels.values()) / 1e6:.1f} MP, {size_text(summary.size_bytes)} in {summary.out_dir}"
