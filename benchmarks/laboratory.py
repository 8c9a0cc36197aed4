"""Several hosts on one machine, joined by links of a chosen rate, for jobs that horovodrun starts.

    python benchmarks/laboratory.py --hosts 3 --rate 100mbit -- python script.py
    python benchmarks/laboratory.py --hosts 3 --rate 1gbit --everywhere -- hostname

Each host is a network namespace with its own name (node1, node2, ...), its own /etc/hosts, keys and sshd; a bridge in
a namespace of its own joins them. Every link is held to the rate in both directions by a token bucket (``tc tbf``, see
``BUCKET``); it adds no delay. The machine's own network, /etc/hosts and ~/.ssh are never touched. Files, memory and
cores are the machine's: hosts share them, so whatever they compute at once takes longer than on hosts of their own.

It needs root, and Debian's packages in ``TOOLS``. All that it made is gone afterwards, also after Ctrl-C or SIGTERM;
what a killed laboratory left behind is removed by the next. Several may be open at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PREFIX = "hvdqx"  # of all names on the machine: hvdqx0-node1, hvdqx0-switch, hvdqx1-node1, ...
MOST = 8  # laboratories at the same time
MOST_HOSTS = 64
BUCKET = ("burst", "256kb", "latency", "50ms")  # bytes that may pass at once; how long a packet may wait in line
TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "hostname": "hostname",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
NETNS = Path("/etc/netns")  # ip binds /etc/netns/NAME/* over /etc/* in namespace NAME
SECONDS_TO_START = 30
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
# Children have sessions of their own: Ctrl-C in a terminal reaches only this process, which then ends all of them.
_QUIETLY = {"stdin": subprocess.DEVNULL, "start_new_session": True, "capture_output": True, "text": True}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SSH_CONFIG = """\
IdentityFile /etc/ssh/key
UserKnownHostsFile /dev/null
GlobalKnownHostsFile /etc/ssh/known_hosts
LogLevel ERROR
"""
SSHD_CONFIG = """\
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
"""


class LaboratoryError(RuntimeError):
    """There is no laboratory to be had; the message is one sentence that says why."""


def obstacle() -> str | None:
    """One sentence about what is missing here for a laboratory; None if nothing is."""
    if os.geteuid() != 0:
        return "the laboratory needs root, for it makes network namespaces"
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool, path=SEARCHED) is None}
    if missing:
        names = " ".join(sorted(missing))
        return f"the laboratory needs more tools: apt-get update && apt-get install {names}"
    return None


def bits_per_second(rate: str) -> float:
    """Of a rate as tc writes it: "100mbit", "2.5gbit"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if not found or float(found[1]) <= 0:
        raise LaboratoryError(f"rate must be a positive number and kbit, mbit or gbit, like '100mbit', got {rate!r}")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Host:
    name: str
    namespace: str
    address: str


