"""A small cache of random distributions, written without a teacher."""

import hashlib
import json

import numpy as np

from kdpipe.cache.images import digest_image
from kdpipe.cache.recipe import Recipe, TeacherRecord
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import finished_tiles, open_writer

RECIPE = Recipe(
    teachers=[TeacherRecord(
        checkpoint_sha256="0" * 64, architecture="unet", encoder="resnet18", classes=["a", "b"], drop_channels=[], weight=1.0,
        normalize_mean=[0, 0, 0], normalize_std=[1, 1, 1], precision="fp32", tta="none", scales=[1.0], window=None,
    )],
    bands=[1, 2, 3],
    stretch=None, classes=["x", "y", "z"], class_map=[[1, 0, 0], [0, 0.5, 0.5]], temperature=2.0, kind="soft",
    bits=8, levels=170, key_row_px=64, chunk_px=256, decoder="pillow", temperature_applied="after class_map",
)  # fmt: skip


def distributions(num_classes, height, width, seed=0, sharpness=3.0):
    """Random soft targets, float32 `(C, H, W)`."""
    z = np.random.default_rng(seed).standard_normal((num_classes, height, width)) * sharpness
    e = np.exp(z - z.max(axis=0))
    return (e / e.sum(axis=0)).astype(np.float32)


SIZES = {"Train/a": (70, 41), "Train/b": (70, 41), "Other/c": (1, 1), "Other/d": (300, 257)}


def fill(path, images, tiles=None, recipe=RECIPE, finish=True):
    """Write the tiles of `SIZES` that are missing, or only `tiles`, and complete the cache; returns its storage."""
    storage = open_storage(str(path))
    with open_writer(storage, recipe, device="cpu", libraries={"numpy": "1"}) as writer:
        writer.begin()
        records = finished_tiles(storage, recipe, images, None)
        for number, tile in enumerate(SIZES):
            if tile not in records and (tiles is None or tile in tiles):
                probs = distributions(3, *SIZES[tile], seed=number)
                records[tile] = writer.write(tile, probs, digest_image(images[tile]))
        if finish:
            writer.finish([records[tile] for tile in SIZES])
    return storage


def sign(content):
    """The bytes of a manifest whose fingerprint and checksum fit its content, as FORMAT.md says."""

    def digest(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    content.pop("checksum", None)
    images = {tile["id"]: tile["image"]["sha256"] for tile in content["tiles"]}
    content["fingerprint"] = digest({"images": images, "recipe": content["recipe"]})
    return (json.dumps({**content, "checksum": digest(content)}, sort_keys=True, indent=1) + "\n").encode()


def objects(url):
    """Every object below a URL, by relative path."""
    fs, root = open_storage(url)._fs, url.partition("://")[2]
    return {path.removeprefix(root + "/"): fs.cat_file(path) for path in sorted(fs.find(root))}
