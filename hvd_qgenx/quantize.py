"""Norms and stochastic rounding of one vector, and its inverse, in plain torch; the core does the same, fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_qgenx import core, reference
from hvd_qgenx.checks import check_integer
from hvd_qgenx.levels import Levels

_MASK_64 = 2**64 - 1
_WEIGHT_BITS = 20  # the heaviest bucket of a vector weighs 2**19 to 2**20
_MOMENT_BITS = 16  # moments are integers too, in units of 2**-16
NO_WEIGHT = -(2**15)  # exponent of statistics without weight
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Key:
    """What the random draws of one encoding are a function of, beside the position in the vector.

    Args:
        seed: of the run, the same on all ranks; 0 to 2**64 - 1.
        rank: global rank of the sender, so that ranks draw independently; 0 to 2**32 - 1.
        step: number of the exchange (not of the iteration); 0 to 2**64 - 1.
        stream: separates encodings that share a step; 0 to 2**32 - 1.
    """

    seed: int
    rank: int
    step: int
    stream: int = 0

    def __post_init__(self):
        check_integer("seed", self.seed, 0, _MASK_64)
        check_integer("rank", self.rank, 0, 2**32 - 1)
        check_integer("step", self.step, 0, _MASK_64)
        check_integer("stream", self.stream, 0, 2**32 - 1)

    @property
    def words(self) -> tuple[int, int]:
        """Two 32-bit words, every part mixed in turn by splitmix64's finaliser (Steele et al., 2014)."""
        state = 0
        for part in (self.seed, self.rank, self.step, self.stream):
            state = _mix(state * 0xD1342543DE82EF95 + part + 0x9E3779B97F4A7C15)
        return state & 0xFFFFFFFF, state >> 32


def _mix(x: int) -> int:
    x &= _MASK_64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Buckets:
    """How a vector is cut: ``lengths`` int64[B], and for every element its bucket, int64[n]."""

    lengths: Tensor
    bucket_of: Tensor
    segment_of: Tensor  # int64[B], the segment that each bucket belongs to
    starts: Tensor  # int64[B], where each bucket begins in the vector

    @classmethod
    def cut(cls, sizes: Sequence[int], bucket_size: int, min_numel: int = 0) -> Buckets:
        """Segments of ``sizes`` coordinates; those of fewer than ``min_numel`` have no buckets."""
        lengths = reference.bucket_lengths([size for size in sizes if size >= min_numel], bucket_size)
        per_segment = [-(-size // bucket_size) if size >= min_numel else 0 for size in sizes]
        segment_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(per_segment, dtype=torch.int64))
        firsts = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
        within = [bucket_size * index for count in per_segment for index in range(count)]
        starts = firsts[segment_of] + torch.tensor(within, dtype=torch.int64)
        return cls(lengths, torch.repeat_interleave(torch.arange(len(lengths)), lengths), segment_of, starts)


@dataclass(frozen=True)
class Quantized:
    """Symbols int8[n] and norms float32[B]; a segment that was not finite has NaN for all its norms."""

    symbols: Tensor
    norms: Tensor


def check_gradient(tensor: Tensor) -> Tensor:
    """``tensor``, if it is a dense floating-point tensor."""
    if isinstance(tensor, Tensor) and tensor.dtype in _FLOATS and tensor.layout == torch.strided:
        return tensor
    kind = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
    raise ValueError(f"gradient must be a dense float16, bfloat16, float32 or float64 tensor, got {kind}")


def as_vector(gradient: Tensor) -> Tensor:
    """A contiguous float32 vector on the CPU with the values of a floating-point tensor of any shape."""
    return check_gradient(gradient).detach().to(device="cpu", dtype=torch.float32).reshape(-1)


def bucket_norms(vector: Tensor, buckets: Buckets, norm: str) -> Tensor:
    """float32[B]; NaN for every bucket of a segment in which a coordinate, or an L2 norm, is not finite."""
    if len(buckets.lengths) == 0:
        return torch.zeros(0)
    rows = reference.buckets_as_rows(vector, buckets.lengths)
    norms = reference.l2_norms(rows) if norm == "l2" else reference.linf_norms(rows)
    broken = torch.zeros(int(buckets.segment_of[-1]) + 1, dtype=torch.bool)
    broken[buckets.segment_of[~norms.isfinite()]] = True
    return torch.where(broken[buckets.segment_of], torch.nan, norms)


def quantize(vector: Tensor, buckets: Buckets, levels: Levels, norm: str, key: Key) -> Quantized:
    """Stochastic rounding of a float32 vector: symbol_i = sign(v_i) * (index of the level drawn for |v_i| / norm)."""
    norms = bucket_norms(vector, buckets, norm)
    draw = reference.draws(key.words, buckets.starts, buckets.lengths, reference.draw_bits(levels))
    index = reference.round_to_levels(vector, norms, buckets.bucket_of, levels, draw)
    return Quantized(torch.where(vector < 0, -index, index).to(torch.int8), norms)


def dequantize(quantized: Quantized, buckets: Buckets, levels: Levels) -> Tensor:
    """float32[n], the values that the symbols stand for."""
    return reference.dequantize(quantized.symbols, quantized.norms, buckets.bucket_of, levels)


def bucket_weights(norms: Tensor) -> tuple[int, Tensor, Tensor]:
    """An exponent, floor(norm^2 / 2**exponent) and one for each bucket; zeros where a norm is zero or not finite."""
    usable = norms.isfinite() & (norms > 0)
    squares = torch.where(usable, norms.double().square(), 0.0)
    heaviest = float(squares.max()) if len(squares) else 0.0
    if heaviest == 0:
        return NO_WEIGHT, torch.zeros(len(squares), dtype=torch.int64), usable.long()
    exponent = math.frexp(heaviest)[1] - _WEIGHT_BITS
    return exponent, (squares * 2.0**-exponent).long(), usable.long()


def weighted_histograms(vector: Tensor, buckets: Buckets, norms: Tensor) -> tuple[int, Tensor, Tensor]:
    """(exponent, weighted, plain) of ``adaptation.Statistics`` in the form "histogram"."""
    exponent, weights, ones = bucket_weights(norms)
    u = reference.magnitudes(vector, norms, buckets.bucket_of)
    owner = buckets.bucket_of
    return exponent, reference.histogram(u, weights[owner]), reference.histogram(u, ones[owner])


def weighted_moments(vector: Tensor, buckets: Buckets, norms: Tensor) -> tuple[int, Tensor, Tensor]:
    """(exponent, weighted, plain) of ``adaptation.Statistics`` in the form "normal"."""
    exponent, weights, ones = bucket_weights(norms)
    u = reference.magnitudes(vector, norms, buckets.bucket_of)
    r = (u * 2**_MOMENT_BITS).round().long()
    r = torch.where(vector < 0, -r, r)
    powers = torch.stack((torch.full_like(r, 2**_MOMENT_BITS), r, r.square() >> _MOMENT_BITS))
    sums = torch.zeros(3, len(norms), dtype=torch.int64).index_add_(1, buckets.bucket_of, powers)
    return exponent, (weights * sums >> _MOMENT_BITS).sum(dim=1), (ones * sums).sum(dim=1)


def squared_error(vector: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Sums of (decoded - vector)^2 and of vector^2, over the coordinates whose ``decoded`` is finite, in float64."""
    if core.compiled():
        return core.squared_error(vector, decoded)
    finite = torch.where(decoded.isfinite(), vector, 0.0).double()
    error = torch.where(decoded.isfinite(), decoded, 0.0).double() - finite
    return float(error.square().sum()), float(finite.square().sum())
