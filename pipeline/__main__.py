"""`python -m kdpipe.pipeline` is `kdpipe`."""

from kdpipe.pipeline.commands.main import main

main()
