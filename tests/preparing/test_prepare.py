"""Prepare: the same bytes for any number of processes and any interruption, and every refusal."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from launch.prepare import main
from pretrain.data.row_table import RowTable
from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest, ShardWriter
from pretrain.errors import ConfigError, DataError
from pretrain.options.config import Config
from pretrain.preparing import corpus as corpus_module
from pretrain.preparing import prepare as prepare_module
from pretrain.preparing import shares as shares_module
from pretrain.preparing.journal import LOCK_NAME, file_lock
from pretrain.preparing.prepare import prepare
from pretrain.preparing.sources import document_digest, is_validation
from pretrain.preparing.spills import SpillWriter
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 420
WORDS = [random.Random(number).randbytes(random.Random(number).randint(1, 5)).hex() for number in range(3000)]


def text_of(number: int, num_words: int = 60) -> str:
    rng = random.Random(number)
    separators = (" ", " ", " ", "\n", "  ", "\t", "\r\n")
    return "".join(rng.choice(WORDS) + rng.choice(separators) for _ in range(num_words)) + rng.choice(
        ("é", "日本", "🎉")
    )


def write_corpus(folder: Path, num_texts: int = 400) -> list[str]:
    """One file of every kind; returns the documents in the order in which they are read."""
    folder.mkdir(parents=True)
    texts = [text_of(number) for number in range(num_texts)]
    quarter = num_texts // 4
    parts = [texts[begin : begin + quarter] for begin in range(0, num_texts, quarter)]
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in part).encode() for part in parts]
    (folder / "a.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[2]))
    for number, text in enumerate(parts[3]):
        (folder / f"d{number:05d}.txt").write_text(text, newline="")
    return texts


def config_of(folder: Path, *, source: dict | None = None, tokenizer: dict | None = None, **data: object) -> Config:
    web = {"name": "web", "paths": [str(folder / "raw")], "shards": str(folder / "shards")} | (source or {})
    return Config.model_validate(
        {
            "tokenizer": {"model": str(folder / "t.model"), "vocab_size": VOCAB_SIZE, "sample_bytes": 30_000}
            | (tokenizer or {}),
            "data": {
                "sources": [web],
                "seq_len": 64,
                "val_fraction": 0.1,
                "shard_bytes": 16_384,
                "prepare_processes": 1,
            }
            | data,
            "model": {"dim": 16, "num_layers": 1, "num_heads": 1},
            "optim": {"lr": 0.001},
            "train": {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw text, tokenizer and shards, prepared in one go by one process."""
    folder = tmp_path_factory.mktemp("prepare") / "done"
    write_corpus(folder / "raw")
    prepare(config_of(folder))
    return folder


@pytest.fixture
def fresh(done: Path, tmp_path: Path) -> Path:
    """A folder with the same raw text and tokenizer, not prepared."""
    return copy_of(done, tmp_path / "fresh")


def copy_of(done: Path, folder: Path, with_shards: bool = False) -> Path:
    folder.mkdir()
    (folder / "raw").symlink_to(done / "raw")
    shutil.copy(done / "t.model", folder)
    if with_shards:
        shutil.copytree(done / "shards", folder / "shards")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and "raw" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_order(texts: list[str]) -> list[str]:
    """Texts as they lie in shards: by their hash, but not by the half of it that decides the split."""
    digests = {text: document_digest(text.encode()) for text in texts}
    return sorted(texts, key=lambda text: digests[text][8:] + digests[text][:8])


def read_back(folder: Path, split: str) -> list[str]:
    manifest, tokenizer = Manifest.load(folder / "shards"), SentencePieceTokenizer(folder / "t.model")
    texts = []
    for shard in manifest.shards(split):
        reader = ShardReader(folder / "shards", shard, manifest.dtype)
        for number in range(shard.num_documents):
            ids = reader.read(number)
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids))
        reader.close()
    return texts


