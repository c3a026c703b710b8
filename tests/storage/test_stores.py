"""Reading from stores: what fails for a while is tried again, what fails for ever ends within the limit."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pretrain.errors import DataError
from pretrain.storage import stores
from pretrain.storage.store_errors import StoreError, as_store_error
from pretrain.storage.stores import Store, is_remote, shown
from tests.helpers.store_server import StoreServer

CONTENT = bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StoreServer]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web/file").write_bytes(CONTENT)
    server = StoreServer(tmp_path / "web")
    yield server
    server.close()


def length_check(content: bytes) -> None:
    if content != CONTENT:
        raise ValueError("other bytes")


def test_what_is_remote() -> None:
    remote = (
        "s3://b/c",
        "gs://b",
        "hf://datasets/me/c",
        "http://h/c",
        "https://h/c",
        "pipe:cat {}",
        "memory://c",
        "simplecache::s3://b",
    )
    assert all(is_remote(one) for one in remote)
    assert not any(is_remote(one) for one in ("data/web", "/data/web", "./a:b", "C:/data", "../x"))


def test_secrets_are_not_shown() -> None:
    assert shown("https://me:pass@host/c?sig=1") == "https://host/c?…"
    assert shown("s3://bucket/c") == "s3://bucket/c"


@pytest.mark.parametrize("fault", ["drop", "refuse", "stall", "truncate", "corrupt", "503"])
def test_a_failure_is_tried_again_and_said_once(
    server: StoreServer, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults["file"] = [fault] * (2 if fault == "refuse" else 1)  # aiohttp itself asks once more after this one
    store = Store(server.url, limit_seconds=20, stall_seconds=0.5)
    with caplog.at_level(logging.WARNING):
        assert store.read("file", check=length_check) == CONTENT
    assert server.requests["file"] == (3 if fault == "refuse" else 2)
    (record,) = caplog.records
    assert f"{server.url}/file: " in record.getMessage() and "attempt 1, the next in" in record.getMessage()


def test_a_store_that_is_down_for_a_while_is_waited_for(server: StoreServer) -> None:
    server.faults["file"] = ["refuse", "503", "drop", "503", "refuse"]
    assert Store(server.url, limit_seconds=20).read("file") == CONTENT
    assert server.requests["file"] == 6


@pytest.mark.parametrize("fault", ["503", "stall", "refuse"])
def test_a_store_that_stays_down_is_an_error_within_the_limit(server: StoreServer, fault: str) -> None:
    server.always = fault
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"/file cannot be read: .*; tried \d+ times in \d s\. Mend the store or the net.*data\.retry_seconds \(1\)",
    ):
        Store(server.url, limit_seconds=1, stall_seconds=0.3).read("file")
    assert 0.9 < time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "there is no such file; tried once"), ("file", "nothing came")]
)
def test_only_what_may_pass_is_tried_again(server: StoreServer, name: str, words: str) -> None:
    if name == "file":
        server.always = "stall"
    with pytest.raises(DataError, match=words):
        Store(server.url, limit_seconds=0.5).read(name)


def test_content_that_stays_wrong_is_fetched_three_times(server: StoreServer) -> None:
    server.always = "corrupt"
    with pytest.raises(
        DataError, match=r"its content is broken: other bytes; tried 3 times .*Upload the corpus again, whole"
    ):
        Store(server.url, limit_seconds=60).read("file", check=length_check)
    assert server.requests["file"] == 3


def test_closing_ends_what_is_tried_again(server: StoreServer) -> None:
    server.always = "503"
    store = Store(server.url, limit_seconds=60)
    store.close()
    with pytest.raises(DataError, match="the stream was closed"):
        store.read("file")


def test_a_signed_url_keeps_its_signature_behind_the_name_and_out_of_messages(server: StoreServer) -> None:
    store = Store(f"{server.url}/?signature=secret", limit_seconds=5)
    assert store.read("file") == CONTENT
    assert store.location("file") == f"{server.url}/file?…"


def test_other_stores_of_fsspec(tmp_path: Path) -> None:
    with fsspec.open("memory://corpus/a/file", "wb") as file:
        file.write(CONTENT)
    assert Store("memory://corpus/", 5).read("a/file") == CONTENT
    (tmp_path / "file").write_bytes(CONTENT)
    assert Store(f"file://{tmp_path}", 5).read("file") == CONTENT


@pytest.mark.parametrize(("url", "module", "package"), [
    ("s3://bucket/c", "s3fs", "longhaul[s3]"), ("gs://bucket/c", "gcsfs", "longhaul[gs]"), ("http://h/c", "aiohttp", "fsspec[http]"),
])  # fmt: skip
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, url: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what Python takes for "not installed"
    for protocol in ("s3", "gs", "http"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(DataError) as caught:
        Store(url, 5)
    assert f"pip install '{package}'" in str(caught.value)


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(DataError, match=r"ftpx://h/c cannot be opened: .*Use a folder or s3://, gs://"):
        Store("ftpx://h/c", 5)


def test_a_command_writes_the_file_whose_path_it_gets(tmp_path: Path) -> None:
    (tmp_path / "it's").mkdir()
    (tmp_path / "it's/file").write_bytes(CONTENT)
    store = Store(f"pipe:cd {tmp_path} && cat {{}}", 5)
    assert store.read("it's/file") == CONTENT


def test_a_command_that_fails_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    store = Store(
        f"pipe:cat {tmp_path}/{{}}; mkdir {tmp_path}/tried 2>/dev/null && {{ echo gone >&2; exit 3; }}; true", 5
    )
    assert store.read("file") == CONTENT


@pytest.mark.parametrize(("command", "words"), [
    ("echo no route >&2; exit 3; : {}", r"the command ended with status 3: no route; tried \d+ times"),
    ("no-such-program {}", "status 127: .*not found; tried once"),
    ("sleep 60; : {}", r"nothing came for 0 s; tried"),
])  # fmt: skip
def test_a_command_that_keeps_failing(command: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=words):
        Store(f"pipe:{command}", limit_seconds=0.5, stall_seconds=0.2).read("file")
    assert time.monotonic() - began < 5


def test_errors_of_libraries_become_sentences() -> None:
    class ServerError(Exception):
        code = "403"

    class NoCredentialsError(Exception):
        pass

    class Slow(Exception):
        status = 429

    verdicts = [
        as_store_error(error) for error in (ServerError(), NoCredentialsError("none"), Slow(), OSError(5, "I/O"))
    ]
    assert [error.is_final for error in verdicts] == [True, True, False, False]
    assert all(isinstance(error, StoreError) for error in verdicts)
