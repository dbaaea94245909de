"""What a run on dask workers refuses or reports: other files, versions and devices, wrong addresses, unreadable images."""

import json
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.cluster_runs import Told, beside, command, run, wait_for
from helpers.doubles import Lines
from helpers.files import write_image, write_tiff

from kdpipe.cache.storage import fence
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs.errors import CacheLocked, CheckpointError, ClusterUnreachable, ConfigError, DataError, ShutOut
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline import inputs
from kdpipe.pipeline.cluster import client as module
from kdpipe.pipeline.cluster.addresses import is_open_to_others
from kdpipe.pipeline.cluster.client import Cluster
from kdpipe.pipeline.cluster.worker import Facts, agreed_device
from kdpipe.pipeline.commands.actions.precompute import precompute_on_cluster
from kdpipe.pipeline.precompute import plan
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.versions import library_versions

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


def with_teacher(config, **changes):
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changes)})


def test_an_unreadable_image_ends_the_command_with_the_summary_of_a_single_process(
    two_workers, config, tmp_path, images
):
    broken = images / "images/t07.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    try:
        said = tmp_path / "said"
        arguments = command(config, tmp_path, "--scheduler", two_workers.address, "--json", str(tmp_path / "run.json"))
        two_workers.start_command(*arguments, output=said)
        wait_for(lambda: said.exists() and "Repair or remove" in said.read_text())
    finally:
        broken.write_bytes(content)
    result = json.loads((tmp_path / "run.json").read_text())
    assert (result["computed"], list(result["failed"])) == (15, ["T/t07"])
    text = " ".join(said.read_text().split())
    assert "2 workers on cpu" in text
    assert "1 of 16 tiles could not be computed: T/t07." in text
    assert "Traceback" not in text


def test_an_error_of_a_worker_is_reported_as_its_own(two_workers, config, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match="other.pth holds a network that is not recognised, but teacher says unet"
    ):
        run(with_teacher(config, checkpoint=str(tmp_path / "other.pth")), two_workers.address)
    assert beside(tmp_path / "cache.zarr") == []


def test_workers_that_see_other_files_are_named(two_workers, config, tmp_path, monkeypatch):
    """Each job has one thing that differs, as on a machine without the shared file system."""
    right = module.Job
    image = config.data.train[0] + "/images/t00.png"
    (tmp_path / "another.pth").write_bytes(b"x")
    for changes, error, message in (
        ({"cache": "/nowhere/c.zarr"}, ConfigError, "does not see the cache /nowhere/c.zarr that this run writes"),
        ({"probe": ("/nowhere.png", 1)}, DataError, r"does not see the image /nowhere.png \(No such file"),
        ({"probe": (image, 1)}, DataError, r"sees another image .*t00.png: \d+ bytes, not 1;"),
        (
            {"config": with_teacher(config, checkpoint="/nowhere.pth")},
            CheckpointError,
            ": teacher.checkpoint: no file at /nowhere.pth",
        ),
        (
            {"config": with_teacher(config, checkpoint=str(tmp_path / "another.pth"))},
            CheckpointError,
            r" has another network at .*another.pth: its checkpoint_sha256 is 2d711642b726…, not",
        ),
        (
            {"libraries": {**library_versions(), "torch": "0"}},
            ConfigError,
            "has other versions than the run: torch .*, not 0",
        ),
    ):
        monkeypatch.setattr(module, "Job", lambda changes=changes, **fields: right(**{**fields, **changes}))
        with pytest.raises(error, match=f"worker tcp://127.*{message}"):
            run(config, two_workers.address)


def test_a_worker_refuses_an_image_whose_header_nobody_has_read(two_workers, make_config, tmp_path, monkeypatch):
    for each in (inputs, plan):
        monkeypatch.setattr(each, "MOST_BEFORE", 1)
    for i in range(3):
        write_image(tmp_path / f"Many/images/t{i}.png", 48, 48, seed=i)
    pixels_BHW = np.zeros((3, 48, 48), dtype=np.uint8)
    write_tiff(tmp_path / "Many/images/u.tif", pixels_BHW, ["red", "green", "alpha"])
    config = make_config(data__train=[str(tmp_path / "Many")], data__allow_missing_masks=True, data__val=[])
    summary = run(config, two_workers.address)
    assert (summary.computed, list(summary.failed)) == (3, ["Many/u"])
    assert "which the file calls alpha" in summary.failed["Many/u"]


def test_precision_auto_is_decided_on_a_worker(two_workers, config):
    """The client takes its workers for fast at bf16."""
    config = with_teacher(config, precision="auto")
    recipe = complete_recipe(config, None, None)
    tiles = list_tiles(config.data, "train")
    with Cluster(Told(), "cpu", address=two_workers.address) as cluster:
        cluster.start(threading.Event())
        cluster._fast_bf16 = False
        assert cluster.resolve_precision(config, recipe, tiles, None, threading.Event()) == recipe
        cluster._fast_bf16 = True
        # The worker's own processor decides; this test sees that it was called with the tiles it needs.
        decided = cluster.resolve_precision(config, recipe, tiles, None, threading.Event())
        assert decided in precision.candidates(config, recipe)


