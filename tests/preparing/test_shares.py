"""Shares: merged, they give the bytes of one run, whatever their number, and whatever interrupted them."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from launch.prepare import main
from pretrain.data.shards import Manifest, ShardWriter
from pretrain.errors import ConfigError, DataError
from pretrain.preparing import json_lines
from pretrain.preparing import shares as shares_module
from pretrain.preparing.dry_run import forecast
from pretrain.preparing.json_lines import is_divisible
from pretrain.preparing.prepare import prepare
from pretrain.preparing.shares import files_of_share, parse_share
from pretrain.preparing.spills import SpillWriter
from tests.helpers.token_writers import write_megatron
from tests.preparing.test_filters import FILTERS, write_texts
from tests.preparing.test_prepare import config_of, copy_of, hashes, stop_after, text_of, write_corpus


def write_raw(folder: Path) -> None:
    """Files of every kind, with duplicates and near-duplicates in other files, and things that are masked."""
    write_corpus(folder, 120)
    write_texts(folder / "e")
    lines = [text_of(3), text_of(40), *(text_of(number, 80) + " and more" for number in (15, 30)), "new " * 30]
    (folder / "z.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines, text_of(3)]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shares") / "done"
    write_raw(folder / "raw")
    prepare(config_of(folder, filters=FILTERS | {"repetition": False}))
    return folder


@pytest.mark.parametrize("count", [1, 3, 20])
def test_merged_shares_are_what_one_run_makes(done: Path, tmp_path: Path, count: int) -> None:
    folder = copy_of(done, tmp_path / "fresh")
    config = config_of(folder, filters=FILTERS | {"repetition": False})
    for number in reversed(range(1, count + 1)):
        prepare(config, (number, count))
    assert not (folder / "shards/manifest.json").exists()
    prepare(config, num_shares=count)
    assert hashes(folder) == hashes(done)
    prepare(config, (1, count))  # as a job that is started once more
    prepare(config, num_shares=count)
    prepare(config)  # it is complete
    assert hashes(folder) == hashes(done)
    counts = Manifest.load(folder / "shards").counts
    assert counts["duplicates"] >= 3 and counts["near_duplicates"] >= 12 and counts["masked_email"] == 15


def test_interrupted_shares_and_merges_go_on(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_module, "BATCH_CHARACTERS", 2000)
    folder = copy_of(done, tmp_path / "fresh")
    config = config_of(folder, filters=FILTERS | {"repetition": False})
    for writer, share, num_shares in (
        (SpillWriter, (1, 2), 0), (SpillWriter, (2, 2), 0), (ShardWriter, None, 2),
    ):  # fmt: skip
        add = writer.add
        for num_left in (60, 150, 10**6):
            monkeypatch.setattr(writer, "add", stop_after(num_left, add))
            try:
                prepare(config, share, num_shares)
            except KeyboardInterrupt:
                assert num_left < 10**6
    assert hashes(folder) == hashes(done)


def test_a_merge_goes_on_with_other_shares_of_the_same_documents_only(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(done, tmp_path / "fresh")
    (folder / "raw").unlink()
    shutil.copytree(done / "raw", folder / "raw")
    config = config_of(folder, filters=FILTERS | {"repetition": False})
    prepare(config, (1, 2))
    prepare(config, (2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stop_after(150, ShardWriter.add))
        with pytest.raises(KeyboardInterrupt):
            prepare(config, num_shares=2)
    for number in (1, 2):
        shutil.rmtree(folder / f"shards/share-{number}-of-2")
    prepare(config)
    assert hashes(folder) == hashes(done)
    (folder / "shards/manifest.json").unlink()
    content = (folder / "raw/d00003.txt").read_bytes()
    (folder / "raw/d00003.txt").write_bytes(content.upper())
    with pytest.raises(DataError, match="shards: the source's documents are not those that its complete shards hold"):
        prepare(config)


def test_ids_of_others_are_shared_too(done: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    (tmp_path / "raw").mkdir()
    shutil.copy(done / "t.model", tmp_path / "t.model")
    for number in range(5):
        documents = [rng.integers(4, 400, 30) for _ in range(40)]
        write_megatron(tmp_path / f"raw/part{number}", [*documents, documents[0]])
    prepare(config_of(tmp_path))
    expected = hashes(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")
    for number in (1, 2, 3):
        prepare(config_of(tmp_path), (number, 3))
    prepare(config_of(tmp_path), num_shares=3)
    assert hashes(tmp_path / "shards") == expected


def test_shares_hold_every_file_once_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for trial in range(30):
        files = []
        for number in range(int(rng.integers(0, 20))):
            files.append(tmp_path / f"{trial}-{number:03d}.txt")
            files[-1].write_bytes(b"x" * int(rng.choice((0, 10, 500))))
        for count in (1, 2, 7, 40):
            shares = [files_of_share(files, "auto", number, count) for number in range(1, count + 1)]
            assert sum((chosen for chosen, _ in shares), []) == files
            assert not any(parts for _, parts in shares)


def test_shares_of_json_lines_are_of_equal_size(tmp_path: Path) -> None:
    sizes = {"a.jsonl": 1000, "b.jsonl": 10, "c.jsonl.gz": 50, "d.jsonl": 5000, "e.jsonl": 0, "f.txt": 40}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    files = sorted(tmp_path.iterdir())
    shares = [files_of_share(files, "auto", number, 9) for number in range(1, 10)]
    for file in files:
        read = [parts.get(file, range(sizes[file.name])) for chosen, parts in shares if file in chosen]
        assert [part.start for part in read] == [0, *(part.stop for part in read[:-1])]  # each byte once
        assert read[-1].stop == sizes[file.name]
        assert len(read) == 1 or is_divisible(file, "auto")
    whole = [sum(len(parts.get(file, range(sizes[file.name]))) for file in chosen) for chosen, parts in shares]
    assert sum(whole) == 6100 and max(whole) - min(whole) <= 90  # the two that are not divided


@pytest.mark.parametrize("count, drops", [(2, True), (7, True), (60, True), (7, False)])
def test_one_file_over_many_shares_gives_the_same_bytes(
    done: Path, tmp_path: Path, count: int, drops: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(json_lines, "READ_BYTES", 16)
    folder = copy_of(done, tmp_path / "fresh")
    (folder / "raw").unlink()
    (folder / "raw").mkdir()
    lines = [json.dumps({"text": text_of(number, number % 60 + 1)}, ensure_ascii=False) for number in range(60)]
    lines[10:10] = ["", "{", json.dumps({"text": "x" * 20_000}), "", json.dumps({"text": "\ud800"})]
    (folder / "raw/a.jsonl").write_text("\ufeff" + "\r\n".join([*lines, *lines[:30]]))
    config = config_of(folder, drop_duplicates=drops)
    prepare(config)
    expected = hashes(folder)
    shutil.rmtree(folder / "shards")
    for number in range(1, count + 1):
        prepare(config, (number, count))
    capsys.readouterr()
    prepare(config, num_shares=count)
    assert hashes(folder) == expected
    place = re.search(r"a\.jsonl:byte ([\d,]+): it is not JSON", capsys.readouterr().err)
    assert place is not None
    begin = int(place[1].replace(",", ""))
    assert (folder / "raw/a.jsonl").read_bytes()[begin - 1 : begin + 3] == b"\n{\r\n"
    counts = Manifest.load(folder / "shards").counts
    assert (counts["files_read"], counts["documents_read"], counts.get("duplicates", 0)) == (1, 95, 26 * drops)


def test_wrong_use_is_refused(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0/3", "4/3", "3", "a/b", "-1/2", "1/"):
        with pytest.raises(ConfigError, match=f"--share is {text}; expected K/N with K from 1 to N"):
            parse_share(text)
    folder = copy_of(done, tmp_path / "fresh")
    config = config_of(folder)
    prepare(config, (2, 2))
    with pytest.raises(DataError, match=r"share-1-of-2 is not complete; expected every share .* --share 1/2"):
        prepare(config, num_shares=2)
    prepare(config, (1, 2))
    with pytest.raises(
        ConfigError, match=r"share-1-of-2 holds shards that were prepared otherwise; changed .*data\.filt"
    ):
        prepare(config_of(folder, filters={"min_characters": 5}), num_shares=2)
    prepare(config_of(folder, val_fraction=0.2), (1, 2))  # what only the merge depends on may differ
    spill = folder / "shards/share-2-of-2/spill-000001"
    content = spill.read_bytes()
    spill.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"share-2-of-2 is not complete; expected every share .* --share 2/2"):
        prepare(config, num_shares=2)
    spill.write_bytes(content[:-60] + bytes([content[-60] ^ 1]) + content[-59:])
    with pytest.raises(
        DataError, match=r"spill-000001 cannot be used: a document has another crc32.* --share 2/2: the"
    ):
        prepare(config, num_shares=2)
    spill.unlink()
    prepare(config, (2, 2))
    assert spill.read_bytes() == content
    (folder / "t.model").unlink()
    with pytest.raises(
        ConfigError, match=r"which does not exist; expected it, since every share needs .*--train-token"
    ):
        prepare(config_of(folder), (1, 2))
    with pytest.raises(SystemExit):
        main(["--share", "1/2", "--merge", "2", "config.yaml"])


def test_shares_that_were_given_up_are_deleted(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "fresh")
    config = config_of(folder, filters=FILTERS | {"repetition": False})
    prepare(config, (1, 3))
    prepare(config)  # without them
    assert not list((folder / "shards").glob("share-*"))
    (folder / "shards/share-2-of-3").mkdir()  # as if it was stopped while it deleted them
    prepare(config)
    assert not list((folder / "shards").glob("share-*"))
    assert hashes(folder) == hashes(done)


def test_a_finished_corpus_is_compared_by_every_mode(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "fresh")
    shutil.copytree(done / "shards", folder / "shards")
    options = {"filters": FILTERS | {"repetition": False}}
    prepare(config_of(folder, **options), (1, 2))
    assert forecast(config_of(folder, **options))["sources"][0]["state"] == "complete"
    changed = config_of(folder, **options, val_fraction=0.2)
    for mode in (prepare, partial(prepare, share=(1, 2)), partial(prepare, num_shares=2), forecast):
        with pytest.raises(
            ConfigError, match=r"prepared otherwise; changed since then: data.val_fraction from 0.1 to 0.2"
        ):
            mode(changed)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path / "raw", 80)
    (tmp_path / "config.yaml").write_text(
        f"tokenizer: {{model: {tmp_path}/t.model, vocab_size: 420, sample_bytes: 20000}}\n"
        f"data: {{sources: [{{name: web, paths: [{tmp_path}/raw], shards: {tmp_path}/shards}}], seq_len: 64, "
        "val_fraction: 0.1, prepare_processes: 1}\n"
        "model: {dim: 16, num_layers: 1, num_heads: 1}\noptim: {lr: 0.001}\n"
        "train: {num_steps: 1, global_batch_size: 1, micro_batch_size: 1}\n"
    )
    config = str(tmp_path / "config.yaml")
    assert main([config, "--share", "1/2"]) == 2 and "--train-tokenizer" in capsys.readouterr().err
    assert main([config, "--train-tokenizer"]) == 0 and not (tmp_path / "shards").exists()
    assert main([config, "--share", "1/2"]) == main([config, "--share", "2/2"]) == main([config, "--merge", "2"]) == 0
    assert Manifest.load(tmp_path / "shards").counts["documents_read"] == 80
    assert main(["--verify", str(tmp_path / "shards"), "--processes", "1"]) == 0


@pytest.mark.parametrize("option", ["--merge", "--samples", "--processes"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_a_number_that_is_none_is_wrong_use(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["config.yaml", f"{option}={value}"])
    message = f"argument {option}: it is {value or 'empty'}; expected a whole number from 1"
    assert stopped.value.code == 2 and message in capsys.readouterr().err
