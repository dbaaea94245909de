"""Networks that kdpipe did not write: a module of the user's own, a transformers folder, an exported file."""
