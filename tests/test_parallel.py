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
#: Files in one job save the time in which ranks start.
RUNS = [
    ("gloo", 3, "check_dropin.py"),
    ("gloo", 2, "check_wrapper.py"),
    ("gloo", 2, "check_habits.py"),
    ("gloo", 3, "check_adaptation.py"),
    ("gloo", 3, "check_plans.py"),
    ("mpi", 2, "check_plans.py"),
    ("gloo", 2, "check_lanes.py"),
    ("gloo", 2, "check_overlap.py"),
    ("gloo", 3, "check_faults.py"),
    ("gloo", 2, "check_gpu.py"),
    ("gloo", 2, "check_bytes.py check_drift.py check_recipes.py check_training.py"),
    ("gloo", 3, "check_probe.py"),
    ("mpi", 2, "check_dropin.py"),
    ("mpi", 2, "check_faults.py"),
]
#: A timeline that may be started costs every operation some time, so it is there only where one is.
VARIABLES = {"check_lanes.py": {"HOROVOD_TIMELINE": "DYNAMIC"}}


@pytest.mark.parametrize(("backend", "ranks", "files"), RUNS)
def test_every_rank_passes(backend, ranks, files):
    done = run_ranks(backend, ranks, _pytest(*files.split()), **VARIABLES.get(files, {}))
    assert done.returncode == 0, done.stdout[-8000:]


def test_whole_runs_end_in_the_same_bits_as_ever():
    done = run_ranks("gloo", 3, _pytest("check_runs.py"), ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0, done.stdout[-8000:]


#: What the way in which ranks lie on hosts decides.
WHERE = "bit or hosts or one_host or process_set or counted"


@pytest.mark.parametrize(
    ("hosts", "chosen"),
    [("localhost:2,127.0.0.1:2", ""), ("localhost:1,127.0.0.1:3", WHERE), ("localhost:4", WHERE)],
)
def test_every_rank_of_several_hosts_passes(hosts, chosen):
    """One machine under two names: Horovod counts local ranks for each."""
    done = run_ranks("gloo", 4, [*_pytest("check_hierarchical.py"), "-k", chosen], hosts=hosts)
    assert done.returncode == 0, done.stdout[-8000:]


WITHOUT_PROCESS_SETS = """
import horovod.torch as hvd, hvd_qgenx, torch
hvd.init()
try:
    hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1),
        compression=hvd_qgenx.Compression.qgenx(bits=4),
        hierarchical=True,
    )
    raise SystemExit("no error")
except ValueError as error:
    assert "hierarchical=True could not make the process set of ranks" in str(error), error
    assert "run with HOROVOD_DYNAMIC_PROCESS_SETS=1, or make two sets" in str(error), error
"""


def test_hosts_need_process_sets_and_say_so():
    command = [sys.executable, "-c", WITHOUT_PROCESS_SETS]
    done = run_ranks("gloo", 2, command, "localhost:1,127.0.0.1:1", HOROVOD_DYNAMIC_PROCESS_SETS="0")
    assert done.returncode == 0, done.stdout[-8000:]


GIVEN_PROCESS_SETS = """
import horovod.torch as hvd, hvd_qgenx, torch
hosts, leaders = [hvd.ProcessSet([0, 1]), hvd.ProcessSet([2])], hvd.ProcessSet([0, 2])
hvd.init(process_sets=[*hosts, leaders])
p = torch.zeros(2, requires_grad=True)
optimizer = hvd_qgenx.DistributedOptimizer(
    torch.optim.SGD([p], lr=1.0),
    compression=hvd_qgenx.Compression.qgenx(bits=4),
    hierarchical=(next(host for host in hosts if host.included()), leaders),
)
p.grad = torch.tensor([3.0 * hvd.rank(), 1.0])
optimizer.step()
# A sum of 3, times 2 / 3, and 6 times 2 / 3, halved: three float32 roundings.
assert torch.allclose(p, torch.tensor([-3.0, -1.0]), rtol=3 * 2**-23, atol=0), p
hvd.barrier()  # a host alone is through before the others, and its end would be theirs
"""


def test_process_sets_made_at_the_start_can_be_given():
    command = [sys.executable, "-c", GIVEN_PROCESS_SETS]
    done = run_ranks("gloo", 3, command, HOROVOD_DYNAMIC_PROCESS_SETS="0")
    assert done.returncode == 0, done.stdout[-8000:]


def _pytest(*files: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-x", "-q", "--color=no", *files]


def run_ranks(
    backend: str, ranks: int, command: list[str], hosts: str = "", **variables: str
) -> subprocess.CompletedProcess:
    """A command on several ranks; the limit only ends a hang, which is a failure."""
    launcher = ["horovodrun", f"--{backend}", "-np", str(ranks), *(["-H", hosts] if hosts else [])]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
        **variables,
    }
    return subprocess.run(
        [*launcher, *command],
        cwd=FOLDER,
        env=environment,
        text=True,
        timeout=400,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
