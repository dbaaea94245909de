"""Recorded views: cached and online are the same computation, crop for crop, and no crop is ever taken for another."""

import hashlib
import os
import pickle
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import plain_reader
from helpers.doubles import Lines, Plain
from helpers.files import tree
from PIL import Image

from kdpipe.cache import IncompleteCache, SoftTargetCache, StaleCache
from kdpipe.cache.codec import probability_bound
from kdpipe.cache.encoding.simplex import mean_over_pixels
from kdpipe.configs.errors import ConfigError, Interrupted
from kdpipe.data.recorded_views import RecordedView, RecordedViews
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.inspection.cache import inspect_cache
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe, configured_softening
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.reports.terminal.inspection import cache_tables
from kdpipe.pipeline.reports.terminal.stage_one import estimate_text
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.loaders import PACKED_LEVELS, OnlineTargets, collate_packed, unpacked
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.training.targets import CachedViews
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
K = 3


@pytest.fixture
def make_views(make_config):
    """`make_config` with three recorded views of each tile, small enough that a teacher is soon done."""

    def make(**overrides):
        return make_config(**{"distill__teacher_view": "crop", "cache__views": K, "train__crop": 64, **overrides})

    return make


def dataset(config, answers=None):
    return RecordedViews(list_tiles(config.data, "train"), config, None, answers)


def live_targets(config):
    tiles = list_tiles(config.data, "train")
    return OnlineTargets(open_teacher(config, complete_recipe(config, None, None), CPU), tiles, config, None)


def cached_targets(config):
    return CachedViews(SoftTargetCache.open(config.cache.path, configured_softening(config)))


def bound(config):
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    return probability_bound(cache.manifest, config.distill.temperature)


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
    one, two = dataset(config), dataset(config.model_copy(update={"seed": 8, "name": "other"}))
    forwards = {view.id: view.pixels() for view in one.all_views()}
    backwards = {view.id: view.pixels() for view in reversed(two.all_views())}
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


@pytest.mark.parametrize(("kind", "bits"), [("soft", 8), ("soft", 16), ("logits", 8)])
def test_cached_and_online_targets_are_the_same_over_a_whole_cycle_to_the_encodings_bound(
    make_views, landscape, kind, bits
):
    """Every pixel of every sample of a cycle, as loaded and as the device has it, with tiles without labels; padding is left out."""
    unlabelled = str(landscape / "Unlabelled")
    config = make_views(
        cache__kind=kind, cache__bits=bits, train__scales=[0.5, 1.0], train__mosaic=0.4, data__unlabelled=[unlabelled]
    )
    precompute(config, CPU)
    assert SoftTargetCache.open(config.cache.path).manifest.format_version == {"soft": "4.1", "logits": "2.1"}[kind]
    cached, online = dataset(config, cached_targets(config)), dataset(config, live_targets(config))
    assert len(cached) == 8
    padded = 0
    for k in range(K * len(cached)):
        one, two = cached[k], online[k]
        for name in ("image", "mask", "inside"):
            np.testing.assert_array_equal(one[name], two[name])
        assert np.abs(one["target"] - two["target"]).max() <= bound(config)
        batch = collate_packed([one])
        on_device = unpacked(batch["target"], batch["inside"])[0].numpy()
        assert np.abs(on_device - two["target"]).max() <= bound(config) + (1 + 6) / 2 / PACKED_LEVELS
        np.testing.assert_allclose(one["target"].sum(axis=0), one["inside"], atol=1e-5)
        padded += int((~one["inside"]).sum())
    assert padded


@pytest.fixture
def plain_student(monkeypatch):
    """A student of two convolutions: quick, and without a batch norm that would magnify the last bits."""
    monkeypatch.setattr(training, "build_student", lambda *args, **options: Plain())


def losses(config):
    """Of every step of a whole cycle of views and one epoch more, from the teacher alone."""
    return np.array(train(config, CPU, overwrite=True).losses)


