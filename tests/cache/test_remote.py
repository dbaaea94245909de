"""A cache on S3 (moto's server on loopback, behind a faulty proxy): the same bytes as a local one, or an error with advice."""

import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import caches
from helpers.caches import RECIPE, distributions, fill, objects
from helpers.doubles import StopAfter
from helpers.files import tree

from kdpipe.cache import CacheLocked, CacheUnreachable, CorruptCache, IncompleteCache, SoftTargetCache
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.storage import remote
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import open_writer
from kdpipe.configs import dump_config
from kdpipe.configs.errors import ConfigError, Interrupted
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.verify.gate import verify

pytest.importorskip("moto", reason="needs moto[server] and s3fs: pip install '.[dev]'")
pytest.importorskip("s3fs", reason="needs s3fs: pip install '.[s3]'")
from helpers.faulty_server import every

pytestmark = pytest.mark.timeout(300)  # seconds on a loaded machine; otherwise each test takes a few
CPU = torch.device("cpu")
FAULTS = ["503", "cut upload", "500", "lost", "cut"]


def upload(folder, url):
    """Put the files of a finished local cache below a URL."""
    storage = open_storage(url)
    for name, data in tree(folder).items():
        storage.write(name, data)
    return storage


@pytest.mark.long
def test_stage_one_and_the_gate_on_a_failing_network_make_the_bytes_of_a_local_cache(
    make_config, finished_cache, s3, one_client
):
    away = make_config(cache__path=s3.url)
    s3.fault = every(5, FAULTS)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        precompute(away, CPU, StopAfter(1, stop), stop)
    with pytest.raises(IncompleteCache, match="is not finished"):
        SoftTargetCache.open(s3.url)
    assert not verify(away, "quick", CPU).passes
    resumed = precompute(away, CPU)
    assert resumed.kept >= 1
    assert resumed.computed == 6 - resumed.kept
    assert verify(away, "quick", CPU).passes
    assert verify(away, "full", CPU).passes
    s3.fault = lambda method, path: None
    assert objects(s3.url) == tree(finished_cache)
    assert open_storage(f"{s3.url}.lock").info("") is None


@pytest.mark.long
def test_inspect_describes_a_cache_on_s3_like_a_local_one(
    cached, make_config, finished_cache, s3, one_client, tmp_path
):
    upload(finished_cache, s3.url)
    s3.fault = every(5, FAULTS)
    said = []
    for number, config in enumerate((cached, make_config(cache__path=s3.url))):
        path = config.cache.path
        (tmp_path / "c.yaml").write_text(dump_config(config))
        target = tmp_path / f"{number}.json"
        for options in ([], ["--diff", tmp_path / "c.yaml"], ["--stats"]):
            result = CliRunner().invoke(
                cli, ["inspect", path, *map(str, options), "--json", str(target)], catch_exceptions=False
            )
            assert result.exit_code == 0, result.output
            said.append(json.loads(target.read_text().replace(path, "PATH")))
    assert said[:3] == said[3:]


@pytest.mark.long
def test_repair_restores_the_bytes_of_a_damaged_object(make_config, finished_cache, s3, one_client):
    config, before = make_config(cache__path=s3.url), tree(finished_cache)
    storage = upload(finished_cache, s3.url)
    name = next(name for name in before if name.endswith("/0.0.0"))
    tile = name.removeprefix("tiles/").removesuffix("/0.0.0")
    storage.write(name, before[name][:-1] + bytes([before[name][-1] ^ 1]))
    assert [finding.tile for finding in verify(config, "full", CPU).findings] == [tile]
    with pytest.raises(CorruptCache, match=tile):
        SoftTargetCache.open(s3.url).read(tile)
    s3.fault = every(6, FAULTS)
    assert list(precompute(config, CPU, repair=True).damaged) == [tile]
    s3.fault = lambda method, path: None
    assert objects(s3.url) == before


@pytest.mark.long
def test_spawned_workers_train_from_s3_to_the_weights_of_a_local_cache(
    make_config, cached, finished_cache, s3, tmp_path
):
    from kdpipe.pipeline.training.run import train

    upload(finished_cache, s3.url)
    weights = []
    for path, workers in ((cached.cache.path, 0), (s3.url, 1)):
        config = make_config(cache__path=path, train__workers=workers, train__epochs=1, name=f"run{workers}")
        train(config, CPU)
        (last,) = tmp_path.rglob(f"*run{workers}*/last.ckpt")
        weights.append(torch.load(last, weights_only=False))
    for key, value in weights[0]["state_dict"].items():
        torch.testing.assert_close(weights[1]["state_dict"][key], value, rtol=0, atol=0)


