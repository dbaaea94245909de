"""Which stored prediction belongs to which tile, by the names of files. Nothing is opened but folders, of which each is listed once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdpipe.configs.errors import DataError, count_text, summarise
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import image_size
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.teacher.predictions.arrays import ARRAYS, same_name
from kdpipe.pipeline.teacher.predictions.cut import CUT_FROM, covers
from kdpipe.pipeline.teacher.predictions.prediction import Prediction, names_of

SUFFIXES = (*ARRAYS, ".tif", ".tiff", ".png")  # of a file for one tile
THREADS = 16  # that read headers: on a network's file system they mostly wait


class PredictionFiles:
    """The files of `teacher.predictions`: those in its folders, by name, and the large rasters."""

    def __init__(self, config: Config) -> None:
        ((self._key, member),) = config.members.items()
        assert member.are is not None
        self._are, self._classes = member.are, tuple(member.classes)
        self._ignore_index = config.classes.ignore_index
        self._places = [Path(place) for place in member.places]
        self._rasters = tuple(place.absolute() for place in self._places if place.is_file())
        for raster in self._rasters:
            if raster.suffix.lower() not in CUT_FROM:
                raise DataError(
                    f"{self._key}.predictions: {raster} is one file, and tiles are cut from georeferenced rasters ({', '.join(CUT_FROM)}): "
                    "name the folder that holds a file for each tile"
                )
        self._by_name: dict[str, list[Path]] = {}
        for folder in self._places:
            for name, path in files_in(folder) if folder.is_dir() else ():
                self._by_name.setdefault(name, []).append(path)

    def of(self, tiles: Iterable[Tile]) -> Iterator[Prediction]:
        """
        The prediction of each tile, without files where there is none.

        Raises `DataError` where two files are named after one tile, or one file after two tiles.
        """
        owners: dict[Path, str] = {}
        for tile in tiles:
            own = self._own(tile)
            if own is not None and owners.setdefault(own, tile.id) != tile.id:
                raise DataError(
                    f"{own} may be the prediction of {owners[own]} or of {tile.id}: name it by the tile's id, as {tile.id}{own.suffix} in "
                    "its folder"
                )
            stored = self._rasters if own is None else (own,)
            yield Prediction(self._key, tile.image, stored, own is None, self._are, self._classes, self._ignore_index)

    def require(self, predictions: Iterable[tuple[str, Prediction]]) -> None:
        """
        Raise `DataError` unless each of the predictions, by the id of its tile, is there; of large rasters, headers are compared.

        The first one is read. An image that cannot be read is left to stage one, which names it and computes the others.
        """
        listed = list(predictions)
        for place in self._places if listed else ():
            if not place.exists():
                raise DataError(f"{self._key}.predictions: there is no file or folder {place.absolute()}")
        missing = [tile for tile, prediction in listed if not prediction.stored]
        cut = [(tile, prediction) for tile, prediction in listed if prediction.stored and prediction.is_cut]
        with ThreadPoolExecutor(THREADS) as threads:
            covered = threads.map(lambda pair: covers(pair[1].image, pair[1].stored), cut)
            missing += [tile for (tile, _), is_covered in zip(cut, covered, strict=True) if not is_covered]
        if missing:
            where = ", ".join(map(str, self._places))
            have = summarise(sorted(self._by_name), 3) or "no file of a tile"
            if self._rasters:
                expected = "the large rasters cover none of their pixels"
            else:
                expected = (
                    f"expected a file such as {missing[0].rpartition('/')[2]}.npy or {missing[0]}.tif, found {have}"
                )
            raise DataError(
                f"{self._key}.predictions ({where}) lack {len(missing)} of {count_text(len(listed), 'tiles')}: {summarise(missing)}; "
                f"{expected}. Predict "
                "these tiles too, or leave them out of the data"
            )
        for _, prediction in listed[:1]:  # what is wrong with it, such as its channels, is mostly wrong with all
            try:
                image_size(prediction.image)
            except DataError:
                continue
            prediction.logits(prediction.read())

    def _own(self, tile: Tile) -> Path | None:
        for name in names_of(same_name(tile.id)):
            found = self._by_name.get(name)
            if found and len(found) > 1:
                raise DataError(f"two files hold the prediction of {tile.id}: {found[0]} and {found[1]}; keep one")
            if found:
                return found[0]
        return None


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each file with one of `SUFFIXES` in a folder and the folders below, and its path within without the ending."""
    home = folder.absolute()
    for place, folders, names in os.walk(home):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = Path(place).relative_to(home).as_posix()
        for name in sorted(names):
            stem, ending = os.path.splitext(name)  # noqa: PTH122 - a Path for each of a million names would cost ten times as much
            if ending.lower() in SUFFIXES and not name.startswith("."):
                yield same_name(stem if within == "." else f"{within}/{stem}"), Path(f"{place}/{name}")
