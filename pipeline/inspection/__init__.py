"""The contents of a checkpoint or a cache."""
