"""A corpus on S3, as moto plays it on this machine: uploaded with fsspec, read as from the local disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.data.data_plan import open_plan
from pretrain.doctor.findings import Request
from pretrain.doctor.remote_check import check
from pretrain.errors import DataError
from pretrain.storage import stores
from tests.helpers.data_helpers import TOKENIZER, make_config, make_corpus, random_documents
from tests.helpers.s3_server import needs_moto, proxied, s3_server
from tests.helpers.store_reader import digests, remote_config


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_server("corpora"):
        yield "s3://corpora"


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
    (found,), (lost,) = (list(check(Request(store=url))) for url in (bucket, "s3://no-such-bucket"))
    assert (found.outcome, found.text) == ("ok", "s3://corpora holds 1 name: web")
    assert lost.outcome == "failure" and "there is no such bucket or folder" in lost.text


@needs_moto
@pytest.mark.filterwarnings("default")
def test_s3_that_drops_stalls_truncates_corrupts_and_refuses(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(stores, "STALL_SECONDS", 1.0)
    web = tmp_path / "web"
    make_corpus(web, random_documents(300, 1), random_documents(20, 2))
    filesystem, path = fsspec.core.url_to_fs(f"{bucket}/web")
    filesystem.put(f"{web}/", path, recursive=True)
    expected = digests(make_config({web: 1.0}), 8)
    with proxied() as proxy:
        for end, faults in {
            "manifest.json": ["503", "drop"], "train.segments.npy": ["corrupt"], "train.offsets.npy": ["stall"],
            "train-000000.tar": ["stall"], "train-000001.tar": ["corrupt"], "train-000002.tar": ["drop", "503"],
            "train-000001.index.npy": ["short"],
        }.items():  # fmt: skip
            proxy.faults[end] = list(faults)
        config = remote_config(f"{bucket}/web", tmp_path / "cache", retry_seconds=60)
        assert digests(config, 8) == expected
        assert not any(proxy.faults.values())  # all of them have happened
