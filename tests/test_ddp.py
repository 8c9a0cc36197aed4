"""The hook for DistributedDataParallel, and all that works by torchrun: real processes, Gloo.

The programs are those of tests/torchrun; what ranks print is shown if one of them fails.
"""

import csv
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_qgenx import Compression, Levels
from hvd_qgenx.ddp import QGenXState

ROOT = Path(__file__).resolve().parents[1]


def torchrun(ranks, *command, folder=ROOT, **variables):
    """A command on several ranks; the limit only ends a hang, which is a failure."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [*launcher, *command], cwd=folder, env=environment, text=True, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-12000:]
    return done.stdout


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "file"), [(3, "check_ddp.py"), (2, "check_ddp.py"), (3, "check_transport.py")])
def test_every_rank_passes(ranks, file):
    command = ["-m", "pytest", "-x", "-q", "--color=no", file]
    torchrun(ranks, *command, folder=ROOT / "tests" / "torchrun", ATEN_CPU_CAPABILITY="default")


WITHOUT_HOROVOD = """
import sys
sys.modules["horovod"] = None
import torch, torch.distributed as dist, hvd_qgenx
dist.init_process_group("gloo")
p = torch.zeros(2000, requires_grad=True)
optimizer = hvd_qgenx.DistributedOptimizer(
    hvd_qgenx.ExtraAdam([p]), compression=hvd_qgenx.Compression.qgenx(bits=4), process_group=dist.group.WORLD
)
for half in (optimizer.extrapolation, optimizer.step):
    p.grad = torch.randn(2000)
    half()
copies = [torch.empty_like(p) for _ in range(2)]
dist.all_gather(copies, p.detach())
assert p.any() and torch.equal(*copies)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
model.register_comm_hook(hvd_qgenx.ddp.QGenXState(bits=4), hvd_qgenx.ddp.qgenx_hook)
model(torch.randn(2, 64)).sum().backward()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parallel
@pytest.mark.slow
def test_extra_gradient_and_the_hook_need_no_horovod(tmp_path):
    (tmp_path / "job.py").write_text(WITHOUT_HOROVOD)
    torchrun(2, str(tmp_path / "job.py"))


@pytest.mark.parallel
@pytest.mark.slow
def test_the_trainer_runs_by_torchrun_and_says_so(tmp_path):
    flags = ["--iterations", "3", "--width", "4", "--batch", "6", "--log-every", "1", "--sample-every", "3"]
    out = torchrun(
        2, "train/wgan.py", *flags, "--data", "digits", "--check-replicas", "1", "--out", str(tmp_path / "run")
    )
    assert "2 ranks, launched by torchrun: gradients travel over torch.distributed (gloo)." in out
    assert "Finished, all replicas bit-identical" in out


@pytest.mark.parallel
@pytest.mark.slow
def test_the_benchmark_of_time_writes_a_row_for_every_hook(tmp_path):
    """Nothing is said about speed; but allreduce has no error, and fp16 less than 4 bits."""
    results = tmp_path / "ddp_time.csv"
    flags = ["--rate", "loopback", "--hosts", "2", "--model", "matrix:60x60", "--rounds", "1", "--results", results]
    subprocess.run([sys.executable, "benchmarks/ddp_time.py", *flags], cwd=ROOT, check=True, timeout=200)
    rows = {row["method"]: row for row in csv.DictReader(results.read_text().splitlines())}
    assert list(rows) == ["noop", "allreduce", "fp16", "powersgd_2", "qgenx_4/allgather", "qgenx_4/two_phase"]
    errors = [float(rows[method]["relative_error"]) for method in ("allreduce", "fp16", "qgenx_4/allgather")]
    assert errors == sorted(errors) and errors[0] < 2**-40 and 0.001 < errors[2] < 0.1


@pytest.mark.parallel
@pytest.mark.slow
def test_the_benchmark_of_the_loss_writes_a_row_for_every_run(tmp_path):
    results = tmp_path / "ddp_loss.csv"
    small = ["--iterations", "2", "--width", "4", "--batch", "4", "--seeds", "0", "--data", "digits"]
    torchrun(2, "benchmarks/ddp_loss.py", *small, "--results", str(results))
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert [row["method"] for row in rows] == ["float32", "qgenx_4"]
    assert all(0 < float(row["loss"]) < 100 for row in rows)


@pytest.mark.parallel
@pytest.mark.slow
@pytest.mark.parametrize("example", ["plain", "lightning", "accelerate"])
def test_an_example_runs(example):
    out = torchrun(2, "tests/torchrun/example.py", f"examples/ddp_{example}.py")
    assert "x less than float32" in out


@pytest.mark.parametrize("example", ["plain", "lightning", "accelerate"])
def test_an_example_has_forty_lines(example):
    assert len((ROOT / "examples" / f"ddp_{example}.py").read_text().splitlines()) <= 40


def test_a_state_takes_every_setting_of_the_compressor():
    theirs = inspect.signature(Compression.qgenx.__call__).parameters
    ours = inspect.signature(QGenXState).parameters
    # A module's hook needs no name, and its bucket is coded on the CPU.
    assert {name: p.default for name, p in theirs.items() if name not in ("process_set", "name", "device")} == {
        name: p.default for name, p in ours.items() if name not in ("process_group", "exchange", "part_bytes")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits must be an integer between 2 and 8, got 9"),
        ({"exchange": "auto"}, "exchange must be one of 'allgather', 'two_phase', got 'auto'"),
        ({"part_bytes": 0}, "part_bytes must be an integer at least 1, got 0"),
        ({"process_group": "all"}, "process_group must be a ProcessGroup, got 'all'"),
        ({"levels": Levels.uniform(8)}, "levels must be at most 7 for bits=4"),
    ],
)
def test_a_wrong_setting_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        QGenXState(**options)
