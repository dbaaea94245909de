"""Recorded views of the small configuration."""

from kdpipe.data.recorded_views import RecordedViews
from kdpipe.data.tiles import list_tiles

K = 3  # of each tile
OF_VIEWS = {"distill__teacher_view": "crop", "cache__views": K, "train__crop": 64}


def dataset(config, targets=None):
    return RecordedViews(list_tiles(config.data, "train"), config, None, targets)


def rendered(config):
    """The pixels of every view by id, read anew."""
    return {view.id: view.pixels() for view in dataset(config).all_views()}
