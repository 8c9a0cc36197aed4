"""Runs of elements that have no word, between those that end a run: Golomb-Rice's words of their lengths, or Elias'.

``kind`` is "rice" or "omega"; ``counts`` are the elements of each bucket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_qgenx.bitplanes import Reader
from hvd_qgenx.words import CodeError, elias_omega

RICE_BITS = 4  # of Rice's parameter, before a bucket's runs
MOST_BITS = 24  # that a bucket's runs take, beside two for each of its elements


def rice_parameter(inside: int, runs: int) -> int:
    """The smallest k for which 2**(k + 1) runs are no fewer than the elements inside them.

    The best one for runs of random lengths solves 2**k ln(golden ratio)**-1 = mean length: this is it within 4 %.
    """
    k = 0
    while runs << (k + 1) < inside:
        k += 1
    return k


def run_bits(kind: str, inside: float, numel: float) -> float:
    """Expected bits of the runs for each of ``numel`` elements, each of which is in a run with that chance.

    A run of Rice takes k + 1 + q / (1 - q) bits, q = inside**(2**k), the last one inside / (1 - q), and Rice's
    parameter its own; a run of omega takes the mean over its lengths, the last one like the others.
    """
    share = 1.0 - inside
    if kind == "omega":
        lengths = range(round(numel) + 1)
        mean = sum(share * inside**n * len(elias_omega(n + 1)) for n in lengths)
        return (share + 1.0 / numel) * (mean + inside ** len(lengths) * len(elias_omega(len(lengths) + 1)))
    k = rice_parameter(round(inside * numel), round(share * numel) + 1)
    q, most = inside ** (2**k), numel / 2**k + 1.0
    last = min(inside / (1.0 - q), most) if q < 1.0 else most
    quotient = q / (1.0 - q) if q < 1.0 else 0.0
    return share * (k + 1.0 + quotient) + (last + RICE_BITS) / numel


def _rice(run: int, k: int) -> str:
    """run >> k zeros, a one, then the k low bits, lowest first. Source: Golomb (1966), Rice (1979)."""
    return "0" * (run >> k) + "1" + "".join(str(run >> bit & 1) for bit in range(k))


def _last_rice(run: int, k: int) -> str:
    """The run up to a bucket's end: ceil(run / 2**k) zeros, with which no shorter run begins."""
    return "0" * -(-run >> k)


def run_plane(kind: str, ends: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The runs before each element that ends one, and before a bucket's end unless such an element is its last."""
    owners, bits = [], []
    for bucket, part in enumerate(ends.split(counts)):
        places = part.nonzero().view(-1).tolist()
        runs = [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
        left = len(part) - 1 - (places[-1] if places else -1)
        text = _omega_runs(runs, left) if kind == "omega" else _rice_runs(runs, left, len(part) - len(places))
        text = text if len(part) else ""
        owners += [bucket] * len(text)
        bits += map(int, text)
    return torch.tensor(owners, dtype=torch.int64), torch.tensor(bits, dtype=torch.bool)


def _omega_runs(runs: list[int], left: int) -> str:
    return "".join(elias_omega(run + 1) for run in [*runs, *[left] * (left > 0)])


def _rice_runs(runs: list[int], left: int, inside: int) -> str:
    k = rice_parameter(inside, len(runs) + 1)
    return f"{k:0{RICE_BITS}b}"[::-1] + "".join(_rice(run, k) for run in runs) + _last_rice(left, k)


def read_runs(kind: str, reader: Reader, counts: list[int]) -> Tensor:
    """bool[sum of counts]: which elements end a run, of so many in each bucket."""
    parts = [torch.zeros(count, dtype=torch.bool) for count in counts]
    for bucket, ends in enumerate(parts):
        k = sum(reader.bit(bucket) << bit for bit in range(RICE_BITS)) if kind == "rice" and len(ends) else 0
        place = 0
        while place < len(ends):
            left = len(ends) - place
            run = _read_omega(reader, bucket) - 1 if kind == "omega" else _read_rice(reader, bucket, k, left)
            if run > left:
                raise CodeError("a bucket whose code words pass its end")
            ends[place + run : place + run + 1] = True
            place += run + 1
        found = int(ends.sum())
        if kind == "rice" and k != rice_parameter(len(ends) - found, found + 1):
            raise CodeError("a Rice parameter that no encoder writes")
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


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
