"""How long an exchange takes, on links of several rates, beside stock Horovod's and what the wire alone would take.

    python benchmarks/exchange_time.py                     # as root: the small grid; appends to exchange_time.csv
    python benchmarks/exchange_time.py --full              # rates, hosts and models of the whole grid: many hours
    python benchmarks/exchange_time.py --rates loopback --hosts 3 --models vector:10000     # needs no root
    python benchmarks/exchange_time.py --table --rates 1gbit --hosts 3      # Markdown from the newest rows, and plots

Every step is one exchange of fixed gradients (normal numbers, others on every rank) by an optimizer that moves nothing:
with ``--modes step`` gradients are set and ``step()`` is timed, with ``backward`` a backward pass of one product for
each parameter goes before it, in which hooks fire. All methods take turns in one run (more runs, each with stock
Horovod's float32, if memory does not hold them all), after warm-ups in which levels are fitted once. A step lasts until
its slowest rank is through. Before anything is timed, every method's mean is compared with the true one.

Hosts are those of benchmarks/laboratory.py. **They share this machine's cores**: what is computed for an exchange, the
codec's work above all, takes as many times longer as there are hosts for each core, and counts against whoever
computes more. The wire bound is that of a rate without headers, from the bytes handed to collectives: a ring allreduce
of B bytes puts 2 (K - 1) / K B of every host on its link, an allgather (K - 1) B, an alltoall (K - 1) / K B. A link's
bucket lets 256 KiB through at once, so what is not many times larger can be faster than its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from exchange_table import LOOPBACK, brief_table, newest, plot, summary, table
from laboratory import LaboratoryError, bits_per_second, horovodrun, laboratory, obstacle
from records import ROOT, append, provenance
from shapes import count, shapes_of

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ["commit", "date", "device", "rate", "hosts", "model", "mode", "numel", "num_parameters", "method", "plan",
           "samples", "ms_median", "ms_p10", "ms_p90", "cpu_ms", "codec_ms", "bytes_sent", "bits_per_coordinate",
           "link_bytes", "link_bytes_measured", "wire_ms", "fp16_wire_ms", "float32_over_this", "this_over_wire",
           "cpu_over_codec", "cpu_beyond_codec_us_per_parameter"]  # fmt: skip
SMALL = {"rates": ["1gbit"], "hosts": [3], "models": ["wgan:128", "resnet50"]}
FULL = {
    "rates": ["100mbit", "1gbit", "10gbit"],
    "hosts": [2, 3, 4, 8],
    "models": ["wgan:20", "wgan:128", "resnet50", "vector:25000000", "vector:100000000"],
}
#: On loopback: what an exchange costs that is all overhead, and what many small parameters cost.
EXTRA = [("loopback", 3, "vector:10000"), ("loopback", 2, "equal:500x2000")]
MODES = ("step", "backward")
BASE = "stock_float32/allreduce"

# Memory of a job, in float32 vectors of the model's length on every rank: gradients, where they are set, their product,
# the codec's own, the true mean; and what a method keeps, at most.
SHARED_VECTORS, VECTORS_OF_A_METHOD = 8, 1.25
BYTES_OF_A_PROCESS = 400e6

#: Of every host's bytes handed to a collective, those that pass its link; K hosts.
ON_LINK = {
    "allreduce": lambda hosts: 2 * (hosts - 1) / hosts,
    "allgather": lambda hosts: hosts - 1,
    "alltoall": lambda hosts: (hosts - 1) / hosts,
    "reducescatter": lambda hosts: (hosts - 1) / hosts,
    "broadcast": lambda hosts: 1,
}


@dataclass(frozen=True)
class Cell:
    """What the figures of one table have in common."""

    rate: str
    hosts: int
    model: str
    mode: str

    def __str__(self) -> str:
        return f"{self.rate}, {self.hosts} hosts, {self.model}, {self.mode}"


# ---- running ---------------------------------------------------------------------------------------------------------


def run(grid: Iterable[tuple[str, int, str]], flags) -> int:
    """Measures every cell and appends its rows at once; returns how many failed or did not fit."""
    origin, found, failures = provenance(), [], 0
    for (rate, hosts), cells in groupby(grid, key=lambda cell: cell[:2]):
        with launcher(rate, hosts) as launch:
            for cell in [Cell(*names, mode) for names in cells for mode in flags.modes]:
                rows = [{**origin, **row} for row in measure(cell, launch, flags)]
                failures += not rows
                append(flags.results / "exchange_time.csv", COLUMNS, rows)
                print(table(rows) if rows else f"{cell}: no rows", flush=True)
                found += rows
    print("\n".join([*summary(found), f"{len(found)} rows in {flags.results / 'exchange_time.csv'}"]))
    return failures


@contextlib.contextmanager
def launcher(rate: str, hosts: int) -> Iterator:
    """A function that runs a command on every host."""
    if rate != LOOPBACK:
        print(f"{hosts} hosts, links of {rate}", flush=True)
        with laboratory(hosts, rate) as lab:
            yield lab.run
        return
    start = [horovodrun(), "--gloo", "-np", str(hosts)]
    yield lambda command, env: subprocess.run([*start, *command], env=env, stdin=subprocess.DEVNULL)


def measure(cell: Cell, launch, flags) -> list[dict]:
    """The rows of one cell, from as many jobs as memory asks for; none if one of them failed."""
    rows: dict[str, dict] = {}
    numel = count(shapes_of(cell.model))
    for labels in split(flags.methods, room_for(cell.hosts, numel)):
        if (report := work(cell, labels, launch, flags)) is None:
            return []
        for row in rows_of(cell, report):
            rows.setdefault(f"{row['method']}/{row['plan']}", row)  # of the method that is in all jobs, the first's
    if not rows:
        print(f"{cell}: memory does not hold {cell.hosts} ranks with gradients of {4 * numel / 1e9:.1f} GB each")
    return list(rows.values())


def work(cell: Cell, labels: list[str], launch, flags) -> dict | None:
    """One job; what rank 0 wrote, or None with a sentence if a rank failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        job = {"model": cell.model, "mode": cell.mode, "labels": labels, "on_link": cell.rate != LOOPBACK,
               "rounds": flags.rounds, "warmups": flags.warmups, "seconds": flags.seconds, "out": str(out)}  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "exchange_rank.py"), json.dumps(job)]
        done = launch(command, env=environment())
        if done.returncode or not out.exists():
            print(f"{cell}: a rank failed, see above", file=sys.stderr)
            return None
        return json.loads(out.read_text())


