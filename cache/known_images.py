"""
Which images are known to be those that their tiles were computed from, by their own sizes and times.

An image that has been compared by content is noted by its size and time of change, to the nanosecond. As long as both stay, it is not read
again; with any other time, later or earlier, it is compared once more. The age of the tile says nothing: a copied cache is younger than
every image, and a clock can go back. The notes lie in a file beside the cache, or in the user's cache folder where nothing can be written
there; without them, every image is read, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdpipe.cache.images import Source, files_of, same_content
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.beside import append_beside, beside, read_beside
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.configs.errors import DataError, KdpipeError
from kdpipe.configs.os_errors import told

SUFFIX = ".images"
MAGIC = b"kdpipe images 1\n"
STAMP_BYTES = 16
THREADS = 4  # reading and hashing release the GIL
SAID_FROM = 1000  # images to compare, which may take a minute
SPARE = 1000  # notes of earlier states that are kept, beside as many as there are tiles
JUST_WRITTEN_SECONDS = 2.0  # an image can be written twice within one tick of its file system's clock, 2 s on FAT

State = tuple[tuple[int, int], ...]
"""Size in bytes and time of change in ns of each file that an image is made from."""

logger = logging.getLogger(__name__)


class KnownImages:
    """The notes of one cache; `save` writes what has been added. Safe to use from threads."""

    def __init__(self, storage: Storage) -> None:
        self._url = storage.url
        self._places = _places(storage)
        self._known: set[bytes] = set()
        self._added: list[bytes] = []
        for place in self._places:
            with contextlib.suppress(KdpipeError):  # of another program, or unreadable: the images are read instead
                notes = read_beside(place, MAGIC)
                self._known.update(notes[at : at + STAMP_BYTES] for at in range(0, len(notes), STAMP_BYTES))

    def unchanged(self, pairs: Iterable[tuple[Source, TileRecord]]) -> set[str]:
        """The ids of the tiles whose image is the one in their record; images that are not known are read, and noted."""
        same, unknown, current = set(), [], set()
        for source, record in pairs:
            state = state_of(source)
            if state is None or (isinstance(source, Path) and state[0][0] != record.image.size_bytes):
                continue
            stamp = _stamp(record, state)
            if stamp in self._known:
                same.add(record.id)
                current.add(stamp)
            else:
                unknown.append((source, record))
        if len(unknown) >= SAID_FROM:
            logger.warning(
                "note: %d images of %s are compared by content, once, as their times were not seen before",
                len(unknown),
                self._url,
            )
        with ThreadPoolExecutor(THREADS) as threads:
            found = threads.map(lambda pair: self.compare(*pair), unknown)
            same.update(record.id for (_, record), is_same in zip(unknown, found, strict=True) if is_same)
        self._save(b"".join(current), STAMP_BYTES * (2 * (len(current) + len(unknown)) + SPARE))
        return same

    def compare(self, source: Source, record: TileRecord) -> bool:
        """Whether an image has the content in the record, read now, and noted if so."""
        at, state = time.time(), state_of(source)
        if state is None or not same_content(source, record):
            return False
        self._note(source, record, state, at)
        return True

    def note_computed(
        self, before: Mapping[str, tuple[float, State]], pairs: Iterable[tuple[Source, TileRecord]]
    ) -> None:
        """Note the images of tiles just computed, if they are as `states_before` saw them; then save."""
        for source, record in pairs:
            if record.id in before:
                at, state = before[record.id]
                self._note(source, record, state, at)
        self.save()

    def save(self) -> None:
        """Append what is new to the first place that takes it; a failure is ignored."""
        self._save(b"", None)

    def _save(self, current: bytes, most_bytes: int | None) -> None:
        """Save; a file that would be larger than `most_bytes` is begun anew with the `current` notes."""
        added, self._added = self._added, []
        notes = b"".join(dict.fromkeys(added))
        for place in self._places if notes else ():
            with contextlib.suppress(KdpipeError):
                append_beside(place, MAGIC, notes, current, most_bytes)
                return

    def _note(self, source: Source, record: TileRecord, state: State, at: float) -> None:
        """Note an image that was in `state` at the time `at`, unless it changed since, or may have without a sign."""
        written = max(changed for _, changed in state) / 1e9
        if abs(at - written) > JUST_WRITTEN_SECONDS and state_of(source) == state:
            stamp = _stamp(record, state)
            self._known.add(stamp)
            self._added.append(stamp)


def states_before(sources: Mapping[str, Source]) -> dict[str, tuple[float, State]]:
    """The time of looking, and the state of each image that is there, before its tile is computed."""
    at = time.time()
    return {tile: (at, state) for tile, source in sources.items() if (state := state_of(source)) is not None}


def state_of(source: Source) -> State | None:
    """The state of an image's files; None if one is missing. Raises `DataError` where the system refuses to look."""
    try:
        return tuple([(found.st_size, found.st_mtime_ns) for found in map(os.stat, files_of(source))])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        raise told(err, "looking at", kind=DataError) from err


def _stamp(record: TileRecord, state: State) -> bytes:
    """A digest of a tile's id, the content of its image, and the state of its files: 128 bits, so that none is like another."""
    text = f"{record.id}\0{record.image.sha256}\0{state}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=STAMP_BYTES).digest()


def _places(storage: Storage) -> Sequence[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  `~` stays where there is no home
    own = Path(home) / "kdpipe" / (hashlib.sha256(storage.url.encode()).hexdigest()[:32] + SUFFIX)
    return [beside(storage.folder, SUFFIX), own] if isinstance(storage, LocalStorage) else [own]
