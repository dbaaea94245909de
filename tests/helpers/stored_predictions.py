"""Predictions that another program would have saved, made from the pixels of images: one file for each tile, or one large GeoTIFF."""

from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

ARE = ("logits", "probabilities", "classes")


def logits_of(image_HW3, channels=8):
    """Logits `(C, H, W)`, float32, that are neither flat nor certain."""
    colours = np.asarray(image_HW3, dtype=np.float32)[..., :3]
    weights = np.random.default_rng(5).normal(size=(channels, 3)).astype(np.float32) / 40
    return np.einsum("hwb,cb->chw", colours, weights).astype(np.float32)


def probabilities(logits_CHW):
    exact = np.exp(logits_CHW.astype(np.float64) - logits_CHW.max(axis=0))
    return exact / exact.sum(axis=0)


def as_stored(logits_CHW, are):
    """The array that a program saves of these logits."""
    if are == "logits":
        return logits_CHW
    if are == "probabilities":
        return probabilities(logits_CHW).astype(np.float32)
    return logits_CHW.argmax(axis=0).astype(np.uint8)


def write_prediction(path: Path, stored, *, transform=None, crs=None, nodata=None, scale=None):
    """Save an array `(C, H, W)` or `(H, W)` as the ending of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, stored)
    elif path.suffix == ".npz":
        np.savez_compressed(path, stored)
    elif path.suffix == ".png":
        Image.fromarray(stored).save(path)
    else:
        bands = stored[None] if stored.ndim == 2 else stored
        profile = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
        placed = {} if transform is None else {"transform": transform, "crs": crs}
        with rasterio.open(path, "w", dtype=bands.dtype, nodata=nodata, **profile, **placed) as raster:
            raster.write(bands)
            if scale is not None:
                raster.scales = [scale] * len(bands)
    return path


def write_all(folder: Path, images, are, ending=".npy"):
    """Save the prediction of each image, named after it."""
    for image in images:
        pixels = np.asarray(Image.open(image).convert("RGB"))
        write_prediction(folder / f"{Path(image).stem}{ending}", as_stored(logits_of(pixels), are))
    return folder
