"""A corpus on S3, as moto plays it on this machine: uploaded with fsspec, read as from the local disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from pretrain import stores
from pretrain.data_plan import open_plan
from pretrain.errors import DataError
from tests.data_helpers import TOKENIZER, make_config, make_corpus, random_documents
from tests.faulty_proxy import FaultyProxy
from tests.store_reader import digests, remote_config

needs_moto = pytest.mark.skipif(
    not all(find_spec(name) for name in ("s3fs", "moto", "flask", "flask_cors")),
    reason="needs s3fs, moto, flask and flask-cors: pip install 'longhaul[test]'",
)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    reset = Request(f"http://{host}:{port}/moto-api/reset", method="POST")  # its buckets outlive a server
    urlopen(reset, timeout=30).close()
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("corpora")
    yield "s3://corpora"
    s3fs.S3FileSystem.clear_instance_cache()
    for thread in threading.enumerate():  # attempts that were left behind, which s3fs repeats
        if thread.name == "longhaul-download":
            thread.join(60)
    server.stop()


@needs_moto
@pytest.mark.filterwarnings("default")  # boto's and moto's own
def test_a_corpus_on_s3(bucket: str, tmp_path: Path) -> None:
    import fsspec

    web = tmp_path / "web"
    make_corpus(web, random_documents(300, 1), random_documents(20, 2))
    filesystem, path = fsspec.core.url_to_fs(f"{bucket}/web")
    filesystem.put(f"{web}/", path, recursive=True)
    config = remote_config(f"{bucket}/web", tmp_path / "cache", retry_seconds=10)
    assert digests(config, 8) == digests(make_config({web: 1.0}), 8)
    assert open_plan(config, TOKENIZER)[0].hash == open_plan(make_config({web: 1.0}), TOKENIZER)[0].hash
    with pytest.raises(
        DataError, match=r"s3://corpora/nowhere/manifest\.json cannot be read: there is no such file; tried once"
    ):
        open_plan(remote_config(f"{bucket}/nowhere", tmp_path / "cache"), TOKENIZER)


@needs_moto
@pytest.mark.filterwarnings("default")
def test_s3_that_drops_stalls_truncates_corrupts_and_refuses(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    import s3fs

    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(stores, "STALL_SECONDS", 1.0)
    web = tmp_path / "web"
    make_corpus(web, random_documents(300, 1), random_documents(20, 2))
    filesystem, path = fsspec.core.url_to_fs(f"{bucket}/web")
    filesystem.put(f"{web}/", path, recursive=True)
    expected = digests(make_config({web: 1.0}), 8)
    with closing(FaultyProxy(os.environ["AWS_ENDPOINT_URL"])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        for end, faults in {
            "manifest.json": ["503", "drop"], "train.segments.npy": ["corrupt"], "train.offsets.npy": ["stall"],
            "train-000000.tar": ["stall"], "train-000001.tar": ["corrupt"], "train-000002.tar": ["drop", "503"],
            "train-000001.index.npy": ["short"],
        }.items():  # fmt: skip
            proxy.faults[end] = list(faults)
        config = remote_config(f"{bucket}/web", tmp_path / "cache", retry_seconds=60)
        assert digests(config, 8) == expected
        assert not any(proxy.faults.values())  # all of them have happened
