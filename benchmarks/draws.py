"""The codec's random draws as a stream of bytes, for a test battery to read.

    python benchmarks/draws.py position | dieharder -g 200 -a     # along one vector
    python benchmarks/draws.py step | dieharder -g 200 -a         # at one place, from one exchange to the next
    python benchmarks/draws.py --battery                          # runs TESTS on both and writes results/draws.csv

The stream is that of 32-bit hashes of docs/wire_format.md, written once more in NumPy; tests/test_quantize.py holds the
reference to the same formula. Every hash serves two draws, its halves
swapped in one of them.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "draws.csv"
COLUMNS = ["commit", "date", "device", "stream", "test", "name", "tuple", "samples", "trials", "p_value", "assessment"]
TESTS = [0, 1, 2, 3, 8, 9, 11, 12, 13, 15, 16, 100, 101, 102]
BLOCK = 2**20


def hashes(counters: np.ndarray, word0: np.ndarray, word1: np.ndarray) -> np.ndarray:
    """uint32[n] of the mixer lowbias32 with two key words."""
    x = counters + word0
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = ((x ^ x >> 15) + word1) * np.uint32(0x846CA68B)
    return x ^ x >> 16


def by_position() -> Iterator[np.ndarray]:
    """Along vectors of 2**30 coordinates."""
    from hvd_qgenx import Key

    for step in range(2**32):
        word0, word1 = np.array(Key(0, 0, step).pair, dtype=np.uint32)
        for first in range(0, 2**29, BLOCK):
            yield hashes(np.arange(first, first + BLOCK, dtype=np.uint32), word0, word1)


def by_step() -> Iterator[np.ndarray]:
    """The first hash of consecutive exchanges."""
    from hvd_qgenx import Key

    for first in range(0, 2**62, BLOCK // 8):
        words = [Key(0, 0, step).pair for step in range(first, first + BLOCK // 8)]
        word0, word1 = np.array(words, dtype=np.uint32).T
        yield hashes(np.zeros(len(words), dtype=np.uint32), word0, word1)


STREAMS = {"position": by_position, "step": by_step}


def write(stream: str) -> None:
    try:
        for block in STREAMS[stream]():
            sys.stdout.buffer.write(block.tobytes())
    except BrokenPipeError:
        sys.stderr.close()  # the reader has had enough


def battery() -> None:
    from records import provenance

    origin, rows = provenance(), []
    for stream in STREAMS:
        for test in TESTS if stream == "position" else TESTS[-3:]:  # keys are mixed in Python, slowly
            command = f"{sys.executable} {__file__} {stream} 2>/dev/null | dieharder -g 200 -d {test}"
            printed = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
            found = [[part.strip() for part in line.split("|")] for line in printed.splitlines()]
            for name, *numbers in (row for row in found if len(row) == 6 and row[0] != "test_name"):
                values = [stream, test, name, *numbers]
                rows.append({**origin, **dict(zip(COLUMNS[3:], values, strict=True))})
                print(" ".join(map(str, values)), flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", nargs="?", choices=STREAMS)
    parser.add_argument("--battery", action="store_true", help="needs dieharder (a Debian package)")
    flags = parser.parse_args()
    battery() if flags.battery else write(flags.stream or "position")
