"""Some forty ways to get the config, paths, data or launch wrong: one clear message each, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.rank_helpers import run_command, start_ranks

pytestmark = pytest.mark.launches
TRAIN, PREPARE = "launch/pretrain.py", "launch/prepare.py"

# (what is wrong, command, overrides or edits of the file, exit status, text of the message)
CONFIG_MISTAKES = [
    (
        "unknown option",
        ["optim.learning_rate=1e-3"],
        "optim.learning_rate is unknown; expected an option. Did you mean optim.lr?",
    ),
    ("unknown section", ["optimizer.lr=1e-3"], "optim"),
    ("not a number", ["optim.lr=fast"], "optim.lr is 'fast'; expected a number"),
    ("out of range", ["optim.lr=-1"], "optim.lr is -1; expected"),
    ("not a choice", ["schedule.name=cosin"], "schedule.name is 'cosin'; expected"),
    ("not a switch", ["log.tensorboard=on"], "log.tensorboard is 'on'; expected true or false"),
    ("heads do not divide the width", ["model.num_heads=5"], "model.dim"),
    ("kv heads do not divide the heads", ["model.num_kv_heads=3"], "model.num_kv_heads is 3"),
    ("an option that the family does not take", ["model.norm=layernorm"], "model.norm is layernorm; expected rmsnorm"),
    ("an option that would do nothing", ["optim.momentum=0.9"], "optim.momentum"),
    ("two lengths", ["train.num_tokens=1000000"], "train.num_tokens"),
    ("warm-up longer than the run", ["schedule.warmup_steps=100"], "schedule.warmup_steps is 100"),
    ("a batch that the micro-batch does not divide", ["train.micro_batch_size=5"], "train.micro_batch_size is 5"),
    ("patience without evaluation", ["eval.patience=2"], "eval.patience"),
    ("an override that is none", ["num_steps"], "num_steps"),
    ("a value that is not YAML", ["run.dir=[a"], "run.dir"),
]


@pytest.mark.parametrize(("overrides", "text"), [m[1:] for m in CONFIG_MISTAKES], ids=[m[0] for m in CONFIG_MISTAKES])
def test_config_mistakes_exit_2(tiny_config: Path, overrides: list[str], text: str) -> None:
    check(run_command(TRAIN, tiny_config, *overrides), 2, text)


def check(done, status: int, text: str) -> None:
    assert done.returncode == status, done.stderr
    assert text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1, done.stderr


def test_a_missing_config_file(tmp_path):
    check(run_command(TRAIN, tmp_path / "absent.yaml"), 2, "absent.yaml")


def test_a_config_that_is_not_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: {dim: 8\ntrain: ]")
    check(run_command(TRAIN, tmp_path / "bad.yaml"), 2, "bad.yaml:2")


def test_all_problems_come_at_once_with_file_and_line(tiny_config, tmp_path):
    text = tiny_config.read_text().replace("dim: 32", "dim: -32").replace("zero_stage: 1", "zero_stage: 7")
    (tmp_path / "two.yaml").write_text(text)
    done = run_command(TRAIN, tmp_path / "two.yaml", "train.precision=bf61")
    check(done, 2, "two.yaml:2: model.dim is -32; expected")
    assert "two.yaml:15: parallel.zero_stage is 7" in done.stderr
    assert "command line: train.precision is 'bf61'" in done.stderr


def test_training_before_preparing(tiny_config, tmp_path):
    check(run_command(TRAIN, tiny_config, f"data.sources=[{{name: a, shards: {tmp_path}/absent}}]", f"run.dir={tmp_path}/r"),
          1, "python launch/prepare.py")  # fmt: skip


def test_training_without_the_tokenizer(tiny_config, tmp_path):
    check(
        run_command(TRAIN, tiny_config, f"tokenizer.model={tmp_path}/absent.model", f"run.dir={tmp_path}/r"),
        1,
        "absent.model",
    )


def test_a_length_that_was_not_prepared(tiny_config, tmp_path):
    check(run_command(TRAIN, tiny_config, "data.seq_len=48", f"run.dir={tmp_path}/r"), 1, "prepare")


def test_a_truncated_shard(tiny_config, tmp_path):
    shutil.copytree(tiny_config.parent / "shards" / "code", tmp_path / "code")
    shard = next(iter(sorted((tmp_path / "code").glob("train-*.tar"))))
    shard.write_bytes(shard.read_bytes()[:-4096])
    done = run_command(
        TRAIN, tiny_config, f"data.sources=[{{name: code, shards: {tmp_path}/code}}]", f"run.dir={tmp_path}/r"
    )
    check(done, 1, shard.name)


def test_a_tokenizer_of_other_shards(tiny_config, tmp_path):
    from pretrain.options.settings import load_config
    from pretrain.tokenizers.sentencepiece_tokenizer import train_tokenizer

    section = load_config(
        tiny_config, [f"tokenizer.model={tmp_path}/other.model", "tokenizer.vocab_size=480"]
    ).tokenizer
    train_tokenizer(iter([tiny_config.parent.joinpath("code/ast.py").read_text()] * 3), section, seed=1)
    check(
        run_command(
            TRAIN,
            tiny_config,
            f"tokenizer.model={tmp_path}/other.model",
            "tokenizer.vocab_size=480",
            f"run.dir={tmp_path}/r",
        ),
        1,
        "tokenizer",
    )


def test_no_held_out_documents(tiny_config, tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(tiny_config.parent / "shards" / "prose", folder)
    (tmp_path / "one.txt").write_text("one document only, which is not held out\n" * 50)
    overrides = [f"data.sources=[{{name: one, paths: ['{tmp_path}/one.txt'], shards: {tmp_path}/one}}]",
                 "data.val_fraction=0.0001", "eval.every_steps=5", f"run.dir={tmp_path}/r"]  # fmt: skip
    assert run_command(PREPARE, tiny_config, *overrides).returncode == 0
    check(run_command(TRAIN, tiny_config, *overrides), 1, "held-out rows are 0")


def test_a_source_that_matches_no_file(tiny_config, tmp_path):
    overrides = [f"data.sources=[{{name: a, paths: ['{tmp_path}/*.txt'], shards: {tmp_path}/s}}]"]
    check(run_command(PREPARE, tiny_config, *overrides), 1, f"{tmp_path}/*.txt")


def test_a_vocabulary_too_large_for_the_text(tiny_config, tmp_path):
    (tmp_path / "a.txt").write_text("a small text\n" * 10)
    overrides = [f"data.sources=[{{name: a, paths: ['{tmp_path}/a.txt'], shards: {tmp_path}/s}}]",
                 f"tokenizer={{model: {tmp_path}/t.model, vocab_size: 30000}}", "data.val_fraction=0"]  # fmt: skip
    check(run_command(PREPARE, tiny_config, *overrides), 2, "tokenizer.vocab_size is 30000")


def test_a_run_folder_that_cannot_be_made(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    check(run_command(TRAIN, tiny_config, f"run.dir={tmp_path}/file/run"), 2, "expected a folder that can be written")


def test_fp16_without_a_gpu(tiny_config, tmp_path):
    check(
        run_command(TRAIN, tiny_config, "train.precision=fp16", f"run.dir={tmp_path}/r", CUDA_VISIBLE_DEVICES=""),
        2,
        "train.precision is fp16",
    )


def test_half_a_launcher(tiny_config, tmp_path):
    check(run_command(TRAIN, tiny_config, f"run.dir={tmp_path}/r", RANK="0"), 2, "RANK is set and")


def test_a_batch_that_the_ranks_do_not_divide(tiny_config, tmp_path):
    processes = start_ranks(TRAIN, [str(tiny_config), f"run.dir={tmp_path}/r"], 2, tmp_path / "log")
    assert [process.wait(60) for process in processes] == [2, 2]
    shown = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert shown[0].startswith("error: on 2 ranks: train.global_batch_size is 16; expected a multiple of"), shown
    assert "32" in shown[0] and shown[1] == ""  # said once, not once a rank


def test_a_port_that_is_taken(tiny_config, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run_command(TRAIN, tiny_config, f"run.dir={tmp_path}/r", **variables)
    check(done, 1, f"cannot meet the others at 127.0.0.1:{port}; expected a free port")


def test_another_config_in_the_run_folder(tiny_config, tmp_path):
    common = [tiny_config, f"run.dir={tmp_path}/r", "train.num_steps=4"]
    assert run_command(TRAIN, *common).returncode == 0
    done = run_command(TRAIN, *common, "optim.lr=1e-2", "model.dropout=0.1")
    check(done, 2, "optim.lr: 0.003 in the run folder, 0.01 now")
    assert "run.allow_changes=[model.dropout, optim.lr]" in done.stderr
    allowed = run_command(TRAIN, *common[:2], "train.num_steps=5", "optim.lr=1e-2", "run.allow_changes=[optim.lr]")
    assert allowed.returncode == 0, allowed.stderr
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert (status["status"], status["exit_status"], status["step"]) == ("done", 0, 5)
    config = (tmp_path / "r" / "config.yaml").read_text()
    refused = run_command(TRAIN, *common[:2], "train.num_steps=6", "model.family=qwen3", "optim.lr=1e-2",
                          "run.allow_changes=[model.family]")  # fmt: skip
    check(
        refused, 1, "holds another model than the config's (blocks.0.attention.q_norm.weight is not there, and would be"
    )
    assert (tmp_path / "r" / "config.yaml").read_text() == config  # the one before still may go on


def test_a_second_job_in_the_run_folder(tiny_config, tmp_path):
    import fcntl

    (tmp_path / "r").mkdir()
    with open(tmp_path / "r" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(run_command(TRAIN, tiny_config, f"run.dir={tmp_path}/r"), 2, "no other job is training in")


@pytest.mark.parametrize("command", ["generate", "convert", "evaluate"])
def test_a_run_that_is_none(tmp_path, command):
    extra = {"generate": ["--prompt", "x"], "convert": [str(tmp_path / "out"), "--to", "hf"], "evaluate": []}[command]
    check(run_command(f"launch/{command}.py", tmp_path, *extra), 2, "holds no checkpoint")
