"""How long an exchange takes under DistributedDataParallel: its own allreduce, torch's hooks, and this package's.

    python benchmarks/ddp_time.py --rate 1gbit --model matrix:5000x5000     # as root: one exchange of 25 million
    python benchmarks/ddp_time.py --rate 100mbit --model resnet18           # whole iterations on CIFAR-10's shapes
    python benchmarks/ddp_time.py --rate loopback --model matrix:500x500    # needs no root
    python benchmarks/ddp_time.py --table                                   # Markdown from the newest rows

Hosts are those of benchmarks/laboratory.py; they share this machine's cores. All methods take turns in one run, after
warm-ups in which levels are fitted, PowerSGD has left its dense phase, and DDP has cut its buckets anew. "noop" gives
every bucket back as it is: what it takes is taken off the others', and the rest is called communication. A matrix has
its gradient already, so an iteration is little else; ResNet-18's are computed from random pictures.

The relative error is that of the mean of one exchange, ||mean - true mean||^2 / ||true mean||^2; PowerSGD carries
its own into the next, which this does not show. Bytes on the link are what eth0 has sent, acknowledgements included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from laboratory import LaboratoryError, laboratory, obstacle
from records import ROOT, append, provenance

METHODS = ["noop", "allreduce", "fp16", "powersgd_2", "qgenx_4/allgather", "qgenx_4/two_phase"]
RESULTS = ROOT / "benchmarks" / "results" / "ddp_time.csv"
COLUMNS = ["commit", "date", "device", "rate", "hosts", "model", "numel", "method", "samples", "ms_median", "ms_p10",
           "ms_p90", "communication_ms", "allreduce_over_this", "allreduce_over_this_whole", "link_bytes",
           "bits_per_coordinate", "relative_error", "cpu_ms", "codec_ms", "own_cpu_over_codec"]  # fmt: skip
CELL = ("rate", "hosts", "model")
PORT = "29517"


def launch(command: list[str], flags) -> bool:
    """Runs the command on every host; says whether all ranks came through."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(flags.hosts),
           "MASTER_PORT": PORT}  # fmt: skip
    if flags.rate == "loopback":
        local = {**env, "MASTER_ADDR": "127.0.0.1"}
        ranks = [subprocess.Popen(command, env={**local, "RANK": str(rank)}) for rank in range(flags.hosts)]
        codes = [rank.wait() for rank in ranks]  # of all, also if one has failed
        return not any(codes)
    with laboratory(flags.hosts, flags.rate) as lab:
        env |= {"MASTER_ADDR": lab.hosts[0].address, "GLOO_SOCKET_IFNAME": "eth0"}
        return not any(done.returncode for done in lab.everywhere(command, env=env))


def measure(flags) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        job = {"model": flags.model, "methods": flags.methods, "rounds": flags.rounds, "warmups": flags.warmups,
               "batch": flags.batch, "width": flags.width, "out": str(out)}  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "ddp_rank.py"), json.dumps(job)]
        if not launch(command, flags) or not out.exists():
            raise SystemExit("a rank failed, see above")
        return rows_of(json.loads(out.read_text()), flags)


def rows_of(report: dict, flags) -> list[dict]:
    """A row for each method."""
    median = {found["method"]: statistics.median(found["ms"]) for found in report["results"]}
    cpu = {found["method"]: statistics.median(found["cpu_ms"]) for found in report["results"]}
    about = {"rate": flags.rate, "hosts": flags.hosts, "model": flags.model, "numel": report["numel"]}
    return [about | row_of(found, report["codec_ms"], median, cpu) for found in report["results"]]


def row_of(found: dict, codec_ms: float, median: dict, cpu: dict) -> dict:
    method = found["method"]
    samples, communication = sorted(found["ms"]), median[method] - median["noop"]
    coded = "bits_per_coordinate" in found
    row = {
        "ms_median": median[method],
        "ms_p10": samples[len(samples) // 10],
        "ms_p90": samples[-1 - len(samples) // 10],
        "communication_ms": communication,
        "allreduce_over_this": (median["allreduce"] - median["noop"]) / communication if communication > 0 else None,
        "allreduce_over_this_whole": median["allreduce"] / median[method],
        "link_bytes": found["link_bytes"] or None,
        "bits_per_coordinate": found.get("bits_per_coordinate"),
        "relative_error": found["error"] if method != "noop" else None,
        "cpu_ms": cpu[method],
        "codec_ms": codec_ms if coded else None,
        "own_cpu_over_codec": (cpu[method] - cpu["noop"]) / codec_ms if coded else None,
    }
    written = {name: "" if value is None else f"{value:.4g}" for name, value in row.items()}
    return {"method": method, "samples": len(samples), **written}


def table() -> str:
    """Of every cell the newest rows."""
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {tuple(row[name] for name in (*CELL, "method")): row for row in rows}
    parts = []
    for cell, found in groupby(newest.values(), key=lambda row: tuple(row[name] for name in CELL)):
        parts.append(markdown(cell, list(found)))
    return "\n\n".join(parts)


def markdown(cell: tuple, rows: list[dict]) -> str:
    lines = [f"{cell[2]}, {cell[1]} hosts, {cell[0]}", ""]
    head = ["method", "ms", "communication ms", "allreduce / this", "MB on a link", "relative error", "CPU / codec's"]
    lines += [f"| {' | '.join(head)} |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        link = f"{float(row['link_bytes']) / 1e6:.1f}" if row["link_bytes"] else ""
        cells = [row[name] for name in ("method", "ms_median", "communication_ms", "allreduce_over_this")]
        lines.append(f"| {' | '.join([*cells, link, row['relative_error'], row['own_cpu_over_codec']])} |")
    return "\n".join(lines)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the newest rows, and end")
    parser.add_argument("--rate", default="1gbit", help="as tc writes it, or loopback")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--model", default="matrix:5000x5000", help="resnet18, or one of benchmarks/shapes.py")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmups", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="pictures of a rank, for resnet18")
    parser.add_argument("--width", type=int, default=64, help="channels of resnet18's first stage")
    parser.add_argument("--results", type=Path, default=RESULTS)
    flags = parser.parse_args()
    flags.methods = list(dict.fromkeys(["noop", "allreduce", *flags.methods]))
    return flags


def main() -> None:
    flags = parsed()
    if flags.table:
        print(table())
        return
    if flags.rate != "loopback" and (reason := obstacle()):
        raise SystemExit(reason)
    try:
        rows = [provenance() | row for row in measure(flags)]
    except LaboratoryError as error:
        raise SystemExit(str(error)) from None
    append(flags.results, COLUMNS, rows)
    print(markdown((flags.rate, flags.hosts, flags.model), rows))


if __name__ == "__main__":
    main()
