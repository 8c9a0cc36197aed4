"""Norms, draws and stochastic rounding in a few lines of plain torch: the specification, and the oracle of backends.

Shapes: a *vector* is float32[n]; it is cut into B buckets, ``lengths`` int64[B] with sum n, and ``bucket_of`` int64[n]
names each element's bucket. Norms are float32[B], symbols int8[n].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvd_qgenx.fitting import NUM_BINS, OCTAVES
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import Levels

NORM_LANES = 16
NO_WEIGHT = -(2**15)  # exponent of statistics without weight
_WEIGHT_BITS = 20  # the heaviest bucket of a vector weighs 2**19 to 2**20
_MOMENT_BITS = 16  # moments are integers too, in units of 2**-16
_LOW_32 = 0xFFFFFFFF
SMALL_NORM = 2.0**-80
_FLOAT_SHIFT = 18  # leaves 5 bits of the mantissa: 32 bins to the octave
_FIRST_BIN = (127 - OCTAVES) << 5  # what 2**-16 gives after that shift


@dataclass(frozen=True)
class Buckets:
    """How a vector is cut: ``lengths`` int64[B], and for every element its bucket, int64[n]."""

    lengths: Tensor
    bucket_of: Tensor
    segment_of: Tensor  # int64[B], the segment that each bucket belongs to
    starts: Tensor  # int64[B], where each bucket begins in the vector

    def with_code(self, norms: Tensor) -> tuple[Buckets, Tensor]:
        """Those whose norm is neither 0 nor NaN, the others being empty; and bool[n], which elements are left."""
        left = (norms > 0)[self.bucket_of]
        lengths = torch.where(norms > 0, self.lengths, 0)
        return replace(self, lengths=lengths, bucket_of=self.bucket_of[left]), left

    @classmethod
    def cut(cls, layout: Layout) -> Buckets:
        """Of the segments that have buckets, in a vector of these segments alone."""
        lengths = integers(layout.bucket_lengths())
        per_segment = [-(-size // layout.bucket_size) if size >= layout.min_numel else 0 for size in layout.sizes]
        segment_of = torch.repeat_interleave(counting(len(layout.sizes)), integers(per_segment))
        firsts = integers([0, *layout.sizes]).cumsum(0)
        within = [layout.bucket_size * index for count in per_segment for index in range(count)]
        starts = firsts[segment_of] + integers(within)
        return cls(lengths, torch.repeat_interleave(counting(len(lengths)), lengths), segment_of, starts)


def integers(values) -> Tensor:
    """int64 on the CPU, whatever the caller's defaults are."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def counting(count: int) -> Tensor:
    """0, 1, ... as int64 on the CPU."""
    return torch.arange(count, dtype=torch.int64, device="cpu")


def reals(values) -> Tensor:
    """float32 on the CPU."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def buckets_as_rows(vector: Tensor, lengths: Tensor) -> Tensor:
    """float32[B, w]: one bucket a row, zeros behind, w a multiple of ``NORM_LANES``."""
    # Zeros at the end add nothing to a sum of squares, nor to a maximum.
    width = -(-int(lengths.max()) // NORM_LANES) * NORM_LANES
    columns = counting(width)
    rows = torch.zeros(len(lengths), width, dtype=torch.float32, device="cpu")
    rows[columns < lengths[:, None]] = vector
    return rows


def l2_norms(rows: Tensor) -> Tensor:
    """float32[B]: the smallest float32 whose square is not below sum v_i^2, so that |v_i| / norm <= 1.

    The order is fixed: lane j of 16 adds v_j^2, v_{j+16}^2, ... in float64 (a square of float32 is exact there and
    cannot overflow), then lanes fold in halves. The norm is infinite if it exceeds the largest float32.
    """
    # The square of a float32 is exact in float64: only the sums round, in this order.
    squares = rows.double().square().view(len(rows), -1, NORM_LANES)
    lanes = squares[:, 0].clone()
    for column in range(1, squares.shape[1]):
        lanes += squares[:, column]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return root_above(lanes[:, 0])


def linf_norms(rows: Tensor) -> Tensor:
    """float32[B]: max |v_i|; NaN if any coordinate is."""
    return rows.abs().amax(dim=1)


def root_above(squares: Tensor) -> Tensor:
    """The smallest float32 whose square is not below each float64."""
    # Any root within a float32's last place will do: the squares that decide are exact in float64.
    near = squares.sqrt().float()
    below, above = near.nextafter(reals(0.0)), near.nextafter(reals(torch.inf))
    norm = torch.where(near.double().square() < squares, above, near)
    return torch.where(below.double().square() >= squares, below, norm)


def draw_bits(levels: Levels) -> int:
    """Bits of each draw: 31, or for evenly spaced levels what an index leaves of 31."""
    return 31 - levels.num_levels.bit_length() if levels.is_uniform else 31


def draws(pair: tuple[int, int], starts: Tensor, lengths: Tensor) -> Tensor:
    """int64[n] of 32 random bits each: a function of the key's two 32-bit numbers and the place.

    In a bucket that begins at coordinate p of the vector, the elements i and i + 8 of every 16 share a 32-bit hash of
    the counter p + 8 floor(i / 16) + i mod 8, which the first takes with its halves swapped: their high halves decide
    but for one draw in 2**16. The hash is the mixer "lowbias32" (Wellons, 2018) with one number added before it, the
    other in its middle. Counters of buckets are apart, and beyond 2**32 coordinates the second number differs.
    """
    bucket_of = torch.repeat_interleave(counting(len(lengths)), lengths)
    # The place within the bucket: backends then need no counter but a bucket's own.
    i = counting(len(bucket_of)) - (lengths.cumsum(0) - lengths)[bucket_of]
    start = starts[bucket_of]
    x = (start + 8 * (i // 16) + i % 8 + pair[0]) & _LOW_32
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)
    x = ((x ^ (x >> 15)) + pair[1] + _multiply(start >> 32, 0x9E3779B9)) & _LOW_32
    x = _multiply(x, 0x846CA68B)
    x = x ^ (x >> 16)
    return torch.where(i % 16 < 8, (x & 0xFFFF) << 16 | x >> 16, x)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2**32, in halves, so that int64 never overflows."""
    # The low half times a 32-bit factor stays below 2**48.
    high = ((x >> 16) * factor & 0xFFFF) << 16
    return (high + (x & 0xFFFF) * factor) & _LOW_32


