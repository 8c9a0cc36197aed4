"""How far the mean of a two-phase exchange is from the true one, against an allgather's: simulated ranks, real codecs.

    python benchmarks/two_phase_error.py              # writes benchmarks/results/two_phase_error.csv
    python benchmarks/two_phase_error.py --table      # prints the widths that are taken

K vectors of normal numbers, independent or with a correlation of .9 (a common part of 9/10 of the variance). Every
rank's vector is rounded once and averaged: the allgather's mean. That mean is rounded again under levels fitted to an
earlier one, at each width: the two-phase mean. *Ratio* is the root of the squared errors' quotient, over several draws.
The width that `exchange/two_phase.py: fine_bits` takes is marked.
"""

from __future__ import annotations

import argparse
import csv

import torch
from records import ROOT, append, provenance

RESULTS = ROOT / "benchmarks" / "results" / "two_phase_error.csv"
COLUMNS = ["commit", "date", "device", "ranks", "correlation", "bits", "mean_bits", "taken", "error_allgather",
           "error_two_phase", "ratio", "bits_per_coordinate_mean"]  # fmt: skip
NUMEL, DRAWS = 2**17, 4


def vectors(ranks: int, correlation: float, seed: int) -> list[torch.Tensor]:
    """Of K ranks; each coordinate has variance 1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(NUMEL, generator=generator)
    own = (torch.randn(NUMEL, generator=generator) for _ in range(ranks))
    return [correlation**0.5 * common + (1 - correlation) ** 0.5 * one for one in own]


def fitted(settings, tensors):
    """The codec that these settings' fit to some vectors gives."""
    from hvd_qgenx.adaptation import Statistics, fit

    codec = settings.codec()
    parts = [Statistics.measure(codec, [tensor], codec.layout((NUMEL,))) for tensor in tensors]
    return settings.codec(*fit(Statistics.merged(parts), settings.bits))


def allgathered(codec, tensors, step: int) -> torch.Tensor:
    from hvd_qgenx import Key

    return codec.decode_mean([codec.encode(tensor, Key(0, rank, step)) for rank, tensor in enumerate(tensors)])


def measure(ranks: int, correlation: float, bits: int) -> list[dict]:
    """Rows of all widths of the second rounding."""
    from hvd_qgenx import Key
    from hvd_qgenx.adaptation import Settings
    from hvd_qgenx.exchange.two_phase import fine_bits

    first = vectors(ranks, correlation, 0)
    codec = fitted(Settings(bits=bits), first)
    earlier = allgathered(codec, first, 0)
    finer = {width: fitted(Settings(bits=width), [earlier]) for width in range(bits, 9)}
    errors, again, sizes = 0.0, dict.fromkeys(finer, 0.0), dict.fromkeys(finer, 0)
    for step in range(1, DRAWS + 1):
        tensors = vectors(ranks, correlation, step)
        exact, mean = torch.stack(tensors).double().mean(dim=0), allgathered(codec, tensors, step)
        errors += float((mean.double() - exact).square().sum())
        for width, fine in finer.items():
            payload = fine.encode(mean, Key(0, 0, step, 1))
            sizes[width] += len(payload)
            again[width] += float((fine.decode_mean([payload]).double() - exact).square().sum())
    return [
        {
            "ranks": ranks,
            "correlation": correlation,
            "bits": bits,
            "mean_bits": width,
            "taken": int(width == fine_bits(bits, ranks)),
            "error_allgather": f"{errors / DRAWS / NUMEL:.4g}",
            "error_two_phase": f"{again[width] / DRAWS / NUMEL:.4g}",
            "ratio": f"{(again[width] / errors) ** 0.5:.3f}",
            "bits_per_coordinate_mean": f"{8 * sizes[width] / DRAWS / NUMEL:.2f}",
        }
        for width in finer
    ]


def table() -> str:
    """The widths that are taken."""
    with open(RESULTS) as file:
        newest = [row for row in csv.DictReader(file) if row["taken"] == "1"]
    lines = ["| ranks | correlation | bits | bits of the mean | error over allgather's |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['ranks']} | {row['correlation']} | {row['bits']} | {row['mean_bits']} | {row['ratio']} |"
        for row in newest
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the widths that are taken, and end")
    if parser.parse_args().table:
        return print(table())
    when = provenance()
    RESULTS.unlink(missing_ok=True)
    for ranks in (2, 3, 8, 16):
        for correlation in (0.0, 0.9):
            rows = [row for bits in (3, 4, 8) for row in measure(ranks, correlation, bits)]
            append(RESULTS, COLUMNS, [{**when, **row} for row in rows])
            print(f"{ranks} ranks, correlation {correlation}: done", flush=True)
    print(table())


if __name__ == "__main__":
    main()
