"""Runs tests/parallel under horovodrun: real processes, Gloo and MPI.

The launcher fails if any rank does; what ranks print is not looked at, since it loses a piece of it now and then.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

FOLDER = Path(__file__).parent / "parallel"
RUNS = [
    ("gloo", 3, "check_dropin.py"),
    ("gloo", 3, "check_wrapper.py"),
    ("gloo", 3, "check_adaptation.py"),
    ("gloo", 3, "check_plans.py"),
    ("gloo", 4, "check_plans.py"),
    ("mpi", 2, "check_plans.py"),
    ("gloo", 2, "check_dropin.py"),
    ("gloo", 2, "check_wrapper.py"),
    ("gloo", 2, "check_bytes.py"),
    ("gloo", 2, "check_recipes.py"),
    ("gloo", 2, "check_probe.py"),
    ("gloo", 3, "check_probe.py"),
    ("mpi", 2, "check_dropin.py"),
    ("mpi", 2, "check_wrapper.py"),
]


@pytest.mark.parametrize(("backend", "ranks", "file"), RUNS)
def test_every_rank_passes(backend, ranks, file):
    done = run_ranks(backend, ranks, _pytest(file))
    assert done.returncode == 0, done.stdout[-8000:]


def test_whole_runs_end_in_the_same_bits_as_ever():
    done = run_ranks("gloo", 3, _pytest("check_runs.py"), ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0, done.stdout[-8000:]


def _pytest(file: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-x", "-q", "--color=no", file]


def run_ranks(backend: str, ranks: int, command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """A command on several ranks; the limit only ends a hang, which is a failure."""
    launcher = ["horovodrun", f"--{backend}", "-np", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOROVOD_DYNAMIC_PROCESS_SETS": "1", **variables}
    return subprocess.run(
        [*launcher, *command],
        cwd=FOLDER,
        env=environment,
        text=True,
        timeout=400,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
