"""Stage one: complete, resumable, and equal to the teacher's predictions."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import zarr
from helpers.commands import arguments, run_command
from helpers.configs import ENCODER
from helpers.doubles import CostlessTeacher, StopAfter
from helpers.files import tree, write_image

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CacheLocked, CheckpointError, DiskFull, Interrupted, StaleCache
from kdpipe.data.rasters import read_image
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.precompute import run as stage
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.plan import failure_report
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.terminal.stage_one import estimate_text
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.text import size_text
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.gate import verify

TEACHER_CLASSES = ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background"]
CPU = torch.device("cpu")


def fingerprint_of(config):
    return SoftTargetCache.open(config.cache.path).manifest.fingerprint


def even_tiles(folder, count, height=64, width=64):
    """Overrides for a training set of tiles of one size, without masks."""
    for i in range(count):
        write_image(folder / "Even" / "images" / f"t{i}.png", height, width, seed=i)
    return {"data__train": [str(folder / "Even")], "data__allow_missing_masks": True}


@pytest.mark.long
@pytest.mark.parametrize("bits", [6, 8, 16])
def test_cache_holds_the_teachers_soft_targets_within_the_error_bound(make_config, bits):
    config = make_config(cache__bits=bits, data__unlabelled=[])
    summary = precompute(config, CPU)
    assert summary.computed == 6
    assert not summary.failed
    cache = SoftTargetCache.open(config.cache.path)
    recipe = complete_recipe(config, None, None)
    teacher = open_teacher(config, recipe, CPU)
    raw = zarr.open_group(config.cache.path, mode="r")["tiles"]
    for tile in list_tiles(config.data, "train"):
        live = teacher.soft_targets(read_image(tile.image)[None])[0]
        assert np.abs(cache.read(tile.id) - live).max() <= cache.manifest.error_bound
        # The documented decoding rule on plain zarr-python's arrays.
        stored = raw[tile.id][:]
        blocks = np.split(stored, range(64, stored.shape[1], 64), axis=1)
        value = np.concatenate([np.cumsum(block, axis=1, dtype=stored.dtype) for block in blocks], axis=1)
        unsaid = value == np.iinfo(value.dtype).max
        others = np.where(unsaid, 0, value)
        units = np.where(unsaid, recipe.levels - others.sum(axis=0, dtype=np.int64), others)
        np.testing.assert_array_equal(units.astype(np.float32) / np.float32(recipe.levels), cache.read(tile.id))
        assert (unsaid.sum(axis=0) == 1).all()


@pytest.mark.long
def test_unlabelled_tiles_are_cached_too(make_config, landscape):
    config = make_config(data__unlabelled=[str(landscape / "Unlabelled")])
    assert precompute(config, CPU).tiles == 8
    assert sum(tile.startswith("Unlabelled/") for tile in SoftTargetCache.open(config.cache.path).tile_ids) == 2


def test_a_second_run_does_nothing_and_needs_no_teacher_in_memory(cached, tmp_path, monkeypatch):
    before = tree(tmp_path / "cache.zarr")
    monkeypatch.setattr(stage, "open_teacher", lambda *arguments: pytest.fail("the teacher was loaded"))
    again = precompute(cached, CPU)
    assert (again.computed, again.kept, again.fingerprint) == (0, 6, fingerprint_of(cached))
    assert tree(tmp_path / "cache.zarr") == before


NOTHING_TO_DO = """
import sys
from kdpipe.pipeline.commands.main import main
sys.argv[1:] = {arguments!r}
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.long
def test_a_complete_cache_is_found_complete_without_torch(cached, tmp_path):
    fingerprint = fingerprint_of(cached)
    code = NOTHING_TO_DO.format(
        arguments=arguments(cached, "precompute-teacher", "--json", str(tmp_path / "s.json"), folder=tmp_path)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"nothing to do: 6 tiles, fingerprint {fingerprint}" in done.stdout
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["kept"], summary["computed"], summary["fingerprint"]) == (6, 0, fingerprint)


