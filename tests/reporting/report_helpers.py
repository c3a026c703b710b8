"""Run folders as training leaves them, made up."""

from __future__ import annotations

import json
import math

CORPORA = ("web", "code", "books", "math", "wiki")
PHASES = {"data": 0.01, "forward": 0.3, "backward": 0.5, "optimizer": 0.1, "communication": 0.05, "others": 0.02}
BEGAN = 1_700_000_000.0


def loss_of(step):
    return 2.0 + 5.0 * math.exp(-step / 30)


def training_line(step, **changes):
    """One step: 1,000 tokens and a second; the second start begins with step 31, the third with 61."""
    line = {
        "step": step, "tokens": 1000 * step, "loss": loss_of(step), "grad_norm": 1.0 + 0.01 * step, "lr": 1e-3 / step,
        "tokens_per_second": 1000.0, "tokens_per_second_per_gpu": 250.0, "step_seconds": 1.0, "mfu": 0.4, "mfu_causal": 0.35,
        "memory_bytes": 2**30, "data_wait_seconds": 0.01, "skipped_steps": 0, "clipped_steps": step // 10,
        "damaged_documents": 0, "damaged_tokens": 0, "timestamp": BEGAN + step + 100 * (step > 30),
        "attempt": 1 + (step > 30) + (step > 60), "objective": loss_of(step) + 0.1,
    }  # fmt: skip
    for number, name in enumerate(CORPORA):
        line |= {f"tokens/{name}": step * (400, 300, 150, 100, 50)[number], f"epoch/{name}": step * (number + 1) / 100}
    line |= {f"seconds/{name}": seconds for name, seconds in PHASES.items()}
    line |= {f"layer/{layer}/grad_norm": layer + step / 100 for layer in range(12)} if step % 10 == 0 else {}
    return line | changes


def evaluation_line(step):
    loss = loss_of(step) + 0.2
    line = {
        "step": step,
        "tokens": 1000 * step,
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss),
        "eval/bits_per_byte": loss / 3,
    }
    for number, name in enumerate(CORPORA):
        line |= {f"eval/{name}/loss": loss + number / 10, f"eval/{name}/bits_per_byte": loss / 3 + number / 30}
    return line


def lines_of(num_steps=90, **changes):
    """Every kind of line; `changes` maps numbers of steps, as `step_7`, to what else is in their lines."""
    lines = [{"step": 0, "event": "start", "message": "starting: 4 ranks on cuda, 90 steps"}] if num_steps else []
    for step in range(1, num_steps + 1):
        if step in (31, 61):
            lines.append({"step": step - 1, "event": "start", "message": f"going on after step {step - 1}"})
        lines.append(training_line(step, **changes.get(f"step_{step}", {})))
        if step in (1, 31, 61):
            lines.append({"step": step, "event": "first_step", "message": "6.0 s", "seconds": {"imports": 4.0, "first step": 2.0 + step}, "cpu_seconds": {"imports": 3.0}})  # fmt: skip
        if step % 30 == 0:
            lines.append(evaluation_line(step))
            lines.append(
                {"step": step, "tokens": 1000 * step, "eval/task/arc/acc": step / 100, "eval/task/arc/acc_stderr": 0.01}
            )
    return lines


def write_run(folder, lines=None, **options):
    """Write a run folder; `options` replace values of its config."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in (lines_of() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(config_text(folder, **options), encoding="utf-8")
    versions = {"longhaul": "0.1.0", "torch": "2.13.0"}
    starts = [
        {"command": ["launch/pretrain.py", f"c{number}.yaml"], "versions": versions | ({"torch": "2.14.0"} if number == 2 else {}), "host": f"node{number}",
         "git_commit": "abc1234", "device": "H100", "cpu_cores": 8, "world_size": (4, 4, 8)[number], "slurm_job": None,
         "timestamp": BEGAN - 5 + 130 * number}
        for number in range(3)
    ]  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"run_id": "1", "starts": starts}), encoding="utf-8")
    status = {"status": "done", "exit_status": 0, "step": 90, "saved_step": 90, "reason": "trained 90 steps", "pid": 1, "host": "node0", "timestamp": BEGAN + 200}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    (folder / "log.txt").write_text("2026-11-26 INFO step 90/90\n", encoding="utf-8")
    (folder / "checkpoints/step-00000060").mkdir(parents=True)
    (folder / "checkpoints/step-00000090").mkdir()
    (folder / "samples").mkdir()
    for step in (30, 90):
        page = f"step {step}, 1 tokens trained on; temperature 1\n\n" + "\n\n".join(
            f"--- prompt {prompt!r}, ended by length ---\n{prompt} text of\n\nstep {step}"
            for prompt in ("def ", "it's <b>\n")
        )
        (folder / f"samples/step-{step:08d}.txt").write_text(page + "\n", encoding="utf-8")
    (folder / "evaluations").mkdir()
    kept = {"step": 90, "entries": [{"name": "held-out", "settings": {}, "result": {"loss": 2.5, "sources": {"web": {"loss": 2.25}}}, "rows": [[1, 2, 3]]}]}  # fmt: skip
    (folder / "evaluations/step-00000090.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def config_text(folder, lr=1e-3, num_steps=90, web_weight=0.4):
    sources = "".join(
        f"    - {{name: {name}, shards: data/{name}, weight: {web_weight if name == 'web' else 0.1}}}\n"
        for name in CORPORA
    )
    return (
        f"run: {{dir: {json.dumps(str(folder))}}}\ntokenizer: {{model: data/t.model, vocab_size: 512}}\ndata:\n  sources:\n{sources}  seq_len: 100\n"
        "model: {family: llama, dim: 64, num_layers: 2, num_heads: 2}\n"
        f"optim: {{lr: {lr}}}\nschedule: {{warmup_steps: 0}}\ntrain: {{num_steps: {num_steps}, global_batch_size: 10, micro_batch_size: 10}}\n"
    )
