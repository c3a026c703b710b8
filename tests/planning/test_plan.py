"""Step time, the search over settings, the command line, the report and its JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.plan import main
from pretrain.errors import ConfigError
from pretrain.options.config import Config
from pretrain.options.families import num_parameters
from pretrain.options.settings import load_config
from pretrain.planning.plan import HOST_GIB, Plan, changed, choose_machine, make_plan, overrides, search
from pretrain.planning.plan_communication import collectives
from pretrain.planning.plan_memory import shape_of
from pretrain.planning.plan_report import as_json, lack, reason, render, report_json
from pretrain.planning.plan_time import ASSUMPTIONS, Machine, step_time

ROOT = Path(__file__).resolve().parents[2]


@cache
def load(name: str, *changes: str) -> Config:
    return load_config(ROOT / f"configs/{name}.yaml", changes)


def on(config: Config, gpu: str = "H100", number: int = 8, **more: float) -> Machine:
    return choose_machine(config, gpu, number, **more)  # type: ignore[arg-type]


def test_products_take_at_least_what_the_peak_allows() -> None:
    config = load("llama-7b")
    plan = make_plan(config, on(config))
    assert 0.1 < plan.mfu[0] < 0.6 and plan.mfu[1] < plan.mfu[0]
    time = plan.time
    assert time.total == pytest.approx(sum(vars(time).values()))
    assert plan.tokens_per_second == pytest.approx(plan.batch.tokens_per_step / time.total)
    assert plan.days * 86_400 == pytest.approx(time.total * plan.batch.num_steps)
    assert plan.cost == pytest.approx(2.5 * 24 * plan.days * 8)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["llama-350m", "llama-7b"]), st.sampled_from(["A100", "H100", "L40S"]),
       st.sampled_from([1, 8, 64]), st.sampled_from([0, 1, 2, 3]))  # fmt: skip
def test_time_is_monotone(name: str, gpu: str, number: int, stage: int) -> None:
    config = changed(load(name), zero_stage=stage, micro_batch_size=1, global_batch_size=512)
    config = changed(config, activation_checkpointing="none")
    machine = on(config, gpu, number)
    plan = make_plan(config, machine)
    assert all(seconds >= 0 for seconds in vars(plan.time).values())
    more = make_plan(changed(config, activation_checkpointing="full"), machine)
    assert more.time.matmul > plan.time.matmul and more.mfu[0] < plan.mfu[0]
    slower = make_plan(config, replace(machine, network=machine.network / 4))
    assert slower.time.communication >= plan.time.communication
    twice = make_plan(changed(config, global_batch_size=1024), machine)
    assert twice.time.total > 1.5 * plan.time.total  # what is done once a step stays
    assert twice.tokens_per_second >= plan.tokens_per_second
    if number > 1:
        hidden = make_plan(changed(config, overlap_comm=True), machine).time.communication
        assert hidden <= plan.time.communication
    else:
        assert plan.time.communication == 0


def test_frozen_weights_take_a_third_less_computing() -> None:
    config = load("llama-7b", "train.activation_checkpointing=none")
    tuned = load("llama-7b", "train.activation_checkpointing=none", "resume={from: x, optimizer: false}",
                 "train.lora={}")  # fmt: skip
    full, lora = (make_plan(one, on(one)) for one in (config, tuned))
    assert (
        2 / 3 < lora.time.matmul / full.time.matmul < 0.76
    )  # adapters read and write too, and the output layer is as before
    assert lora.time.attention == full.time.attention
    assert lora.time.update < 0.02 * full.time.update and lora.time.communication < 0.02 * full.time.communication
    frozen, whole = (one.mfu[1] * one.time.total for one in (lora, full))
    assert 2 / 3 < frozen / whole < 0.71  # 4 operations a weight instead of 6, attention as before
    assert "and 16.8M of adapters, which are trained, on 8 x H100" in render(tuned, lora, search(tuned, lora.machine))
    found = report_json(tuned, lora, search(tuned, lora.machine))
    assert (found["trained_parameters"], found["checkpoint_bytes"]) == (16_842_752, 12 * 16_842_752)


def test_many_nodes_wait_for_each_other() -> None:
    config = load("llama-70b", "train.global_batch_size=16384")
    few, many = (make_plan(config, on(config, number=number)) for number in (64, 4096))
    assert many.tokens_per_second > few.tokens_per_second
    assert many.tokens_per_second / 4096 < few.tokens_per_second / 64
    assert many.machine.num_nodes == 512 and on(config, number=9).num_nodes == 2


def test_assumptions_can_be_others() -> None:
    config = load("llama-7b")
    plan = make_plan(config, on(config))
    worse = step_time(config, plan.batch, plan.machine, replace(ASSUMPTIONS, sustained=0.5))
    assert worse.matmul > 1.5 * plan.time.matmul and worse.attention == plan.time.attention


def test_the_search_keeps_what_fits_and_puts_the_fastest_first() -> None:
    config = load("llama-70b")
    machine = on(config, number=64)
    found = search(config, machine)
    assert found.best and found.too_large
    times = [plan.time.total for plan in found.best]
    assert times == sorted(times)
    assert all(plan.fits for plan in found.best) and not any(plan.fits for plan in found.too_large)
    assert all(plan.batch.global_batch_size == 1024 for plan in [*found.best, *found.too_large])
    as_configured = make_plan(config, machine)
    assert found.best[0].time.total <= as_configured.time.total
    ways = {(plan.config.parallel.zero_stage, plan.config.parallel.offload,
             plan.config.train.activation_checkpointing) for plan in [*found.best, *found.too_large]}  # fmt: skip
    assert len(ways) == len(found.best) + len(found.too_large)
    assert {stage for stage, *_ in ways} == {1, 2, 3}  # in bf16 stage 0 would run as 1


def test_what_it_says_is_a_valid_command_line() -> None:
    config = load("llama-7b")
    for plan in search(config, on(config)).best:
        again = load_config(ROOT / "configs/llama-7b.yaml", overrides(plan, config))
        assert again.parallel == plan.config.parallel and again.train == plan.config.train


def test_compiled_blocks_are_not_divided() -> None:
    config = load("llama-350m", "train.compile=true")
    found = search(config, on(config))
    assert 3 not in {plan.config.parallel.zero_stage for plan in [*found.best, *found.too_large]}


def test_what_the_host_lacks_does_not_fit() -> None:
    config = load("llama-70b", "parallel.offload=optimizer")
    roomy, tight = make_plan(config, on(config, number=8)), make_plan(config, on(config, number=8, host_gib=1000))
    assert roomy.machine.host_bytes == HOST_GIB * 2**30
    assert roomy.fits and not tight.fits and tight.free_bytes > 0
    assert lack(tight).endswith("of each node's host, which has 1000.0 GiB")


def test_as_many_gpus_as_are_needed() -> None:
    assert choose_machine(load("llama-7b")).num_gpus == 8
    assert choose_machine(load("llama-70b")).num_gpus == 32
    assert choose_machine(load("llama-400b")).num_gpus == 8  # it never fits


def test_long_rows_are_shared_where_nothing_else_fits() -> None:
    rows = ("data.seq_len=131072", "train.global_batch_size=16", "train.micro_batch_size=1")
    config = load("llama-7b", *rows)
    found = search(config, on(config, number=16))
    assert not make_plan(config, on(config, number=16)).fits
    shared = [plan for plan in found.best if plan.batch.sequence_parallel_size > 1]
    assert shared and all("parallel.sequence_parallel_size=" in " ".join(overrides(plan, config)) for plan in shared)
    assert all("ranks share each row" in reason(plan) for plan in shared)
    assert all(plan.batch.sequence_parallel_size in (1, 2, 4, 8) for plan in [*found.best, *found.too_large])
    assert {plan.config.train.activation_checkpointing for plan in found.best} >= {"none", "offload"}
    for plan in found.best:  # what it says can be put on the command line
        load("llama-7b", *rows, *overrides(plan, config))


def test_fewer_rows_than_gpus_are_shared() -> None:
    config = load("llama-7b", "train.global_batch_size=8", "train.micro_batch_size=1", "data.seq_len=32768")
    found = search(config, on(config, number=32))
    assert found.best and {plan.batch.sequence_parallel_size for plan in found.best} <= {4, 8}


def test_long_rows_cost_what_they_must() -> None:
    config = load("llama-7b", "data.seq_len=32768", "train.global_batch_size=64", "train.micro_batch_size=1")
    machine = on(config, number=16)

    def plan(**options: object) -> Plan:
        return make_plan(changed(config, **options), machine)

    alone, shared, across = plan(), plan(sequence_parallel_size=2), plan(sequence_parallel_size=16)
    sent = [one for one in collectives(shared.config, shared.batch) if one.name == "all_to_all_single"]
    shape = shape_of(config)
    elements = 4 * shape.num_heads * shape.head_dim * shape.num_layers * 32768 / 2
    assert [one.num_bytes for one in sent] == [2 * 3 * elements * shared.batch.num_micro_steps]  # forward, again, back
    assert sent[0].wire_bytes(16) == sent[0].num_bytes / 2, "a half stays on its rank"
    assert shared.time.communication > alone.time.communication
    assert across.time.communication > 4 * shared.time.communication, "to another node"
    assert shared.memory.parts["activations"] == pytest.approx(alone.memory.parts["activations"] / 2, rel=0.05)
    moved, chunks = plan(activation_checkpointing="offload"), plan(ffn_chunk_tokens=2048)
    assert moved.memory.host["activations"] == 63 * shape.dim * 32768 * 2 and "activations" not in alone.memory.host
    assert moved.memory.parts["activations"] < alone.memory.parts["activations"]
    assert chunks.memory.parts["activations"] < alone.memory.parts["activations"]
    none, slow = plan(activation_checkpointing="none"), plan(activation_checkpointing="none", ffn_chunk_tokens=2048)
    assert slow.time.matmul > 1.1 * none.time.matmul, "feed-forwards are computed twice"
    link = replace(ASSUMPTIONS, host_link=0.5)
    assert step_time(moved.config, moved.batch, machine, link).host > moved.time.host


def test_bf16_needs_units_for_it() -> None:
    with pytest.raises(ConfigError, match=r"train.precision is bf16; expected fp16 or fp32 on V100.*=fp16\."):
        choose_machine(load("llama-350m"), "V100")
    half = load("llama-350m", "train.precision=fp16")
    assert make_plan(half, on(half, "V100")).memory.parts["activations"] > 0


def test_a_config_that_is_as_fast_comes_first_as_it_is() -> None:
    config = load("gpt2-124m")
    found = search(config, on(config))
    assert overrides(found.best[0], config) == [] and found.best[1].time.total < found.best[0].time.total
    slower = load("gpt2-124m", "train.activation_checkpointing=full")
    assert overrides(search(slower, on(slower)).best[0], slower) != []
    one = load("quickstart", "train.precision=fp32")  # whose stage 1 runs as 0 on one GPU
    stages = {plan.config.parallel.zero_stage for plan in search(one, on(one, number=1)).best}
    assert 0 not in stages and 1 in stages


def test_offloaded_weights_are_fetched() -> None:
    config = load("llama-7b", "parallel.zero_stage=3", "parallel.offload=optimizer")
    rest = make_plan(config, on(config, number=1)).time
    moved = make_plan(changed(config, offload="parameters"), on(config, number=1))
    fetched = 2 * 2 * num_parameters(shape_of(config)) * moved.batch.num_micro_steps / 20e9
    assert moved.time.host - rest.host == pytest.approx(fetched, rel=0.1)
    assert "waiting for the host" in render(config, moved, search(config, on(config)))


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("llama-7b", "parallel.zero_stage=3", "parallel.quantize=[weights]", "parallel.hpz_ranks=8",
                  "parallel.offload=optimizer", "parallel.nvme_dir=/nvme")  # fmt: skip
    plan = make_plan(config, on(config))
    text = render(config, plan, search(config, on(config)))
    assert ("Not reckoned with: parallel.quantize, the time of parallel.nvme_dir, the time that parallel.hpz_ranks saves."
            in text)  # fmt: skip
    assert "of parallel.nvme_dir of each node: 75.3 GiB" in text and as_json(plan)["not_reckoned"]
    assert as_json(plan)["host_memory_of_node"] == 8 * sum(plan.memory.host.values())
    assert "Not reckoned" not in render(load("llama-7b"), plan, search(config, on(config)))
    with pytest.raises(ConfigError, match=r"on 8 ranks: parallel.hpz_ranks is 3; expected a divisor of 8\."):
        make_plan(load("llama-7b", "parallel.zero_stage=3", "parallel.hpz_ranks=3"), on(config))


def test_where_more_gpus_do_not_help_it_says_so() -> None:
    config = load("llama-7b", "data.seq_len=8388608", "train.global_batch_size=8", "train.micro_batch_size=1")
    plan = make_plan(config, on(config))
    assert "and more GPUs do not help" in render(config, plan, search(config, on(config)))
    config = load("llama-400b")
    plan = make_plan(config, on(config, number=8))
    assert "Nothing fits: use more GPUs" in render(config, plan, search(config, on(config, number=8)))
    assert re.search(r"GiB too many, and .* GiB of each node's host, which has 1800.0 GiB", lack(plan))


def test_reasons_differ_with_what_they_are_for() -> None:
    config = load("llama-7b")
    plans = {stage: make_plan(changed(config, zero_stage=stage), on(config)) for stage in (1, 2, 3)}
    assert "gradients are summed once a step" in reason(plans[1])
    assert "after every micro-step" in reason(plans[2])
    assert "weights are gathered for every pass; each forward pass is computed twice" in reason(plans[3])
    moved = make_plan(changed(config, offload="optimizer", activation_checkpointing="none"), on(config))
    assert "the CPU updates" in reason(moved) and "nothing is computed twice" in reason(moved)


def test_the_report_says_what_does_not_fit() -> None:
    config = load("llama-70b")
    plan = make_plan(config, on(config, number=8))
    text = render(config, plan, search(config, on(config, number=8)))
    assert "69B parameters on 8 x H100 (79.2 GiB each), 1 node of up to 8" in text
    assert "does NOT fit: " in text and " GiB too many" in text
    assert "1. parallel.offload=optimizer" in text


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_one_object_with_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, str(ROOT / "configs/llama-1.3b.yaml"), "train.micro_batch_size=8", "--gpus", "16",
                     "--gpu", "A100", "--price", "1.25", "--network", "100")  # fmt: skip
    plan = found["plan"]
    assert found["parameters"] == 1_345_423_360 and plan["num_gpus"] == 16 and plan["gpu"] == "A100"
    assert plan["micro_batch_size"] == 8 and plan["network_gbits"] == 100 and plan["price_per_hour"] == 1.25
    assert sum(plan["memory"].values()) == plan["memory_bytes"]
    assert sum(plan["seconds"].values()) == pytest.approx(plan["step_seconds"])
    assert plan["communication_bytes"]["all_reduce"] == pytest.approx(4 * found["parameters"], rel=1e-6)
    assert plan["cost"] == pytest.approx(1.25 * 16 * 24 * plan["days"])
    assert found["best"][0]["step_seconds"] <= plan["step_seconds"]
    assert all(isinstance(one["overrides"], list) and one["fits"] for one in found["best"])


def test_text_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs/llama-350m.yaml")
    found = run_json(capsys, path)
    assert main([path]) == 0
    text = capsys.readouterr().out
    assert f"step     {found['plan']['step_seconds']:.3g} s" in text
    assert f"MFU {100 * found['plan']['mfu']:.1f}%" in text
    assert "Foreseen, not measured: docs/planning.md" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["configs/llama-7b.yaml", "--gpus", "7"],
            "on 7 ranks: train.global_batch_size is 1024; expected a multiple of",
        ),
        (["configs/llama-7b.yaml", "--gpu", "H10"], "--gpu: GPU is H10; expected one of"),
        (["configs/llama-7b.yaml", "train.micro_batch=2"], "train.micro_batch_size"),
        (["configs/none.yaml"], "configs/none.yaml: cannot be read"),
    ],
)
def test_wrong_use_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CONFIG is missing"),
        (["--gpus", "0", "c.yaml"], "it is 0; expected a whole number from 1"),
        (["--price", "-1", "c.yaml"], "it is -1; expected a number above 0"),
        (["--network", "fast", "c.yaml"], "it is fast; expected a number above 0"),
        (["--gpu-days", "3", "--mfu", "40"], "it is 40; expected a number above 0 and up to 1"),
        (["--gpu-days", "3", "--price", "2"], "--price goes with CONFIG"),
        (["c.yaml", "--mfu", "0.5"], "--mfu goes with --gpu-days"),
        (
            ["train.num_steps=2", "c.yaml"],
            "CONFIG is train.num_steps=2; expected a YAML file before the first key=value",
        ),
        (["c.yaml", "--parameters", "7e9"], "--parameters takes no CONFIG; use --scaling-law with one"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_scaling_laws_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    law = run_json(capsys, "--gpu-days", "100", "--gpu", "A100", "--mfu", "0.5")
    assert law["value"] == pytest.approx(100 * 86_400 * 312e12 * 0.5) and law["fit"]["tokens"] > 1e10
    assert run_json(capsys, "--tokens", "1e12")["ratio"]["parameters"] == pytest.approx(5e10)
    assert run_json(capsys, "--tokens", "1T") == run_json(capsys, "--tokens", "1e12")
    assert main(["--parameters", "7e9"]) == 0
    assert "For 7B parameters:" in (text := capsys.readouterr().out) and "140B tokens" in text
    laws = run_json(capsys, str(ROOT / "configs/llama-1.3b.yaml"), "--scaling-law")["scaling_laws"]
    assert [law["given"] for law in laws] == ["parameters", "tokens", "flops"]
    assert laws[0]["value"] == 1_345_423_360 and laws[2]["value"] == 6 * laws[0]["value"] * laws[1]["value"]


@pytest.mark.launches
def test_it_needs_no_torch_and_is_a_command() -> None:
    check = (
        "import sys; from launch.plan import main; main(['configs/llama-7b.yaml']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0 and "6.74B parameters" in done.stdout, done.stderr
    from launch.cli import COMMANDS

    assert COMMANDS["plan"][0] == "plan"


def test_a_plan_as_json_has_no_numbers_that_json_lacks() -> None:
    config = load("llama-7b")
    plan: Plan = make_plan(config, on(config, "H800"))
    assert json.loads(json.dumps(as_json(plan), allow_nan=False))["cost"] is None
