"""Runs training cases one after the other in one start of the ranks, since a DeepSpeed start costs 10 s and more.

Started by the tests on every rank: `cases.py CONFIG CASES.json`. CASES.json holds a list of
{"overrides": [...], and by choice "signal_at", "signal_rank", "poison", "out_of_memory", "unreadable", "damage", "fail_save",
"slow_save", "lose_state", "zero": settings of DeepSpeed's, "files" instead of its disk operator, "flip": [step, rank or
-1 for all, name], "watch_loading", "window", "bad_rows", "lie", "last_overrides", "measure", "watch_untrained"}. What a case leaves behind is
in its run folder.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.usage import measure
from pretrain.checkpoints import checkpoint_folder, share_writer
from pretrain.checkpoints.checkpoint import Checkpoints
from pretrain.errors import DataError, LonghaulError
from pretrain.optimizers.optim import make_optimizer
from pretrain.options.settings import load_config
from pretrain.ranks.distributed import leave_distributed
from pretrain.ranks.start_clock import StartClock
from pretrain.training import spikes
from pretrain.training import train as train_module
from pretrain.training.guard import StopRequest
from pretrain.transformer.model import KVCache
from pretrain.zero import engine as engine_module
from pretrain.zero.engine import init_distributed
from pretrain.zero.replicas import hash_tensor
from tests.helpers.host_reads import HostReads
from tests.ranks import lies, loading
from tests.ranks.file_operator import use_files


def run_case(case: dict, config_path: str, ranks, stop: StopRequest) -> str:
    """Run one case; return `done`, `stopped` or the error's text."""
    own = case.get("last_overrides", []) if ranks.rank == ranks.world_size - 1 else []
    config = load_config(case.get("config", config_path), [*case["overrides"], *own])
    if "damage" in case:  # flip a bit of the newest checkpoint
        if ranks.is_first:
            path = sorted((Path(config.run.dir) / "checkpoints").glob("step-*[0-9]"))[-1] / case["damage"]
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        ranks.barrier()
    save, write = Checkpoints.start_save, checkpoint_folder.write_tensors
    if "fail_save" in case:  # the last rank's disk is full when it writes these steps

        def failing_write(path, *rest):
            if ranks.rank == ranks.world_size - 1 and int(path.parent.name.rpartition("-")[2]) in case["fail_save"]:
                raise OSError(errno.ENOSPC, "no space")
            return write(path, *rest)

        checkpoint_folder.write_tensors = failing_write
    copy = share_writer.ShareWriter._copy
    if "slow_save" in case:  # both the copy in memory and the writing take so many seconds

        def slow_copy(*args):
            time.sleep(case["slow_save"])
            return copy(*args)

        def slow_write(*args):
            time.sleep(case["slow_save"])
            return write(*args)

        share_writer.ShareWriter._copy, checkpoint_folder.write_tensors = slow_copy, slow_write
    if "lose_state" in case:  # the last rank's optimizer lacks a state when it saves

        def incomplete_save(self, engine, *rest):
            if ranks.rank == ranks.world_size - 1:
                for state in engine._torch_optimizer.state.values():
                    state.pop(case["lose_state"], None)
            return save(self, engine, *rest)

        Checkpoints.start_save = incomplete_save
    if "sabotage" in case:  # DeepSpeed is handed another optimizer than the one that was asked for
        engine_module.make_optimizer = lambda groups, section: torch.optim.SGD(groups, lr=section.lr)
    sample = train_module.sample
    settings = engine_module.deepspeed_settings
    if "zero" in case:

        def other_settings(*args):
            found = settings(*args)
            return found | {"zero_optimization": found["zero_optimization"] | case["zero"]}

        engine_module.deepspeed_settings = other_settings
    if case.get("files"):
        use_files()
    if case.get("count_after_sampling"):  # what sampling leaves in memory

        def sample_and_count(run):
            sample(run)
            caches = sum(isinstance(found, KVCache) for found in gc.get_objects())
            matrices = [p for p in run.engine._engine.module.parameters() if p.ds_numel > 100_000]
            whole = sum(p.numel() > 0 for p in matrices)
            print(f"after sampling: {caches} caches, {whole} whole matrices of {len(matrices)}", flush=True)

        train_module.sample = sample_and_count
    original = train_module.train_step
    if "signal_at" in case:

        def step_then_signal(run):
            if run.progress.step + 1 == case["signal_at"] and ranks.rank == case.get("signal_rank", 0):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(run)

        train_module.train_step = step_then_signal
    if "unreadable" in case:  # the rows of this step

        def step_before_unreadable(run):
            if run.progress.step + 2 == case["unreadable"]:
                run.stream.read_step = unreadable
            return original(run)

        def unreadable():
            raise DataError("shards: cannot be read")

        train_module.train_step = step_before_unreadable
    if "out_of_memory" in case:  # memory ends in this step

        def step_without_memory(run):
            if run.progress.step + 1 == case["out_of_memory"]:
                torch.empty(2**60)
            return original(run)

        train_module.train_step = step_without_memory
    if "poison" in case:  # gradients of these steps are not finite on the last rank
        poisoned: list[int] = []

        def poisoned_step(run):
            forward = run.engine.forward

            def bad_forward(*args):
                objective, loss = forward(*args)
                is_bad = ranks.rank == ranks.world_size - 1 and run.progress.step + 1 not in poisoned
                poisoned.extend([run.progress.step + 1] if is_bad and case.get("poison_once") else [])
                factor = float("nan") if is_bad else 1.0
                return objective * factor, loss * factor

            if run.progress.step + 1 in case["poison"]:
                run.engine.forward = bad_forward
            try:
                return original(run)
            finally:
                run.engine.forward = forward

        train_module.train_step = poisoned_step
    if "flip" in case:  # a bit of a tensor's middle is another before this step
        step_to_flip, on_rank, name_to_flip = case["flip"]

        def step_with_flip(run):
            if run.progress.step + 1 == step_to_flip and on_rank in (-1, ranks.rank):
                tensors = dict(run.engine.replicas())
                for fragment in run.engine.fragments():
                    tensors |= {f"{fragment.name}/{state}": tensor for state, tensor in fragment.tensors.items()}
                if name_to_flip in tensors:  # else another rank has it
                    flat = tensors[name_to_flip].detach().view(-1)
                    flat.view(torch.int16)[len(flat) // 2 | 1] ^= 1 << 6  # of a significand, its first bit
            return original(run)

        train_module.train_step = step_with_flip
    open_run = train_module.open_run
    if case.get("watch_loading"):
        train_module.open_run = loading.watched(open_run)
    window = spikes.WINDOW
    spikes.WINDOW = case.get("window", window)
    forward = engine_module.Engine.forward
    if "bad_rows" in case:  # the targets of these rows are nonsense, the first so many times that they are met
        begin, end, num_times = case["bad_rows"]
        met = []

        def forward_nonsense(self, *args):
            if torch.is_grad_enabled() and len(args) == 5:  # not the self-test's
                tokens_BT, targets_BT, doc_start_BT, row_ids_B, step = args
                bad = (row_ids_B >= begin) & (row_ids_B < end)
                if bad.any() and met.count(key := row_ids_B.tolist()) < num_times:
                    met.append(key)
                    nonsense = torch.where(bad[:, None] & (targets_BT >= 0), (targets_BT * 31 + 7) % 300, targets_BT)
                    args = tokens_BT, nonsense, doc_start_BT, row_ids_B, step
            return forward(self, *args)

        engine_module.Engine.forward = forward_nonsense
    if case.get("watch_untrained"):  # the weights that are not trained have the same bits after each step

        def untrained_step(run):
            def bits():
                named = run.engine._untrained
                held = [getattr(parameter, "ds_tensor", parameter) for _, parameter in named]
                return [int(hash_tensor(tensor.data)) for tensor in held]

            before = bits()
            asked = original(run)
            assert before and before == bits(), "weights that are not trained have moved"
            return asked

        train_module.train_step = untrained_step
    if "count_reads" in case:  # what the host reads from the device in this step

        def watched_step(run):
            if run.progress.step + 1 != case["count_reads"]:
                return original(run)
            with HostReads() as reads:
                asked = original(run)
            (Path(config.run.dir) / "reads.json").write_text(json.dumps(reads.callers))
            return asked

        train_module.train_step = watched_step
    try:
        if case.get("measure"):  # what each rank sends and holds
            found = measure(config, ranks)
            (Path(config.run.dir) / f"usage-{ranks.rank}.json").write_text(json.dumps(found))
            return "done"
        with lies.told(case["lie"], ranks) if "lie" in case else nullcontext():
            return {0: "done", 75: "stopped"}[train_module.train_on(config, ranks, stop, StartClock())]
    except LonghaulError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        train_module.train_step = original
        train_module.open_run = open_run
        spikes.WINDOW, engine_module.Engine.forward = window, forward
        Checkpoints.start_save, checkpoint_folder.write_tensors = save, write
        share_writer.ShareWriter._copy = copy
        train_module.sample = sample
        engine_module.deepspeed_settings = settings
        engine_module.make_optimizer = make_optimizer


def main() -> int:
    """Run all cases; rank 0 writes the outcomes beside CASES.json."""
    config_path, cases_path = sys.argv[1], Path(sys.argv[2])
    ranks = init_distributed(120)
    outcomes = []
    for case in json.loads(cases_path.read_text()):
        with StopRequest() as stop:
            outcomes.append(run_case(case, config_path, ranks, stop))
    if ranks.is_first:
        cases_path.with_suffix(".outcomes").write_text(json.dumps(outcomes))
    leave_distributed()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        status
    )  # threads of gloo can abort a process that is done ("terminate called without an active exception")
