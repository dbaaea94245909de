"""A cache of logits: any temperature and class map, within the stated bound, and damage is found as in any other cache."""

import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.configs import tiny_config
from helpers.doubles import Plain
from helpers.files import tree, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache import CorruptCache, Softening, SoftTargetCache, StaleCache, codec
from kdpipe.cache.encoding.logits import DEPTH, decode, encode, error_bound, logit_bound, soft_targets
from kdpipe.configs import dump_config
from kdpipe.configs.errors import ConfigError
from kdpipe.data.rasters import read_image
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.inspection.statistics import compute_statistics, open_as_predicted
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe, configured_softening
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
BITS = [8, 16]


def exact(logits, temperature, class_map):
    """(softmax(z) @ M)^(1/T), normalised, in float64."""
    weights = np.exp((logits - logits.max(axis=0)).astype(float))
    mapped = np.einsum("t...,ts->s...", weights / weights.sum(axis=0), np.asarray(class_map, dtype=float))
    softened = mapped ** (1 / temperature)
    return softened / softened.sum(axis=0)


def random_map(rows, columns, rng):
    return rng.dirichlet(np.full(columns, 0.3), size=rows).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_an_integer_is_the_square_root_of_the_depth_below_the_largest_logit(bits):
    depths, top = [0, 1, 2.5, 12.25, DEPTH[bits], 99], 2**bits - 1
    stored = encode(np.array([7 - depth for depth in depths], dtype=np.float32)[:, None, None], bits)
    by_hand = [top - round(top * (min(depth, DEPTH[bits]) / DEPTH[bits]) ** 0.5) for depth in depths]
    assert (stored.dtype, stored.ravel().tolist()) == (np.dtype(f"uint{bits}"), by_hand)
    back = decode(stored, bits).ravel()
    assert back[0] == 0
    assert np.abs(back[:5] + depths[:5]).max() <= logit_bound(bits)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(
    st.integers(2, 12), st.floats(0.1, 40), st.floats(0.25, 8), st.sampled_from(BITS), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_probabilities_stay_within_the_stated_bound(num_classes, spread, temperature, bits, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((num_classes, 8, 9)) * spread).astype(np.float32)
    class_map = random_map(num_classes, int(rng.integers(2, 7)), rng)
    found = soft_targets(encode(logits, bits), bits, Softening(temperature, class_map))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=2e-6)
    difference = np.abs(found - exact(logits, temperature, class_map)).max()
    assert difference <= error_bound(bits, num_classes, class_map.shape[1], temperature)


