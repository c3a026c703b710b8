"""Shares: merged, they give the bytes of one run, whatever their number, and whatever interrupted them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.prepare import main
from pretrain import corpus as corpus_module
from pretrain.errors import ConfigError, DataError
from pretrain.prepare import prepare
from pretrain.shards import Manifest
from pretrain.shares import files_of_share, parse_share
from tests.test_filters import FILTERS, write_texts
from tests.test_prepare import config_of, copy_of, hashes, text_of, write_corpus
from tests.token_writers import write_megatron


def without_shares(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(folder).items() if "share-" not in name}


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
    assert without_shares(folder) == hashes(done)
    for share in (folder / "shards").glob("share-*"):
        shutil.rmtree(share)
    prepare(config)  # it is complete
    assert hashes(folder) == hashes(done)
    counts = Manifest.load(folder / "shards").counts
    assert counts["duplicates"] >= 3 and counts["near_duplicates"] >= 12 and counts["masked_email"] == 15


def test_interrupted_shares_and_merges_go_on(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "BATCH_CHARACTERS", 2000)
    folder = copy_of(done, tmp_path / "fresh")
    config = config_of(folder, filters=FILTERS | {"repetition": False})
    real = corpus_module.ShardWriter.add
    for share, num_shares in (((1, 2), 0), ((2, 2), 0), (None, 2)):
        for num_left in (60, 150, 10**6):

            def add(writer, ids, left=[num_left]):  # noqa: B006
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(writer, ids)

            monkeypatch.setattr(corpus_module.ShardWriter, "add", add)
            try:
                prepare(config, share, num_shares)
            except KeyboardInterrupt:
                assert num_left < 10**6
    assert without_shares(folder) == hashes(done)


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
    assert without_shares(tmp_path / "shards") == expected


def test_shares_hold_every_file_once_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for trial in range(30):
        files = []
        for number in range(int(rng.integers(0, 20))):
            files.append(tmp_path / f"{trial}-{number:03d}.txt")
            files[-1].write_bytes(b"x" * int(rng.choice((0, 10, 500))))
        for count in (1, 2, 7, 40):
            assert sum((files_of_share(files, number, count) for number in range(1, count + 1)), []) == files


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
    records = folder / "shards/share-2-of-2/records.bin"
    records.write_bytes(records.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"records\.bin does not fit the shards beside it"):
        prepare(config, num_shares=2)
    (folder / "t.model").unlink()
    with pytest.raises(
        ConfigError, match=r"which does not exist; expected it, since every share needs .*--train-token"
    ):
        prepare(config_of(folder), (1, 2))
    with pytest.raises(SystemExit):
        main(["--share", "1/2", "--merge", "2", "config.yaml"])


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
