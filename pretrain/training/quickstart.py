"""The whole journey on one small config, offline: each stage is a command that users run themselves.

prepare -> measure -> train -> evaluate -> generate -> convert -> load the export in a process that knows transformers
only. What is finished is found finished when it is run again.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.run_folder import CONFIG_FILE
from pretrain.console import format_duration
from pretrain.data.shard_reader import ShardReader
from pretrain.data.shards import Manifest
from pretrain.errors import EXIT_STOPPED, LonghaulError, TrainingError
from pretrain.options.config import Config
from pretrain.options.settings import load_config
from pretrain.ranks.hardware import peak_flops
from pretrain.tokenizers.tokenizer_files import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def "
TRAIN_SECONDS = 200.0  # that the training stage is fitted to; with all other stages, about five minutes on two cores
STEP_LIMITS = (120, 3000)
PROBE_STEPS = 12
STOP_SECONDS = 60  # for a checkpoint
DEEPSPEED_PORT = 29500  # its launcher's default

# Runs where nothing of this project is imported: what anyone who is given the export folder would write.
LOAD_WITH_TRANSFORMERS = """\
import sys, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
print(f"transformers {transformers.__version__}: {type(model).__name__}, {model.num_parameters():,} parameters")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True))
"""


@dataclass
class _Progress:
    """Seconds of each stage so far, of how many."""

    num_stages: int = 6
    begin: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)


def quickstart(config_path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Run every stage and print a summary.

    Args:
        config_path: YAML file.
        overrides: `option=value`. The precision and the number of steps are chosen for this machine: bf16 where its
            matrix products are faster, and as many steps as fit a few minutes. A run that exists goes on as it began.

    Raises:
        LonghaulError: a stage failed or was stopped; its own message is above.
    """
    progress = _Progress()
    overrides = list(overrides)
    config = load_config(config_path, overrides)
    run = config.run.dir
    given = {override.partition("=")[0] for override in overrides}
    if Path(run, CONFIG_FILE).exists():  # it goes on as it began
        begun = load_config(Path(run, CONFIG_FILE))
        chosen: dict[str, object] = {"train.precision": begun.train.precision, "train.num_steps": begun.train.num_steps}
    else:
        chosen = {"train.precision": fastest_precision()}
    overrides += [f"{name}={value}" for name, value in chosen.items() if name not in given]
    is_measured = "train.num_steps" not in given | set(chosen)
    progress.num_stages += is_measured
    num_available = torch.cuda.device_count() if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))
    num_ranks, micro_batch_size = divide(config.train.global_batch_size, config.train.micro_batch_size, num_available)
    if micro_batch_size != config.train.micro_batch_size:
        overrides.append(f"train.micro_batch_size={micro_batch_size}")

    _stage(progress, "prepare", [_script("prepare"), str(config_path), *overrides])
    if is_measured:
        overrides.append(f"train.num_steps={_fit_steps(progress, num_ranks, [str(config_path), *overrides])}")
    arguments = [str(config_path), *overrides]
    config = load_config(config_path, overrides)
    _train(progress, run, [*launcher(num_ranks), _script("pretrain"), *arguments])
    held_out = json.loads(_stage(progress, "evaluate", [_script("evaluate"), run, "--json"], capture=True))
    print(json.dumps(held_out))
    sampling = ["--max-new-tokens", "100", "--temperature", "0.8", "--seed", "1"]
    _stage(progress, "generate", [_script("generate"), run, "--prompt", PROMPT, *sampling])
    export = Path(run, "exports", f"hf-step-{held_out['step']:08d}")
    if export.exists():
        _heading(progress, "convert", f"{export} was written and verified before")
        progress.seconds["convert"] = 0.0
    else:
        export.parent.mkdir(parents=True, exist_ok=True)
        _stage(progress, "convert", [_script("convert"), run, str(export), "--to", "hf"])
    _stage(progress, "load", ["-c", LOAD_WITH_TRANSFORMERS, str(export), PROMPT], shown="(transformers alone)")
    print(summary(config, held_out, export, progress.seconds, time.perf_counter() - progress.begin), flush=True)


