"""Variance and bits of uniform, exponential and fitted levels on normal vectors: the table of docs/levels.md.

python benchmarks/levels_table.py             # writes benchmarks/results/levels_table.csv and prints the table
python benchmarks/levels_table.py --table     # prints the table of the rows that are there
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from records import provenance

RESULTS = Path(__file__).resolve().parent / "results" / "levels_table.csv"
COLUMNS = ["commit", "date", "device", "bucket", "norm", "bits", "levels", "relative_variance", "bits_per_coordinate"]
CASES = [(1024, "l2", 3), (1024, "l2", 4), (1024, "l2", 8), (1024, "linf", 3), (1024, "linf", 4), (1024, "linf", 8),
         (8192, "l2", 3)]  # fmt: skip
KINDS = ("uniform", "exponential", "fitted")


def measure(bucket: int, norm: str, bits: int) -> dict[str, tuple[float, float]]:
    """(relative variance, bits per coordinate) of each kind on 2**20 normal numbers, both in expectation.

    Bits are those of a Huffman code made for the magnitudes that occur, a sign for each non-zero and 32 bits a bucket.
    """
    from hvd_qgenx import Levels
    from hvd_qgenx.backends.specification import rounding

    v = torch.randn(2**20 // bucket, bucket, generator=torch.Generator().manual_seed(0))
    norms = v.norm(dim=1, keepdim=True) if norm == "l2" else v.abs().amax(dim=1, keepdim=True)
    u, squares = (v.abs() / norms).clamp(max=1.0), norms.double().square()
    units = (squares / squares.max() * 2**20).long().expand_as(u).reshape(-1)
    fitted = Levels.fitted(rounding.histogram(u.view(-1), units).tolist(), bits)
    tables = (Levels.uniform(bits), Levels.exponential(bits), fitted)
    relative = squares / v.double().square().sum(1, keepdim=True)
    return {kind: _expected(table, u.double(), relative, bucket) for kind, table in zip(KINDS, tables, strict=True)}


def _expected(levels, u: torch.Tensor, relative: torch.Tensor, bucket: int) -> tuple[float, float]:
    from hvd_qgenx.words import huffman_lengths

    table = torch.tensor(levels.values, dtype=torch.float64)
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp(max=levels.num_levels - 1)
    low, high = table[lower], table[lower + 1]
    variance = float((relative * ((high - u) * (u - low)).sum(1, keepdim=True)).mean())
    up, lower = ((u - low) / (high - low)).view(-1), lower.view(-1)
    shares = torch.zeros(len(table), dtype=torch.float64).index_add_(0, lower, 1.0 - up).index_add_(0, lower + 1, up)
    seen = [(index > 0, share) for index, share in enumerate((shares / len(up)).tolist()) if share]
    lengths = huffman_lengths([round(share * 2**40) for _, share in seen])
    words = sum(share * (length + signed) for (signed, share), length in zip(seen, lengths, strict=True))
    return variance, words + 32.0 / bucket


def run() -> None:
    torch.set_num_threads(1)
    origin = provenance()
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in CASES:
            for kind, (variance, length) in measure(*case).items():
                row = dict(zip(COLUMNS[3:7], [*case, kind], strict=True))
                row |= {"relative_variance": f"{variance:.3g}", "bits_per_coordinate": f"{length:.2f}"}
                writer.writerow({**origin, **row})


def table() -> str:
    """Markdown."""
    with open(RESULTS, newline="") as file:
        found = {tuple(row[name] for name in COLUMNS[3:7]): row for row in csv.DictReader(file)}
    lines = ["| bucket, norm | bits | uniform | exponential | fitted |", "|---|---|---|---|---|"]
    for bucket, norm, bits in CASES:
        rows = [found[str(bucket), norm, str(bits), kind] for kind in KINDS]
        cells = [f"{row['relative_variance']} / {row['bits_per_coordinate']}" for row in rows]
        lines.append(f"| {bucket}, {'L2' if norm == 'l2' else 'L-infinity'} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of the rows that are there and end")
    if not parser.parse_args().table:
        run()
    print(table())
