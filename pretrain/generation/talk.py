"""A conversation in the terminal, or through a pipe: commands, Ctrl-C, what is said between answers."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from pretrain.errors import ConfigError
from pretrain.generation.conversation import Answer, Conversation
from pretrain.generation.generate_options import read_text
from pretrain.interrupts import Terminated
from pretrain.tokenizers.chat import TEMPLATE_FILE
from pretrain.tokenizers.tokenizer import Tokenizer

HELP = """/reset       begin anew
/save FILE   add the conversation to a file, as a line of JSON that training and --prompt-file read
/quit        end; so does the end of the input
//text       a message that begins with a slash
Ctrl-C       stops an answer; twice ends"""
_ENDED_BY = {
    "length": "stopped at --max-new-tokens",
    "context": "stopped at the length that the model was trained on",
    "interrupted": "stopped",
}


def take_template(tokenizer: Tokenizer, name: str | None) -> None:
    """Have a tokenizer use the chat template in a file instead of its own, if one is named.

    Raises:
        ConfigError: it cannot be read.
    """
    if name is not None:
        tokenizer.files = tokenizer.files | {TEMPLATE_FILE: read_text("--chat-template", name).encode()}


@dataclass
class _Interrupt:
    """Whether Ctrl-C was pressed during an answer."""

    is_answering: bool = False
    is_pressed: bool = False

    def handle(self, _: int, __: FrameType | None) -> None:
        if not self.is_answering or self.is_pressed:
            raise KeyboardInterrupt
        self.is_pressed = True


@contextmanager
def _watched() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def talk(conversation: Conversation, output: TextIO | None = None) -> None:
    """Answer what is typed until the end of the input; notes go to stderr, answers to `output` or stdout."""
    output = output or sys.stdout
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and remembers them
        _note("/help lists the commands")
    with _watched() as interrupt:
        was_pressed = False
        while True:
            try:
                line = input("> " if is_terminal else "")
            except EOFError:
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                if was_pressed:
                    return
                was_pressed = True
                _note("\nCtrl-C again ends")
                continue
            was_pressed = False
            if line.startswith("/") and not line.startswith("//"):
                if not _obey(conversation, line):
                    return
            elif line.strip():
                try:
                    _answer(conversation, line.removeprefix("/"), output, interrupt)
                except Terminated:
                    raise
                except KeyboardInterrupt:
                    output.write("\n")
                    return


def _answer(conversation: Conversation, text: str, output: TextIO, interrupt: _Interrupt) -> None:
    def show(new: str) -> None:
        output.write(new)
        output.flush()

    interrupt.is_answering, interrupt.is_pressed = True, False
    try:
        answer = conversation.answer(text, show, lambda: interrupt.is_pressed)
    except ConfigError as error:
        _note(f"error: {error}")
        return
    finally:
        interrupt.is_answering = False
    show("\n")
    for note in _notes(answer):
        _note(f"note: {note}")


def _notes(answer: Answer) -> Iterator[str]:
    if answer.num_dropped:
        yield f"the first {answer.num_dropped} messages are forgotten: all did not fit what the model was trained on"
    if answer.finish in _ENDED_BY:
        yield _ENDED_BY[answer.finish]


def _obey(conversation: Conversation, line: str) -> bool:
    """Do what a command says; return whether to go on."""
    name, _, rest = line.strip().partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        conversation.reset()
        _note("the conversation begins anew")
    elif name == "/save" and rest.strip():
        _save(conversation, Path(rest.strip()))
    elif name == "/help":
        _note(HELP)
    else:
        _note(f"error: the command is {line.strip()}; expected one of these. For a message, type another slash first.")
        _note(HELP)
    return True


def _save(conversation: Conversation, path: Path) -> None:
    record = json.dumps({"messages": conversation.messages}, ensure_ascii=False)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(record + "\n")
    except OSError as error:
        _note(f"error: {path}: cannot be written ({error}); expected a file. Name another.")
        return
    _note(f"{len(conversation.messages)} messages added to {path}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
