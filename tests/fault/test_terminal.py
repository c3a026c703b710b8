"""Ctrl-C where a person watches: the run is saved, goes on bit for bit, and the terminal is as sound as before."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
import tty
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fault.conftest import NUM_STEPS, Starter
from tests.helpers.rank_helpers import ROOT, good_steps, losses, newest, state_hash
from tests.helpers.screen import Screen

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(300)]
OVERRIDES = ["eval={every_steps: 4, max_rows: 8}", "checkpoint.keep_best=false"]
HOLD = {"action": "hold", "at_rank": 0}
MOMENTS = {
    "a step": ("tests.fault.moments:at_step", HOLD | {"step": 5}),
    "an evaluation": ("tests.fault.moments:at_evaluation", HOLD),
    "a save": ("tests.fault.moments:at_call", HOLD | {"call": "rename"}),
}


class Window:
    """A terminal of this machine, and what has been printed on it."""

    def __init__(self, path: Path) -> None:
        """Let it be found at a path, as if it were a file."""
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)  # else the kernel writes \r\n for \n, which the screen takes for two
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        path.symlink_to(os.ttyname(self._slave))
        self.settings = termios.tcgetattr(self._slave)
        self._content = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self._content += data
        except OSError:  # the last one that had it open is gone
            pass

    def text(self) -> str:
        """What was printed, but for its colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._content.decode())

    def wait_for(self, words: str) -> None:
        give_up = time.monotonic() + 60
        while words not in self.text():
            assert time.monotonic() < give_up, self.text()
            time.sleep(0.01)

    def close(self) -> None:
        """Look at the settings a last time, and close it."""
        assert termios.tcgetattr(self._slave) == self.settings
        os.close(self._slave)
        self._thread.join(10)
        os.close(self._master)


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_time_leaves_run_and_terminal_sound(start: Starter, tmp_path, undisturbed, moment):
    run, held, log = tmp_path / "run", tmp_path / "held", tmp_path / "window"
    window = Window(tmp_path / "window-0")
    module, keywords = MOMENTS[moment]
    ranks = start(run, *OVERRIDES, hooks=[(module, keywords | {"path": str(held)})], log=log, TERM="xterm")
    give_up = time.monotonic() + 60
    while not held.exists():
        assert time.monotonic() < give_up, window.text()
        time.sleep(0.01)
    window.wait_for(f" of {NUM_STEPS}")
    for _ in range(2):  # the second one changes nothing
        ranks.send(signal.SIGINT)
        window.wait_for("SIGINT: what was begun is finished and saved, then this ends")
    held.unlink()
    give_up = time.monotonic() + 60
    while None in (statuses := ranks.statuses()):
        assert time.monotonic() < give_up, window.text()
        time.sleep(0.01)
    window.wait_for("saving    in ")
    window.close()
    assert statuses == [75, 75], window.text()
    screen = Screen()
    screen.feed(window.text())
    shown, step = screen.text(), json.loads((run / "status.json").read_text())["step"]
    last = f"step      {step} of {NUM_STEPS} "
    assert shown.count(last) == 1 and shown.index("a signal (SIGINT) asked to stop") < shown.index(last), shown
    assert screen.column == 0 and screen.row == len(screen.rows) - 1 and shown.count("SIGINT: what") == 1
    assert "Traceback" not in shown and "\x1b[?" not in window.text()
    assert (tmp_path / "window-1").read_text() == ""  # other ranks are silent
    assert step in good_steps(run) and newest(run).manifest["step"] == step
    start.finish(run, *OVERRIDES)
    assert (state_hash(newest(run)), losses(run)) == undisturbed(*OVERRIDES)


def test_ctrl_c_in_the_start_ends_it_at_once(tiny_config, tmp_path):
    pid, terminal = pty.fork()  # a terminal of its own, whose Ctrl-C is the kernel's
    if pid == 0:
        os.chdir(ROOT)
        command = [sys.executable, "launch/pretrain.py", str(tiny_config), f"run.dir={tmp_path}/run"]
        os.execve(sys.executable, command, os.environ | {"TERM": "xterm"})
    give_up = time.monotonic() + 60
    while not catches_sigterm(pid):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.write(terminal, b"\x03")
    content = b""
    with suppress(OSError):  # the end of what is printed
        while part := os.read(terminal, 65536):
            content += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    os.close(terminal)
    assert content.decode() == "^Cstopped by SIGINT before training began; nothing is lost.\r\n"
    assert not (tmp_path / "run").exists()


def catches_sigterm(pid: int) -> bool:
    """Whether a process has begun to hear signals, which Python does not do by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
