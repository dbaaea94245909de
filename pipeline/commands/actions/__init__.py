"""The work of each command, once its options and config are checked. Imports torch, and only when called (see `options.run`)."""