def worst(num_classes, temperature, bits):
    """
    The largest error in the worst case of rounding: the depths of a set S of classes lie just past the middle between two stored
    depths, and those of all other classes just short of it.
    """
    step = np.arange(1, 2**bits - 1, max(1, 2**bits // 256))
    one, other = (DEPTH[bits] * ((step + half) / (2**bits - 1)) ** 2 for half in (0.49, -0.49))
    largest = 0.0
    for inside in range(1, num_classes):  # how many classes S has, beside the largest or without it
        grid_S, grid_R = (depth[:, None] for depth in (one, other)), (depth[None, :] for depth in (other, one))
        for in_S, in_R in zip(grid_S, grid_R, strict=True):
            logits = np.zeros((num_classes, len(step), len(step)), dtype=np.float32)
            logits[1 : 1 + inside] = -in_S
            logits[1 + inside :] = -in_R
            for members in (range(1, 1 + inside), [0, *range(1, 1 + inside)]):
                class_map = np.array([[i in members, i not in members] for i in range(num_classes)], dtype=np.float32)
                found = soft_targets(encode(logits, bits), bits, Softening(temperature, class_map))
                largest = max(largest, float(np.abs(found - exact(logits, temperature, class_map)).max()))
    return largest


@pytest.mark.parametrize(("num_classes", "temperature"), [(2, 1.0), (4, 1.0), (4, 2.0), (8, 2.0)])
def test_the_worst_case_of_rounding_is_within_the_bound_and_near_it(num_classes, temperature):
    found, stated = worst(num_classes, temperature, 8), error_bound(8, num_classes, 2, temperature)
    assert 0.5 * stated < found <= stated


@pytest.mark.parametrize("bits", BITS)
def test_logits_beyond_the_largest_stored_depth_are_within_the_bound(bits):
    """All classes but one are far deeper, at a temperature at which the largest stored depth still has a probability."""
    logits = np.full((5, 1, 1), -1e6, dtype=np.float32)
    logits[2] = 3
    temperature = DEPTH[bits] / 4
    found = soft_targets(encode(logits, bits), bits, Softening(temperature, np.eye(5, dtype=np.float32)))
    error = np.abs(found - exact(logits, temperature, np.eye(5))).max()
    assert 0.9 * 4 * np.exp(-4) < error <= error_bound(bits, 5, 5, temperature)


def test_the_page_states_these_bounds():
    page = (Path(__file__).parents[2] / "cache/FORMAT.md").read_text()
    by_bits = [", ".join(f"{error_bound(bits, 8, 6, t):.3g}" for t in (1, 2, 4)) for bits in BITS]
    assert f"For 8 teacher and 6 student classes at T 1, 2, 4: {by_bits[0]} with 8 bits, {by_bits[1]} with 16." in page


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = np.zeros((3, 4, 5), dtype=np.float32)
    logits[1, 2, 3] = bad
    with pytest.raises(ValueError, match="logits must be finite"):
        encode(logits, 8)


def test_a_scene_encoded_in_bands_has_the_same_values(monkeypatch):
    logits = np.random.default_rng(0).standard_normal((5, 300, 70)).astype(np.float32)
    whole = encode(logits, 8)
    monkeypatch.setattr("kdpipe.cache.encoding.simplex.BAND_PX", 64 * 70 * 2)
    np.testing.assert_array_equal(encode(logits, 8), whole)


@pytest.fixture(scope="module")
def finished_logits(landscape, teacher_file, tmp_path_factory):
    """Finished caches of logits by bits, computed once."""
    folder, paths = tmp_path_factory.mktemp("logits"), {}
    for bits in BITS:
        config = tiny_config(
            landscape,
            teacher_file,
            folder,
            cache__kind="logits",
            cache__bits=bits,
            cache__path=str(folder / f"{bits}.zarr"),
        )
        precompute(config, CPU)
        paths[bits] = config.cache.path
    return paths


@pytest.fixture
def logits_config(make_config, finished_logits):
    """A function from overrides to a config of logits, at T 2 unless they say otherwise, whose cache is complete."""

    def make(**overrides):
        config = make_config(**{"cache__kind": "logits", **overrides})
        if not Path(config.cache.path).exists():
            shutil.copytree(finished_logits[config.cache.bits], config.cache.path)
        return config

    return make


OTHER_MAP = {"Tree": {"Forest": 0.5, "SemiNatural": 0.5}, "Road": {"Background": 1}}


@pytest.mark.long
@pytest.mark.parametrize("bits", BITS)
def test_one_cache_gives_the_teachers_soft_targets_at_any_temperature_and_class_map(logits_config, bits):
    config = logits_config(cache__bits=bits)
    before = tree(Path(config.cache.path))
    fingerprints = set()
    for temperature, rows in itertools.product((1.0, 2.0, 4.0), ({}, OTHER_MAP)):
        changes = {f"class_map__{name}": row for name, row in rows.items()}
        asked = logits_config(cache__bits=bits, distill__temperature=temperature, **changes)
        again = precompute(asked, CPU)
        assert (again.computed, again.kept) == (0, 6)
        fingerprints.add(again.fingerprint)
        teacher = open_teacher(asked, complete_recipe(asked, None, None), CPU)
        cache = SoftTargetCache.open(asked.cache.path, configured_softening(asked))
        for tile in list_tiles(asked.data, "train")[:2]:
            live = teacher.soft_targets(read_image(tile.image)[None])[0]
            assert np.abs(cache.read(tile.id) - live).max() <= error_bound(bits, 8, 6, temperature)
            window = (3, 5, 40, 30)
            np.testing.assert_array_equal(cache.read(tile.id, window), cache.read(tile.id)[:, 3:43, 5:35])
    assert len(fingerprints) == 1
    assert tree(Path(config.cache.path)) == before


@pytest.mark.long
def test_averages_over_views_windows_and_teachers_are_taken_before_the_cache(make_config, tmp_path):
    """The mean is taken of logits, so a cache computed at T 2 gives the soft targets of a live teacher at T 3."""
    raw = make_config().teacher.model_dump()
    members = [raw, raw | {"tta": "flips", "weight": 2.0, "scales": [1.0, 1.5], "window": 64}]
    write_image(tmp_path / "one/Mine/images/a.png", 70, 90)
    data = {"data__train": [str(tmp_path / "one/Mine")], "data__allow_missing_masks": True}
    options = {"teacher": None, "teachers": members, "cache__bits": 16, **data}
    precompute(make_config(cache__kind="logits", **options), CPU)
    config = make_config(cache__kind="logits", **options, distill__temperature=3.0)
    teacher = open_teacher(config, complete_recipe(config, None, None), CPU)
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    tile = list_tiles(config.data, "train")[0]
    live = teacher.soft_targets(read_image(tile.image)[None])[0]
    assert np.abs(cache.read(tile.id) - live).max() <= error_bound(16, 8, 6, 3.0)


@pytest.mark.long
def test_another_temperature_and_class_map_pass_the_gate_and_train_without_the_teacher(logits_config, monkeypatch):
    config = logits_config(train__max_steps=2)
    other = logits_config(
        train__max_steps=2,
        distill__temperature=1.0,
        class_map__Road={"Background": 1},
        class_map__Tree={"Background": 1},
        name="other",
    )
    for level in ("quick", "full", "parity"):
        report = verify(other, level, CPU, sample=2)
        # The teacher is random, so its predictions may contradict the labels.
        assert {finding.code for finding in report.findings} <= {"class-map"}
        assert report.error_bound == error_bound(8, 8, 6, 1.0)
    assert len(report.parity) == 2
    assert all(measure.passes for row in report.parity for measure in row.measures().values())
    monkeypatch.setattr(
        "kdpipe.pipeline.training.targets.open_teacher", lambda *arguments: pytest.fail("the teacher was loaded")
    )
    one, two = train(config, CPU), train(other, CPU)
    assert one.fingerprint == two.fingerprint
    assert np.abs(np.array(one.losses) / two.losses - 1).min() > 1e-2


@pytest.mark.long
def test_a_run_is_not_resumed_at_another_temperature(logits_config):
    config = logits_config(train__max_steps=1)
    train(config, CPU)
    with pytest.raises(ConfigError, match=r"distill\.temperature: was 2\.0, is 1\.0"):
        train(logits_config(train__max_steps=1, distill__temperature=1.0), CPU, resume=True)


@pytest.mark.long
def test_cached_and_online_losses_agree_at_every_step(logits_config, monkeypatch):
    """Within 1e-3, as for soft targets, but without a correction of the entropy."""
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: Plain())
    small = {"train__lr": 1e-4, "train__backbone_lr": 1e-5, "train__max_steps": 4, "data__val": []}
    caches = [{"cache__bits": bits, "cache__path": f"{bits}.zarr"} for bits in BITS]
    for temperature in (1.0, 4.0):
        runs = []
        for number, (mode, cache) in enumerate([("online", {}), *(("cached", cache) for cache in caches)]):
            config = logits_config(
                **small, **cache, distill__temperature=temperature, name=f"T{temperature:.0f}-{number}"
            )
            runs.append(train(with_mode(config, mode), CPU).losses)
        for cached in runs[1:]:
            np.testing.assert_allclose(cached, runs[0], rtol=1e-3)


def test_soft_targets_and_logits_do_not_share_a_cache(logits_config, make_config, finished_cache):
    logits_config()
    with pytest.raises(StaleCache, match=r'kind: the cache has "logits", the configuration says "soft"\. Restore the'):
        precompute(make_config(cache__kind="soft"), CPU)
    with pytest.raises(StaleCache, match="teacher.normalize_mean"):
        precompute(logits_config(teacher__normalize="imagenet"), CPU)
    shutil.copytree(finished_cache, "soft.zarr")
    with pytest.raises(StaleCache, match=r'kind: the cache has "soft", the configuration says "logits"\. Restore the'):
        precompute(logits_config(cache__path="soft.zarr"), CPU)


def test_logits_have_a_format_version_and_a_recipe_of_their_own(logits_config):
    config = logits_config()
    manifest, root = (
        json.loads((Path(config.cache.path) / name).read_text()) for name in ("manifest.json", "zarr.json")
    )
    assert manifest["format_version"] == root["attributes"]["kdpipe"]["format_version"] == "2.2"
    assert not {"classes", "class_map", "temperature"} & set(manifest["recipe"])
    assert manifest["error_bound"] == logit_bound(8)


@pytest.mark.long
def test_zeros_in_place_of_missing_data_are_found(make_config, monkeypatch):
    """Every digest and checksum vouches for the tile."""

    def with_a_hole(units, recipe):
        units, lost = encode_values(units, recipe)
        units[:, 10:20, 10:20] = 0
        return units, lost

    encode_values = codec.encode
    monkeypatch.setattr(codec, "encode", with_a_hole)
    config = make_config(cache__kind="logits")
    precompute(config, CPU)
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    assert cache.read(cache.tile_ids[0], (20, 20, 30, 30)).shape == (6, 30, 30)
    with pytest.raises(CorruptCache, match="a chunk is missing, or pixels have no class of the largest logit"):
        cache.read(cache.tile_ids[0], (0, 0, 30, 30))
    assert {finding.code for finding in verify(config, "full", CPU).findings} == {"damaged-tile"}


@pytest.mark.long
def test_resumed_and_repaired_the_bytes_are_the_same(logits_config):
    config = logits_config()
    folder = Path(config.cache.path)
    before, tiles = tree(folder), sorted(folder.glob("tiles/Train/*/zarr.json"))
    (folder / "manifest.json").unlink()
    tiles[0].unlink()
    assert precompute(config, CPU).computed == 1
    assert tree(folder) == before
    shard = tiles[1].parent / "0.0.0"
    shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
    summary = precompute(config, CPU, repair=True)
    assert list(summary.damaged) == [f"Train/{tiles[1].parent.name}"]
    assert tree(folder) == before


def test_a_reader_explains_why_it_cannot_convert(logits_config, finished_cache):
    config, soft = logits_config(), str(finished_cache)
    cache = SoftTargetCache.open(config.cache.path)
    with pytest.raises(
        ConfigError, match=r"holds logits, and soft targets need a temperature .* Softening\(temperature, class_map\)"
    ):
        cache.read(cache.tile_ids[0])
    with pytest.raises(ConfigError, match=r"the class map has 3 rows, and .* 8 channels: \['Tree'"):
        SoftTargetCache.open(config.cache.path, Softening(2.0, np.eye(3, dtype=np.float32)))
    with pytest.raises(
        ConfigError, match="holds soft targets, from which logits cannot be recovered: .* cache.kind: logits"
    ):
        SoftTargetCache.open(soft).read_logits(cache.tile_ids[0])
    with pytest.raises(ConfigError, match="holds soft targets of temperature 2, which cannot be changed"):
        SoftTargetCache.open(soft, configured_softening(config))


def test_an_unpickled_cache_keeps_its_softening(logits_config):
    config = logits_config()
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config))
    tile = cache.tile_ids[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache)).read(tile), cache.read(tile))