def test_every_document_comes_back_exactly_in_the_order_of_the_hashes(done: Path) -> None:
    texts = in_order([text_of(number) for number in range(400)])
    expected = {
        split: [text for text in texts if is_validation(document_digest(text.encode()), 0.1) == (split == "val")]
        for split in ("train", "val")
    }
    manifest = Manifest.load(done / "shards")
    assert {split: read_back(done, split) for split in expected} == expected
    assert manifest.text_bytes == {split: len("".join(part).encode()) for split, part in expected.items()}
    assert manifest.counts == {"documents_read": 400, "files_read": 103}
    assert manifest.tokenizer_fingerprint == SentencePieceTokenizer(done / "t.model").fingerprint
    assert (manifest.corpus, manifest.vocab_size, manifest.dtype) == ("web", VOCAB_SIZE, "uint16")
    assert len(manifest.train) > 3 and len(manifest.val) >= 1
    for split in expected:
        assert RowTable.open(done / "shards", manifest, split, 64).num_rows > 0
    assert sorted(path.name for path in done.iterdir()) == ["raw", "shards", "t.model"]
    assert not [path.name for path in (done / "shards").iterdir() if path.name.startswith(".")]


def test_spills_are_written_after_a_while_too_and_change_nothing(
    done: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = SpillWriter.write, []
    monkeypatch.setattr(SpillWriter, "write", lambda writer: sizes.append(writer.num_documents) or real(writer))
    monkeypatch.setattr(shares_module, "SPILL_SECONDS", 0.0)
    monkeypatch.setattr(shares_module, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(shares_module, "spill_size", lambda *sizes: 10**9)  # or they would be full before
    prepare(config_of(fresh))
    assert len(sizes) > 30 and sum(sizes) == 400
    assert hashes(fresh) == hashes(done)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_processes(
    done: Path, tmp_path: Path, num_processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares_module, "BATCH_CHARACTERS", 2000)
    (tmp_path / "raw").symlink_to(done / "raw")
    prepare(config_of(tmp_path, prepare_processes=num_processes))  # trains the tokenizer too
    assert hashes(tmp_path) == hashes(done)


def test_shards_depend_on_the_texts_not_on_their_places(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "turned")
    (folder / "raw").unlink()
    (folder / "raw").mkdir()
    lines = [json.dumps({"text": text_of(number)}) for number in reversed(range(400))]
    (folder / "raw/z.jsonl").write_text("\n".join(lines))
    prepare(config_of(folder))
    same = [name for name in hashes(done) if name.endswith((".tar", ".npy"))]
    assert {name: hashes(folder)[name] for name in same} == {name: hashes(done)[name] for name in same}


def test_documents_are_spread_over_the_whole_corpus(done: Path) -> None:
    number_of = {text_of(number): number for number in range(400)}
    numbers = np.array([number_of[text] for text in read_back(done, "train")])
    assert np.abs(np.corrcoef(numbers, np.arange(len(numbers)))[0, 1]) < 0.15  # by chance 0.05
    files = numbers // 100  # the four files, a quarter of each place of the corpus
    for part in np.array_split(files, 4):
        assert np.bincount(part, minlength=4).min() > 10


KILLER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.preparing.test_prepare import config_of, copy_of, hashes
from pretrain.preparing.prepare import prepare
import webdataset  # imported once, before the forks

done, work, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
expected = hashes(done)

def run(folder, kill_at):
    pid = os.fork()
    if pid == 0:
        count = 0
        def dying(function):
            def call(*arguments, **named):
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), 9)
                return function(*arguments, **named)
            return call
        os.fsync, os.replace, os.unlink = dying(os.fsync), dying(os.replace), dying(os.unlink)
        try:
            prepare(config_of(folder))
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

kill_at, statuses = 1, []
while not statuses or statuses[-1] == -9:
    folder = copy_of(done, work / str(kill_at))
    first, _ = run(folder, kill_at), run(folder, 7)  # a second time while it goes on, then to the end
    statuses.append(first)
    assert run(folder, 0) == 0, kill_at
    found = hashes(folder)
    found.pop("shards/.prepare.lock", None)  # all there was left to do was to delete it
    assert found == expected, (kill_at, sorted(set(found.items()) ^ set(expected.items())))
    kill_at += 1 if kill_at < 12 else step
print("killed", statuses.count(-9))
"""


@pytest.mark.launches
@pytest.mark.slow
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(done: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER.format(root=str(ROOT)), str(done), str(tmp_path), "16"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert killed.returncode == 0, killed.stdout[-2000:] + killed.stderr[-2000:]
    assert int(killed.stdout.split()[-1]) > 10  # it really was killed, at many places


CONFIG = """
tokenizer: {{model: {folder}/t.model, vocab_size: {vocab_size}, sample_bytes: 30000}}
data:
  sources: [{{name: web, paths: [{folder}/raw], shards: {folder}/shards}}]
  seq_len: 64
  val_fraction: 0.1
  shard_bytes: 16384
  prepare_processes: 2
