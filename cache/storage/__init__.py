"""Storage of a cache's files, local or remote, and the lock of its writer."""
