"""The commands under one name: `longhaul train CONFIG` is `python launch/pretrain.py CONFIG`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: launch/ would shadow the package `pretrain`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.console import ends_at_closed_pipe
from pretrain.interrupts import ends_on_signal

COMMANDS = {  # name: (module of launch, what it does)
    "prepare": ("prepare", "turn raw text into a tokenizer and shards"),
    "train": ("pretrain", "train, or go on from the newest good checkpoint"),
    "submit": ("submit", "train on a SLURM cluster; how a run stands; stop it"),
    "evaluate": ("evaluate", "held-out loss and tasks of a run, or of several beside each other"),
    "generate": ("generate", "sample text from a run"),
    "convert": ("convert", "convert a checkpoint for other software, and verify it"),
    "plan": ("plan", "memory, time and cost of a run, and better settings, with no GPU"),
    "make-tasks": ("make_tasks", "make the examples of the tasks in configs/tasks, offline"),
    "doctor": ("doctor", "what is installed and what works here, and how to mend what does not"),
    "report": ("report", "a run's curves, or several runs' beside each other, or what a model makes of a text"),
    "quickstart": ("quickstart", "the whole journey on a small config, offline"),
}


@ends_at_closed_pipe
@ends_on_signal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command with the arguments after its name; return its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        close = [command for command, (module, _) in COMMANDS.items() if module == name]
        close = close or difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(f"error: command is {name!r}; expected one of {', '.join(COMMANDS)}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    status = import_module(f"launch.{COMMANDS[name][0]}").main(rest)
    return int(status or 0)


def usage() -> str:
    """Return the help text."""
    lines = [f"  {name:<12}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: longhaul COMMAND ...\n\ncommands:",
            *lines,
            "\n`longhaul COMMAND --help` shows a command's arguments. `longhaul train` starts one process; more ranks:",
            "  deepspeed --num_gpus 8 launch/pretrain.py configs/llama-350m.yaml",
            "  torchrun --nproc-per-node 8 -m launch.pretrain configs/llama-350m.yaml",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
