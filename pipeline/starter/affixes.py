"""What surrounds the names of tiles in the stems of images and masks: `_sat` and `_mask`, or `img_` and `mask_`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kdpipe.configs.schema.affixes import NO_AFFIXES, Affixes

SEPARATORS = "_-. "
SHARED_PART = 0.9  # of the masks that affixes must pair with an image, and of the lines of a list that must name tiles

_WORD = r"(?:^|[^a-z]){}(?:$|[^a-z])"
MASK_NAME = re.compile(
    "|".join(["mask", "label", "annot", "truth", "target", "segmentation", "lbl", "gt(?:fine|coarse)",
              *(_WORD.format(word) for word in ("gts?", "ann?o?", "anns", "seg", "lab", "l"))]),
    re.IGNORECASE,
)  # fmt: skip
IMAGE_NAME = re.compile(r"ima?ge?|rgb|jpeg|sat", re.IGNORECASE)
# Of several kinds of masks of one image, the first that is there; those for viewers are the last.
KINDS = (re.compile("trainid", re.I), re.compile("labelid", re.I), MASK_NAME, re.compile("$"))
FOR_VIEWERS = re.compile("colou?r|rgb|instance|vis|overlay|preview", re.IGNORECASE)

Pairing = tuple[Affixes, Affixes]


def affixes_of(images: Sequence[str], masks: Sequence[str]) -> Pairing:
    """
    The affixes without which the stems of images and of masks are the same; empty ones if they are already, or if there are none.

    Ends are looked for first, then beginnings, which must tell images from masks by their words: `paris_1` is no image of `rome_1`. Of
    several kinds of masks, labels are taken rather than colours and instances.
    """
    if not images or not masks or set(images) & set(masks):
        return NO_AFFIXES, NO_AFFIXES
    found = next(_ends(images, masks), None)
    if found is not None:
        return Affixes(suffix=found[0]), Affixes(suffix=found[1])
    turned = _ends([_within(stem)[::-1] for stem in images], [_within(stem)[::-1] for stem in masks], turned=True)
    for image_end, mask_end in turned:
        image_start, mask_start = image_end[::-1], mask_end[::-1]
        if MASK_NAME.search(mask_start) or IMAGE_NAME.search(image_start):
            return Affixes(prefix=image_start), Affixes(prefix=mask_start)
    return NO_AFFIXES, NO_AFFIXES


def is_of_masks(stem: str) -> bool:
    """Whether the first or the last word of a stem says that the file is a mask."""
    stem = _within(stem)
    start = max(stem.rfind(separator) for separator in SEPARATORS)
    first = re.match(rf"[^\W\d_]+(?=[\d{re.escape(SEPARATORS)}])", stem)
    return (start > 0 and MASK_NAME.search(stem[start:]) is not None) or (
        first is not None and MASK_NAME.search(first[0]) is not None
    )


def _within(stem: str) -> str:
    """The name of a file without the folders before it."""
    return stem.rpartition("/")[2]


def _ends(images: Sequence[str], masks: Sequence[str], *, turned: bool = False) -> Iterator[tuple[str, str]]:
    """
    Ends of images and of masks that pair `SHARED_PART` of the masks of that end with an image, the best first.

    They are found on an image and the masks whose names begin as its own does. Names that are `turned` are read from behind.
    """
    known = set(images)
    for mask in sorted(masks)[:3]:
        image = max(sorted(images), key=lambda stem: shared(stem, mask))
        for start in _starts_of_ends(image, mask):
            base, image_end = image[:start], image[start:]
            ends = {stem[start:] for stem in masks if stem.startswith(base) and _is_end(stem, start)}
            for end in sorted(ends, key=lambda end: _preference(end[::-1] if turned else end)):
                of_kind = [stem.removesuffix(end) + image_end for stem in masks if stem.endswith(end)]
                if sum(stem in known for stem in of_kind) >= SHARED_PART * len(of_kind):
                    yield image_end, end


def _starts_of_ends(image: str, mask: str) -> Iterator[int]:
    """Where the ends of the two may begin, the last place first: `1` of `1_sat` and `1_seg`, which have `1_s` in common."""
    start = longest = shared(image, mask)
    while start and image[start - 1] in SEPARATORS:
        start -= 1
    if start:
        yield start
    for earlier in range(min(start, longest) - 1, 0, -1):
        if _is_end(image, earlier) and _is_end(mask, earlier):
            yield earlier


def _is_end(stem: str, start: int) -> bool:
    """Whether a word begins at `start`, or nothing is left there: after a digit, a letter begins a word."""
    before, after = stem[start - 1 : start], stem[start : start + 1]
    return after in ("", *SEPARATORS) or (before.isdigit() and after.isalpha())


def _preference(affix: str) -> tuple[bool, int, str]:
    """The order of preference of a mask's affix."""
    return bool(FOR_VIEWERS.search(affix)), next(i for i, kind in enumerate(KINDS) if kind.search(affix)), affix


def shared(one: Sequence[str], other: Sequence[str]) -> int:
    """The number of characters that two names, or of names that two paths, have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
