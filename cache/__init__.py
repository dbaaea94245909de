"""The cache of soft targets: a Zarr v3 group that says how its numbers were made and notices when they change."""
