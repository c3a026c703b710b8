"""Several hosts on this machine, as far as names, networks and ssh go: namespaces of their own, on one switch.

Each host has the interface `eth0` (10.112.0.1, .2, …), a name, an `/etc/hosts` as Debian writes it, in which its own name is
127.0.1.1, and `docker0` with the address that all of Docker's have. Nothing outside of a temporary folder is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests.helpers.rank_helpers import ROOT, skip_for

PREFIX = "10.112.0."
# What a host's commands run in: its network, and names and mounts of their own.
ENTER = """
mount --bind "$1/hosts-$2" /etc/hosts
hostname "$2"
shift 2
exec "$@"
"""
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
"""
SSH = """
Host *
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""


def why_not(*commands: str) -> str | None:
    """Say what this machine lacks for hosts of its own, and for these commands."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("ip", "unshare", *commands) if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install iproute2 openssh-server openssh-client pdsh"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name, reason = f"longhaul-{os.getpid()}", None
    for command in (
        f"netns add {name}", f"-n {name} link add bridge0 type bridge",
        f"-n {name} link add link0 type veth peer name link1",
    ):  # fmt: skip
        made = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
        if made.returncode:
            reason = f"networks of one's own are not allowed here: ip {command}: {made.stderr.strip()}"
            break
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return reason


def require(*commands: str) -> None:
    """Skip the test where hosts cannot be had; fail there if LONGHAUL_REQUIRE_HOSTS is set, as .ci/run does."""
    skip_for(why_not(*commands), "LONGHAUL_REQUIRE_HOSTS")


def ip(*arguments: str) -> None:
    """Run `ip`, which must succeed."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """The hosts `node1`, `node2`, …, from `with` to its end.

    Attributes:
        names: of the hosts.
        namespaces: of their networks.
        addresses: on the network that they share.
    """

    def __init__(self, number: int) -> None:
        self.names = [f"node{index + 1}" for index in range(number)]
        self.namespaces = [f"longhaul-{os.getpid()}-{name}" for name in self.names]
        self.addresses = [f"{PREFIX}{index + 1}" for index in range(number)]
        self._switch = f"longhaul-{os.getpid()}-switch"
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        with ExitStack() as undo:
            self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for namespace in (self._switch, *self.namespaces):
                ip("netns", "add", namespace)
                undo.callback(ip, "netns", "delete", namespace)
            undo.callback(self._end_processes)  # the first to be done
            ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            ip("-n", self._switch, "link", "set", "switch", "up")
            for host, (name, namespace) in enumerate(zip(self.names, self.namespaces, strict=True)):
                self._connect(host, namespace)
                others = [
                    f"{self.addresses[other]} {self.names[other]}" for other in range(len(self.names)) if other != host
                ]
                lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]
                (self.folder / f"hosts-{name}").write_text("\n".join(lines) + "\n")
            self._undo = undo.pop_all()
        return self

    def _connect(self, host: int, namespace: str) -> None:
        ip("-n", namespace, "link", "add", "docker0", "type", "bridge")  # first, as it is on many machines
        ip("-n", namespace, "address", "add", "172.17.0.1/16", "dev", "docker0")
        port = f"port{host}"
        ip("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", port, "netns", self._switch)
        ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
        ip("-n", namespace, "address", "add", f"{self.addresses[host]}/24", "dev", "eth0")
        for device in ("lo", "docker0", "eth0"):
            ip("-n", namespace, "link", "set", device, "up")

    def limit(self, host: int, rate: str) -> None:
        """Let a host's interface carry no more than this, as `100mbit`, each way."""
        for namespace, device in ((self.namespaces[host], "eth0"), (self._switch, f"port{host}")):
            shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "100ms"]
            subprocess.run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shape], check=True)

    def command(self, host: int, *command: str | Path) -> list[str]:
        """Return the command that runs a command on a host."""
        inside = ["unshare", "--uts", "sh", "-ec", ENTER, "sh", str(self.folder), self.names[host]]
        return ["ip", "netns", "exec", self.namespaces[host], *inside, *map(str, command)]

    def start(self, host: int, *command: str | Path, log: Path, **environment: str) -> subprocess.Popen:
        """Start a command on a host, in the repository; what it writes goes to a file."""
        with open(log, "w") as output:
            process = subprocess.Popen(self.command(host, *command), cwd=ROOT, env=self.environment() | environment,
                                       stdout=output, stderr=output, start_new_session=True)  # fmt: skip
        self._started.append(process)
        return process

    def environment(self) -> dict[str, str]:
        """Variables by which processes of these hosts are found, and `ssh` knows the hosts."""
        path = f"{self.folder}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return os.environ | {"LONGHAUL_HOSTS": str(self.folder), "OMP_NUM_THREADS": "1", "PATH": path}

    def start_ssh(self) -> None:
        """Let the hosts be reached by `ssh NAME`, by keys of their own."""
        key, host_key = self.folder / "key", self.folder / "host_key"
        for path in (key, host_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        public = host_key.with_suffix(".pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"{name} {public}" for name in self.names))
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        wrapper = self.folder / "ssh"  # what a user has in ~/.ssh
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        if not Path("/run/sshd").exists():  # where sshd locks itself in before a user has logged in
            Path("/run/sshd").mkdir(mode=0o755)
            self._undo.callback(os.rmdir, "/run/sshd")
        sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        for host, name in enumerate(self.names):
            self.start(host, sshd or "sshd", "-D", "-e", "-f", self.folder / "sshd_config", log=self.folder / f"{name}.log")  # fmt: skip

    def processes(self, host: int | None = None) -> list[psutil.Process]:
        """The processes of one host, or of all and what has started them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                if host is None and process.environ().get("LONGHAUL_HOSTS") == str(self.folder):
                    found.append(process)
                elif self._namespace(process) in self._inodes(host):
                    found.append(process)
        return found

    def _namespace(self, process: psutil.Process) -> int:
        return os.stat(f"/proc/{process.pid}/ns/net").st_ino

    def _inodes(self, host: int | None) -> Sequence[int]:
        namespaces = self.namespaces if host is None else [self.namespaces[host]]
        return [os.stat(f"/run/netns/{name}").st_ino for name in namespaces if Path(f"/run/netns/{name}").exists()]

    def kill(self, host: int) -> None:
        """Kill all that runs on a host, as when it loses its power."""
        for process in self.processes(host):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _end_processes(self) -> None:
        for _ in range(3):  # again for what was started meanwhile
            for process in (running := self.processes()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(running, timeout=5)
        for started in self._started:
            started.wait(5)

    def __exit__(self, *_: object) -> None:
        self._undo.close()
