"""Sizes, durations and shares as text, written one way everywhere."""


def size_text(size_bytes: float) -> str:
    """A size in decimal units: `12.3 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def percent_text(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage: `12.3 %`; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"
