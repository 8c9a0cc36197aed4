"""docker/slurm/train.sh starts the ranks that Slurm's variables ask for, through srun and through horovodrun."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docker" / "slurm" / "train.sh"
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "benchmarks"))
lab = importlib.import_module("laboratory")
sys.path.remove(str(ROOT / "benchmarks"))

#: Slurm's srun, for one machine: it knows the options that the script may use, and starts the ranks under a PMIx server
#: as Slurm's plugin does. prterun is the server that comes with Open MPI.
SRUN = """#!/bin/sh
[ "$1" = --mpi=pmix ] || { echo "srun: no PMIx asked for: $1" >&2; exit 2; }
[ "$2" = --kill-on-bad-exit=1 ] || { echo "srun: unknown option $2" >&2; exit 2; }
shift 2
exec prterun --bind-to none --map-by slot:OVERSUBSCRIBE -n "$SLURM_NTASKS" "$@"
"""
#: Slurm's list of an allocation: "node[1-3]" is node1, node2 and node3.
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] || exit 2
[ "$3" = "node[1-3]" ] && printf '%s\\n' node1 node2 node3 || echo "$3"
"""
#: One exchange; every rank says how it was started, with how many others, where, and what it holds afterwards.
PROGRAM = """
import hashlib, os, socket, sys
import horovod.torch as hvd, torch, hvd_qgenx
hvd.init()
torch.manual_seed(hvd.rank())
x = torch.zeros(4096, requires_grad=True)
optimizer = hvd_qgenx.DistributedOptimizer(
    torch.optim.SGD([x], lr=1.0), named_parameters=[("x", x)], compression=hvd_qgenx.Compression.qgenx(bits=4))
(x * torch.randn(4096)).sum().backward()
optimizer.step()
digest = hashlib.sha256(x.detach().numpy().tobytes()).hexdigest()
controller = "mpi" if hvd.mpi_enabled() else "gloo"
place = f"{controller} {hvd.size()} {hvd.local_size()} {socket.gethostname()} {os.environ['OMP_NUM_THREADS']}"
open(os.path.join(sys.argv[1], str(hvd.rank())), "w").write(f"{place} {digest} {float(x.detach().abs().max()) > 0}")
"""


@pytest.fixture
def job(tmp_path):
    """Slurm's commands, and the program with the folder that its ranks write to."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "ranks").mkdir()
    return tmp_path


def _environment(job, **slurm):
    """What sbatch gives to the script. Open MPI asks root whether it means it."""
    path = os.pathsep.join([str(job), str(BIN), os.environ["PATH"]])
    as_root = {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **as_root, "PATH": path, "PYTHONPATH": str(ROOT), "SLURM_CPUS_PER_TASK": "1", **slurm}


def _command(job):
    return ["bash", str(SCRIPT), sys.executable, str(job / "program.py"), str(job / "ranks")]


def _run(job, command=None, **slurm):
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command or _command(job), env=_environment(job, **slurm), cwd=ROOT, **streams)


def _answers(job):
    return [(job / "ranks" / name).read_text().split() for name in sorted(os.listdir(job / "ranks"))]


def _assert_equal_replicas(answers):
    """All ranks hold the same, and it is not what they began with."""
    assert len({answer[5] for answer in answers}) == 1
    assert {answer[6] for answer in answers} == {"True"}


def test_srun_starts_the_ranks_and_mpi_joins_them(job):
    done = _run(job, SLURM_NTASKS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    answers = _answers(job)
    assert [answer[:3] for answer in answers] == [["mpi", "2", "2"]] * 2
    assert {answer[4] for answer in answers} == {"1"}
    _assert_equal_replicas(answers)


def test_a_rank_that_fails_fails_the_job(job):
    (job / "program.py").write_text("import horovod.torch as hvd; hvd.init(); raise SystemExit(3 * hvd.rank())")
    assert _run(job, SLURM_NTASKS="2").returncode == 3


@pytest.mark.skipif(lab.obstacle() is not None, reason=str(lab.obstacle()))
def test_horovodrun_starts_a_rank_on_every_host_of_the_allocation(job):
    slurm = {"SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "node[1-3]"}
    env = _environment(job, LAUNCH="horovodrun", INTERFACE="eth0", **slurm)
    # sbatch runs the script on the first node of the allocation alone.
    first = ["sh", "-c", '[ "$LABORATORY_HOST" != 0 ] || exec "$@"', "first", *_command(job)]
    with lab.laboratory(hosts=3) as hosts:
        done = hosts.everywhere(first, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done[0].returncode == 0, done[0].stdout + done[0].stderr
    answers = _answers(job)
    assert [answer[:4] for answer in answers] == [["gloo", "3", "1", f"node{i}"] for i in (1, 2, 3)]
    _assert_equal_replicas(answers)


def test_an_unknown_launcher_is_named(job):
    done = _run(job, LAUNCH="mpirun")
    assert done.returncode == 2
    assert done.stderr == "LAUNCH must be srun or horovodrun, got 'mpirun'\n"


def test_the_script_asks_slurm_for_the_papers_nodes():
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(), re.M))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("3", "1", "1")