# What the encoding's bound leaves of the loss of a few small crops, relative: 0.004 of a probability at 8 bits, 1.5e-5 at 16.
LOSS_TOLERANCE = {8: 2e-3, 16: 5e-5}
LOOP = {"distill__alpha": 1.0, "train__epochs": K + 1, "data__val": []}


@pytest.mark.parametrize("bits", [8, 16])
def test_cached_and_online_are_the_same_run_over_a_whole_cycle(make_views, plain_student, bits):
    config = make_views(cache__bits=bits, **LOOP)
    precompute(config, CPU)
    cached, online = losses(config), losses(with_mode(config, "online"))
    assert len(cached) == (K + 1) * 3
    np.testing.assert_allclose(cached, online, rtol=LOSS_TOLERANCE[bits])
    assert (cached != online).any()


def test_a_wrong_answer_is_noticed_by_that_comparison(make_views, plain_student, monkeypatch):
    config = make_views(cache__bits=16, **LOOP)
    precompute(config, CPU)
    online = losses(with_mode(config, "online"))
    answer, ids = CachedViews.answer, SoftTargetCache.open(config.cache.path).tile_ids
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
            return np.ascontiguousarray(target), answer(self, view_id, image, inside)[1]

        monkeypatch.setattr(CachedViews, "answer", wrong)
        assert np.abs(losses(config) / online - 1).max() > 100 * LOSS_TOLERANCE[16], name


def test_a_crop_that_is_not_the_one_that_was_answered_is_refused_at_its_first_use(
    make_views, plain_student, monkeypatch
):
    """Whatever has changed: here the change of colours, as another version of its library would."""
    config = make_views(train__photometric=1.0)
    precompute(config, CPU)
    from kdpipe.data import dataset as samples

    changed = samples.change_colours
    monkeypatch.setattr(samples, "change_colours", lambda image, seed: changed(image, seed + 1))
    with pytest.raises(
        StaleCache,
        match=r"view Train/.*/view-0000\S* shows now is not the one .* --repair`, which computes just such views",
    ):
        train(config, CPU)
    assert {finding.code for finding in verify(config, "full", CPU).findings} == {"stale-tile"}
    summary = precompute(config, CPU, repair=True)
    assert summary.computed == 6 * K
    train(config, CPU)


def test_more_views_cost_only_the_new_ones(make_views):
    config = make_views()
    before = precompute(config, CPU)
    files = tree(Path(config.cache.path) / "tiles")
    more = make_views(cache__views=K + 1)
    with pytest.raises(IncompleteCache, match=r"6 missing tiles: Train/\S+/view-0003"):
        train(more, CPU)
    after = precompute(more, CPU)
    assert (before.computed, after.computed, after.kept) == (18, 6, 18)
    assert after.fingerprint != before.fingerprint
    now = tree(Path(config.cache.path) / "tiles")
    assert {name: now[name] for name in files} == files
    assert verify(more, "full", CPU).passes


def test_an_interrupted_run_goes_on_to_the_same_bytes(make_views, tmp_path):
    whole = make_views(cache__path=str(tmp_path / "whole.zarr"))
    precompute(whole, CPU)
    config = make_views()
    stop = threading.Event()

    class StopAfterFour(Lines):
        def bar(self, *args, **options):
            done = []

            def advance(steps=1, **figures):
                done.append(steps)
                if len(done) == 4:
                    stop.set()

            return nullcontext(advance)

    with pytest.raises(Interrupted, match=r"of 18 views are finished and kept"):
        precompute(config, CPU, StopAfterFour(), stop)
    summary = precompute(config, CPU)
    assert 0 < summary.kept < 18
    assert tree(tmp_path / "cache.zarr") == tree(tmp_path / "whole.zarr")


@pytest.fixture
def own_data(landscape, tmp_path):
    """Tiles of this test alone, which it may change."""
    shutil.copytree(landscape, tmp_path / "data")
    return tmp_path / "data/Train"


