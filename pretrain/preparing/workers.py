"""The processes of `prepare`: several that tokenize batches in order, and one that trains a tokenizer.

They are spawned, not forked, since the main process has threads; they end with it, however it ends, and leave Ctrl-C
to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np

from pretrain.data.examples import encode_example
from pretrain.errors import ConfigError, DataError, LonghaulError
from pretrain.options.config import DataSection, TokenizerSection
from pretrain.tokenizers.sentencepiece_tokenizer import fit
from pretrain.tokenizers.tokenizer import Tokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer

Item = TypeVar("Item")
Task = TypeVar("Task")
Result = TypeVar("Result")

_MEMORY_PER_SAMPLE_BYTE = 15  # of sentencepiece's trainer, measured


@dataclass(frozen=True)
class QueuedDocument:
    """A document on its way into a spill.

    Attributes:
        origin: where it is from.
        digest: identifies it.
        bands: what near-duplicates have in common, if they are looked for.
        text_bytes: of its text.
        text: it, if it is to be tokenized.
        ids: it, if it is not; with bos and eos.
    """

    origin: str
    digest: bytes
    bands: bytes
    text_bytes: int
    text: str | None = None
    ids: np.ndarray | None = None


Batch = list[QueuedDocument]  # what one process tokenizes at once
Text = tuple[str, str]  # where a document is from, and what it says


def num_processes(data: DataSection) -> int:
    """Processes that tokenize: what the config says, or one per core."""
    return data.prepare_processes or num_usable_cores()


def num_usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_batches(
    batches: Iterator[Batch], section: TokenizerSection, tokenizer: Tokenizer, num_processes: int,
    are_examples: bool = False,
) -> Generator[tuple[Batch, list[np.ndarray]], None, None]:  # fmt: skip
    """Tokenize batches; their order and results do not depend on the number of processes.

    Args:
        batches: read in this process, at most `2 * num_processes + 1` ahead of what is taken.
        section: names the tokenizer's file, which the processes read.
        tokenizer: what was read from it here.
        num_processes: 1 tokenizes in this process.
        are_examples: the texts are examples for tuning.

    Returns:
        Each batch with the ids of its documents, bos and eos included.

    Raises:
        ConfigError: the chat template refuses a conversation, which is named.
        DataError: a process was killed, or the model file was replaced meanwhile.
    """
    if num_processes == 1:
        for batch in batches:
            yield batch, _encode_with(tokenizer, are_examples, _texts_of(batch))
        return
    with closing(
        ordered_map(partial(_encode, section, tokenizer.fingerprint, are_examples), batches, _texts_of, num_processes)
    ) as results:
        yield from results


def _texts_of(batch: Batch) -> list[Text]:
    return [(document.origin, document.text) for document in batch if document.text is not None]


def ordered_map(
    function: Callable[[Task], Result], items: Iterable[Item], task_of: Callable[[Item], Task], num_processes: int,
    option: str = "data.prepare_processes",
) -> Generator[tuple[Item, Result], None, None]:  # fmt: skip
    """Yield items with what `function` gives for each, in their order, computed by other processes.

    Args:
        function: can be pickled, by its name.
        items: read in this process, at most `2 * num_processes + 1` ahead of what is taken.
        task_of: what of an item is sent to a process.
        num_processes: how many.
        option: what says how many, for the error.

    Raises:
        DataError: a process was killed.
    """
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), begin_worker)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            with interrupts_held():  # the first calls start the processes
                waiting.append((item, pool.submit(function, task_of(item))))
            if len(waiting) > 2 * num_processes:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            f"{option} is {num_processes}; expected all of them to live, but one was killed, most likely for want of "
            "memory. Lower it and run again: prepare goes on where it stopped."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fit_in_process(sample: Sequence[bytes], section: TokenizerSection) -> bytes:
    """Train as `sentencepiece_tokenizer.fit` does, in a process that can be interrupted and gives its memory back.

    Raises:
        ConfigError, DataError: as `fit`; or the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_fit_and_send, args=(sender, list(sample), section), daemon=True)
    with interrupts_held():
        process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        needed = _MEMORY_PER_SAMPLE_BYTE * sum(map(len, sample)) // 10**6
        raise DataError(
            f"tokenizer: the process that trains it ended with status {process.exitcode}; expected it to finish, which "
            f"takes about {needed:,} MB of memory. Lower tokenizer.sample_bytes if there is less."
        ) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(result, LonghaulError):
        raise result
    return result


def _fit_and_send(sender: Connection, sample: list[bytes], section: TokenizerSection) -> None:
    begin_worker()
    try:
        sender.send(fit(sample, section))
    except LonghaulError as error:
        sender.send(error)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C, which a terminal sends to the processes too, from those that start: they inherit what is held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers hold both ends of its pipes, so they would wait for ever for work from a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_tokenizer: Tokenizer | None = None


def _encode(section: TokenizerSection, fingerprint: str, are_examples: bool, texts: list[Text]) -> list[np.ndarray]:
    global _tokenizer
    if _tokenizer is None:  # not before: an error of the initializer would say nothing but that the process ended
        _tokenizer = open_tokenizer(section)
    if _tokenizer.fingerprint != fingerprint:
        raise DataError("tokenizer.model was replaced while documents were tokenized; expected one model. Run again.")
    return _encode_with(_tokenizer, are_examples, texts)


def _encode_with(tokenizer: Tokenizer, are_examples: bool, texts: list[Text]) -> list[np.ndarray]:
    if not are_examples:
        return tokenizer.encode_documents([text for _, text in texts])
    return [_encode_example(tokenizer, *text) for text in texts]


def _encode_example(tokenizer: Tokenizer, origin: str, text: str) -> np.ndarray:
    try:
        return encode_example(tokenizer, text)
    except ConfigError as error:  # of the chat template
        raise ConfigError(f"{origin}: {error}") from None
