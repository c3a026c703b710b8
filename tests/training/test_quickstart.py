"""The quickstart driver: what it starts, how it takes failures, what it sums up."""

from __future__ import annotations

import gzip
import json
import lzma
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.shards import Manifest, ShardWriter
from pretrain.errors import LonghaulError
from pretrain.options.config import Config, TokenizerSection
from pretrain.options.settings import load_config, resolved_yaml
from pretrain.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from pretrain.training import quickstart as driver

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"def f{number}(x):\n    return x + {number}  # größe\n" for number in range(40)]


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 9))
def test_ranks_divide_the_batch(global_batch_size: int, micro_batch_size: int, num_available: int) -> None:
    num_ranks, micro = driver.divide(global_batch_size, micro_batch_size, num_available)
    assert 1 <= num_ranks <= num_available
    assert micro <= micro_batch_size
    assert global_batch_size % (num_ranks * micro) == 0


def test_all_gpus_are_used_where_the_batch_allows() -> None:
    assert driver.divide(16, 8, 1) == (1, 8)
    assert driver.divide(16, 8, 2) == (2, 8)
    assert driver.divide(16, 8, 8) == (8, 2)
    assert driver.divide(16, 8, 6) == (4, 4)


def test_a_taken_port_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(driver, "DEEPSPEED_PORT", taken.getsockname()[1])
        command = driver.launcher(2)
        assert Path(command[0]).name == "deepspeed"
        assert command[1:5] == ["--quiet", "--num_gpus", "2", "--master_port"]
        assert int(command[5]) != taken.getsockname()[1]
    assert driver.launcher(2)[1:] == ["--quiet", "--num_gpus", "2"]


def small_config(folder: Path) -> Config:
    """Return the quickstart's config with a corpus of `TEXTS` prepared in `folder`: the last five are held out."""
    section = TokenizerSection(model=str(folder / "t.model"), vocab_size=320, sample_bytes=10_000)
    train_tokenizer(iter(TEXTS), section, seed=1)
    tokenizer = SentencePieceTokenizer(section.model)
    shards = {}
    for split, texts in (("train", TEXTS[:-5]), ("val", TEXTS[-5:])):
        writer = ShardWriter(folder / "shards", split, "uint16", shard_bytes=1 << 20)
        for text in texts:
            writer.add(tokenizer.encode_document(text))
        shards[split] = writer.close()
    assert shards["train"] and shards["val"]
    Manifest(
        version=1,
        corpus="code",
        dtype="uint16",
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        train=(shards["train"],),
        val=(shards["val"],),
        text_bytes={},
        counts={},
        source_fingerprint="",
    ).save(folder / "shards")
    overrides = [f"run.dir={folder / 'run'}", f"tokenizer.model={section.model}", "tokenizer.vocab_size=320"]
    return load_config(
        ROOT / "configs/quickstart.yaml", [*overrides, f"data.sources.0.shards={folder / 'shards'}", "data.seq_len=64"]
    )


def test_the_summary_compares_over_the_same_bytes(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    expected = "".join(TEXTS[-5:]).encode()
    assert driver.held_out_text(config) == (expected, 5)
    lines = [{"step": 0, "event": "start"}, {"step": 1, "loss": 8.25}, {"step": 1, "eval/loss": 8.0}]
    metrics = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "loss": None}, {"step": 3, "loss": 6.5}])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(metrics, encoding="utf-8")
    held_out = {"step": 3, "loss": 6.75, "bits_per_byte": 2.5}
    text = driver.summary(config, held_out, tmp_path / "run/exports/x", {"prepare": 12.4, "train": 65.0}, 78.0)
    assert f"Held out: 5 documents, {len(expected):,} bytes." in text
    assert "  this model  2.500\n" in text
    assert f"  gzip -9     {8 * len(gzip.compress(expected, 9)) / len(expected):.3f}\n" in text
    assert f"  xz -9       {8 * len(lzma.compress(expected, preset=9)) / len(expected):.3f}\n" in text
    assert "Training loss 8.250 -> 6.500 nats per token, 2 steps of 1,024 tokens; held-out loss 6.750." in text
    assert "Time: prepare 12s, train 1m05s; together 1m18s." in text


