"""A small cache and the stand-ins for its source images, and an S3 server."""

import functools
import logging
import sys
import uuid
from pathlib import Path

import fsspec.config
import fsspec.core
import pytest
from helpers.caches import SIZES, fill

from kdpipe.cache import SoftTargetCache, manifest
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.storage import remote
from kdpipe.cache.storage.base import open_storage


@pytest.fixture
def images(tmp_path):
    """Stand-ins for source images by tile: any file will do."""
    files = {}
    for tile in SIZES:
        files[tile] = tmp_path / "images" / f"{tile.replace('/', '-')}.png"
        files[tile].parent.mkdir(exist_ok=True)
        files[tile].write_bytes(tile.encode() * 10)
    return files


@pytest.fixture
def cache(tmp_path, images):
    """The finished cache of `images` at `tmp_path / "c.zarr"`."""
    fill(tmp_path / "c.zarr", images)
    return SoftTargetCache.open(str(tmp_path / "c.zarr"))


@pytest.fixture(scope="session")
def moto_port():
    """The port of an S3 server on loopback; skips where its packages are missing."""
    pytest.importorskip("moto", reason="needs moto[server] and s3fs: pip install '.[dev]'")
    pytest.importorskip("s3fs", reason="needs s3fs: pip install '.[s3]'")
    from botocore.loaders import JSONFileLoader
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    # Every storage opens a client of its own, which otherwise parses megabytes of the same JSON for half a second.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(JSONFileLoader, "load_file", functools.cache(JSONFileLoader.load_file))
    monkeypatch.setattr(WSGIRequestHandler, "disable_nagle_algorithm", True)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()
    monkeypatch.undo()


@pytest.fixture
def s3(moto_port, monkeypatch, tmp_path):
    """The proxy in front of an S3 server with an empty bucket; `s3.url` is a place for a cache."""
    from helpers.faulty_server import FaultyServer

    proxy = FaultyServer(moto_port)
    endpoint = f"http://127.0.0.1:{proxy.port}"
    for name, value in {
        "FSSPEC_S3_ENDPOINT_URL": endpoint,  # for processes that tests start
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "home"),  # for the notes on images
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    bucket = f"bucket-{uuid.uuid4().hex}"  # ports are reused, and the server keeps the content of buckets
    open_storage(f"s3://{bucket}/x")._fs.mkdir(bucket)
    proxy.url = f"s3://{bucket}/caches/c.zarr"
    proxy.count()
    yield proxy
    proxy.fault = lambda method, path: None
    proxy.close()


@pytest.fixture
def written(tmp_path, images):
    """The folder of the finished cache of `images`."""
    fill(tmp_path / "c.zarr", images)
    return tmp_path / "c.zarr"


@pytest.fixture
def listed(tmp_path, images):
    """A finished cache whose manifest lists the tiles."""
    fill(tmp_path / "listed.zarr", images)
    return tmp_path / "listed.zarr"


@pytest.fixture
def indexed(tmp_path, images, monkeypatch):
    """The same cache, whose tiles are in an index."""
    monkeypatch.setattr(manifest, "MAX_LISTED", 0)
    fill(tmp_path / "indexed.zarr", images)
    return tmp_path / "indexed.zarr"


@pytest.fixture
def packed(written, tmp_path):
    """The pack of `written`."""
    return Path(pack(written, tmp_path / "c.zarr.zip").files[0])


@pytest.fixture(params=["obstore", "s3fs"])
def reader(request, monkeypatch):
    """What reads from S3: obstore, or s3fs where it is not installed."""
    if request.param == "s3fs":
        monkeypatch.setitem(sys.modules, "obstore", None)
    return request.param


@pytest.fixture
def one_client(s3, monkeypatch):
    """All storages on S3 share one client: making one takes a third of a second."""
    made, url_to_fs = [], fsspec.core.url_to_fs

    def shared(url, **options):
        if not url.startswith("s3://"):
            return url_to_fs(url, **options)
        if not made:
            made.append(url_to_fs(url, **options)[0])
        return made[0], made[0]._strip_protocol(url)

    monkeypatch.setattr(fsspec.core, "url_to_fs", shared)