@pytest.mark.long
def test_uploads_that_stop_at_any_point_leave_no_half_written_cache(s3, one_client, tmp_path, images, monkeypatch):
    """From the n-th change on the server fails, for every n: between shard and receipt, and before the manifest, too."""
    two = ("Train/a", "Other/c")  # enough to stop within a tile, between two, and after the last
    monkeypatch.setattr(caches, "SIZES", {tile: caches.SIZES[tile] for tile in two})
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    fill(tmp_path / "c.zarr", images)
    expected = tree(tmp_path / "c.zarr")
    for n in range(1, 100):
        url, seen = f"{s3.url}-{n}", [0]

        def fault(method, path, n=n, seen=seen):
            seen[0] += method == "PUT"
            return ("cut upload", "503")[n % 2] if seen[0] >= n else None

        s3.fault = fault
        try:
            fill(url, images)
            break
        except CacheUnreachable:
            s3.fault = lambda method, path: None
            with pytest.raises(IncompleteCache):
                SoftTargetCache.open(url)
            fill(url, images)  # takes over the lock, which could not be deleted
            assert objects(url) == expected
    assert n > len(expected)  # each file, and the lock


def test_there_is_no_manifest_while_tiles_are_rewritten(s3, one_client, images):
    fill(s3.url, images)
    cache = SoftTargetCache.open(s3.url)
    tile = cache.tile_ids[0]
    fill(s3.url, images, finish=False)
    with pytest.raises(IncompleteCache, match="is not finished"):
        SoftTargetCache.open(s3.url)
    storage = open_storage(s3.url)
    storage.write(f"tiles/{tile}/0.0.0", b"other")
    with pytest.raises(IncompleteCache, match="is not what was written.*a run has begun to write the cache since"):
        SoftTargetCache(storage, cache.manifest).read(tile)


@pytest.mark.long
def test_a_window_requests_only_its_chunks(s3, reader, tmp_path):
    probs = distributions(len(RECIPE.classes), 1024, 1024)
    with open_writer(open_storage(s3.url), RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        s3.count()
        record = writer.write("T/a", probs, ImageDigest(size_bytes=1, sha256="0" * 64))
        written = s3.count()
        writer.finish([record])
    assert written == {"PUT": 2, "GET": 2}, "a shard, a receipt, and two listings of the empty place"
    cache = SoftTargetCache.open(s3.url)
    s3.count()
    cache.read("T/a", window=(0, 0, 100, 100))
    transferred = sum(size for _, _, size in s3.requests)
    assert s3.count() == {"GET": 3}, "metadata and the shard's index, then a chunk"
    assert transferred < 0.2 * record.shard_bytes, "1 of 16 chunks, and the metadata"
    cache.read("T/a", window=(200, 200, 100, 100))
    transferred = sum(size for _, _, size in s3.requests)
    if reader == "obstore":
        assert s3.count() == {"GET": 1}, "chunks near each other, with what lies between them"
        assert transferred < 0.45 * record.shard_bytes, "6 of 16 chunks"
    else:
        assert s3.count() == {"GET": 4}, "a chunk each"
        assert transferred < 0.3 * record.shard_bytes, "4 of 16 chunks"

    if reader == "s3fs":
        all_four = threading.Barrier(4)
        s3.fault = lambda method, path: all_four.wait(timeout=20) and None
    np.testing.assert_allclose(
        cache.read("T/a", window=(300, 300, 400, 400)), probs[:, 300:700, 300:700], atol=cache.manifest.error_bound
    )
    if reader == "s3fs":
        assert s3.count() == {"GET": 4}, "all at once: a request that waited for another would break the barrier"
    np.testing.assert_allclose(cache.read("T/a"), probs, atol=cache.manifest.error_bound)


def test_quick_verification_and_a_run_without_work_list_the_cache_instead_of_asking_for_each_tile(
    make_config, finished_cache, s3
):
    away = make_config(cache__path=s3.url)
    upload(finished_cache, s3.url)
    s3.count()
    assert verify(away, "quick", CPU).passes
    assert s3.count() == {"GET": 4}, "the manifest, the topmost group by digest and by content, and one listing"
    assert precompute(away, CPU).computed == 0
    assert s3.count() == {"GET": 5}, "the manifest, the topmost group, and listings of folder, cache and partial files"


@pytest.mark.long
def test_one_of_many_writers_that_start_at_once_gets_the_lock(s3):
    def attempt(n):
        try:
            open_storage(f"{s3.url}.lock").create("", b"%d" % n)
        except FileExistsError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(attempt, range(8))) == 1


