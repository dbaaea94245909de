"""Stage one on a dask cluster."""