def fastest_precision() -> str:
    """Choose bf16 on a GPU and on a CPU with bf16 matrix units, fp32 elsewhere."""
    if torch.cuda.is_available():
        return "bf16"
    cpu, num_threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank's; and threads that wait for each other on a busy machine measure that
    try:
        return "bf16" if (peak_flops(cpu, "bf16") or 0) > 2 * (peak_flops(cpu, "fp32") or 0) else "fp32"
    finally:
        torch.set_num_threads(num_threads)


def _fit_steps(progress: _Progress, num_ranks: int, arguments: list[str]) -> int:
    """Train a few steps in a folder that is thrown away, and return how many fit `TRAIN_SECONDS`."""
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"run.dir={folder}/probe", f"train.num_steps={PROBE_STEPS}", "schedule.warmup_steps=0",
                 "eval.every_steps=0", "log.tensorboard=false"]  # fmt: skip
        _stage(progress, "measure", [*launcher(num_ranks), _script("pretrain"), *arguments, *extra])
        with open(Path(folder, "probe", "metrics.jsonl"), encoding="utf-8") as lines:
            seconds = sorted(line["step_seconds"] for line in map(json.loads, lines) if "step_seconds" in line)
    typical = seconds[len(seconds) // 2]
    low, high = STEP_LIMITS
    num_steps = min(max(round(TRAIN_SECONDS / typical, -1), low), high)
    print(f"a step takes {typical:.3f} s here: {num_steps:.0f} steps")
    return int(num_steps)


def _train(progress: _Progress, run: str, command: list[str]) -> None:
    """Train; what became of it stands in `status.json`, because the launcher hides exit statuses."""
    status_file = Path(run, "status.json")
    before = status_file.stat().st_mtime_ns if status_file.exists() else 0
    try:
        _stage(progress, "train", command)
    finally:
        is_new = status_file.exists() and status_file.stat().st_mtime_ns != before
        status = json.loads(status_file.read_text(encoding="utf-8")) if is_new else {}
        if status.get("status") in ("stopped", "failed"):
            raise _failure("train", status["exit_status"]) from None


def _script(name: str) -> str:
    """Return the path of a command, as short as it can be written here."""
    path = ROOT / "launch" / f"{name}.py"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def divide(global_batch_size: int, micro_batch_size: int, num_available: int) -> tuple[int, int]:
    """Choose how many ranks to start, and the rows that each computes at once.

    Returns:
        the largest number of ranks, up to `num_available`, that divides the batch, and the largest micro-batch, up to
        the given one, that divides a rank's rows.
    """
    num_ranks = max(ranks for ranks in range(1, num_available + 1) if global_batch_size % ranks == 0)
    rows = global_batch_size // num_ranks
    return num_ranks, max(size for size in range(1, min(micro_batch_size, rows) + 1) if rows % size == 0)


def launcher(num_ranks: int) -> list[str]:
    """Return DeepSpeed's launcher as the beginning of a command, on another port where its default one is taken."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise TrainingError("deepspeed: its launcher is not installed; expected it beside Python. Run: make setup")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store itself does
        try:
            probe.bind(("", DEEPSPEED_PORT))
            port = []
        except OSError:
            with socket.socket() as other:
                other.bind(("", 0))
                port = ["--master_port", str(other.getsockname()[1])]
    # on a CPU it would start one rank a NUMA node if it were given no number
    return [found, "--quiet", "--num_gpus", str(num_ranks), *port]


def _heading(progress: _Progress, stage: str, text: str) -> None:
    print(f"\n== {len(progress.seconds) + 1}/{progress.num_stages} {stage}: {text}", flush=True)


def _stage(progress: _Progress, stage: str, command: list[str], capture: bool = False, shown: str = "") -> str:
    """Run one command under a heading; return its output if captured, raise if it fails."""
    is_script = command[0] == "-c" or command[0].endswith(".py")
    words = ["python", *command] if is_script else [Path(command[0]).name, *command[1:]]
    _heading(progress, stage, shown or " ".join(f"'{word}'" if " " in word else word for word in words))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow each other down on a busy machine
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns in every process that it found no GPU
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command] if is_script else command,
        env=environment,
        stdout=subprocess.PIPE if capture else None,
        text=True,
        process_group=0,  # a launcher that gets the terminal's Ctrl-C itself ends with a traceback
    )
    output = _wait(process, stage)
    progress.seconds[stage] = time.perf_counter() - begin
    if process.returncode != 0:
        raise _failure(stage, process.returncode)
    return output


def _wait(process: subprocess.Popen[str], stage: str) -> str:
    """Wait for a stage; if this process is told to stop, so is the stage, and nothing of it is left."""
    try:
        return process.communicate()[0] or ""
    except KeyboardInterrupt:
        _end_group(process.pid, signal.SIGTERM)
        give_up = time.monotonic() + STOP_SECONDS
        while _has_processes(process.pid) and time.monotonic() < give_up:
            process.poll()
            time.sleep(0.05)
        raise _failure(stage, EXIT_STOPPED) from None
    finally:
        _end_group(process.pid, signal.SIGKILL)


def _end_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _has_processes(group: int) -> bool:
    """Whether a process of a group lives: a launcher may leave before its ranks have saved."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                return True
    return False


def _failure(stage: str, exit_status: int) -> LonghaulError:
    """Return the error for a stage that did not end well."""
    if exit_status == EXIT_STOPPED:
        error = TrainingError(f"quickstart: stopped at {stage}. Run it again: it goes on from here.")
    else:
        error = TrainingError(
            f"quickstart: {stage} ended with exit status {exit_status}; its message is above. Mend that and run it "
            "again: finished stages are not repeated."
        )
    error.exit_status = exit_status if exit_status > 0 else 1
    return error


def held_out_text(config: Config) -> tuple[bytes, int]:
    """Read the validation documents back from the shards.

    Returns:
        their text, one after the other, in UTF-8, and their number.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    texts = []
    for source in config.data.sources:
        manifest = Manifest.load(source.shards)
        for shard in manifest.shards("val"):
            with closing(ShardReader(source.shards, shard, manifest.dtype)) as reader:
                for number in range(shard.num_documents):
                    texts.append(tokenizer.decode(reader.read(number)[1:-1].tolist()).encode())
    return b"".join(texts), len(texts)


def training_losses(run: str | Path) -> Iterator[float]:
    """Yield the loss of every step of a run."""
    with open(Path(run, "metrics.jsonl"), encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            if values.get("loss") is not None:
                yield values["loss"]


def summary(config: Config, held_out: dict[str, Any], export: Path, seconds: dict[str, float], total: float) -> str:
    """Write what came out: the model beside general-purpose compressors, the losses, the times, the places."""
    text, num_documents = held_out_text(config)
    losses = list(training_losses(config.run.dir))
    tokens_per_step = config.train.global_batch_size * config.data.seq_len
    compressors = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    rows = {"this model": held_out["bits_per_byte"]} | {
        name: 8 * size / len(text) for name, size in compressors.items()
    }
    run, python = config.run.dir, Path(sys.executable)
    inside = python.is_relative_to(ROOT)
    folder = f"{python.parent.relative_to(ROOT) if inside else python.parent}/"
    return "\n".join([
        "\n== Summary\n",
        f"Held out: {num_documents} documents, {len(text):,} bytes. Bits per byte (lower is better):",
        *(f"  {name:<12}{bits:.3f}" for name, bits in rows.items()),
        "The model has trained on other documents of this kind; the compressors see the held-out ones only.",
        f"\nTraining loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token, {len(losses)} steps of "
        f"{tokens_per_step:,} tokens; held-out loss {held_out['loss']:.3f}.",
        f"\nTime: {', '.join(f'{stage} {format_duration(value)}' for stage, value in seconds.items())}; "
        f"together {format_duration(total)}.",
        "\nWhere everything is:",
        f"  run folder   {run}",
        f"  checkpoints  {run}/checkpoints",
        f"  curves       {folder}tensorboard --logdir {run}/tensorboard",
        f"  export       {export}   (loads in transformers: AutoModelForCausalLM.from_pretrained)",
        "\nWhat to try next:",
        f"  {folder}python launch/generate.py {run} --prompt 'import '",
        f"  {folder}deepspeed launch/pretrain.py configs/quickstart.yaml run.dir=runs/longer train.num_steps=1000",
        "  your own text: docs/getting-started.md",
    ])  # fmt: skip
