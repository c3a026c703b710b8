"""Checkpoints in object stores: complete or absent, checked, of one run and its newest start alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.checkpoints import checkpoint_store
from pretrain.checkpoints.checkpoint_files import FORMAT_VERSION, CheckpointReader, manifest_digest, tensor_key
from pretrain.checkpoints.checkpoint_places import open_place
from pretrain.checkpoints.checkpoint_store import StorePlace
from pretrain.checkpoints.run_folder import RunFolder
from pretrain.errors import CheckpointError, ConfigError, StoreAccessError
from pretrain.options.config import DataSection
from pretrain.options.run_options import CheckpointSection
from pretrain.options.settings import load_config
from pretrain.storage import stores, writable_store
from pretrain.storage.tensor_files import TensorBytes
from tests.conftest import write_tiny_corpus
from tests.helpers.rank_helpers import ROOT
from tests.helpers.s3_server import SECRET, needs_moto, proxied, s3_server

WHOLE = torch.arange(24, dtype=torch.float32)
CUTS = {"rank-00000": (0, 7), "rank-00001": (7, 17)}
pytestmark = pytest.mark.filterwarnings("default")  # boto's and moto's own


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("checkpoints"):
        yield "s3://checkpoints"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that are as short as tests want them."""
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.02)


def section(cache: Path, retry_seconds: int = 5) -> DataSection:
    sources = [{"name": "web", "shards": "web"}]
    return DataSection(sources=sources, seq_len=32, cache_dir=str(cache), retry_seconds=retry_seconds)


