"""The `kdpipe` command line: the only code that knows click."""
