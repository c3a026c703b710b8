"""S3 as moto plays it on this machine, behind a proxy that fails on purpose and keeps a record."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.request import Request, urlopen

import pytest

from tests.helpers.faulty_proxy import FaultyProxy

needs_moto = pytest.mark.skipif(
    not all(find_spec(name) for name in ("s3fs", "moto", "flask", "flask_cors")),
    reason="needs s3fs, moto, flask and flask-cors: pip install 'longhaul[test]'",
)
SECRET = "s3cr3t-that-nobody-may-see"


@contextmanager
def s3_server(bucket: str) -> Iterator[None]:
    """Start a server with one empty bucket, and have the environment say where it is; it is restored afterwards."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urlopen(Request(f"{url}/moto-api/reset", method="POST"), timeout=30).close()  # its buckets outlive a server
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": url,
        }.items():  # fmt: skip
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(bucket)
        yield
        s3fs.S3FileSystem.clear_instance_cache()
        for thread in threading.enumerate():  # attempts that were left behind, which s3fs repeats
            if thread.name in ("longhaul-download", "longhaul-store"):
                thread.join(60)
        server.stop()


@contextmanager
def proxied() -> Iterator[FaultyProxy]:
    """Put a proxy before the server."""
    import s3fs

    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield proxy
        finally:
            proxy.close()
            s3fs.S3FileSystem.clear_instance_cache()
