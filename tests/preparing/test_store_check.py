"""--inspect and --verify of shards in a store: as of a folder, with nothing written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.prepare import main
from pretrain.data.shards import Manifest
from pretrain.errors import DataError
from pretrain.preparing import store_check
from pretrain.preparing.inspect_shards import inspect
from pretrain.preparing.store_check import inspect_store, verify_store
from pretrain.preparing.verify_shards import Problem, verify
from pretrain.storage import stores
from tests.helpers.data_helpers import flip_bit, make_corpus, random_documents
from tests.helpers.store_server import StoreServer


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin") / "web"
    make_corpus(folder, random_documents(300, 1), random_documents(20, 2))
    return folder


@pytest.fixture
def web(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "web"))


@pytest.fixture
def server(web: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)
    server = StoreServer(web.parent)
    yield server
    server.close()


def test_a_store_is_inspected_as_its_folder_without_its_shards(
    server: StoreServer, web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults["train-000001.index.npy"] = ["drop", "503"]
    there, here = inspect_store(f"{server.url}/web"), inspect(web)
    assert there.pop("folder") == f"{server.url}/web"
    assert there.pop("rows") == [] and there.pop("samples") == []
    assert there.items() <= here.items() and there["lengths"]["max"] > 0
    assert main(["--inspect", f"{server.url}/web"]) == 0
    assert capsys.readouterr().out.startswith(f"{server.url}/web: corpus web, data fingerprint ")
    assert not any(name.endswith(".tar") or "/rows-" in name for name in server.requests)


def test_sound_shards_of_a_store_are_passed_and_nothing_is_written(
    server: StoreServer, web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    server.faults["train-000001.tar"] = ["drop", "503"]
    assert main(["--verify", f"{server.url}/web", "--processes", "2"]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    content = verify_store(f"{server.url}/web")
    assert content["num_bytes"] == verify(web, 1)["num_bytes"] and content["num_shards"] > 2
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_damaged_in_a_store_is_named(
    server: StoreServer, web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Manifest.load(web).train
    flip_bit(web / f"{train[0].name}.tar", 2000)
    (web / f"{train[1].name}.tar").unlink()
    os.truncate(web / f"{train[2].name}.tar", 1000)
    flip_bit(web / f"{train[2].name}.index.npy", 200)
    assert main(["--verify", f"{server.url}/web", "--json"]) == 1
    assert [str(Problem(**one)) for one in json.loads(capsys.readouterr().out)["problems"]] == [
        f"{train[0].name}.tar: its sha256 is not the manifest's",
        f"{train[1].name}.tar: it is missing",
        f"{train[2].name}.tar: it is cut short: it has 1,000 bytes, not {train[2].num_bytes:,}",
        f"{train[2].name}.index.npy: its sha256 is not the manifest's",
    ]
    assert main(["--verify", f"{server.url}/web"]) == 1
    assert f"4 problems. Upload these files to {server.url}/web again" in capsys.readouterr().out


def test_a_store_that_fails_is_an_error_and_no_verdict(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_check, "_RETRY_SECONDS", 0.3)
    advice = r"Correct the URL, or the rights to read it, and run again\.$"
    for look in (verify_store, inspect_store):
        with pytest.raises(DataError, match=rf"/nowhere/manifest\.json cannot be read: there is no such .* {advice}"):
            look(f"{server.url}/nowhere")
    server.faults["train-000000.tar"] = ["503"] * 50
    assert main(["--verify", f"{server.url}/web"]) == 1
    error = capsys.readouterr().err
    assert "train-000000.tar cannot be read: the server answered 503; tried" in error
    assert error.endswith(" s. Mend the store or the network, and run again.\n")  # no option: it takes none
    with pytest.raises(SystemExit) as stopped:
        main(["--inspect", f"{server.url}/web", "--samples", "2"])
    assert stopped.value.code == 2 and "--samples is for shards in a folder" in capsys.readouterr().err
