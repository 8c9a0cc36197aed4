"""What the other ranks are told when one of three is killed, fails, leaves, is stopped or does not come."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.waiting]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
lab = importlib.import_module("laboratory")
sys.path.remove(str(BENCHMARKS))

JOB = Path(__file__).parent / "parallel" / "fault_job.py"
#: What the surviving ranks know beside the error itself.
WAITED = "gave up: rank {rank} has waited 4 s in exchange 3 (step) of "
LOST = "rank {rank} lost other ranks in exchange 3 (step) of "


def run(folder: Path, fault: str) -> tuple[dict[int, dict], str]:
    """What each rank wrote before it ended, and all that was printed."""
    command = ["horovodrun", "--gloo", "-np", "3", sys.executable, str(JOB), str(folder), fault]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(90)
        finally:
            process.kill()
            _end(int((folder / "wrong").read_text()))
    return told_in(folder), (folder / "output").read_text()


def told_in(folder: Path) -> dict[int, dict]:
    return {rank: json.loads(path.read_text()) for rank in range(3) if (path := folder / f"rank{rank}").exists()}


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("fault", ["killed", "raises", "leaves"])
def test_a_rank_that_is_gone_is_named_within_seconds(tmp_path, fault):
    told, _ = run(tmp_path, fault)
    for rank in (0, 2):
        assert told[rank]["text"].startswith(LOST.format(rank=rank)), told
        assert "rank 1 went silent" in told[rank]["text"], told
        assert "HorovodInternalError" in told[rank]["kinds"], told
        assert told[rank]["seconds"] < 30, told


@pytest.mark.parametrize("fault", ["stopped", "absent"])
def test_a_rank_that_does_not_come_is_logged_and_then_named_on_all_that_wait(tmp_path, fault):
    told, output = run(tmp_path, fault)
    for rank, other in ((0, 2), (2, 0)):
        assert told[rank]["text"].startswith(WAITED.format(rank=rank)), told
        assert told[rank]["text"].endswith(f": rank {other} waits there too, rank 1 has not arrived"), told
        assert "HorovodInternalError" in told[rank]["kinds"], told
    # The launcher may lose a piece of what ranks print, but not of both.
    assert output.count("has waited 2 s in exchange 3 (step) of ") in (1, 2), output


@pytest.mark.skipif(lab.obstacle() is not None, reason=str(lab.obstacle()))
def test_a_host_whose_link_is_cut_is_named_by_the_others_and_ends_too(tmp_path):
    command = [sys.executable, str(JOB), str(tmp_path), "cut"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The launcher itself never learns what became of a host that it cannot reach.
    with lab.laboratory(3, "1gbit") as hosts, contextlib.suppress(subprocess.TimeoutExpired):
        hosts.run(command, env=environment, cwd=tmp_path, timeout=40, capture_output=True)
    told = told_in(tmp_path)
    for rank, other in ((0, 2), (2, 0)):
        assert told[rank]["text"].startswith(WAITED.format(rank=rank)), told
        assert told[rank]["text"].endswith(f": rank {other} waits there too, rank 1 has not arrived"), told
    assert told[1]["text"].startswith(WAITED.format(rank=1)), told


def test_a_rank_that_is_preempted_in_an_exchange_ends_and_the_others_are_told(tmp_path):
    told, _ = run(tmp_path, "preempted")
    assert told[1]["kinds"] == ["SystemExit"], told
    assert told[1]["seconds"] < 4, told  # at once, not when the late rank has come
    assert "rank 1 went silent" in told[0]["text"], told
    assert "ranks 0, 1 went silent" in told[2]["text"], told  # rank 0 is not there yet either
