"""Examples of the six tasks of `configs/tasks`, as JSON lines: made here, so that they take no download.

What is held out is new in content, not only in its rows: no combination that decides about an example, such as an
adjective with its noun or the two names of a person, is in both files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pretrain.errors import ConfigError
from pretrain.storage.whole_file import write_atomically
from pretrain.tasks.task_grammars import Example, Make, make_roles, make_translation
from pretrain.tasks.task_stories import make_label, make_log, make_question, make_summary

TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held-out.jsonl"
HELD_OUT_SHARE = 0.3  # of combinations; of examples that have several, far fewer are of these alone
_MAX_TRIES = 20_000  # for one example; the rarest kind takes about 1,000


@dataclass(frozen=True)
class Task:
    """How a task's examples are made, and the metric of `task_metrics` for it; None: bits per byte of the response."""

    make: Make
    metric: str | None


TASKS = {
    "translation": Task(make_translation, "bleu"),
    "summary": Task(make_summary, "rouge"),
    "questions": Task(make_question, "squad"),
    "roles": Task(make_roles, "roles"),
    "classification": Task(make_label, "accuracy"),
    "generation": Task(make_log, None),
}


def make_examples(name: str, num_train: int, num_held_out: int, seed: int = 1) -> tuple[list[Example], list[Example]]:
    """Make a task's training and held-out examples; no prompt is in them twice.

    Both have the same mixture of short and long: as many combinations in an example as the task itself gives.

    Args:
        name: one of `TASKS`.
        num_train, num_held_out: how many.
        seed: decides the examples, and which combinations are held out.

    Raises:
        ConfigError: no such task, or it does not have so many examples.
    """
    if name not in TASKS:
        raise ConfigError(f"task is {name}; expected one of {', '.join(TASKS)}. Name one of them.")
    seen: set[str] = set()
    return (
        list(_take(name, num_train, Random(f"{name} {seed} train"), seed, False, seen)),
        list(_take(name, num_held_out, Random(f"{name} {seed} held out"), seed, True, seen)),
    )


def is_held_out(name: str, combination: str, seed: int) -> bool:
    """Whether a combination is in held-out examples alone."""
    digest = hashlib.blake2b(f"{name} {seed} {combination}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT_SHARE * 2**64


def _take(name: str, num_examples: int, random: Random, seed: int, held_out: bool, seen: set[str]) -> Iterator[Example]:
    """Examples of one side, each of the size of one that was drawn without regard to sides."""
    make = TASKS[name].make
    for number in range(num_examples):
        size = len(make(random).content)
        for _ in range(_MAX_TRIES):
            example = make(random)
            if len(example.content) != size or example.prompt in seen:
                continue
            if all(is_held_out(name, one, seed) == held_out for one in example.content):
                break
        else:
            raise ConfigError(
                f"task {name}: examples wanted are {num_examples}; expected at most about {number}, which is what its "
                f"grammar has {'held out' if held_out else 'for training'}. Ask for fewer."
            )
        seen.add(example.prompt)
        yield example


def write_task(name: str, folder: str | Path, num_train: int, num_held_out: int, seed: int = 1) -> list[Path]:
    """Write a task's `train.jsonl` and `held-out.jsonl`, lines of `id`, `prompt` and `response`; return their paths.

    The same arguments give the same bytes. Each file is whole or as it was before.

    Raises:
        ConfigError: as `make_examples`.
        OSError: a file cannot be written.
    """
    made = make_examples(name, num_train, num_held_out, seed)
    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for file, examples in zip((TRAIN_FILE, HELD_OUT_FILE), made, strict=True):
        lines = [
            json.dumps({"id": f"{file[0]}{number}", "prompt": one.prompt, "response": one.response}, ensure_ascii=False)
            for number, one in enumerate(examples)
        ]
        paths.append(folder / file)
        write_atomically(paths[-1], "".join(f"{line}\n" for line in lines).encode())
    return paths
