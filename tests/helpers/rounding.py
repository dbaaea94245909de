"""Rounding to integers of a given sum, written out."""

import numpy as np


def largest_remainder(probs, total):
    """Hamilton's method for one pixel, step by step."""
    scaled = [float(np.float32(p) * np.float32(total)) for p in probs]
    units = [int(s) for s in scaled]
    order = sorted(range(len(probs)), key=lambda i: (-(scaled[i] - units[i]), i))
    for i in order[: total - sum(units)]:
        units[i] += 1
    return units
