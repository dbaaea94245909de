"""Checkpoints and caches as tables and text: what `kdpipe inspect` prints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.cache.manifest import Manifest
from kdpipe.cache.recipe import LogitsRecipe, TeacherRecord
from kdpipe.configs.errors import count_text, summarise
from kdpipe.configs.schema.bands import text_of
from kdpipe.configs.schema.options import options_text
from kdpipe.pipeline.inspection.statistics import MIN_TILES
from kdpipe.pipeline.text import limit_text, percent_text, size_text

if TYPE_CHECKING:
    from kdpipe.pipeline.inspection.cache import CacheInspection
    from kdpipe.pipeline.inspection.checkpoint import Inspection, StudentRun
    from kdpipe.pipeline.inspection.external import External
    from kdpipe.pipeline.inspection.statistics import CacheStatistics

SHOWN_OUTLIERS = 12
SHOWN_TEMPERATURES = (1, 2, 4)  # at which the bound of a cache of logits is shown


def checkpoint_table(found: Inspection) -> Table:
    """The contents of a file of weights, one property per row."""
    network, run = found.network, found.student
    unknown = "not recognised (no network of smp with default options, no FTUNetFormer)"
    rows = {
        "what": "weights of a network" if run is None else "a student's checkpoint of kdpipe train-student",
        "architecture": network.architecture or (run and _of_another_library(run)) or unknown,
        "encoder": network.encoder or ("its own" if network.architecture == "ftunetformer" else "not recognised"),
        "attention": network.attention or "none",
        "bands": str(network.in_channels) + (f", {text_of(run.bands, {})} of the images" if run else ""),
        "options": _options_text(found),
        "channels": "not recognised"
        if network.channels is None
        else str(network.channels)
        + (" (a sigmoid's, which stands for two classes: 1 - σ and σ)" if network.channels == 1 else ""),
        "weights": f"{found.tensors} tensors, {found.parameters / 1e6:.2f} M numbers, "
        + ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items()),
        "nested under": (found.nest or "nothing: a bare state dict")
        + (f", prefix {found.prefix}" if found.prefix else ""),
    }
    if found.other_keys:
        rows["other keys"] = summarise(found.other_keys, 8)
    if found.notes:
        rows["note"] = "\n".join(found.notes)
    if run is not None:
        best = "" if run.best_miou is None else f", best validation mIoU {percent_text(run.best_miou)}"
        averaged = f", weights averaged over {run.averaged_steps} steps" if run.averaged_steps else ""
        rows["run"] = f"{run.name}, mode {run.mode}, after step {run.steps}{averaged}{best}"
        rows["cache"] = run.fingerprint or "none"
    rows |= {"size": f"{size_text(found.size_bytes)} ({found.size_bytes} bytes)", "sha256": found.sha256}
    table = Table(title=found.path, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def external_parts(found: External) -> Iterator[Table | str]:
    """A whole network of another library, one property per row, and the lines of a configuration that name it."""
    rows = {
        "what": found.network,
        "channels": "not known" if found.channels is None else str(found.channels),
        "classes": ", ".join(found.classes) or "named in none of its files",
    }
    if found.input_shape is not None:
        rows["input"] = (
            f"float32 ({', '.join(map(str, found.input_shape))}): images, bands, rows, columns; normalised outside"
        )
    if found.key == "pretrained":
        steps = "; ".join(f"{key} {value}" for key, value in found.preprocessing.items())
        rows["preprocessing"] = f"its own: {steps}" if steps else "its own, by the defaults of its image processor"
    rows["size"] = f"{size_text(found.size_bytes)} ({found.size_bytes} bytes)"
    if found.sha256:
        rows["sha256"] = "\n".join(f"{digest}  {name}" for name, digest in found.sha256.items())
    table = Table(title=found.path, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    yield table
    are = f"\n      are: {found.are or '...'}" if found.key == "predictions" else ""
    yield f"As a teacher:\n\n    teacher:\n      {found.key}: {found.path}{are}\n      classes: [{', '.join(found.classes) or '...'}]"


def _of_another_library(run: StudentRun) -> str:
    """The network of a student that is neither smp's nor kdpipe's; empty for those."""
    if run.model is not None:
        return f"{run.model}, a module that other commands import with --trust-code alone"
    return f"{run.pretrained}, of transformers, described in the checkpoint" if run.pretrained is not None else ""


def _options_text(found: Inspection) -> str:
    """The options that are known, and those that the tensors cannot show."""
    if found.student is not None:
        return options_text(found.student.options).removeprefix(" and options ") or "the defaults"
    if found.network.architecture is None:
        return "not recognised"
    known = options_text(found.network.options).removeprefix(" and options ")
    unseen = ", ".join(found.untraced_options)
    return f"{known or 'the defaults'} fit" + (f"; its tensors do not show {unseen}" if unseen else "")


def cache_tables(found: CacheInspection) -> Iterator[Table | str]:
    """The manifest of a cache, its class map, and its differences from a configuration."""
    manifest, recipe = found.manifest, found.manifest.recipe
    sizes = sorted((tile.height, tile.width) for tile in manifest.tiles)
    partial = "" if manifest.partial_of is None else f" of {manifest.partial_of} (a trial, --limit)"
    rows = {
        "format": manifest.format_version,
        "fingerprint": manifest.fingerprint,
        "tiles": f"{len(manifest.tiles)}{partial}, {found.pixels / 1e6:.1f} MP, from {sizes[0][0]} x {sizes[0][1]} to "
        f"{sizes[-1][0]} x {sizes[-1][1]} px",
        "size": f"{size_text(found.size_bytes)}, {found.size_bytes / found.pixels:.2f} bytes per pixel",
        "values": f"{recipe.kind}, {recipe.bits} bits, {_bound_text(manifest)}",
    }
    if recipe.bands != [1, 2, 3]:
        rows["bands"] = f"{text_of(recipe.bands, {})} of the images, which the teacher sees"
    if recipe.views is not None:
        scales = ", ".join(f"{scale:g}" for scale in recipe.views.scales)
        rows["views"] = (
            f"augmented crops, scales {scales}, mosaic {recipe.views.mosaic:g}, photometric {recipe.views.photometric:g}, "
            f"max_class_share {recipe.views.max_class_share:g}"
        )
    for i, teacher in enumerate(recipe.teachers):
        key = "teacher" if len(recipe.teachers) == 1 else f"teacher {i}"
        if teacher.predictions is not None:
            what = f"{teacher.predictions} that another program predicted"
            rows[key] = f"{what}, {count_text(len(teacher.classes), 'channels')}; each tile has the digest of its own"
            continue
        views = f"tta {teacher.tta}, scales {', '.join(f'{scale:g}' for scale in teacher.scales)}"
        rows[key] = (
            f"{_network_text(teacher)}, {count_text(len(teacher.classes), 'channels')}, {teacher.precision}, {views}, "
            f"window {teacher.window or 'none'}{options_text(teacher.options)}; sha256 {_sha256_text(teacher) or 'of no file'}"
        )
    rows["computed"] = f"on {manifest.device} by " + ", ".join(f"{n} {v}" for n, v in manifest.libraries.items())
    table = Table(title=found.url, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    yield table
    if isinstance(recipe, LogitsRecipe):
        yield f"channels: {', '.join(recipe.channels)}"
        yield "temperature and class map come from the configuration that reads the cache"
    else:
        shares = Table(title="Class map", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, row in zip(recipe.teacher_classes, recipe.class_map, strict=True):
            text = ", ".join(f"{to} {share:g}" for to, share in zip(recipe.classes, row, strict=True) if share)
            shares.add_row(name, text)
        yield shares
    for name, (then, now) in found.other_libraries.items():
        yield f"note: computed with {name} {then}, installed is {now}; the cache stays valid"
    if found.differences is not None:
        yield from found.differences or ["the configuration describes this cache"]


def _network_text(teacher: TeacherRecord) -> str:
    if teacher.architecture is not None:
        return f"{teacher.architecture}, {teacher.encoder}"
    if teacher.made_by is not None:
        return "a program of its own" + "".join(f", {name} {value}" for name, value in teacher.made_by.items())
    if teacher.given is not None:
        return f"{teacher.given}, passed in Python"
    return teacher.model or ", ".join(teacher.files_sha256 or ())


def _sha256_text(teacher: TeacherRecord) -> str:
    digests = [teacher.checkpoint_sha256] if teacher.checkpoint_sha256 else list((teacher.files_sha256 or {}).values())
    return ", ".join(digest[:16] for digest in digests)


def _bound_text(manifest: Manifest) -> str:
    if isinstance(manifest.recipe, LogitsRecipe):
        classes = len(
            manifest.recipe.channels
        )  # the student has as many classes or fewer, unless the map divides most of them
        by_temperature = ", ".join(f"{manifest.probability_bound(t, classes):.5f} at T {t}" for t in SHOWN_TEMPERATURES)
        return f"|Δz| at most {manifest.error_bound:.4f}, |Δp| at most {by_temperature}"
    return f"T {manifest.recipe.temperature:g}, |Δp| at most {manifest.error_bound:.5f}"


def statistics_tables(found: CacheStatistics) -> Iterator[Table | str]:
    """Statistics of a cache: shares by class, entropy, confidence, rounding, sizes and outliers."""
    of_logits = found.kind == "logits"
    if found.limit is not None:
        yield f"statistics of {count_text(len(found.tiles), 'tiles')}{limit_text(found.limit, found.cached)}"
    shares = Table(title="The teacher's classes, at T 1" if of_logits else "Classes", title_justify="left")
    for column in ("class", "mean probability", "likeliest"):
        shares.add_column(column, justify="left" if column == "class" else "right")
    for name, share, argmax in zip(found.classes, found.shares, found.argmax_shares, strict=True):
        shares.add_row(name, percent_text(share, 2), percent_text(argmax, 2))
    yield shares
    bins = [sum(found.confidence_histogram[start:end]) for start, end in ((0, 10), (10, 14), (14, 18), (18, 20))]
    parts = [percent_text(count / found.pixels) for count in bins]
    yield (
        f"entropy {found.entropy:.4f} nats (ln {len(found.classes)} = {math.log(len(found.classes)):.4f} at most); "
        f"confidence {found.confidence:.4f}: below 0.5 {parts[0]}, to 0.7 {parts[1]}, to 0.9 {parts[2]}, above {parts[3]}"
    )
    entropy_lost = ""
    if not of_logits:
        entropy_lost = f"; entropy lost {found.entropy_lost:+.1e} nats, at most {found.largest_entropy_lost:+.1e} in a block of 64 px"
    yield f"rounding: |Δp| at most {found.error_bound:.5f} (measured by verify-cache --level parity){entropy_lost}"
    sizes = sorted(tile.bytes_per_pixel for tile in found.tiles)
    yield (
        f"{found.shard_bytes / found.pixels:.3f} bytes per pixel; by tile {sizes[0]:.3f} to {sizes[-1]:.3f}, "
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
        few = f"too few to tell, as there {'is' if len(found.tiles) == 1 else 'are'} {count_text(len(found.tiles), 'tiles')}"
        yield f"tiles unlike the others: {few if len(found.tiles) < MIN_TILES else 'none'}"
    if found.without_spread:
        yield f"not judged by {', '.join(found.without_spread)}, on which more than half of the tiles agree"