@pytest.fixture(params=["file", pytest.param("s3", marks=needs_moto)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place on S3 or on the disk."""
    if request.param == "file":
        return f"file://{tmp_path}/checkpoints"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def open_store(url: str, tmp_path: Path, run_id: str = "this") -> StorePlace:
    place = StorePlace(url, section(tmp_path / "cache"))
    place.claim(run_id, tmp_path / "run")
    return place


def filesystem_of(url: str):
    import fsspec.core

    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return filesystem, root


def names_in(url: str) -> set[str]:
    filesystem, root = filesystem_of(url)
    return {path.removeprefix(f"{root}/") for path in filesystem.find(root)}


def write_shares(place: StorePlace, step: int, factor: float) -> dict[str, dict]:
    """What the ranks write, and leave in notes."""
    place.begin(step, 1000, 2)
    for name, (start, length) in CUTS.items():
        tensors = {tensor_key("w", "master", start): WHOLE[start : start + length].clone() * factor}
        num_bytes, sha256 = place.write_tensors(step, f"{name}.safetensors", tensors, {"rank": name})
        note = {f"{name}.safetensors": {"bytes": num_bytes, "sha256": sha256}}
        place.write_note(step, f"{name}.share.json", json.dumps(note))
    notes = place.take_notes(step, place.list_notes(step, ".share.json"))
    return {name: file for note in notes for name, file in json.loads(note).items()}


def save(place: StorePlace, step: int, factor: float = 1.0, about: dict | None = None) -> None:
    files = write_shares(place, step, factor)
    pieces = [[f"{name}.safetensors", start, length] for name, (start, length) in CUTS.items()]
    manifest = {"format_version": FORMAT_VERSION, "step": step, "training": {}, "about": about or {}, "files": files,
                "parameters": {"w": {"shape": [4, 6], "states": ["master"], "fragments": pieces}}}  # fmt: skip
    place.complete(step, json.dumps(manifest | {"sha256": manifest_digest(manifest)}))


def read_back(place: StorePlace, step: int) -> torch.Tensor:
    reader = place.open(step)
    reader.verify()
    whole = reader.read_whole("w")
    reader.close()
    return whole.view(-1)


def test_bytes_out_of_memory_are_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"b/é": torch.randn(5), "a": torch.randn(3), "empty": torch.empty(0)}
    content = TensorBytes(tensors, {"rank": "0", "format": "longhaul"})
    written = b"".join(content.chunks())
    assert len(written) == content.num_bytes and content.sha256 == hashlib.sha256(written).hexdigest()
    assert b"".join(content.chunks()) == written  # as often as it takes
    (tmp_path / "file").write_bytes(written)
    with safe_open(tmp_path / "file", "pt") as file:
        assert set(file.keys()) == set(tensors) and file.metadata() == {"rank": "0", "format": "longhaul"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert torch.equal(file.get_slice("b/é")[1:3], tensors["b/é"][1:3])


def test_what_is_saved_is_read_back_listed_and_removed(url: str, tmp_path: Path) -> None:
    place = open_store(url, tmp_path)
    assert place.list_steps() == []
    for step in (5, 10, 123456789):
        save(place, step, step)
    assert place.list_steps() == [5, 10, 123456789] and place.has(10) and not place.has(11)
    assert names_in(f"{url}/step-00000010") == {"manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"}
    other = StorePlace(url, section(tmp_path / "cache"))  # as another process sees it
    assert torch.equal(read_back(other, 10), WHOLE * 10) and other.open(10).folder.name == "step-00000010"
    place.remove(5)
    assert place.list_steps() == [10, 123456789] and not names_in(f"{url}/step-00000005")


def test_only_a_manifest_makes_it_complete_and_a_start_removes_the_rest(url: str, tmp_path: Path) -> None:
    place = open_store(url, tmp_path)
    save(place, 5)
    write_shares(place, 10, 1.0)
    assert place.list_steps() == [5] and len(names_in(url)) == 6
    again = open_store(url, tmp_path)
    assert again.list_steps() == [5] and not [name for name in names_in(url) if "step-00000010" in name]
    save(again, 10, 2.0)
    assert torch.equal(read_back(again, 10), WHOLE * 2)


def test_an_abandoned_save_leaves_nothing_and_its_step_can_be_saved(url: str, tmp_path: Path) -> None:
    place = open_store(url, tmp_path)
    write_shares(place, 10, 1.0)
    place.abandon(10)
    assert names_in(url) == {"owner.json"}
    save(place, 10, 3.0)
    assert torch.equal(read_back(place, 10), WHOLE * 3)


def test_a_damaged_checkpoint_is_kept_until_its_step_is_saved_again(url: str, tmp_path: Path) -> None:
    place = open_store(url, tmp_path)
    save(place, 5)
    save(place, 10)
    place.set_aside(10)
    again = open_store(url, tmp_path)
    assert place.list_steps() == again.list_steps() == [5]
    kept = {"manifest.damaged.json", "rank-00000.safetensors", "rank-00001.safetensors"}
    assert names_in(f"{url}/step-00000010") == kept  # a start removes leftovers, and this is none
    save(again, 10, 2.0)
    assert names_in(f"{url}/step-00000010") == kept - {"manifest.damaged.json"} | {"manifest.json"}
    assert torch.equal(read_back(again, 10), WHOLE * 2)


def change(url: str, name: str, how) -> None:
    filesystem, root = filesystem_of(url)
    filesystem.pipe_file(f"{root}/{name}", how(filesystem.cat_file(f"{root}/{name}")))


def test_damage_is_found_and_named(url: str, tmp_path: Path, quick: None) -> None:
    place = open_store(url, tmp_path)
    for step in (1, 2, 3, 4):
        save(place, step, step)
    change(url, "step-00000001/rank-00001.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    change(url, "step-00000002/rank-00000.safetensors", lambda content: content[:-1])
    filesystem, root = filesystem_of(url)
    filesystem.rm_file(f"{root}/step-00000003/rank-00001.safetensors")
    change(url, "step-00000004/manifest.json", lambda content: content.replace(b'"step": 4', b'"step": 5'))
    for step, text in {
        1: r"step-00000001/rank-00001\.safetensors: its sha256 is another than when it was written",
        2: r"step-00000002/rank-00000\.safetensors has \d+ bytes, not \d+",
        3: r"step-00000003/rank-00001\.safetensors is missing",
        4: r"step-00000004/manifest\.json: is not readable .*its sha256 is not the one that was written",
        5: r"step-00000005/manifest\.json: is not readable .*there is no such file",
    }.items():
        with pytest.raises(CheckpointError, match=text):
            place.open(step).verify()


def test_a_copy_in_the_cache_that_a_disk_has_changed_is_fetched_again(url: str, tmp_path: Path) -> None:
    save(open_store(url, tmp_path), 5)
    first = open_store(url, tmp_path)
    assert torch.equal(read_back(first, 5), WHOLE)
    copies = sorted((tmp_path / "cache" / "checkpoints").iterdir())
    assert len(copies) == 2
    copies[0].write_bytes(copies[0].read_bytes()[:-1] + b"?")
    assert torch.equal(read_back(open_store(url, tmp_path), 5), WHOLE)


@needs_moto
def test_one_copy_serves_all_processes_of_a_node(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/copies"
    save(open_store(url, tmp_path), 5)
    with proxied() as proxy:
        for _ in range(3):
            place = StorePlace(url, section(tmp_path / "cache"))
            assert torch.equal(read_back(place, 5), WHOLE)
    reads = [path for method, path in proxy.requests if method == "GET" and path.endswith(".safetensors")]
    assert sorted(reads) == [f"/checkpoints/copies/step-00000005/{name}.safetensors" for name in CUTS]


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    for files in (
        {"../secret": {"bytes": 1, "sha256": "0" * 64}},
        {"rank-00000.safetensors": {"bytes": 1, "sha256": "../../x"}},
    ):
        folder = tmp_path / "step-00000001"
        folder.mkdir(exist_ok=True)
        manifest = {"format_version": FORMAT_VERSION, "step": 1, "training": {}, "parameters": {}, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
        with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
            CheckpointReader(folder)


def test_another_run_is_refused_and_told_what_to_do(url: str, tmp_path: Path) -> None:
    save(open_store(url, tmp_path), 5)
    with pytest.raises(
        ConfigError,
        match=rf"expected a place of this run alone: its owner\.json names the run in {tmp_path}/run on .*"
        r"remove .*/owner\.json, and this run goes on",
    ):
        open_store(url, tmp_path, run_id="other")
    assert len(names_in(url)) == 4
    filesystem, root = filesystem_of(url)
    filesystem.rm_file(f"{root}/owner.json")
    assert open_store(url, tmp_path, run_id="other").list_steps() == [5]
    filesystem.pipe_file(f"{root}/owner.json", b"{")
    with pytest.raises(ConfigError, match=r"its owner\.json is not readable"):
        open_store(url, tmp_path)


def test_a_start_that_was_replaced_writes_and_removes_nothing_more(url: str, tmp_path: Path) -> None:
    dead = open_store(url, tmp_path)  # or so somebody thought
    save(dead, 5)
    save(dead, 10)
    alive = open_store(url, tmp_path)
    save(alive, 15)
    before = names_in(url)
    expected = r"owner\.json is of a start on .*; expected this one's, which therefore writes no more"
    with pytest.raises(StoreAccessError, match=expected):
        write_shares(dead, 15, 7.0)
    with pytest.raises(StoreAccessError, match=expected):
        dead.complete(20, "{}")
    dead.abandon(15)
    assert names_in(url) == before and torch.equal(read_back(alive, 15), WHOLE)
    joined = StorePlace(url, section(tmp_path / "cache"))  # another rank of the one that lives
    joined.join(alive.claim("this", tmp_path / "run"))
    joined.write_note(15, "x", "")
    filesystem, root = filesystem_of(url)
    filesystem.rm_file(f"{root}/owner.json")
    save(alive, 20)  # removed, and nobody else's
    assert "owner.json" in names_in(url)


@needs_moto
def test_large_files_are_sent_in_parts_and_half_of_one_is_no_file(
    bucket: str, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writable_store, "PART_BYTES", 5 << 20)
    tensors = {"w/master/0": torch.arange(3 << 20, dtype=torch.float32)}  # 12 MiB
    monkeypatch.setattr("pretrain.storage.tensor_files._CHUNK_BYTES", 5 << 20)
    with proxied() as proxy:
        place = open_store(f"{bucket}/large", tmp_path)
        num_bytes, sha256 = place.write_tensors(5, "rank-00000.safetensors", tensors, {})
        parts = [path for method, path in proxy.requests if method == "PUT" and "partNumber" in path]
        assert len(parts) == 3
        path = "checkpoints/large/step-00000005/rank-00000.safetensors"
        assert hashlib.sha256(filesystem_of(bucket)[0].cat_file(path)).hexdigest() == sha256
        proxy.writes["partNumber=3"] = "403"
        with pytest.raises(StoreAccessError, match=r"step-00000006/rank-00000\.safetensors cannot be written: "):
            place.write_tensors(6, "rank-00000.safetensors", tensors, {})
        time.sleep(0.2)
        assert not names_in(f"{bucket}/large/step-00000006")
        uploads = filesystem_of(bucket)[0].list_multipart_uploads("checkpoints")
        assert not uploads  # its first parts, which nobody sees and somebody pays for


@needs_moto
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("403", r"cannot be written: .*; tried once\. Correct checkpoint\.dir, or the rights there\."),
        pytest.param(
            "503",
            r"cannot be written: .*; tried \d+ times in \d+ s\. Mend the store or the network\.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "drop",
            r"cannot be written: .*; tried \d+ times in \d+ s\. Mend the store or the network\.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "stall", r"cannot be written: nothing went on for 3 s; tried \d+ times in \d+ s\.", marks=pytest.mark.slow
        ),
    ],
)
def test_a_store_that_refuses_or_hangs_fails_a_save_in_time(
    bucket: str, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, fault: str, text: str
) -> None:
    monkeypatch.setattr(stores, "STALL_SECONDS", 3.0)
    monkeypatch.setattr(checkpoint_store, "SAVE_SECONDS", 4.0)
    monkeypatch.setattr(checkpoint_store, "HASTY_SECONDS", 4.0)
    with proxied() as proxy:
        place = open_store(f"{bucket}/{fault}", tmp_path)
        save(place, 5)
        proxy.writes["step-00000010"] = fault
        begun = time.monotonic()
        with pytest.raises(StoreAccessError, match=text) as caught:
            save(place, 10)
        assert time.monotonic() - begun < 30 and SECRET not in str(caught.value)
        place.abandon(10)
        assert place.list_steps() == [5]
        if fault == "stall":  # a removal that is done late would remove what comes next
            with pytest.raises(StoreAccessError, match="requests of an earlier save of this step still hang"):
                save(place, 10, 2.0)
        proxy.writes.clear()
        while any(store.is_busy("step-00000010") for store in (place._store, place._hasty)):
            assert time.monotonic() - begun < 60
            time.sleep(0.05)
        save(place, 10, 2.0)  # first removes what it could not then
        assert place.list_steps() == [5, 10] and torch.equal(read_back(place, 10), WHOLE * 2)


@needs_moto
def test_a_store_that_cannot_be_reached_or_read_is_no_damage(bucket: str, tmp_path: Path, quick: None) -> None:
    import s3fs

    url = f"{bucket}/far"
    save(open_store(url, tmp_path), 5)
    with proxied() as proxy:
        place = StorePlace(url, section(tmp_path / "other cache", retry_seconds=5))
        proxy.faults[".safetensors"] = ["503"] * 1000
        with pytest.raises(StoreAccessError, match=r"far/step-00000005/rank-0000\d\.safetensors cannot be read: "):
            place.open(5).verify()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)  # where nobody listens any more
        with pytest.raises(StoreAccessError, match=r"s3://checkpoints/far cannot be listed: .*Mend the store or the"):
            StorePlace(url, section(tmp_path / "cache", retry_seconds=1)).list_steps()
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreAccessError, match=r"s3://nowhere/owner\.json cannot be written: there is no such bucket"):
        open_store("s3://nowhere", tmp_path)


@needs_moto
def test_the_manifest_is_written_last_and_removed_first(bucket: str, tmp_path: Path) -> None:
    with proxied() as proxy:
        place = open_store(f"{bucket}/order", tmp_path)
        save(place, 5)
        place.remove(5)
    changes = [(method, path) for method, path in proxy.requests if method not in ("GET", "HEAD") and "step-" in path]
    written = [path.rpartition("/")[2] for method, path in changes if method == "PUT"]
    assert written[-1] == "manifest.json" and len(written) == 5
    at = changes.index(("PUT", "/checkpoints/order/step-00000005/manifest.json"))
    assert changes[at + 1] == ("DELETE", "/checkpoints/order/step-00000005/manifest.json")


KILLED = """
import json, sys
from pathlib import Path
from tests.checkpoints.test_checkpoint_store import open_store, save, write_shares
place = open_store(sys.argv[1], Path(sys.argv[2]))
save(place, 5)
print("saved", flush=True)
write_shares(place, 10, 1.0)
"""


@needs_moto
@pytest.mark.slow
@pytest.mark.launches
def test_killed_in_the_middle_of_an_upload(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/killed"
    with proxied() as proxy:
        proxy.writes["step-00000010/rank-00001.safetensors"] = "stall"
        command = [sys.executable, "-c", KILLED, url, str(tmp_path)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
        )
        try:
            deadline = time.monotonic() + 60
            while ("PUT", "/checkpoints/killed/step-00000010/rank-00000.share.json") not in proxy.requests:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.wait(30)
    assert "step-00000010/rank-00000.safetensors" in names_in(url)
    place = StorePlace(url, section(tmp_path / "cache"))
    assert place.list_steps() == [5] and torch.equal(read_back(place, 5), WHOLE)
    place.claim("this", tmp_path / "run")
    assert not [name for name in names_in(url) if "step-00000010" in name]


def test_a_run_never_begins_anew_because_its_checkpoints_are_elsewhere(tmp_path: Path) -> None:
    config = write_tiny_corpus(tmp_path / "corpus")
    run, old, new = f"run.dir={tmp_path}/run", f"file://{tmp_path}/old", f"file://{tmp_path}/new"
    place = open_store(old, tmp_path)
    folder = RunFolder(load_config(config, [run, f"checkpoint.dir={old}"]))
    folder.close()
    save(place, 5)
    with pytest.raises(
        ConfigError,
        match=rf"checkpoint\.dir is {re.escape(new)}, which holds no checkpoint; expected the run's 1 check",
    ):
        RunFolder(load_config(config, [run, f"checkpoint.dir={new}"]))
    with pytest.raises(ConfigError, match=rf"checkpoint\.dir is {tmp_path}/run/checkpoints, which holds no checkpoint"):
        RunFolder(load_config(config, [run]))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = RunFolder(load_config(config, [run, f"checkpoint.dir={new}"]))
    moved.close()
    assert moved.run_id == folder.run_id


def test_a_run_whose_folder_was_lost_goes_on_with_the_config_of_its_checkpoints(tmp_path: Path) -> None:
    path, url = write_tiny_corpus(tmp_path / "corpus"), f"file://{tmp_path}/far"
    overrides = [f"run.dir={tmp_path}/new", f"checkpoint.dir={url}"]
    config = load_config(path, overrides)
    save(open_store(url, tmp_path), 5, about={"config": config.model_dump(mode="json")})
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 in the run folder, 0\.5 now"):
        RunFolder(load_config(path, [*overrides, "optim.lr=0.5"]))
    folder = RunFolder(config)
    folder.close()
    with pytest.raises(
        ConfigError, match=r"If that run's folder is lost and no job of it is left, remove file://.*/owner"
    ):
        StorePlace(url, section(tmp_path / "cache")).claim(folder.run_id, folder.path)


def test_from_scratch_sets_nothing_aside_that_is_in_a_store(tmp_path: Path) -> None:
    path, url = write_tiny_corpus(tmp_path / "corpus"), f"file://{tmp_path}/far"
    overrides = [f"run.dir={tmp_path}/run", f"checkpoint.dir={url}"]
    RunFolder(load_config(path, overrides)).close()
    save(open_store(url, tmp_path), 5)
    expected = r"resume\.from_scratch is true, and checkpoint\.dir is file://.*a store renames nothing.*Use another"
    with pytest.raises(ConfigError, match=expected):
        RunFolder(load_config(path, [*overrides, "resume.from_scratch=true"]))
    empty = f"checkpoint.dir=file://{tmp_path}/empty"
    RunFolder(load_config(path, [overrides[0], empty, "resume.from_scratch=true"])).close()


def test_from_scratch_sets_aside_a_folder_elsewhere_if_it_is_the_run_s(tmp_path: Path) -> None:
    path, far = write_tiny_corpus(tmp_path / "corpus"), tmp_path / "disk" / "far"
    overrides, anew = [f"run.dir={tmp_path}/run", f"checkpoint.dir={far}"], "resume.from_scratch=true"
    folder = RunFolder(load_config(path, overrides))
    place = open_place(CheckpointSection(dir=str(far)), folder.path, section(tmp_path / "cache"))
    place.claim("another run", tmp_path / "other")
    save(place, 5)
    folder.close()
    RunFolder(load_config(path, [*overrides, anew])).close()  # which `claim` refuses, as before
    assert place.list_steps() == [5]
    (far / "owner.json").unlink()
    place.claim(folder.run_id, folder.path)
    RunFolder(load_config(path, overrides)).close()
    folder = RunFolder(load_config(path, [*overrides, anew]))
    assert folder.events == [("from_scratch", f"the checkpoints of before are in {far}.abandoned-1, and stay there")]
    assert not far.exists() and (far.with_name("far.abandoned-1") / "step-00000005").is_dir()
    folder.close()
    place.claim(folder.run_id, folder.path)
    save(place, 5)
    RunFolder(load_config(path, [*overrides, anew])).close()  # once: the start before had it
    assert place.list_steps() == [5]


def test_a_folder_that_cannot_be_renamed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_corpus(tmp_path / "corpus")
    overrides = [f"run.dir={tmp_path}/run", f"checkpoint.dir={tmp_path}/far"]
    folder = RunFolder(load_config(path, overrides))
    folder.close()
    place = open_place(CheckpointSection(dir=f"{tmp_path}/far"), tmp_path, section(tmp_path / "cache"))
    place.claim(folder.run_id, folder.path)
    save(place, 5)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
    with pytest.raises(
        ConfigError, match=r"far cannot be renamed to far.abandoned-1 \(\[Errno 16\].*Move the checkpoints"
    ):
        RunFolder(load_config(path, [*overrides, "resume.from_scratch=true"]))


def test_a_folder_elsewhere_is_of_one_run_and_its_newest_start(tmp_path: Path) -> None:
    data = section(tmp_path / "cache")
    dead, alive, other = (open_place(CheckpointSection(dir=f"{tmp_path}/far"), tmp_path, data) for _ in range(3))
    dead.claim("this", tmp_path / "run")
    dead.begin(5, 1, 2)
    alive.claim("this", tmp_path / "run")
    with pytest.raises(StoreAccessError, match=r"far/owner\.json is of a start on .*which therefore writes no more"):
        dead.complete(5, "{}")
    with pytest.raises(StoreAccessError, match=r"far/owner\.json is of a start on"):
        dead.begin(10, 1, 2)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir is .*/far; expected a place of this run alone"):
        other.claim("other", tmp_path / "run")
    assert alive.list_steps() == []
    own = open_place(CheckpointSection(), tmp_path / "run", data)
    assert own.claim("any", tmp_path / "run") and str(own) == f"{tmp_path}/run/checkpoints"
    (tmp_path / "file").write_text("")
    blocked = open_place(CheckpointSection(dir=f"{tmp_path}/file/x"), tmp_path, data)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir is .*/file/x; expected a folder that can be written"):
        blocked.claim("this", tmp_path)
