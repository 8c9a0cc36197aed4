"""Symbols of buckets as code words, laid out depth by depth, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_qgenx.backends.specification.planes import Reader, write_planes
from hvd_qgenx.backends.specification.rounding import Buckets, counting, integers
from hvd_qgenx.backends.specification.runs import read_runs, run_plane
from hvd_qgenx.codebook import Code
from hvd_qgenx.words import CodeError


def write_symbols(code: Code, symbols: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor]:
    """Bytes uint8[m] of all buckets, each starting a new byte, and their lengths in bytes, int64[B]."""
    planes = _fixed_planes(code, symbols, buckets) if code.width else _word_planes(code, symbols, buckets)
    return write_planes(planes, len(buckets.lengths))


def read_symbols(code: Code, packed: Tensor, byte_lengths: Tensor, buckets: Buckets) -> Tensor:
    """Symbols int8[n]. Raises CodeError unless the bytes are what ``write_symbols`` writes for some symbols."""
    reader = Reader(packed, byte_lengths)
    symbols = _read_fixed(code, reader, buckets) if code.width else _read_words(code, reader, buckets)
    reader.finish()
    return symbols


def _word_planes(code: Code, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
    """(bucket of each bit, bits): runs and signs of ones, if there are any, then the words depth by depth."""
    planes, elements = [], counting(len(symbols))
    for stage in range(code.stages):
        ends = symbols[elements].abs() > stage
        planes.append(run_plane(code.runs, ends, _counts(elements, buckets)))
        # Those inside runs have no word; those that end one go on to the next stage.
        inside, elements = elements[~ends], elements[ends]
        if stage:
            planes.append((buckets.bucket_of[inside], symbols[inside] < 0))
    for depth in range(code.depth):
        elements = elements[integers(code.lengths)[symbols[elements].long() + code.num_levels] > depth]
        bits = torch.tensor([word[depth : depth + 1] == "1" for word in code.words], dtype=torch.bool, device="cpu")
        planes.append((buckets.bucket_of[elements], bits[symbols[elements].long() + code.num_levels]))
    return planes


def _leaves(code: Code) -> dict[str, int]:
    """The symbol of each word."""
    s = code.num_levels
    return {word: i - s for i, word in enumerate(code.words) if abs(i - s) >= code.stages}


def _read_words(code: Code, reader: Reader, buckets: Buckets) -> Tensor:
    elements = counting(len(buckets.bucket_of))
    symbols = torch.zeros(len(elements), dtype=torch.int8, device="cpu")
    for stage in range(code.stages):
        ends = read_runs(code.runs, reader, _counts(elements, buckets))
        inside, elements = elements[~ends], elements[ends]
        if stage:
            symbols[inside] = 1 - 2 * reader.read(buckets.bucket_of[inside]).to(torch.int8)
    # Decoding walks the tree for all elements at once: a list of them for each prefix.
    passing, leaves = {"": elements}, _leaves(code)
    for _ in range(code.depth):
        passing = _read_depth(leaves, reader, buckets, passing, symbols)
    return symbols


def _read_depth(
    leaves: dict[str, int], reader: Reader, buckets: Buckets, passing: dict[str, Tensor], symbols: Tensor
) -> dict[str, Tensor]:
    """The next bit of the elements that pass each prefix; sets the symbols of those whose words end there."""
    # In the vector's order: that is how the encoder wrote this depth.
    elements = torch.cat(list(passing.values())).sort().values
    bits = torch.zeros(len(symbols), dtype=torch.bool, device="cpu")
    bits[elements] = reader.read(buckets.bucket_of[elements]).bool()
    longer = {}
    for prefix, part in passing.items():
        for word, found in ((prefix + "0", part[~bits[part]]), (prefix + "1", part[bits[part]])):
            if word in leaves:
                symbols[found] = leaves[word]
            # A prefix of no word is damage, if anything passes it.
            elif any(leaf.startswith(word) for leaf in leaves):
                longer[word] = found
            elif len(found):
                raise CodeError("a code word that does not exist")
    return longer


def _fixed_planes(code: Code, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
    """One plane, in which each element has all its bits in turn, lowest first."""
    codes = symbols.long() + code.num_levels
    bits = ((codes[:, None] >> counting(code.width)) & 1).bool().view(-1)
    return [(buckets.bucket_of.repeat_interleave(code.width), bits)]


def _read_fixed(code: Code, reader: Reader, buckets: Buckets) -> Tensor:
    bits = reader.read(buckets.bucket_of.repeat_interleave(code.width)).view(-1, code.width).long()
    symbols = (bits << counting(code.width)).sum(dim=1) - code.num_levels
    if len(symbols) and int(symbols.max()) > code.num_levels:
        raise CodeError("a symbol above the highest level")
    return symbols.to(torch.int8)


def _counts(elements: Tensor, buckets: Buckets) -> list[int]:
    """How many of ``elements`` each bucket has."""
    return torch.bincount(buckets.bucket_of[elements], minlength=len(buckets.lengths)).tolist()