@pytest.mark.long
def test_statistics_are_those_of_the_teachers_classes(logits_config):
    config = logits_config(cache__bits=16)
    found = compute_statistics(open_as_predicted(config.cache.path))
    assert found.classes == config.teacher.classes
    cache = SoftTargetCache.open(config.cache.path)
    probs = np.concatenate(
        [exact(cache.read_logits(tile), 1.0, np.eye(8)).reshape(8, -1) for tile in cache.tile_ids], axis=1
    )
    np.testing.assert_allclose(found.shares, probs.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(
        found.argmax_shares, np.bincount(probs.argmax(axis=0), minlength=8) / probs.shape[1], atol=1e-3
    )
    assert found.entropy == pytest.approx(-(probs * np.log(probs)).sum(axis=0).mean(), abs=1e-5)
    assert found.confidence == pytest.approx(probs.max(axis=0).mean(), abs=1e-5)
    assert sum(found.entropy_histogram) == sum(found.confidence_histogram) == probs.shape[1]


def test_inspect_describes_a_cache_of_logits(logits_config, tmp_path):
    config = logits_config()
    (tmp_path / "c.yaml").write_text(dump_config(config))
    asked = ["--stats", "--diff", "c.yaml", "--set", "distill.temperature=4"]
    done = CliRunner().invoke(cli, ["inspect", config.cache.path, *asked])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "logits, 8 bits, |Δz| at most 0.1256, |Δp| at most 0.01357 at T 1" in said
    assert "channels: Tree, Rangeland" in said
    assert "the configuration describes this cache" in said
    assert "The teacher's classes, at T 1" in said
    assert "entropy lost" not in said
