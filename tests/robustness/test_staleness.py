"""The fingerprint covers whatever determines the values, and nothing else; a change is named, and what does not matter is accepted."""

import os
import shutil
import types
from functools import cache
from pathlib import Path
from typing import Union, get_args, get_origin

import numpy as np
import pytest
import torch
from helpers.config_changes import CHANGES, FREE_WITH_LOGITS, NETWORKS, NOT_WITH_VIEWS, WITH_VIEWS
from helpers.doubles import Lines
from PIL import Image
from pydantic import BaseModel

from kdpipe.cache import IncompleteCache, SoftTargetCache, StaleCache
from kdpipe.cache.index.columns import TileIndex
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.manifest import fingerprint
from kdpipe.configs import Config, parse_config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline import versions
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.precompute.subjects import subjects
from kdpipe.pipeline.teacher import sources
from kdpipe.pipeline.teacher.given import handed
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def leaves(model, prefix=""):
    """Every dotted key that holds a value; both forms of a key that takes a value or a section."""
    for name, field in model.model_fields.items():
        kinds = members(field.annotation)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sections:
            yield from leaves(section, f"{prefix}{name}.")
        if not sections or set(kinds) - {*sections, type(None)}:
            yield prefix + name


def members(annotation):
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in members(part)]
    if get_origin(annotation) is list and issubclass_of_model(get_args(annotation)[0]):
        return [get_args(annotation)[0]]
    return [annotation]


