"""Levels and gradients that change in the middle of a run: ten drills, and the table of docs/levels.md.

    python benchmarks/drills.py             # writes benchmarks/results/drills.csv and prints the table
    python benchmarks/drills.py --table     # prints the table of the rows that are there

Two ranks' gradients, in one process: what they would send is drawn, but does not travel. The same drills go through
exchanges in ``tests/parallel/check_drift.py``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from records import provenance
from torch import Tensor

from hvd_qgenx import Codec, Key
from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.backends.specification.rounding import Buckets, bucket_norms, magnitudes, reals
from hvd_qgenx.drift import Drift, Sums
from hvd_qgenx.layout import Layout

RESULTS = Path(__file__).resolve().parent / "results" / "drills.csv"
COLUMNS = ["commit", "date", "device", "drill", "bits", "refits", "at_change", "fifth", "new"]
BITS = (3, 4, 8)
RANKS = 2
CHANGE = 6  # the first iteration whose gradients are those after the change
NUMEL = 2**17
FIFTH = CHANGE + 4


def normal(generator):
    return torch.randn(NUMEL, generator=generator)


def zeros(generator):
    return torch.zeros(NUMEL)


def one_hot(generator):
    vector = torch.zeros(NUMEL)
    vector[int(torch.randint(NUMEL, (1,), generator=generator))] = 3.0
    return vector


def one_per_bucket(generator):
    rows = torch.zeros(NUMEL // 1024, 1024)
    rows[:, 7] = torch.randn(len(rows), generator=generator)
    return rows.view(-1)


def constant(generator):
    return torch.full((NUMEL,), 0.01)


def sparse(generator):
    return normal(generator) * (torch.rand(NUMEL, generator=generator) < 0.05)


def heavy_tailed(generator):
    return normal(generator) ** 5


#: before and after the change
DRILLS = {
    "zeros, then normal": (zeros, normal),
    "one-hot, then normal": (one_hot, normal),
    "one per bucket, then normal": (one_per_bucket, normal),
    "constant, then normal": (constant, normal),
    "sparse, then normal": (sparse, normal),
    "normal, then sparse": (normal, sparse),
    "normal, then constant": (normal, constant),
    "normal, then heavy-tailed": (normal, heavy_tailed),
    "normal, ten times larger at each step": (normal, normal),
    "normal, then one rank a million times smaller": (normal, normal),
}


def gradient(drill: str, rank: int, iteration: int) -> torch.Tensor:
    """That of one rank."""
    generator = torch.Generator().manual_seed(1000 * iteration + rank)
    vector = DRILLS[drill][iteration >= CHANGE](generator)
    if "ten times" in drill:
        return vector * 10.0 ** (iteration - 15)
    return vector * 1e-6 if "million" in drill and iteration >= CHANGE and rank == 1 else vector


def exact_error(codec: Codec, vector: Tensor) -> tuple[float, float]:
    """E||Q(v) - v||^2 under the codec's levels, and ||v||^2, in float64."""
    buckets = Buckets.cut(Layout((len(vector),), codec.min_numel, codec.bucket_size))
    norms = bucket_norms(vector, buckets, codec.norm)
    table = reals(codec.levels.values)
    u = magnitudes(vector, norms, buckets.bucket_of)
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp_(max=len(table) - 2)
    low, high, u = table[lower].double(), table[lower + 1].double(), u.double()
    error = norms.double().square()[buckets.bucket_of] * ((u - low) * (high - u)).clamp(min=0.0)
    return float(error.sum()), float(vector.double().square().sum())


def variance(codec: Codec, vectors: Sequence[Tensor]) -> float:
    """The relative variance of all ranks' vectors, in expectation."""
    errors, norms = zip(*(exact_error(codec, vector) for vector in vectors), strict=True)
    return sum(errors) / sum(norms)


def refitted(settings: Settings, vectors: Sequence[Tensor]) -> Codec | None:
    """The codec of levels fitted to these vectors of all ranks; None if there is nothing to fit to."""
    codec = settings.codec()
    parts = [Statistics.measure(codec, [vector], codec.layout((len(vector),))) for vector in vectors]
    fitted = fit(Statistics.merged(parts), settings.bits)
    return settings.codec(*fitted) if fitted else None


def run(drill: str, bits: int) -> dict:
    """A drill as an exchange would go through it."""
    settings, drift, refits = Settings(bits=bits), Drift(), -1
    codec, found = settings.codec(), {}
    for iteration in range(FIFTH + 1):
        vectors = [gradient(drill, rank, iteration) for rank in range(RANKS)]
        if iteration == 0 or drift.refit:
            drift.wait()
            if new := refitted(settings, vectors):
                codec, refits = new, refits + 1
                drift.start()
        drift.observe("step", _sums(codec, vectors, iteration), codec, iteration + 1, refits >= 0)
        if iteration in (CHANGE, FIFTH):
            found[iteration] = variance(codec, vectors)
    best = variance(refitted(settings, vectors), vectors)
    rows = [drill, bits, refits, *(f"{value:.3g}" for value in (found[CHANGE], found[FIFTH], best))]
    return dict(zip(COLUMNS[3:], rows, strict=True))


def _sums(codec: Codec, vectors: Sequence[Tensor], iteration: int) -> Sums:
    layout = codec.layout((NUMEL,))
    out = torch.empty(codec.bound(NUMEL), dtype=torch.uint8)
    keys = [Key(0, rank, iteration) for rank in range(RANKS)]
    drawn = [codec.encode_segments([one], layout, key, out) for one, key in zip(vectors, keys, strict=True)]
    return Sums.total(Sums.of(codec, one) for one in drawn)


def table() -> str:
    """Markdown."""
    with open(RESULTS, newline="") as file:
        found = {(row["drill"], int(row["bits"])): row for row in csv.DictReader(file)}
    head = " | ".join(f"{bits} bits" for bits in BITS)
    lines = [f"| gradients | {head} |", "|---|" + "---|" * len(BITS)]
    for drill in DRILLS:
        rows = [found[drill, bits] for bits in BITS]
        cells = [" / ".join(row[name] for name in COLUMNS[6:]) for row in rows]
        lines.append(f"| {drill} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write() -> None:
    torch.set_num_threads(1)
    origin = provenance()
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for drill in DRILLS:
            for bits in BITS:
                writer.writerow({**origin, **run(drill, bits)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there and end")
    if not parser.parse_args().table:
        write()
    print(table())
