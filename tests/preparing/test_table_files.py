"""Tables as sources: Parquet, csv, and folders that the `datasets` library saved."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pretrain.data.source_files import list_files
from pretrain.errors import DataError
from pretrain.options.config import SourceSection
from pretrain.preparing import csv_files, sources, table_files
from pretrain.preparing.sources import ReadLog, read_documents

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"text {number}\n, \"quoted\" 'ä日本🎉'\t\r\n" + "x" * (number % 7) for number in range(500)]


def source_of(*paths: str | Path, **options: str) -> SourceSection:
    return SourceSection(name="web", paths=[str(path) for path in paths], shards="unused", **options)


def read(source: SourceSection, on_bad_document: str = "error", on_bad_file: str = "error"):
    log = ReadLog()
    documents = list(read_documents(list_files(source), source, on_bad_document, on_bad_file, log))
    return documents, log


def texts_of(source: SourceSection) -> list[str]:
    return [document.text for document in read(source)[0]]


def write_parquet(path: Path, texts: list, column: str = "text", kind: pa.DataType | None = None, **options) -> Path:
    other = pa.array(range(len(texts)))
    pq.write_table(pa.table({"id": other, column: pa.array(texts, kind), "last": other}), path, **options)
    return path


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_a_row_of_a_parquet_file_is_a_document(tmp_path: Path, compression: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, row_group_size=70, compression=compression)
    documents, log = read(source_of(path))
    assert [document.text for document in documents] == TEXTS
    assert [document.origin for document in documents[:2]] == [f"{path}:1", f"{path}:2"]
    assert log.counts == {"documents_read": 500, "files_read": 1}
    assert log.position_bytes() == path.stat().st_size


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
    ids=str,
)
def test_every_kind_of_string_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
    column = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(source_of(tmp_path)) == TEXTS


def test_the_position_rises_within_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_BATCH_BYTES", 1000)
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    log, positions = ReadLog(), []
    for _ in read_documents([path], source_of(path), "error", "error", log):
        positions.append(log.position_bytes())
    assert positions == sorted(positions) and len(set(positions)) > 10
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_is_bounded_and_other_columns_are_not_read(tmp_path: Path, kind: str) -> None:
    """200 MB in one row group, and 50 MB of another column, are read with little memory."""
    path = tmp_path / f"a.{kind}"
    random.seed(1)
    block = "".join(chr(random.randrange(32, 127)) for _ in range(10_000))
    texts = [block[number % 9 :] + str(number) for number in range(20_000)]
    table = pa.table({"text": texts, "other": [os.urandom(2500) for _ in range(20_000)]})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=20_000, use_dictionary=False, compression="none")
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    code = (
        "import pyarrow, sys\n"
        "from pretrain.preparing.table_files import read_column\n"
        "from pathlib import Path\n"
        "def anonymous(): return int(next(l for l in open('/proc/self/status') if 'RssAnon' in l).split()[1])\n"
        "first, most, number = anonymous(), 0, 0\n"
        "for values, _ in read_column(Path(sys.argv[1]), 'text'):\n"
        "    number += len(values); most = max(most, anonymous())\n"
        "print(number, (most - first) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    number, megabytes = map(int, run.stdout.split())
    assert number == 20_000, run.stderr
    assert megabytes < 110


def test_pyarrow_is_imported_for_tables_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    write_parquet(tmp_path / "b.parquet", ["y"])
    code = (
        "import sys, pretrain.preparing.prepare, pretrain.preparing.dry_run, pretrain.options.settings\n"
        "from pretrain.options.config import SourceSection\n"
        "from pretrain.data.source_files import list_files\n"
        "from pretrain.preparing.sources import ReadLog, read_documents\n"
        "for path in sys.argv[1:]:\n"
        "    source = SourceSection(name='a', paths=[path], shards='s')\n"
        "    print(len(list(read_documents(list_files(source), source, 'error', 'error', ReadLog()))),\n"
        "          'pyarrow' in sys.modules, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.stdout.splitlines() == ["1 False False", "1 True False"], run.stderr


def write_stream(path: Path, table: pa.Table, chunk: int = 1000) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_wrong_column_is_an_error_that_lists_them(tmp_path: Path, kind: str) -> None:
    table = pa.table({"content": ["a"], "id": [1], "tags": [["x"]]})
    path = tmp_path / f"a.{kind}"
    pq.write_table(table, path) if kind == "parquet" else write_stream(path, table)
    for on_bad in ("error", "skip"):  # neither a bad document nor a bad file
        with pytest.raises(DataError, match=r"a\.\w+: it has no column 'text'; expected one \(data.sources\[\].text_field\) "
                           r"of: content, id, tags\. Set text_field"):  # fmt: skip
            read(source_of(path), on_bad, on_bad)
    with pytest.raises(DataError, match=r"its column 'id' holds int64; expected strings. Set .* of: content, id, tags"):
        read(source_of(path, text_field="id"))
    with pytest.raises(DataError, match=r"its column 'tags' holds list<"):
        read(source_of(path, text_field="tags"))
    assert texts_of(source_of(path, text_field="content")) == ["a"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bad_rows_are_counted_or_an_error(tmp_path: Path, kind: str) -> None:
    bad = pa.array([b"good", None, b"", b"\xff", "\u2581".encode(), b"end"], pa.binary())
    table = pa.table({"text": bad.cast(pa.string(), safe=False) if kind == "arrow" else bad})
    path = tmp_path / f"a.{kind}"
    pq.write_table(table, path) if kind == "parquet" else write_stream(path, table)
    documents, log = read(source_of(path), "skip")
    assert [document.text for document in documents] == ["good", "end"]
    assert documents[1].origin == f"{path}:6"
    assert {key: log.counts[key] for key in log.counts if "skipped" in key} == {
        "skipped_no_text": 1, "skipped_empty": 1, "skipped_not_utf8": 1, "skipped_u2581": 1,
    }  # fmt: skip
    assert log.examples["skipped_no_text"] == f"{path}:2: its column 'text' is null"
    with pytest.raises(DataError, match=r":2: the document cannot be used: its column 'text' is null. Mend it"):
        read(source_of(path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("cut", [0, 3, -1, -4, -9, "half"])
def test_a_table_that_is_cut_short_is_an_error_or_counted(tmp_path: Path, kind: str, cut: int | str) -> None:
    texts = [random.Random(number).randbytes(500).hex() for number in range(200)]
    path, table = tmp_path / f"a.{kind}", pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=20) if kind == "parquet" else write_stream(path, table, 20)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 if cut == "half" else cut])
    with pytest.raises(DataError, match=r"the file cannot be read to its end \(.+\); expected a whole file."):
        read(source_of(path))
    documents, log = read(source_of(path), "error", "skip")
    assert log.counts["files_unreadable"] == 1 and log.counts["files_read"] == 0
    assert [document.text for document in documents] == texts[: len(documents)]
    if kind == "arrow" and cut == "half":
        assert 60 < len(documents) < 140  # what came before the break is kept


def test_a_damaged_page_is_an_error_or_counted(tmp_path: Path) -> None:
    texts = [random.Random(number).randbytes(500).hex() for number in range(200)]
    path = write_parquet(tmp_path / "a.parquet", texts, row_group_size=20, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    place = data.index(texts[100][:50].encode()) if texts[100][:50].encode() in data else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read to its end \(.*(checksum|CRC)"):
        read(source_of(path))
    documents, log = read(source_of(path), "error", "skip")
    assert [document.text for document in documents] == texts[: len(documents)] and 60 <= len(documents) < 140
    assert log.counts["files_unreadable"] == 1


def save_dataset(folder: Path, texts: list[str], num_shards: int = 3) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))}).save_to_disk(
        folder, num_shards=num_shards
    )
    return folder


def test_a_datasets_folder_is_read_as_its_state_lists_it(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "corpus", TEXTS)
    write_stream(folder / "cache-0123456789abcdef.arrow", pa.table({"text": ["stale"]}))
    files = list_files(source_of(folder))
    assert [file.name for file in files] == [f"data-0000{number}-of-00003.arrow" for number in range(3)]
    documents, log = read(source_of(folder))
    assert [document.text for document in documents] == TEXTS
    assert documents[0].origin == f"{files[0]}:1"
    assert log.position_bytes() == sum(file.stat().st_size for file in files)
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert list_files(source_of(folder)) == files[::-1]
    assert list_files(source_of(tmp_path)) == files[::-1]  # a folder above it
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(
        DataError, match=r"data-00001-of-00003.arrow is missing; expected every file that .*state.json lists"
    ):
        list_files(source_of(folder))


def test_a_shuffled_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_dict({"text": TEXTS}).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "corpus")
    assert texts_of(source_of(tmp_path / "corpus")) == shuffled["text"][:] != TEXTS


def test_the_splits_of_a_dataset_are_named_by_their_paths(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": TEXTS[:300], "test": TEXTS[300:]}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})
    whole.save_to_disk(tmp_path / "corpus")
    for name, part in parts.items():
        assert texts_of(source_of(tmp_path / "corpus" / name)) == part
    assert texts_of(source_of(tmp_path / "corpus/t*")) == parts["test"] + parts["train"]
    with pytest.raises(DataError, match=r"corpus holds a dataset's splits \(train, test\); expected one of them. Name it "
                       r"by its path, such as .*corpus/train\."):  # fmt: skip
        list_files(source_of(tmp_path / "corpus"))


def test_arrow_files_elsewhere_are_named_one_by_one(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.arrow", pa.table({"text": ["a", "b"]}))
    with pytest.raises(DataError, match=r"a.arrow is in no folder that `Dataset.save_to_disk` wrote; expected one"):
        list_files(source_of(tmp_path))
    assert texts_of(source_of(path)) == ["a", "b"]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["c", "d"]}))
    assert texts_of(source_of(path)) == ["c", "d"]


def write_csv(path: Path, rows: list[list[str]]) -> bytes:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_a_row_of_a_csv_file_is_a_document(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"a{kind}"
    data = write_csv(path, [["id", "text"], *([str(number), text] for number, text in enumerate(TEXTS))])
    path.unlink()
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(
        {"": lambda d: d, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](b"\xef\xbb\xbf" + data)
    )
    documents, log = read(source_of(path))
    assert [document.text for document in documents] == TEXTS
    assert documents[499].origin == f"{path}:500"
    assert log.counts == {"documents_read": 500, "files_read": 1}
    assert log.position_bytes() == path.stat().st_size


def test_a_huge_field_of_a_csv_file_is_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["text"], ["y\n" * 1_000_000], ["z"]])
    assert texts_of(source_of(tmp_path)) == ["y\n" * 1_000_000, "z"]


def test_a_csv_without_the_column_is_an_error_that_lists_them(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [["id", "content"], ["1", "x"]])
    with pytest.raises(
        DataError, match=r"a.csv: its first row names no column 'text'; expected one .* of: id, content\."
    ):
        read(source_of(tmp_path), "skip", "skip")
    assert texts_of(source_of(tmp_path, text_field="content")) == ["x"]
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"its first row names no column 'text'; expected one .* of: nothing\."):
        read(source_of(tmp_path))
    write_csv(tmp_path / "a.csv", [["text", "text"], ["1", "x"]])
    with pytest.raises(DataError, match=r"its first row names 2 column 'text'"):
        read(source_of(tmp_path))


def test_bad_rows_of_a_csv_file_are_counted_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,good\n2\n3,a,b\n\n4,\n5,\xff\n6," + "\u2581".encode() + b"\n7,end")
    documents, log = read(source_of(path), "skip")
    assert [(document.text, document.origin) for document in documents] == [("good", f"{path}:1"), ("end", f"{path}:8")]
    assert {key: log.counts[key] for key in log.counts if "skipped" in key} == {
        "skipped_bad_row": 2, "skipped_empty": 2, "skipped_not_utf8": 1, "skipped_u2581": 1,
    }  # fmt: skip
    with pytest.raises(
        DataError, match=r"a.csv:2: the document cannot be used: it has 1 fields, and the first row 2. Mend"
    ):
        read(source_of(path))


@pytest.mark.parametrize("end", ['2,"never closed\n3,x\n', '2,"closed"too early\n'])
def test_a_csv_file_whose_quotes_do_not_match_is_a_bad_file(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,good\n" + end)
    with pytest.raises(
        DataError, match=r"a.csv: the file cannot be read to its end \(.+, in line \d+\); expected a whole"
    ):
        read(source_of(tmp_path))
    documents, log = read(source_of(tmp_path), "error", "skip")
    assert [document.text for document in documents] == ["good"] and log.counts["files_unreadable"] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_that_are_too_long_are_bad(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sources, csv_files):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    if kind == "csv":  # there it is the file: a quote that is not closed takes in the rest of it
        write_csv(tmp_path / "a.csv", [["text"], ["good"], ["x" * 101]])
        with pytest.raises(DataError, match=r"field larger than field limit \(100\), in line 3"):
            read(source_of(tmp_path))
        return
    write_parquet(tmp_path / "a.parquet", ["good", "x" * 101])
    assert read(source_of(tmp_path), "skip")[1].counts["skipped_too_long"] == 1