def test_an_object_whose_creation_lost_its_response_is_created_once(s3):
    answers = iter(["lost", None, "lost"])
    s3.fault = lambda method, path: next(answers, None) if method == "PUT" else None
    lock = open_storage(f"{s3.url}.lock")
    lock.create("", b"mine")
    with pytest.raises(FileExistsError):
        lock.create("", b"yours")
    assert lock.read("") == b"mine"


@pytest.mark.long
def test_the_second_writer_is_told_who_writes(make_config, s3):
    holder = rf"is being written by process {os.getpid()} on {socket.gethostname()} since"
    with writer_lock(open_storage(s3.url)), pytest.raises(CacheLocked, match=holder):
        precompute(make_config(cache__path=s3.url), CPU)


def test_the_lock_of_a_dead_process_is_taken_over_unless_it_is_of_another_host(s3):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    holder = {"host": socket.gethostname(), "pid": int(child.stdout), "since": "yesterday"}
    lock = open_storage(f"{s3.url}.lock")
    lock.write("", json.dumps(holder).encode())
    with writer_lock(open_storage(s3.url)):
        assert json.loads(lock.read(""))["pid"] == os.getpid()
    assert lock.info("") is None
    lock.write("", json.dumps(holder | {"host": "elsewhere"}).encode())
    with pytest.raises(CacheLocked, match=r"on elsewhere since yesterday; .* delete s3://.*c\.zarr\.lock"):  # noqa: SIM117
        with writer_lock(open_storage(s3.url)):
            pass


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("503", r"reading s3://.*/manifest\.json: 3 attempts failed .*check the network"),
        ("slow", r"3 attempts failed \(ReadTimeoutError"),
        ("cut", r"3 attempts failed \(ClientPayloadError"),
        ("denied", r"access was refused .*may list, read, write and delete"),
    ],
)
def test_a_server_that_does_not_respond_is_named_with_advice(s3, images, monkeypatch, caplog, fault, said):
    fill(s3.url, images)
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    if fault == "slow":
        monkeypatch.setattr(remote, "ANSWER_SECONDS", 1)
    s3.fault = lambda method, path: fault
    s3.count()
    with pytest.raises(CacheUnreachable, match=said):
        SoftTargetCache.open(s3.url)
    assert s3.count().total() <= 4, "what obstore cannot read at first, s3fs tries as well"
    assert len(caplog.records) == (fault != "denied"), "one line for all attempts"


@pytest.mark.long
def test_a_request_whose_response_is_late_is_repeated(s3, images, monkeypatch):
    fill(s3.url, images)
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 1)
    answers = iter(["slow"])  # only the first
    s3.fault = lambda method, path: next(answers, None)
    assert SoftTargetCache.open(s3.url).tile_ids == list(images)


def test_a_mistyped_bucket_is_named_and_not_created(s3, images):
    with pytest.raises(CacheUnreachable, match="there is no such bucket .*correct cache.path"):
        fill("s3://mistyped/c.zarr", images)
    with pytest.raises(CacheUnreachable, match="there is no such bucket"):  # still
        fill("s3://mistyped/c.zarr", images)
    with pytest.raises(ConfigError, match="a name below the bucket is missing, such as s3://bucket/cache.zarr"):
        open_storage("s3://bucket")


def test_missing_credentials_and_a_refused_connection_have_messages_of_their_own(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(CacheUnreachable, match="there are no credentials .*set AWS_ACCESS_KEY_ID"):
        open_storage(s3.url).read("x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    s3.close()
    with pytest.raises(CacheUnreachable, match="6 attempts failed .*Could not connect"):
        open_storage(s3.url).read("x")


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_brackets_in_a_name_to_delete_are_not_a_pattern(s3, scheme):
    storage = open_storage(s3.url if scheme == "s3" else "memory://tests/brackets")
    storage.write("tiles/a[1]/0.0.0", b"1")
    storage.write("tiles/a1/0.0.0", b"2")
    storage.remove("tiles/a[1]")
    storage.remove("tiles/none")
    assert storage.children("tiles") == ["a1"]


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_local_urls_are_opened_as_folders_not_by_fsspec(scheme, tmp_path, images):
    fill(f"{scheme}{tmp_path}/c.zarr", images)
    assert isinstance(open_storage(f"{scheme}{tmp_path}/c.zarr"), LocalStorage)
    fill(tmp_path / "d.zarr", images)
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "d.zarr")


@pytest.mark.long
def test_memory_and_s3_give_the_values_of_a_local_cache(s3, tmp_path, images):
    caches = []
    for url in (tmp_path / "c.zarr", "memory://tests/same.zarr", s3.url):
        fill(url, images)
        caches.append(SoftTargetCache.open(str(url)))
    for tile in caches[0].tile_ids:
        for other in caches[1:]:
            np.testing.assert_array_equal(other.read(tile), caches[0].read(tile))
