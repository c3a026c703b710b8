"""What `launch/slurm/pretrain.sbatch` decides, with stand-ins for SLURM's commands: runs everywhere, in a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cluster.slurm_script import ScriptSettings, fill_in
from tests.helpers.rank_helpers import ROOT
from tests.slurm.cluster import why_not

SCRIPT = ROOT / "launch/slurm/pretrain.sbatch"
# Runs checks for real; "trains" by writing the next checkpoint of $STEP, if that is set, and leaving with the next status
# of $STATUS; of both the last one stays. With $NODE_LOST a node does not answer after that.
SRUN = """\
#!/bin/bash
echo "srun $*" >>"$FOLDER/calls"
while [ "${1#--}" != "$1" ]; do [ "$1" = --label ] && trains=1; shift; done
[ "$NODE_LOST$1" = 1true ] && exit 1
[ -z "$trains" ] && exec "$@"
number=$(grep -c -e --label "$FOLDER/calls")
nth() { local last=$#; [ "$number" -lt "$last" ] && last=$number; echo "${!last}"; }
[ -n "$STEP" ] && mkdir -p "$FOLDER/run/checkpoints/step-$(nth $STEP)"
[ -n "$SIGNAL_SENT" ] && kill "-$SIGNAL_SENT" "$PPID"
exit "$(nth $STATUS)"
"""
SCONTROL = '#!/bin/bash\necho "${0##*/} $*" >>"$FOLDER/calls"\neval "$SCONTROL_SIGNALS"\nexit "${SCONTROL_STATUS:-0}"\n'
CONFIG = """\
model: {dim: 32, num_layers: 1, num_heads: 2}
tokenizer: {model: tokenizer.model, vocab_size: 512}
data: {sources: [{name: text, shards: shards}], seq_len: 32}
optim: {lr: 1e-3}
train: {num_steps: 10, global_batch_size: 8, micro_batch_size: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with stand-ins for srun, scontrol and scancel, and a config."""
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCONTROL)):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return tmp_path


def run(folder: Path, *arguments: str, cwd: Path = ROOT, script: Path = SCRIPT, **variables: str) -> tuple[int, str]:
    """Run the script as a job would; return its status and what it said."""
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}", "FOLDER": str(folder), "PYTHON": sys.executable, "STATUS": "0",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }  # fmt: skip
    done = subprocess.run(["bash", script, *arguments], cwd=cwd, env=environment | variables, capture_output=True,
                          text=True, timeout=60)  # fmt: skip
    return done.returncode, done.stderr


def train(folder: Path, **variables: str) -> tuple[int, str]:
    return run(folder, str(folder / "mine.yaml"), f"run.dir={folder}/run", **variables)


def calls(folder: Path) -> str:
    return (folder / "calls").read_text()


def test_a_run_that_is_done_ends(folder: Path) -> None:
    status, said = train(folder, STEP="00000010", SLURM_CPUS_PER_TASK="6")
    assert status == 0 and "restart 0: 16 tasks on n[1-2]" in said and said.endswith("done\n")
    assert "requeue" not in calls(folder)
    assert calls(folder).count("--ntasks-per-node=1 --nodes=2 --ntasks=2 bash -c") == 2
    assert f"--wait=60 --cpus-per-task=6 {sys.executable} launch/pretrain.py {folder}/mine.yaml run.dir=" in calls(
        folder
    )
    assert not list((folder / "run").glob(".seen*"))


@pytest.mark.parametrize(
    "variables",
    [
        {"STATUS": "75"},
        {"STATUS": "69", "NODE_LOST": "1"},
        {"STATUS": "75", "SCONTROL_SIGNALS": "kill -TERM $PPID; kill -TERM $$"},
        {"STATUS": "75", "SCONTROL_SIGNALS": "kill -KILL $$"},
    ],
    ids=str,
)
def test_a_run_that_was_stopped_or_lost_a_node_is_requeued(folder: Path, variables: dict[str, str]) -> None:
    for number, step in enumerate(("00000003", "00000005", "00000006", "00000009"), 1):
        (folder / "calls").write_text("")
        code, said = train(folder, STEP=step, **variables)
        assert code == int(variables["STATUS"])
        assert f"status {code}; requeued, to go on after step {int(step)}" in said
        assert calls(folder).count("--label") == calls(folder).count("scontrol requeue 7") == 1
        assert len((folder / "run" / "attempts.txt").read_text().splitlines()) == number


def test_a_lost_rank_is_healed_in_the_same_allocation(folder: Path) -> None:
    code, said = train(folder, STATUS="69 137 139 69 0", STEP="00000003 00000003 00000005 00000007 00000010")
    assert code == 0 and "requeue" not in calls(folder) and said.endswith("done\n")
    tries = [line.partition(": ")[2] for line in said.splitlines() if "trying again" in line]
    assert tries == [f"status {status}; all nodes answer: trying again, to go on after step {step}"
                     for status, step in ((69, 3), (137, 3), (139, 5), (69, 7))]  # fmt: skip
    assert calls(folder).count("srun --ntasks-per-node=1 --nodes=2 --ntasks=2 true") == 4


def test_a_crash_loop_ends(folder: Path) -> None:
    code, said = train(folder, STATUS="69", STEP="00000003")
    assert code == 69 and calls(folder).count("--label") == 3 and "requeue" not in calls(folder)
    assert "not tried again: status 69, and three attempts in a row ended at step 3" in said


def test_tries_here_and_requeued_ones_count_together(folder: Path) -> None:
    assert train(folder, STATUS="75", STEP="00000003")[0] == 75
    code, said = train(folder, STATUS="137", STEP="00000003")
    assert code == 137 and calls(folder).count("--label") == 3
    assert "three attempts in a row ended at step 3" in said


@pytest.mark.parametrize("status", ["1", "2"])
def test_a_failed_run_is_not_requeued(folder: Path, status: str) -> None:
    code, said = train(folder, STATUS=status, STEP="00000003")
    assert code == int(status) and "requeue" not in calls(folder)
    assert (
        f"failed with status {status}; the newest checkpoint is of step 3. See above and {folder}/run/log.txt" in said
    )


def test_a_run_without_progress_is_not_requeued_for_ever(folder: Path) -> None:
    assert train(folder, STATUS="75", STEP="00000003")[0] == 75
    for _ in range(2):  # a second and a third try
        said = train(folder, STATUS="75")[1]
    assert "not tried again: status 75, and three attempts in a row ended at step 3" in said
    assert "requeued, to go on" in train(folder, STATUS="75", STEP="00000004")[1]  # it got on after all
    assert "requeued, to go on" in train(folder, STATUS="75", SLURM_JOB_ID="8")[1]  # submitted anew


def test_progress_of_checkpoints_that_lie_elsewhere(folder: Path) -> None:
    (folder / "run").mkdir()
    for saved in ("null", "3"):
        (folder / "run/status.json").write_text(f'{{\n "step": 9,\n "saved_step": {saved},\n "reason": ""\n}}')
        assert f"requeued, to go on after step {saved.replace('null', '0')}" in train(folder, STATUS="75")[1]


def test_what_slurm_ends_slurm_requeues(folder: Path) -> None:
    code, said = train(folder, STATUS="75", STEP="00000003", SIGNAL_SENT="TERM")
    assert code == 75 and "requeue" not in calls(folder)
    assert "SLURM ends this job; if it starts it again, training goes on after step 3" in said


@pytest.mark.parametrize("status", ["75", "138"])  # 138: before Python could take the signal
def test_a_run_that_was_told_to_stop_is_not_brought_back(folder: Path, status: str) -> None:
    code, said = train(folder, STATUS=status, STEP="00000003", SIGNAL_SENT="USR1")
    assert code == int(status) and "requeue" not in calls(folder) and calls(folder).count("--label") == 1
    assert "stopped after step 3 as it was told, and not requeued. Submit the same command again to go on" in said


CHAIN = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "3"}


def test_a_chain_goes_on_with_its_next_job(folder: Path) -> None:
    code, said = train(folder, STATUS="75", STEP="00000003", **CHAIN)
    assert code == 75 and "status 75; the next job of array 5 goes on after step 3" in said
    assert "requeue" not in calls(folder) and "scancel" not in calls(folder)
    code, said = train(folder, STATUS="75", STEP="00000004", **CHAIN | {"SLURM_ARRAY_TASK_ID": "3"})
    assert code == 75 and "status 75 at step 4; this was the last job of array 5. Submit the same command" in said


@pytest.mark.parametrize(
    ("status", "signal"), [("0", ""), ("1", ""), ("75", "USR1"), ("69", "")], ids=["done", "failed", "told", "loop"]
)
def test_a_chain_ends_where_its_next_job_has_nothing_to_do(folder: Path, status: str, signal: str) -> None:
    code, _ = train(folder, STATUS=status, STEP="00000003", SIGNAL_SENT=signal, **CHAIN)
    assert code == int(status) and calls(folder).splitlines()[-1] == "scancel --state=PENDING 5"
    assert run(folder, "absent.yaml", **CHAIN)[0] == 2 and calls(folder).count("scancel --state=PENDING 5") == 2


def test_jobs_of_a_chain_count_their_attempts_together(folder: Path) -> None:
    for number, job in enumerate(("5", "6", "7"), 1):
        said = train(folder, STATUS="75", STEP="00000003", **CHAIN | {"SLURM_JOB_ID": job})[1]
        assert ("three attempts in a row ended at step 3" in said) == (number == 3)


def test_the_script_that_is_submitted_needs_no_arguments(folder: Path) -> None:
    settings = ScriptSettings(
        options={"nodes": "2"}, arguments=[str(folder / "mine.yaml"), f"run.dir={folder}/run of it"],
        python=sys.executable, command=["submit"], path=folder / "submit.sbatch", folder=folder,
        variables={"NCCL_DEBUG": "INFO"},
    )  # fmt: skip
    settings.path.write_text(fill_in(SCRIPT.read_text(), settings))
    code, said = run(folder, cwd=folder, script=settings.path, STEP="00000010")
    assert code == 0 and said.endswith("done\n"), said
    command = f"{sys.executable} {ROOT}/launch/pretrain.py {folder}/mine.yaml run.dir={folder}/run of it"
    assert command in calls(folder)


def test_a_cluster_that_does_not_requeue(folder: Path) -> None:
    code, said = train(folder, STATUS="75", STEP="00000003", SCONTROL_STATUS="1")
    assert (
        code == 75
        and "status 75 at step 3; SLURM does not requeue this job. Submit the same command again to go on" in said
    )


@pytest.mark.parametrize(
    ("arguments", "variables", "error"),
    [
        ([], {}, "CONFIG is missing. Submit with: sbatch launch/slurm/pretrain.sbatch CONFIG [key=value ...]"),
        (["absent.yaml"], {}, f"CONFIG is absent.yaml; expected a file in {ROOT}, or a whole path."),
        (["{config}"], {"SLURM_JOB_ID": ""}, "this is not a SLURM job. Submit it: sbatch launch/slurm/pretrain.sbatch"),
        (["{config}"], {"PYTHON": "/absent/python"}, f"/absent/python is not here. Run make setup in {ROOT}, or name a"),
        (["{config}"], {"SLURM_GPUS_ON_NODE": "4"}, "has 4 GPUs and 8 tasks; expected one task a GPU. Submit with "
         "--gpus-per-node=4 --ntasks-per-node=4."),
        (["{config}"], {"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1,2"}, "has 8 GPUs and 1 tasks;"),
        (["{config}", "optim.lr=2"], {}, "optim.lr is 2; expected"),
        (["{config}", "run.dir=/proc/absent"], {}, "/proc/absent cannot be made. Use another run.dir."),
    ],
)  # fmt: skip
def test_what_is_commonly_wrong_is_said_before_training(folder: Path, arguments, variables, error) -> None:
    code, said = run(folder, *(text.format(config=folder / "mine.yaml") for text in arguments), **variables)
    assert code == 2 and error in said, said
    assert not (folder / "calls").exists() or "--label" not in calls(folder)


def test_another_folder_than_the_repository(folder: Path) -> None:
    code, said = run(folder, "mine.yaml", cwd=folder)
    assert (
        code == 2 and f"{folder} has no launch/pretrain.py; expected the repository. Submit from there, or add" in said
    )


def test_a_run_folder_that_not_all_nodes_see(folder: Path) -> None:
    hiding = SRUN.replace('exec "$@"', 'for sign in "$FOLDER"/run/.seen*; do rm -f "$sign"; done; exec "$@"')
    (folder / "srun").write_text(hiding.replace("#!/bin/bash", "#!/bin/bash\nsleep() { :; }; export -f sleep"))
    code, said = train(folder)
    assert code == 2 and "which another node wrote; expected run.dir on a file system that all nodes share." in said


def test_a_machine_without_slurm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.cluster.shutil.which", lambda name, path: None if name == "slurmd" else name)
    assert why_not() == "slurmd not found: install slurm-wlm munge"
    monkeypatch.setattr("tests.slurm.cluster.shutil.which", lambda name, path: name)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert why_not() == "slurmd runs jobs as root only: run the tests as root"