class Laboratory:
    """What ``laboratory`` gives: hosts that commands can be run on.

    Attributes:
        hosts: in the order of their names.
        rate: of every link, as tc writes it.
    """

    def __init__(self, number: int, count: int, rate: str):
        self.switch = f"{PREFIX}{number}-switch"
        indices = range(1, count + 1)
        self.hosts = [Host(f"node{i}", f"{PREFIX}{number}-node{i}", f"10.77.0.{i}") for i in indices]
        self.rate = rate
        self.daemons: list[subprocess.Popen] = []

    def run(self, command: Sequence[str], env: dict | None = None, **options) -> subprocess.CompletedProcess:
        """A command on every host under horovodrun, started on the first.

        Args:
            command: program and arguments; looked up on each host in ``env``'s PATH.
            env: of all ranks; None takes this process's.
            options: of ``subprocess.run``: ``capture_output``, ``text``, ``timeout``, ``cwd``, ...
        """
        names = ",".join(f"{host.name}:1" for host in self.hosts)
        # Without its cache: that remembers which hosts answered, and these names may have been other hosts'.
        launcher = [horovodrun(), "--gloo", "--disable-cache", "--network-interfaces", "eth0"]
        launcher += ["-np", str(len(self.hosts)), "-H", names]
        return self._run_all({self.hosts[0]: [*launcher, *command]}, env, options)[0]

    def everywhere(self, command: Sequence[str], env: dict | None = None, **options) -> list:
        """The same command on all hosts at once, without a launcher; LABORATORY_HOST is 0, 1, ... there.

        Returns:
            A CompletedProcess for each host, in their order. Arguments are those of ``run``.
        """
        numbered = {host: ["env", f"LABORATORY_HOST={index}", *command] for index, host in enumerate(self.hosts)}
        return self._run_all(numbered, env, options)

    def processes(self, but: Sequence[int] = ()) -> list[int]:
        """Ids of the processes on all hosts, those in ``but`` left out."""
        found = [pid for host in self.hosts for pid in _processes(host.namespace)]
        return [pid for pid in found if pid not in but]

    def _run_all(self, commands: dict[Host, Sequence[str]], env: dict | None, options: dict) -> list:
        """Runs them at once, each in a thread, where no signal can come between a process's start and its knowledge."""
        given = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        jobs = []
        with ThreadPoolExecutor(len(commands)) as pool:
            try:
                for host, command in commands.items():
                    jobs.append(pool.submit(subprocess.run, _inside(host, command), env=env, **given))
                return [job.result() for job in jobs]
            finally:
                self._end_jobs(jobs)

    def _end_jobs(self, jobs: list) -> None:
        """Ends, whatever happened, every process of these jobs that is still on the hosts, or about to be."""
        are_done = False
        while not are_done:
            are_done = all(job.done() for job in jobs)
            _end(lambda: self.processes(but=[daemon.pid for daemon in self.daemons]))
            time.sleep(0.0 if are_done else 0.02)

    def _build(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for index, host in enumerate(self.hosts, start=1):
            self._connect(host, f"port{index}")
        keys = _make_keys(NETNS / self.switch / "ssh", [host.name for host in self.hosts])
        for host in self.hosts:
            self._settle(host, keys)
        self._start_daemons()

    def _connect(self, host: Host, port: str) -> None:
        """A link from the bridge's ``port`` to the host's eth0, held to the rate at both ends."""
        _ip("netns", "add", host.namespace)
        _ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host.namespace, "link", "set", device, "up")
        for namespace, device in ((self.switch, port), (host.namespace, "eth0")):
            _call("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", self.rate, *BUCKET)

    def _settle(self, host: Host, keys: Path) -> None:
        """What /etc/hosts and /etc/ssh will be on this host."""
        folder = NETNS / host.namespace
        shutil.copytree(keys, folder / "ssh")
        lines = ["127.0.0.1 localhost", *(f"{other.address} {other.name}" for other in self.hosts)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def _start_daemons(self) -> None:
        # sshd wants /run/sshd, which the machine may lack: it gets a /run that only its sessions see.
        prepare = 'mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$0" -D -e'
        command = ["sh", "-c", prepare, shutil.which("sshd", path=SEARCHED)]
        for host in self.hosts:
            with open(_log(host), "w") as log:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                self.daemons.append(subprocess.Popen(_inside(host, command), **streams, start_new_session=True))
        for host, daemon in zip(self.hosts, self.daemons, strict=True):
            self._wait_for(host, daemon)

    def _wait_for(self, host: Host, daemon: subprocess.Popen) -> None:
        """Returns when the host lets the first one in, and says its name."""
        deadline, ask = time.monotonic() + SECONDS_TO_START, ["ssh", "-o", "BatchMode=yes", host.name, "hostname"]
        while True:
            answer = subprocess.run(_inside(self.hosts[0], ask), **_QUIETLY, env=_env())
            if answer.stdout.strip() == host.name:
                return
            if daemon.poll() is not None or time.monotonic() > deadline:
                said = " ".join((answer.stderr + _log(host).read_text()).split())
                raise LaboratoryError(f"{host.name} does not answer by ssh: {said}")
            time.sleep(0.05)


@contextlib.contextmanager
def laboratory(hosts: int = 3, rate: str = "1gbit") -> Iterator[Laboratory]:
    """Opens a laboratory; on leaving, all processes on its hosts are ended and all that it made is removed.

    Args:
        hosts: how many, 1 to 64.
        rate: of every link in both directions, as tc writes it.

    Raises:
        LaboratoryError: with a sentence that says what is missing or wrong.

    Example:
        >>> with laboratory(hosts=3, rate="100mbit") as lab:
        ...     lab.run(["python", "script.py"])
    """
    if reason := obstacle():
        raise LaboratoryError(reason)
    if not 1 <= hosts <= MOST_HOSTS:
        raise LaboratoryError(f"hosts must be between 1 and {MOST_HOSTS}, got {hosts}")
    bits_per_second(rate)
    with _Signals() as signals, _number() as number:
        lab = Laboratory(number, hosts, rate)
        try:
            lab._build()
            signals.let_in()
            yield lab
        finally:
            signals.hold()
            _remove(number)
            for daemon in lab.daemons:
                daemon.wait()


def horovodrun() -> str:
    """The launcher that belongs to this Python, else the first one in PATH."""
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise LaboratoryError("horovodrun is not installed beside this Python nor in PATH")
    return found


def _inside(host: Host, command: Sequence[str]) -> list[str]:
    """The command in the host's namespaces: network, /etc, and a name of its own, by which gloo finds its address."""
    enter = [shutil.which("ip", path=SEARCHED), "netns", "exec", host.namespace, "unshare", "--uts"]
    return [*enter, "sh", "-c", 'hostname "$0" && exec "$@"', host.name, *command]


def _make_keys(folder: Path, names: Sequence[str]) -> Path:
    """One key, both the hosts' and the user's, which lives as long as the laboratory does; and ssh's settings."""
    folder.mkdir(mode=0o700, parents=True)
    _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", PREFIX, "-f", str(folder / "key"))
    (folder / "known_hosts").write_text(f"{','.join(names)} {(folder / 'key.pub').read_text()}")
    (folder / "ssh_config").write_text(SSH_CONFIG)
    (folder / "sshd_config").write_text(SSHD_CONFIG)
    return folder


def _log(host: Host) -> Path:
    return NETNS / host.namespace / "ssh" / "sshd.log"


# ---- names, processes, signals ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _number() -> Iterator[int]:
    """The lowest number that no other laboratory has, kept while inside; what others left behind is removed first."""
    for number in range(MOST):
        with _lock(number) as is_free:
            if is_free:
                _remove(number)
    for number in range(MOST):
        with _lock(number) as is_free:
            if is_free:
                yield number
                return
    raise LaboratoryError(f"{MOST} laboratories are open on this machine, which is the most")


@contextlib.contextmanager
def _lock(number: int) -> Iterator[bool]:
    """Whether the number was free; it is then kept while inside, or until this process dies."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        try:
            lock.bind(f"\0{PREFIX}{number}")  # a name without a file, which one process at a time can have
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            yield False
        else:
            yield True


def _remove(number: int) -> None:
    """All that a laboratory of this number has made, whoever made it."""
    mine = [name for name in _namespaces() if name.startswith(f"{PREFIX}{number}-")]
    for name in mine:
        _end(lambda name=name: _processes(name))
        _ip("netns", "delete", name)
    for folder in NETNS.glob(f"{PREFIX}{number}-*"):
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # it was never there, or others have something in it
        NETNS.rmdir()


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _processes(namespace: str) -> list[int]:
    return [int(line) for line in _ip("netns", "pids", namespace).split()]


def _end(processes) -> None:
    """Kills what ``processes()`` lists until it lists nothing: a process may start another while it is being ended."""
    deadline = time.monotonic() + SECONDS_TO_START
    while found := processes():
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LaboratoryError(f"processes {found} on the laboratory's hosts cannot be ended")
        time.sleep(0.02)


def _ip(*arguments: str) -> str:
    return _call("ip", *arguments)


def _call(tool: str, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], **_QUIETLY, env=_env())
    if -done.returncode in SIGNALS:  # Ctrl-C met it in the moment before it had its own session, so it has done nothing
        return _call(tool, *arguments)
    if done.returncode:
        raise LaboratoryError(f"'{tool} {' '.join(arguments)}' failed: {' '.join(done.stderr.split())}")
    return done.stdout


def _env() -> dict:
    return {**os.environ, "PATH": SEARCHED, "LC_ALL": "C"}


class _Signals:
    """Inside, a signal that would end this process raises, so that it ends by way of the clean-up; but it waits while
    signals are held: at first, after ``hold``, and once one of them has raised.

    A mask would not do: other threads, which have masks of their own, would still let signals in.
    """

    def __enter__(self):
        self.are_held, self.waiting = True, []
        try:
            self.earlier = {number: signal.signal(number, self._receive) for number in SIGNALS}
        except ValueError:  # not the main thread, which alone handles signals
            self.earlier = {}
        return self

    def __exit__(self, *error):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        for number in self.waiting[:1]:
            signal.raise_signal(number)

    def hold(self) -> None:
        self.are_held = True

    def let_in(self) -> None:
        self.are_held = False
        if self.waiting:
            self._raise(self.waiting.pop(0))

    def _receive(self, number: int, frame) -> None:
        if self.are_held:
            self.waiting.append(number)
        else:
            self._raise(number)

    def _raise(self, number: int) -> None:
        self.are_held = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--rate", default="1gbit", help="of every link in both directions, as tc writes it")
    parser.add_argument("--everywhere", action="store_true", help="run the command on every host, without horovodrun")
    parser.add_argument("command", nargs="+", help="after --")
    flags = parser.parse_args()
    try:
        with laboratory(flags.hosts, flags.rate) as lab:
            if flags.everywhere:
                return max(done.returncode for done in lab.everywhere(flags.command))
            return lab.run(flags.command).returncode
    except LaboratoryError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
