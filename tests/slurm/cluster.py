"""A real SLURM on this machine: one controller, several nodes, each with a name and a network of its own.

Debian's packages slurm-wlm, munge and iproute2 are all it takes, and root; neither systemd nor cgroups. A node is a
network namespace with an address on a bridge, so that ranks really meet over a network, and a host name with its own
/etc/hosts. Everything lives in one folder, and ends with `stop`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "munged", "mungekey", "unshare", "nsenter", "ip")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NETWORK = "10.77.43"
PORT = 26817
CONTROLLER = "ctl"

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={controller}({network}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=600
MailProg=/bin/true
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 DefaultTime=10 MaxTime=INFINITE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 DefaultTime=10 MaxTime=INFINITE PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no cluster on this machine; None where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "slurmd and network namespaces need root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge iproute2)"
    done = subprocess.run(["unshare", "--mount", "--uts", "--net", "true"], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


class Cluster:
    """A running cluster of nodes node1, node2, ...; its partitions are main, and urgent, which pre-empts main."""

    def __init__(self, num_nodes: int = 2) -> None:
        # Not below pytest's folder, which nobody but its owner may enter: munge refuses that.
        self.folder = Path(tempfile.mkdtemp(prefix="qlora-slurm-", dir="/tmp"))
        self.folder.chmod(0o711)
        self.names = [f"node{index + 1}" for index in range(num_nodes)]
        self.prefix = f"q{os.getpid()}"  # of namespaces and devices
        self.environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    # Commands

    def command(self, host: str, *words: str) -> list[str]:
        """A command line that runs on a host: in its network, with its name and its /etc/hosts."""
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        place = ["nsenter", f"--net=/run/netns/{self.prefix}{host}", "unshare", "--mount", "--uts", "sh", "-c", inside, "sh"]
        return [*place, host, str(self.folder / "hosts"), *words]

    def run(self, *words: str, host: str = CONTROLLER, check: bool = True, **more: str) -> str:
        """Run a command on a host, and return what it writes."""
        done = subprocess.run(
            self.command(host, *words),
            env=self.environment | more,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, *, seconds: float = 300) -> dict[str, str]:
        """Wait until a job has ended for good, and return what is known of it."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        return wait_for(lambda: facts if (facts := self.facts(job))["JobState"] in over else None, seconds)

    # Beginning and end

    def start(self) -> Cluster:
        """Start everything. Raises RuntimeError: with the end of the logs."""
        for name in ("state", "log", "run", *(f"spool.{name}" for name in self.names)):
            (self.folder / name).mkdir()
        (self.folder / "run").chmod(0o711)
        self._make_network()
        addresses = {CONTROLLER: f"{NETWORK}.254"} | {name: f"{NETWORK}.{i + 1}" for i, name in enumerate(self.names)}
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        nodes = [
            f"NodeName={name} NodeAddr={addresses[name]} Port={PORT + 1 + index} CPUs=4 RealMemory=1000 Gres=gpu:2"
            for index, name in enumerate(self.names)
        ]
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                controller=CONTROLLER, network=NETWORK, port=PORT, folder=self.folder, nodes="\n".join(nodes)
            )
        )
        # What SLURM counts as GPUs may be any two device files.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")
        self._start_munge()
        self.run("slurmctld", "-c")
        for name in self.names:
            self.run("slurmd", "-N", name, host=name)
        try:
            wait_for(
                lambda: len(self.run("sinfo", "-hN", "-p", "main", "-t", "idle", check=False).split("\n")) > len(self.names),
                60,
            )
        except TimeoutError as error:
            logs = "\n".join(path.read_text()[-2000:] for path in (self.folder / "log").iterdir())
            raise RuntimeError(f"the cluster does not come up\n{logs}") from error
        return self

    def _make_network(self) -> None:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], env=self.environment, check=True)

        bridge = f"{self.prefix}{CONTROLLER}"
        ip("netns", "add", bridge)
        ip("-n", bridge, "link", "set", "lo", "up")
        ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", bridge, "addr", "add", f"{NETWORK}.254/24", "dev", "br0")
        ip("-n", bridge, "link", "set", "br0", "up")
        for index, name in enumerate(self.names):
            space = f"{self.prefix}{name}"
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", f"v{index}", "netns", bridge)
            ip("-n", bridge, "link", "set", f"v{index}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"{NETWORK}.{index + 1}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "-c", "-k", str(key)], env=self.environment, check=True)
        files = {"key-file": key, "socket": self.folder / "run/munge.socket", "pid-file": self.folder / "run/munged.pid"}
        files |= {"log-file": self.folder / "log/munged.log", "seed-file": self.folder / "munged.seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        subprocess.run(["munged", *options, "--origin=127.0.0.1"], env=self.environment, check=True)

    def stop(self) -> None:
        """End all jobs, then the daemons, then the network; the folder goes too."""
        # Jobs outlive the daemons.
        self.run("scancel", "--user", "root", check=False)
        try:
            wait_for(lambda: not self.run("squeue", "-h", check=False).strip(), 45)
        except TimeoutError:
            print("jobs are left behind")
        for path in sorted((self.folder / "run").glob("*.pid"), key=lambda path: path.name == "munged.pid"):
            end_daemon(path)
        for name in (CONTROLLER, *self.names):
            subprocess.run(["ip", "netns", "del", f"{self.prefix}{name}"], env=self.environment, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def end_daemon(pid_file: Path) -> None:
    """End the process of a pid file, if it is the daemon of that name."""
    daemon = pid_file.name.split(".")[0]
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return

    def lives() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return state != "Z" and Path(f"/proc/{pid}/comm").read_text().strip() == daemon
        except OSError:
            return False

    for number in (15, 9):
        if not lives():
            return
        os.kill(pid, number)
        end = time.monotonic() + 10
        while lives() and time.monotonic() < end:
            time.sleep(0.05)


def wait_for(look: Callable[[], object], seconds: float) -> object:
    """The first true value of a look. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"not within {seconds:g} s")
