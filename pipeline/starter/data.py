"""The section `data`: roots by role, and bands and stretch from the images' headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.data.survey import PERCENTILES, Root
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.yaml import Key
from kdpipe.pipeline.text import part_text


def data_keys(
    roots: Sequence[Root], roles: dict[str, str], given: Given, notes: list[str], problems: list[str]
) -> list[Key]:
    """
    The keys of `data` for surveyed roots and their roles; adds to `notes` and `problems`.

    Raises `ConfigError` if `--bands` asks for a band that images lack.
    """
    paths = {role: [path for path, of in roles.items() if of == role] for role in roles.values()}
    train = [root for root in roots if roles[root.path] == "train"]
    layout = (
        f"each a folder with {given.images}/ and {given.masks}/ paired by stem; masks hold class indices"
        if any(root.masks for root in train)
        else "none with masks"
    )
    keys = [
        Key("train", paths["train"], f"Roots of training tiles, {layout}."),
        Key("val", paths["val"], "Roots of validation tiles, by their name or by --val.") if "val" in paths else
        Key("val", [], "None found. Without labelled tiles of other places there are no scores, and no best.ckpt, only last.ckpt."),
    ]  # fmt: skip
    if "unlabelled" in paths:
        why = "Measured: roots without masks; they train from the soft targets alone."
        keys.append(Key("unlabelled", paths["unlabelled"], why))
    if "not used" in paths:
        unused = paths["not used"]
        notes.append(
            f"not in the config, because of their names: {', '.join(unused)}; `kdpipe evaluate CHECKPOINT {unused[0]}` scores them"
        )
    if given.images != "images":
        keys.append(Key("images", given.images, "Given: the folder of images in each root."))
    if given.masks != "masks":
        keys.append(Key("masks", given.masks, "Given: the folder of masks in each root."))
    tiles, masks = sum(len(root.tiles) for root in train), sum(root.masks for root in train)
    if masks < tiles:
        why = f"Measured: {tiles - masks} of {tiles} tiles have no mask; they train from the soft targets alone."
        keys.append(Key("allow_missing_masks", True, why))
    used = [root for root in roots if roles[root.path] != "not used"]
    pixels, empty = sum(root.pixels for root in used), sum(root.pixels_without_data for root in used)
    if empty:
        images = sum(root.images_read for root in used)
        notes.append(
            f"{part_text(empty, pixels)} of the pixels of {images} images hold no data by their alpha, masks or nodata: no loss and no "
            "score counts them"
        )
    return keys + _bands_and_stretch(used, given.bands, notes, problems)


def _alpha(roots: Sequence[Root], notes: list[str]) -> list[Key]:
    """The key `alpha`, unless its default is right."""
    found = [root for root in roots if root.alpha_is_band]
    if not found:
        return []
    between, values = sum(root.alpha_between for root in found), sum(root.alpha_values for root in found)
    measured = f"{part_text(between, values)} of the values of the band called alpha lie between 0 and the largest"
    others = [root.path for root in roots if root.alpha_values and not root.alpha_is_band]
    notes.append(
        f"the images call a band alpha that is no opacity, as {measured}: the config has data.alpha: band, so it hides no pixel and may "
        "stand in data.bands" + (f". That holds for {', '.join(others)} too, where it may be opacity" if others else "")
    )
    why = f"Measured: {measured}. So it is no opacity but another band, such as infrared, and hides no pixel."
    return [Key("alpha", "band", why)]


def _bands_and_stretch(
    roots: Sequence[Root], bands: tuple[int, ...] | None, notes: list[str], problems: list[str]
) -> list[Key]:
    counts = sum((root.bands for root in roots), Counter())
    dtypes = sum((root.dtypes for root in roots), Counter())
    if len(counts) > 1:
        notes.append(f"images differ in their number of bands: {_counts_text(counts)}")
    if len(dtypes) > 1:
        notes.append(f"images differ in their type: {_counts_text(dtypes)}")
    if bands is None and min(counts) < 3 <= max(counts):
        problems.append(
            f"images have {_counts_text(counts)} bands: a run reads the same three from all of them, so move those with fewer to a "
            "folder of their own and leave it out, or convert them"
        )
    ranges = _ranges_text(roots)
    alpha = _alpha(roots, notes)
    keys = _bands(roots, bands, ranges, is_opacity=not alpha) + alpha
    if dtypes.keys() - {"uint8"}:
        why = (f"Measured: images hold {_counts_text(dtypes)}, and networks see 0..255. Guess: these percentiles, over all training "
               f"images, become 0 and 255. range: [low, high] fixes them instead.{ranges}")  # fmt: skip
        keys.append(Key("stretch", {"percentiles": list(PERCENTILES)}, why))
    return keys


def _bands(roots: Sequence[Root], bands: tuple[int, ...] | None, ranges: str, *, is_opacity: bool) -> list[Key]:
    """The key `bands`, unless its default is right."""
    counts = sum((root.bands for root in roots), Counter())
    rgb: Counter[Any] = sum((root.rgb for root in roots), Counter())
    least, most = min(counts), max(counts)
    if bands is not None:
        if max(bands) > least:
            raise ConfigError(f"--bands is {list(bands)}, but images have {_counts_text(counts)} bands")
        return [Key("bands", list(bands), "Given: the bands of red, green and blue, counted from 1.")]
    if least == most == 1:
        return [Key("bands", [1, 1, 1], "Measured: images have one band, which networks see as red, green and blue.")]
    colours = most - (is_opacity and any(root.alpha for root in roots))
    if least == 2 or (colours > 3 and len(rgb) == 1 and None in rgb) or (len(rgb) > 1 and most > 3):
        why = ("Asked: the bands that the teacher knows as red, green and blue, counted from 1, such as [3, 2, 1]. The images do not "
               f"name their bands, {_counts_text(counts)} in number.")  # fmt: skip
        return [Key("bands", FILL_IN, why + ranges)]
    if len(rgb) == 1 and next(iter(rgb)) not in (None, (1, 2, 3)):
        return [Key("bands", list(next(iter(rgb))), "Measured: the bands that the files call red, green and blue.")]
    return []


def _ranges_text(roots: Sequence[Root]) -> str:
    """A sentence on the values of each band in the first root whose pixels were sampled; empty if all are 8-bit."""
    sampled = next((root for root in roots if root.ranges), None)
    if sampled is None:
        return ""
    bands = ", ".join(f"{number}: {low:g} to {high:g}" for number, (low, high) in enumerate(sampled.ranges, start=1))
    low, high = PERCENTILES
    return f" In {sampled.images_read} images of {sampled.path}, the percentiles {low:g} and {high:g} of each band are {bands}."


def _counts_text(counts: Counter[Any]) -> str:
    """`uint16`, or `3 (20 images), 4 (1 image)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{key} ({n} image{'s' if n > 1 else ''})" for key, n in sorted(counts.items()))
