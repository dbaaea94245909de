"""Where the files of a cache lie, and who may write them."""
