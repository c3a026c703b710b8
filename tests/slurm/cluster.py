"""A real SLURM cluster of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd.

It needs neither systemd nor accounting nor anything in /etc/slurm. Checked with Debian 12's Slurm 22.05.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.helpers.rank_helpers import ROOT

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
# Names that need no /etc/hosts, because every resolver takes them for 127.0.0.1 and 127.0.0.2.
NODES = ("127.1", "127.2")
CONF = """\
ClusterName=longhaul
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is how long a requeued job waits, too: 120 seconds by default
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
KillWait=60
FirstJobId={first_job}
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=2-0 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 MaxNodes=1 State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Say what this machine lacks for a cluster."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [command for command in COMMANDS if not shutil.which(command, path=path)]:
        return f"{', '.join(missing)} not found: install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd runs jobs as root only: run the tests as root"


class Cluster:
    """The daemons, from `with` to its end."""

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path may have 108 characters
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        self.environment["GLOO_SOCKET_IFNAME"] = "lo"  # the nodes are this machine: else ranks refuse such addresses
        self.daemons: list[subprocess.Popen] = []
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        host = socket.gethostname().partition(".")[0]
        # Ranks meet at a port that follows from the job's number: clusters beside each other must not have the same.
        first_job = 1 + secrets.randbelow(1200)
        conf = CONF.format(folder=self.folder, host=host, ports=ports, nodes=NODES, first_job=first_job)
        (self.folder / "slurm.conf").write_text(conf)
        if not self.call("slurmctld", "-V").startswith("slurm-wlm 22."):  # newer ones ask for cgroups even so
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge.key").chmod(0o400)
        files = [
            f"--{kind}={self.folder}/munge.{kind.partition('-')[0]}" for kind in ("key-file", "pid-file", "seed-file")
        ]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock", *files)
        self.wait(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait(lambda: self.attempt("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "two idle nodes")

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}-{len(self.daemons)}.log", "w") as log:
            self.daemons.append(subprocess.Popen([name, *arguments], env=self.environment, stdout=log, stderr=log,
                                                 cwd=self.folder, start_new_session=True))  # fmt: skip

    def call(self, *command: str) -> str:
        """Run one of SLURM's commands in the repository; return what it printed."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def refused(self, *command: str) -> str:
        """Run a command of this project, which must end with status 2; return its error."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout == "", done
        return done.stderr

    def attempt(self, *command: str) -> str:
        """Run one of SLURM's commands, which may fail; return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "-o", "show", "job", job)))

    def tasks(self, job: str) -> dict[str, str]:
        """The node of each rank of a job's training that runs now, by rank."""
        found = {}
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                if variables.get("SLURM_JOB_ID") == job and "launch/pretrain.py" in process.cmdline()[1:2]:
                    found[variables["SLURM_PROCID"]] = variables["SLURMD_NODENAME"]
            except (psutil.Error, KeyError):
                continue
        return found

    def wait(self, condition: Callable[[], object], what: str, timeout: float = 150) -> None:
        """Wait until `condition` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not dead and time.monotonic() < deadline, f"no {what} in {timeout} s; ended: {dead}\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def processes(self) -> list[psutil.Process]:
        """Whatever runs in this cluster: its daemons, what they started, and what was left by that."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                # slurmstepd writes its title over its environment, but it is where slurmd is
                if (process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                        or process.cwd().startswith(str(self.folder))):  # fmt: skip
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):  # the last is for what was started meanwhile
            for process in (running := self.processes()):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            psutil.wait_procs(running, timeout=5)
        for daemon in self.daemons:
            daemon.wait(10)
        left = self.processes()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"still running: {left}"
