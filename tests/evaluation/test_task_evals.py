"""Tasks done during training: at any stage the same scores, and a run that does not notice."""

from __future__ import annotations

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.evaluation.task_files import TASKS, documents, write_tasks
from tests.helpers.rank_helpers import losses, metric_lines, newest, run_cases, run_command, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.launches, pytest.mark.timeout(600)]

# Large enough that ZeRO-3 divides its matrices: DeepSpeed keeps parameters below 100,000 elements whole.
COMMON = ["model={family: llama, dim: 256, num_layers: 2, num_heads: 4, num_kv_heads: 2, tie_embeddings: true, "
          "dropout: 0.1, attention_dropout: 0.1}", "train={num_steps: 4, global_batch_size: 4, micro_batch_size: 1, "
          "precision: fp32}", "checkpoint.every_steps=2"]  # fmt: skip
DIVIDED = {"zero": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}}
EVERY = "every_steps: 2, max_rows: 4"


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """Run everything on two ranks in one start; return (outcomes by name, folder)."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline(folder).items():
            patch.setenv(name, value)
        tasks = write_tasks(folder / "tasks", documents(9))
        own = ", ".join(f"{tasks}/{name}.yaml: {{}}" for name in TASKS if name != "letters")
        broken = tasks / "broken.yaml"
        broken.write_text(
            (tasks / "choices.yaml").read_text().replace("task: choices", "task: broken")
            + "process_results: !function broken.fail\n"
        )
        (tasks / "broken.py").write_text("def fail(doc, results):\n    raise KeyError('a mistake')\n")
        doing = f"eval={{{EVERY}, tasks: {{{own}, {tasks}/letters.yaml: {{every_steps: 4, limit: 5}}}}}}"
        plain = f"eval={{{EVERY}}}"
        cases = {
            "z1": {"overrides": [doing, "log.tensorboard=true"]}, "z1-without": {"overrides": [plain]},
            "z3": {"overrides": [doing, "parallel.zero_stage=3"], **DIVIDED},
            "z3-without": {"overrides": [plain, "parallel.zero_stage=3"], **DIVIDED},
            "broken": {"overrides": [f"eval={{{EVERY}, tasks: {{{broken}: {{}}}}}}"]},
            "unknown": {"overrides": ["eval={tasks: {" + str(tasks / "missing.yaml") + ": {every_steps: 2}}}"]},
        }  # fmt: skip
        listed = [
            case | {"overrides": [f"run.dir={folder}/{name}", *COMMON, *case["overrides"]]}
            for name, case in cases.items()
        ]
        outcomes = run_cases(tiny_config, listed, 2, folder / "ranks")
    return dict(zip(cases, outcomes, strict=True)), folder


def offline(folder):
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}


def scores(run):
    return [
        {key: value for key, value in line.items() if key == "step" or key.startswith("eval/task/")}
        for line in metric_lines(run) if any(key.startswith("eval/task/") for key in line)
    ]  # fmt: skip


def test_tasks_change_no_bit_of_a_run(runs):
    outcomes, folder = runs
    for name in ("z1", "z3"):
        ours, without = folder / name, folder / f"{name}-without"
        assert outcomes[name] == outcomes[f"{name}-without"] == "done"
        assert losses(ours) == losses(without) and len(losses(ours)) == 4
        judged = [[line["eval/loss"] for line in metric_lines(run) if "eval/loss" in line] for run in (ours, without)]
        assert judged[0] == judged[1] and len(judged[0]) == 2
        one, other = newest(ours), newest(without)
        for parameter in one.shapes:
            assert (one.read_whole(parameter) == other.read_whole(parameter)).all(), (name, parameter)
        assert scores(without) == []


def test_scores_are_recorded_when_due_and_are_the_same_at_every_stage(runs):
    folder = runs[1]
    found = scores(folder / "z1")
    assert [line["step"] for line in found] == [2, 4]
    assert not any("letters" in key for key in found[0])
    metrics = {"choices/acc", "choices/acc_norm", "letters/acc", "rolling/byte_perplexity", "rolling/bits_per_byte",
               "lambada_like/acc", "lambada_like/perplexity", "answers/exact_match"}  # fmt: skip
    assert {key.removeprefix("eval/task/") for key in found[1] if "_stderr" not in key} == metrics | {"step"}
    for ours, other in zip(found, scores(folder / "z3"), strict=True):
        assert ours == pytest.approx(other, rel=1e-4)
    assert found[0]["eval/task/rolling/bits_per_byte"] > found[1]["eval/task/rolling/bits_per_byte"]  # it learns
    events = EventAccumulator(str(folder / "z1" / "tensorboard")).Reload()
    shown = events.Scalars("eval/task/rolling/bits_per_byte")
    assert [event.step for event in shown] == [2, 4]
    assert shown[1].value == pytest.approx(found[1]["eval/task/rolling/bits_per_byte"])
    assert re.search(r"step 4  tasks\ntask +shots +samples +metric +value", (folder / "z1" / "log.txt").read_text())


def test_a_mistake_in_a_task_is_an_event_and_a_missing_one_is_found_before_the_start(runs):
    outcomes, folder = runs
    assert outcomes["broken"] == "done" and losses(folder / "broken") == losses(folder / "z1-without")
    failed = [line for line in metric_lines(folder / "broken") if line.get("event") == "tasks_failed"]
    assert [line["step"] for line in failed] == [2, 4] and "KeyError: 'a mistake'" in failed[0]["message"]
    assert re.match(
        r"ConfigError: eval.tasks: .*missing.yaml does not exist; expected a task file\.", outcomes["unknown"]
    )
    assert not (folder / "unknown" / "metrics.jsonl").exists()


def test_two_ranks_give_the_numbers_of_one_and_of_training(runs):
    folder = runs[1]
    run, command = folder / "z3", ["--include-path", str(folder / "tasks"), "--max-rows", "4", "--json"]
    command += ["--tasks", ",".join(name for name in TASKS if name != "letters")]
    alone = run_command("launch/evaluate.py", run, "--again", *command, **offline(folder))
    assert alone.returncode == 0, alone.stderr
    one = json.loads(alone.stdout)
    (run / "evaluations/step-00000004.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline(folder).items():
            patch.setenv(name, value)
        processes = start_ranks("launch/evaluate.py", [str(run), *command], 2, folder / "judge")
    assert [process.wait(300) for process in processes] == [0, 0], (folder / "judge-1").read_text()
    assert (folder / "judge-1").read_text() == ""
    assert json.loads((folder / "judge-0").read_text()) == one  # to the last bit
    during = scores(run)[-1]
    for task, result in one["tasks"].items():
        for metric, number in result["metrics"].items():
            assert number["value"] == pytest.approx(during[f"eval/task/{task}/{metric}"], rel=1e-4)
