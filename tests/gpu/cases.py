"""Drawn cases of everything a codec can be told, on the emulated kernels and on the core: equal, or it says where.

python tests/gpu/cases.py --cases 20000 --damaged 20000 runs many; the tests run some.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from emulator import EXACT, emulated

from hvd_qgenx import Codec, Key, Levels, PayloadError
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.cuda import host
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.payload import CHECKSUM, OFFSETS

SIZES = (1, 3, 16, 31, 32, 64, 500, 1000, 1023, 1024, 1025, 2048, 3000, 5000, 16384)


def draw_levels(draw: random.Random) -> Levels:
    kind = draw.choice(["uniform", "exponential", "any", "any", "many"])
    if kind in ("uniform", "exponential"):
        return getattr(Levels, kind)(draw.randint(2, 8))
    count = draw.randint(1, 12 if kind == "any" else 126)
    inner = sorted({torch.tensor(draw.uniform(1e-4, 0.999)).item() ** draw.choice([1, 3]) for _ in range(count)})
    return Levels((0.0, *inner, 1.0))


def draw_codec(draw: random.Random) -> Codec:
    levels, coder = draw_levels(draw), draw.choice([*CODERS, "huffman", "huffman"])
    counts = None
    if coder == "huffman" and draw.random() < 0.5:
        steep = draw.choice([0, 1, 2, 4, 8])
        counts = tuple(int(2**20 / (1 + m) ** steep) + draw.randint(0, 9) for m in range(levels.num_levels + 1))
    return Codec(
        levels, coder, draw.choice(SIZES), draw.choice(["l2", "linf"]), counts=counts, min_numel=draw.choice([0, 5])
    )


def draw_vector(draw: random.Random, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw.randint(0, 2**40))
    vector = torch.randn(numel, generator=generator)
    kind = draw.choice(["normal", "heavy", "sparse", "spike", "zeros", "scaled"])
    if kind == "heavy":
        vector = vector**5
    elif kind == "sparse":
        vector *= torch.rand(numel, generator=generator) < draw.choice([0.003, 0.05, 0.3])
    elif kind == "spike" and numel:
        vector[draw.randrange(numel)] = draw.choice([1e4, -1e-3, 1e30])
    elif kind == "zeros":
        vector[: numel // 2] = 0.0
    elif kind == "scaled":
        vector = (vector.double() * 2.0 ** draw.randint(-149, 126)).float()
    if numel and draw.random() < 0.05:
        vector[draw.randrange(numel)] = draw.choice([float("nan"), float("inf"), -float("inf")])
    return vector


def draw_sizes(draw: random.Random) -> list[int]:
    most = draw.choice([40, 1500, 1500, 6000])
    return [draw.choice([0, 1, 4, 31, draw.randint(0, most)]) for _ in range(draw.randint(1, 4))]


class Case:
    """One drawn case: what is encoded, and by which settings."""

    def __init__(self, number: int):
        self.number, self.draw = number, random.Random(number)
        self.codec, self.sizes = draw_codec(self.draw), draw_sizes(self.draw)
        self.vector, self.inline = draw_vector(self.draw, sum(self.sizes)), self.draw.random() < 0.5
        position = self.draw.choice([0, 2**40])
        self.key = Key(self.draw.randint(0, 2**64 - 1), self.draw.randint(0, 99), position, self.draw.randint(0, 3))

    def encode(self, backend):
        out = torch.zeros(self.codec.bound(len(self.vector), self.sizes), dtype=torch.uint8)
        layout = self.codec.layout(self.sizes)
        segments = self.vector.split(self.sizes)
        drawn = backend.encode(self.codec.codebook, self.codec.norm, layout, self.key, segments, out, self.inline)
        return out[: drawn.size], (drawn.counts.tolist(), drawn.squared_error, drawn.squared_norm, drawn.spoiled)

    def decode(self, backend, payloads, factor=1.0):
        targets = [torch.full((size,), 7.0) for size in self.sizes]
        try:
            broken = backend.decode_mean(self.codec.codebook, payloads, targets, None, factor)
        except PayloadError as error:
            return str(error)
        return broken, torch.cat(targets)

    def statistics(self, backend, form):
        layout = self.codec.layout(self.sizes)
        exponent, *sums = backend.statistics(self.codec.norm, layout, self.vector.split(self.sizes), form)
        return exponent, [one.tolist() for one in sums]


def same(first, second) -> bool:
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    return first[0] == second[0] and torch.allclose(first[1], second[1], rtol=0, atol=0, equal_nan=True)


def compare(case: Case, ours, core) -> str:
    """What differs, or nothing."""
    (payload, drawn), (theirs, expected) = case.encode(ours), case.encode(core)
    if not torch.equal(payload, theirs):
        return "bytes"
    if drawn != expected:
        return f"what was drawn: {drawn} and {expected}"
    for count, factor in ((1, 1.0), (3, 2.0)):
        if not same(case.decode(ours, [payload] * count, factor), case.decode(core, [payload] * count, factor)):
            return f"means of {count}"
    form = case.draw.choice(["histogram", "normal"])
    return "" if case.statistics(ours, form) == case.statistics(core, form) else form


def damage(case: Case, payload: torch.Tensor) -> torch.Tensor:
    """A payload with bytes changed behind its header, and a checksum that fits again."""
    damaged, draw = payload.clone(), case.draw
    start = draw.choice([OFFSETS["codebook_hash"] + 8, len(payload) * 3 // 4]) if case.inline else len(payload) * 2 // 3
    for _ in range(draw.choice([1, 1, 3, 20])):
        place = draw.randrange(min(start, len(payload) - CHECKSUM.size - 1), len(payload) - CHECKSUM.size)
        damaged[place] ^= draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
    host.seal(damaged, len(damaged) - CHECKSUM.size)
    return damaged


def compare_damaged(case: Case, ours, core) -> tuple[str, bool]:
    """What differs, or nothing; and whether the core refuses it."""
    payload, _ = case.encode(core)
    damaged = damage(case, payload)
    expected = case.decode(core, [damaged])
    return "" if same(case.decode(ours, [damaged]), expected) else "a damaged payload", isinstance(expected, str)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--damaged", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ours, core = emulated(Path(folder), 12345, EXACT), Compiled(best_path())
        refused = 0
        for number in range(flags.first, flags.first + flags.cases):
            if wrong := compare(Case(number), ours, core):
                raise SystemExit(f"case {number}: {wrong}")
        for number in range(flags.first, flags.first + flags.damaged):
            wrong, is_refused = compare_damaged(Case(number), ours, core)
            refused += is_refused
            if wrong:
                raise SystemExit(f"case {number}: {wrong}")
    print(f"{flags.cases} cases and {flags.damaged} damaged payloads, {refused} of them refused: all equal")


if __name__ == "__main__":
    main()
