"""Ranks with and without a GPU: rank 0 codes by the kernels of one, as the CPU runs them, the others by the core."""

import dataclasses
import itertools
import sys
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from ranks import error_of, gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import PayloadError, backends, connection
from hvd_qgenx.backends.cuda import host
from hvd_qgenx.exchange import coded
from hvd_qgenx.payload import CHECKSUM

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from emulator import emulated

#: Names: an earlier test's error may keep its optimizer alive on one rank, and those without names are counted.
NUMBERS = itertools.count()


def _train(exchange, steps=3):
    model = network()
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraAdam(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=hvd_qgenx.Compression.qgenx(bits=4, adapt_at=(1,)),
        exchange=exchange,
    )
    for _ in range(steps):
        for half in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            loss(model).backward()
            half()
    return list(model.parameters()), optimizer.communication.squared_error


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_replicas_are_what_they_are_without_kernels(exchange, tmp_path):
    expected, error = _train(exchange)
    with backends.force(emulated(tmp_path) if hvd.rank() == 0 else backends.name()):
        found, measured = _train(exchange)
    assert same_on_all_ranks(found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert measured == error


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return emulated(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def four_parts(monkeypatch):
    for room in (coded, connection):  # beside backward, parts have a size of their own
        monkeypatch.setattr(room, "PART_BYTES", 4 * 1000)


# ---- what fails on one rank ------------------------------------------------------------------------------------------


def _optimizer(exchange, **options):
    model = network()
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=hvd_qgenx.Compression.qgenx(bits=4, adapt_at=(0, 2)),
        exchange=exchange,
        name=str(next(NUMBERS)),
        **options,
    )
    return model, optimizer


def _iterate(model, optimizer):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def _fails_at(work, number, error):
    """The call of that number raises; number 0 raises in every one."""
    seen = []

    def works_or_raises(*arguments):
        seen.append(arguments)
        if number in (0, len(seen)):
            raise error
        return work(*arguments)

    return works_or_raises


def _told_everywhere(found, message):
    """Rank 0 says what failed, the others which rank did."""
    messages = gathered(found)
    assert messages[0] == message, messages
    assert all("rank 0" in text and "(refusal)" in text for text in messages[1:]), messages


def _fails_and_goes_on(model, optimizer, kernels, monkeypatch, failing, message):
    """Two iterations, one in which rank 0's kernels fail and no parameter moves, and two more."""
    with backends.force(kernels if hvd.rank() == 0 else backends.name()):
        for _ in range(2):
            _iterate(model, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        with monkeypatch.context() as patch:
            patch.setattr(kernels, *failing)
            found = error_of(lambda: _iterate(model, optimizer))
        _told_everywhere(found, message)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        for _ in range(2):
            _iterate(model, optimizer)
    assert same_on_all_ranks(model.parameters())


LOST = torch.AcceleratorError("CUDA error: device lost\nSearch for the code in the documentation")
ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered")
COMPILER = backends.DeviceError("the kernels do not compile: error")
CASES = [
    ("_encode", 1, LOST, "emulated failed: CUDA error: device lost"),
    ("_encode", 3, ILLEGAL, "emulated failed: CUDA error: an illegal memory access was encountered"),
    ("_statistics", 1, COMPILER, "the kernels do not compile: error"),
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize(("work", "number", "error", "message"), CASES)
def test_a_device_that_fails_on_one_rank_is_an_error_on_all_and_changes_no_parameter(
    exchange, overlap, work, number, error, message, kernels, four_parts, monkeypatch
):
    model, optimizer = _optimizer(exchange, overlap=overlap)
    # What fails beside backward is tried again after it.
    failing = _fails_at(getattr(kernels, work), 0 if overlap else number, error)
    _fails_and_goes_on(model, optimizer, kernels, monkeypatch, (work, failing), message)


def _stock(model):
    compression = hvd_qgenx.Compression.qgenx(bits=4, adapt_at=(0, 2), name=str(next(NUMBERS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)


def _choosing(model):
    """As if Compression.auto had chosen qgenx."""
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=hvd_qgenx.Compression.auto,
        name=str(next(NUMBERS)),
    )
    exchange = optimizer._exchange
    exchange.settings = dataclasses.replace(exchange.settings, adapt_at=(0, 2))
    exchange._use("qgenx", 4, "allgather", 0)
    return optimizer


@pytest.mark.parametrize("make", [_stock, _choosing])
@pytest.mark.parametrize(("work", "number", "error", "message"), CASES)
def test_under_other_entrances_too(make, work, number, error, message, kernels, monkeypatch):
    model = network()
    failing = _fails_at(getattr(kernels, work), 0, error)
    _fails_and_goes_on(model, make(model), kernels, monkeypatch, (work, failing), message)


@pytest.mark.parametrize("choice", ["none", "qgenx"])
def test_gradients_that_cannot_be_fetched_on_one_rank_are_an_error_on_all(choice, monkeypatch):
    model = network()
    options = {"compression": getattr(hvd_qgenx.Compression, choice), "name": str(next(NUMBERS))}
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), **options
    )
    _iterate(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        if hvd.rank() == 0:
            patch.setattr(optimizer._exchange, "fuse", _fails_at(None, 0, LOST))
        found = error_of(lambda: _iterate(model, optimizer))
    _told_everywhere(found, "the gradients' device failed: CUDA error: device lost")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    _iterate(model, optimizer)
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("work", ["_encode", "_decode_mean", "_statistics"])
def test_a_device_without_memory_is_a_warning_and_replicas_are_what_they_would_be(
    exchange, work, kernels, four_parts, monkeypatch
):
    expected, optimizer = _optimizer(exchange)
    for _ in range(3):
        _iterate(expected, optimizer)
    model, optimizer = _optimizer(exchange)
    monkeypatch.setattr(kernels, work, _fails_at(None, 0, torch.OutOfMemoryError("CUDA out of memory.")))
    with backends.force(kernels if hvd.rank() == 0 else backends.name()):
        if hvd.rank() == 0:
            with pytest.warns(RuntimeWarning, match="emulated has no memory left for the exchange"):
                _iterate(model, optimizer)
                _iterate(model, optimizer)
                _iterate(model, optimizer)
        else:
            for _ in range(3):
                _iterate(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_hostile_payload_of_one_rank_has_the_same_error_on_those_with_kernels_and_those_without(kernels, monkeypatch):
    model, optimizer = _optimizer("allgather")
    _iterate(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    core = backends.backend_of(torch.device("cpu"))
    encode = type(core).encode

    def hostile(backend, codebook, norm, layout, key, segments, out, inline):
        drawn = encode(backend, codebook, norm, layout, key, segments, out, inline)
        end = drawn.size - CHECKSUM.size
        out[end - 20 : end] = 0xFF  # code words of another length
        host.seal(out, end)
        return drawn

    if hvd.rank() == 1:
        monkeypatch.setattr(type(core), "encode", hostile)
    with backends.force(kernels if hvd.rank() == 0 else backends.name()):
        message = message_on_all_ranks(PayloadError, lambda: _iterate(model, optimizer))
    assert "\n" not in message
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