model: {{dim: 16, num_layers: 1, num_heads: 1}}
optim: {{lr: 0.001}}
train: {{num_steps: 1, global_batch_size: 1, micro_batch_size: 1}}
"""


def command_in(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, vocab_size=VOCAB_SIZE))
    return [sys.executable, str(ROOT / "launch/prepare.py"), str(folder / "config.yaml")]


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that these tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.launches
def test_signals_stop_the_command_and_it_goes_on(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    write_corpus(folder / "raw", 4000)  # far more than is done before the last signal
    shutil.copy(done / "t.model", folder)
    command = command_in(folder)
    for how, pattern, wanted in (
        (signal.SIGINT, "share-1-of-1/spill-*", 2),
        (signal.SIGTERM, "share-1-of-1/spill-*", 10),
        (signal.SIGKILL, "*.tar", 2),
        (signal.SIGTERM, "*.tar", 10),
    ):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd="/", start_new_session=True, preexec_fn=heed_ctrl_c
        )
        deadline = time.monotonic() + 60
        while len(list((folder / "shards").glob(pattern))) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)  # a terminal signals the workers too
        message = process.communicate(timeout=60)[1]
        if how == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 75
            assert message.endswith("stopped: what is complete is kept; the same command goes on where it stopped\n")
        assert not (folder / "shards/manifest.json").exists()
        assert len(list((folder / "shards").glob(pattern))) >= wanted
    assert main(command[2:]) == 0
    assert main([*command[2:], "data.prepare_processes=1", f"data.sources.0.shards={folder}/again"]) == 0
    assert hashes(folder / "shards") == hashes(folder / "again")


def test_complete_spills_are_not_tokenized_again(done: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, counts = SentencePieceTokenizer.encode, Counter[str]()

    def count(self: SentencePieceTokenizer, text: str):
        counts["documents"] += 1
        if counts["documents"] == 300:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(SentencePieceTokenizer, "encode", count)
    monkeypatch.setattr(shares_module, "BATCH_CHARACTERS", 2000)
    with pytest.raises(KeyboardInterrupt):
        prepare(config_of(fresh))
    share = fresh / "shards/share-1-of-1"
    num_kept = sum(json.loads(line)["spill"]["num_documents"] for line in journal_lines(share)[1:])
    assert 100 < num_kept < 300
    assert not list(share.glob(".*.tmp"))
    counts["documents"] = 1000
    prepare(config_of(fresh))
    assert counts["documents"] == 1000 + 400 - num_kept
    assert hashes(fresh) == hashes(done)


def journal_lines(folder: Path) -> list[str]:
    return (folder / "prepare.jsonl").read_text().splitlines()


def test_a_second_pass_that_goes_on_neither_reads_the_source_nor_makes_complete_shards_again(
    done: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", stop_after(250, add))
    with pytest.raises(KeyboardInterrupt):
        prepare(config_of(fresh))
    num_kept = sum(json.loads(line)["shard"]["num_documents"] for line in journal_lines(fresh / "shards")[1:])
    assert 200 < num_kept <= 250
    (fresh / "raw").unlink()
    (fresh / "raw").mkdir()
    for path in (done / "raw").iterdir():  # nothing of what the files hold is read
        (fresh / "raw" / path.name).write_bytes(b"\xff" * path.stat().st_size)
    monkeypatch.setattr(ShardWriter, "add", stop_after(400 - num_kept, add))
    prepare(config_of(fresh))
    assert hashes(fresh) == hashes(done)


def test_a_full_disk_is_an_error_that_keeps_what_is_complete(
    done: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, Counter[str]()

    def fill(file: int) -> None:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    for calls["left"] in (0, 3, 6, 30, 45, 70):
        monkeypatch.setattr(os, "fsync", fill)
        with pytest.raises(DataError, match="No space left on device.* (run again|kept)"):
            prepare(config_of(fresh))
        monkeypatch.undo()
        assert not list((fresh / "shards").rglob(".*.tar.tmp")) + list((fresh / "shards").rglob(".spill-*"))
    assert len(journal_lines(fresh / "shards")) > 3
    prepare(config_of(fresh))
    assert hashes(fresh) == hashes(done)


def test_nothing_to_do_and_only_new_rows(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(done, tmp_path / "again", with_shards=True)
    before = hashes(folder)
    prepare(config_of(folder))
    assert capsys.readouterr().err == f"web: {folder}/shards is complete; nothing to do\n"
    assert hashes(folder) == before
    prepare(config_of(folder, seq_len=32))
    assert capsys.readouterr().err == f"web: {folder}/shards is complete; added its rows of 32 tokens\n"
    assert RowTable.open(folder / "shards", Manifest.load(folder / "shards"), "train", 32).num_rows > 0
    (folder / "shards/rows-32/train.offsets.npy").unlink()
    prepare(config_of(folder, seq_len=32))
    assert capsys.readouterr().err.endswith("added its rows of 32 tokens\n")
    (folder / "shards").chmod(0o555)  # complete ones may be read-only
    prepare(config_of(folder, prepare_processes=2, on_bad_document="error"))  # neither changes a byte
    (folder / "shards").chmod(0o755)
    assert capsys.readouterr().err.endswith("nothing to do\n")


CHANGES = {
    "val_fraction": ({"val_fraction": 0.2}, "data.val_fraction from 0.1 to 0.2"),
    "duplicates": ({"drop_duplicates": False}, "data.drop_duplicates from True to False"),
    "shard_bytes": ({"shard_bytes": 8192}, "data.shard_bytes from 16384 to 8192"),
    "name": ({"source": {"name": "code"}}, r"data.sources\[\].name from web to code"),
    "field": ({"source": {"text_field": "body"}}, r"data.sources\[\].text_field from text to body"),
}


@pytest.mark.parametrize("state", ["complete", "begun", "complete without journal"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_config_is_refused(done: Path, tmp_path: Path, change: str, state: str) -> None:
    folder = copy_of(done, tmp_path / "changed", with_shards=True)
    options, message = CHANGES[change]
    if state == "begun":
        (folder / "shards/manifest.json").unlink()
    elif state == "complete without journal":
        (folder / "shards/prepare.jsonl").unlink()
        prepare(config_of(folder))
        message = message if change == "name" else "the hash of all settings from"
    before = hashes(folder)
    with pytest.raises(ConfigError, match=f"shards holds shards that were prepared otherwise; changed since then: .*{message}"
                       ".* Set another `shards` folder for this source, or delete this folder"):  # fmt: skip
        prepare(config_of(folder, **options))
    assert hashes(folder) == before


@pytest.mark.parametrize("pattern, shards", [
    ("raw", "raw/shards"), ("raw", "raw"), ("raw", "raw/a/b"), ("raw/*", "raw/shards"), ("r*w", "raw/shards"),
    ("raw/**/*.jsonl", "raw/shards"), ("raw/**", "raw/a/b"), ("**/*", "raw"), ("raw/*.*", "raw"),
])  # fmt: skip
def test_shards_among_the_files_that_they_are_made_of_are_refused(tmp_path: Path, pattern: str, shards: str) -> None:
    write_corpus(tmp_path / "raw", 8)
    source = {"paths": [str(tmp_path / pattern)], "shards": str(tmp_path / shards)}
    before = sorted(tmp_path.rglob("*"))
    for share in (None, (1, 2)):
        with pytest.raises(ConfigError, match=r"data.sources\[web\].shards is \S+, which lies within its paths \('"):
            prepare(config_of(tmp_path, source=source), share)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("pattern, shards", [("raw/*.txt", "raw"), ("raw", "raw/.hidden"), ("raw", "raw-2"),
                                             ("raw/*.jsonl", "raw/shards")])  # fmt: skip
def test_shards_beside_the_files_that_are_named_are_fine(fresh: Path, pattern: str, shards: str) -> None:
    (fresh / "raw").unlink()
    write_corpus(fresh / "raw", 80)
    config = config_of(fresh, source={"paths": [str(fresh / pattern)], "shards": str(fresh / shards)})
    prepare(config)
    prepare(config)


def as_before_the_shuffle(folder: Path) -> None:
    """Make a folder one of the version that wrote documents in the order of the files."""
    journal, manifest = folder / "shards/prepare.jsonl", folder / "shards/manifest.json"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    del lines[0]["recipe"]["the order of documents"]
    for number, line in enumerate(lines[1:]):
        line["chain"] = f"{line.pop('documents')}{number}"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {key: value for key, value in lines[0]["recipe"].items() if value is not None}
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source_fingerprint": fingerprint}))


def test_corpora_of_before_the_shuffle_are_taken_as_they_are_if_they_are_complete(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(done, tmp_path / "former", with_shards=True)
    as_before_the_shuffle(folder)
    manifest, journal = folder / "shards/manifest.json", folder / "shards/prepare.jsonl"
    begun = journal.read_text()
    notice = (
        f"web: {folder}/shards is of a version that kept documents in the order of the files; prepare it into another "
        f"`shards` folder to have them shuffled\nweb: {folder}/shards is complete; nothing to do\n"
    )
    for _ in range(2):
        prepare(config_of(folder))
        assert capsys.readouterr().err == notice
        with pytest.raises(ConfigError, match=r"changed since then: (data.shard_bytes|the hash of all settings) from"):
            prepare(config_of(folder, shard_bytes=8192))
        journal.unlink(missing_ok=True)  # then the manifest says what there is
    manifest.unlink()
    journal.write_text(begun)
    before = hashes(folder)
    with pytest.raises(ConfigError, match="the order of documents from that of the files to that of their hashes. Set"):
        prepare(config_of(folder))
    assert hashes(folder) == before


def test_changed_sources_are_refused(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "changed", with_shards=True)
    (folder / "raw").unlink()
    shutil.copytree(done / "raw", folder / "raw")
    prepare(config_of(folder))  # a copy is the same source
    (folder / "raw/new.txt").write_text("new")
    with pytest.raises(ConfigError, match="the number of source files from 103 to 104; their bytes from"):
        prepare(config_of(folder))
    (folder / "raw/new.txt").unlink()
    (folder / "raw/a.jsonl").rename(folder / "raw/aa.jsonl")
    with pytest.raises(ConfigError, match="changed since then: the hash of their names and sizes from"):
        prepare(config_of(folder))


def test_another_tokenizer_is_refused(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "changed", with_shards=True)
    model = (folder / "t.model").read_bytes()
    (folder / "t.model").write_bytes(model + b"\x1a\x00")  # an empty submessage: loads, and is another file
    with pytest.raises(ConfigError, match=r"changed since then: the tokenizer from [0-9a-f]{64} to"):
        prepare(config_of(folder))
    with pytest.raises(
        ConfigError, match=rf"tokenizer.vocab_size is 421; expected {VOCAB_SIZE}, the size of .*t.model"
    ):
        prepare(config_of(folder, tokenizer={"vocab_size": 421}))


def test_text_that_changed_without_changing_size_is_noticed_when_going_on(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(done, tmp_path / "changed", with_shards=True)
    (folder / "shards/manifest.json").unlink()
    (folder / "raw").unlink()
    shutil.copytree(done / "raw", folder / "raw")
    lines = (folder / "raw/a.jsonl").read_text().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    (folder / "raw/a.jsonl").write_text("\n".join(lines) + "\n")
    prepare(config_of(folder))  # other places of the same documents
    assert hashes(folder) == hashes(done)
    (folder / "shards/manifest.json").unlink()
    (folder / "raw/d00000.txt").write_bytes(b"\xff" * (folder / "raw/d00000.txt").stat().st_size)
    with pytest.raises(DataError, match="the source's documents are not those that its complete shards hold"):
        prepare(config_of(folder))
    shutil.rmtree(folder / "shards")
    with monkeypatch.context() as patch:
        patch.setattr(SpillWriter, "write", stop_after(4, SpillWriter.write))
        with pytest.raises(KeyboardInterrupt):
            prepare(config_of(folder))
    lines[0], lines[1] = lines[1], lines[0]
    (folder / "raw/a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="1-of-1: the source's documents are not those that its complete spills hold"):
        prepare(config_of(folder))


def stop_after(num_calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which stops the program when it is called once more than so often."""
    left = [num_calls]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


