"""A run knows the tiles that it was trained on, and a resumed one says what has become of them."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.doubles import Lines
from PIL import Image

from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")
RUN = Path("model_weights/tests/tiny")


@pytest.fixture
def own(landscape, tmp_path):
    """A copy of the landscape that a test may change, with its training tiles' ids in order."""
    folder = shutil.copytree(landscape, tmp_path / "data")
    return folder, sorted(path.stem for path in (folder / "Train/images").iterdir())


def warnings_of(config, **options):
    lines = Lines()
    train(config, CPU, progress=lines, **options)
    return [line for line in lines.said if line.startswith("warning: since this run")]


def inverted(path):
    """Another image or mask of the same size in pixels, and of another size in bytes."""
    with Image.open(path) as image:
        pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    pixels.save(path, compress_level=0)


def test_a_resumed_run_names_what_was_added_removed_and_changed(own, make_config, small_student):
    folder, names = own
    data = {"data__train": [str(folder / "Train")], "data__val": [str(folder / "Val")], "distill__mode": "none"}
    assert warnings_of(make_config(**data, train__epochs=1)) == []
    images, masks = folder / "Train/images", folder / "Train/masks"
    assert len(names) == 6
    first, second, third, fourth, *_ = names
    for where in (images, masks):
        shutil.copy(where / f"{first}.png", where / "new.png")
        (where / f"{first}.png").unlink()
    inverted(images / f"{second}.png")
    inverted(masks / f"{third}.png")
    os.utime(masks / f"{fourth}.png", (0, 0))
    (seen,) = (folder / "Val/masks").glob("*1.png")
    inverted(seen)
    assert warnings_of(make_config(**data, train__epochs=2), resume=True) == [
        "warning: since this run began, its training tiles have changed: 1 added (Train/new), "
        f"1 removed (Train/{first}), 1 with another image (Train/{second}), 1 with another mask (Train/{third}), "
        f"1 with files of another time and the same size, as copies have (Train/{fourth}). The run goes on with the tiles as they are "
        "now, and does not reach the weights of an uninterrupted one unless their content is the same",
        f"warning: since this run began, its validation tiles have changed: 1 with another mask (Val/{seen.stem}). Scores before and "
        "after cannot be compared unless their content is the same",
    ]
    assert warnings_of(make_config(**data, train__epochs=3), resume=True) == [], "said once"


def test_a_cache_knows_the_images_and_a_mask_may_change_beside_it(own, make_config, cached, small_student):
    """Images that were copied, and so are as old as the copy, are those of the cache; that is certain and not said."""
    folder, names = own
    data = {"data__train": [str(folder / "Train")], "data__val": [str(folder / "Val")]}
    assert warnings_of(make_config(**data, train__epochs=1)) == []
    for path in (folder / "Train/images").iterdir():
        os.utime(path)
    assert warnings_of(make_config(**data), resume=True) == []
    inverted(folder / f"Train/masks/{names[1]}.png")
    (line,) = warnings_of(make_config(**data, train__epochs=3), resume=True)
    assert f"its training tiles have changed: 1 with another mask (Train/{names[1]})." in line


@pytest.mark.long
def test_the_list_of_tiles_is_lines_of_json_and_its_damage_is_said(cached, make_config, landscape, small_student):
    train(cached, CPU)
    tiles = [json.loads(line) for line in gzip.decompress((RUN / "tiles.jsonl.gz").read_bytes()).splitlines()]
    assert [split for split, *_ in tiles] == ["train"] * 6 + ["val"] * 2
    for split, tile, image_bytes, _, mask_bytes, _ in tiles:
        root, stem = tile.split("/")
        assert (split == "val") == (root == "Val")
        assert image_bytes == (landscape / root / "images" / f"{stem}.png").stat().st_size
        mask = landscape / root / "masks" / f"{stem}.png"
        assert mask_bytes == (mask.stat().st_size if mask.exists() else None)
    for damage in (b"", b"not gzip", (RUN / "tiles.jsonl.gz").read_bytes()[:-20], gzip.compress(b'["train", 1]\n')):
        (RUN / "tiles.jsonl.gz").write_bytes(damage)
        lines = Lines()
        train(cached, CPU, resume=True, progress=lines)
        assert [line for line in lines.said if "tiles.jsonl.gz is damaged, so it is not known whether" in line]
    (RUN / "tiles.jsonl.gz").unlink()  # as in a run of an earlier version
    assert warnings_of(make_config(train__epochs=3), resume=True) == []
