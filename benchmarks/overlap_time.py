"""An iteration with ``overlap=True`` over the same without, for a network whose backward takes as long as its exchange.

    python benchmarks/laboratory.py --hosts 2 --rate 200mbit -- python benchmarks/overlap_time.py --link "200 Mbit/s"
    python benchmarks/overlap_time.py --table

A chain of square linear layers; the batch grows until backward takes as long as an exchange that waits for it, both
measured here. Forward, backward, exchange and an SGD step are then timed as a whole, both ways by turns in one run; an
iteration lasts until its slowest rank is through. Ranks have one thread each: let there be a core for each of them.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

from records import ROOT, append, provenance

RESULTS = ROOT / "benchmarks" / "results" / "overlap_time.csv"
COLUMNS = ["commit", "date", "device", "link", "ranks", "coordinates", "batch", "compression", "rounds", "backward_ms",
           "exchange_ms", "without_ms", "with_ms", "with_over_without"]  # fmt: skip
LAYERS, WIDTH = 24, 1024


class Run:
    """One network and its optimizer; every call is one iteration."""

    def __init__(self, overlap: bool):
        import torch

        import hvd_qgenx

        torch.manual_seed(1)
        layers = [layer for _ in range(LAYERS) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
        self.network = torch.nn.Sequential(*layers)
        compression = hvd_qgenx.Compression.qgenx(bits=4, adapt_at=(0,), adapt_every=0)
        base = torch.optim.SGD(self.network.parameters(), lr=1e-6)
        self.optimizer = hvd_qgenx.DistributedOptimizer(
            base, self.network.named_parameters(), compression=compression, exchange="allgather", overlap=overlap
        )

    def iterate(self, batch) -> list[float]:
        """Seconds of forward, of backward and of the half-step, on this rank."""
        self.optimizer.zero_grad()
        marks = [time.perf_counter()]
        loss = self.network(batch).square().mean()
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        return [end - begin for begin, end in zip(marks, marks[1:], strict=False)]


def slowest(seconds: list[float]) -> list[float]:
    """Of all ranks, for each entry; all ranks leave together."""
    import horovod.torch as hvd
    import torch

    return hvd.allreduce(torch.tensor(seconds, dtype=torch.float64), op=hvd.Max).tolist()


def fit_batch(run: Run, rounds: int = 3) -> tuple[int, float, float]:
    """Rows of a batch whose backward takes as long as an exchange; and seconds of the two."""
    import torch

    rows = 8
    while True:
        batch = torch.randn(rows, WIDTH)
        times = [slowest(run.iterate(batch)) for _ in range(rounds + 1)][1:]
        backward, exchange = (statistics.median(column) for column in list(zip(*times, strict=True))[1:])
        if backward >= 0.95 * exchange:
            return rows, backward, exchange
        rows = max(rows + 8, round(rows * min(exchange / backward, 4.0)))


def measure(link: str, rounds: int) -> dict:
    import horovod.torch as hvd
    import torch

    torch.set_num_threads(1)
    runs = [Run(overlap=False), Run(overlap=True)]
    rows, backward, exchange = fit_batch(runs[0])
    batch, times = torch.randn(rows, WIDTH), ([], [])
    for _ in range(rounds + 2):
        for run, own in zip(runs, times, strict=True):
            slowest([0.0])
            own.append(slowest([sum(run.iterate(batch))])[0])
    without, with_ = (statistics.median(own[2:]) for own in times)
    numel = sum(p.numel() for p in runs[0].network.parameters())
    found = {"backward_ms": backward, "exchange_ms": exchange, "without_ms": without, "with_ms": with_}
    shown = {name: f"{1e3 * seconds:.4g}" for name, seconds in found.items()}
    about = {"link": link, "ranks": hvd.size(), "coordinates": numel, "batch": rows, "compression": "qgenx 4"}
    return {**about, "rounds": rounds, **shown, "with_over_without": f"{with_ / without:.3f}"}


def table() -> str:
    with open(RESULTS) as file:
        rows = list(csv.DictReader(file))
    lines = ["| link | ranks | coordinates | backward, ms | exchange, ms | without, ms | with, ms | with / without |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    names = ("link", "ranks", "coordinates", "backward_ms", "exchange_ms", "without_ms", "with_ms", "with_over_without")
    return "\n".join(lines + ["| " + " | ".join(row[name] for name in names) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="loopback", help="what joins the ranks, for the table")
    parser.add_argument("--rounds", type=int, default=15, help="iterations of each kind")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows and end")
    flags = parser.parse_args()
    if flags.table:
        return print(table())
    import horovod.torch as hvd

    hvd.init()
    row = measure(flags.link, flags.rounds)
    if hvd.rank() == 0:
        append(flags.results, COLUMNS, [{**provenance(), **row}])
        print(row)


if __name__ == "__main__":
    main()
