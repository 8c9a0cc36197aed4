"""Theorems 1 and 2: variance and code length are what the paper promises, on many combinations and real gradients."""

import itertools
import math

import pytest
import torch
from drawn import as_received, drawn

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.adaptation import Statistics, fit
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.words import huffman_lengths

DRAWS = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "laplace": lambda n, g: torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(n, generator=g).clamp(1e-6, 1 - 1e-6)
    ),
    "student": lambda n, g: torch.randn(n, generator=g) / torch.randn(3, n, generator=g).square().mean(0).sqrt(),
    "sparse": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.05),
}
TABLES = {
    "ternary": Levels.uniform(2),
    "uniform": Levels.uniform(4),
    "uniform8": Levels.uniform(8),
    "exponential": Levels.exponential(4),
    "thirds": Levels.exponential(3, base=1 / 3),
    "uneven": Levels((0.0, 0.002, 0.05, 0.3, 0.31, 1.0)),
}


def _draw(name: str, numel: int) -> torch.Tensor:
    return DRAWS[name](numel, torch.Generator().manual_seed(numel))


def _real_gradient() -> torch.Tensor:
    """Of a small network on scikit-learn's digits, after 20 steps."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        optimizer.zero_grad()
        rows = slice(64 * step, 64 * step + 64)
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def _exact_variance(vector: torch.Tensor, levels: Levels, norm: str) -> float:
    """norm^2 sum_i (l+ - u_i)(u_i - l-), in float64."""
    v, table = vector.double().abs(), torch.tensor(levels.values, dtype=torch.float64)
    scale = v.norm() if norm == "l2" else v.max()
    u = (v / scale).clamp(max=1.0)
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp(max=levels.num_levels - 1)
    return float(scale**2 * ((table[lower + 1] - u) * (u - table[lower])).sum())


COMBINATIONS = list(itertools.product(TABLES, ["l2", "linf"], [1, 5, 32, 257, 1024, 8192], DRAWS))


def test_there_are_enough_combinations():
    assert len(COMBINATIONS) >= 150


@pytest.mark.parametrize("table", TABLES)
def test_theorem_1_bounds_the_exact_variance_everywhere(table):
    for name, norm, d, draw in COMBINATIONS:
        if name != table:
            continue
        vector, levels = _draw(draw, d), TABLES[table]
        if vector.any():
            bound = levels.variance_bound(d, norm) * float(vector.double().square().sum())
            # The bound can be tight; 1e-9 is for the rounding of sums of up to 8192 float64.
            assert _exact_variance(vector, levels, norm) <= bound * (1 + 1e-9) + 1e-300, (norm, d, draw)


@pytest.mark.parametrize(("table", "norm"), list(itertools.product(TABLES, ["l2", "linf"])))
def test_measured_variance_is_the_exact_one(table, norm):
    """Mean of 400 independent roundings, within 5 deviations of that mean (float32 norms add 2**-23 at most)."""
    d, repeats, levels = 257, 400, TABLES[table]
    for draw in DRAWS:
        vector = _draw(draw, d)
        codec = Codec(levels, "fixed", bucket_size=d, norm=norm)
        decoded = as_received(codec, vector.repeat(repeats), Key(1, 0, 0))
        errors = (decoded.view(repeats, d) - vector).double().square().sum(1)
        exact = _exact_variance(vector, levels, norm)
        assert abs(float(errors.mean()) - exact) <= 5 * float(errors.std()) / math.sqrt(repeats) + 1e-5 * exact


@pytest.mark.parametrize("draw", [*DRAWS, "real"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_theorem_2_bounds_the_measured_code_length(draw, norm):
    vector = _real_gradient() if draw == "real" else _draw(draw, 65536)
    d, size = len(vector), 1024
    first = Codec(Levels.exponential(4), bucket_size=size, norm=norm)
    levels, _ = fit(Statistics.measure(first, [vector], first.layout((d,))), 4)
    for table in (levels, Levels.uniform(4), Levels.exponential(4), Levels.uniform(2)):
        symbols = drawn(Codec(table, bucket_size=size, norm=norm), vector, Key(0, 0, 0)).symbols
        counts = torch.bincount(symbols.abs().long(), minlength=table.num_levels + 1).tolist()
        shares = [count / d for count in counts]
        codec = Codec(table, bucket_size=size, norm=norm, counts=counts)
        entropy = -sum(share * math.log2(share) for share in shares if share)
        mean = sum(share * length for share, length in zip(shares, huffman_lengths(counts), strict=True))
        assert entropy - 1e-9 <= mean < entropy + 1, "Huffman is within a bit of the entropy"
        buckets = -(-d // size)
        bound = 48 * buckets + (1 - shares[0]) * d + (entropy + 1) * d
        assert codec.expected_bits(d, shares) <= bound
        empty = len(codec.encode(torch.zeros(0), Key(0, 0, 0), inline=False))
        measured = 8 * (len(codec.encode(vector, Key(0, 0, 0), inline=False)) - empty)
        words = torch.tensor(codec.codebook.code.lengths)[symbols.long() + table.num_levels]
        if codec.codebook.code.runs:
            # Expected for zeros at random with one share in all buckets, which is not so: 0.988 to 1.010 measured.
            assert measured == pytest.approx(codec.expected_bits(d, shares), rel=0.02)
        else:
            assert 0 <= measured - 48 * buckets - int(words.sum()) <= 7 * buckets
            # Words of both signs differ, and as many of each are expected: five deviations of the difference.
            pairs = torch.tensor(codec.codebook.code.lengths, dtype=torch.float64)
            spread = (torch.tensor(counts) * ((pairs - pairs.flip(0))[table.num_levels :] / 2).square()).sum().sqrt()
            assert abs(48 * buckets + int(words.sum()) - codec.expected_bits(d, shares)) <= 5 * float(spread) + 1e-6 * d
        assert measured <= bound + 7 * buckets


@pytest.mark.parametrize("coder", CODERS)
def test_expected_bits_of_normal_buckets_are_near_the_measured_ones(coder):
    vector = _draw("normal", 262144)
    codec = Codec(Levels.uniform(4), coder)
    measured = 8 * len(codec.encode(vector, Key(0, 0, 0), inline=False))
    # 1 % : 84 bytes of header and checksum and half a byte a bucket make 0.5 % of the shortest of these payloads.
    assert measured == pytest.approx(codec.expected_bits(len(vector)), rel=0.01)


def test_probabilities_of_another_length_are_refused():
    with pytest.raises(ValueError, match="probabilities must be 8 numbers, got 2"):
        Codec(Levels.uniform(4)).expected_bits(10, (0.5, 0.5))
