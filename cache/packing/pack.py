"""
Writing a finished cache as one zip file, or several (see `storage.zip_format`).

A killed run goes on: what its partial file holds is compared with the cache's digests, and what does not fit is written anew.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kdpipe.cache import tile
from kdpipe.cache.documents import read_manifest
from kdpipe.cache.index.columns import TileIndex
from kdpipe.cache.index.records import TileRecord, canonical
from kdpipe.cache.manifest import MANIFEST_NAME, Manifest, dump_manifest, manifest_files, manifest_of, refuse_to_write
from kdpipe.cache.reader import read_intact
from kdpipe.cache.storage import zip_format
from kdpipe.cache.storage.ahead import in_order
from kdpipe.cache.storage.base import Storage, open_storage
from kdpipe.configs.errors import CacheLocked, ConfigError, CorruptCache
from kdpipe.configs.files import partial_path, publish
from kdpipe.configs.os_errors import explained
from kdpipe.configs.outputs import output_path

SUFFIX = ".zarr.zip"
READ_THREADS = 8  # the answers of an object store take time; a disk's are hashed
MOST_BYTES = 1 << 28  # of tiles that are read ahead


Bar = Callable[[int], AbstractContextManager[Callable[[], object]]]


def no_bar(total: int) -> AbstractContextManager[Callable[[], object]]:
    """Shows nothing."""
    return nullcontext(lambda: None)


@dataclass
class Packed:
    """What `pack` wrote: the files in order, how many tiles are in each, their bytes, and how many of these an earlier run had left."""

    files: list[str] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    size_bytes: int = 0
    kept_bytes: int = 0


def pack(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    most_bytes: int | None = None,
    overwrite: bool = False,
    bar: Bar = no_bar,
) -> Packed:
    """
    Write the finished cache at a folder or URL as one uncompressed zip file, which any Zarr reader opens (`zarr.storage.ZipStore`).

    Each file's digest is compared with the manifest's before it is written. The bytes depend on the cache alone. With `most_bytes`, files
    `NAME-0001.zarr.zip`, … of at most so many bytes are written, or of one tile where that is larger; each is a cache of some of the
    tiles (see `Manifest.partial_of`), and `unpack` joins them. They appear under their names once all are whole. `bar` is called with the
    number of tiles, for a context whose value is called after each.

    Raises `ConfigError` for an `out` that exists already, unless `overwrite`, or has another suffix; `IncompleteCache` or `CorruptCache`
    where the cache is unfinished or damaged; `KdpipeError` where the disk is full. The same command goes on.
    """
    storage, file = open_storage(os.fspath(path)), _place_of(out)
    manifest = read_manifest(storage)
    refuse_to_write(manifest.format_version, f"{storage.url}/{MANIFEST_NAME}")
    if most_bytes is not None and manifest.partial_of is not None:
        raise ConfigError(f"{storage.url} holds a part of its tiles already: pack it without --size")
    _refuse_existing(file, overwrite=overwrite)
    found, partials, left = Packed(), dict[Path, Path](), list(manifest.tiles)
    with bar(len(left)) as on_tile:
        while left or not found.files:
            place = file if most_bytes is None else _numbered(file, len(found.files) + 1)
            partials[place] = partial_path(place)
            with explained("writing", place), _Writer(partials[place]) as writer:
                taken = _write_part(writer, storage, manifest, left, most_bytes, on_tile)
            found.files.append(str(place))
            found.tiles.append(taken)
            found.size_bytes += partials[place].stat().st_size
            found.kept_bytes += writer.kept_bytes
            left = left[taken:]
    for place, partial in partials.items():
        publish(partial, place)
    if most_bytes is not None:
        _remove_further_parts(file, len(found.files))
    return found


def members_of(manifest: Manifest) -> Iterator[tuple[str, str | None]]:
    """The names of a pack's members in order, without the table's, and the digests of their contents; None for the manifest's."""
    for record in manifest.tiles:
        yield f"{tile.tile_path(record.id)}/{tile.SHARD_NAME}", record.shard_sha256
        yield f"{tile.tile_path(record.id)}/{tile.METADATA_NAME}", record.metadata_sha256
    for group, digest in sorted(manifest.group_digests().items()):
        yield f"{group}/{tile.METADATA_NAME}".lstrip("/"), digest
    yield from sorted((manifest.index or {}).items())
    yield MANIFEST_NAME, None


