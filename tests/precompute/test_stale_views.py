"""Stale views: what changes a crop makes just its views stale, and no crop is ever taken for another."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import tree
from helpers.views import K, dataset, rendered
from PIL import Image

from kdpipe.cache import IncompleteCache, SoftTargetCache, StaleCache
from kdpipe.configs.errors import ConfigError
from kdpipe.data import dataset as samples
from kdpipe.data.recorded_views import RecordedView
from kdpipe.pipeline.inspection.cache import inspect_cache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


@pytest.fixture
def own_data(landscape, tmp_path):
    """Tiles of this test alone, which it may change."""
    shutil.copytree(landscape, tmp_path / "data")
    return tmp_path / "data/Train"


def edit(file, seconds=3600):
    """Change an image's first pixels, and date it after its tiles."""
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


@pytest.mark.long
def test_a_crop_other_than_the_predicted_one_is_refused_at_its_first_use(make_views, plain_student, monkeypatch):
    """Here the colours change, as with another version of their library."""
    config = make_views(train__photometric=1.0, train__max_steps=2)
    precompute(config, CPU)
    changed = samples.change_colours
    monkeypatch.setattr(samples, "change_colours", lambda image, seed: changed(image, seed + 1))
    with pytest.raises(
        StaleCache,
        match=r"view Train/.*/view-0000\S* shows now is not the one .* --repair`, which computes only such views",
    ):
        train(config, CPU)
    assert {finding.code for finding in verify(config, "full", CPU).findings} == {"stale-tile"}
    summary = precompute(config, CPU, repair=True)
    assert summary.computed == 6 * K
    train(config, CPU)


def test_more_views_cost_only_the_new_ones(make_views, views_cache):
    config = make_views()
    before = SoftTargetCache.open(config.cache.path).manifest
    files = tree(views_cache / "tiles")
    more = make_views(cache__views=K + 1)
    with pytest.raises(IncompleteCache, match=r"6 missing tiles: Train/\S+/view-0003"):
        train(more, CPU)
    after = precompute(more, CPU)
    assert (after.computed, after.kept) == (6, 18)
    assert after.fingerprint != before.fingerprint
    now = tree(views_cache / "tiles")
    assert {name: now[name] for name in files} == files
    assert verify(more, "full", CPU).passes


@pytest.mark.long
def test_a_changed_image_makes_exactly_the_views_stale_that_show_the_change(make_views, own_data):
    config = make_views(data__train=[str(own_data)], train__mosaic=0.5)
    precompute(config, CPU)
    before = rendered(config)
    image = sorted((own_data / "images").iterdir())[0]
    edit(image)
    changed = {view for view, pixels in rendered(config).items() if not np.array_equal(pixels, before[view])}
    assert changed
    assert changed <= shows(config, f"Train/{image.stem}")
    assert findings(config, "quick") == findings(config, "full") == {("stale-tile", view) for view in changed}
    with pytest.raises(
        StaleCache, match=r"stale tiles?: .*view \d of .* is not the image that the tile was computed from"
    ):
        train(config, CPU)
    summary = precompute(config, CPU)
    assert summary.computed == len(changed)
    assert findings(config, "full") == set()


@pytest.mark.long
def test_a_mask_counts_where_it_decides_what_a_crop_shows(make_views, own_data):
    """The labels decide where a crop lies if a class may not fill it; else the teacher does not depend on them."""
    mask = sorted((own_data / "masks").iterdir())[0]
    config = make_views(data__train=[str(own_data)], train__max_class_share=0.3)
    assert any(mask in view.files for view in dataset(config).all_views())
    precompute(config, CPU)
    before = rendered(config)
    pixels = np.asarray(Image.open(mask)).copy()
    Image.fromarray(np.full_like(pixels, 1)).save(mask)
    os.utime(mask, (mask.stat().st_atime, mask.stat().st_mtime + 3600))
    changed = {view for view, pixels in rendered(config).items() if not np.array_equal(pixels, before[view])}
    assert changed
    assert findings(config, "quick") == {("stale-tile", view) for view in changed}
    free = make_views(data__train=[str(own_data)], train__max_class_share=1.0)
    assert not any(mask in view.files for view in dataset(free).all_views())


@pytest.mark.long
def test_an_added_or_removed_tile_changes_only_its_own_views_and_mosaics(make_views, own_data):
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
    # The old views are left behind as finished tiles that the manifest does not name, which is no finding.
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
    for stage in (precompute, train):
        with pytest.raises(StaleCache, match=said):
            stage(make_views(**change), CPU)
    assert [f.message for f in verify(make_views(**change), "quick", CPU).findings if f.code == "stale-recipe"]
    assert any(
        said.split(":")[0].replace("\\", "") in line
        for line in inspect_cache("cache.zarr", make_views(**change)).differences
    )


def test_keys_that_do_not_make_a_crop_leave_the_cache_as_it_is(make_views, views_cache):
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


def test_a_run_is_not_resumed_with_another_number_of_views(make_views, views_cache, plain_student):
    train(make_views(train__max_steps=1), CPU)
    with pytest.raises(ConfigError, match=r"cache\.views: was 3, is 2"):
        train(make_views(train__max_steps=1, cache__views=2), CPU, resume=True)


def test_a_file_that_changes_while_its_views_are_computed_fails_them(make_views, own_data, monkeypatch):
    config = make_views(data__train=[str(own_data)], train__mosaic=0.0, train__max_class_share=1.0)
    image = sorted((own_data / "images").iterdir())[0]
    pixels = RecordedView.pixels

    def changing(view):
        if image in view.files and view.number == 1:
            copy = shutil.copy(image, own_data / image.name)
            edit(Path(copy))
            Path(copy).replace(image)  # atomically: the other reader may have the file open
        return pixels(view)

    monkeypatch.setattr(RecordedView, "pixels", changing)
    failed = precompute(config, CPU).failed
    # The other reader may have been at other views of the tile.
    assert f"Train/{image.stem}/view-0001" in failed
    assert all(view.startswith(f"Train/{image.stem}/") for view in failed)
    assert all(cause == f"{image} changed while it was read" for cause in failed.values())