def edit(file, seconds=3600):
    """Change an image's or mask's first pixels, and give it a time after its tiles'."""
    pixels = np.asarray(Image.open(file)).copy()
    pixels[:24, :24] = pixels[:24, :24].max() - pixels[:24, :24]
    stat = file.stat()
    Image.fromarray(pixels).save(file)
    os.utime(file, (stat.st_atime, stat.st_mtime + seconds))


def findings(config, level):
    return {(finding.code, finding.tile) for finding in verify(config, level, CPU).findings}


def shows(config, tile_id):
    """The ids of the views that show a tile."""
    views = dataset(config)
    return {v.id for v in views.all_views() if tile_id in {views.tiles[t].id for t in views.sources(v)}}


def test_a_changed_image_makes_stale_the_views_that_show_it_where_it_changed_and_no_others(make_views, own_data):
    config = make_views(data__train=[str(own_data)], train__mosaic=0.5)
    precompute(config, CPU)
    before = {view.id: view.pixels() for view in dataset(config).all_views()}
    image = sorted((own_data / "images").iterdir())[0]
    edit(image)
    changed = {view.id for view in dataset(config).all_views() if not np.array_equal(view.pixels(), before[view.id])}
    assert changed
    assert changed <= shows(config, f"Train/{image.stem}")
    assert findings(config, "quick") == findings(config, "full") == {("stale-tile", view) for view in changed}
    with pytest.raises(
        StaleCache, match=r"stale tiles: .*view \d of .* is not the image that the tile was computed from"
    ):
        train(config, CPU)
    summary = precompute(config, CPU)
    assert summary.computed == len(changed)
    assert findings(config, "full") == set()


def test_a_mask_counts_where_it_decides_what_a_crop_shows(make_views, own_data):
    """Where one class may not fill a crop its place depends on the labels; else they are nothing to the teacher."""
    mask = sorted((own_data / "masks").iterdir())[0]
    config = make_views(data__train=[str(own_data)], train__max_class_share=0.3)
    assert any(mask in view.files for view in dataset(config).all_views())
    precompute(config, CPU)
    before = {view.id: view.pixels() for view in dataset(config).all_views()}
    pixels = np.asarray(Image.open(mask)).copy()
    Image.fromarray(np.full_like(pixels, 1)).save(mask)
    os.utime(mask, (mask.stat().st_atime, mask.stat().st_mtime + 3600))
    changed = {view.id for view in dataset(config).all_views() if not np.array_equal(view.pixels(), before[view.id])}
    assert changed
    assert findings(config, "quick") == {("stale-tile", view) for view in changed}
    free = make_views(data__train=[str(own_data)], train__max_class_share=1.0)
    assert not any(mask in view.files for view in dataset(free).all_views())


