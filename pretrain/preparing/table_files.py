"""One column of Parquet files and of Arrow files as the `datasets` library writes them, in batches of bounded memory.

pyarrow is imported here only, and only when a table is read: it takes 0.3 to 0.6 s and 30 MB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.data.source_files import BrokenFile, kind_of
from pretrain.errors import DataError

Values = list[bytes | None]  # UTF-8, or what should be; None for null

_BATCH_BYTES = 1 << 22  # of a column, decoded at once
_MAX_BATCH_ROWS = 4096
_OFFSET_BYTES = 4  # beside the text of a value
_READ_BUFFER_BYTES = 1 << 20  # of a Parquet file; without it a row group's whole column is in memory
_FILE_MAGIC, _STREAM_END = b"ARROW1", b"\0\0\0\0"


def read_column(path: Path, column: str) -> Iterator[tuple[Values, int]]:
    """Yield the values of a column in batches, each with the bytes of the file that are done by then, about.

    Args:
        path: a Parquet file; or an Arrow stream or file, named `.arrow`.
        column: name of a column of strings.

    Raises:
        DataError: there is no such column, or it is of another type.
        BrokenFile: the file cannot be read to its end.
    """
    begin = 0
    with _broken_files():
        for num_rows, _, end, arrays in _parts(path, column):
            num_done = 0
            for values in arrays():
                num_done += len(values)
                yield values, begin + (end - begin) * num_done // num_rows
            begin = end


def skim_column(path: Path, column: str, choose: Callable[[int], bool]) -> Iterator[tuple[int, int, Values]]:
    """Yield for each part of a file its rows and the column's bytes, with the first values if the part is chosen.

    The bytes are those of the text, but less where a Parquet file stores equal values once.

    Args:
        path, column: as for `read_column`.
        choose: says of a part's number whether it is read.

    Raises:
        DataError, BrokenFile: as `read_column`.
    """
    with _broken_files():
        for number, (num_rows, num_bytes, _, arrays) in enumerate(_parts(path, column)):
            num_bytes = max(num_bytes - _OFFSET_BYTES * num_rows, 0)
            yield num_rows, num_bytes, next(arrays(), []) if choose(number) else []


# Of a row group or record batch: rows, bytes of the column, bytes of the file up to its end, the column's values.
_Part = tuple[int, int, int, Callable[[], Iterator[Values]]]


def _parts(path: Path, column: str) -> Iterator[_Part]:
    return (_row_groups if kind_of(path) == "parquet" else _record_batches)(path, column)


@contextmanager
def _broken_files() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise BrokenFile((str(error).strip() or type(error).__name__).splitlines()[0]) from None


def _row_groups(path: Path, column: str) -> Iterator[_Part]:
    """The row groups of a Parquet file; its pages' checksums are compared where it has them."""
    from pyarrow import parquet

    file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, page_checksum_verification=True)
    with file:
        _check_column(path, column, file.schema_arrow)
        metadata, size, num_done = file.metadata, os.path.getsize(path), 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            num_done += group.num_rows
            chunks = [group.column(index) for index in range(group.num_columns)]
            num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
            batch_rows = _batch_rows(group.num_rows, num_bytes)

            def arrays(number: int = number, batch_rows: int = batch_rows) -> Iterator[Values]:
                for batch in file.iter_batches(batch_rows, row_groups=[number], columns=[column], use_threads=False):
                    yield from _slices(batch.column(0))

            yield group.num_rows, num_bytes, size * num_done // max(metadata.num_rows, 1), arrays


def _record_batches(path: Path, column: str) -> Iterator[_Part]:
    """The record batches of an Arrow stream, as `datasets` writes it, or file; what is not asked for is not read."""
    import pyarrow

    size = os.path.getsize(path)
    with pyarrow.memory_map(str(path)) as content:
        is_file = content.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        content.seek(0)
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(content)
        _check_column(path, column, reader.schema)
        index = reader.schema.get_field_index(column)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            array = batch.column(index)
            yield batch.num_rows, array.nbytes, content.tell(), partial(_slices, array)
        content.seek(size - len(_STREAM_END))
        if not is_file and content.read() != _STREAM_END:
            raise ValueError("its end is missing")


def _batch_rows(num_rows: int, num_bytes: int) -> int:
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * num_rows // max(num_bytes, 1)))


def _slices(array: Any) -> Iterator[Values]:
    """The values of an array of strings of any layout; as bytes, since Arrow does not check that they are UTF-8."""
    import pyarrow

    step = _batch_rows(len(array), array.nbytes)
    for begin in range(0, len(array), step):
        part = array.slice(begin, step)
        if pyarrow.types.is_dictionary(part.type):
            part = part.dictionary_decode()
        yield part.cast(pyarrow.large_binary()).to_pylist()


def _check_column(path: Path, column: str, schema: Any) -> None:
    import pyarrow

    found = schema.get_all_field_indices(column)
    if len(found) != 1:
        raise DataError(
            f"{path}: it has {len(found) or 'no'} column{'s' * (len(found) > 1)} {column!r}; expected one "
            f"(data.sources[].text_field) of: {', '.join(schema.names)}. Set text_field to the one that holds the text."
        )
    kind = schema.field(found[0]).type
    value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
              types.is_binary_view)  # fmt: skip
    if not any(check(value_kind) for check in checks):
        raise DataError(
            f"{path}: its column {column!r} holds {kind}; expected strings. Set data.sources[].text_field to the one "
            f"that holds the text, of: {', '.join(schema.names)}."
        )
