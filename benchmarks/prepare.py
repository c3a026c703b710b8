"""`prepare` with several numbers of processes, beside bare sentencepiece on the same documents.

    python benchmarks/prepare.py --megabytes 200 --processes 1 2 --scale 100 2000 --out bench-results/prepare.json

The text is Python's: the standard library's sources and those of installed packages, each once. The bytes of everything
that `prepare` writes are compared; times are CPU seconds of all its processes, which other programs disturb little, and
seconds; memory is the sum over its processes, at its highest. `--scale` prepares corpora of other sizes too, of copies
of the text with another first line each, for the memory that they take.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import sentencepiece

from benchmarks.record import ROOT, Record
from benchmarks.table import render
from pretrain.options.config import TokenizerSection
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer

_SAMPLE_SECONDS = 0.1  # between looks at memory
CONFIG = """
tokenizer: {{model: {folder}/t.model, vocab_size: {vocab_size}}}
data:
  sources: [{{name: python, paths: [{folder}/raw], shards: {folder}/shards}}]
  seq_len: 2048
model: {{dim: 64, num_layers: 1, num_heads: 1}}
optim: {{lr: 0.001}}
train: {{num_steps: 1, global_batch_size: 1, micro_batch_size: 1}}
"""


def python_texts(num_bytes: float) -> Iterator[str]:
    """Yield different Python files of this installation until they have `num_bytes`, or all."""
    seen: set[bytes] = set()
    for kind in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[kind]).rglob("*.py")):
            if kind == "stdlib" and "site-packages" in path.parts:
                continue
            try:
                data = path.read_bytes()
                text = data.decode()
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.blake2b(data).digest()
            if not data or digest in seen or "\u2581" in text:
                continue
            seen.add(digest)
            yield text
            num_bytes -= len(data)
            if num_bytes <= 0:
                return


def write_corpus(folder: Path, megabytes: float) -> list[str]:
    """Write the texts as JSON lines, in files of 1,000; returns them."""
    texts = list(python_texts(megabytes * 1e6))
    folder.mkdir(parents=True)
    for number in range(0, len(texts), 1000):
        with open(folder / f"{number // 1000:05d}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[number : number + 1000])
    return texts


def write_copies(folder: Path, texts: Sequence[str], megabytes: float) -> int:
    """Write the texts again and again, each copy with another first line, as JSON lines; returns the bytes of text."""
    folder.mkdir()
    num_bytes = num_copies = 0
    while num_bytes < megabytes * 1e6:
        with open(folder / f"{num_copies:05d}.jsonl", "w", encoding="utf-8") as file:
            for text in texts:
                copy = f"# copy {num_copies}\n{text}"
                file.write(json.dumps({"text": copy}) + "\n")
                num_bytes += len(copy.encode())
                if num_bytes >= megabytes * 1e6:
                    break
        num_copies += 1
    return num_bytes


def run_prepare(folder: Path, num_processes: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run the command into a folder of its own; returns its seconds, CPU seconds and peak memory."""
    shards = folder / f"shards-{num_processes}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:8]}"
    command = [sys.executable, str(ROOT / "launch/prepare.py"), str(folder / "config.yaml"),
               f"data.prepare_processes={num_processes}", f"data.sources.0.shards={shards}", *overrides]  # fmt: skip
    begin = time.monotonic()
    process = psutil.Popen(command, stderr=subprocess.DEVNULL)
    peak, peak_main = 0, 0
    cpu: dict[int, float] = {}
    while process.poll() is None:
        sizes = []
        for member in [process, *_children(process)]:
            try:
                sizes.append(member.memory_info().rss)
                times = member.cpu_times()
                cpu[member.pid] = times.user + times.system
            except psutil.Error:  # it has ended meanwhile
                sizes.append(0)
        peak, peak_main = max(peak, sum(sizes)), max(peak_main, sizes[0])
        time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        raise RuntimeError(f"prepare ended with status {process.returncode}")
    return {
        "num_processes": num_processes,
        "seconds": time.monotonic() - begin,
        "cpu_seconds": sum(cpu.values()),
        "peak_bytes": peak,
        "peak_main_bytes": peak_main,
        "sha256": folder_sha256(shards),
        "shards": str(shards),
    }


def _children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def folder_sha256(folder: Path) -> str:
    """Hash the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def time_encoding(texts: Sequence[str], path: Path) -> dict[str, float]:
    """CPU seconds of sentencepiece alone, a document a call, and of our tokenizer, in turns of some documents."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = SentencePieceTokenizer(path)
    seconds = {"sentencepiece": 0.0, "tokenizer": 0.0}
    for begin in range(0, len(texts), 50):
        for name, encode in (("sentencepiece", processor.encode), ("tokenizer", tokenizer.encode_document)):
            start = time.process_time()
            for text in texts[begin : begin + 50]:
                encode(text)
            seconds[name] += time.process_time() - start
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 1 if the bytes differ."""
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="text to prepare")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to compare")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer, trained on 10 MB first")
    parser.add_argument("--encode-every", type=int, default=1, help="tokenize each n-th document alone, for the rate")
    parser.add_argument("--scale", type=float, nargs="+", default=[], metavar="MB", help="sizes to compare memory at")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    record = Record("prepare", arguments.out, settings)
    with tempfile.TemporaryDirectory(prefix="longhaul-prepare-") as name:
        folder = Path(name)
        texts = write_corpus(folder / "raw", arguments.megabytes)
        num_bytes = sum(len(text.encode()) for text in texts)
        model = folder / "t.model"
        section = TokenizerSection(model=str(model), vocab_size=arguments.vocab_size, sample_bytes=10_000_000)
        train_tokenizer(texts, section, 1)
        (folder / "config.yaml").write_text(CONFIG.format(folder=folder, vocab_size=arguments.vocab_size))
        print(f"{num_bytes / 1e6:.1f} MB of text in {len(texts):,} documents", flush=True)
        part = texts[:: arguments.encode_every]
        part_bytes = sum(len(text.encode()) for text in part)
        for number in arguments.processes:
            row = run_prepare(folder, number)
            row.pop("shards", None)
            alone = {f"{key}_bytes_per_cpu_second": part_bytes / max(value, 1e-9)
                     for key, value in time_encoding(part, model).items()}  # fmt: skip
            row |= {"num_bytes": num_bytes, "bytes_per_cpu_second": num_bytes / row["cpu_seconds"], **alone}
            record.add(part="processes", **row)
        for megabytes in arguments.scale:
            num_bytes = write_copies(folder / "copies", texts, megabytes)
            row = run_prepare(folder, max(arguments.processes), [f"data.sources.0.paths=[{folder}/copies]"])
            shutil.rmtree(row.pop("shards"))
            shutil.rmtree(folder / "copies")
            rate = num_bytes / row["cpu_seconds"]
            record.add(part="scale", **row, num_bytes=num_bytes, bytes_per_cpu_second=rate)
    print(render([record.content]))
    hashes = {row["sha256"] for row in record.content["rows"] if row["part"] == "processes"}
    print("all bytes are equal" if len(hashes) == 1 else "THE BYTES DIFFER")
    return 0 if len(hashes) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
