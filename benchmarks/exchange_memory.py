"""What memory an exchange needs beside gradients, and how much of it is fresh in every exchange.

    python benchmarks/exchange_memory.py            # writes benchmarks/results/exchange_memory.csv
    python benchmarks/exchange_memory.py --table    # prints it

One vector of 16 million coordinates (64 MB). *Peak* is by how much the process has ever exceeded what it held before
the first exchange (VmHWM), *fresh* are the pages that an exchange touches for the first time (minor page faults, the
fewest of five exchanges), both over the vector's own size. Horovod returns what it gathered in new memory; all else is
kept. Every choice runs in a process group of its own, since a peak is never taken back.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
from pathlib import Path

from records import ROOT, append, provenance

RESULTS = ROOT / "benchmarks" / "results" / "exchange_memory.csv"
COLUMNS = ["commit", "date", "device", "ranks", "coordinates", "choice", "plan", "peak", "fresh"]
CHOICES = [("none", "allgather"), ("fp16", "allgather"), ("qgenx", "allgather"), ("qgenx", "two_phase")]
NUMEL, CHOICE = 16_000_000, "HVD_QGENX_BENCHMARK_CHOICE"


def peak() -> int:
    """Bytes that this process has held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(choice: str, plan: str) -> dict:
    import horovod.torch as hvd
    import torch

    import hvd_qgenx

    parameter = torch.nn.Parameter(torch.zeros(NUMEL))
    compression = hvd_qgenx.Compression.qgenx(bits=4) if choice == "qgenx" else getattr(hvd_qgenx.Compression, choice)
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.0), compression=compression, exchange=plan
    )
    gradient = torch.randn(NUMEL)
    parameter.grad = gradient.clone()
    before, fresh = peak(), []
    for _ in range(8):
        parameter.grad.copy_(gradient)
        start = faults()
        optimizer.synchronize()
        fresh.append(faults() - start)
    bytes_ = 4 * NUMEL
    return {
        "ranks": hvd.size(),
        "coordinates": NUMEL,
        "choice": choice,
        "plan": plan,
        "peak": f"{(peak() - before) / bytes_:.2f}",
        "fresh": f"{min(fresh[3:]) * resource.getpagesize() / bytes_:.2f}",
    }


def table() -> str:
    lines = ["| compression | plan | peak memory over the vector | fresh memory over the vector |", "|---|---|---|---|"]
    with open(RESULTS) as file:
        lines += [f"| {r['choice']} | {r['plan']} | {r['peak']} | {r['fresh']} |" for r in csv.DictReader(file)]
    return "\n".join(lines)


def run_all() -> None:
    """Each choice in processes of its own, as many as there are cores to launch: three ranks."""
    RESULTS.unlink(missing_ok=True)
    for choice, plan in CHOICES:
        command = ["horovodrun", "-np", "3", sys.executable, __file__]
        subprocess.run(command, check=True, env={**os.environ, CHOICE: f"{choice} {plan}"})
    print(table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the rows and end")
    if parser.parse_args().table:
        return print(table())
    if CHOICE not in os.environ:
        return run_all()
    import horovod.torch as hvd

    hvd.init()
    row = measure(*os.environ[CHOICE].split())
    if hvd.rank() == 0:
        append(RESULTS, COLUMNS, [{**provenance(), **row}])


if __name__ == "__main__":
    main()
