"""Every command but training ends in order when it is told to stop, at any moment (training: tests/fault)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.cli import COMMANDS
from pretrain.interrupts import SIGNALS, ends_on_signal, signals_held
from tests.helpers.fork_server import ForkServer
from tests.helpers.rank_helpers import ROOT, run_command

pytestmark = [pytest.mark.launches, pytest.mark.slow]
INT, TERM, HUP = map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
GOES_ON = ("prepare", "convert", "quickstart")
OTHERS = sorted({file for file, _ in COMMANDS.values()} - {"pretrain"} | {"cli"})


@pytest.fixture(scope="module")
def run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    ranks = fork_server.start([tiny_config, f"run.dir={folder}", "train.num_steps=4"], 1, folder.with_name("log"))
    assert ranks.wait() == [0], ranks.log()
    return folder


@pytest.mark.parametrize("command", OTHERS)
def test_a_signal_while_it_starts_ends_it_at_once(command: str) -> None:
    """Where it imports the first module of its own, before it has read its arguments."""
    arguments = ["plan"] if command == "cli" else []
    at = "launch.plan" if command == "cli" else "pretrain.command_line"
    done = run_command("tests/helpers/signalled.py", str(TERM), f"import:{at}", f"launch/{command}.py", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (
        75 if command in GOES_ON else 130,
        "",
        "stopped before it began\n",
    )


@pytest.mark.parametrize(("number", "at"), [(INT, "torch"), (HUP, "numpy")])
def test_a_signal_while_libraries_are_imported(number: int, at: str) -> None:
    command = ["launch/generate.py", "absent", "--prompt", "x"]
    done = run_command("tests/helpers/signalled.py", str(number), f"import:{at}", *command)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped before it began\n")


def test_what_nohup_ignores_stays_ignored() -> None:
    command = [sys.executable, "tests/helpers/signalled.py", str(HUP), "import:pretrain.command_line", "launch/plan.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 2 and "CONFIG is missing" in done.stderr


# command, its arguments ({run}, {config} and {out} are filled in), signal, the call before which it comes, status, line
WORKING = [
    ("convert", "{run} {out} --to torch", INT, "pretrain.formats.partial_export:PartialExport._write_file", 75,
     "stopped; the same command goes on with what is written"),
    ("convert", "{run} {out} --to torch", TERM, "pretrain.formats.partial_export:PartialExport.finish", 75,
     "stopped; the same command goes on with what is written"),
    ("evaluate", "{run} --json --again", INT, "pretrain.evaluation.evaluate:_sum_up", 130,
     "stopped; checkpoints that were done are kept"),
    ("evaluate", "{run} --again", TERM, "os:replace", 130, "stopped; checkpoints that were done are kept"),
    ("generate", "{run} --prompt def --json", INT, "pretrain.generation.generate:_append", 130, "stopped"),
    ("generate", "{run} --prompt def", TERM, "pretrain.checkpoints.run_folder:newest_good", 130, "stopped"),
    ("generate", "{run} --chat", TERM, "builtins:input", 130, "stopped"),
    ("plan", "{config} --gpus 1 --json", INT, "pretrain.planning.plan:search", 130, "stopped"),
    ("report", "{run} --inspect def --out {out}", INT, "os:replace", 130, "stopped"),
    ("make_tasks", "roles --train 50 --held-out 5 --out {out}", TERM, "os:replace", 130,
     "stopped; files are whole or as they were"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "arguments", "number", "call", "status", "line"),
    WORKING,
    ids=[f"{one[0]} at {one[3]}" for one in WORKING],
)
def test_a_signal_while_it_works(
    command: str, arguments: str, number: int, call: str, status: int, line: str, run: Path, tiny_config: Path,
    tmp_path: Path, fork_server: ForkServer,
) -> None:  # fmt: skip
    (tmp_path / "made").mkdir()
    out = tmp_path / "made" / "out"
    words = arguments.format(run=run, config=tiny_config, out=out).split()
    before = sorted(run.rglob("*"))
    hook = ("tests.helpers.signalled:at_call", {"function": call, "number": number})
    stopped = fork_server.start(words, 1, tmp_path / "log", [hook], command)
    assert stopped.wait() == [status], stopped.log()
    assert stopped.log() == line + "\n"
    assert sorted(run.rglob("*")) == before
    left = [path.name for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert not left or (status == 75 and not out.exists()), left
    again = fork_server.start(words, 1, tmp_path / "again", (), command)
    assert again.wait() == [0], again.log()
    assert command not in ("convert", "report", "make_tasks") or os.listdir(out.parent) == ["out"]


def test_a_second_ctrl_c_does_not_cut_off_what_cleans_up(tmp_path: Path) -> None:
    """Nor one that a launcher passes on; and one that comes when all is said ends what still waits for a thread."""
    (tmp_path / "command.py").write_text("""