def test_shards_outlive_their_raw_text(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(done, tmp_path / "shipped", with_shards=True)
    (folder / "raw").unlink()
    prepare(config_of(folder, seq_len=16))
    said = capsys.readouterr().err
    assert "web: cannot compare" in said and "names no file" in said
    assert said.endswith("is complete; added its rows of 16 tokens\n")
    with pytest.raises(ConfigError, match="data.val_fraction from 0.1 to 0.3"):
        prepare(config_of(folder, val_fraction=0.3))


def test_a_source_without_paths_gets_rows_only(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(done, tmp_path / "shards-only", with_shards=True)
    (folder / "t.model").unlink()
    prepare(config_of(folder, source={"paths": []}, seq_len=48))
    assert capsys.readouterr().err == f"web: {folder}/shards has rows of 48 tokens\n"
    assert (folder / "shards/rows-48").is_dir() and not (folder / "t.model").exists()
    with pytest.raises(DataError, match=r"manifest.json is missing; expected a prepared corpus"):
        prepare(config_of(folder, source={"paths": [], "shards": str(folder / "nowhere")}))
    assert not (folder / "nowhere").exists()


def test_a_complete_corpus_with_a_missing_shard_is_an_error(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "damaged", with_shards=True)
    (folder / "shards/train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001.tar is missing; expected .* delete .*shards and run"):
        prepare(config_of(folder))


def test_duplicates_are_dropped_and_counted_across_files(
    done: Path, fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "raw").unlink()
    (fresh / "raw").mkdir()
    texts = [text_of(number) for number in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[3], texts[5]])
    (fresh / "raw/a.jsonl").write_text(lines)
    (fresh / "raw/b.txt").write_text(texts[7], newline="")
    (fresh / "raw/c.txt").write_text(texts[7] + " ", newline="")
    prepare(config_of(fresh))
    manifest = Manifest.load(fresh / "shards")
    assert manifest.counts == {"documents_read": 44, "duplicates": 3, "files_read": 3}
    assert sorted(read_back(fresh, "train") + read_back(fresh, "val")) == sorted([*texts, texts[7] + " "])
    said = capsys.readouterr().err
    assert f"web: 3 duplicates; the first: {fresh}/raw/a.jsonl:41: it is equal to an earlier document\n" in said
    with monkeypatch.context() as patch:  # all are found by the second pass then
        patch.setattr(shares_module, "NUM_RECENT", 2)
        prepare(config_of(fresh, source={"shards": str(fresh / "late")}))
    assert hashes(fresh / "late") == hashes(fresh / "shards")
    assert re.search(r"web: 3 duplicates; the first: .*: it is equal to another document\n", capsys.readouterr().err)
    prepare(config_of(fresh, source={"shards": str(fresh / "all")}, drop_duplicates=False))
    assert Manifest.load(fresh / "all").counts == {"documents_read": 44, "files_read": 3}
    assert sum(shard.num_documents for shard in Manifest.load(fresh / "all").train) > len(read_back(fresh, "train"))


def test_what_is_skipped_is_counted_in_manifest_and_summary(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fresh / "raw").unlink()
    (fresh / "raw").mkdir()
    good = [json.dumps({"text": text_of(number)}) for number in range(50)]
    bad = ['{"text": ', '{"body": 1}', json.dumps({"text": "\u2581"}), '{"text": ""}', '{"text": "\\ud800"}', "[]"]
    (fresh / "raw/a.jsonl").write_text("\n".join([*good, *bad]))
    (fresh / "raw/b.jsonl.gz").write_bytes(gzip.compress(("\n".join(good) + "x" * 999).encode())[:-9])
    with pytest.raises(DataError, match=r"b.jsonl.gz: the file cannot be read to its end \(Compressed file ended"):
        prepare(config_of(fresh))
    with pytest.raises(DataError, match=r"a.jsonl:51: the document cannot be used: it is not JSON"):
        prepare(config_of(fresh, on_bad_document="error", on_bad_file="skip"))
    capsys.readouterr()
    prepare(config_of(fresh, on_bad_file="skip"))
    counts = Manifest.load(fresh / "shards").counts
    assert {key: counts[key] for key in counts if key.startswith(("skipped", "files"))} == {
        "skipped_bad_json": 1, "skipped_no_text": 2, "skipped_u2581": 1, "skipped_empty": 1, "skipped_not_utf8": 1,
        "files_read": 1, "files_unreadable": 1,
    }  # fmt: skip
    said = capsys.readouterr().err
    assert f"web: 2 skipped no text; the first: {fresh}/raw/a.jsonl:52: its field 'text' is missing" in said
    assert f"web: 1 files unreadable; the first: {fresh}/raw/b.jsonl.gz: the file cannot be read to its end" in said
    assert re.search(r"web: train: 4\d documents, [\d.]+ kB of text, [\d,]+ tokens \(\d\.\d\d bytes each\)", said)


def test_a_source_that_yields_nothing_is_an_error(fresh: Path, tmp_path: Path) -> None:
    (fresh / "raw").unlink()
    (fresh / "raw").mkdir()
    (fresh / "raw/a.txt").write_text("")
    (fresh / "raw/b.txt").write_text("a few words")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"at least one. Relax data.filters \(short\), or set filter: false .*Correct"
        ):
            prepare(config_of(fresh, filters={"min_characters": 50}))
    (fresh / "raw/b.txt").unlink()
    message = r"data.sources\[web\].paths: they give no document to train on \(1 documents read; 1 files read; 1 skipped empty"
    message += r".*Correct data.sources\[web\].paths, or the fields that it names \(text_field, examples\)."
    for _ in range(2):  # a begun folder without shards is no obstacle
        with pytest.raises(DataError, match=message):
            prepare(config_of(fresh))
    (fresh / "raw/a.txt").write_bytes(b"\xff")
    with pytest.raises(
        DataError, match=r"1 skipped not utf8\); expected at least one.* First skipped not utf8: .*a.txt: it"
    ):
        prepare(config_of(fresh))
    (fresh / "raw/a.txt").write_text(
        next(t for t in map(text_of, range(99)) if is_validation(document_digest(t.encode()), 0.1)), newline=""
    )
    with pytest.raises(DataError, match="; all of its 1 documents are held out by data.val_fraction"):
        prepare(config_of(fresh))
    (fresh / "raw/a.txt").write_text(text_of(1000))
    prepare(config_of(fresh, val_fraction=0.0))
    (fresh / "t.model").unlink()
    (fresh / "raw/a.txt").write_text("")
    with pytest.raises(DataError, match="the training sample is empty; expected text"):
        prepare(config_of(fresh, source={"shards": str(fresh / "other")}))