def environment() -> dict:
    """This checkout's package, and one thread a rank."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def room_for(hosts: int, numel: int) -> int:
    """How many methods memory holds beside each other."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    vectors = (free / hosts - BYTES_OF_A_PROCESS) / (4 * numel)
    return int((vectors - SHARED_VECTORS) / VECTORS_OF_A_METHOD)


def split(labels: list[str], room: int) -> list[list[str]]:
    """Groups of at most ``room`` methods, the one that all are compared with in each."""
    others = [label for label in labels if label != BASE]
    if room < min(2, len(labels)):
        return []
    size = max(room - 1, 1)
    return [[BASE, *others[start : start + size]] for start in range(0, max(len(others), 1), size)]


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_of(cell: Cell, report: dict) -> list[dict]:
    """A row for each method of a job."""
    base = next(result for result in report["results"] if result["label"] == BASE)
    return [row_of(cell, report, result, statistics.median(base["milliseconds"])) for result in report["results"]]


def row_of(cell: Cell, report: dict, result: dict, float32: float) -> dict:
    method, plan = result["label"].split("/")
    median, cpu = statistics.median(result["milliseconds"]), statistics.median(result["cpu"])
    codec = statistics.median(result["codec"]) if result["codec"] else None
    link = sum(size * ON_LINK[kind](cell.hosts) for kind, size in result["handed"].items())
    sent, half = sum(result["handed"].values()), 2 * report["numel"] * ON_LINK["allreduce"](cell.hosts)
    wire, half_wire = wire_ms(cell.rate, link), wire_ms(cell.rate, half)
    found = {
        "samples": len(result["milliseconds"]),
        "ms_median": median,
        "ms_p10": percentile(result["milliseconds"], 0.1),
        "ms_p90": percentile(result["milliseconds"], 0.9),
        "cpu_ms": cpu,
        "codec_ms": codec,
        "bytes_sent": round(sent),
        "bits_per_coordinate": 8 * sent / report["numel"],
        "link_bytes": round(link),
        "link_bytes_measured": round(statistics.median(result["on_link"])) if result["on_link"] else None,
        "wire_ms": wire,
        "fp16_wire_ms": half_wire,
        "float32_over_this": float32 / median,
        "this_over_wire": wire and median / wire,
        "cpu_over_codec": codec and cpu / codec,
        "cpu_beyond_codec_us_per_parameter": codec and 1e3 * (cpu - codec) / report["num_parameters"],
    }
    about = {"numel": report["numel"], "num_parameters": report["num_parameters"], "method": method, "plan": plan}
    return {**asdict(cell), **about, **{name: written(value) for name, value in found.items()}}


