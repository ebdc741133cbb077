"""Two hosts on one machine, joined by a cable: each with a network, a name, an /etc/hosts and processes of its own.

A host is one process, the first of its process namespace: when it is killed the kernel kills all others in it at one blow,
as when the power fails, and its network goes with it. Nothing has a name outside, so that any number may run side by side,
and nothing is left behind: the first process dies with whoever started it. It takes root, util-linux and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "hostname")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
DEVICE = "eth0"
ADDRESSES = {"north": "10.83.0.1", "south": "10.83.0.2"}
# Networks, names, mounts and processes of its own. The first process hands its signals to nobody and waits for ever.
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
FIRST = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && echo up && exec sleep infinity'


def why_not() -> str | None:
    """Why there can be no hosts on this machine; None where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install iproute2 util-linux hostname)"
    # Also the virtual cable, which is a module that a kernel may not have.
    tried = "ip link add name one type veth peer name other && mount -t tmpfs none /tmp"
    done = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", tried],
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


class Host:
    """A machine that can be switched on and off."""

    def __init__(self, name: str, hosts_file: Path) -> None:
        self.name, self.address = name, ADDRESSES[name]
        self._hosts_file = hosts_file
        self._outer: subprocess.Popen[str] | None = None
        self.first = 0  # as the machine outside counts

    def switch_on(self) -> None:
        """Start it, without a cable. Raises RuntimeError."""
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        self._outer = subprocess.Popen(
            [*words, "sh", "-c", FIRST, "sh", self.name, str(self._hosts_file)],
            env=os.environ | {"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != "up\n":
            raise RuntimeError(f"the host {self.name} does not come up: {self._outer.wait(10)}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text()
        self.first = int(children.split()[0])

    def switch_off(self) -> None:
        """Cut its power: all its processes are killed at once, without a word to the other side."""
        if self._outer is None:
            return
        # First of all, or the sockets of the dying would still say goodbye.
        subprocess.run(self.command("ip", "link", "set", DEVICE, "down"), capture_output=True, check=False)
        self._outer.kill()  # and with it its child, the first process
        self._outer.wait()
        if self._outer.stdout is not None:
            self._outer.stdout.close()
        end = time.monotonic() + 10
        while Path(f"/proc/{self.first}").exists() and time.monotonic() < end:
            time.sleep(0.02)
        self._outer, self.first = None, 0

    def command(self, *words: str) -> list[str]:
        """A command line that runs on it, in the working directory of whoever starts it."""
        return ["nsenter", "--target", str(self.first), *NAMESPACES, "--wd=.", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command on it. Raises RuntimeError with what it said."""
        done = subprocess.run(
            self.command(*words), env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def processes(self) -> list[str]:
        """The command lines of what runs on it, but the first and the one that looks."""
        lines = self.run("sh", "-c", "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f; echo; done").splitlines()
        return [line for line in lines if line.strip() and "sleep infinity" not in line and "cmdline" not in line]


class TwoHosts:
    """north and south, switched on and joined by a cable."""

    def __init__(self, folder: Path) -> None:
        hosts_file = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
        hosts_file.write_text("\n".join(lines) + "\n")
        self.north, self.south = (Host(name, hosts_file) for name in ADDRESSES)

    def __iter__(self) -> Iterator[Host]:
        yield from (self.north, self.south)

    def start(self) -> TwoHosts:
        """Switch both on and plug the cable in. Raises RuntimeError."""
        for host in self:
            host.switch_on()
        self._plug()
        return self

    def _plug(self) -> None:
        peer = ["peer", "name", DEVICE, "netns", str(self.south.first)]
        # By number from outside: a host does not see the other's processes.
        enter = ["nsenter", "--target", str(self.north.first), "--net"]
        words = [*enter, "ip", "link", "add", DEVICE, "type", "veth", *peer]
        done = subprocess.run(words, env=os.environ | {"PATH": PATH}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"no cable: {done.stderr}")
        for host in self:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", DEVICE)
            host.run("ip", "link", "set", DEVICE, "up")

    def cut(self) -> None:
        """Cut the cable: what is sent is lost, and nobody is told."""
        self.south.run("ip", "link", "set", DEVICE, "down")

    def mend(self) -> None:
        """Join the cable again."""
        self.south.run("ip", "link", "set", DEVICE, "up")

    def switch_on_again(self, host: Host) -> None:
        """A host whose power failed comes back, with a new cable: the old one went with its network."""
        host.switch_on()
        for host in self:
            subprocess.run(host.command("ip", "link", "del", DEVICE), capture_output=True, check=False)
        self._plug()

    def stop(self) -> None:
        """Switch both off, whatever runs on them."""
        for host in self:
            host.switch_off()
