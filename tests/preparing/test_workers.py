"""The processes of `prepare`: order, bounded reading ahead, and what happens when one is killed."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import ConfigError, DataError
from pretrain.options.config import TokenizerSection
from pretrain.preparing import workers
from pretrain.preparing.workers import Batch, QueuedDocument, encode_batches, fit_in_process
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, choose_sample, fit
from pretrain.tokenizers.tokenizer import save_file

TEXTS = [f"document {number} {'about many different words ' * (number % 7)}\n" for number in range(300)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> TokenizerSection:
    path = tmp_path_factory.mktemp("workers") / "tokenizer.model"
    section = TokenizerSection(model=str(path), vocab_size=310, sample_bytes=20_000)
    save_file(path, fit(choose_sample(TEXTS, 20_000, 1), section))
    return section


def queued(text: str) -> QueuedDocument:
    return QueuedDocument("a.txt", b"digest", b"", len(text), text)


def batches_of(num_batches: int, log: list[int]) -> Iterator[Batch]:
    for number in range(num_batches):
        log.append(number)
        texts = TEXTS[number * 10 : number * 10 + 10]
        yield [queued(text) for text in texts]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_come_back_in_order_and_reading_ahead_is_bounded(section: TokenizerSection, num_processes: int) -> None:
    tokenizer = SentencePieceTokenizer(section.model)
    read: list[int] = []
    seen = 0
    with closing(encode_batches(batches_of(30, read), section, tokenizer, num_processes)) as encoded:
        for batch, documents in encoded:
            assert batch == [queued(text) for text in TEXTS[seen * 10 : seen * 10 + 10]]
            for document, ids in zip(batch, documents, strict=True):
                np.testing.assert_array_equal(ids, tokenizer.encode_document(document.text))
            seen += 1
            assert len(read) - seen <= 2 * num_processes
    assert seen == 30
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_not_a_hang(section: TokenizerSection) -> None:
    encoded = encode_batches(batches_of(30, []), section, SentencePieceTokenizer(section.model), 2)
    next(encoded)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(
        DataError, match="data.prepare_processes is 2; expected all of them to live, but one was killed"
    ):
        list(encoded)


def test_a_replaced_tokenizer_is_an_error(section: TokenizerSection, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    save_file(other, fit(choose_sample(TEXTS, 20_000, 1), section.model_copy(update={"vocab_size": 305})))
    smaller = section.model_copy(update={"model": str(other)})
    with pytest.raises(ConfigError, match="tokenizer.vocab_size is 310; expected 305, the size of .*other.model"):
        list(encode_batches(batches_of(3, []), smaller, SentencePieceTokenizer(section.model), 2))
    replaced = smaller.model_copy(update={"vocab_size": 305})
    with pytest.raises(DataError, match="tokenizer.model was replaced while documents were tokenized"):
        list(encode_batches(batches_of(3, []), replaced, SentencePieceTokenizer(section.model), 2))


def test_training_in_a_process_gives_the_same_model(section: TokenizerSection) -> None:
    sample = choose_sample(TEXTS, 20_000, 1)
    assert fit_in_process(sample, section) == Path(section.model).read_bytes()
    with pytest.raises(ConfigError, match="tokenizer.vocab_size is 5000; expected at most"):
        fit_in_process(sample, section.model_copy(update={"vocab_size": 5000}))
    assert multiprocessing.active_children() == []


def _die(sender: object, sample: object, section: object) -> None:
    os._exit(9)


def test_a_trainer_that_is_killed_is_an_error(section: TokenizerSection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_fit_and_send", _die)
    with pytest.raises(
        DataError, match=r"the process that trains it ended with status 9; .* Lower tokenizer.sample_by"
    ):
        fit_in_process([b"x" * 10**6], section)


ORPHANS = """
import os, sys
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from pretrain.preparing.workers import QueuedDocument, encode_batches
import multiprocessing
if __name__ == "__main__":
    batches = ([QueuedDocument("a.txt", b"", b"", 4, "text")] for _ in range(100))
    encoded = encode_batches(batches, TokenizerSection(model=sys.argv[1], vocab_size=310), SentencePieceTokenizer(sys.argv[1]), 2)
    next(encoded)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.launches
def test_workers_end_when_their_parent_is_killed(section: TokenizerSection, tmp_path: Path) -> None:
    (tmp_path / "orphans.py").write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "orphans.py"), section.model],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -9, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
