"""The codec: levels x rounding x coder x payload, as one frozen value."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx import core
from hvd_qgenx import payload as wire
from hvd_qgenx.checks import check_choice, check_integer, check_integers, check_type
from hvd_qgenx.coders import CODERS, Codebook, codebook
from hvd_qgenx.levels import NORMS, Levels
from hvd_qgenx.payload import MAX_BUCKET_SIZE, ROUNDINGS, PayloadError
from hvd_qgenx.quantize import (
    NO_WEIGHT,
    Buckets,
    Key,
    Quantized,
    as_vector,
    bucket_norms,
    dequantize,
    quantize,
    weighted_histograms,
    weighted_moments,
)

_COUNT_SCALE = 2**20


@dataclass(frozen=True)
class Encoded:
    """A vector on its way: what was drawn for its coded part, and its raw part."""

    header: wire.Header
    buckets: Buckets
    quantized: Quantized
    raw: Tensor


@dataclass(frozen=True)
class Codec:
    """Encodes float vectors without bias and decodes means of them: E decode(encode(v)) = v.

    Args:
        levels: positive levels, ``Levels``.
        coder: "huffman", "elias_gamma", "elias_delta", "elias_omega", "elias_runs" or "fixed". "elias_runs" is QSGD's:
            Elias omega of the gaps between non-zeros and of their levels. "huffman" codes zeros as runs (Golomb-Rice)
            where the counts say that more than four in five are zeros, else by words of their own; of the non-zeros,
            ones likewise.
        bucket_size: coordinates that share a norm, 1 to 16384.
        norm: "l2" or "linf".
        rounding: "stochastic".
        counts: s + 1 integers, how often each magnitude occurs, from which Huffman lengths are made; None means those
            that ``levels.symbol_probabilities`` gives a normal bucket.
        min_numel: segments with fewer coordinates travel as float32.

    Raises:
        ValueError: naming the argument, when the codec is made.
    """

    levels: Levels
    coder: str = "huffman"
    bucket_size: int = 1024
    norm: str = "l2"
    rounding: str = "stochastic"
    counts: tuple[int, ...] | None = None
    min_numel: int = 0

    def __post_init__(self):
        check_type("levels", self.levels, Levels)
        check_choice("coder", self.coder, CODERS)
        check_integer("bucket_size", self.bucket_size, 1, MAX_BUCKET_SIZE)
        check_choice("norm", self.norm, NORMS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_integer("min_numel", self.min_numel, 0, 2**32 - 1)
        if self.counts is not None:
            object.__setattr__(self, "counts", _check_counts(self.counts, self.levels.num_levels + 1))

    @cached_property
    def codebook(self) -> Codebook:
        """The code words of the symbols."""
        counts = self.counts
        if self.coder == "huffman" and counts is None:
            shares = self.levels.symbol_probabilities(self.norm, self.bucket_size)
            counts = [round(share * _COUNT_SCALE) for share in shares]
        return codebook(self.coder, self.levels.num_levels, counts)

    @cached_property
    def codebook_hash(self) -> int:
        """64 bits of SHA-256 over coder, levels and code lengths: equal if and only if decoders agree."""
        levels = np.asarray(self.levels.values, "<f4").tobytes()
        content = self.coder.encode() + b"\0" + levels + bytes(self.codebook.lengths)
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")

    def bound(self, numel: int, sizes: Sequence[int] | None = None) -> int:
        """Bytes of the largest payload for ``numel`` coordinates, cut into segments of ``sizes``."""
        sizes = _check_sizes(sizes, check_integer("numel", numel, 0))
        return wire.bound(sizes, self.min_numel, self.bucket_size, self.codebook, wire.inline_bytes(self.levels))

    def expected_bits(self, numel: int, probabilities: Sequence[float] | None = None) -> float:
        """Expected bits of the norms, lengths and code words of ``numel`` coordinates in one segment.

        sum over buckets of 32 (norm) + 16 (length, not for the fixed coder), plus numel * sum_m p_m (mean bits of the
        words of m and -m), and runs; a bucket's last byte may add up to 7 bits. With Huffman lengths made from the same
        probabilities it stays below Theorem 2's C_q + (1 - p_0) d + (H(p) + 1) d, C_q = 48 bits a bucket. Source:
        Q-GenX, theorem 2.

        Args:
            numel: coordinates, 0 or more.
            probabilities: p_0, ..., p_s of the magnitudes; None means those of normal buckets.
        """
        check_integer("numel", numel, 0)
        if probabilities is None:
            probabilities = self.levels.symbol_probabilities(self.norm, self.bucket_size)
        if len(probabilities) != self.levels.num_levels + 1:
            raise ValueError(f"probabilities must be {self.levels.num_levels + 1} numbers, got {len(probabilities)}")
        headers = (32.0 if self.codebook.width else 48.0) * -(-numel // self.bucket_size)
        return headers + numel * self.codebook.expected_bits(probabilities, self.bucket_size)

    def encode(
        self,
        gradient: Tensor,
        key: Key,
        out: Tensor | None = None,
        *,
        sizes: Sequence[int] | None = None,
        inline: bool = True,
        counts: Tensor | None = None,
    ) -> Tensor:
        """One payload, uint8[size], 1-D.

        Args:
            gradient: float tensor of any shape; converted to float32. A segment with a coordinate that is not finite
                (or with an L2 norm above the largest float32) decodes to NaN throughout.
            key: of the random draws; never use one twice.
            out: uint8[>= bound], overwritten from its start; the result is then a view of it.
            sizes: coordinates of the segments; buckets never span two. None is one segment.
            inline: whether levels and code lengths travel with the payload, or only their hash.
            counts: int64[s + 1], overwritten with how often each magnitude's index was drawn.
        """
        vector = as_vector(gradient)
        check_type("key", key, Key)
        sizes = _check_sizes(sizes, len(vector))
        if core.compiled():
            return self._encode(vector, key, out, sizes, inline, counts)
        encoded = self.quantize(vector, key, sizes)
        if counts is not None:
            counts.copy_(torch.bincount(encoded.quantized.symbols.abs(), minlength=len(counts)))
        payload = self.pack(encoded, inline)
        return payload if out is None else _into(out, payload)

    def _encode(
        self, vector: Tensor, key: Key, out: Tensor | None, sizes: Sequence[int], inline: bool, counts: Tensor | None
    ) -> Tensor:
        bound = self.bound(len(vector), sizes)
        room = torch.empty(bound, dtype=torch.uint8) if out is None else _check_out(out, bound)
        segments, wanted = core.Segments.cut(vector, sizes), counts is not None
        cut, how = self._layout(segments.sizes), self._encoding(key, inline)
        size, found = core.encode(self._book, cut, how, segments, room, wanted)
        if wanted:
            counts.copy_(found.counts)
        return room[:size].clone() if out is None else room[:size]

    @cached_property
    def _book(self):
        return core.book(CODERS.index(self.coder), self.levels.values, self.codebook.lengths, self.codebook_hash)

    def _layout(self, sizes: Sequence[int]):
        return core.layout(sizes, self.min_numel, self.bucket_size)

    def _encoding(self, key: Key, inline: bool):
        return core.encoding(NORMS.index(self.norm), (key.seed, key.step, key.rank, key.stream), key.words, inline)

    def quantize(self, vector: Tensor, key: Key, sizes: Sequence[int]) -> Encoded:
        """The first half of ``encode``, in plain torch: draws a symbol for every coordinate that is not raw."""
        header = wire.Header(
            norm=self.norm,
            coder=self.coder,
            num_levels=self.levels.num_levels,
            bucket_size=self.bucket_size,
            min_numel=self.min_numel,
            sizes=tuple(sizes),
            key=key,
            codebook=self.codebook_hash,
        )
        is_coded = _coded_mask(header.sizes, header.min_numel)
        buckets = Buckets.cut(header.sizes, self.bucket_size, self.min_numel)
        quantized = quantize(vector[is_coded], buckets, self.levels, self.norm, key)
        return Encoded(header, buckets, quantized, _spoil_segments(vector[~is_coded], header))

    def pack(self, encoded: Encoded, inline: bool) -> Tensor:
        """The second half of ``encode``, in plain torch: the bytes."""
        header = replace(encoded.header, inline=(self.levels, self.codebook) if inline else None)
        return wire.pack(header, self.codebook, encoded.raw, encoded.quantized, encoded.buckets)

    def dequantize(self, encoded: Encoded) -> Tensor:
        """float32[n]: what every receiver will decode."""
        return _join(encoded.header, dequantize(encoded.quantized, encoded.buckets, self.levels), encoded.raw)

    def decode_mean(self, payloads: Sequence[Tensor], numel: int | None = None, out: Tensor | None = None) -> Tensor:
        """float32[numel]: the sum of the payloads' vectors, in their order, divided by how many there are.

        Args:
            payloads: 1-D uint8 tensors, one or more.
            numel: coordinates that the caller expects; checked before anything is allocated. None takes the first
                payload's word for it.
            out: float32[numel], overwritten.

        Raises:
            PayloadError: if a payload is damaged, of another length, or refers to a codebook that is not this codec's.
        """
        if len(payloads) == 0:
            raise ValueError("payloads must hold at least one payload")
        payloads = [wire.check_payload(payload) for payload in payloads]
        if out is not None:
            numel = len(_check_vector(out, numel))
        if core.compiled():
            return self._decode_mean(payloads, numel, out)
        total = torch.zeros(wire.parse(payloads[0], numel).header.numel)
        for payload in payloads:
            total.add_(self._decode(payload, len(total)))
        total.div_(len(payloads))
        return total if out is None else out.copy_(total)

    def _decode_mean(self, payloads: Sequence[Tensor], numel: int | None, out: Tensor | None) -> Tensor:
        try:
            if out is None:
                out = torch.empty(core.parse(payloads[0], numel))
            cuts = [_cut_of(payload, len(out)) for payload in payloads]
            if all(cut == cuts[0] for cut in cuts):
                core.decode_mean(self._book, payloads, core.Segments.cut(out, cuts[0]))
            else:
                self._add_up(payloads, cuts, out)
        except core.CoreError as error:
            raise PayloadError(f"payload: {error}") from None
        return out

    def _add_up(self, payloads: Sequence[Tensor], cuts: Sequence[tuple[int, ...]], out: Tensor) -> None:
        """The mean of payloads whose segments are not the same: each is decoded by itself."""
        one = torch.empty_like(out)
        out.zero_()
        for payload, cut in zip(payloads, cuts, strict=True):
            core.decode_mean(self._book, [payload], core.Segments.cut(one, cut))
            out.add_(one)
        out.div_(len(payloads))

    def sizes_of(self, payload: Tensor, numel: int | None = None) -> tuple[int, ...]:
        """The coordinates of each segment of a payload, whose header and sections are checked first."""
        payload = wire.check_payload(payload)
        if not core.compiled():
            return wire.parse(payload, numel).header.sizes
        try:
            core.parse(payload, numel)
        except core.CoreError as error:
            raise PayloadError(f"payload: {error}") from None
        return wire.read_sizes(payload)

    def _decode(self, payload: Tensor, numel: int | None) -> Tensor:
        parsed = wire.parse(payload, numel)
        levels, words = self._codebook_of(parsed.header)
        buckets = Buckets.cut(parsed.header.sizes, parsed.header.bucket_size, parsed.header.min_numel)
        symbols = wire.decode_symbols(parsed, words, buckets)
        return _join(parsed.header, dequantize(Quantized(symbols, parsed.norms), buckets, levels), parsed.raw)

    def statistics(self, vector: Tensor, sizes: Sequence[int], form: str) -> tuple[int, Tensor, Tensor]:
        """What ``adaptation.Statistics`` holds in this form, of the coded segments of a float32 vector."""
        if core.compiled():
            segments = core.Segments.cut(vector, sizes)
            return core.statistics(self._layout(sizes), NORMS.index(self.norm), segments, form, NO_WEIGHT)
        buckets = Buckets.cut(sizes, self.bucket_size, self.min_numel)
        coded = vector[_coded_mask(sizes, self.min_numel)]
        measure = weighted_histograms if form == "histogram" else weighted_moments
        return measure(coded, buckets, bucket_norms(coded, buckets, self.norm))

    def _codebook_of(self, header: wire.Header) -> tuple[Levels, Codebook]:
        if header.inline:
            return header.inline
        ours = (self.coder, self.levels.num_levels, self.codebook_hash)
        if (header.coder, header.num_levels, header.codebook) != ours:
            theirs = f"{header.coder} {header.num_levels} {header.codebook:016x}"
            ours = f"{self.coder} {self.levels.num_levels} {self.codebook_hash:016x}"
            raise PayloadError(f"payload: codebook is {theirs}, the decoder's is {ours}")
        return self.levels, self.codebook


def _cut_of(payload: Tensor, numel: int) -> tuple[int, ...]:
    """The sizes of a payload's segments, unchecked but for their sum: the core compares them once more."""
    try:
        sizes = wire.read_sizes(payload)
    except (ValueError, struct.error):  # it is shorter than it says
        sizes = None
    if sizes is None or sum(sizes) != numel:
        core.parse(payload, numel)  # which says what is wrong with it
    return sizes