def issubclass_of_model(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_every_key_of_the_configuration_has_its_side():
    keys = {key for key in leaves(Config) if not key.startswith("teachers.")} - {"teacher.weight"} | {
        "teachers.1.weight"
    }
    assert keys == set(CHANGES)


@pytest.fixture(scope="module")
def data(landscape, teacher_file, tmp_path_factory):
    """Two tiles of the landscape, a second folder of images in which one differs, a second one of masks, and a second teacher."""
    folder = tmp_path_factory.mktemp("stale") / "data"
    shutil.copytree(landscape, folder)
    for kind in ("images", "masks"):
        for path in sorted((folder / "Train" / kind).iterdir())[2:]:  # two tiles tell as much as six
            path.unlink()
    for root in ("Train", "Val"):
        shutil.copytree(folder / root / "images", folder / root / "edited")
        shutil.copytree(folder / root / "masks", folder / root / "edited masks")
    image = sorted((folder / "Train/edited").iterdir())[0]
    pixels = np.asarray(Image.open(image)).copy()
    pixels ^= 1
    Image.fromarray(pixels).save(image)
    shutil.copy(teacher_file, folder / "same.pth")
    (folder / "other.pth").write_bytes(b"other weights")
    (folder / "one.txt").write_text("train_000\n")
    (folder / "other.pt2").write_bytes(b"another network")
    (folder / "predictions").mkdir()
    for image in (folder / "Train/images").iterdir():  # as probabilities or as logits
        np.save(
            folder / f"predictions/{image.stem}.npy",
            np.full((8, *np.asarray(Image.open(image)).shape[:2]), 1 / 8, np.float32),
        )
    (folder / "pretrained").mkdir()
    (folder / "pretrained/config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def hash_each_checkpoint_once(monkeypatch):
    """Some 80 configs share the same 26 MB of weights."""
    monkeypatch.setattr(sources, "file_sha256", cache(sources.file_sha256))


@pytest.fixture
def raw(make_config, data):
    return make_config(
        data__train=[str(data / "Train")], data__val=[str(data / "Val")], data__allow_missing_masks=True
    ).model_dump(mode="json")


def changed(raw, key, value, data, are="probabilities"):
    """The config with another value for a dotted key; `{data}` stands for the folder of the data."""

    def place(value):
        if isinstance(value, list):
            return [place(item) for item in value]
        return value.format(data=data) if isinstance(value, str) else value

    raw = parse_config(raw, "test").model_dump(mode="json")  # a copy
    if key == "teachers.1.weight":
        return parse_config(
            raw | {"teacher": None, "teachers": [raw["teacher"], raw["teacher"] | {"weight": value}]}, "test"
        )
    *parents, last = key.split(".")
    if key == "distill.trust_threshold":  # which counts with it alone
        raw["distill"]["trust"] = "threshold"
    if key == "class_map":
        raw["class_map"] |= value
    elif key in NETWORKS:
        raw["teacher"] = {name: kept for name, kept in raw["teacher"].items() if name not in NETWORKS[key]}
        raw["teacher"] |= {last: place(value)} | ({"are": are} if last == "predictions" else {})
    elif key in ("student.model", "student.pretrained"):
        raw["student"] = {last: place(value)}
    elif key == "teacher.are":
        return changed(raw, "teacher.predictions", "{data}/predictions", data, are=value)
    elif parents[1:] == ["normalize"]:
        raw[parents[0]]["normalize"] = value
    elif parents[1:] in (["stretch"], ["split"]):
        raw["data"][parents[1]] = {last: place(value)}
    else:
        section = raw
        for parent in parents:
            section = section[parent]
        section[last] = place(value)
    if raw["cache"]["views"] is not None and raw["distill"]["teacher_view"] == "tile":
        # Neither key of recorded views goes without the other.
        if key == "cache.views":
            raw["distill"]["teacher_view"] = "crop"
        else:
            raw["cache"]["views"] = None
    if raw["cache"]["views"] is None and raw["distill"]["teacher_view"] == "crop":
        raw["cache"]["views"] = 2
    if key.endswith(("_prefix", "_suffix")):
        raw["data"]["masks"] = "none"  # else they would have no image
    if key == "teacher.drop_channels":
        del raw["class_map"]["Tree"]
    return parse_config(raw, "test")


def digests(config):
    """The digest of the recipe, and the fingerprint."""
    tiles = list_tiles(config.data, "train")
    with handed(config, torch.nn.Identity() if config.teacher and config.teacher.given else None):
        recipe = complete_recipe(config, resolve_stretch(config.data, tiles), None)
    images = {subject.id: subject.load()[1] for subject in subjects(config, tiles, resolve_stretch(config.data, tiles))}
    records = [TileRecord(tile, 1, 1, image, 1, "0" * 64, "0" * 64) for tile, image in images.items()]
    return recipe.digest(), fingerprint(recipe, TileIndex.of(records))


@pytest.mark.parametrize(("kind", "views"), [("soft", None), ("logits", None), ("soft", 2)])
def test_each_key_changes_the_recipe_the_tiles_or_nothing(raw, data, kind, views):
    raw["cache"] |= {"kind": kind, "views": views}
    raw["distill"]["teacher_view"] = "tile" if views is None else "crop"
    before = digests(parse_config(raw, "test"))
    two = digests(changed(raw, "teachers.1.weight", 1.0, data))
    for key, (value, side) in (CHANGES if views is None else CHANGES | WITH_VIEWS).items():
        if views is not None and key in NOT_WITH_VIEWS:
            continue
        if kind == "logits" and key in FREE_WITH_LOGITS:
            side = "nothing"
        if kind == "logits" and key == "cache.kind":
            value = "soft"
        config = changed(raw, key, value, data)
        assert key.startswith("teachers") or config != parse_config(raw, "test"), f"{key} did not change"
        recipe, whole = digests(config)
        old_recipe, old_whole = two if key.startswith("teachers") else before
        assert (recipe != old_recipe) == (side == "recipe"), key
        assert (whole != old_whole) == (side != "nothing"), key


def test_the_file_of_a_checkpoint_counts_and_not_its_name(raw, data):
    assert digests(changed(raw, "teacher.checkpoint", "{data}/same.pth", data)) == digests(parse_config(raw, "test"))


def units(config, number, path):
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"path": str(path / f"{number}.zarr")})})
    precompute(config, CPU)
    cache = SoftTargetCache.open(config.cache.path)
    return {tile: cache.read_units(tile) for tile in cache.tile_ids}


