"""What adaptive levels cost: an adaptation against an encode of the same vector, and against all exchanges.

    python benchmarks/adaptation_cost.py              # one process; appends to benchmarks/results/adaptation_cost.csv
    horovodrun -np 3 python benchmarks/adaptation_cost.py
    python benchmarks/adaptation_cost.py --table      # prints the newest rows of every case

An adaptation is all of it: the statistics of the vector, their exchange, the fit, the new codebook. *Amortised* is the
time of the adaptations of the default schedule in its first 10,000 iterations over that of as many exchanges, one to an
iteration; extra-gradient has two. On one process exchanges meet no network, which makes them shorter than they will be.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from records import append, provenance

RESULTS = Path(__file__).resolve().parent / "results" / "adaptation_cost.csv"
COLUMNS = ["commit", "date", "device", "ranks", "coordinates", "bits", "statistics", "rate_weight", "ms_encode",
           "ms_adaptation", "ms_fit", "ms_exchange", "adaptation_over_encode", "amortised_percent"]  # fmt: skip
CASES = [(4, "histogram", 0.0), (3, "histogram", 0.0), (8, "histogram", 0.0), (4, "normal", 0.0),
         (4, "histogram", 0.05)]  # fmt: skip
ITERATIONS = 10_000
SEGMENT = 65_536


def measure(coordinates: int, case: tuple[int, str, float], repeats: int) -> dict:
    """Medians of one case, in milliseconds."""
    import horovod.torch as hvd

    from hvd_qgenx import Key
    from hvd_qgenx.adaptation import Settings, Statistics, fit
    from hvd_qgenx.exchange import CodedExchange
    from hvd_qgenx.transports.horovod import HorovodTransport

    bits, form, rate_weight = case
    settings = Settings(bits=bits, statistics=form, rate_weight=rate_weight, adapt_at=(0,), adapt_every=0)
    exchange = CodedExchange(settings, HorovodTransport())
    tensors = list(torch.randn(coordinates, generator=torch.Generator().manual_seed(hvd.rank())).split(SEGMENT))
    vector, sizes = torch.cat(tensors), [len(tensor) for tensor in tensors]
    names = [str(index) for index in range(len(tensors))]
    exchange.describe(names, [torch.float32] * len(names), sizes)
    fused = exchange.fuse(tensors)
    exchange.settle()
    exchange.adapt_if_due(fused)
    shared = Statistics.measure(exchange.codec, fused.segments, exchange.codec.layout(sizes), form)
    # One after another in every round, so that a slow moment meets all of them.
    rounds = [
        (
            seconds(lambda: exchange.codec.encode(vector, Key(0, hvd.rank(), 0), sizes=sizes, inline=False)),
            seconds(lambda: exchange._adapt(fused)),
            seconds(lambda: fit(shared, bits, rate_weight)),
            seconds(lambda: exchange.collect(exchange.submit(exchange.fuse(tensors), "step"), names)),
        )
        for _ in range(repeats)
    ]
    encode, adaptation, fitting, whole = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
    adaptations = sum(Settings().adapts(iteration) for iteration in range(ITERATIONS))
    return {
        "ranks": hvd.size(),
        "coordinates": coordinates,
        "bits": bits,
        "statistics": form,
        "rate_weight": rate_weight,
        "ms_encode": f"{encode:.3g}",
        "ms_adaptation": f"{adaptation:.3g}",
        "ms_fit": f"{fitting:.3g}",
        "ms_exchange": f"{whole:.3g}",
        "adaptation_over_encode": f"{adaptation / encode:.2f}",
        "amortised_percent": f"{100 * adaptations * adaptation / (ITERATIONS * whole):.3f}",
    }


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(sizes: list[int], repeats: int) -> None:
    import horovod.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    origin = provenance()
    rows = [{**origin, **measure(size, case, repeats)} for size in sizes for case in CASES]
    if hvd.rank() == 0:
        append(RESULTS, COLUMNS, rows)
        print(table())


def table() -> str:
    """The newest row of every case, as Markdown."""
    with open(RESULTS, newline="") as file:
        newest = {tuple(row[name] for name in COLUMNS[3:8]): row for row in csv.DictReader(file)}
    shown = COLUMNS[3:]
    lines = [f"| {' | '.join(shown)} |", f"|{'---|' * len(shown)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row[name] for name in shown)} |" for row in newest.values())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest rows and end")
    parser.add_argument("--coordinates", type=int, nargs="+", default=[2_602_372, 16_777_216],
                        help="sizes of the vector (the networks of the paper, and 64 MB)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    if flags.table:
        print(table())
    else:
        run(flags.coordinates, flags.repeats)