def test_a_tile_that_comes_or_goes_changes_its_own_views_and_mosaics_alone(make_views, own_data):
    config = make_views(data__train=[str(own_data)], train__mosaic=0.5)
    precompute(config, CPU)
    old = {view.id for view in dataset(config).all_views()}
    image = sorted((own_data / "images").iterdir())[-1]
    mask = own_data / "masks" / image.name
    image.rename(image.with_name("zz.png"))
    mask.rename(mask.with_name("zz.png"))
    new = {view.id for view in dataset(config).all_views()}
    single = {view for view in old if view.count("-") == 1 and not view.startswith(f"Train/{image.stem}/")}
    assert single
    assert single <= new
    expected = {("missing-tile", v) for v in new - old} | {("extra-tile", v) for v in old - new}
    assert findings(config, "quick") == expected
    summary = precompute(config, CPU)
    assert (summary.computed, summary.kept) == (len(new - old), len(new & old))
    # What the old ones left behind is finished tiles that nobody names, not strays.
    assert verify(config, "full", CPU).findings == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train__crop": 32}, r"views\.crop: the cache has 64, the configuration says 32"),
        ({"train__scales": [1.0]}, r"views\.scales: the cache has \[0\.5, .*\], the configuration says \[1\.0\]"),
        ({"train__mosaic": 0.0}, r"views\.mosaic: the cache has 0\.25, the configuration says 0\.0"),
        ({"train__photometric": 1.0}, r"views\.photometric: the cache has 0\.25, the configuration says 1\.0"),
        ({"train__max_class_share": 1.0}, r"views\.max_class_share: the cache has 0\.75, the configuration says 1\.0"),
        ({"classes__ignore_index": 254}, r"views\.ignore_index: the cache has 255, the configuration says 254"),
        ({"distill__temperature": 1.0}, r"temperature: the cache has 2\.0, the configuration says 1\.0"),
        (
            {"distill__teacher_view": "tile", "cache__views": None},
            'teacher_view: the cache has "crop", the configuration says "tile"',
        ),
    ],
)  # fmt: skip
def test_another_recipe_is_refused_naming_what_differs(make_views, views_cache, change, said):
    shutil.copytree(views_cache, "cache.zarr")
    for stage in (precompute, train):
        with pytest.raises(StaleCache, match=said):
            stage(make_views(**change), CPU)
    assert [f.message for f in verify(make_views(**change), "quick", CPU).findings if f.code == "stale-recipe"]
    assert any(
        said.split(":")[0].replace("\\", "") in line
        for line in inspect_cache("cache.zarr", make_views(**change)).differences
    )


def test_keys_that_do_not_make_a_crop_leave_the_cache_as_it_is(make_views, views_cache):
    shutil.copytree(views_cache, "cache.zarr")
    config = make_views(
        seed=9,
        train__epochs=5,
        train__lr=1e-2,
        train__crops_per_tile=2,
        train__batch_size=3,
        distill__alpha=0.2,
        name="other",
    )
    assert precompute(config, CPU).computed == 0
    assert verify(config, "full", CPU).passes
    assert inspect_cache("cache.zarr", config).differences == []


@pytest.fixture(scope="module")
def views_cache(landscape, teacher_file, tmp_path_factory):
    """The cache of `make_views()`, computed once; copy it before use."""
    from helpers.configs import tiny_config

    folder = tmp_path_factory.mktemp("views")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = tiny_config(landscape, teacher_file, folder, distill__teacher_view="crop", cache__views=K)
        precompute(config, CPU)
    return folder / "cache.zarr"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"cache__views": None},
            r"distill\.teacher_view: crop needs cache\.views, how many augmented crops of each tile",
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


def test_a_run_stopped_in_mid_epoch_resumes_to_the_same_weights_bit_for_bit(make_views, views_cache, plain_student):
    """From one cycle of views into the next; the second run starts in the middle of an epoch."""
    shutil.copytree(views_cache, "cache.zarr")
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
    shutil.copytree(views_cache, "cache.zarr")
    here = dataset(make_views(train__workers=2), cached_targets(make_views()))
    there = pickle.loads(pickle.dumps(here))
    for k in (17, 3, 20):
        one, two = here[k], there[k]
        assert one.keys() == two.keys() == {"image", "mask", "inside", "target", "entropy_error"}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_a_run_is_not_resumed_with_another_number_of_views(make_views, views_cache, plain_student):
    shutil.copytree(views_cache, "cache.zarr")
    train(make_views(), CPU)
    with pytest.raises(ConfigError, match=r"cache\.views: was 3, is 2"):
        train(make_views(cache__views=2), CPU, resume=True)


def test_parity_runs_the_teacher_on_the_views_and_compares_them_with_their_own_labels(make_views, views_cache):
    shutil.copytree(views_cache, "cache.zarr")
    config = make_views()
    report = verify(config, "parity", CPU, sample=3)
    assert {finding.code for finding in report.findings} <= {"class-map"}  # the random teacher knows nothing
    assert len(report.parity) == 3
    assert (report.noun, report.tiles, report.label_tiles) == ("views", 6 * K, 6 * K)
    cache = SoftTargetCache.open("cache.zarr")
    expected = np.zeros((6, 6), dtype=int)
    for view in dataset(config).all_views():
        labels, answers = view.labels(), cache.read(view.id).argmax(axis=0)
        for label, answer in zip(labels[labels < 6], answers[labels < 6], strict=True):
            expected[label, answer] += 1
    np.testing.assert_array_equal(report.confusion, expected)


