"""The console command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cli import COMMANDS, main
from pretrain.console import ends_at_closed_pipe

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)


def test_an_unknown_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: command is 'trian'; expected one of prepare, train, submit, evaluate, generate, convert"
    )
    assert "report, quickstart. Did you mean train?\n" in error


@pytest.mark.parametrize(("name", "hint"), [("pretrain", " Did you mean train?"), ("xyzzy", "")])
def test_the_command_that_is_meant_is_named(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert capsys.readouterr().err.partition("\n")[0].endswith(f"report, quickstart.{hint}")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_arguments_reach_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert f"error: {tmp_path / 'none.yaml'}: cannot be read: No such file or directory." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train", "--explain", "0", "a.yaml"], "argument --explain: it is 0; expected a whole number from 1\n"),
        (["train", "--explain=-1", "a.yaml"], "argument --explain: it is -1; expected a whole number from 1\n"),
        (["train", "--explain", "two", "a.yaml"], "argument --explain: it is two; expected a whole number from 1\n"),
        (["train", "--check", "--explain", "8", "a.yaml"], "--explain: not allowed with argument --check\n"),
        (["train"], "the following arguments are required: CONFIG\n"),
        (["train", "a.yaml", "--explian=8"], "unrecognized arguments: --explian=8. Did you mean --explain?\n"),
        (["submit", "a.yaml", "--dryrun", "--noeds=4", "--xyzzy"], "--xyzzy. Did you mean --dry-run and --nodes?\n"),
        (["prepare", "a.yaml", "--verfy"], "arguments: --verfy. Did you mean --verify?\n"),
        (
            ["convert", "run", "out", "--too", "hf"],
            "one of the arguments --to --from is required. Did you mean --to?\n",
        ),
        (
            ["plan", "a.yaml", "--gpu-day", "3"],
            "arguments: --gpu-day 3. Did you mean --gpu-days?\n",
        ),  # no abbreviations
    ],
    ids=str,
)
def test_wrong_use_says_what_is_right(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(error)


def test_it_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/cli.py"), "train", "none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.yaml: cannot be read")


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (["cli.py"], ""),
        (["cli.py"], "1"),
        (["prepare.py", "--help"], ""),
        (["pretrain.py", "--check", "configs/quickstart.yaml"], ""),
        (["pretrain.py", "--check", "configs/quickstart.yaml"], "1"),
    ],
)
def test_a_command_whose_output_nobody_reads_ends_quietly(arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, f"launch/{arguments[0]}", *arguments[1:]]
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_no_quiet_end() -> None:
    @ends_at_closed_pipe
    def fails(argv: Sequence[str] | None = None) -> int:
        raise BrokenPipeError("a connection")

    with pytest.raises(BrokenPipeError, match="a connection"):
        fails()