def _coded_mask(sizes: Sequence[int], min_numel: int) -> Tensor:
    """bool[n]: which coordinates belong to segments that are coded."""
    sizes = torch.tensor(sizes, dtype=torch.int64)
    return torch.repeat_interleave(sizes >= min_numel, sizes)


def _join(header: wire.Header, coded: Tensor, raw: Tensor) -> Tensor:
    if len(raw) == 0:
        return coded
    is_coded = _coded_mask(header.sizes, header.min_numel)
    vector = torch.empty(header.numel)
    vector[is_coded], vector[~is_coded] = coded, raw
    return vector


def _spoil_segments(raw: Tensor, header: wire.Header) -> Tensor:
    """Makes a raw segment NaN throughout if any of its coordinates is not finite, as a coded one would be."""
    if bool(raw.isfinite().all()):
        return raw
    parts = raw.split([size for size in header.sizes if size < header.min_numel])
    return torch.cat([part if bool(part.isfinite().all()) else torch.full_like(part, torch.nan) for part in parts])


def _check_counts(counts: Sequence[int], length: int) -> tuple[int, ...]:
    values = check_integers("counts", counts, 0)
    if len(values) != length:
        raise ValueError(f"counts must be {length} integers, one for each magnitude, got {len(values)}")
    return values


