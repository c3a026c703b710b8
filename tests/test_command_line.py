"""What all commands have in common: help with examples that are true, flags that are suggested, statuses, `--json`."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from launch.cli import COMMANDS
from pretrain.command_line import CommandLine
from tests.helpers.fork_server import ForkServer
from tests.helpers.rank_helpers import ROOT

FILES = sorted(file for file, _ in COMMANDS.values())
SENTENCE_ENDS = re.compile(r"\s+(#|\().*$")  # what is said of an example behind it


class Parsed(Exception):
    """The arguments were read."""


def main_of(file: str) -> Any:
    return importlib.import_module(f"launch.{file}").main


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> list[CommandLine]:
    """Parsers that were used; a command ends by `Parsed` when its arguments are read."""
    used: list[CommandLine] = []
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: CommandLine, *given: Any, original: Any = original) -> None:
            used.append(self)
            original(self, *given)
            raise Parsed

        monkeypatch.setattr(CommandLine, name, parse)
    return used


def examples_of(parser: CommandLine) -> list[str]:
    assert parser.epilog and parser.epilog.startswith("examples:\n")
    return [line.strip() for line in parser.epilog.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("file", FILES)
def test_the_examples_of_a_command_are_ones(file: str, parsers: list[CommandLine]) -> None:
    with pytest.raises(SystemExit):
        main_of(file)(["--help"])
    examples = examples_of(parsers[0])
    assert len(examples) >= 2
    for example in examples:
        before, script, rest = SENTENCE_ENDS.sub("", example).partition("launch/")
        name, _, rest = rest.partition(".py")
        assert script and name in FILES, example
        words = shlex.split(re.split(r" [<>|] ", rest)[0].replace("$'", "'"))
        with pytest.raises(Parsed):
            main_of(name)(words)
        for word in words:
            assert not word.startswith("configs/") or (ROOT / word).exists(), example


@pytest.mark.parametrize("file", FILES)
def test_every_option_is_explained(file: str, parsers: list[CommandLine]) -> None:
    with pytest.raises(SystemExit):
        main_of(file)(["--help"])
    for action in parsers[0]._actions:
        assert action.help, action.dest
        takes_value = action.nargs != 0 and not action.choices and action.help != argparse.SUPPRESS
        assert action.metavar or not takes_value, action.dest
    assert parsers[0].epilog is not None and "exit status: 0 " in parsers[0].epilog


@pytest.mark.parametrize("file", FILES)
def test_a_misspelt_flag_is_known_again(
    file: str, parsers: list[CommandLine], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main_of(file)(["--help"])
    needed = {"convert": ["a", "b", "--to", "hf"], "make_tasks": []}.get(file, ["a"])
    flag = next(one for action in parsers[0]._actions[1:] for one in action.option_strings if len(one) > 5)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main_of(file)([*needed, f"{flag[:3]}x{flag[3:]}=1"])
    assert ended.value.code == 2
    assert re.search(rf"Did you mean {flag}\w*\?$", capsys.readouterr().err.strip())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_calls_a_command_as_it_was_called(
    name: str, parsers: list[CommandLine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = COMMANDS[name][0]
    monkeypatch.setattr("sys.argv", [f"launch/{file}.py"])
    with pytest.raises(SystemExit):
        main_of(file)(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python launch/{file}.py ")
    monkeypatch.setattr("sys.argv", ["/somewhere/.venv/bin/longhaul"])
    with pytest.raises(SystemExit):
        main_of(file)(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: longhaul {name} ") and "python launch/" not in shown
    called = {word for word in re.findall(r"\blonghaul (\S+)", shown) if word in COMMANDS}
    assert name in called


WRONG_NUMBERS = [
    ("convert a b --to hf --step x", "--step: it is x; expected a whole number"),
    ("evaluate a --limit many", "--limit: it is many; expected a whole number"),
    ("generate a --prompt b --top-k 1.5", "--top-k: it is 1.5; expected a whole number"),
    ("generate a --prompt b --temperature hot", "--temperature: it is hot; expected a number"),
    ("make_tasks --train 0", "--train: it is 0; expected a whole number from 1"),
    ("plan a --gpus -1", "--gpus: it is -1; expected a whole number from 1"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_NUMBERS)
def test_a_number_that_is_none_is_said(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, *arguments = words.split()
    with pytest.raises(SystemExit) as ended:
        main_of(file)(arguments)
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"{message}\n")


# --- statuses and --json

ABSENT = [  # what is named does not exist: wrong use
    "prepare absent.yaml", "prepare absent.yaml --dry-run --json", "prepare --inspect absent --json",
    "prepare --verify absent --json", "pretrain absent.yaml", "plan absent.yaml --json",
    "submit absent.yaml --nodes 1 --gpus-per-node 1 --dry-run --json", "submit --status absent --json",
    "submit --cancel absent --json", "evaluate absent --json", "generate absent --prompt x --json",
    "convert absent {out} --to hf --json", "convert absent {out} --to peft --json",
    "convert absent {out} --from hf --json", "report absent --inspect x --json",
    "make_tasks absent --out {out}", "quickstart --config absent.yaml",
]  # fmt: skip


@pytest.mark.parametrize("words", ABSENT)
def test_what_is_not_there_is_one_message(words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, *arguments = words.format(out=tmp_path / "out").split()
    status = main_of(file)(arguments)
    out, error = capfd.readouterr()
    is_data = words.startswith(("prepare --inspect", "prepare --verify"))  # which is no wrong use
    assert (status, out) == (1 if is_data else 2, ""), error
    assert error.startswith("error: ") and error.count("\n") == 1 and "absent" in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A run of four steps, which is done."""
    folder = tmp_path_factory.mktemp("json") / "run"
    ranks = fork_server.start([tiny_config, f"run.dir={folder}", "train.num_steps=4"], 1, folder.with_name("log"))
    assert ranks.wait() == [0], ranks.log()
    return folder


