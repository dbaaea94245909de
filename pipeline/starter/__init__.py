"""The first config that `kdpipe init` writes."""
