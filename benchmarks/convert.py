"""Converting a checkpoint: time and peak memory of each format, beside loading it whole.

A checkpoint is made up first, of a config's model as so many ranks of ZeRO-3 divide it, with random weights and
AdamW's two moments, by the project's own writers; the tokenizer is trained on the standard library. Each conversion is
a process of its own; its memory is what it has beside mapped files (RssAnon), looked at 50 times a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.record import ROOT, Record
from pretrain import __version__
from pretrain.checkpoints.checkpoint_files import FORMAT_VERSION, manifest_digest, tensor_key
from pretrain.checkpoints.checkpoint_folder import FolderPlace
from pretrain.options.config import Config
from pretrain.options.families import resolve_shape
from pretrain.options.settings import load_config, resolved_yaml
from pretrain.tokenizers.sentencepiece_tokenizer import train_tokenizer
from pretrain.tokenizers.tokenizer_files import open_tokenizer
from pretrain.transformer.model import Transformer

EXAMPLES = """examples:
  python benchmarks/convert.py configs/llama-1.3b.yaml --ranks 4 --out bench-results/convert.json
  python benchmarks/convert.py configs/gpt2-124m.yaml --only 'load,hf bf16, logits'"""
STATES = ("master", "exp_avg", "exp_avg_sq")
VOCAB_SIZE = 8192
LOAD = "import sys; from pretrain.checkpoints.run_folder import load_run; print(load_run(sys.argv[1]).num_tokens)"
SUBJECTS = {  # what is run, behind the run folder and the folder to make
    "load whole": [],
    "hf bf16, tensors": ["--to", "hf", "--dtype", "bf16", "--verify", "tensors"],
    "gguf bf16, tensors": ["--to", "gguf", "--dtype", "bf16", "--verify", "tensors"],
    "gguf q8_0, tensors": ["--to", "gguf", "--dtype", "q8_0", "--verify", "tensors"],
    "torch bf16": ["--to", "torch", "--dtype", "bf16"],
    "hf bf16, logits": ["--to", "hf", "--dtype", "bf16", "--verify", "logits"],
}


def make_run(config: Config, num_ranks: int) -> int:
    """Make a run folder with one checkpoint; return the number of parameters."""
    run = Path(config.run.dir)
    run.mkdir(parents=True)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in library]
    train_tokenizer(texts, config.tokenizer, seed=0)
    tokenizer = open_tokenizer(config.tokenizer)
    (run / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    shape = resolve_shape(config.model, tokenizer.vocab_size, config.data.max_seq_len)
    with torch.device("meta"):
        sizes = {name: tuple(one.shape) for name, one in Transformer(shape, 0).named_parameters()}
    place = FolderPlace(run / "checkpoints")
    place.claim("made up", run)
    place.begin(1, 0, num_ranks)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, Any] = {}
    fragments: dict[str, list[Any]] = {name: [] for name in sizes}
    for rank in range(num_ranks):
        tensors = {}
        for name, size in sizes.items():
            length = math.prod(size)
            part = -(-length // num_ranks)  # as DeepSpeed divides a parameter
            start, stop = min(rank * part, length), min((rank + 1) * part, length)
            if start == stop:
                continue
            fragments[name].append([f"rank-{rank:05d}.safetensors", start, stop - start])
            for state in STATES:
                made = torch.zeros(stop - start)
                if state == "master":
                    made.normal_(0, 0.02, generator=generator)
                tensors[tensor_key(name, state, start)] = made
        file = f"rank-{rank:05d}.safetensors"
        num_bytes, sha256 = place.write_tensors(1, file, tensors, {"format": "longhaul"})
        files[file] = {"bytes": num_bytes, "sha256": sha256}
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "step": 1, "files": files,
        "training": {"num_tokens": 1, "data": {}, "progress": {"step": 1}},
        "about": {
            "config": config.model_dump(mode="json"), "tokenizer": tokenizer.fingerprint, "longhaul": __version__,
        },
        "parameters": {name: {"shape": list(size), "states": list(STATES), "fragments": fragments[name]}
                       for name, size in sizes.items()},
    }  # fmt: skip
    place.complete(1, json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    return sum(math.prod(size) for size in sizes.values())


def measure(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its seconds and the peak of its anonymous memory."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        except OSError:  # it has just ended
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {"seconds": time.perf_counter() - began, "peak_anonymous_bytes": peak * 1024}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file, whose model is converted")
    parser.add_argument("--ranks", type=int, default=4, help="that the checkpoint is divided between")
    parser.add_argument("--only", help=f"names of subjects that are run, or beginnings of names: {', '.join(SUBJECTS)}")
    parser.add_argument("--folder", help="where the checkpoint and the exports are made; a temporary one by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    record = Record("convert", arguments.out, vars(arguments) | {"out": None, "vocab_size": VOCAB_SIZE})
    folder = Path(tempfile.mkdtemp(prefix="longhaul-convert-", dir=arguments.folder))
    try:
        run = folder / "run"
        overrides = [f"run.dir={run}", f"tokenizer.model={run}/tokenizer.model", f"tokenizer.vocab_size={VOCAB_SIZE}"]
        num_parameters = make_run(load_config(arguments.config, overrides), arguments.ranks)
        wanted = re.split(r",(?! )", arguments.only) if arguments.only else [""]  # names have commas before spaces
        for name, options in SUBJECTS.items():
            if not any(name.startswith(one) for one in wanted):
                continue
            out = folder / "export"
            command = [sys.executable, "-c", LOAD, str(run)]
            if options:
                command = [sys.executable, "launch/convert.py", str(run), str(out), *options]
            row: dict[str, Any] = {"subject": name, "parameters": num_parameters, **measure(command)}
            shutil.rmtree(out, ignore_errors=True)
            record.add(**row)
            print(f"{name:<20} {row['seconds']:8.1f} s  {row['peak_anonymous_bytes'] / 1e6:8.0f} MB", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