JSON = [  # arguments, keys of what is printed
    ("prepare {config} --dry-run --json", "sources"),
    ("prepare --inspect {shards} --json", "splits"),
    ("prepare --verify {shards} --json", "problems"),
    ("plan {config} --gpus 1 --json", "plan"),
    ("plan --tokens 1e9 --json", "fit"),
    ("submit {config} run.dir={out}-run --nodes 1 --gpus-per-node 0 --tasks-per-node 1 --dry-run --json", "script"),
    ("submit --status {run} --json", "state"),
    ("evaluate {run} --json", "bits_per_byte"),
    ("evaluate {run} {run} --json", "evaluations"),
    ("generate {run} --prompt def --max-new-tokens 3 --json", "completions"),
    ("convert {run} {out} --to torch --json", "tensors"),
    ("report {run} --inspect def --out {out} --json", "loss"),
]


@pytest.mark.launches
@pytest.mark.parametrize(("words", "key"), JSON, ids=[words for words, _ in JSON])
def test_json_is_one_object_and_nothing_else(
    words: str, key: str, run: Path, tiny_config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"config": tiny_config, "run": run, "shards": tiny_config.parent / "shards/code", "out": tmp_path / "out"}
    file, *arguments = words.format(**places).split()
    assert main_of(file)(arguments) == 0
    printed = json.loads(capfd.readouterr().out)
    assert isinstance(printed, dict) and key in printed, list(printed)


def test_every_command_with_json_is_tried(parsers: list[CommandLine]) -> None:
    """The doctor's is in tests/doctor/test_doctor.py, as it takes long."""
    for file in FILES:
        with pytest.raises(SystemExit):
            main_of(file)(["--help"])
    having = {parser.prog for parser in parsers if "--json" in parser._option_string_actions}
    assert having == {f"python launch/{words.split()[0]}.py" for words, _ in JSON} | {"python launch/doctor.py"}
