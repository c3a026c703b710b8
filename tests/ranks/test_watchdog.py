"""The watchdog's rules, its connections, and its last words, without training."""

from __future__ import annotations

import ast
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.ranks.heartbeat import Beat, Heartbeat
from pretrain.ranks.stalls import Judge, Stragglers
from pretrain.ranks.watch_links import Hub, Spoke
from tests.helpers.rank_helpers import ROOT

SECONDS, START_SECONDS = 10.0, 30.0


def judge_of(*beats: Beat) -> Judge:
    judge = Judge([f"node{rank}" for rank in range(len(beats))], SECONDS, START_SECONDS)
    for rank, beat in enumerate(beats):
        judge.hear(rank, beat)
    judge.step = max(beat.step for beat in beats)
    judge.is_starting = judge.step == 0
    return judge


def beat(phase: str = "forward", position: int = 9, num_beats: int = 50, **others) -> Beat:
    return Beat(
        **{"step": 4, "phase": phase, "position": position, "num_beats": num_beats, "is_patient": False} | others
    )


def pass_time(judge: Judge, seconds: float, *beats: Beat, silent: tuple[int, ...] = ()) -> None:
    """Let time pass, in which these beats come again and again, but for those of silent ranks."""
    for _ in range(int(seconds)):
        judge.pass_time(1.0)
        for rank, one in enumerate(beats):
            if rank not in silent:
                judge.hear(rank, one)


def test_a_heartbeat_says_what_the_main_thread_does():
    heart = Heartbeat()
    first = heart.read()
    assert (first.step, first.is_patient, first.is_waiting) == (0, False, False)
    heart.step = 3
    heart.enter("saving", is_patient=True)
    with heart.waiting():
        assert heart.read().is_waiting
        with heart.waiting():
            pass
        assert heart.read().is_waiting  # still in the outer one
    saving = heart.read()
    assert (saving.phase, saving.is_patient, saving.is_waiting) == ("saving", True, False)
    assert saving.num_beats == first.num_beats + 3 and saving.position == first.position + 1
    with heart.held(), heart.waiting():
        pass  # asking whether a save is done is no sign of life
    assert heart.read().num_beats == saving.num_beats
    heart.beat()
    heart.enter("data")
    heart.count_step(0.5)
    after = heart.read()
    assert (after.num_beats, after.phase, after.is_patient) == (saving.num_beats + 2, "data", False)
    assert (after.num_steps, after.own_seconds) == (1, 0.5)


def test_who_hangs_is_blamed_and_who_waits_for_it_is_not():
    beats = [beat("data", 9, is_waiting=True), beat("data", 9), beat("optimizer", 12)]
    judge = judge_of(*beats)
    pass_time(judge, SECONDS - 1, *beats)
    assert judge.silent() is None and judge.stalled(3) is None
    pass_time(judge, 2, *beats)
    verdict = judge.stalled(3)
    assert judge.silent() is None and (verdict.exit_status, verdict.lost, verdict.num_done) == (69, None, 3)
    assert verdict.reason.startswith(
        "step 4: rank 1 on node1 has not got on for 11 s, in phase 'data'; expected a sign of life within "
        "parallel.timeout_seconds (10). The others wait for it. Each rank's log (log.txt, log-rank*.txt) says"
    )


def test_a_rank_that_works_is_waited_for_however_long():
    waiting = beat("optimizer", 9, is_waiting=True)
    judge = judge_of(waiting, waiting)
    for number in range(200):
        judge.pass_time(1.0)
        judge.hear(0, waiting)
        judge.hear(1, beat("optimizer", 9, num_beats=50 + number))
    assert judge.stalled(3) is None and judge.silent() is None


def test_who_only_waits_for_a_rank_that_is_long_allowed_to_work_is_not_blamed():
    saving = beat("saving", 9, is_patient=True)
    waiting = beat("saving", 9, is_waiting=True)
    judge = judge_of(saving, waiting)
    pass_time(judge, START_SECONDS - 1, saving, waiting)
    assert judge.stalled(3) is None
    pass_time(judge, 2, saving, waiting)
    assert "rank 0 on node0 has not got on for 31 s, in phase 'saving'" in judge.stalled(3).reason
    assert "within parallel.start_timeout_seconds (30)" in judge.stalled(3).reason


def test_all_that_wait_for_each_other():
    waiting = beat("backward", 9, is_waiting=True)
    judge = judge_of(waiting, waiting, waiting, waiting)
    pass_time(judge, SECONDS, *[waiting] * 4)
    assert "all 4 ranks have not got on for 10 s, in phase 'backward'" in judge.stalled(3).reason
    assert "They wait for each other: the network between them, or a GPU." in judge.stalled(3).reason


def test_a_silent_rank_is_called_silent_even_if_it_was_behind():
    beats = [beat("optimizer", 12, is_waiting=True), beat("forward", 9)]
    judge = judge_of(*beats)
    pass_time(judge, SECONDS + 2, *beats, silent=(1,))
    assert judge.silent().reason.startswith(
        "step 4: rank 1 on node1 has not been heard of for 12 s, last in phase 'forward'; expected a sign of life within "
        "parallel.timeout_seconds (10). The process was stopped, or its node or the network to it is down. The same"
    )