import os, signal, threading, time
from launch.cli import COMMANDS
from pretrain.interrupts import begin_work, ends_on_signal
@ends_on_signal()
def main():
    begin_work("stopped; cleaned up")
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        print("clean", flush=True)
        threading.Thread(target=time.sleep, args=(60,)).start()
status = main()
os.kill(os.getpid(), signal.SIGINT)
""")
    done = run_command(tmp_path / "command.py", PYTHONPATH=str(ROOT), timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "clean\n", "stopped; cleaned up\n")


def test_what_a_library_makes_of_it_is_no_traceback() -> None:
    @ends_on_signal(75)
    def main() -> int:
        from pretrain import interrupts

        interrupts.begin_work()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None
        return 0

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert main() == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SBATCH = """#!/bin/sh
kill -INT $PPID
echo 4711
"""


def test_a_job_that_slurm_has_taken_is_recorded(tiny_config: Path, tmp_path: Path) -> None:
    for name, body in {
        "sbatch": SBATCH,
        "squeue": "#!/bin/sh\n",
        "sinfo": "#!/bin/sh\n",
        "scontrol": "#!/bin/sh\n",
    }.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    done = run_command(
        "launch/submit.py", tiny_config, f"run.dir={run}", "--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith(f"stopped; job 4711 was submitted before: submit.py --cancel {run} takes it back\n")
    assert json.loads((run / "submit.json").read_text())["submissions"][0]["job"] == "4711"


def test_signals_are_held_from_what_is_started() -> None:
    with signals_held():
        shown = subprocess.run(["grep", "SigBlk", "/proc/self/status"], capture_output=True, text=True).stdout
    blocked = int(shown.split()[1], 16)
    assert all(blocked >> (number - 1) & 1 for number in SIGNALS)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)


QUICKSTART = """
import sys
sys.path.insert(0, {root!r})
sys.argv[0] = "quickstart"
from launch import quickstart as command
from pretrain.training import quickstart as driver
driver._script = lambda name: {stage!r}
driver.fastest_precision = lambda: "fp32"
sys.exit(command.main(["run.dir={folder}/run", "train.num_steps=50"]))
"""
STAGE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); "
                         "print('up', flush=True); time.sleep(1.5); open({saved!r}, 'w').close()"])
time.sleep(60)
"""


@pytest.mark.parametrize("number", [INT, TERM])
def test_the_quickstart_leaves_no_process_behind(number: int, tmp_path: Path) -> None:
    """The stage ends at the signal, as a launcher does, and its child when it has saved."""
    (tmp_path / "stage.py").write_text(STAGE.format(saved=str(tmp_path / "saved")))
    script = QUICKSTART.format(root=str(ROOT), stage=str(tmp_path / "stage.py"), folder=tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    give_up = time.monotonic() + 60
    while process.stdout.readline() != "up\n":
        assert process.poll() is None and time.monotonic() < give_up
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2
    process.send_signal(number)  # to it alone, as `kill` does
    errors = process.communicate(timeout=30)[1]
    assert (process.returncode, errors) == (
        75,
        "error: quickstart: stopped at prepare. Run it again: it goes on from here.\n",
    )
    assert (tmp_path / "saved").exists() and psutil.wait_procs(family, 5)[1] == []