def _check_sizes(sizes: Sequence[int] | None, numel: int) -> tuple[int, ...]:
    sizes = (numel,) if sizes is None else check_integers("sizes", sizes, 0)
    if sum(sizes) != numel:
        raise ValueError(f"sizes must add up to the gradient's {numel} coordinates, got {sum(sizes)}")
    return sizes


def _check_out(out: Tensor, least: int) -> Tensor:
    fits = check_type("out", out, Tensor).dtype == torch.uint8 and out.dim() == 1 and out.is_contiguous()
    if not fits or len(out) < least:
        raise ValueError(f"out must be a contiguous 1-D uint8 tensor of at least bound(numel) bytes, {least} here")
    return out


def _into(out: Tensor, payload: Tensor) -> Tensor:
    return _check_out(out, len(payload))[: len(payload)].copy_(payload)


def _check_vector(out: Tensor, numel: int | None) -> Tensor:
    fits = check_type("out", out, Tensor).dtype == torch.float32 and out.dim() == 1 and out.is_contiguous()
    if not fits or (numel is not None and len(out) != numel):
        wanted = "a contiguous float32 vector" if numel is None else f"float32 of shape ({numel},)"
        raise ValueError(f"out must be {wanted}, got {out.dtype} {tuple(out.shape)}")
    return out
