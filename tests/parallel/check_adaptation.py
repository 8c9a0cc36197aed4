"""Levels that all ranks fit alike: agreement after every update, late ranks, stale codebooks, exact resume."""

import copy

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression, Levels
from hvd_qgenx.adaptation import Settings
from hvd_qgenx.exchange import CodedExchange
from hvd_qgenx.transports.horovod import HorovodTransport

RANKS = hvd.size()


def _exchange(exchange, tensors):
    """One exchange, by the verbs in their order."""
    if not exchange.sizes:
        names = ["a", "b"][: len(tensors)]
        exchange.describe(names, [torch.float32] * len(names), [3000, 2000] if len(names) == 2 else [len(tensors[0])])
    fused = exchange.fuse(tensors)
    exchange.settle()
    exchange.adapt_if_due(fused)
    return exchange.collect(exchange.submit(fused, "step"), ["a", "b"][: len(tensors)])


def _codebook(exchange):
    """All that ranks must have in common after an update."""
    codec = exchange.codec
    return exchange.version, codec.levels.values, codec.counts, codec.codebook.code.words, codec.codebook.hash


def _normal():
    return [torch.randn(3000), torch.randn(50, 40) ** 3]


#: What the last rank has instead of gradients of its own.
ODD_ONES = {
    "own": _normal,
    "zero": lambda: [torch.zeros(3000), torch.zeros(50, 40)],
    "none": lambda: [None, None],
    "nan": lambda: [torch.full((3000,), torch.nan), torch.randn(50, 40)],
    "tiny": lambda: [tensor * 1e-30 for tensor in _normal()],
}


@pytest.mark.parametrize(
    ("odd", "options"),
    [(odd, {"statistics": form}) for odd in ODD_ONES for form in ("histogram", "normal")]
    + [("own", {"rate_weight": 0.05}), ("own", {"rate_weight": 0.05, "statistics": "normal", "norm": "linf"})],
)
@pytest.mark.filterwarnings("ignore:the gradient of a is not finite")
def test_codebooks_are_identical_after_every_update(options, odd):
    exchange = CodedExchange(Settings(adapt_at=(0, 2), adapt_every=0, **options), HorovodTransport())
    seen = []
    for iteration in range(3):
        tensors = _normal() if hvd.rank() < RANKS - 1 else ODD_ONES[odd]()
        _exchange(exchange, tensors)
        codebooks = gathered(_codebook(exchange))
        assert all(codebook == codebooks[0] for codebook in codebooks), iteration
        seen.append(codebooks[0])
    versions = [version for version, *_ in seen]
    assert versions == [1, 1, 2]
    assert len({codebook[-1] for codebook in seen}) == 2, "every update changed the codebook, and nothing else did"
    assert exchange.communication.codebook_version == 2 and exchange.communication.adaptations == 2


@pytest.mark.parametrize(("statistics", "size"), [("histogram", 8448), ("normal", 176)])
@pytest.mark.parametrize("numel", [1024, 20_000])
def test_messages_of_statistics_have_the_documented_size_whatever_the_gradients(statistics, size, numel):
    exchange = CodedExchange(Settings(statistics=statistics, adapt_at=(0, 1), adapt_every=0), HorovodTransport())
    for _ in range(3):
        _exchange(exchange, [torch.randn(numel)])
    communication = exchange.communication
    assert communication.adaptation_bytes == 2 * size and communication.adaptations == 2
    assert communication.adaptation_seconds > 0.0
    assert f"codebook 2 (2 adaptations: {2 * size:,} bytes, " in str(communication)


def test_both_halves_of_an_iteration_have_the_same_codebook():
    model = network()
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraSGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=Compression.qgenx(bits=4, adapt_at=(0, 1, 2, 3), adapt_every=0),
    )
    hashes = []
    for _ in range(4):
        for half_step in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            loss(model).backward()
            half_step()
            hashes.append(optimizer._exchange.codec.codebook.hash)
    assert hashes[::2] == hashes[1::2] and len(set(hashes)) == 4
    assert set(map(tuple, gathered(hashes))) == {tuple(hashes)}


def _wrapped(model, choice):
    compression = Compression.none if choice == "none" else Compression.qgenx(bits=4, adapt_at=(0, 2, 4), seed=3)
    return hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraSGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compression
    )


