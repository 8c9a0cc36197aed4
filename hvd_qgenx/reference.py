"""Every operation of the codec in a few lines of plain torch: the specification, and the oracle of faster backends.

Shapes: a *vector* is float32[n]; it is cut into B buckets, ``lengths`` int64[B] with sum n, and ``bucket_of`` int64[n]
names each element's bucket. Norms are float32[B], symbols int8[n], bits are uint8 0 or 1, packed LSB first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_qgenx.distribution import NUM_BINS, OCTAVES
from hvd_qgenx.levels import Levels

NORM_LANES = 16
DRAW_BITS = 16
_LOW_32 = 0xFFFFFFFF
_FLOAT_SHIFT = 18  # leaves 5 bits of the mantissa: 32 bins to the octave
_FIRST_BIN = (127 - OCTAVES) << 5  # what 2**-16 gives after that shift


def bucket_lengths(sizes: Sequence[int], bucket_size: int) -> Tensor:
    """int64[B]: segments of ``sizes`` coordinates cut into buckets, none of which spans two segments."""
    lengths = []
    for size in sizes:
        whole, rest = divmod(size, bucket_size)
        lengths += [bucket_size] * whole + [rest] * (rest > 0)
    return torch.tensor(lengths, dtype=torch.int64)


def buckets_as_rows(vector: Tensor, lengths: Tensor) -> Tensor:
    """float32[B, w]: one bucket a row, zeros behind, w a multiple of ``NORM_LANES``."""
    width = -(-int(lengths.max()) // NORM_LANES) * NORM_LANES
    columns = torch.arange(width)
    rows = torch.zeros(len(lengths), width)
    rows[columns < lengths[:, None]] = vector
    return rows


def l2_norms(rows: Tensor) -> Tensor:
    """float32[B]: sqrt(sum v_i^2), rounded up, so that |v_i| / norm <= 1.

    The order is fixed: lane j of 16 adds v_j^2, v_{j+16}^2, ... in float64 (a square of float32 is exact there and
    cannot overflow), then lanes fold in halves. The norm is infinite if it exceeds the largest float32.
    """
    squares = rows.double().square().view(len(rows), -1, NORM_LANES)
    lanes = squares[:, 0].clone()
    for column in range(1, squares.shape[1]):
        lanes += squares[:, column]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return _round_up(lanes[:, 0].sqrt())


def linf_norms(rows: Tensor) -> Tensor:
    """float32[B]: max |v_i|; NaN if any coordinate is."""
    return rows.abs().amax(dim=1)


def _round_up(values: Tensor) -> Tensor:
    """The smallest float32 not below each float64."""
    rounded = values.float()
    return torch.where(rounded.double() < values, rounded.nextafter(torch.tensor(torch.inf)), rounded)


def draws(words: tuple[int, int], numel: int) -> Tensor:
    """int64[n] of 16-bit draws: a counter generator, so draw i is a function of the key's two 32-bit words and i.

    Pairs of draws are the low and the high half of a 32-bit hash of i // 2, the mixer "lowbias32" (Wellons, 2018)
    with one word added before it and the other in its middle.
    """
    x = torch.arange((numel + 1) // 2, dtype=torch.int64).add_(words[0]).bitwise_and_(_LOW_32)
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)
    x = ((x ^ (x >> 15)) + words[1]) & _LOW_32
    x = _multiply(x, 0x846CA68B)
    x = x ^ (x >> 16)
    return torch.stack((x & 0xFFFF, x >> 16), dim=1).view(-1)[:numel]


def _multiply(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2**32, in halves, so that int64 never overflows."""
    high = ((x >> 16) * factor & 0xFFFF) << 16
    return (high + (x & 0xFFFF) * factor) & _LOW_32


def magnitudes(vector: Tensor, norms: Tensor, bucket_of: Tensor) -> Tensor:
    """float32[n]: u = |v_i| / norm in [0, 1]; 0 where the norm is zero or not finite."""
    usable = (norms > 0) & norms.isfinite()
    u = vector.abs() / torch.where(usable, norms, 1.0)[bucket_of]
    return torch.where(usable[bucket_of], u, 0.0)


def round_to_levels(u: Tensor, levels: Levels, draw: Tensor) -> Tensor:
    """int64[n]: the index of l_{j+1} with probability (u - l_j) / (l_{j+1} - l_j), else of l_j.

    The probability is rounded to a multiple of 2**-16 and compared with a 16-bit draw, so that E l = u to within
    2**-17 of a gap. Source: Q-GenX, definition of Q_l.
    """
    table = torch.tensor(levels.values)
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp_(max=levels.num_levels - 1)
    fraction = (u - table[lower]) / (table[lower + 1] - table[lower])
    return lower + (draw < (fraction * 2**DRAW_BITS).round().long())


def dequantize(symbols: Tensor, norms: Tensor, bucket_of: Tensor, levels: Levels) -> Tensor:
    """float32[n]: sign(symbol) * l_|symbol| * norm; NaN throughout a bucket whose norm is NaN."""
    positive = torch.tensor(levels.values)
    table = torch.cat((-positive.flip(0)[:-1], positive))
    return table[symbols.long() + levels.num_levels] * norms[bucket_of]


def histogram(u: Tensor, weights: Tensor) -> Tensor:
    """int64[NUM_BINS]: the sum of the int64 ``weights`` of the magnitudes in each bin of ``distribution.BIN_EDGES``."""
    bins = (u.view(torch.int32) >> _FLOAT_SHIFT).long() - _FIRST_BIN + 1
    counts = torch.zeros(NUM_BINS, dtype=torch.int64)
    return counts.index_add_(0, bins.clamp_(0, NUM_BINS - 1), weights)


def pack_bits(bits: Tensor) -> Tensor:
    """uint8[ceil(m / 8)] from uint8[m] of zeros and ones, the first bit lowest."""
    padded = torch.zeros(-(-len(bits) // 8) * 8, dtype=torch.uint8)
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8[8 m] of zeros and ones from uint8[m]."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).view(-1)