def test_an_empty_held_out_split_is_a_warning_that_says_how_many(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "raw").unlink()
    (fresh / "raw").mkdir()
    (fresh / "raw/a.txt").write_text(text_of(1))
    prepare(config_of(fresh, val_fraction=0.0001))
    assert (
        "warning: web: none of its 1 documents is held out (data.val_fraction is 0.0001), so its loss cannot be evaluated. "
        "Raise that fraction, or give more documents, and set another `shards` folder.\n"
    ) in capsys.readouterr().err
    assert Manifest.load(fresh / "shards").val == ()
    prepare(config_of(fresh, val_fraction=0.0, source={"shards": str(fresh / "none")}))
    assert "warning" not in capsys.readouterr().err


def test_two_runs_do_not_write_one_folder(fresh: Path) -> None:
    with file_lock(fresh / "shards" / LOCK_NAME, "it"):
        with pytest.raises(ConfigError, match=rf"shards is being written by process {os.getpid()} on"):
            prepare(config_of(fresh))
    (fresh / "t.model").unlink()
    with file_lock(fresh / ".t.model.lock", "it"):
        with pytest.raises(ConfigError, match=rf"t.model is being written by process {os.getpid()} on"):
            prepare(config_of(fresh))
    prepare(config_of(fresh))


def test_held_out_documents_are_not_in_the_tokenizers_sample(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "t.model").unlink()
    choose, seen = prepare_module.choose_sample, []

    def spy(texts, sample_bytes, seed):
        return choose((seen.append(text) or text for text in texts), sample_bytes, seed)

    monkeypatch.setattr(prepare_module, "choose_sample", spy)
    prepare(config_of(fresh))
    assert sorted(seen) == sorted(read_back(fresh, "train"))
    said = capsys.readouterr().err
    assert "tokenizer: training 420 pieces on 30." in said and "bytes of held-out text\n" in said
    assert re.search(r"5\d\d held-out and made-up texts come back exactly, with the same ids in the export", said)
    assert not list(fresh.glob("*.unchecked")) and not list(fresh.glob("*.partial"))