def test_precision_auto_is_decided_where_few_of_many_tiles_are_readable(config, monkeypatch):
    """The client sends a worker no more tiles than `precision.resolve` tries."""
    config = with_teacher(config, precision="auto")
    monkeypatch.setattr(precision, "is_fast_at_bf16", lambda device: True)
    first, *_ = list_tiles(config.data, "train")
    tiles = [replace(first, image=Path(f"absent/{number}.png")) for number in range(150)]
    tiles[int(np.random.default_rng(config.seed).permutation(150)[7])] = first
    recipe = complete_recipe(config, None, None)
    sent = []

    def submit(task, *arguments, pure):
        sent.append(arguments[2])
        return SimpleNamespace(result=lambda: task(*arguments))

    cluster = Cluster(Told(), "cpu")
    cluster._started = cluster._fast_bf16 = True
    cluster._client = SimpleNamespace(submit=submit)
    expected = precision.resolve(config, recipe, tiles, None, torch.device("cpu"))
    assert cluster.resolve_precision(config, recipe, tiles, None, threading.Event()) == expected
    assert (len(sent[0]), sent[0][7].image) == (100, first.image.absolute())


def facts(**changes):
    return Facts(**{"device": "cuda", "libraries": {"torch": "2.9"}, "processor": "H100", "threads": 4, **changes})


def test_workers_must_agree_in_device_and_libraries():
    assert agreed_device({"a": facts(), "b": facts(processor="A100")}, {"torch": "2.9"}) == "cuda"
    with pytest.raises(
        ConfigError, match="worker b computes on cpu, worker a on cuda: .* end the workers of the other kind"
    ):
        agreed_device({"a": facts(), "b": facts(device="cpu")}, {"torch": "2.9"})
    with pytest.raises(ConfigError, match="worker b has other versions than this command: torch 2.8, not 2.9"):
        agreed_device({"a": facts(), "b": facts(libraries={"torch": "2.8"})}, {"torch": "2.9"})


def test_a_wrong_address_and_an_absent_scheduler_are_named(config, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"--scheduler nonsense://x: expected an address .* such as tcp://host:8786"):
        run(config, "nonsense://x")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        told = Told()
        with pytest.raises(
            ClusterUnreachable,
            match=rf"the dask scheduler at {address} does not respond \(waited 1 s\); start it with its",
        ):
            run(config, address, told)
    assert told.said == [f"the dask scheduler at {address} does not respond; waiting for up to 1 s"]


def test_a_fence_waits_for_workers_that_store_and_keeps_them_out_once_it_is_down(tmp_path, monkeypatch):
    storage = open_storage(str(tmp_path / "c.zarr"))
    order = []
    with fence.open_fence(storage) as token:
        with (
            pytest.raises(ShutOut, match="the worker stores nothing; start that run again"),
            fence.within_fence(storage, "x"),
        ):
            pass
        entered, go = threading.Event(), threading.Event()

        def store():
            with fence.within_fence(storage, token):
                entered.set()
                go.wait(10)
                order.append("stored")

        worker = threading.Thread(target=store)
        worker.start()
        assert entered.wait(10)
        monkeypatch.setattr(fence, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(
            CacheLocked, match=r"a worker of an earlier run has been storing a tile .*c.zarr.workers\); end that"
        ):
            fence.shut_out_workers(storage)
        monkeypatch.undo()
        threading.Timer(0.2, go.set).start()
    order.append("down")
    worker.join()
    assert order == ["stored", "down"]
    with pytest.raises(ShutOut), fence.within_fence(storage, token):
        pass
    assert not (tmp_path / "c.zarr.workers").exists()


def test_a_fence_on_an_object_store_keeps_workers_out_too():
    storage = open_storage("memory://fence/c.zarr")
    with fence.open_fence(storage) as token:
        with fence.within_fence(storage, token):
            pass
        with pytest.raises(ShutOut), fence.within_fence(storage, "x"):
            pass
    with pytest.raises(ShutOut), fence.within_fence(storage, token):
        pass


def test_without_dask_distributed_the_command_says_how_to_install_it(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "kdpipe.pipeline.cluster.client")
    monkeypatch.delitem(sys.modules, "kdpipe.pipeline.cluster.worker")
    with pytest.raises(ConfigError, match=r"need dask.distributed; install .*pip install '\.\[cluster\]'"):
        precompute_on_cluster(config, None, Lines(), repair=False, workers=2, scheduler=None)


@pytest.mark.parametrize(
    ("address", "open_to_others"),
    [
        ("tcp://127.0.0.1:8786", False), ("tcp://localhost:8786", False), ("tcp://[::1]:8786", False), ("127.0.0.1:8786", False),
        ("tcp://192.0.2.7:8786", True), ("192.0.2.7:8786", True), ("tcp://[2001:db8::7]:8786", True), ("ws://192.0.2.7:8786", True),
        ("tls://192.0.2.7:8786", False), ("wss://192.0.2.7:8786", False), ("tcp://0.0.0.0:8786", True), ("nonsense", False),
    ],
)  # fmt: skip
def test_a_cluster_in_the_network_without_tls_is_warned_of(address, open_to_others):
    assert is_open_to_others(address) == open_to_others
