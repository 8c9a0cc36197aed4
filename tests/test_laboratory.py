"""The hosts of benchmarks/laboratory.py are hosts: they have names, links of the rate asked for, and leave nothing."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
lab = importlib.import_module("laboratory")
sys.path.remove(str(BENCHMARKS))

needs_laboratory = pytest.mark.skipif(lab.obstacle() is not None, reason=str(lab.obstacle()))
parallel = pytest.mark.parallel
OUTPUT = {"capture_output": True, "text": True, "timeout": 120}
BURST = 256 * 1024

SLEEPER = [sys.executable, str(BENCHMARKS / "laboratory.py"), "--hosts", "2", "--everywhere", "--"]
SLEEPER += ["sh", "-c", "echo ready; sleep 600"]

#: node2 sends to both others at once, or they to it; it prints in how many seconds, from before the first byte was
#: sent to after the last one came. A single byte says "start", and "all is here".
TRAFFIC = """
import os, socket, sys, threading, time
direction, size = sys.argv[1], int(sys.argv[2])

def receive(connection):
    left = size
    while left:
        left -= len(connection.recv(min(left, 2**20)))
    connection.sendall(b"!")

def send(connection):
    connection.sendall(bytes(size))
    assert connection.recv(1) == b"!"

if os.environ["LABORATORY_HOST"] == "1":
    server = socket.create_server(("", 5000))
    connections = [server.accept()[0] for _ in range(2)]
    work = receive if direction == "in" else send
    threads = [threading.Thread(target=work, args=[connection]) for connection in connections]
    start = time.monotonic()
    for connection in connections:
        connection.sendall(b"!")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(time.monotonic() - start)