def test_reading_for_the_sample_is_bounded_and_follows_the_weights(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raw").symlink_to(done / "raw")
    monkeypatch.setattr(prepare_module, "READ_MULTIPLE", 2)
    sources = [
        {"name": name, "paths": [str(done / "raw/*.jsonl*")], "shards": str(tmp_path / name), "weight": weight}
        for name, weight in (("a", 3), ("b", 1))
    ]
    config = config_of(tmp_path, sources=sources, tokenizer={"sample_bytes": 20_000}, val_fraction=0.3)
    held_out: list[str] = []
    texts = list(prepare_module._training_texts(config, held_out))
    num_bytes = [len(text.encode()) for text in texts]
    first_of_b = texts.index(texts[0], 1)  # b reads the same files from the start
    assert 40_000 < sum(num_bytes) + sum(len(text.encode()) for text in held_out) < 42_000
    assert 2.3 < sum(num_bytes[:first_of_b]) / sum(num_bytes[first_of_b:]) < 3.7


def test_a_tokenizer_that_does_not_check_is_not_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "t.model").unlink()
    monkeypatch.setattr(prepare_module, "check_ids", lambda tokenizer, texts: [texts[0]])
    with pytest.raises(DataError, match=r"t.model.unchecked: 1 of \d+ texts get other ids from the exported tokenizer"):
        prepare(config_of(fresh))
    monkeypatch.undo()
    monkeypatch.setattr(prepare_module, "check_round_trip", lambda tokenizer, texts: texts[:2])
    with pytest.raises(DataError, match="2 of .* texts do not come back from their ids, such as '.*'; expected none"):
        prepare(config_of(fresh))
    assert not (fresh / "t.model").exists()


