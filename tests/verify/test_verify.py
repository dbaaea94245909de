"""The gate: a correct cache passes, and each kind of fault is found."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.configs import ENCODER
from helpers.files import write_image
from helpers.reference_teacher import teacher_logits
from PIL import Image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs import dump_config
from kdpipe.data.rasters import read_image
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.verify.gate import sampled_tiles, verify
from kdpipe.pipeline.verify.parity import Measure, compare

CPU = torch.device("cpu")


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_correct_cache_passes(cached, level):
    report = verify(cached, level, CPU)
    assert report.findings == []
    assert report.passes


def test_parity_measures_what_numpy_measures(cached):
    report = verify(cached, "parity", CPU, sample=2)
    # A random teacher may disagree with the labels; the numbers must be right all the same.
    assert {finding.code for finding in report.findings} <= {"class-map"}
    assert len(report.parity) == 2
    cache = SoftTargetCache.open(cached.cache.path)
    for row in report.parity:
        image = next(tile.image for tile in list_tiles(cached.data, "train") if tile.id == row.tile)
        logits = teacher_logits(cached.teacher.checkpoint, read_image(image))
        probs = np.sqrt(torch.softmax(logits, dim=0).permute(1, 2, 0).numpy() @ cached.class_map_matrix())  # T is 2
        probs /= probs.sum(axis=2, keepdims=True)
        difference = np.abs(probs.transpose(2, 0, 1) - cache.read(row.tile))
        assert row.max_abs.value == pytest.approx(difference.max(), abs=1e-5)
        assert row.mean_abs.value == pytest.approx(difference.mean(), abs=1e-5)
        assert row.gradient_cosine.value > 0.9999


def test_parity_finds_targets_that_are_not_the_teachers(cached):
    """Targets of exchanged classes fail in each figure that depends on them."""
    cache = SoftTargetCache.open(cached.cache.path)
    tile = list_tiles(cached.data, "train")[0]
    live = cache.read(tile.id)
    image = read_image(tile.image)
    torch.manual_seed(0)
    student = build_student("unet", 6, encoder=ENCODER).eval()
    wrong = np.roll(live, 1, axis=0)
    bound = cache.manifest.error_bound
    right = compare(tile.id, live, live, live, image, student, cached, bound, 0.0, "fp32", CPU)
    swapped = compare(tile.id, wrong, live, live, image, student, cached, bound, 0.0, "fp32", CPU)
    assert all(measure.passes for measure in right.measures().values())
    assert failing(swapped) >= {"max_abs", "mean_abs", "kl", "decided_agreement", "gradient_cosine"}
    # A fresh student is nearly uniform itself, so that a flat target changes its loss.
    flat = np.full_like(live, 1 / 6)
    assert "loss_difference" in failing(
        compare(tile.id, flat, live, live, image, student, cached, 1e-3, 0.0, "fp32", CPU)
    )


def test_parity_finds_targets_whose_class_the_temperature_has_changed(cached):
    """`softmax(z / T) @ M`, which kdpipe computed once."""
    tile = list_tiles(cached.data, "train")[0]
    image = read_image(tile.image)
    logits = 4 * teacher_logits(cached.teacher.checkpoint, image)
    probs, other_order = (
        (torch.softmax(z, dim=0).permute(1, 2, 0).numpy() @ cached.class_map_matrix()).transpose(2, 0, 1)
        for z in (logits, logits / 4)
    )
    torch.manual_seed(0)
    student = build_student("unet", 6, encoder=ENCODER).eval()
    found = compare(tile.id, other_order, other_order, probs, image, student, cached, 1e-3, 0.0, "fp32", CPU)
    share = (probs.argmax(axis=0) != other_order.argmax(axis=0)).mean()
    assert share > 0.01
    assert failing(found) == {"class_change"}
    assert found.class_change.value == pytest.approx(share, abs=1e-3)
    assert found.cached_class_change == found.class_change.value


def failing(row):
    return {name for name, measure in row.measures().items() if not measure.passes}


def test_a_figure_that_is_not_a_number_does_not_pass():
    assert not Measure(float("nan"), 1.0).passes
    assert not Measure(float("nan"), 1.0, at_least=True).passes


def codes(config, level):
    return [(finding.code, finding.tile) for finding in verify(config, level, CPU).findings]


@pytest.mark.parametrize("level", ["quick", "full", "parity"])
def test_a_missing_cache_is_a_finding(make_config, level):
    assert codes(make_config(), level) == [("incomplete", None)]


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_stale_recipe_names_the_field(cached, make_config, level):
    report = verify(make_config(distill__temperature=1.0, class_map__Road={"Background": 1}), level, CPU)
    assert [finding.message.split(":")[0] for finding in report.findings] == ["class_map", "temperature"]


def test_swapped_tiles_are_found_by_full(cached):
    tiles = sorted(Path(cached.cache.path).glob("tiles/Train/*"))[:2]
    one, two = ((tile / "0.0.0").read_bytes() for tile in tiles)
    (tiles[0] / "0.0.0").write_bytes(two)
    (tiles[1] / "0.0.0").write_bytes(one)
    assert codes(cached, "full") == [("damaged-tile", f"Train/{tile.name}") for tile in tiles]


def test_a_changed_image_is_found_even_if_its_size_and_time_are_not(make_config, tmp_path):
    """An uncompressed image keeps its size when a pixel changes, and its old time is restored."""
    folder = tmp_path / "Raw" / "images"
    (tmp_path / "Raw" / "masks").mkdir(parents=True)
    for name in ("t0", "t1"):
        write_image(folder / f"{name}.png", 70, 80)
        Image.open(folder / f"{name}.png").save(folder / f"{name}.tif")
        (folder / f"{name}.png").unlink()
    config = make_config(data__train=[str(tmp_path / "Raw")], data__allow_missing_masks=True)
    precompute(config, CPU)
    image = folder / "t1.tif"
    before = image.stat()
    data = bytearray(image.read_bytes())
    data[-100] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert codes(config, "full") == [("stale-tile", "Raw/t1")]
    os.utime(image)
    assert codes(config, "quick") == [("stale-tile", "Raw/t1")]


def test_added_and_removed_images_are_found(cached, make_config, landscape, tmp_path):
    more = make_config(data__unlabelled=[str(landscape / "Unlabelled")])
    assert {code for code, _ in codes(more, "quick")} == {"missing-tile"}
    precompute(more, CPU)
    assert [code for code, _ in codes(cached, "quick")] == ["extra-tile", "extra-tile"]


def test_parity_does_not_run_the_teacher_on_a_damaged_cache(cached, monkeypatch):
    shard = next(Path(cached.cache.path).glob("tiles/Train/*/0.0.0"))
    shard.unlink()
    monkeypatch.setattr(
        "kdpipe.pipeline.verify.gate.open_teacher", lambda *arguments: pytest.fail("the teacher was loaded")
    )
    assert codes(cached, "parity") == [("damaged-tile", f"Train/{shard.parent.name}")]


def test_the_sample_takes_labelled_and_unlabelled_tiles_in_turn(make_config, landscape):
    config = make_config(data__unlabelled=[str(landscape / "Unlabelled")])
    tiles = list_tiles(config.data, "train")
    chosen = sampled_tiles(tiles, 4, seed=1)
    assert [tile.mask is not None for tile in chosen] == [True, False, True, False]
    assert chosen == sampled_tiles(tiles, 4, seed=1)
    assert len(sampled_tiles(tiles, 99, seed=1)) == 8


def test_the_command_exits_1_on_findings_and_writes_json(cached, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_config(cached))
    command = ["verify-cache", "-c", "c.yaml", "--json", "report.json"]
    done = run_command(*command)
    assert (done.returncode, json.loads(Path("report.json").read_text())["passes"]) == (0, True), done.stderr
    assert "PASS (full): 6 tiles" in done.stdout
    next(Path(cached.cache.path).glob("tiles/Train/*/0.0.0")).unlink()
    done = run_command(*command)
    report = json.loads(Path("report.json").read_text())
    assert (done.returncode, report["passes"], report["findings"][0]["code"]) == (1, False, "damaged-tile")
    assert "its shard (0.0.0) is missing" in done.stdout
