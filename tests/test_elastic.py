"""Ranks that come and go under horovodrun: state survives and replicas stay equal.

One machine has several names, each of which Horovod takes for a host.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.waiting]

JOB = Path(__file__).parent / "parallel" / "elastic_job.py"
FIRST, SECOND, THIRD = "localhost", "127.0.0.1", socket.gethostname()
SECONDS = 60  # only ends a hang, which is a failure


class Job:
    """An elastic job whose hosts are named in a file."""

    def __init__(self, folder: Path, kind: str, hosts: list[str]):
        self.folder = folder
        self.use(hosts)
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
        script.chmod(0o755)
        command = [
            "horovodrun",
            "-np",
            "1",
            "--network-interfaces",
            "lo",
            "--min-np",
            "1",
            "--max-np",
            "3",
            "--host-discovery-script",
            str(script),
        ]
        self.output = (folder / "output").open("w")
        self.process = subprocess.Popen(
            [*command, sys.executable, str(JOB), str(folder), kind],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def use(self, hosts: list[str]) -> None:
        """From here on these are the hosts, one rank each."""
        staged = self.folder / "staged"
        staged.write_text("".join(f"{host}:1\n" for host in hosts))
        staged.rename(self.folder / "hosts")

    def lines(self) -> list[dict]:
        path = self.folder / "lines"
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def wait_for(self, size: int, but: frozenset[int] = frozenset()) -> dict[int, int]:
        """Until so many ranks, none of them of the processes ``but``, have made some batches: their processes."""
        start, end = len(self.lines()), time.monotonic() + SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.2)
            new = [line for line in self.lines()[start:] if line["size"] == size and line["pid"] not in but]
            if len(new) >= 5 * size:
                return {line["rank"]: line["pid"] for line in new}
        raise AssertionError(f"{size} ranks did not come: {(self.folder / 'output').read_text()[-4000:]}")

    def end(self) -> None:
        (self.folder / "stop").touch()
        assert self.process.wait(SECONDS) == 0, (self.folder / "output").read_text()[-4000:]


@pytest.fixture
def start(tmp_path):
    jobs = []
    yield lambda kind, hosts: jobs.append(Job(tmp_path, kind, hosts)) or jobs[-1]
    for job in jobs:
        job.process.kill()
        job.output.close()
        for pid in {line["pid"] for line in job.lines()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["extra_adam", "none", "dual", "drop-in"])
def test_state_survives_ranks_that_come_and_go(start, kind):
    job = start(kind, [FIRST])
    job.wait_for(1)
    job.use([FIRST, SECOND])
    ranks = job.wait_for(2)
    killed = ranks[1]
    os.kill(killed, signal.SIGKILL)
    job.wait_for(1)
    job.use([FIRST, THIRD])
    ranks = job.wait_for(2, frozenset({killed}))
    job.use([THIRD])
    job.wait_for(1, frozenset({killed, ranks[0]}))
    job.end()
    check(job.lines(), kind)


def check(lines: list[dict], kind: str) -> None:
    """At every batch all ranks held the same, and nothing but what was not committed was made twice."""
    assert all(line["equal"] for line in lines)
    assert {line["size"] for line in lines} == {1, 2}
    per_batch = 2 if kind in ("extra_adam", "dual") else 1
    for before, after in zip(lines, lines[1:], strict=False):
        assert before["batch"] - 1 <= after["batch"] <= before["batch"] + 1, (before, after)
    # Stock Horovod does not call the compressor of a rank that is alone, unless it is elastic.
    assert all(line["exchanges"] == per_batch * line["batch"] for line in lines)
    if kind == "dual":
        assert all(line["num_ranks"] == line["size"] for line in lines)