def wire_ms(rate: str, size: float) -> float | None:
    return None if rate == LOOPBACK else 8e3 * size / bits_per_second(rate)


def percentile(samples: list[float], share: float) -> float:
    """Between the two nearest samples, in proportion."""
    ordered, place = sorted(samples), share * (len(samples) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def written(value: float | int | None) -> str | int:
    """Four digits of what was measured; counts as they are."""
    return "" if value is None else value if isinstance(value, int) else f"{value:.4g}"


# ---- flags -----------------------------------------------------------------------------------------------------------


def labels_of(names: list[str] | None) -> list[str]:
    """The labels that begin with one of these names, and the one that all are compared with; None is all."""
    sys.path.insert(0, str(ROOT))  # this checkout's package, as the ranks will have it
    from exchange_methods import methods

    known = list(methods())
    for name in names or []:
        if not any(label.startswith(name) for label in known):
            raise SystemExit(f"--methods: {name!r} begins none of {', '.join(known)}")
    return [label for label in known if label == BASE or not names or label.startswith(tuple(names))]


def chosen(rows: list[dict], flags) -> list[dict]:
    """The rows that the flags name; a flag that is not given names all."""
    wanted = {"rate": flags.rates, "hosts": flags.hosts, "model": flags.models, "mode": flags.modes}
    wanted = {name: list(map(str, values)) for name, values in wanted.items() if values}
    found = [row for row in rows if all(row[name] in values for name, values in wanted.items())]
    starts = tuple(flags.methods or [""])
    return [row for row in found if f"{row['method']}/{row['plan']}".startswith(starts)]


def grid_of(flags) -> list[tuple[str, int, str]]:
    """Rate, hosts and model of every cell; those of a laboratory follow each other."""
    preset = FULL if flags.full else SMALL
    rates, hosts, models = (getattr(flags, name) or preset[name] for name in ("rates", "hosts", "models"))
    cells = [(rate, count_, model) for count_ in hosts for rate in rates for model in models]
    return cells + ([] if flags.rates or flags.hosts or flags.models else EXTRA)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the newest rows, draw them, and end")
    parser.add_argument("--brief", action="store_true", help="with --table: a line for each cell, for 4 bits")
    parser.add_argument("--full", action="store_true", help=f"instead of the small grid: {FULL}")
    parser.add_argument("--rates", nargs="+", help="as tc writes them, or loopback")
    parser.add_argument("--hosts", nargs="+", type=int)
    parser.add_argument("--models", nargs="+", help="wgan:WIDTH, resnet50, vector:N, equal:COUNTxN")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what is timed")
    parser.add_argument("--methods", nargs="+", help="beginnings of method/plan")
    parser.add_argument("--rounds", type=int, default=10, help="two steps of every method each")
    parser.add_argument("--warmups", type=int, default=3, help="steps of every method before anything is timed")
    parser.add_argument("--seconds", type=float, default=600, help="after which a job ends if two rounds are through")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV and the plots")
    return parser.parse_args()


def main() -> int:
    flags, failures = parsed(), 0
    if flags.table:
        print((brief_table if flags.brief else table)(chosen(newest(flags.results), flags)))
    else:
        grid = grid_of(flags)
        if any(rate != LOOPBACK for rate, _, _ in grid) and (reason := obstacle()):
            raise SystemExit(reason)
        flags.methods = labels_of(flags.methods)
        try:
            failures = run(grid, flags)
        except LaboratoryError as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            return 130
    plot(newest(flags.results), flags.results)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
