"""The section `data`: roots by role, and bands and stretch from the images' headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.configs.errors import ConfigError, count_text
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.data.survey import PERCENTILES, Root
from kdpipe.data.tiles import has_star
from kdpipe.pipeline.models.normalize import COLOURS
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.layouts import Layout, affix_keys
from kdpipe.pipeline.starter.yaml import Key
from kdpipe.pipeline.text import part_text

OWN_RUN = "Measured: from the configuration that this student was trained with."


@dataclass(frozen=True)
class Wanted:
    """
    What is known of the bands that the teacher sees: their `count`, and their `numbers` if these are not 1 to 3 as usual.

    Only a student's checkpoint says the numbers; None is unknown.
    """

    count: int = COLOURS
    numbers: tuple[int, ...] | None = None


def data_keys(
    roots: Sequence[Root],
    roles: dict[str, str],
    given: Given,
    notes: list[str],
    problems: list[str],
    wanted: Wanted | None = None,
) -> list[Key]:
    """
    The keys of `data` for surveyed roots, their roles and the bands that the teacher sees (None: there is none yet); adds to `notes` and
    `problems`.

    Raises `ConfigError` if `--bands` asks for a band that images lack, or for another number of bands than the teacher's.
    """
    paths = {role: [path for path, of in roles.items() if of == role] for role in roles.values()}
    if given.layout is not None and given.layout.val_list and "train" in paths:
        paths["val"] = paths["train"]
    train = [root for root in roots if roles[root.path] == "train"]
    held = "colours" if given.colours else "class indices"
    layout = (
        f"{_folders_text(train, given)}; masks hold {held}" if any(root.masks for root in train) else "none with masks"
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
    keys += _layout_keys(given, paths)
    tiles, masks = sum(len(root.tiles) for root in train), sum(root.masks for root in train)
    if masks < tiles:
        why = f"Measured: {tiles - masks} of {count_text(tiles, 'tiles')} have no mask; they train from the soft targets alone."
        keys.append(Key("allow_missing_masks", True, why))
    used = [root for root in roots if roles[root.path] != "not used"]
    pixels, empty = sum(root.pixels for root in used), sum(root.pixels_without_data for root in used)
    if empty:
        images = sum(root.images_read for root in used)
        notes.append(
            f"{part_text(empty, pixels)} of the pixels of {count_text(images, 'images')} hold no data by their alpha, masks or nodata: no "
            "loss and no "
            "score counts them"
        )
    return keys + _bands_and_stretch(used, given.bands, wanted, notes, problems)


def _folders_text(roots: Sequence[Root], given: Given) -> str:
    """Where images and masks lie in roots."""
    if given.images == given.masks:
        return "which hold images and masks, paired by what their names begin with"
    if any(has_star(root.path) for root in roots):
        return f"in which * stands for {given.images!r} and for {given.masks!r}; images and masks are paired by stem"
    return f"each a folder with {given.images}/ and {given.masks}/ paired by stem"


def _layout_keys(given: Given, paths: Mapping[str, Sequence[str]]) -> list[Key]:
    """The keys that say how images and masks lie in the roots, where they differ from the defaults."""
    layout = given.layout or Layout([], given.images, given.masks)
    source = f"Measured: {layout.source}" if layout.source else "Given"
    keys = [
        Key(name, value, f"{source}: {_name_text(name, value)}.")
        for name, value in (("images", layout.images), ("masks", layout.masks))
        if value != name
    ]
    for name, value in affix_keys(layout).items():
        if value:
            keys.append(Key(name, value, "Measured: without it, image and mask have one name."))
    if layout.nested:
        keys.append(Key("nested", True, "Measured: tiles lie in folders below."))
    lists = [
        Key(name, path)
        for name, path in (("train", layout.train_list), ("val", layout.val_list))
        if path and name in paths
    ]
    if lists:
        keys.append(Key("split", lists, f"{source}: the lists of its tiles."))
    if given.colours:
        entries = [Key(name, rgb) for name, rgb in given.colours.items()]
        keys.append(Key("colours", entries, "Given: the colour of each class in the masks; ignore is no label."))
    return keys


def _name_text(name: str, value: str) -> str:
    return f"the root itself holds the {name}" if value == "." else f"what names the folder of {name} in each root"


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
    roots: Sequence[Root], bands: tuple[int, ...] | None, wanted: Wanted | None, notes: list[str], problems: list[str]
) -> list[Key]:
    counts = sum((root.bands for root in roots), Counter())
    dtypes = sum((root.dtypes for root in roots), Counter())
    if len(counts) > 1:
        notes.append(f"images differ in their number of bands: {_counts_text(counts)}")
    if len(dtypes) > 1:
        notes.append(f"images differ in their type: {_counts_text(dtypes)}")
    count = wanted.count if wanted else COLOURS
    number = "three" if count == COLOURS else str(count)
    if bands is None and min(counts) < count <= max(counts):
        problems.append(
            f"images have {_counts_text(counts)} bands: a run reads the same {number} from all of them, so move those with fewer (such as "
            f"{_with_fewer(roots, count)}) to a folder of their own and leave it out, or convert them"
        )
    elif bands is None and count > max(max(counts), COLOURS):
        problems.append(
            f"the teacher sees {count_text(count, 'bands')}, and images have {_counts_text(counts)}: give it images with the bands that "
            "it was "
            "trained on"
        )
    ranges = _ranges_text(roots)
    alpha = _alpha(roots, notes)
    if bands is not None:
        keys = _given_bands(bands, counts, wanted)
    elif wanted is None or wanted == Wanted():
        keys = _bands(roots, ranges, is_opacity=not alpha)
    else:
        keys = _bands_of_teacher(roots, wanted, ranges)
    keys += [*_band_names(roots, keys), *alpha]
    if dtypes.keys() - {"uint8"}:
        why = (f"Measured: images hold {_counts_text(dtypes)}, and networks see 0..255. Guess: these percentiles, over all training "
               f"images, become 0 and 255. range: [low, high] fixes them instead.{ranges}")  # fmt: skip
        keys.append(Key("stretch", {"percentiles": list(PERCENTILES)}, why))
    return keys


def _given_bands(bands: tuple[int, ...], counts: Counter[Any], wanted: Wanted | None) -> list[Key]:
    """The key `bands` from `--bands`."""
    if max(bands) > min(counts):
        raise ConfigError(f"--bands is {list(bands)}, but images have {_counts_text(counts)} bands")
    if wanted is not None and len(bands) != wanted.count:
        raise ConfigError(
            f"--bands is {list(bands)}, but the teacher sees {count_text(wanted.count, 'bands')}: name as many, in its order"
        )
    seen = (
        "the bands of red, green and blue"
        if len(bands) == COLOURS
        else "the bands that the networks see, in their order"
    )
    return [Key("bands", list(bands), f"Given: {seen}, counted from 1.")]


def _bands_of_teacher(roots: Sequence[Root], wanted: Wanted, ranges: str) -> list[Key]:
    """The key `bands` for a teacher that sees other bands than red, green and blue."""
    counts = sum((root.bands for root in roots), Counter())
    count, own = wanted.count, wanted.numbers
    if own is not None and max(own) <= min(counts):
        return [Key("bands", list(own), OWN_RUN)]
    if min(counts) == max(counts) == count:
        seen = count_text(count, "bands")
        why = f"Guess: the teacher sees {seen} and the images have as many. No file says whether it sees them in this order."
        return [Key("bands", list(range(1, count + 1)), why)]
    why = (f"Asked: the {count} bands that the teacher sees, in its order, counted from 1, such as {list(range(count, 0, -1))}. The images "
           f"have {_counts_text(counts)}.")  # fmt: skip
    return [Key("bands", FILL_IN, why + ranges)]


def _band_names(roots: Sequence[Root], keys: Sequence[Key]) -> list[Key]:
    """The key `band_names`, where more is read than the three bands that the files call red, green and blue."""
    rgb: Counter[Any] = sum((root.rgb for root in roots), Counter())
    read = keys[0].value if keys else FILL_IN
    if len(rgb) != 1 or (named := next(iter(rgb))) is None or read == FILL_IN or not set(named) < set(read):
        return []
    why = "Measured: what the files call them; pictures show these. Name further ones too, such as nir: 4, to choose bands by."
    return [Key("band_names", dict(zip(("red", "green", "blue"), named, strict=True)), why)]


def _with_fewer(roots: Sequence[Root], count: int) -> str:
    """The first image with fewer bands than `count`."""
    seen = (headers for root in roots for headers in root.seen)
    return next(str(h.tile.image) for h in seen if h.image is not None and h.image.bands < count)


def _bands(roots: Sequence[Root], ranges: str, *, is_opacity: bool) -> list[Key]:
    """The key `bands` for red, green and blue, unless its default is right."""
    counts = sum((root.bands for root in roots), Counter())
    rgb: Counter[Any] = sum((root.rgb for root in roots), Counter())
    least, most = min(counts), max(counts)
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
    images = count_text(sampled.images_read, "images")
    return f" In {images} of {sampled.path}, the percentiles {low:g} and {high:g} of each band are {bands}."


def _counts_text(counts: Counter[Any]) -> str:
    """`uint16`, or `3 (20 images), 4 (1 image)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{key} ({count_text(n, 'images')})" for key, n in sorted(counts.items()))