def write_commands(folder: Path, **bodies: str) -> None:
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(body, encoding="utf-8")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the commands by scripts in a folder, and DeepSpeed's launcher by Python."""
    monkeypatch.setattr(driver, "_script", lambda name: str(tmp_path / f"{name}.py"))
    monkeypatch.setattr(driver, "launcher", lambda num_ranks: [sys.executable])
    return tmp_path


def test_a_stage_that_fails_ends_it(commands: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_commands(commands, prepare="import sys; print('the disk is full', file=sys.stderr); sys.exit(2)")
    with pytest.raises(
        LonghaulError, match="^quickstart: prepare ended with exit status 2; its message is above. Mend"
    ) as caught:
        driver.quickstart(ROOT / "configs/quickstart.yaml", [f"run.dir={commands / 'run'}"])
    assert caught.value.exit_status == 2
    captured = capfd.readouterr()
    assert captured.out.startswith("\n== 1/7 prepare: python ")
    assert captured.err == "the disk is full\n"


@pytest.mark.parametrize(
    ("status", "launcher_status", "message", "exit_status"),
    [
        (
            {"status": "stopped", "exit_status": 75},
            1,
            "^quickstart: stopped at train. Run it again: it goes on from here.",
            75,
        ),
        ({"status": "failed", "exit_status": 1}, 0, "^quickstart: train ended with exit status 1; ", 1),
        (None, 3, "^quickstart: train ended with exit status 3; ", 3),
    ],
)
def test_training_is_judged_by_its_status_file(
    commands: Path, status: dict[str, object] | None, launcher_status: int, message: str, exit_status: int
) -> None:
    run = commands / "run"
    run.mkdir()
    (run / "status.json").write_text('{"status": "done", "exit_status": 0}', encoding="utf-8")  # of an earlier run
    write = f"open({str(run / 'status.json')!r}, 'w').write({json.dumps(status)!r})" if status else ""
    write_commands(commands, prepare="", pretrain=f"{write}\nraise SystemExit({launcher_status})")
    with pytest.raises(LonghaulError, match=message) as caught:
        driver.quickstart(ROOT / "configs/quickstart.yaml", [f"run.dir={run}", "train.num_steps=50"])
    assert caught.value.exit_status == exit_status


def test_as_many_steps_as_fit(commands: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_commands(
        commands,
        prepare="",
        pretrain="""
import json, os, pathlib, sys
options = dict(word.split("=", 1) for word in sys.argv[2:])
run = pathlib.Path(options["run.dir"])
run.mkdir(parents=True)
with open(run / "metrics.jsonl", "w") as file:
    for step in range(int(options["train.num_steps"])):
        file.write(json.dumps({"step": step, "loss": 1.0, "step_seconds": 0.4 if step > 1 else 9.0}) + "\\n")
sys.exit(0 if run.name == "probe" else 5)
""",
    )
    with pytest.raises(LonghaulError, match="train ended with exit status 5"):
        driver.quickstart(ROOT / "configs/quickstart.yaml", [f"run.dir={commands / 'run'}"])
    shown = capfd.readouterr().out
    assert "a step takes 0.400 s here: 500 steps" in shown
    assert "train.num_steps=500" in shown.split("train:")[1]


def test_a_run_goes_on_as_it_began(commands: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_commands(commands, prepare="", pretrain="raise SystemExit(5)")
    begun = load_config(ROOT / "configs/quickstart.yaml", ["train.num_steps=333", "train.precision=bf16"])
    (commands / "run").mkdir()
    (commands / "run" / "config.yaml").write_text(resolved_yaml(begun), encoding="utf-8")
    with pytest.raises(LonghaulError, match="train ended"):
        driver.quickstart(ROOT / "configs/quickstart.yaml", [f"run.dir={commands / 'run'}"])
    shown = capfd.readouterr().out
    assert "measure" not in shown and "train.precision=bf16 train.num_steps=333" in shown
