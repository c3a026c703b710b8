"""Whether a store can be listed from here."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.doctor.findings import Line, Request, ok, refused, skipped
from pretrain.errors import LonghaulError
from pretrain.storage.stores import PIPE, shown
from pretrain.storage.writable_store import WritableStore

_RETRY_SECONDS = 20.0


def check(request: Request) -> Iterator[Line]:
    """List what lies directly at the URL."""
    name = shown(request.store)
    if request.store.startswith((PIPE, "http://", "https://")):
        yield skipped("listing", f"{name} is of a kind that cannot be listed", "Read a corpus there with "
                      "`longhaul prepare CONFIG --verify`.")  # fmt: skip
        return
    try:
        found = WritableStore(request.store, _RETRY_SECONDS, option="--store").list_top()
    except LonghaulError as error:
        yield refused("listing", error)
        return
    some = ", ".join(found[:5]) + (" …" if len(found) > 5 else "")
    yield ok("listing", f"{name} holds {len(found)} name{'s'[: len(found) != 1]}" + (f": {some}" if found else ""))
