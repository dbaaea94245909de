"""A generated landscape: aerial tiles with labels as people draw them, to try the pipeline without a download."""

from kdpipe.data.landscape.labels import write_sample_data

__all__ = ["write_sample_data"]
