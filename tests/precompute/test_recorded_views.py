"""Recorded views: cached and online distillation are the same computation, crop for crop."""

import hashlib
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import plain_reader
from helpers.doubles import StopAfter
from helpers.files import tree
from helpers.views import K, dataset, rendered

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.encoding.simplex import mean_over_pixels
from kdpipe.configs.errors import ConfigError, Interrupted
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.inspection.cache import inspect_cache
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe, configured_softening
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.terminal.inspection import cache_tables
from kdpipe.pipeline.reports.terminal.stage_one import estimate_text
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training.loaders import PACKED_LEVELS, OnlineTargets, collate_packed, unpacked
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.training.targets import CachedViews
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def live_targets(config):
    tiles = list_tiles(config.data, "train")
    return OnlineTargets(open_teacher(config, complete_recipe(config, None, None), CPU), tiles, config, None)


def cached_targets(config):
    return CachedViews(SoftTargetCache.open(config.cache.path, configured_softening(config)), config.teachers_places)


def bound(config):
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    return cache.manifest.probability_bound(config.distill.temperature, len(config.classes.names))


@pytest.mark.parametrize("crops", [1, 2])
def test_training_cycles_through_the_views_of_each_tile(make_views, crops):
    views = dataset(make_views(train__crops_per_tile=crops))
    shown = [views.shown(k) for k in range(6 * K * len(views))]
    per_tile = {tile: [view.number for view in shown if view.tile == tile] for tile in range(6)}
    assert per_tile == {tile: [n % K for n in range(6 * K * crops)] for tile in range(6)}
    if crops == 1:
        assert [view.number for view in shown] == [k // len(views) % K for k in range(len(shown))]


def test_a_view_is_the_same_in_every_process_order_and_run(make_views):
    config = make_views(train__mosaic=0.5)
    other = dataset(config.model_copy(update={"seed": 8, "name": "other"}))
    forwards = rendered(config)
    backwards = {view.id: view.pixels() for view in reversed(other.all_views())}
    assert len(forwards) == 6 * K
    for view_id, pixels in forwards.items():
        np.testing.assert_array_equal(backwards[view_id], pixels)
    assert len({pixels.tobytes() for pixels in forwards.values()}) == 6 * K  # and no two are alike


def test_the_sources_that_an_id_is_made_of_are_those_that_the_plan_shows(make_views):
    views = dataset(make_views(train__mosaic=0.5))
    numbers = {len(view.id.split("-")) for view in views.all_views()}
    assert numbers == {2, 3}  # both kinds occur
    for view in views.all_views():
        assert views.sources(view) == [part.tile for part in view.plan().views]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "bits"), [("soft", 8), ("soft", 16), ("logits", 8)])
def test_cached_and_online_targets_agree_over_a_whole_cycle_within_the_error_bound(make_views, landscape, kind, bits):
    """Every pixel of every sample of a cycle, as loaded and as on the device, tiles without labels included, padding excluded."""
    unlabelled = str(landscape / "Unlabelled")
    config = make_views(
        cache__kind=kind, cache__bits=bits, train__scales=[0.5, 1.0], train__mosaic=0.4, data__unlabelled=[unlabelled]
    )
    precompute(config, CPU)
    assert SoftTargetCache.open(config.cache.path).manifest.format_version == {"soft": "4.2", "logits": "2.2"}[kind]
    cached, online = dataset(config, cached_targets(config)), dataset(config, live_targets(config))
    assert len(cached) == 8
    allowed, padded = bound(config), 0
    for k in range(K * len(cached)):
        one, two = cached[k], online[k]
        for name in ("image", "mask", "inside"):
            np.testing.assert_array_equal(one[name], two[name])
        assert np.abs(one["target"] - two["target"]).max() <= allowed
        batch = collate_packed([one])
        on_device = unpacked(batch["target"], batch["inside"])[0].numpy()
        assert np.abs(on_device - two["target"]).max() <= allowed + (1 + 6) / 2 / PACKED_LEVELS
        np.testing.assert_allclose(one["target"].sum(axis=0), one["inside"], atol=1e-5)
        padded += int((~one["inside"]).sum())
    assert padded


