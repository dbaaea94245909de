"""What the user hears of scenes that are unlike the images that a student was trained on."""

from __future__ import annotations

from collections.abc import Mapping

from kdpipe.data.rasters import Stretch
from kdpipe.data.scenes import Seen
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.text import percent_text

NEARLY_ALL = 0.99  # water and snow are dark or bright too, but hardly the whole of a scene in every band


def range_note(seen: Seen, stretch: Stretch) -> str | None:
    """A warning for a scene whose values nearly all became an image's darkest or brightest tenth; None for any other."""
    for count, end in ((seen.dark, "darkest"), (seen.bright, "brightest")):
        if seen.values and count >= NEARLY_ALL * seen.values:
            return (
                f"{percent_text(count / seen.values)} of its values are in the {end} tenth of what the student was trained on: it holds "
                f"{seen.dtype} values of {seen.low:g} to {seen.high:g}, and the student's stretch is {_stretch_text(stretch)}. Convert the "
                "scene to the units of the training images, unless it is that dark or bright"
            )
    return None


def say_notes(notes: Mapping[str, str], kind: str, progress: Progress) -> None:
    """Say the first of the notes by scene, and how many more there are of their kind, such as `note`."""
    for scene, text in list(notes.items())[:1]:
        more = f" ({len(notes)} scenes have a {kind} like this, see --json)" if len(notes) > 1 else ""
        progress.say(f"{kind}: {scene}: {text}{more}")


def _stretch_text(stretch: Stretch) -> str:
    if stretch is None:
        return "0 to 255, 8-bit values as they are"
    pairs = [f"{low:g} to {high:g}" for low, high in stretch]
    return pairs[0] if len(set(pairs)) == 1 else ", ".join(pairs)
