"""What "auto" chooses, over the best of all that it could have chosen, timed in the same run.

    python benchmarks/laboratory.py --hosts 3 --rate 1gbit -- python benchmarks/auto_choice.py --link "1 Gbit/s"
    python benchmarks/auto_choice.py --table

``exchange="auto"`` chooses a plan and a number of parts at 4 bits, ``Compression.auto`` the compression too, each
anew for every vector. Then every way that could have been chosen is timed by turns, each exchange until the slowest
rank is through; the way chosen is the same code with the same settings as the one timed. ``over_best`` is the time of
what was chosen over the least of all.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from functools import partial
from pathlib import Path

from records import ROOT, append, provenance

RESULTS = ROOT / "benchmarks" / "results" / "auto_choice.csv"
COLUMNS = ["commit", "date", "device", "link", "ranks", "coordinates", "asked", "chosen", "parts", "settle_ms",
           "chosen_ms", "best", "best_parts", "best_ms", "over_best"]  # fmt: skip
BITS, PARTS = (8, 4, 3), (1, 2, 4, 8)


def candidates(ranks: int, numel: int) -> list[tuple]:
    """All (compression, bits, plan, parts)."""
    from hvd_qgenx.exchange import PLANS
    from hvd_qgenx.exchange.cost import LEAST_PART_BYTES

    plans = list(PLANS) if ranks > 2 else ["allgather"]
    parts = [count for count in PARTS if count == 1 or 4 * numel >= count * LEAST_PART_BYTES]
    dense = [(name, 0, "allreduce", 1) for name in ("none", "fp16")]
    return dense + [("qgenx", bits, plan, count) for bits in BITS for plan in plans for count in parts]


class Timed:
    """One way to exchange a vector, again and again."""

    def __init__(self, transport, numel: int, compression: str, bits: int, plan: str, parts: int):
        import torch

        from hvd_qgenx.adaptation import Settings
        from hvd_qgenx.automatic import DENSE
        from hvd_qgenx.exchange import CodedExchange, DenseExchange
        from hvd_qgenx.exchange.cost import part_bytes

        if compression == "qgenx":
            settings = Settings(bits=bits, adapt_at=(0,), adapt_every=0)
            self.exchange = CodedExchange(settings, transport, plan=plan, part_bytes=part_bytes(numel, parts))
        else:
            self.exchange = DenseExchange(DENSE[compression], transport)
        self.exchange.describe(["auto_choice"], [torch.float32], [numel])

    def __call__(self, gradient) -> None:
        exchange = self.exchange
        exchange.settle()
        fused = exchange.fuse([gradient])
        exchange.adapt_if_due(fused)
        exchange.collect(exchange.submit(fused, "step"), [""])


def chosen_by_auto(meter, numel: int, asked: str) -> tuple[tuple, float]:
    """What a new optimizer chooses, and how many seconds it takes over that."""
    import torch

    import hvd_qgenx

    compression = hvd_qgenx.Compression.auto if asked == "Compression.auto" else hvd_qgenx.Compression.qgenx(bits=4)
    parameter = torch.nn.Parameter(torch.zeros(numel))
    optimizer = hvd_qgenx.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), compression=compression)
    seconds = meter.seconds(optimizer._exchange.settle)
    choice = {"compression": "qgenx", "bits": 4, "part_bytes": 0, **optimizer._exchange.chosen}
    parts = round(4 * numel / choice["part_bytes"] + 0.499) if choice["part_bytes"] else 1
    return (choice["compression"], choice["bits"], choice["plan"], parts), seconds


def time_all(transport, meter, numel: int, ways: list[tuple], rounds: int) -> dict[tuple, float]:
    """Median seconds of each way; they take turns."""
    import torch

    values = torch.randn(numel, generator=torch.Generator().manual_seed(transport.rank))
    gradient, times = torch.empty(numel), {way: [] for way in ways}
    for way in ways:
        timed = Timed(transport, numel, *way)
        for _ in range(rounds + 2):
            gradient.copy_(values)
            times[way].append(meter.seconds(partial(timed, gradient)))
    return {way: statistics.median(own[2:]) for way, own in times.items()}


def rows_of(transport, meter, numel: int, link: str, choices: int, rounds: int) -> list[dict]:
    asked = ["exchange=auto, 4 bits", "Compression.auto"] * choices
    chosen = [(name, *chosen_by_auto(meter, numel, name)) for name in asked]
    ways = candidates(transport.size, numel)
    ways += [way for way in dict.fromkeys(way for _, way, _ in chosen) if way not in ways]
    times = time_all(transport, meter, numel, ways, rounds)
    if transport.rank == 0:
        print(*(f"{name_of(way)} in {way[3]}: {1e3 * t:.4g} ms" for way, t in times.items()), sep="\n", flush=True)
    return [row_of(transport.size, numel, link, name, way, seconds, times) for name, way, seconds in chosen]


def row_of(ranks: int, numel: int, link: str, asked: str, way: tuple, seconds: float, times: dict) -> dict:
    eligible = times if asked == "Compression.auto" else {one: t for one, t in times.items() if one[1] == 4}
    best = min(eligible, key=eligible.get)
    return {
        "link": link, "ranks": ranks, "coordinates": numel, "asked": asked, "chosen": name_of(way), "parts": way[3],
        "settle_ms": f"{1e3 * seconds:.3g}", "chosen_ms": f"{1e3 * times[way]:.4g}", "best": name_of(best),
        "best_parts": best[3], "best_ms": f"{1e3 * times[best]:.4g}", "over_best": f"{times[way] / times[best]:.3f}",
    }  # fmt: skip


def name_of(way: tuple) -> str:
    compression, bits, plan, _ = way
    return f"{compression} {bits} bits by {plan}" if bits else compression


def table() -> str:
    names = ("link", "ranks", "coordinates", "asked", "chosen", "parts", "chosen_ms", "best", "best_parts", "best_ms",
             "over_best")  # fmt: skip
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    with open(RESULTS) as file:
        lines += ["| " + " | ".join(row[name] for name in names) + " |" for row in csv.DictReader(file)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="loopback", help="what joins the ranks, for the table")
    parser.add_argument("--numel", type=int, nargs="+", default=[2_500_000, 25_000_000])
    parser.add_argument("--choices", type=int, default=2, help="how often each is asked")
    parser.add_argument("--rounds", type=int, default=5, help="exchanges of every way")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows and end")
    flags = parser.parse_args()
    print(table()) if flags.table else run(flags)


def run(flags) -> None:
    import horovod.torch as hvd
    import torch

    from hvd_qgenx.communication import Communication
    from hvd_qgenx.exchange.measurement import Meter
    from hvd_qgenx.exchange.message import Messenger
    from hvd_qgenx.transports.horovod import HorovodTransport

    hvd.init()
    torch.set_num_threads(1)
    transport = HorovodTransport()
    meter = Meter(Messenger(transport, Communication()), 0)
    for numel in flags.numel:
        rows = rows_of(transport, meter, numel, flags.link, flags.choices, flags.rounds)
        if hvd.rank() == 0:
            append(flags.results, COLUMNS, [{**provenance(), **row} for row in rows])
            print("\n".join(map(str, rows)), flush=True)


if __name__ == "__main__":
    main()
