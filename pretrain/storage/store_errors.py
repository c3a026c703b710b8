"""What goes wrong with a store, whatever library says so, and whether trying again is in vain."""

from __future__ import annotations

from pretrain.errors import DataError

_NO_HOPE = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_MAY_PASS = (408, 425, 429)  # of the statuses 400 to 499
_MISSING = (404, 410)


class StoreError(Exception):
    """One attempt to read a file failed; the text says how."""

    def __init__(self, text: str, is_final: bool = False) -> None:
        """Take what happened, and whether trying again is in vain."""
        super().__init__(text)
        self.is_final = is_final


class WrongContentError(StoreError):
    """A download ended without an error and is not the file that it should be."""

    def __init__(self, text: str, content: str = "") -> None:
        """Take what is wrong, and a hash of what came: twice the same is what the store has, not a fault of the way."""
        super().__init__(text)
        self.content = content or text


class MissingFileError(StoreError):
    """The store answers, and has no such file."""


class LostFileError(DataError):
    """A store that works has a file no more, or another one in its place: waiting does not bring it back.

    Attributes:
        name: The file's path in the corpus.
        reason: What is wrong, without where and what to do.
    """

    def __init__(self, text: str, name: str = "", reason: str = "") -> None:
        """Take the message, and what of it programs need."""
        super().__init__(text)
        self.name, self.reason = name, reason


def as_store_error(error: Exception) -> StoreError:
    """Return what a library raised as an error of ours, which knows whether trying again is in vain."""
    if isinstance(error, StoreError):
        return error
    status = _status_of(error)
    if status is not None:
        if status in _MISSING:
            return MissingFileError("there is no such file", is_final=True)
        is_final = 400 <= status < 500 and status not in _MAY_PASS
        return StoreError(f"the server answered {status}", is_final)
    if isinstance(error, FileNotFoundError):
        return MissingFileError("there is no such file", is_final=True)
    text = " ".join(str(error).split())[:300]
    if isinstance(error, TimeoutError) and not text:  # fsspec's FSTimeoutError says no more than its name
        return StoreError("nothing came in time")
    is_final = isinstance(error, _NO_HOPE) or "Credentials" in type(error).__name__
    return StoreError(f"{type(error).__name__}{': ' if text else ''}{text}", is_final)


def _status_of(error: Exception) -> int | None:
    """The HTTP status in an error of aiohttp's (status), gcsfs's (code) or huggingface_hub's (response.status_code)."""
    for holder, name in ((error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")):
        number = str(getattr(holder, name, ""))
        if number.isdigit():
            return int(number)
    return None
