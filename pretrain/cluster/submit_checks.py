"""What is commonly wrong with a run that is to be submitted: looked for before it waits in a queue for a day."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.checkpoints.checkpoint_owner import OWNER
from pretrain.cluster.run_state import LIVE, RunState, read_json, read_state
from pretrain.cluster.slurm import NodeGroup, parse_time
from pretrain.console import format_duration
from pretrain.data.data_plan import open_plan
from pretrain.errors import ConfigError
from pretrain.options.batch_plan import num_steps_of
from pretrain.options.config import Config
from pretrain.options.config_changes import check_same_run
from pretrain.options.settings import load_config
from pretrain.redaction import redact
from pretrain.storage.stores import is_remote
from pretrain.tokenizers.tokenizer_files import open_tokenizer

_CPUS_PER_TASK = 8  # where the cluster cannot be asked
_ONLY_THERE = "If only the nodes have it, submit by sbatch the script that --dry-run prints."
_OWN_FLAGS = {  # by the names of sbatch
    **{name: f"--{name}" for name in (
        "nodes", "gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos", "constraint", "job-name")},
    "ntasks-per-node": "--tasks-per-node", "signal": "--grace", "array": "--chain", "N": "--nodes",
    "c": "--cpus-per-task", "t": "--time", "p": "--partition", "A": "--account", "q": "--qos", "C": "--constraint",
    "J": "--job-name", "a": "--chain",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is asked of SLURM; empty texts leave it to the cluster.

    Attributes:
        nodes, tasks_per_node: whose product is the number of ranks.
        gpus_per_node: 0 for ranks on CPUs.
        cpus_per_task: None: this rank's part of a node.
        time: limit of a job.
        partition, account, qos, constraint: as sbatch takes them.
        job_name: None: the run folder's.
        grace_seconds: before the limit, when training saves.
        num_links: jobs of a chain; 1: one job that is requeued.
        container: image; empty for none.
        python: on the nodes; None: this one.
        variables: of the job's environment.
        extra_options: of sbatch.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int | None = None
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    job_name: str | None = None
    grace_seconds: int = 600
    num_links: int = 1
    container: str = ""
    python: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    extra_options: Sequence[str] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.tasks_per_node


def check_time(request: Request) -> None:
    """Check that a job's time and what it keeps of it for saving make sense.

    Raises:
        ConfigError: they do not.
    """
    try:
        limit = parse_time(request.time)
    except ValueError:
        raise ConfigError(
            f"--time is {request.time}; expected minutes, hours:minutes:seconds or days-hours, as sbatch takes it. "
            "Use for example 24:00:00."
        ) from None
    grace = request.grace_seconds
    if limit is not None and limit <= grace + 60:  # SLURM may send the signal a minute early
        raise ConfigError(
            f"--time is {request.time} ({format_duration(limit)}), and --grace {grace} ({format_duration(grace)}); "
            "expected a limit longer than the grace by more than a minute, or training would be told to stop as it "
            "starts. Raise --time or lower --grace."
        )


def check_extra_options(request: Request) -> None:
    """Check that what is passed on to sbatch is not what is checked here: it would win over that.

    Raises:
        ConfigError: it is.
    """
    for option in request.extra_options:
        given = re.match(r"--([a-z-]+)|-([A-Za-z])", option)
        own = _OWN_FLAGS.get(given[1] or given[2]) if given else None
        if own:
            raise ConfigError(
                f"-- {option}: expected what this command has no option for. Write {own} before the --, where it is "
                "checked."
            )


def check_files(request: Request) -> None:
    """Check that image and Python are there, if their folder is on this machine too; the job looks on its nodes.

    Raises:
        ConfigError: they are not.
    """
    image = request.container
    is_file = image.endswith((".sif", ".sqsh")) or image.startswith((".", "/"))
    if is_file and "://" not in image and _is_missing(image):
        raise ConfigError(f"--container is {image}, which does not exist; expected an image. {_ONLY_THERE}")
    if request.python and "/" in request.python and not image and _is_missing(request.python):
        raise ConfigError(f"--python is {request.python}, which does not exist; expected a Python. {_ONLY_THERE}")


def _is_missing(path: str) -> bool:
    return Path(path).parent.is_dir() and not Path(path).is_file()


def check_run(config: Config) -> None:
    """Check that the run folder can be submitted: not of a run that goes on, is done or belongs to another config.

    Raises:
        ConfigError: it cannot.
    """
    run = Path(config.run.dir)
    check_owner(config.checkpoint.dir, run)
    try:
        state = read_state(run)
    except ConfigError:  # a new one
        return
    if state.state in LIVE or (state.job and state.job.is_batch and not state.job.has_ended):
        who = f"job {state.job.job_id}" if state.job else f"a process on {state.host}"
        raise ConfigError(
            f"run.dir is {run}, whose run is {state.state} ({who}); expected one that nothing trains in. See "
            f"`python launch/submit.py --status {run}`; end it by --cancel, or use another run.dir."
        )
    if state.state == "done" and state.step >= num_steps_of(config):
        raise ConfigError(
            f"run.dir is {run}, whose run is done: {state.reason}; expected steps that are left. Raise "
            "train.num_steps, or use another run.dir."
        )
    saved = run / "config.yaml"
    if saved.exists() and has_checkpoint(run, state) and not config.resume.from_scratch:
        check_same_run(run, load_config(saved), config)


def check_owner(place: str, run: Path) -> None:
    """Check that a folder of checkpoints outside the run folder is not another run's; a store's is left to the job.

    Raises:
        ConfigError: it is.
    """
    owner = read_json(Path(place) / OWNER) if place and not is_remote(place) else {}
    if owner and owner.get("run") != read_json(run / "environment.json").get("run_id"):
        raise ConfigError(
            f"checkpoint.dir is {place}; expected a place of this run alone: its {OWNER} names the run in "
            f"{owner.get('run_dir')} on {owner.get('host')}. Use another checkpoint.dir."
        )


def has_checkpoint(run: Path, state: RunState) -> bool:
    """Whether the run has saved: in its folder, or elsewhere, as status.json says."""
    return state.saved_step is not None or any((run / "checkpoints").glob("step-*"))


def check_data(config: Config) -> None:
    """Check that tokenizer, shards and row tables are there and fit each other, as a start would.

    Shards in stores are left to the job: they would be downloaded.

    Raises:
        LonghaulError: they do not.
    """
    if any(is_remote(source.shards) for source in config.data.sources):
        return
    fingerprint = open_tokenizer(config.tokenizer).fingerprint
    _, corpora = open_plan(config, fingerprint, is_new=not any(Path(config.run.dir, "checkpoints").glob("step-*")))
    for corpus in corpora:
        corpus.close()


def check_cluster(request: Request, groups: Sequence[NodeGroup]) -> None:
    """Check that some partition can run this: SLURM itself would let such a job wait for ever.

    Args:
        request: what is asked.
        groups: what there is; nothing is checked if that is not known.
    Raises:
        ConfigError: none can.
    """
    if not groups:
        return
    names = request.partition.split(",") if request.partition else [one.partition for one in groups if one.is_default]
    known = list(dict.fromkeys(group.partition for group in groups))
    if not names or not set(names) & set(known):
        raise ConfigError(
            f"--partition is {request.partition or 'not given, and there is no default'}; expected one of "
            f"{', '.join(known)}. Name one."
        )
    problems = [_misfit(request, name, [one for one in groups if one.partition == name]) for name in names]
    if all(problems):
        raise ConfigError("\n".join(dict.fromkeys(filter(None, problems))))


def _misfit(request: Request, name: str, groups: Sequence[NodeGroup]) -> str:
    """Say why a partition cannot run this; empty if it can."""
    if not groups:
        return f"--partition is {name}; expected one of this cluster's."
    limits = [group.limit_seconds for group in groups]
    seconds = parse_time(request.time)
    longest = max((limit for limit in limits if limit is not None), default=None)
    if None not in limits and (seconds is None or longest is None or seconds > longest):
        return (
            f"--time is {request.time}; expected at most the limit of partition {name}, "
            f"{_sbatch_time(longest or 0)}. Lower it: a job that has not finished by then is requeued and goes on."
        )
    most = groups[0].max_nodes
    if most is not None and request.nodes > most:
        return f"--nodes is {request.nodes}; expected at most {most}, as partition {name} allows a job. Lower it."
    enough = [group for group in groups if group.gpus >= request.gpus_per_node]
    num_enough, most_gpus = sum(group.num_nodes for group in enough), max(group.gpus for group in groups)
    if num_enough < request.nodes:
        has = ", ".join(f"{group.num_nodes} with {group.gpus} GPUs" for group in groups)
        on_cpus = "Use --gpus-per-node=0 and --tasks-per-node for CPUs"
        fix = f"Lower --gpus-per-node to {most_gpus}" if most_gpus else on_cpus
        fix = f"Lower --nodes to {num_enough}" if num_enough else fix
        return (
            f"--nodes is {request.nodes} and --gpus-per-node {request.gpus_per_node}; expected nodes that partition "
            f"{name} has ({has}). {fix}, or use another --partition."
        )
    cpus = request.tasks_per_node * (request.cpus_per_task or 1)
    if sum(group.num_nodes for group in enough if group.cpus >= cpus) < request.nodes:
        return (
            f"--tasks-per-node x --cpus-per-task is {request.tasks_per_node} x {request.cpus_per_task or 1}; expected "
            f"at most {max(group.cpus for group in enough)}, the CPUs of a node of partition {name}. Lower one of them."
        )
    return ""


def _sbatch_time(seconds: float) -> str:
    """Write a time as sbatch takes it."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def choose_cpus(request: Request, groups: Sequence[NodeGroup]) -> int:
    """Return the CPUs of a task: those asked for, or of the smallest node that fits, in proportion to its GPUs."""
    if request.cpus_per_task:
        return request.cpus_per_task
    names = request.partition.split(",") if request.partition else [one.partition for one in groups if one.is_default]
    fitting = [group for group in groups if group.partition in names and group.gpus >= request.gpus_per_node]
    shares = [group.cpus * (request.gpus_per_node / group.gpus if request.gpus_per_node else 1) for group in fitting]
    return max(1, int(min(shares) / request.tasks_per_node)) if shares else _CPUS_PER_TASK


def refuse_secrets(texts: Sequence[str]) -> None:
    """Refuse what should not be in a file that others can read.

    Raises:
        ConfigError: a text holds a password, a token or a key.
    """
    for text in texts:
        if redact(text) != text:
            raise ConfigError(
                f"command line: {redact(text)} holds something secret; expected none, because the script is a file "
                "that others may read. Export it as a variable before submitting: sbatch passes the environment on."
            )
