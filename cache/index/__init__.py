"""The tiles of a cache in columns, in memory and as the Zarr arrays that a cache of many tiles has."""
