"""`python -m kdpipe.pipeline` is `kdpipe`."""

from kdpipe.pipeline.cli import main

main()
