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


def draw_bits(levels: Levels) -> int:
    """Bits of each draw: 16, or 15 above 63 levels, where a float32 product has no more behind its index."""
    return 16 if levels.num_levels <= 63 else 15


def draws(words: tuple[int, int], starts: Tensor, lengths: Tensor, bits: int) -> Tensor:
    """int64[n] of draws of ``bits`` bits: a counter generator, a function of the key's two 32-bit words and the place.

    In a bucket that begins at coordinate p of the vector, the elements i and i + 8 of every 16 share a 32-bit hash of
    the counter p + 8 floor(i / 16) + i mod 8, one taking its low half, the other its high half. The hash is the mixer
    "lowbias32" (Wellons, 2018) with one word added before it, the other in its middle. Counters of buckets are apart,
    and beyond 2**32 coordinates the second word differs.
    """
    bucket_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    i = torch.arange(len(bucket_of)) - (lengths.cumsum(0) - lengths)[bucket_of]
    start = starts[bucket_of]
    x = (start + 8 * (i // 16) + i % 8 + words[0]) & _LOW_32
    x = _multiply(x ^ (x >> 16), 0x7FEB352D)
    x = ((x ^ (x >> 15)) + words[1] + _multiply(start >> 32, 0x9E3779B9)) & _LOW_32
    x = _multiply(x, 0x846CA68B)
    x = x ^ (x >> 16)
    return torch.where(i % 16 < 8, x & 0xFFFF, x >> 16) >> (16 - bits)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2**32, in halves, so that int64 never overflows."""
    high = ((x >> 16) * factor & 0xFFFF) << 16
    return (high + (x & 0xFFFF) * factor) & _LOW_32


def _scaled(vector: Tensor, norms: Tensor, bucket_of: Tensor, top: float) -> Tensor:
    """float32[n]: min(|v_i| (top / norm), top); 0 where the norm is zero or not finite.

    Where the norm is below 2**-100 or above 2**100, both are first multiplied by 2**100 or 2**-100, so that top / norm
    is a normal number.
    """
    usable = (norms > 0) & norms.isfinite()
    norms = torch.where(usable, norms, 1.0)
    scale = torch.where(norms < 2.0**-100, 2.0**100, torch.where(norms > 2.0**100, 2.0**-100, 1.0))
    factor = top / (norms * scale)
    magnitude = (vector.abs() * scale[bucket_of] * factor[bucket_of]).clamp_(max=top)
    return torch.where(usable[bucket_of], magnitude, 0.0)


def magnitudes(vector: Tensor, norms: Tensor, bucket_of: Tensor) -> Tensor:
    """float32[n]: u = min(|v_i| (1 / norm), 1); 0 where the norm is zero or not finite."""
    return _scaled(vector, norms, bucket_of, 1.0)


def round_to_levels(vector: Tensor, norms: Tensor, bucket_of: Tensor, levels: Levels, draw: Tensor) -> Tensor:
    """int64[n]: the index of l_{j+1} with probability (u - l_j) / (l_{j+1} - l_j), else of l_j.

    The index is floor(phi(u) + draw / 2**b), where phi rises piecewise linearly with phi(l_j) = j and is rounded to
    2**-b, b the bits of the draw. For evenly spaced levels phi is s u. E l = u to within 2**-b of a gap: half of that
    is the rounding of phi, the rest bounds float32's own error, 2**-23 l_{j+1} / (l_{j+1} - l_j), where that ratio is
    at most 63 (127 for b = 15). Source: Q-GenX, definition of Q_l.
    """
    bits = draw_bits(levels)
    if levels.is_uniform:
        phi = _scaled(vector, norms, bucket_of, float(levels.num_levels << bits))
        return (phi.round().long() + draw) >> bits
    table = torch.tensor(levels.values)
    u = magnitudes(vector, norms, bucket_of)
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp_(max=levels.num_levels - 1)
    part = (u - table[lower]) * (1.0 / (table[1:] - table[:-1]))[lower] * 2.0**bits
    return lower + ((part.round().long() + draw) >> bits)


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


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of bytes, as in RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_entry(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC_TABLE = [_crc_entry(byte) for byte in range(256)]
