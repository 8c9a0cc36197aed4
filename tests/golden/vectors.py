"""The inputs of the golden vectors. ``python tests/golden/vectors.py`` writes the files; no test does."""

import json
from pathlib import Path

import torch

from hvd_qgenx import Codec, Key, Levels

#: name -> codec, segment sizes
CASES = {
    "huffman_l2": (Codec(Levels.exponential(4), bucket_size=32), (70,)),
    "huffman_counts": (Codec(Levels.uniform(4), norm="linf", bucket_size=32, counts=(1, 2, 4, 8, 4, 2, 1, 1)), (70,)),
    "fixed_8_bits": (Codec(Levels.uniform(8), "fixed", 64, "linf"), (70,)),
    "elias_gamma": (Codec(Levels.uniform(4), "elias_gamma", 64), (70,)),
    "elias_delta": (Codec(Levels((0.0, 0.01, 0.1, 1.0)), "elias_delta", 64), (70,)),
    "elias_omega": (Codec(Levels.uniform(2), "elias_omega", 1024), (70,)),
    "huffman_runs": (Codec(Levels.uniform(4), bucket_size=64), (70,)),
    "ternary_runs": (Codec(Levels.uniform(2)), (1030,)),
    "elias_runs": (Codec(Levels.exponential(3), "elias_runs", 64), (70,)),
    "segments": (Codec(Levels.uniform(3), bucket_size=16, min_numel=8), (40, 3, 0, 27)),
    "empty": (Codec(Levels.uniform(4)), (0,)),
    "zero_buckets": (Codec(Levels.uniform(4), bucket_size=16), (70,)),
    "subnormal": (Codec(Levels.exponential(4), "fixed", 64), (70,)),
}


def values(count: int) -> torch.Tensor:
    """Numbers of many sizes that need no generator: (-1)^i (i^2 mod 97) 2^(i mod 7) / 64."""
    return torch.tensor([(-1) ** i * (i * i % 97) * 2.0 ** (i % 7) / 64 for i in range(count)])


def encode(name: str) -> torch.Tensor:
    """The payload of a case."""
    codec, sizes = CASES[name]
    vector = values(sum(sizes))
    if name == "zero_buckets":
        vector[16:48] = 0.0
    if name == "subnormal":
        vector *= 2.0**-140
    return codec.encode(vector, Key(seed=11, rank=1, step=5, stream=0), sizes=sizes)


def write(folder: Path) -> None:
    """Writes every payload, and what it decodes to as hexadecimal floats."""
    manifest = {}
    for name, (codec, _) in CASES.items():
        payload = encode(name)
        (folder / f"{name}.bin").write_bytes(payload.numpy().tobytes())
        manifest[name] = [value.hex() for value in codec.decode_mean([payload]).double().tolist()]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(__file__).parent)
