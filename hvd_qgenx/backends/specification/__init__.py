"""The specification: every operation in plain torch, which no production path runs and every backend is tested against.

``rounding`` draws symbols, ``symbols``, ``runs`` and ``planes`` write them, ``payload`` puts the bytes together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_qgenx.backends.backend import Backend, Drawn, no_counts
from hvd_qgenx.backends.specification.payload import Parsed, Quantized, pack, parse, symbols_of
from hvd_qgenx.backends.specification.rounding import (
    Buckets,
    bucket_norms,
    dequantize,
    draw_symbols,
    integers,
    weighted_histograms,
    weighted_moments,
)
from hvd_qgenx.codebook import Codebook
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import Levels
from hvd_qgenx.payload import Header, check_codebook, expect

__all__ = ["Quantized", "Specification", "quantize", "received"]


def quantize(codebook: Codebook, norm: str, layout: Layout, key: Key, vector: Tensor) -> Quantized:
    """The first half of ``encode``: draws a symbol for every coordinate that is not raw."""
    # Positions of draws count raw coordinates too, so that cutting is the only thing that moves them.
    is_coded = _coded_mask(layout)
    buckets, coded = Buckets.cut(layout), vector[is_coded]
    norms = bucket_norms(coded, buckets, norm)
    symbols = draw_symbols(coded, norms, buckets, codebook.levels, key)
    return Quantized(symbols, norms, _spoiled(vector[~is_coded], layout))


def received(layout: Layout, quantized: Quantized, levels: Levels) -> Tensor:
    """float32[n]: what every receiver will decode."""
    coded = dequantize(quantized.symbols, quantized.norms, Buckets.cut(layout).bucket_of, levels)
    return _join(layout, coded, quantized.raw)


class Specification(Backend):
    """The five functions in plain torch, on the CPU."""

    name = "specification"

    def encode(self, codebook, norm, layout, key, segments, out, inline):
        vector = _joined(segments)
        quantized = quantize(codebook, norm, layout, key, vector)
        header = Header(norm, codebook.coder, codebook.levels.num_levels, layout, key, codebook.hash, inline)
        payload = pack(header, codebook, quantized, Buckets.cut(layout))
        out[: len(payload)] = payload
        decoded = received(layout, quantized, codebook.levels)
        counts = no_counts(codebook)
        _, left = Buckets.cut(layout).with_code(quantized.norms)
        counts += torch.bincount(quantized.symbols[left].abs(), minlength=len(counts))
        spoiled = tuple(bool(part.isnan().any()) for part in decoded.split(list(layout.sizes)))
        error, total = self.squared_error(vector, decoded)
        return Drawn(len(payload), counts, error, total, spoiled)

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        parsed = [parse(payload) for payload in payloads]
        if sections is None:
            for one in parsed:
                count = len(one.header.layout.sizes)
                expect(count == len(targets), f"num_segments is {count}, expected {len(targets)}")
            sections = [range(len(targets))] * len(payloads)
        _check_sections(parsed, [target.numel() for target in targets], sections)
        sums: list[Tensor | None] = [None] * len(targets)
        # One payload after another: what an earlier one gave is in the targets.
        for one, places in zip(parsed, sections, strict=True):
            _add_sections(_decode(codebook, one), places, targets, sums)
        return tuple(_mean_of(total, len(payloads), factor) for total in sums)

    def parse(self, payload, numel=None):
        return parse(payload, numel).header

    def statistics(self, norm, layout, segments, form):
        coded, buckets = _joined(segments)[_coded_mask(layout)], Buckets.cut(layout)
        measure = weighted_histograms if form == "histogram" else weighted_moments
        return measure(coded, buckets, bucket_norms(coded, buckets, norm))

    def squared_error(self, vector, decoded):
        finite = torch.where(decoded.isfinite(), vector, 0.0).double()
        error = torch.where(decoded.isfinite(), decoded, 0.0).double() - finite
        return float(error.square().sum()), float(finite.square().sum())


def _decode(codebook: Codebook, parsed: Parsed) -> tuple[Tensor, ...]:
    """Every section of one payload."""
    layout, own = parsed.header.layout, _codebook_of(parsed, codebook)
    symbols = symbols_of(parsed, own.code, Buckets.cut(layout))
    vector = received(layout, Quantized(symbols, parsed.norms, parsed.raw), own.levels)
    return vector.split(list(layout.sizes))


def _codebook_of(parsed: Parsed, ours: Codebook) -> Codebook:
    if parsed.codebook is not None:
        return parsed.codebook
    check_codebook(parsed.header, ours)
    return ours


def _check_sections(payloads: Sequence[Parsed], sizes: Sequence[int], sections: Sequence[Sequence[int]]) -> None:
    """A section is the target's size, or empty."""
    for rank, (payload, places) in enumerate(zip(payloads, sections, strict=True)):
        own = payload.header.layout.sizes
        for place, size in zip(places, sizes, strict=True):
            expect(place < len(own), f"num_segments is {len(own)}, but section {place} is wanted")
            found = own[place] if place >= 0 else 0
            told = f"sizes: section {place} of payload {rank} has {found} coordinates, expected {size}"
            expect(found in (0, size), told)


def _add_sections(
    parts: Sequence[Tensor], places: Sequence[int], targets: Sequence[Tensor], sums: list[Tensor | None]
) -> None:
    """Adds a payload's sections to the sums, which are views of the targets; a target's first begins at zero."""
    for index, place in enumerate(places):
        if place < 0 or len(parts[place]) == 0:
            continue
        total = sums[index]
        total = targets[index].view(-1).zero_() if total is None else total
        sums[index] = total.add_(parts[place])


def _mean_of(total: Tensor | None, count: int, factor: float) -> bool:
    """Divides a float32 sum by ``count`` and multiplies it by ``factor``; whether the result is not finite."""
    if total is None:
        return False
    total.div_(count)
    if factor != 1.0:
        total.mul_(factor)
    return not bool(total.isfinite().all())


def _joined(segments: Sequence[Tensor]) -> Tensor:
    return torch.cat([*segments, torch.zeros(0, dtype=torch.float32, device="cpu")])


def _coded_mask(layout: Layout) -> Tensor:
    """bool[n]: which coordinates belong to segments that are coded."""
    sizes = integers(layout.sizes)
    return torch.repeat_interleave(sizes >= layout.min_numel, sizes)


def _join(layout: Layout, coded: Tensor, raw: Tensor) -> Tensor:
    if len(raw) == 0:
        return coded
    is_coded = _coded_mask(layout)
    vector = torch.empty(layout.numel, dtype=torch.float32, device="cpu")
    vector[is_coded], vector[~is_coded] = coded, raw
    return vector


def _spoiled(raw: Tensor, layout: Layout) -> Tensor:
    """Makes a raw segment NaN throughout if any of its coordinates is not finite, as a coded one would be."""
    if bool(raw.isfinite().all()):
        return raw
    parts = raw.split(list(layout.raw_sizes))
    return torch.cat([part if bool(part.isfinite().all()) else torch.full_like(part, torch.nan) for part in parts])
