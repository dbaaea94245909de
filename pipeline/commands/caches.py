"""The commands that move a cache: pack, unpack."""

from __future__ import annotations

import re
from typing import Any

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import common_options, run

UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """`50GB` as a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kMGT]B)", text.strip())
    size = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < UNITS["MB"]:
        raise click.BadParameter(f"expected a size of at least 1MB, such as 50GB, found {text!r}")
    return size


@click.command("pack")
@click.argument("cache", metavar="CACHE", shell_complete=completion.weights_or_cache)
@click.argument("out", metavar="OUT.zarr.zip")
@click.option(
    "--size",
    "most_bytes",
    metavar="SIZE",
    callback=_bytes,
    help="Write parts of at most SIZE, such as 50GB, as OUT-0001.zarr.zip and so on.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@common_options(device=False)
def pack(**options: Any) -> None:
    """
    Write a finished cache as one file.

    OUT.zarr.zip is an uncompressed zip file with the cache's own files, which zarr opens, and which cache.path may name, on a disk or
    at a URL. The same cache gives the same bytes. Each file is verified before it is written. If it is stopped, the same command goes on.

    Exit codes: 0 written, 2 usage, 3 refused (unfinished or damaged cache, full disk).
    """
    run("caches.pack_cache", **options)


@click.command("unpack")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...", shell_complete=completion.files)
@click.argument("out", metavar="CACHE", shell_complete=completion.folders)
@common_options(device=False)
def unpack(**options: Any) -> None:
    """
    Write the cache of a pack, or of all parts of one, as a folder.

    CACHE may also be a URL. Each file is verified before it is written. If it is stopped, the same command goes on.

    Exit codes: 0 written, 2 usage, 3 refused (damaged pack, another cache at CACHE, full disk).
    """
    run("caches.unpack_cache", **options)