@pytest.mark.long
def test_an_interrupted_run_continues_to_the_same_bytes(make_config, finished_cache, tmp_path):
    config = make_config()
    stop = threading.Event()
    with pytest.raises(
        Interrupted, match=r"stopped; \d of 6 tiles are finished and kept .* Run the same command again"
    ):
        precompute(config, CPU, StopAfter(1, stop), stop)
    resumed = precompute(config, CPU)
    assert resumed.kept >= 1
    assert resumed.computed == 6 - resumed.kept
    assert tree(tmp_path / "cache.zarr") == tree(finished_cache)


@pytest.mark.long
def test_ctrl_c_stops_cleanly_and_keeps_finished_tiles(make_config, tmp_path):
    config = make_config(teacher__tta="d4", teacher__scales=[1.0, 2.0])
    command = [sys.executable, "-m", "kdpipe.pipeline", *arguments(config, "precompute-teacher", folder=tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache.zarr").glob("tiles/*/*/zarr.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    assert "tiles are finished and kept" in complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "cache.zarr" / "manifest.json").exists()
    assert not list((tmp_path / "cache.zarr").rglob("*.partial"))


@pytest.mark.long
def test_an_unreadable_tile_is_named_and_the_others_are_done(make_config, tmp_path):
    config = make_config(**even_tiles(tmp_path, 3, 70, 81))
    image = tmp_path / "Even" / "images" / "t1.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:3000])
    summary = precompute(config, CPU)
    assert (summary.computed, list(summary.failed), summary.fingerprint) == (2, ["Even/t1"], None)
    assert "t1.png" in failure_report(summary)
    image.write_bytes(intact)
    assert precompute(config, CPU).computed == 1
    done = run_command(*arguments(config, "precompute-teacher", folder=tmp_path))
    assert done.returncode == 0, done.stderr
    assert "nothing to do: 3 tiles" in done.stdout


@pytest.mark.long
def test_a_changed_image_is_computed_again_and_only_that(make_config, tmp_path):
    config = make_config(**even_tiles(tmp_path, 3, 70, 81))
    first = precompute(config, CPU)
    time.sleep(0.01)
    write_image(tmp_path / "Even" / "images" / "t1.png", 70, 81, seed=9)
    second = precompute(config, CPU)
    assert (second.computed, second.kept) == (1, 2)
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"distill__temperature": 3.0}, "temperature: the cache has 2.0, the configuration says 3.0"),
        ({"cache__bits": 16}, "bits: the cache has 8"),
        ({"teacher__normalize": "imagenet"}, r"teacher\.normalize_mean"),
        ({"teacher__tta": "flips"}, r"teacher\.tta: the cache has .none"),
        ({"teacher__window": 64}, r"teacher\.window"),
        ({"data__bands": [3, 2, 1]}, "bands"),
        (
            {"teacher__drop_channels": [7], "class_map": {name: {"Forest": 1} for name in TEACHER_CLASSES[:7]}},
            r"teacher\.drop_channels: the cache has \[\], the configuration says \[7\]",
        ),
    ],
)
def test_a_cache_of_another_recipe_is_refused_naming_the_field(make_config, cached, change, field):
    with pytest.raises(StaleCache, match=field):
        precompute(make_config(**change), CPU)


