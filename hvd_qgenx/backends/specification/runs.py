"""Runs of elements that have no word, between those that end a run: Golomb-Rice's words of their lengths, or Elias'.

``kind`` is "rice" or "omega"; ``counts`` are the elements of each bucket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_qgenx.backends.specification.planes import Reader
from hvd_qgenx.backends.specification.rounding import integers
from hvd_qgenx.words import RICE_BITS, CodeError, elias_omega, rice_parameter


def _rice(run: int, k: int) -> str:
    """run >> k zeros, a one, then the k low bits, lowest first. Source: Golomb (1966), Rice (1979)."""
    return "0" * (run >> k) + "1" + "".join(str(run >> bit & 1) for bit in range(k))


def _last_rice(run: int, k: int) -> str:
    """The run up to a bucket's end: ceil(run / 2**k) zeros, with which no shorter run begins."""
    return "0" * -(-run >> k)


def run_plane(kind: str, ends: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The runs before each element that ends one, and before a bucket's end unless such an element is its last."""
    owners: list[int] = []
    bits: list[int] = []
    for bucket, part in enumerate(ends.split(counts)):
        places = part.nonzero().view(-1).tolist()
        runs = [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
        # A bucket that ends in a non-zero has no last run: its end is known.
        left = len(part) - 1 - (places[-1] if places else -1)
        text = _omega_runs(runs, left) if kind == "omega" else _rice_runs(runs, left, len(part) - len(places))
        text = text if len(part) else ""
        owners += [bucket] * len(text)
        bits += map(int, text)
    return integers(owners), torch.tensor(bits, dtype=torch.bool, device="cpu")


def _omega_runs(runs: list[int], left: int) -> str:
    return "".join(elias_omega(run + 1) for run in [*runs, *[left] * (left > 0)])


def _rice_runs(runs: list[int], left: int, inside: int) -> str:
    k = rice_parameter(inside, len(runs) + 1)
    return f"{k:0{RICE_BITS}b}"[::-1] + "".join(_rice(run, k) for run in runs) + _last_rice(left, k)


def read_runs(kind: str, reader: Reader, counts: list[int]) -> Tensor:
    """bool[sum of counts]: which elements end a run, of so many in each bucket."""
    parts = [torch.zeros(count, dtype=torch.bool, device="cpu") for count in counts]
    for bucket, ends in enumerate(parts):
        k = sum(reader.bit(bucket) << bit for bit in range(RICE_BITS)) if kind == "rice" and len(ends) else 0
        place = 0
        while place < len(ends):
            left = len(ends) - place
            run = _read_omega(reader, bucket) - 1 if kind == "omega" else _read_rice(reader, bucket, k, left)
            if run > left:
                raise CodeError("a bucket whose code words pass its end")
            # Beyond the bucket's end this is an empty slice: the last run ends there.
            ends[place + run : place + run + 1] = True
            place += run + 1
        found = int(ends.sum())
        # Two encodings of one bucket would make equal means from unequal bytes.
        if kind == "rice" and k != rice_parameter(len(ends) - found, found + 1):
            raise CodeError("a Rice parameter that no encoder writes")
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool, device="cpu")


def _read_rice(reader: Reader, bucket: int, k: int, left: int) -> int:
    """A run; ``left`` is the one up to the bucket's end, and no other may be as long."""
    quotient = 0
    while quotient << k < left:
        if reader.bit(bucket):
            run = (quotient << k) + sum(reader.bit(bucket) << bit for bit in range(k))
            return run if run < left else left + 1
        quotient += 1
    return left


def _read_omega(reader: Reader, bucket: int) -> int:
    n = 1
    while reader.bit(bucket):
        group = 1
        for _ in range(n):
            group = group << 1 | reader.bit(bucket)
        n = group
    return n
