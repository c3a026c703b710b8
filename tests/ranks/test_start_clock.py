import subprocess
import sys
import time

import pytest

from pretrain.ranks.start_clock import StartClock, process_age


def test_parts_follow_each_other_and_are_said_in_order():
    clock = StartClock("config")
    clock.begin("data")
    time.sleep(0.02)
    clock.begin("model")
    begin = time.process_time()
    while time.process_time() < begin + 0.05:
        pass
    clock.end()
    assert list(clock.seconds) == list(clock.cpu_seconds) == ["python", "config", "data", "model"]
    assert clock.cpu_seconds["data"] < 0.02 and clock.cpu_seconds["model"] >= 0.05  # sleeping is no work
    assert clock.heartbeat.read().phase == "model"
    assert 0.02 <= clock.seconds["data"] < 5 and 0 <= clock.seconds["model"] < 5
    clock.seconds = {"imports": 2.04, "data": 1.0}
    assert str(clock) == "3.0 s from the start of the process: imports 2.0, data 1.0"


def test_the_age_of_a_process_is_that_since_it_was_started():
    code = "import time; time.sleep(0.3); from pretrain.ranks.start_clock import process_age; print(process_age())"
    begin = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.3 <= age <= time.monotonic() - begin + 0.05
    assert process_age() > age


def test_a_system_that_does_not_tell_gives_zero(monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert process_age() == pytest.approx(0.0)
