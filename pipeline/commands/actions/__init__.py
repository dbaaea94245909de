"""What the commands do once their options and config are accepted; imports torch and the rest, as `options.run` explains."""
