"""The compiled core against the specification in plain torch: the same symbols, the same bytes, the same refusals."""

import itertools

import pytest
import torch

from hvd_qgenx import Codec, Key, Levels, core
from hvd_qgenx.coders import CODERS

COMPILED = [name for name in ("portable", core.backend.name) if name != "reference"]
LEVELS = {
    "ternary": Levels.uniform(2),
    "uniform4": Levels.uniform(4),
    "uniform8": Levels.uniform(8),
    "exponential3": Levels.exponential(3),
    "exponential4": Levels.exponential(4),
    "exponential5": Levels.exponential(5),
    "exponential8": Levels.exponential(8),
    "five": Levels((0.0, 0.011, 0.012, 0.3, 0.7, 1.0)),
    "eight": Levels((0.0, *(0.9**j for j in range(7, 0, -1)), 1.0)),
    "crowded": Levels((0.0, *(0.5 + j / 2**12 for j in range(98)), 1.0)),
}


def _vector(numel, seed=0, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(numel, generator=generator)
    if kind == "heavy":
        return vector**5
    return vector * (torch.rand(numel, generator=generator) < 0.03) if kind == "sparse" else vector


def _on(name, call, *arguments, **options):
    with core.force(name):
        return call(*arguments, **options)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_backend_writes_the_same_bytes_and_reads_the_same_values(coder, levels, norm):
    for kind, size in itertools.product(("normal", "heavy", "sparse"), (64, 1000)):
        codec = Codec(LEVELS[levels], coder, size, norm, min_numel=5)
        sizes = (1, 7, 0, 64, 1000, 4, 2003)
        vector, key = _vector(sum(sizes), 1, kind), Key(3, 1, 4)
        payload = _on("reference", codec.encode, vector, key, sizes=sizes)
        decoded = _on("reference", codec.decode_mean, [payload])
        assert len(payload) <= codec.bound(len(vector), sizes)
        for name in COMPILED:
            assert torch.equal(_on(name, codec.encode, vector, key, sizes=sizes), payload)
            assert torch.equal(_on(name, codec.decode_mean, [payload]), decoded)