def _iterate(optimizer, model, count):
    for _ in range(count):
        for half_step in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            loss(model).backward()
            half_step()


@pytest.mark.parametrize("late", [0, RANKS - 1])
@pytest.mark.parametrize("choice", ["none", "qgenx"])
def test_a_rank_that_joins_late_gets_counters_and_codebook_from_the_others(choice, late):
    model = network()
    optimizer = _wrapped(model, choice)
    _iterate(optimizer, model, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for loads in (lambda: True, lambda: hvd.rank() != late):
        resumed = network(seed=5)
        other = _wrapped(resumed, choice)
        resumed.load_state_dict(saved[0])
        if loads():
            other.load_state_dict(copy.deepcopy(saved[1]))
        torch.manual_seed(7 + hvd.rank())
        _iterate(other, resumed, 3)
        ends.append((list(resumed.parameters()), other._exchange.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert ends[0][1] == ends[1][1] and ends[0][1]["step"] == 12
    assert same_on_all_ranks(ends[1][0])


def _stock(model, compressor):
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )


def _steps(optimizer, model, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("late", [None, 0, RANKS - 1])
def test_the_drop_in_resumes_exactly_also_where_one_rank_starts_afresh(late):
    """Three steps, then three more with an adaptation at the fifth; the same from a checkpoint of the first three."""
    make = lambda: Compression.qgenx(bits=3, adapt_at=(0, 2, 4), adapt_every=0, seed=11)  # noqa: E731
    model, compressor = network(), make()
    optimizer = _stock(model, compressor)
    _steps(optimizer, model, 3)
    saved = copy.deepcopy((model.state_dict(), compressor.state_dict()))
    torch.manual_seed(7 + hvd.rank())
    _steps(optimizer, model, 3)

    resumed, other = network(seed=5), make()
    resumed.load_state_dict(saved[0])
    if hvd.rank() != late:
        other.load_state_dict(saved[1])
    torch.manual_seed(7 + hvd.rank())
    _steps(_stock(resumed, other), resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert other.state_dict() == compressor.state_dict()
    assert other.state_dict()["version"] == 3 and other.state_dict()["step"] == 6
    states = gathered(other.state_dict())
    assert all(state == states[0] for state in states)


def test_the_most_advanced_rank_gives_its_state_and_the_lowest_of_equals():
    compressor = Compression.qgenx(bits=4, adapt_at=(), adapt_every=0)
    # Rank 0 is behind; ranks from 1 on are equally far, with levels of their own.
    values = (0.0, *(j / (10 + hvd.rank()) for j in range(1, 7)), 1.0)
    state = {"step": 5 if hvd.rank() else 4, "iteration": 5, "version": 2, "levels": values, "counts": None}
    compressor.load_state_dict({**compressor.state_dict(), **state})
    hvd.allreduce(torch.randn(3000), name="leader", compression=compressor)
    expected = Levels((0.0, *(j / 11 for j in range(1, 7)), 1.0))
    assert compressor._exchange.codec.levels == expected and compressor.state_dict()["step"] == 6


@pytest.mark.parametrize("entrance", ["drop-in", "wrapper"])
def test_a_stale_codebook_is_an_error_on_all_ranks_that_names_both(entrance):
    model = network()
    if entrance == "drop-in":
        compressor = Compression.qgenx(bits=4, adapt_at=(0, 1), adapt_every=0)
        optimizer, exchange = _stock(model, compressor), compressor._exchange
    else:
        optimizer = hvd_qgenx.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            compression=Compression.qgenx(bits=4, adapt_at=(0, 1), adapt_every=0),
        )
        exchange = optimizer._exchange
    _steps(optimizer, model, 1)
    stale = exchange.state_dict()
    _steps(optimizer, model, 1)
    if hvd.rank() == RANKS - 1:
        exchange.load_state_dict({**exchange.state_dict(), "levels": stale["levels"], "counts": stale["counts"]})
    before = [p.detach().clone() for p in model.parameters()]
    message = message_on_all_ranks(RuntimeError, lambda: _steps(optimizer, model, 1))
    hashes = gathered(exchange.codec.codebook.hash)
    assert message.startswith(
        f"ranks disagree: rank 0 coded with codebook {hashes[0]:016x}, "
        f"rank {RANKS - 1} with codebook {hashes[-1]:016x}; one of them has a stale state"
    )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "no step was taken"