def test_a_start_and_a_compiling_first_step_have_more_time():
    start = Beat(step=0, phase="engine", position=5, num_beats=7)
    judge = judge_of(start, start)
    pass_time(judge, START_SECONDS - 1, start, start)
    assert judge.stalled(3) is None
    pass_time(judge, 1, start, start)
    assert judge.stalled(3).reason.startswith("start: all 2 ranks have not got on for 30 s, in phase 'engine'")


def test_a_long_start_does_not_count_after_it():
    start = Beat(step=1, phase="optimizer", position=5, num_beats=7)
    judge = judge_of(start, start)
    judge.is_starting = True
    pass_time(judge, START_SECONDS - 1, start, start, silent=(1,))
    judge.end_start()
    assert judge.silent() is None and judge.stalled(3) is None  # rank 1's next beat is on its way
    pass_time(judge, SECONDS, start, start, silent=(1,))
    assert "rank 1 on node1 has not been heard of for 10 s" in judge.silent().reason


def test_ranks_that_have_done_everything_are_not_missed():
    busy = beat("saving", 9)
    judge = judge_of(busy, busy)
    judge.leave(1)
    for number in range(40):
        judge.pass_time(1.0)
        judge.hear(0, beat("saving", 9, num_beats=number))
    assert judge.silent() is None and judge.stalled(3) is None


def test_a_process_that_ended_and_an_error_of_its_own():
    judge = judge_of(beat(), beat("data"))
    verdict = judge.ended(1)
    assert (verdict.exit_status, verdict.lost) == (69, 1)
    assert verdict.reason.startswith("step 4: rank 1 on node1 has ended without a word, last heard of in phase 'data';")
    verdict = judge.failed(1, 1, "step 4: rank 1 ran out of memory")
    assert (verdict.exit_status, verdict.lost) == (1, 1)
    assert verdict.reason == "rank 1 on node1: step 4: rank 1 ran out of memory"


def test_a_straggler_is_named_once_and_again_when_it_has_recovered():
    beats = [beat() for _ in range(4)]
    judge = judge_of(*beats)
    stragglers = Stragglers(judge)

    def after_steps(num_steps: int, slow_seconds: float) -> list[str]:
        for rank in range(4):
            seconds = slow_seconds if rank == 2 else 1.0
            beats[rank] = replace(
                beats[rank], num_steps=beats[rank].num_steps + num_steps,
                own_seconds=beats[rank].own_seconds + num_steps * seconds,
            )  # fmt: skip
            judge.hear(rank, beats[rank])
        return list(stragglers.read())

    assert after_steps(0, 1.0) == []  # the first reading is what others are compared with
    assert after_steps(5, 9.0) == after_steps(5, 9.0) == []  # two readings may be chance
    assert after_steps(5, 1.0) == []
    assert after_steps(5, 1.6) == after_steps(3, 1.6) == after_steps(2, 1.6) == []  # 3 steps are too few
    (named,) = after_steps(5, 1.7)
    assert named.startswith(
        "rank 2 on node2 takes 1.7 s for its own part of a step, 1.7 times as long as the median rank"
    )
    assert after_steps(5, 3.0) == after_steps(5, 3.0) == []  # known
    assert after_steps(5, 1.2) == after_steps(5, 1.2) == []
    assert after_steps(5, 1.2) == ["rank 2 on node2 is about as fast as the other ranks again"]


def test_of_two_ranks_the_slower_one_is_the_straggler():
    judge = judge_of(beat(), beat())
    stragglers = Stragglers(judge)
    named = []
    for number in range(1, 6):
        judge.hear(0, beat(num_steps=5 * number, own_seconds=5.0 * number))
        judge.hear(1, beat(num_steps=5 * number, own_seconds=7.6 * number))
        named += stragglers.read()
    assert len(named) == 1 and named[0].startswith("rank 1 on node1 takes 1.52 s")


def linked(world_size: int) -> tuple[Hub, list[Spoke]]:
    hub = Hub(world_size, "127.0.0.1")
    return hub, [Spoke(("127.0.0.1", hub.port), hub.token, rank) for rank in range(1, world_size)]


def test_beats_go_to_rank_0_and_the_verdict_to_all():
    hub, spokes = linked(3)
    own = beat("evaluation", 3)
    heard = []
    threads = [threading.Thread(target=lambda one=one, rank=rank: heard.append(
        one.exchange(5.0, lambda: beat("data", rank)))) for rank, one in enumerate(spokes, 1)]  # fmt: skip
    for thread in threads:
        thread.start()
    beats: dict[int, Beat] = {}
    while len(beats) < 2:
        beats |= hub.exchange(0.2, lambda: own).beats
    assert beats == {1: beat("data", 1), 2: beat("data", 2)}
    hub.tell({"verdict": {"reason": "why"}})
    for thread in threads:
        thread.join(5)
    assert [news.verdict for news in heard] == [{"reason": "why"}] * 2
    assert [news.beats for news in heard] == [{0: own}] * 2  # what rank 0 does is the answer to a beat
    for one in (*spokes, hub):
        one.close()