@pytest.mark.long
@pytest.mark.parametrize("side", ["recipe", "nothing"])
def test_keys_of_the_recipe_change_values_and_others_do_not(raw, data, side, tmp_path):
    keys = {
        "recipe": ["data.bands", "data.stretch.range", "teacher.normalize.mean", "teacher.tta", "teacher.window", "class_map",
                   "distill.temperature", "cache.bits"],
        "nothing": ["seed", "classes.not_scored", "teacher.batch_size", "distill.alpha", "train.crop", "student.normalize"],
    }[side]  # fmt: skip
    before = units(parse_config(raw, "test"), 0, tmp_path)
    for number, key in enumerate(keys, start=1):
        after = units(changed(raw, key, CHANGES[key][0], data), number, tmp_path)
        same = all(np.array_equal(before[tile], after[tile]) for tile in before)
        assert same == (side == "nothing"), key


@pytest.fixture
def own_images(make_config, landscape, finished_cache, tmp_path):
    """The config of a finished cache over copies of its images, which keep their times, and those copies."""
    shutil.copytree(landscape, tmp_path / "data")
    shutil.copytree(finished_cache, tmp_path / "cache.zarr")
    config = make_config(data__train=[str(tmp_path / "data/Train")], train__max_steps=1)
    return config, sorted((tmp_path / "data/Train/images").iterdir())


def open_for_training(config):
    return open_fresh_cache(config, list_tiles(config.data, "train"), None)


def found(config, level):
    return {(finding.code, finding.tile) for finding in verify(config, level, CPU).findings}


def other_pixels(image: Path, seconds: float) -> None:
    """Change an image's last byte, and give it the time of its last change plus some seconds."""
    stat = image.stat()
    data = bytearray(image.read_bytes())
    data[-1] ^= 1
    image.write_bytes(data)
    os.utime(image, (stat.st_atime, stat.st_mtime + seconds))


@pytest.mark.parametrize(
    "seconds", [3600, 1e-6, -1e-6, -1e9], ids=["later", "just later", "just earlier", "decades earlier"]
)
def test_a_changed_image_is_found_by_content_by_whoever_uses_the_cache(own_images, seconds):
    """The date of another image of the same size may be older than that of the tile: `cp -p`, `rsync -t`, `tar`, `unzip`."""
    config, images = own_images
    assert found(config, "quick") == set()
    other_pixels(images[0], seconds)
    stale = ("stale-tile", f"Train/{images[0].stem}")
    assert found(config, "quick") == found(config, "full") == {stale}
    with pytest.raises(
        StaleCache, match=f"1 stale tile: {stale[1]} .*is not the image that the tile was computed from"
    ):
        open_for_training(config)


def test_an_image_touched_or_copied_without_a_change_is_not_stale(own_images):
    config, images = own_images
    for image in images:
        os.utime(image, (image.stat().st_atime, image.stat().st_mtime + 3600))
    assert found(config, "quick") == found(config, "full") == set()
    open_for_training(config)


def test_an_added_and_a_removed_image_are_found(own_images):
    config, images = own_images
    mask = images[0].parents[1] / "masks" / images[0].name
    new = images[0].with_name("new.png")
    images[0].rename(new)
    mask.rename(mask.with_name("new.png"))
    expected = {("missing-tile", "Train/new"), ("extra-tile", f"Train/{images[0].stem}")}
    assert found(config, "quick") == expected
    assert found(config, "full") == expected
    with pytest.raises(IncompleteCache, match=r"1 missing tile: Train/new"):
        open_for_training(config)


def test_other_versions_of_libraries_are_said_in_a_line_and_refused_by_nobody(own_images, monkeypatch):
    config, _ = own_images
    now = versions.library_versions()
    monkeypatch.setattr(versions, "library_versions", lambda: {**now, "timm": "99.0", "zarr": "98.1"})
    line = (
        f"note: the cache was computed with timm {now['timm']}, installed is 99.0; zarr {now['zarr']}, installed is 98.1; "
        "the values are not recomputed for that"
    )
    progress = Lines()
    report = verify(config, "full", CPU, progress=progress)
    assert report.passes
    assert report.as_dict()["other_libraries"] == {"timm": (now["timm"], "99.0"), "zarr": (now["zarr"], "98.1")}
    assert progress.said.count(line) == 1
    progress = Lines()
    train(config, CPU, progress=progress)
    assert progress.said.count(line) == 1
