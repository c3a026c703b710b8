"""--verify: every kind of damage is found and named, and sound shards are passed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.prepare import main
from pretrain.data.row_table import build_row_tables
from pretrain.data.shards import Manifest, Shard, load_index
from pretrain.preparing.verify_shards import Problem, verify
from tests.helpers.data_helpers import flip_bit, make_corpus, random_documents


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "web"
    folder.mkdir()
    make_corpus(folder, random_documents(900, 1), random_documents(60, 2), shard_bytes=20_000)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "web"))


def shard_of(folder: Path, number: int = 1) -> tuple[Shard, Path, np.ndarray]:
    shard = Manifest.load(folder).train[number]
    return shard, folder / f"{shard.name}.tar", np.array(load_index(folder, shard))


def problems(folder: Path, num_processes: int = 1) -> list[Problem]:
    return [Problem(**problem) for problem in verify(folder, num_processes)["problems"]]


def test_sound_shards_are_passed(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sound.rglob("*")}
    assert main(["--verify", str(sound), "--processes", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"read \d+ shards with 960 documents, .* by 1 processes \(.*/s\): every checksum is right", text)
    assert {path: path.stat().st_mtime_ns for path in sound.rglob("*")} == before
    manifest = Manifest.load(sound)
    sizes = [path.stat().st_size for path in sound.glob("*.tar")] + [
        path.stat().st_size for path in sound.glob("*.npy")
    ]
    content = verify(sound, 1)
    assert content["num_bytes"] == sum(sizes) and content["num_shards"] == len(manifest.train + manifest.val) > 4


def test_of_a_link_the_file_that_is_gone_is_named(folder: Path) -> None:
    _, path, _ = shard_of(folder)
    path.unlink()
    path.symlink_to("nowhere.tar")
    assert [str(one) for one in problems(folder)] == [
        f"{path.name}: it is missing (a link to {folder / 'nowhere.tar'})"
    ]


def test_wide_ids_and_pieces_smaller_than_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.preparing.verify_shards._READ_BYTES", 100)
    documents = [ids.astype("uint32") for ids in random_documents(200, 3)]
    (tmp_path / "wide").mkdir()
    make_corpus(tmp_path / "wide", documents, shard_bytes=20_000, vocab_size=70_000)
    assert problems(tmp_path / "wide") == []


@pytest.mark.parametrize("read_bytes", [100, 1 << 22])
def test_a_flipped_bit_of_a_document_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    monkeypatch.setattr("pretrain.preparing.verify_shards._READ_BYTES", read_bytes)
    shard, path, index = shard_of(folder)
    begin, end = (int(index["offset"][7]) + extra for extra in (0, 2 * int(index["num_tokens"][7])))
    flip_bit(path, end - 2)
    assert problems(folder) == [Problem(path.name, "its ids have another crc32 than in the index", 7, 7, begin, end)]
    assert str(problems(folder)[0]).startswith(f"{path.name}: document 7 (bytes {begin} to {end}): its ids")


@pytest.mark.parametrize("place", [0, 100, 150, 300, 511])
def test_a_flipped_bit_of_a_header_is_placed_there(folder: Path, place: int) -> None:
    _, path, _ = shard_of(folder)
    flip_bit(path, place)
    assert [(one.first_document, one.begin_byte, one.end_byte) for one in problems(folder)] == [(None, 0, 512)]


def test_a_flipped_bit_behind_the_last_document_is_placed_there(folder: Path) -> None:
    _, path, index = shard_of(folder)
    flip_bit(path, path.stat().st_size - 3)
    end = int(index["offset"][-1] + 2 * index["num_tokens"][-1])
    assert [(one.begin_byte, one.end_byte) for one in problems(folder)] == [(end, path.stat().st_size)]


def test_truncation_inside_a_document_names_what_is_lost(folder: Path) -> None:
    shard, path, index = shard_of(folder)
    cut = int(index["offset"][20]) + 3
    os.truncate(path, cut)
    found = problems(folder)
    assert [(one.text, one.first_document, one.last_document) for one in found] == [
        (f"it is cut short: it has {cut:,} bytes, not {shard.num_bytes:,}", None, None),
        ("it is cut off", 20, 20),
        ("missing", 21, shard.num_documents - 1),
    ]


def test_truncation_between_documents_and_behind_the_last(folder: Path) -> None:
    shard, path, index = shard_of(folder)
    end = int(index["offset"][-1] + 2 * index["num_tokens"][-1])
    os.truncate(path, -(-end // 512) * 512)  # the member's end, where tar readers see nothing wrong
    assert [one.begin_byte for one in problems(folder)] == [-(-end // 512) * 512]
    os.truncate(path, int(index["offset"][20]))
    assert [(one.text, one.first_document) for one in problems(folder)[1:]] == [("missing", 20)]


@pytest.mark.parametrize("member_bytes", [1 << 20, 2000])
def test_truncation_at_a_member_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member_bytes: int) -> None:
    monkeypatch.setattr("pretrain.data.shards._MEMBER_BYTES", member_bytes)
    (tmp_path / "web").mkdir()
    make_corpus(tmp_path / "web", random_documents(300, 4), shard_bytes=30_000)
    assert problems(tmp_path / "web") == []
    shard, path, index = shard_of(tmp_path / "web", 0)
    ends = index["offset"] + 2 * index["num_tokens"]
    last = int(np.flatnonzero(index["offset"][1:] != ends[:-1])[-1]) if member_bytes == 2000 else len(index) - 1
    os.truncate(path, -(-int(ends[last]) // 512) * 512)
    found = problems(tmp_path / "web")
    assert "cut short" in found[0].text
    assert [one.first_document for one in found[1:]] == ([last + 1] if last + 1 < len(index) else [])
    if member_bytes == 2000:
        assert found[1].last_document == shard.num_documents - 1


def test_missing_and_empty_files(folder: Path) -> None:
    _, path, _ = shard_of(folder, 0)
    path.unlink()
    second, second_path, _ = shard_of(folder, 1)
    second_path.write_bytes(b"")
    third = folder / "train-000002.index.npy"
    third.unlink()
    (folder / "val-000000.index.npy").write_bytes(b"")
    assert [(one.file, one.text) for one in problems(folder)] == [
        (path.name, "it is missing"),
        (second_path.name, f"it is empty: it has 0 bytes, not {second.num_bytes:,}"),
        (second_path.name, "missing"),
        (third.name, "it is missing"),
        (
            "val-000000.index.npy",
            "its sha256 is not the manifest's, so documents of this shard cannot be checked one by one",
        ),
    ]


def test_another_shard_under_a_right_name(folder: Path) -> None:
    first, path, _ = shard_of(folder, 0)
    shutil.copy(folder / "train-000001.tar", path)
    found = problems(folder)
    assert {one.file for one in found} == {path.name}
    assert len([one for one in found if one.first_document is not None]) >= 1
    os.truncate(path, first.num_bytes)  # of the right size, too
    if os.path.getsize(folder / "train-000001.tar") >= first.num_bytes:
        assert "it is another shard's file, most likely" in str(problems(folder)[-1])


def test_another_shard_with_its_own_index(folder: Path) -> None:
    for suffix in (".tar", ".index.npy"):
        shutil.copy(folder / f"train-000001{suffix}", folder / f"train-000000{suffix}")
    files = {one.file: one.text for one in problems(folder)}
    assert set(files) == {"train-000000.tar", "train-000000.index.npy"}
    assert "its sha256 is not the manifest's" in files["train-000000.index.npy"]


def test_a_tar_that_fits_its_index_but_not_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["train"][1]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "its sha256 is not the manifest's, though its documents fit" in str(problems(folder)[0])


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    documents = random_documents(100, 5, vocab_size=800)
    documents[30][1] = 999
    (tmp_path / "web").mkdir()
    make_corpus(tmp_path / "web", documents, shard_bytes=10**6, vocab_size=900)
    found = problems(tmp_path / "web")
    assert [(one.first_document, one.text) for one in found] == [
        (30, "it holds ids that are not below the vocabulary size 900")
    ]


def test_row_tables_are_checked_too(folder: Path) -> None:
    path = folder / "rows-32/train.segments.npy"
    segments = np.load(path)
    segments["length"][5] += 1
    np.save(path, segments)
    assert [str(one) for one in problems(folder)] == [
        "rows-32/train.segments.npy: its sha256 is not that in identity.json"
    ]
    identity = folder / "rows-32/identity.json"
    listed = json.loads(identity.read_text())
    del listed["files"]  # as in folders that were written before
    identity.write_text(json.dumps(listed))
    assert re.search(r"rows-32: its rows of train-000000 hold [\d,]+ tokens to ask for", str(problems(folder)[0]))
    (folder / "rows-32/train.blocks.npy").write_bytes(b"")
    assert "rows-32" in str(problems(folder)[0])
    shutil.rmtree(folder / "rows-32")
    assert problems(folder) == []
    build_row_tables(folder, Manifest.load(folder), 64)
    assert problems(folder) == []


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_row_tables_of_every_packing_are_checked(folder: Path, packing: str) -> None:
    build_row_tables(folder, Manifest.load(folder), 64, packing)
    assert problems(folder) == []
    path = folder / f"rows-64-{packing}/val.segments.npy"
    segments = np.load(path)
    segments["length"][3] += 1
    np.save(path, segments)
    assert [one.file for one in problems(folder)] == [f"rows-64-{packing}/val.segments.npy"]
    shutil.copy(folder / "rows-32/identity.json", path.with_name("identity.json"))
    assert "its packing, seq_len differs" in str(problems(folder)[0])


@pytest.mark.launches
def test_several_processes_find_the_same_and_the_exit_status_is_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path, index = shard_of(folder)
    for number in (3, 4, 9):
        flip_bit(path, int(index["offset"][number]))
    alone = problems(folder)
    assert [(one.first_document, one.last_document) for one in alone] == [(3, 4), (9, 9)]
    assert main(["--verify", str(folder), "--processes", "2"]) == 1
    text = capsys.readouterr().out
    assert f"problem: {path.name}: documents 3 to 4 (bytes " in text and "2 problems. Restore these files" in text
    assert main(["--verify", str(folder), "--processes", "2", "--json"]) == 1
    assert [Problem(**one) for one in json.loads(capsys.readouterr().out)["problems"]] == alone


def test_wrong_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--verify", str(folder), "config.yaml"], "--verify takes a folder or URL alone, not config.yaml"),
        (["--processes", "2", "config.yaml"], "--processes is for --verify"),
        (["--verify", str(folder), "--dry-run"], "not allowed with"),
        ([], "CONFIG is missing"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert main(["--verify", str(folder / "nothing")]) == 1
    assert "manifest.json is missing; expected a prepared corpus" in capsys.readouterr().err


def test_damaged_rows_are_no_reason_to_delete_the_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(folder / "rows-32/train.segments.npy", 1000)
    assert main(["--verify", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(f"1 problems. Delete {folder}/rows-32 and run: python launch/prepare.py CONFIG")
    flip_bit(next(folder.glob("train-*.tar")), 600)
    assert main(["--verify", str(folder)]) == 1
    assert f"and prepare it again. Delete {folder}/rows-32 and run: " in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--inspect", "--verify"])
def test_a_file_is_no_folder(folder: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, str(folder / "manifest.json")]) == 2
    message = f"{option}: {folder}/manifest.json is a file; expected the folder of prepared shards. Name {folder}"
    assert message in capsys.readouterr().err
