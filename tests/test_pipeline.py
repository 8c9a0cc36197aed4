"""The picture of an exchange in parts shows what torch's profiler recorded on each rank."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from test_parallel import run_ranks

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_a_run_of_two_ranks_is_drawn_and_its_trace_kept(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pipeline = importlib.import_module("pipeline")
    picture, trace = tmp_path / "pipeline.png", tmp_path / "trace.json"
    flags = ["--numel", "300000", "--parts", "3", "--warmups", "1", "--exchanges", "2"]
    done = run_ranks(
        "gloo",
        2,
        [sys.executable, str(BENCHMARKS / "pipeline.py"), *flags, "--out", str(picture), "--trace", str(trace)],
    )
    assert done.returncode == 0, done.stdout[-8000:]
    found = pipeline.ranges(json.loads(trace.read_text()))
    # All parts are encoded before the first is waited for. Each is then waited for and decoded, in its turn.
    assert [each.phase for each in found] == 3 * ["encode"] + 3 * ["wait", "decode"]
    assert all(first.end <= second.start for first, second in zip(found, found[1:], strict=False))
    assert 0 < picture.stat().st_size < 40_000


def test_length_is_that_of_the_slowest_rank(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pipeline = importlib.import_module("pipeline")
    ranks = [
        [pipeline.Range("encode", 1.0, 2.0), pipeline.Range("decode", 3.0, 4.5)],
        [pipeline.Range("wait", 2.0, 4.0)],
    ]
    assert pipeline.length(ranks) == 3.5