def losses(config):
    """The loss of every step."""
    return np.array(train(config, CPU, overwrite=True).losses)


# Relative error of the loss of a few small crops under the error bound: 0.004 of a probability at 8 bits, 1.5e-5 at 16.


LOSS_TOLERANCE = {8: 2e-3, 16: 5e-5}
LOOP = {"distill__alpha": 1.0, "train__epochs": K + 1, "data__val": []}


def same_run(config):
    """Losses of the cached and the online run, which agree within the error bound."""
    precompute(config, CPU)
    cached, online = losses(config), losses(with_mode(config, "online"))
    assert len(cached) == (K + 1) * 3
    np.testing.assert_allclose(cached, online, rtol=LOSS_TOLERANCE[config.cache.bits])
    assert (cached != online).any()
    return online


@pytest.mark.long
def test_cached_and_online_are_the_same_run_over_a_whole_cycle(make_views, plain_student):
    same_run(make_views(cache__bits=8, **LOOP))


@pytest.mark.long
def test_that_comparison_notices_wrong_targets(make_views, plain_student, monkeypatch):
    config = make_views(cache__bits=16, **LOOP)
    online = same_run(config)
    right, ids = CachedViews.read_view, SoftTargetCache.open(config.cache.path).tile_ids
    mutations = {
        "class order": lambda read, place: read(ids[place])[::-1],
        "another view": lambda read, place: read(ids[place // K * K + (place + 1) % K]),
        "another tile": lambda read, place: read(ids[(place + K) % len(ids)]),
        "upside down": lambda read, place: read(ids[place])[:, ::-1],
        "four bits": lambda read, place: np.round(read(ids[place]) * 15) / np.float32(15),
    }
    for name, mutation in mutations.items():

        def wrong(self, view_id, image, inside, mutation=mutation):
            target = mutation(self._cache.read, ids.index(view_id))
            return np.ascontiguousarray(target), right(self, view_id, image, inside)[1]

        monkeypatch.setattr(CachedViews, "read_view", wrong)
        assert np.abs(losses(config) / online - 1).max() > 100 * LOSS_TOLERANCE[16], name


def test_an_interrupted_run_continues_to_the_same_bytes(make_views, finished_views, tmp_path):
    config, stop = make_views(), threading.Event()
    with pytest.raises(Interrupted, match=r"of 18 views are finished and kept"):
        precompute(config, CPU, StopAfter(4, stop), stop)
    summary = precompute(config, CPU)
    assert 0 < summary.kept < 18
    assert tree(tmp_path / "cache.zarr") == tree(Path(finished_views))


def test_a_run_stopped_in_mid_epoch_resumes_to_the_same_weights_bit_for_bit(make_views, views_cache, plain_student):
    """From one cycle of views into the next; the second part starts in the middle of an epoch."""
    config = make_views(train__epochs=K + 1, data__val=[], name="whole")
    whole = train(config, CPU)
    half = config.model_copy(update={"name": "half"})
    train(half.model_copy(update={"train": config.train.model_copy(update={"max_steps": 7})}), CPU)
    resumed = train(half, CPU, resume=True)
    assert resumed.losses == whole.losses[7:]
    one, two = (
        torch.load(f"model_weights/tests/{n}/last.ckpt", weights_only=True)["state_dict"] for n in ("whole", "half")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_samples_are_the_same_in_a_worker_that_was_sent_the_dataset(make_views, views_cache):
    here = dataset(make_views(train__workers=2), cached_targets(make_views()))
    there = pickle.loads(pickle.dumps(here))
    for k in (17, 3, 20):
        one, two = here[k], there[k]
        assert one.keys() == two.keys() == {"image", "mask", "inside", "target", "entropy_error"}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.long
def test_parity_runs_the_teacher_on_the_views_and_compares_them_with_their_own_labels(make_views, views_cache):
    config = make_views()
    report = verify(config, "parity", CPU, sample=3)
    assert {finding.code for finding in report.findings} <= {"class-map"}  # a random teacher fits no labels
    assert len(report.parity) == 3
    assert (report.noun, report.tiles, report.label_tiles) == ("views", 6 * K, 6 * K)
    cache = SoftTargetCache.open("cache.zarr")
    expected = np.zeros((6, 6), dtype=int)
    for view in dataset(config).all_views():
        labels, predicted = view.labels(), cache.read(view.id).argmax(axis=0)
        np.add.at(expected, (labels[labels < 6], predicted[labels < 6]), 1)
    np.testing.assert_array_equal(report.confusion, expected)


def test_the_entropy_that_rounding_took_is_averaged_over_the_pixels_inside(make_views, finished_views):
    cache = SoftTargetCache.open(finished_views)
    views = dataset(make_views())
    view = next(v for v in views.all_views() if not views.render(v.plan())["inside"].all())
    sample = views.render(view.plan())
    units, exact = cache.read(view.id).astype(np.float64), live_targets(make_views())
    probs = exact.read_view(view.id, sample["image"], sample["inside"])[0].astype(np.float64)
    lost = (units * np.log(np.maximum(units, 1e-30)) - probs * np.log(np.maximum(probs, 1e-30))).sum(axis=0)
    # One block of 64 px: the mean of the whole crop stands for that of the pixels inside.
    assert CachedViews(cache, (0, 1, 2)).read_view(view.id, sample["image"], sample["inside"])[1] == pytest.approx(
        lost.mean(), abs=2e-6
    )
    blocks, inside = np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros((100, 70), dtype=bool)
    inside[:64, :64] = inside[90:, 64:] = True
    assert mean_over_pixels(blocks, inside) == (64 * 64 * 1 + 10 * 6 * 4) / (64 * 64 + 10 * 6)


def test_a_reader_written_from_the_page_alone_reads_views(finished_views):
    plain = plain_reader.Cache(Path(finished_views))
    cache = SoftTargetCache.open(finished_views)
    assert cache.manifest.format_version == "4.2"
    for view in cache.tile_ids:
        np.testing.assert_array_equal(plain.read(view), cache.read_units(view))


def test_the_digest_in_the_cache_is_that_of_the_pixels_and_the_files_sizes(make_views, finished_views):
    records = {record.id: record for record in SoftTargetCache.open(finished_views).manifest.tiles}
    for view in dataset(make_views()).all_views():
        assert records[view.id].image.sha256 == hashlib.sha256(view.pixels().tobytes()).hexdigest()
        assert records[view.id].image.size_bytes == sum(len(file.read_bytes()) for file in view.files)


def test_a_dry_run_and_inspect_speak_of_views(make_views, finished_views):
    forecast = estimate(make_views(train__mosaic=0.0), CPU)
    text = estimate_text(forecast)
    assert "18 views, 0 finished, 18 to do (0.1 MP)" in text
    assert " s per crop\n" in text
    assert "(--kd online)\n" in text
    assert "whole tiles" not in text
    assert forecast.worth.views_per_sample == 1
    row = next(t for t in cache_tables(inspect_cache(finished_views)))
    assert "views" in list(row.columns[0].cells)
    assert any("mosaic 0.25" in cell for cell in row.columns[1].cells)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"cache__views": None},
            r"distill\.teacher_view: crop needs cache\.views, the number of augmented crops of each tile",
        ),
        (
            {"distill__teacher_view": "tile"},
            r"cache\.views is 3, but the teacher sees whole tiles, .*: leave it out, or set",
        ),
        (
            {"train__crops_per_tile": 4},
            r"train\.crops_per_tile is 4, and cache\.views 3: an epoch would show the same crops",
        ),
        ({"train__unlabelled_crops_per_tile": 5}, r"train\.unlabelled_crops_per_tile is 5, and cache\.views 3"),
        ({"cache__views": 0}, r"cache\.views: .* greater than or equal to 1, found 0"),
    ],
)
def test_keys_that_do_not_go_together_are_named(make_views, change, said):
    with pytest.raises(ConfigError, match=said):
        make_views(**change)