def _scaled(vector: Tensor, norms: Tensor, bucket_of: Tensor, top: float) -> Tensor:
    """float32[n]: min(|v_i| (top / norm), top); 0 where the norm is zero or not finite.

    Where the norm is below 2**-80 or above 2**80, both are first multiplied by 2**80 or 2**-80, so that top / norm is
    a normal number.
    """
    usable = (norms > 0) & norms.isfinite()
    norms = torch.where(usable, norms, 1.0)
    scale = torch.where(norms > 1 / SMALL_NORM, reals(SMALL_NORM), reals(1.0))
    scale = torch.where(norms < SMALL_NORM, reals(1 / SMALL_NORM), scale)
    # One division a bucket; a product for each coordinate is what all backends can do alike. Of tensors: torch makes
    # a number over a tensor a product with its reciprocal, which rounds twice.
    factor = reals(top) / (norms * scale)
    magnitude = (vector.abs() * scale[bucket_of] * factor[bucket_of]).clamp_(max=top)
    return torch.where(usable[bucket_of], magnitude, 0.0)


def magnitudes(vector: Tensor, norms: Tensor, bucket_of: Tensor) -> Tensor:
    """float32[n]: u = min(|v_i| (1 / norm), 1); 0 where the norm is zero or not finite."""
    return _scaled(vector, norms, bucket_of, 1.0)


def round_to_levels(vector: Tensor, norms: Tensor, bucket_of: Tensor, levels: Levels, draw: Tensor) -> Tensor:
    """int64[n]: the index of l_{j+1} with probability (u - l_j) / (l_{j+1} - l_j), else of l_j.

    The index is floor(phi(u) + draw / 2**b), where phi rises piecewise linearly with phi(l_j) = j and is rounded to
    2**-b, and the draw is the highest b of 32 random bits. For evenly spaced levels phi is s u. E l = u to within half
    of 2**-b of a gap, and float32's own error, less than 2**-21 u. Source: Q-GenX, definition of Q_l.
    """
    small = ((norms > 0) & (norms < SMALL_NORM))[bucket_of]
    if bool(small.any()):
        by_value = _round_between_values(vector, norms, bucket_of, levels, draw)
        return torch.where(small, by_value, _round_between_levels(vector, norms, bucket_of, levels, draw))
    return _round_between_levels(vector, norms, bucket_of, levels, draw)


def _round_between_levels(vector: Tensor, norms: Tensor, bucket_of: Tensor, levels: Levels, draw: Tensor) -> Tensor:
    bits = draw_bits(levels)
    if levels.is_uniform:
        # top is a power of two times s: phi comes out in units of the draw.
        phi = _scaled(vector, norms, bucket_of, float(levels.num_levels << bits))
        return (phi.round().long() + (draw >> (32 - bits))) >> bits
    table = reals(levels.values)
    u = magnitudes(vector, norms, bucket_of)
    # u = 1 belongs to the last gap, whose upper end it is.
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp_(max=levels.num_levels - 1)
    part = (u - table[lower]) * (reals(1.0) / (table[1:] - table[:-1]))[lower] * 2.0**bits
    return lower + ((part.round().long() + (draw >> (32 - bits))) >> bits)