def test_the_entropy_that_rounding_took_is_averaged_over_the_pixels_inside(make_views, views_cache):
    cache = SoftTargetCache.open(str(views_cache))
    views = dataset(make_views())
    view = next(v for v in views.all_views() if not views.render(v.plan())["inside"].all())
    sample = views.render(view.plan())
    units, exact = cache.read(view.id).astype(np.float64), live_targets(make_views())
    probs = exact.answer(view.id, sample["image"], sample["inside"])[0].astype(np.float64)
    lost = (units * np.log(np.maximum(units, 1e-30)) - probs * np.log(np.maximum(probs, 1e-30))).sum(axis=0)
    # One block of 64 px: the mean of the whole crop stands for that of the pixels inside.
    assert CachedViews(cache).answer(view.id, sample["image"], sample["inside"])[1] == pytest.approx(
        lost.mean(), abs=2e-6
    )
    blocks, inside = np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros((100, 70), dtype=bool)
    inside[:64, :64] = inside[90:, 64:] = True
    assert mean_over_pixels(blocks, inside) == (64 * 64 * 1 + 10 * 6 * 4) / (64 * 64 + 10 * 6)


def test_a_reader_written_from_the_page_alone_reads_views(views_cache):
    plain = plain_reader.Cache(views_cache)
    cache = SoftTargetCache.open(str(views_cache))
    assert cache.manifest.format_version == "4.1"
    for view in cache.tile_ids:
        np.testing.assert_array_equal(plain.read(view), cache.read_units(view))


def test_the_digest_in_the_cache_is_that_of_the_pixels_and_the_files_sizes(make_views, views_cache):
    records = {record.id: record for record in SoftTargetCache.open(str(views_cache)).manifest.tiles}
    for view in dataset(make_views()).all_views():
        assert records[view.id].image.sha256 == hashlib.sha256(view.pixels().tobytes()).hexdigest()
        assert records[view.id].image.size_bytes == sum(len(file.read_bytes()) for file in view.files)


def test_a_dry_run_and_inspect_speak_of_views(make_views, views_cache):
    forecast = estimate(make_views(train__mosaic=0.0), CPU)
    text = estimate_text(forecast)
    assert "18 views, 0 finished, 18 to do (0.1 MP)" in text
    assert " s a crop\n" in text
    assert "(--kd online)\n" in text
    assert "whole tiles" not in text
    assert forecast.worth.views_per_sample == 1
    row = next(t for t in cache_tables(inspect_cache(str(views_cache))))
    assert "views" in list(row.columns[0].cells)
    assert any("mosaic 0.25" in cell for cell in row.columns[1].cells)


def test_a_file_that_changes_while_its_views_are_computed_is_a_failure_and_not_a_guess(
    make_views, own_data, monkeypatch
):
    config = make_views(data__train=[str(own_data)], train__mosaic=0.0, train__max_class_share=1.0)
    image = sorted((own_data / "images").iterdir())[0]
    pixels = RecordedView.pixels

    def changing(view):
        if image in view.files and view.number == 1:
            copy = shutil.copy(image, own_data / image.name)
            edit(Path(copy))
            Path(copy).replace(image)  # at once: the other reader may have the file open
        return pixels(view)

    monkeypatch.setattr(RecordedView, "pixels", changing)
    failed = precompute(config, CPU).failed
    # The other reader may have had the views beside it.
    assert f"Train/{image.stem}/view-0001" in failed
    assert all(view.startswith(f"Train/{image.stem}/") for view in failed)
    assert all(cause == f"{image} changed while it was read" for cause in failed.values())
