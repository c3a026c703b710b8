"""Downloads the shards that the plan needs next, before they are needed.

A few threads of each rank go through the same list; the ranks of a node share the work, since each file is downloaded
by who comes first and left out by the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.data.node_cache import CacheFullError
from pretrain.data.remote_corpus import RemoteCorpus
from pretrain.data.shards import Shard
from pretrain.errors import DataError

logger = logging.getLogger("longhaul")
NUM_THREADS = 4
_IDLE_SECONDS = 2.0  # until what could not be done is tried again
_STOP_SECONDS = 5.0

Wanted = Sequence[tuple[RemoteCorpus, Shard]]


class Prefetcher:
    """Fills the cache in the background; what fails here is left to the reader, who needs it and says why it fails."""

    def __init__(self, wanted: Wanted) -> None:
        """Start the threads.

        Args:
            wanted: Shards in the order in which they are needed.
        """
        self._wanted: Wanted = ()
        self._in_work: set[Path] = set()
        self._is_failing = False
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self.want(wanted)
        self._threads = [
            threading.Thread(target=self._run, name=f"longhaul-prefetch-{number}", daemon=True)
            for number in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def want(self, wanted: Wanted) -> None:
        """Say what is needed from now on, in this order."""
        with self._changed:
            if list(wanted) != list(self._wanted):
                self._wanted = wanted
                files = [path for corpus, shard in wanted for path in corpus.files_of(shard)]
                for corpus, _ in wanted:
                    corpus.cache.needed = {path: place for place, path in enumerate(files)}
                self._changed.notify_all()

    def stop(self) -> None:
        """End the threads; one that hangs in a download is left behind, it does not hold up an exit."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        while not self._stopped.is_set():
            wanted = self._wanted
            try:
                if any(self._download(corpus, shard) for corpus, shard in wanted):
                    self._is_failing = False
                    continue  # from the beginning: something more urgent may be wanted by now
            except CacheFullError:
                pass  # until more of it has been read
            except DataError as error:
                if not self._is_failing and not self._stopped.is_set():
                    self._is_failing = True
                    logger.warning("downloading ahead: %s", error)
            with self._changed:
                if not self._stopped.is_set() and self._wanted is wanted:
                    self._changed.wait(_IDLE_SECONDS)

    def _download(self, corpus: RemoteCorpus, shard: Shard) -> bool:
        """Download one shard, if it is not there and nobody else does; return whether it was done."""
        paths = corpus.files_of(shard)
        if self._stopped.is_set() or corpus.is_lost(shard) or all(path.exists() for path in paths):
            return False
        with self._changed:
            if paths[0] in self._in_work:
                return False
            self._in_work.add(paths[0])
        try:
            return corpus.add(shard, self._stopped)
        finally:
            with self._changed:
                self._in_work.discard(paths[0])