def test_a_corpus_that_is_too_small_for_the_vocabulary_says_what_works(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.txt").write_text(text_of(1, 300))
    config = config_of(tmp_path, tokenizer={"vocab_size": 5000}, val_fraction=0.0)
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size is 5000; expected at most (\d+),") as error:
        prepare(config)
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])  # type: ignore[index]
    prepare(config_of(tmp_path, tokenizer={"vocab_size": largest}, val_fraction=0.0))


def test_progress_has_rate_and_time_left(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = r"web: \d+% of [\d.]+ kB, \d+ documents, [\d.]+ [kM]?B/s, \d+s left"
    for module in (shares_module, corpus_module):
        monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    prepare(config_of(fresh))
    lines = capsys.readouterr().err.splitlines()
    assert sum(bool(re.fullmatch(line, text)) for text in lines) > 100
    assert sum(bool(re.fullmatch(r"web: shards: \d+% of 400 documents", text)) for text in lines) > 10
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(shares_module, "LIVE_SECONDS", 0.0)
    prepare(config_of(fresh, source={"shards": str(fresh / "again")}))
    assert len(re.findall(r"\r\x1b\[K" + line[:30], terminal.getvalue())) > 100


def test_an_unwritable_folder_is_an_error(fresh: Path) -> None:
    (fresh / "file").write_text("x")
    with pytest.raises(DataError, match=r"file/shards: Not a directory. What is complete is kept: mend this"):
        prepare(config_of(fresh, source={"shards": str(fresh / "file/shards")}))


def test_the_command_reports_errors_without_a_traceback(
    fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command_in(fresh)
    config = str(fresh / "config.yaml")
    assert main([config, "data.prepare_processes=1"]) == 0
    capsys.readouterr()
    assert main([config, "data.val_fraction=0.2"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {fresh}/shards holds shards that were prepared otherwise")
    assert main([config, "data.sources.0.paths=[nowhere]", f"data.sources.0.shards={fresh}/new"]) == 1
    assert "error: data.sources[web].paths: 'nowhere' names no file" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml")]) == 2
    with pytest.raises(SystemExit) as usage:
        main(["--help"])
    assert usage.value.code == 0 and "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2

    def interrupt(config: Config, *shares: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "prepare", interrupt)
    assert main([config]) == 75
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.launches
@pytest.mark.parametrize("form", ["file elsewhere", "module", "symlink"])
def test_the_command_starts_in_every_form(form: str, tmp_path: Path) -> None:
    script = ROOT / "launch/prepare.py"
    (tmp_path / "link.py").symlink_to(script)
    arguments, folder = {
        "file elsewhere": ([str(script)], tmp_path),
        "module": (["-m", "launch.prepare"], ROOT),
        "symlink": ([str(tmp_path / "link.py")], tmp_path),
    }[form]
    done = subprocess.run(
        [sys.executable, *arguments, "none.yaml"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "none.yaml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.launches
def test_a_whole_prepare_does_without_torch_and_leaves_it_importable(done: Path, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path / "fresh")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pretrain.preparing.prepare import prepare\n"
        "from tests.preparing.test_prepare import config_of\n"
        "prepare(config_of(Path(sys.argv[1])))\n"
        "print('torch' in sys.modules, 'webdataset' in sys.modules)\n"
        "import torch\n"
        "print(torch.zeros(2).sum().item())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert run.stdout.split() == ["False", "True", "0.0"], run.stderr
    assert hashes(folder) == hashes(done)
