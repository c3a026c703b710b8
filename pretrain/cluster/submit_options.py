"""The command line of `launch/submit.py`: submit a run, say how it stands, or stop it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pretrain.command_line import CommandLine, count, whole
from pretrain.console import counted, format_duration, warn
from pretrain.options.config_arguments import add_config

EXAMPLES = """examples:
  python launch/submit.py configs/llama-1.3b.yaml --nodes 4 --gpus-per-node 8
  python launch/submit.py mine.yaml optim.lr=2e-4 --nodes 2 --gpus-per-node 8 --partition gpu --time 12:00:00 --dry-run
  python launch/submit.py mine.yaml --nodes 2 --gpus-per-node 8 --chain 7 -- --exclusive --mail-type=END
  python launch/submit.py mine.yaml --nodes 2 --gpus-per-node 0 --tasks-per-node 4        (ranks on CPUs)
  python launch/submit.py --status runs/mine
  python launch/submit.py --cancel runs/mine

exit status: 0 done, 1 failed (data, checkpoints), 2 wrong use or config, SLURM refuses the job, 130 stopped by a
signal: nothing was submitted, or it says which job was. docs/slurm.md explains the script that is written."""


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the arguments; ends the process with status 2 and a message where they do not fit each other."""
    given = list(sys.argv[1:] if argv is None else argv)
    given, extra = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = CommandLine(
        "submit", description, EXAMPLES,
        usage="%(prog)s CONFIG [key=value ...] --nodes N --gpus-per-node N [options] [-- options of sbatch]\n"
              "       %(prog)s --status RUN | --cancel RUN",
    )  # fmt: skip
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--status", metavar="RUN", help="say how the run in a folder stands, with SLURM or without")
    mode.add_argument("--cancel", metavar="RUN", help="have a run save and stop for good; submitted again, it goes on")
    mode.add_argument(
        "--dry-run", action="store_true", help="check, print script and command, submit and write nothing"
    )
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    add("--nodes", metavar="N", type=count, help="machines")
    add("--gpus-per-node", metavar="N", type=whole, choices=range(0, 1025), help="one rank each; 0: ranks on CPUs")
    add("--tasks-per-node", metavar="N", type=count, help="ranks of a node; only with --gpus-per-node 0")
    add("--cpus-per-task", metavar="N", type=count, help="by default a rank's part of the node's")
    add("--time", metavar="TIME", default="24:00:00", help="limit of a job, then it is requeued; default: %(default)s")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", metavar="NAME", default="", help="as sbatch takes it")
    add("--job-name", metavar="NAME", help="by default the run folder's")
    add("--grace", metavar="SECONDS", type=count, default=600,
        help="before the limit, when training saves and leaves; default: %(default)s")  # fmt: skip
    add(
        "--chain",
        metavar="K",
        type=count,
        default=1,
        help="K jobs, one after the other, instead of one that is requeued",
    )
    add("--container", metavar="IMAGE", default="", help="a .sif for Apptainer; else an image for Pyxis")
    add("--python", metavar="PATH", help="on the nodes; by default this one, in a container `python`")
    add("--env", metavar="NAME=VALUE", action="append", default=[], type=_variable, help="for the job; may be repeated")
    add_config(parser, nargs="?")
    arguments = parser.parse_intermixed_args(given)
    arguments.extra, arguments.given = extra, given + (["--", *extra] if extra else [])
    if arguments.status or arguments.cancel:
        if arguments.config or extra:
            parser.error("--status and --cancel take the run folder alone")
        return arguments
    if not arguments.config:
        parser.error("CONFIG is missing")
    missing = [
        flag for flag in ("--nodes", "--gpus-per-node") if getattr(arguments, flag[2:].replace("-", "_")) is None
    ]
    if missing:
        on_cpus = "; on CPUs: --gpus-per-node 0 --tasks-per-node N" if "--gpus-per-node" in missing else ""
        parser.error(f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing{on_cpus}")
    if arguments.gpus_per_node == 0 and arguments.tasks_per_node is None:
        parser.error("--tasks-per-node is missing: with --gpus-per-node 0, how many ranks each node has on its CPUs")
    if arguments.gpus_per_node and arguments.tasks_per_node is not None:
        parser.error("--tasks-per-node goes with --gpus-per-node 0, and only with it: on GPUs it is one rank a GPU")
    return arguments


def _variable(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (sign and name.isidentifier() and name.isascii()):
        raise argparse.ArgumentTypeError(f"it is {text or 'empty'}; expected NAME=VALUE")
    return name, value


def run(arguments: argparse.Namespace) -> str:
    """Do what the arguments say; return what is to be printed on stdout.

    Raises:
        LonghaulError: it cannot be done.
    """
    from pretrain.cluster.run_state import read_state, render

    if arguments.status:
        state = read_state(Path(arguments.status))
        return json.dumps(asdict(state)) if arguments.json else render(state)
    if arguments.cancel:
        from pretrain.cluster.submit import cancel

        said = cancel(Path(arguments.cancel))
        return json.dumps({"run": arguments.cancel, "message": said}) if arguments.json else said
    return _submit(arguments)


def _submit(arguments: argparse.Namespace) -> str:
    from pretrain.cluster.slurm import is_installed, parse_time
    from pretrain.cluster.submit import SCRIPT, prepare_submission, send
    from pretrain.cluster.submit_checks import Request

    request = Request(
        arguments.nodes, arguments.gpus_per_node, arguments.tasks_per_node or arguments.gpus_per_node,
        arguments.cpus_per_task, arguments.time, arguments.partition, arguments.account, arguments.qos,
        arguments.constraint, arguments.job_name, arguments.grace, arguments.chain, arguments.container,
        arguments.python, dict(arguments.env), arguments.extra,
    )  # fmt: skip
    asked = [word for word in arguments.given if word not in ("--dry-run", "--json")]
    command = ["python", "launch/submit.py", *asked]
    submission = prepare_submission(arguments.config, arguments.overrides, request, command, arguments.dry_run)
    run, sbatch = submission.run, ["sbatch", "--parsable", str(submission.run / SCRIPT)]
    if arguments.dry_run:
        if not is_installed():
            warn("SLURM's commands are not here, so what the cluster has was not looked at")
        if arguments.json:
            return json.dumps({"run": str(run), "script": submission.script, "command": sbatch})
        return f"{submission.script}\n# {shlex.join(sbatch)}"
    job_id, warning = send(submission)
    if warning:
        warn(warning)
    if arguments.json:
        return json.dumps({"run": str(run), "job": job_id, "script": str(run / SCRIPT), "command": sbatch})
    kind = "GPU" if request.gpus_per_node else "rank"
    each = f"{counted(request.tasks_per_node, kind)}{' each' * (request.nodes > 1)}"
    limit = parse_time(request.time)
    until = "no time limit" if limit is None else f"at most {format_duration(limit)} at a time"
    jobs = (
        f"jobs {job_id}_1 to {job_id}_{arguments.chain}, one after the other"
        if arguments.chain > 1
        else f"job {job_id}"
    )
    return (
        f"{jobs}: {counted(request.nodes, 'node')} with {each}, {until}; script {run / SCRIPT}, log "
        f"{run}/slurm-{job_id}.log\nHow it stands: python launch/submit.py --status {run}"
    )