def test_other_weights_are_another_teacher(make_config, cached, teacher_file, tmp_path):
    state = torch.load(teacher_file, weights_only=True)
    state["segmentation_head.0.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(StaleCache, match=r"teacher\.checkpoint_sha256"):
        precompute(make_config(teacher__checkpoint=str(tmp_path / "other.pth")), CPU)


@pytest.mark.long
def test_batches_of_equal_size_give_the_same_targets_and_resume_among_the_same_neighbours(make_config, tmp_path):
    data = even_tiles(tmp_path, 5)
    single = make_config(**data, cache__path=str(tmp_path / "single.zarr"))
    batched = make_config(**data, teacher__batch_size=2)
    precompute(single, CPU)
    precompute(batched, CPU)
    one, two = SoftTargetCache.open(single.cache.path), SoftTargetCache.open(batched.cache.path)
    for tile in one.tile_ids:
        np.testing.assert_allclose(one.read(tile), two.read(tile), atol=1.01 / one.manifest.recipe.levels)
    before = tree(tmp_path / "cache.zarr")
    (tmp_path / "cache.zarr" / "tiles" / "Even" / "t1" / "zarr.json").unlink()
    assert precompute(batched, CPU).computed == 1
    assert tree(tmp_path / "cache.zarr") == before


@pytest.mark.parametrize("left", [3000, 10], ids=["with a header", "without a header"])
@pytest.mark.parametrize("position", [0, 1])
def test_the_neighbours_of_an_unreadable_image_are_computed_in_a_batch_of_the_same_size(
    make_config, tmp_path, monkeypatch, position, left
):
    """With a teacher whose predictions depend on the size of the batch, as a GPU's last bits do."""

    class CountingTeacher(CostlessTeacher):
        def cached_values(self, images_NHWC):
            count = len(images_NHWC)
            probs = np.full((count, 6, *images_NHWC.shape[1:3]), (1 - 0.1 * count) / 5, dtype=np.float32)
            probs[:, 0] = 0.1 * count
            return probs

    monkeypatch.setattr(stage, "open_teacher", CountingTeacher().by)
    data = even_tiles(tmp_path, 4) | {"teacher__batch_size": 2}
    whole = make_config(**data, cache__path=str(tmp_path / "whole.zarr"))
    precompute(whole, CPU)
    image = tmp_path / "Even" / "images" / f"t{position}.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:left])
    config = make_config(**data)
    summary = precompute(config, CPU)
    assert (list(summary.failed), summary.computed) == ([f"Even/t{position}"], 3)
    assert not (tmp_path / f"cache.zarr/tiles/Even/t{position}").exists()
    image.write_bytes(intact)
    assert precompute(config, CPU).computed == 1
    assert tree(tmp_path / "cache.zarr") == tree(tmp_path / "whole.zarr")


def test_a_missing_teacher_is_named(make_config):
    with pytest.raises(CheckpointError, match=r"teacher.checkpoint: no file at .*absent\.pth"):
        precompute(make_config(teacher__checkpoint="absent.pth"), CPU)


def test_a_second_writer_is_refused_and_told_who_writes(make_config, tmp_path):
    config = make_config()
    with stage.open_writer(
        stage.open_storage(config.cache.path), complete_recipe(config, None, None), device="cpu", libraries={}
    ):
        done = run_command(*arguments(config, "precompute-teacher", folder=tmp_path))
    assert done.returncode == CacheLocked.exit_code == 3
    assert f"is being written by process {os.getpid()} on " in done.stderr


@pytest.mark.long
def test_a_disk_that_will_be_too_small_is_refused_early_and_keeps_what_is_done(make_config, monkeypatch):
    config = make_config()
    monkeypatch.setattr("kdpipe.cache.storage.local.LocalStorage.free_bytes", lambda self: 10)
    with pytest.raises(
        DiskFull, match=r"needs about .* kB more for 3 tiles, and its disk has 10 B free; make room .* the 3 finished"
    ):
        precompute(config, CPU)
    monkeypatch.undo()
    assert precompute(config, CPU).kept >= 3


@pytest.mark.long
def test_dry_run_predicts_bytes_and_writes_nothing(make_config, tmp_path):
    config = make_config()
    forecast = estimate(config, CPU)
    assert (forecast.tiles, forecast.finished, forecast.fits) == (6, 0, True)
    assert not (tmp_path / "cache.zarr").exists()
    written = precompute(config, CPU).bytes_written
    assert 0.5 < forecast.bytes / written < 2
    assert estimate(config, CPU).bytes == 0


def test_dry_run_exits_3_where_the_disk_is_too_small(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("kdpipe.cache.storage.local.LocalStorage.free_bytes", lambda self: 10)
    assert not estimate(make_config(), CPU).fits


@pytest.mark.long
def test_dry_run_counts_the_temporary_file_of_the_largest_scene_in_windows(make_config, monkeypatch):
    whole = estimate(make_config(), CPU)
    assert whole.temporary_bytes == 0 and "for a moment" not in estimate_text(whole)
    config = make_config(teacher__window=64)
    forecast = estimate(config, CPU)
    areas = [
        np.prod(read_image(tile.image, config.data.bands, None).shape[:2]) for tile in list_tiles(config.data, "train")
    ]
    assert forecast.temporary_bytes == pytest.approx(forecast.bytes * max(areas) / sum(areas), abs=1)
    assert f"and {size_text(forecast.temporary_bytes)} for a moment, as the largest" in estimate_text(forecast)
    monkeypatch.setattr("kdpipe.cache.storage.local.LocalStorage.free_bytes", lambda self: forecast.bytes + 1)
    assert not estimate(config, CPU).fits


def test_json_holds_the_summary(make_config, tmp_path):
    done = run_command(*arguments(make_config(), "precompute-teacher", "--json", "out/summary.json", folder=tmp_path))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["computed"] == 6
    assert summary["bytes_written"] == sum(p.stat().st_size for p in (tmp_path / "cache.zarr").rglob("0.0.0"))


@pytest.fixture
def two_teachers(make_config, teacher_file, tmp_path):
    """A configuration of two teachers; the second has other weights and its channels in the opposite order."""
    state = torch.load(teacher_file, weights_only=True)
    for name in ("segmentation_head.0.weight", "segmentation_head.0.bias"):
        state[name] = state[name].flip(0) * 0.5
    torch.save(state, tmp_path / "second.pth")
    first = {
        "architecture": "unet",
        "encoder": ENCODER,
        "checkpoint": str(teacher_file),
        "classes": TEACHER_CLASSES,
    }
    second = {
        **first,
        "checkpoint": str(tmp_path / "second.pth"),
        "classes": TEACHER_CLASSES[::-1],
        "weight": 2,
        "tta": "flips",
    }

    def make(members=(first, second), **overrides):
        return make_config(teacher=None, teachers=list(members), **overrides)

    return make, first, second


@pytest.mark.long
def test_several_teachers_are_cached_once_and_pass_every_check(two_teachers):
    make, _, _ = two_teachers
    config = make(train__max_steps=1)
    assert estimate(config, CPU).tiles == 6
    fingerprint = precompute(config, CPU).fingerprint
    report = verify(config, "parity", CPU, sample=2)
    assert {finding.code for finding in report.findings} <= {"class-map"}  # a random teacher fits no labels
    assert len(report.parity) == 2
    assert report.fingerprint == fingerprint
    online = train(with_mode(config, "online"), CPU)
    cached = train(config, CPU)
    assert cached.fingerprint == fingerprint
    np.testing.assert_allclose(cached.losses[0], online.losses[0], rtol=1e-3)


@pytest.mark.long
def test_a_stale_cache_names_the_teacher_that_changed(two_teachers):
    make, first, second = two_teachers
    precompute(make(), CPU)
    for change, message in (
        ({"tta": "none"}, r"teachers\.1\.tta: the cache has .flips., the configuration says .none."),
        ({"weight": 1}, r"teachers\.1\.weight: the cache has 2\.0, the configuration says 1\.0"),
        ({"classes": TEACHER_CLASSES}, r"teachers\.1\.classes: the cache has \[.Background"),
        ({"normalize": "imagenet"}, r"teachers\.1\.normalize_mean"),
        (None, r"teachers: the cache has 2, the configuration says 1\."),
    ):
        changed = make([first] if change is None else [first, {**second, **change}])
        with pytest.raises(StaleCache, match=message):
            precompute(changed, CPU)


@pytest.mark.parametrize(("cores", "expected"), [(1, (2, 2)), (8, (2, 6)), (64, (16, 48)), (None, (2, 2))])
def test_all_cores_encode_beside_a_gpu_and_few_beside_a_network_on_the_cpu(monkeypatch, cores, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert stage.stage_threads(torch.device("cuda")) == expected
    assert stage.stage_threads(CPU) == (2, 2)


def test_many_threads_write_the_bytes_of_few(make_config, finished_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "CPU_THREADS", (5, 7))
    precompute(make_config(), CPU)
    assert tree(tmp_path / "cache.zarr") == tree(finished_cache)