else:
    while True:
        try:
            connection = socket.create_connection(("node2", 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    assert connection.recv(1) == b"!"
    (send if direction == "in" else receive)(connection)
"""


def machine() -> dict:
    """What a laboratory must leave as it was. Those that are open, here or in another process, do not count."""
    is_open = [f"{lab.PREFIX}{number}-" for number in open_numbers()]
    found = {
        "namespaces": list(names()),
        "links": output("ip", "-o", "-br", "link"),
        "mounts": Path("/proc/self/mounts").read_text().splitlines(),
        "netns": [str(path) for path in lab.NETNS.glob("*")],
        "run": [str(path) for path in Path("/run").glob("*") if path.name != "netns"],
        "hosts": Path("/etc/hosts").read_text().splitlines(),
        "ssh": [f"{path} {path.stat()}" for path in (Path.home() / ".ssh").glob("*")],
    }
    # Again, for those that were opened meanwhile.
    is_open += [f"{lab.PREFIX}{number}-" for number in open_numbers()]
    return {name: sorted(x for x in lines if not any(o in x for o in is_open)) for name, lines in found.items()}


def open_numbers() -> list[str]:
    return re.findall(rf"@{lab.PREFIX}(\d+)$", Path("/proc/net/unix").read_text(), re.M)


def names() -> set[str]:
    return {line.split()[0] for line in output("ip", "netns", "list")}


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def three():
    with lab.laboratory(hosts=3, rate="50mbit") as laboratory:
        yield laboratory


@parallel
@needs_laboratory
@pytest.mark.skipif(shutil.which("ping") is None, reason="ping is not installed: apt-get install iputils-ping")
@pytest.mark.parametrize("name", ["node1", "node2", "node3"])
def test_every_host_answers_every_host_s_ping(three, name):
    for done in three.everywhere(["ping", "-c", "1", "-W", "10", name], **OUTPUT):
        assert done.returncode == 0, done.stdout + done.stderr


@parallel
@needs_laboratory
def test_every_host_has_its_own_name_and_lets_the_others_in(three):
    ask = ["sh", "-c", "hostname; for name in node1 node2 node3; do ssh $name hostname; done"]
    for host, done in zip(three.hosts, three.everywhere(ask, **OUTPUT), strict=True):
        assert done.stdout.split() == [host.name, "node1", "node2", "node3"], done.stderr


@parallel
@pytest.mark.slow
@needs_laboratory
def test_horovod_sees_as_many_hosts_as_there_are(three):
    code = """
import horovod.torch as hvd, socket, torch
hvd.init()
hosts = hvd.allgather_object((socket.gethostname(), hvd.local_size(), hvd.cross_size()))
assert hosts == [("node1", 1, 3), ("node2", 1, 3), ("node3", 1, 3)], hosts
assert torch.equal(hvd.allreduce(torch.arange(5.0) * hvd.rank(), op=hvd.Sum), torch.arange(5.0) * 3)
"""
    done = three.run([sys.executable, "-c", code], **OUTPUT)
    assert done.returncode == 0, done.stdout + done.stderr


@parallel
@pytest.mark.slow
@needs_laboratory
def test_a_failure_on_one_host_is_the_run_s(three):
    code = "import horovod.torch as hvd; hvd.init(); raise SystemExit(hvd.rank() == 2)"
    assert three.run([sys.executable, "-c", code], **OUTPUT).returncode != 0
    codes = [done.returncode for done in three.everywhere(["sh", "-c", "exit $LABORATORY_HOST"], **OUTPUT)]
    assert codes == [0, 1, 2]


@parallel
@pytest.mark.slow
@needs_laboratory
def test_a_job_that_takes_too_long_is_ended_on_all_hosts_and_the_next_one_runs(three):
    quiet = three.processes()
    with pytest.raises(subprocess.TimeoutExpired):
        three.run(["sh", "-c", "sleep 600"], **{**OUTPUT, "timeout": 5})
    assert three.processes() == quiet == [daemon.pid for daemon in three.daemons]
    assert [done.stdout for done in three.everywhere(["hostname"], **OUTPUT)] == ["node1\n", "node2\n", "node3\n"]


@parallel
@needs_laboratory
def test_both_directions_of_every_link_are_told_the_rate(three):
    for namespace in [three.switch, *(host.namespace for host in three.hosts)]:
        shown = json.loads(lab._call("tc", "-j", "-n", namespace, "qdisc", "show"))
        buckets = {queue["dev"]: queue["options"] for queue in shown if queue["kind"] == "tbf"}
        devices = ["port1", "port2", "port3"] if namespace == three.switch else ["eth0"]
        assert sorted(buckets) == devices
        assert all(8 * bucket["rate"] == 50e6 for bucket in buckets.values())


@parallel
@needs_laboratory
@pytest.mark.parametrize("direction", ["in", "out"])
def test_no_more_passes_a_link_than_its_rate_allows(three, direction):
    """A token bucket's law, bytes <= rate * seconds + burst, holds on a busy machine too: that only adds seconds.

    Two hosts talk to one, so that it is that one's link that is full, in this direction.
    """
    size = 6_250_000
    done = three.everywhere([sys.executable, "-c", TRAFFIC, direction, str(size)], **OUTPUT)
    assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
    assert 2 * size <= 50e6 / 8 * float(done[1].stdout) + BURST


@parallel
@needs_laboratory
def test_two_laboratories_do_not_meet():
    with lab.laboratory(1) as one, lab.laboratory(2) as other:
        assert {one.switch, *(host.namespace for host in one.hosts)}.isdisjoint(
            {other.switch, *(host.namespace for host in other.hosts)}
        )
        assert one.everywhere(["ssh", "node2", "true"], **OUTPUT)[0].returncode != 0
        assert other.everywhere(["ssh", "node2", "true"], **OUTPUT)[0].returncode == 0


@parallel
@pytest.mark.slow
@needs_laboratory
def test_what_a_laboratory_made_is_gone_afterwards():
    before = machine()
    with lab.laboratory(2) as laboratory:
        processes = laboratory.processes()
        assert {laboratory.switch, *(host.namespace for host in laboratory.hosts)} <= names()
        laboratory.run([sys.executable, "-c", "import horovod.torch as hvd; hvd.init()"], **OUTPUT)
    assert machine() == before
    # Two daemons, and maybe one that still answers who asked whether they are there.
    assert len(processes) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in processes)


@parallel
@needs_laboratory
def test_nothing_is_left_after_an_error_inside():
    before = machine()
    with pytest.raises(ZeroDivisionError), lab.laboratory(1):
        raise ZeroDivisionError
    assert machine() == before


@contextlib.contextmanager
def sleeper():
    """A process, and its group, with a laboratory in which both hosts sleep."""
    process = subprocess.Popen(SLEEPER, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@parallel
@needs_laboratory
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_nothing_is_left_after_a_signal(number, code):
    before, open_before = machine(), open_numbers()
    with sleeper() as process:
        assert len(open_numbers()) > len(open_before)
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == code
    assert machine() == before


@parallel
@needs_laboratory
def test_more_signals_do_not_interrupt_the_clean_up():
    before = machine()
    with sleeper() as process:
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.001)
        # It says that it was interrupted, or the interpreter is, on its way out.
        assert process.returncode in (130, -signal.SIGINT)
    assert machine() == before


@parallel
@needs_laboratory
@pytest.mark.parametrize("namespaces", [1, 2, 3])
def test_nothing_is_left_after_a_signal_while_it_is_being_built(namespaces):
    before, others = machine(), names()
    process = subprocess.Popen(SLEEPER, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and len(names() - others) < namespaces:
        pass
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 143
    assert machine() == before


@parallel
@needs_laboratory
def test_what_a_killed_laboratory_left_behind_is_removed_by_the_next():
    before = machine()
    with sleeper() as process:
        process.kill()
        process.wait()
        left = machine()
        assert len(left["namespaces"]) == len(before["namespaces"]) + 3
        with lab.laboratory(1):
            pass
    assert machine() == before


@pytest.mark.parametrize("rate", ["fast", "100", "0mbit", "-5mbit", "100mbit burst 1", "1e3mbit"])
def test_a_rate_that_is_none_is_refused_in_one_sentence(rate):
    with pytest.raises(lab.LaboratoryError, match="rate must be a positive number and kbit, mbit or gbit"):
        lab.bits_per_second(rate)


def test_rates_are_bits_per_second():
    rates = {"56kbit": 56e3, "100mbit": 1e8, "2.5gbit": 2.5e9}
    assert {rate: lab.bits_per_second(rate) for rate in rates} == rates


@needs_laboratory
def test_hosts_must_be_a_number_of_hosts():
    with pytest.raises(lab.LaboratoryError, match="hosts must be between 1 and 64, got 0"), lab.laboratory(0):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stop being root")
def test_without_root_it_says_so_in_one_sentence():
    os.seteuid(65534)
    try:
        with pytest.raises(lab.LaboratoryError, match="the laboratory needs root"), lab.laboratory():
            pass
    finally:
        os.seteuid(0)


def test_missing_tools_are_named_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "SEARCHED", str(tmp_path))
    if os.geteuid() == 0:
        assert lab.obstacle().endswith("apt-get install hostname iproute2 openssh-client openssh-server util-linux")