def _round_between_values(vector: Tensor, norms: Tensor, bucket_of: Tensor, levels: Levels, draw: Tensor) -> Tensor:
    """The same for norms below 2**-80, between the values l_j norm that receivers compute, where they are subnormal
    maybe far from the products; after the last comes infinity. All is multiplied by 2**80, which is exact."""
    values = reals([*levels.values, torch.inf]) * norms[:, None] * (1 / SMALL_NORM)
    magnitude = vector.abs() * (1 / SMALL_NORM)
    lower = (values[bucket_of] <= magnitude[:, None]).sum(dim=1) - 1
    low, high = values[bucket_of, lower], values[bucket_of, lower + 1]
    part = (magnitude - low) * (reals(1.0) / (high - low)) * 2.0**31
    return lower + ((part.round().long() + (draw >> 1)) >> 31)


def dequantize(symbols: Tensor, norms: Tensor, bucket_of: Tensor, levels: Levels) -> Tensor:
    """float32[n]: sign(symbol) * l_|symbol| * norm; NaN throughout a bucket whose norm is NaN."""
    positive = reals(levels.values)
    # A table for both signs: sign times level is exact, so this is the same product.
    table = torch.cat((-positive.flip(0)[:-1], positive))
    return table[symbols.long() + levels.num_levels] * norms[bucket_of]


def histogram(u: Tensor, weights: Tensor) -> Tensor:
    """int64[NUM_BINS]: the sum of the int64 ``weights`` of the magnitudes in each bin of ``fitting.BIN_EDGES``."""
    # The exponent and 5 bits of the mantissa are the bin: no logarithm, no rounding.
    bins = (u.view(torch.int32) >> _FLOAT_SHIFT).long() - _FIRST_BIN + 1
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device="cpu")
    return counts.index_add_(0, bins.clamp_(0, NUM_BINS - 1), weights)


def bucket_norms(vector: Tensor, buckets: Buckets, norm: str) -> Tensor:
    """float32[B]; NaN for every bucket of a segment in which a coordinate, or an L2 norm, is not finite."""
    if len(buckets.lengths) == 0:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    rows = buckets_as_rows(vector, buckets.lengths)
    norms = l2_norms(rows) if norm == "l2" else linf_norms(rows)
    broken = torch.zeros(int(buckets.segment_of[-1]) + 1, dtype=torch.bool, device="cpu")
    # One bad coordinate makes the parameter's mean useless, not the bucket's alone.
    broken[buckets.segment_of[~norms.isfinite()]] = True
    return torch.where(broken[buckets.segment_of], torch.nan, norms)


def draw_symbols(vector: Tensor, norms: Tensor, buckets: Buckets, levels: Levels, key: Key) -> Tensor:
    """int8[n], stochastic rounding: symbol_i = sign(v_i) * (index of the level drawn for |v_i| / norm)."""
    draw = draws(key.pair, buckets.starts, buckets.lengths)
    index = round_to_levels(vector, norms, buckets.bucket_of, levels, draw)
    return torch.where(vector < 0, -index, index).to(torch.int8)


def bucket_weights(norms: Tensor) -> tuple[int, Tensor, Tensor]:
    """An exponent, floor(norm^2 / 2**exponent) and one for each bucket; zeros where a norm is zero or not finite."""
    # A bucket of zeros or of NaN has no normalised magnitudes.
    usable = norms.isfinite() & (norms > 0)
    squares = torch.where(usable, norms.double().square(), 0.0)
    heaviest = float(squares.max()) if len(squares) else 0.0
    if heaviest == 0:
        return NO_WEIGHT, torch.zeros(len(squares), dtype=torch.int64, device="cpu"), usable.long()
    # A power of two, so that weights of all ranks can be shifted to one unit exactly.
    exponent = math.frexp(heaviest)[1] - _WEIGHT_BITS
    return exponent, (squares * 2.0**-exponent).long(), usable.long()


def weighted_histograms(vector: Tensor, buckets: Buckets, norms: Tensor) -> tuple[int, Tensor, Tensor]:
    """(exponent, weighted, plain) of ``adaptation.Statistics`` in the form "histogram"."""
    exponent, weights, ones = bucket_weights(norms)
    u = magnitudes(vector, norms, buckets.bucket_of)
    owner = buckets.bucket_of
    return exponent, histogram(u, weights[owner]), histogram(u, ones[owner])


def weighted_moments(vector: Tensor, buckets: Buckets, norms: Tensor) -> tuple[int, Tensor, Tensor]:
    """(exponent, weighted, plain) of ``adaptation.Statistics`` in the form "normal"."""
    exponent, weights, ones = bucket_weights(norms)
    u = magnitudes(vector, norms, buckets.bucket_of)
    r = (u * 2**_MOMENT_BITS).round().long()
    r = torch.where(vector < 0, -r, r)
    powers = torch.stack((torch.full_like(r, 2**_MOMENT_BITS), r, r.square() >> _MOMENT_BITS))
    sums = torch.zeros(3, len(norms), dtype=torch.int64, device="cpu").index_add_(1, buckets.bucket_of, powers)
    return exponent, (weights * sums >> _MOMENT_BITS).sum(dim=1), (ones * sums).sum(dim=1)
