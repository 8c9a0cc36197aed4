"""One exchange in parts, as it went: when each rank encoded, waited and decoded.

    horovodrun -np 3 python benchmarks/pipeline.py --trace trace.json       # draws docs/pipeline.png
    python benchmarks/laboratory.py --hosts 3 --rate 1gbit -- python benchmarks/pipeline.py --link "1 Gbit/s"

The ranges are those that torch's profiler has recorded on each rank, read from the Chrome trace that it exports;
chrome://tracing and Perfetto show the same file. Nothing is drawn that was not in it. Ranks must share a clock, so
run them on one machine, or on the laboratory's hosts, which are on one. Of some exchanges the median one is drawn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from records import ROOT, provenance

COLORS = {"encode": "#1b6ca8", "wait": "#d9d9d9", "decode": "#d1495b"}
PREFIX = "hvd_qgenx."


class Range(NamedTuple):
    """Seconds since the epoch."""

    phase: str
    start: float
    end: float


def ranges(trace: dict) -> list[Range]:
    """The library's ranges in a Chrome trace, in their order."""
    origin = trace["baseTimeNanoseconds"] * 1e-9
    found = [
        Range(
            event["name"].removeprefix(PREFIX),
            origin + event["ts"] * 1e-6,
            origin + (event["ts"] + event["dur"]) * 1e-6,
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event["name"].startswith(PREFIX)
    ]
    return sorted(found, key=lambda each: each.start)


def length(ranks: list[list[Range]]) -> float:
    """Seconds from the first range of any rank to the last."""
    return max(own[-1].end for own in ranks) - min(own[0].start for own in ranks)


def record(flags) -> tuple[list[list[list[Range]]], int]:
    """For every exchange the ranges of all ranks, on rank 0; and how many parts an exchange has."""
    import horovod.torch as hvd
    import torch

    from hvd_qgenx.adaptation import Settings
    from hvd_qgenx.exchange import CodedExchange
    from hvd_qgenx.exchange.cost import part_bytes
    from hvd_qgenx.transports.horovod import HorovodTransport

    hvd.init()
    torch.set_num_threads(1)
    settings = Settings(bits=flags.bits, adapt_at=(0,), adapt_every=0)
    size = part_bytes(flags.numel, flags.parts)
    exchange = CodedExchange(settings, HorovodTransport(), plan=flags.plan, part_bytes=size)
    exchange.describe(["pipeline"], [torch.float32], [flags.numel])
    values = torch.randn(flags.numel, generator=torch.Generator().manual_seed(hvd.rank()))
    runs, trace = [], flags.trace if hvd.rank() == 0 else None
    for number in range(flags.warmups + flags.exchanges):
        vector = values.clone()
        hvd.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            parts = average(exchange, vector)
        if number >= flags.warmups:
            runs.append(hvd.allgather_object(ranges(exported(profile, trace)), name="ranges"))
    return (runs if hvd.rank() == 0 else []), parts


def average(exchange, vector) -> int:
    """One exchange; how many parts it had."""
    exchange.settle()
    fused = exchange.fuse([vector])
    exchange.adapt_if_due(fused)
    submitted = exchange.submit(fused, "step")
    exchange.collect(submitted, ["vector"])
    return len(submitted.parts)


def exported(profile, keep: Path | None) -> dict:
    """The Chrome trace, which stays where it is if it has a name."""
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def draw(ranks: list[list[Range]], title: str, path: Path) -> None:
    """A row for each rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.5 * len(ranks)), layout="constrained")
    begin = min(own[0].start for own in ranks)
    for rank, own in enumerate(ranks):
        for phase, color in COLORS.items():
            bars = [(1e3 * (each.start - begin), 1e3 * (each.end - each.start)) for each in own if each.phase == phase]
            axes.broken_barh(bars, (rank - 0.35, 0.7), facecolor=color, edgecolor="white", linewidth=0.6)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=9, loc="left")
    handles = [Patch(color=color, label=phase) for phase, color in COLORS.items()]
    axes.legend(handles=handles, ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--parts", type=int, default=6)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--plan", choices=["allgather", "two_phase"], default="allgather")
    parser.add_argument("--warmups", type=int, default=3, help="the first of them fits levels")
    parser.add_argument("--exchanges", type=int, default=7)
    parser.add_argument("--trace", type=Path, help="keep the Chrome trace of rank 0's last exchange")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pipeline.png")
    parser.add_argument("--link", default="", help="words for the title, such as '1 Gbit/s'")
    flags = parser.parse_args()
    runs, parts = record(flags)
    if not runs:
        return
    ranks = sorted(runs, key=length)[len(runs) // 2]
    title = f"{flags.numel:,} coordinates, {flags.bits} bits, {flags.plan} in {parts} parts"
    draw(ranks, ", ".join(filter(None, [title, flags.link, provenance()["commit"]])), flags.out)
    print(f"{flags.out}: {1e3 * length(ranks):.0f} ms", flush=True)


if __name__ == "__main__":
    main()