def test_the_end_of_a_process_is_news_at_once():
    hub, spokes = linked(4)
    hub.exchange(0.1, beat)
    spokes[0].close()
    began = time.monotonic()
    assert hub.exchange(5.0, beat).ended == [1] and time.monotonic() - began < 1
    spokes[1].tell({"farewell": [1, "out of memory"]})
    assert hub.exchange(5.0, beat).failed == {2: (1, "out of memory")}
    spokes[2].tell({"farewell": []})
    news = hub.exchange(0.2, beat)
    assert news.left == [3] and not news
    hub.close()
    assert spokes[2].exchange(5.0, beat).ended == [0]
    for one in spokes[1:]:
        one.close()


def test_a_hub_that_ends_well_is_not_taken_for_lost():
    hub, spokes = linked(2)
    hub.exchange(0.1, beat)
    hub.tell({"farewell": []})
    news = spokes[0].exchange(5.0, beat)
    assert news.is_over and not news.ended
    thread = threading.Thread(target=hub.await_farewells, args=(5.0,))
    thread.start()
    spokes[0].close()
    thread.join(2)
    assert not thread.is_alive()
    hub.close()


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guess", "rank": 1}\n', b"[1]\n", b"x" * 200_000]
)
def test_strangers_are_sent_away_and_nobody_is_lost(words):
    hub, spokes = linked(2)
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(words[:60_000])
        for _ in range(5):
            assert not hub.exchange(0.05, beat)
            try:
                stranger.sendall(words[60_000:])
            except OSError:
                break
        stranger.settimeout(5)
        try:
            assert stranger.recv(10) == b""
        except ConnectionError:
            pass
    assert not hub.exchange(0.1, beat).ended
    spokes[0].close()
    assert hub.exchange(5.0, beat).ended == [1]
    hub.close()


LONELY = """
import os, sys, time, threading
from pathlib import Path
import torch, torch.distributed as dist
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
from pretrain.ranks.distributed import Ranks
from pretrain.ranks.watchdog import Watchdog
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
ranks = Ranks(0, 0, 1, torch.device("cpu"))
dog = Watchdog(ranks, float(sys.argv[2]), 100.0, Path(sys.argv[1]) / "log.txt")
dog.on_end = lambda found, step: (Path(sys.argv[1]) / "status").write_text(f"{found.exit_status} {step}")
ranks.heartbeat.step = 7
ranks.heartbeat.enter("data")
dog.first_step_is_over()
print("ready", flush=True)
def read_for_ever():
    if sys.argv[3] == "beats":
        for _ in range(30):
            time.sleep(0.1)
            ranks.heartbeat.beat()
        dog.close()
        os._exit(0)
    threading.Event().wait()
read_for_ever()
"""


def lonely(folder: Path, seconds: float, what: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LONELY, str(folder), str(seconds), what], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.launches
def test_one_process_that_hangs_says_where_and_ends(tmp_path):
    """And one that gives signs of life goes on, though it was stopped by Ctrl-Z for longer than the limit."""
    for name in ("hanging", "stopped"):
        (tmp_path / name).mkdir()
    hanging, stopped = lonely(tmp_path / "hanging", 1.5, "hangs"), lonely(tmp_path / "stopped", 1.5, "beats")
    assert stopped.stdout.readline() == "ready\n"
    stopped.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert hanging.stdout.readline() == "ready\n"
    assert hanging.wait(30) == 69
    reason = hanging.stderr.read()
    assert (
        reason.startswith("error: step 7: rank 0 on ") and "has not got on for" in reason and "phase 'data'" in reason
    )
    assert (tmp_path / "hanging" / "status").read_text() == "69 6"
    log = (tmp_path / "hanging" / "log.txt").read_text()
    assert "ERROR step 7: rank 0 on" in log and "in read_for_ever" in log  # the stack of the main thread
    time.sleep(max(0.0, 4.0 - (time.monotonic() - began)))
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(30) == 0, stopped.stderr.read()
    for process in (hanging, stopped):
        process.stdout.close(), process.stderr.close()


def test_only_clocks_that_nobody_sets_are_looked_at():
    """`time.time` jumps when a clock is set: the watchdog may print it, and must not compare with it."""
    wall = {"time", "datetime", "gmtime", "localtime", "clock_gettime"}
    for name in ("heartbeat", "stalls", "watch_links", "watchdog"):
        for node in ast.walk(ast.parse((ROOT / f"pretrain/ranks/{name}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in wall, f"{name}.py:{node.lineno}"


def test_a_beat_costs_next_to_nothing():
    heart = Heartbeat()
    began = time.perf_counter()
    for _ in range(10_000):
        heart.enter("forward")
        with heart.waiting():
            pass
    assert (time.perf_counter() - began) / 10_000 < 50e-6  # about 1 us on a quiet machine


def test_a_link_that_is_closed_can_be_woken():
    """As by the main thread, when rank 0 has left first and this rank's watchdog has ended by itself."""
    link = Hub(1, "127.0.0.1")
    link.close()
    link.wake()