def _place_of(out: str | os.PathLike[str]) -> Path:
    file = output_path(os.fspath(out), "OUT")
    if not file.name.endswith(SUFFIX) or file.name == SUFFIX:
        raise ConfigError(f"a pack is named NAME{SUFFIX}, by which kdpipe and Zarr readers know it; found {file.name}")
    return file


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name.removesuffix(SUFFIX)}-{number:04d}{SUFFIX}")


def _refuse_existing(file: Path, *, overwrite: bool) -> None:
    for found in (file, _numbered(file, 1)):
        if found.is_dir() or (found.exists() and not overwrite):
            raise ConfigError(f"{found} exists already: choose another OUT, or add --overwrite to replace it")


def _remove_further_parts(file: Path, count: int) -> None:
    """Delete the parts of an earlier pack that had more, finished or not: they would be taken for parts of this one."""
    for number in itertools.count(count + 1):
        place = _numbered(file, number)
        found = [path for path in (place, partial_path(place)) if path.exists()]
        if not found:
            return
        for path in found:
            path.unlink()


class _Writer:
    """A partial file, kept for as long as it holds what is to be written."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self._names: list[str] = []
        self._sizes, self._offsets, self._checksums = array("Q"), array("Q"), array("I")
        self._is_kept = True
        self.position = 0
        self.kept_bytes = 0

    def __enter__(self) -> _Writer:
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            self._file.close()
            raise CacheLocked(f"another process is writing {self._partial}: wait for it, or stop it") from err
        except OSError:  # a file system without locks
            pass
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._file.close()

    def has(self, name: str, digest: str) -> bool:
        """Whether the file holds the next member already; it is then passed over, else what follows is dropped."""
        if self._is_kept:
            self._file.seek(self.position)
            found = zip_format.read_header(self._file.read(zip_format.header_bytes(name, zip_format.LIMIT_32)), name)
            if found is not None:
                self._file.seek(self.position + zip_format.header_bytes(name, found[0]))
                content = self._file.read(found[0])
                if zlib.crc32(content) == found[1] and tile.sha256(content) == digest:
                    self._add(name, len(content), found[1])
                    self.kept_bytes = self.position
                    return True
            self.cut(len(self._names))
        return False

    def put(self, name: str, content: bytes) -> None:
        """Write the next member."""
        self.cut(len(self._names))
        crc32 = zlib.crc32(content)
        self._file.write(zip_format.header(name, len(content), crc32))
        self._file.write(content)
        self._add(name, len(content), crc32)

    def cut(self, members: int) -> None:
        """Drop all but the first members, and what an earlier run left behind them."""
        if self._is_kept or members < len(self._names):
            self._is_kept = False
            if members < len(self._names):
                self.position = self._offsets[members]
                self.kept_bytes = min(self.kept_bytes, self.position)
                for column in (self._names, self._sizes, self._offsets, self._checksums):
                    del column[members:]
            self._file.seek(self.position)
            self._file.truncate()

    def finish(self) -> None:
        """Write what follows the last member."""
        sizes, offsets = np.array(self._sizes, np.uint64), np.array(self._offsets, np.uint64)
        for piece in zip_format.tail(self._names, sizes, self._checksums, offsets, self.position):
            self._file.write(piece)
        self._file.flush()

    @property
    def members(self) -> int:
        return len(self._names)

    def _add(self, name: str, size: int, crc32: int) -> None:
        self._names.append(name)
        self._sizes.append(size)
        self._offsets.append(self.position)
        self._checksums.append(crc32)
        self.position += zip_format.header_bytes(name, size) + size


def _write_part(
    writer: _Writer, storage: Storage, manifest: Manifest, tiles: Sequence[TileRecord], most_bytes: int | None,
    on_tile: Callable[[], object],
) -> int:  # fmt: skip
    """Write as many of `tiles` as fit, and what describes them; returns how many."""
    taken, rest = 0, _Rest(manifest)
    ahead: Iterator[tuple[bytes, bytes]] | None = None
    for record in tiles:
        before, path = writer.members, tile.tile_path(record.id)
        shard, metadata = f"{path}/{tile.SHARD_NAME}", f"{path}/{tile.METADATA_NAME}"
        is_kept = ahead is None and writer.has(shard, record.shard_sha256)
        if not (is_kept and writer.has(metadata, record.metadata_sha256)):
            writer.cut(before)
            ahead = ahead or _read_ahead(storage, tiles[taken:])
            for name, content in zip((shard, metadata), next(ahead), strict=True):
                writer.put(name, content)
        if most_bytes is not None and writer.position + rest.with_tile(record) > most_bytes and taken:
            writer.cut(before)
            break
        taken += 1
        on_tile()
    if ahead is not None:
        ahead.close()  # type: ignore[attr-defined]
    described = _part_of(manifest, tiles[:taken])
    for group, digest in sorted(described.group_digests().items()):
        name = f"{group}/{tile.METADATA_NAME}".lstrip("/")
        content = storage.read(name)
        if tile.sha256(content) != digest:
            raise CorruptCache(f"{storage.url}/{name} is not what was written; {storage.repair}")
        writer.put(name, content)
    for name, content in sorted(manifest_files(described), key=lambda file: (file[0] == MANIFEST_NAME, file[0])):
        writer.put(name, content)
    writer.finish()
    return taken


def _part_of(manifest: Manifest, tiles: Sequence[TileRecord]) -> Manifest:
    """The manifest of a cache of some of the tiles, or of all."""
    if len(tiles) == len(manifest.tiles):
        return manifest
    digests = manifest.group_digests()
    groups = {path: digests[path] for path in tile.group_paths(record.id for record in tiles)}
    return manifest_of(
        manifest.recipe, tiles, groups, device=manifest.device, libraries=manifest.libraries, partial_of=len(manifest.tiles)
    )  # fmt: skip


class _Rest:
    """No fewer bytes than what follows the tiles of a part: groups, manifest, table, directory and end."""

    def __init__(self, manifest: Manifest) -> None:
        self._groups: set[str] = set()
        self._of_a_group = len(tile.group_metadata("tiles", manifest.recipe))
        self._bytes = len(dump_manifest(manifest.model_copy(update={"tiles": TileIndex.of([]), "groups": {}})))
        self._bytes += len(tile.group_metadata("", manifest.recipe)) + zip_format.MOST_END_BYTES

    def with_tile(self, record: TileRecord) -> int:
        """The bytes with one more tile."""
        path = tile.tile_path(record.id)
        self._bytes += len(canonical(record.as_dict())) + 100 + 2 * self._of_a_member(f"{path}/{tile.METADATA_NAME}")
        for group in tile.group_paths([record.id]):
            if group not in self._groups:
                self._groups.add(group)
                name = f"{group}/{tile.METADATA_NAME}"
                self._bytes += self._of_a_group + 100 + len(canonical(group)) + len(name) + 2 * self._of_a_member(name)
        return self._bytes

    @staticmethod
    def _of_a_member(name: str) -> int:
        longest = zip_format.Member(name, zip_format.LIMIT_32, 0, zip_format.LIMIT_32)
        return len(zip_format.entry(longest)) + zip_format.ROW.itemsize


def damaged(storage: Storage, record: TileRecord, err: ValueError) -> CorruptCache:
    """The error for a tile of a cache, or of a pack, that is not what was written."""
    return CorruptCache(f"tile {record.id} of {storage.url} is damaged: {err}; {storage.repair}")


def _read_ahead(storage: Storage, tiles: Sequence[TileRecord]) -> Iterator[tuple[bytes, bytes]]:
    """The shard and metadata of each tile in turn, with others being read meanwhile; `CorruptCache` for a damaged one."""

    def read(record: TileRecord) -> tuple[bytes, bytes]:
        try:
            return read_intact(storage, record, tile.SHARD_NAME), read_intact(storage, record, tile.METADATA_NAME)
        except ValueError as err:
            raise damaged(storage, record, err) from err

    threads = max(READ_THREADS, storage.at_once)
    return in_order(read, tiles, threads, weigh=lambda record: record.shard_bytes, most=MOST_BYTES)
