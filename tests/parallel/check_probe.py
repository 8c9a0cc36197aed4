"""A probe, exchange="auto" and Compression.auto on several ranks: the same on all of them, and kept."""

import copy
import logging
import time
from functools import partial

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange import AutomaticExchange, CodedExchange
from hvd_qgenx.exchange.coded import rehearse_coded
from hvd_qgenx.exchange.cost import Way
from hvd_qgenx.exchange.measurement import Meter, measure_and_choose
from hvd_qgenx.exchange.message import Messenger
from hvd_qgenx.transports.horovod import HorovodTransport

RANKS = hvd.size()
LARGE = 5_000_000  # coordinates, so many that they may travel in parts


@pytest.fixture
def logged(caplog):
    """What the package has said."""
    with caplog.at_level(logging.INFO, logger="hvd_qgenx"):
        yield lambda: [record.message for record in caplog.records if record.name == "hvd_qgenx"]


def _large():
    p = torch.nn.Parameter(torch.zeros(LARGE))
    p.grad = torch.randn(LARGE, generator=torch.Generator().manual_seed(hvd.rank()))
    return p


def _wrapped(parameters, compression, **options):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return hvd_qgenx.DistributedOptimizer(optimizer, compression=compression, **options)


def _one_line(logged):
    """The only line, which the first rank alone has."""
    lines = gathered(logged())
    assert [len(own) for own in lines] == [1] + [0] * (RANKS - 1), lines
    return lines[0][0]


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_a_probe_is_the_same_on_all_ranks_and_keeps_its_time():
    start = time.monotonic()
    result = hvd_qgenx.probe(numel=200_000, seconds=4, repeats=5)
    took = time.monotonic() - start
    assert len(set(gathered(str(result)))) == 1 and all(other == result for other in gathered(result))
    # Every way is exchanged five times at least, however short time is: some 60 exchanges of a few milliseconds.
    assert took < 60
    ways = [(row.compression, row.bits, row.plan) for row in result.rows]
    assert ways == sorted(set(ways), key=ways.index)
    assert {way[0] for way in ways} == {"none", "fp16", "qgenx"} and result.best in result.rows
    assert ("qgenx", 4, "two_phase") in ways or RANKS == 2
    assert result.ranks == RANKS and result.numel == 200_000 and result.network.ranks == RANKS


def test_rows_of_a_probe_say_what_was_sent():
    result = hvd_qgenx.probe(sizes=[100_000, 50, 3000], seconds=2, repeats=3)
    rows = {(row.compression, row.bits, row.plan): row for row in result.rows}
    none, half, four = rows["none", 0, "allreduce"], rows["fp16", 0, "allreduce"], rows["qgenx", 4, "allgather"]
    assert 4 * 103_050 <= none.bytes_sent < 4 * 103_050 + 500 and 2 * 103_050 <= half.bytes_sent < 2 * 103_050 + 500
    # 3.4 bits for each of the normal coordinates, norms and lengths with them, and padding.
    assert 3.3 < 8 * four.bytes_sent / 103_050 < 3.7 and four.link_bytes == (RANKS - 1) * four.bytes_sent
    assert all(row.ms_p10 <= row.ms <= row.ms_p90 and row.repeats == 3 for row in result.rows)
    assert all(row.measured_numel == 103_050 for row in result.rows)
    assert none.variance == half.variance == 0.0 < four.variance < 0.1 < rows["qgenx", 2, "allgather"].variance
    assert {row.bound for row in result.rows} <= {"wire", "codec", "latency"}


def test_where_time_is_short_fewer_coordinates_are_timed_and_scaled():
    result = hvd_qgenx.probe(numel=2**21, seconds=1e-6, repeats=3)
    assert all(row.measured_numel == 2**17 for row in result.rows)
    none = result.rows[0]
    assert none.bytes_sent == pytest.approx(4 * 2**21, rel=0.001)
    assert all(row.ms > 0.0 for row in result.rows) and "~" in str(result)


# ---- exchange="auto" -------------------------------------------------------------------------------------------------


def test_a_small_network_measures_nothing_and_sends_one_message(logged):
    model = network()
    optimizer = _wrapped(model.parameters(), Compression.qgenx(bits=4))
    loss(model).backward()
    optimizer.step()
    assert logged() == [] and optimizer.communication.measurement_bytes == 0
    chosen = optimizer._exchange.chosen
    assert chosen == {"plan": "allgather", "part_bytes": 0, "ranks": RANKS}


def test_a_large_one_is_measured_once_and_all_ranks_choose_alike(logged):
    p = _large()
    optimizer = _wrapped([p], Compression.qgenx(bits=4))
    for _ in range(3):
        p.grad = torch.randn(LARGE)
        optimizer.step()
    assert f"{LARGE:,} coordinates on {RANKS} ranks" in _one_line(logged)
    assert same_on_all_ranks([p])
    chosen = optimizer._exchange.chosen
    assert all(other == chosen for other in gathered(chosen))
    assert chosen["plan"] == "allgather" or RANKS > 2
    assert optimizer.communication.measurement_bytes > 2**16


def test_a_resumed_run_makes_the_same_choice_and_ends_in_the_same_bits(logged):
    ends = []
    for resumed in (False, True):
        p = _large()
        optimizer = _wrapped([p], Compression.qgenx(bits=4, adapt_at=(0, 1)))
        if not resumed:
            optimizer.step()
            state, value = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
            # Whatever was chosen, another choice is kept: two phases where there are more than two ranks, and parts.
            memory = state["param_groups"][0]["hvd_qgenx"]
            memory["chosen"] |= {"part_bytes": 2**22, "plan": "two_phase" if RANKS > 2 else "allgather"}
        p.data.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(state))
        for call in range(2):
            p.grad = torch.randn(LARGE, generator=torch.Generator().manual_seed(10 * call + hvd.rank()))
            optimizer.step()
        assert optimizer._exchange.chosen == memory["chosen"] and optimizer._exchange.part_bytes == 2**22
        ends.append(p.detach().clone())
    assert torch.equal(*ends) and same_on_all_ranks(ends)
    assert len(gathered(logged())[0]) == 1


def test_ranks_that_loaded_nothing_take_over_the_choice_of_the_one_that_did(logged):
    p = _large()
    first = _wrapped([p], Compression.qgenx(bits=4))
    first.step()
    state = copy.deepcopy(first.state_dict())
    state["param_groups"][0]["hvd_qgenx"]["chosen"]["part_bytes"] = 2**23
    p = _large()
    second = _wrapped([p], Compression.qgenx(bits=4))
    if hvd.rank() == 1:
        second.load_state_dict(state)
    second.step()
    assert second._exchange.chosen["part_bytes"] == second._exchange.part_bytes == 2**23
    assert same_on_all_ranks([p])


def test_a_checkpoint_of_another_number_of_ranks_is_measured_anew(logged):
    p = _large()
    optimizer = _wrapped([p], Compression.qgenx(bits=4))
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["hvd_qgenx"]["chosen"]["ranks"] = RANKS + 1
    p = _large()
    other = _wrapped([p], Compression.qgenx(bits=4))
    other.load_state_dict(state)
    other.step()
    assert len(gathered(logged())[0]) == 2 and other._exchange.chosen["ranks"] == RANKS


def test_algorithm_1_takes_the_allgather_and_measures_nothing(logged):
    p = _large()
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.QGenX([p], step_scale=0.1), compression=Compression.qgenx(bits=4)
    )
    optimizer.extrapolation()
    p.grad = torch.randn(LARGE)
    optimizer.step()
    assert logged() == [] and optimizer._exchange.chosen is None and same_on_all_ranks([p])


def test_ranks_that_ask_for_different_plans_all_learn_both():
    p = torch.nn.Parameter(torch.zeros(5000))
    plan = "two_phase" if hvd.rank() else "auto"
    optimizer = _wrapped([p], Compression.qgenx(bits=4), exchange=plan)
    p.grad = torch.randn(5000)
    message = message_on_all_ranks(RuntimeError, optimizer.step)
    assert "exchange=auto" in message and "exchange=two_phase" in message


def test_a_slow_link_and_a_fast_one_are_told_apart():
    """The line of an allgather grows with its bytes, and work is hidden by no more than all of it."""
    meter = Meter(Messenger(HorovodTransport(), Communication()), 0)
    network = meter.network({"alltoall", "allreduce", "overlap"})
    assert all(other == network for other in gathered(network))
    for line in (network.allgather, network.alltoall, network.allreduce, network.allreduce16):
        assert 0.0 < line.latency < 10.0 and 0.0 <= line.per_byte < 1e-3
    assert network.allgather.per_byte > 0.0 and 0.0 <= network.overlap <= 1.0


def test_a_choice_takes_the_largest_vector_of_all_ranks():
    messenger = Messenger(HorovodTransport(), Communication())
    way = Way("qgenx", 4, "allgather")
    settings = Compression.qgenx(bits=4).settings
    ways = {way: lambda: rehearse_coded(settings, RANKS, "allgather")}
    choices = gathered(measure_and_choose(messenger, 0, ways, 1000 if hvd.rank() else LARGE, in_parts=False))
    assert all(choice == choices[0] for choice in choices) and choices[0].parts == 1
    assert messenger.communication.measurement_bytes > 0 == messenger.communication.bytes_sent


# ---- Compression.auto ------------------------------------------------------------------------------------------------


def _stock(model, compressor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compressor)


def _train(optimizer, model, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def _prefer(monkeypatch, compression, bits=0):
    """The choice is left to this test: the model, which has tests of its own, would make what machines are."""
    import hvd_qgenx.exchange.measurement as room

    def choose(network, works, **options):
        wanted = [way for way in works if (way.compression, way.bits) == (compression, bits)]
        return chosen(network, {way: works[way] for way in wanted or works}, **options)

    chosen = room.choose
    monkeypatch.setattr(room, "choose", choose)


WANTED = [("none", 0), ("fp16", 0), ("qgenx", 4)]


@pytest.mark.parametrize(("name", "bits"), WANTED)
@pytest.mark.parametrize("entrance", ["drop-in", "wrapper"])
def test_what_was_chosen_is_what_is_used(monkeypatch, logged, entrance, name, bits):
    _prefer(monkeypatch, name, bits)
    explicit = Compression.qgenx(bits=bits, seed=5) if bits else getattr(Compression, name)
    ends = []
    for compressor in (Compression.auto(seed=5), explicit):
        model = network()
        optimizer = _stock(model, compressor) if entrance == "drop-in" else _wrapped(model.parameters(), compressor)
        torch.manual_seed(hvd.rank())
        _train(optimizer, model, 4)
        ends.append([p.detach().clone() for p in model.parameters()])
        assert same_on_all_ranks(ends[-1])
    # Stock Horovod fuses what is ready, so that the order of three ranks' sums, and their last bits, are not its own.
    same = torch.equal if bits or entrance == "wrapper" or RANKS == 2 else partial(torch.allclose, rtol=0.0, atol=1e-3)
    assert all(same(*pair) for pair in zip(*ends, strict=True))
    assert name in _one_line(logged)


@pytest.mark.parametrize("entrance", ["drop-in", "wrapper"])
def test_a_choice_is_made_without_help(logged, entrance):
    model, compressor = network(), Compression.auto(bits=[4, 3])
    optimizer = _stock(model, compressor) if entrance == "drop-in" else _wrapped(model.parameters(), compressor)
    _train(optimizer, model, 3)
    said = _one_line(logged)
    assert "qgenx 3 bits" in said and "none by allreduce" in said and "qgenx 8 bits" not in said
    assert f"{sum(p.numel() for p in model.parameters()):,} coordinates" in said
    assert same_on_all_ranks(model.parameters())


def test_every_optimizer_of_its_own_chooses_and_resumes_by_its_own_state(monkeypatch, logged):
    _prefer(monkeypatch, "qgenx", 3)
    model, compressor = network(), Compression.auto(seed=2)
    optimizer = _stock(model, compressor)
    _train(optimizer, model, 2)
    saved = copy.deepcopy((model.state_dict(), compressor.state_dict()))
    torch.manual_seed(50 + hvd.rank())
    _train(optimizer, model, 3)
    ends = [p.detach().clone() for p in model.parameters()]
    _prefer(monkeypatch, "none")  # a resumed run does not choose again
    model, compressor = network(), Compression.auto(seed=2)
    model.load_state_dict(saved[0])
    if hvd.rank() == 0:  # the others take it over
        compressor.load_state_dict(saved[1])
    torch.manual_seed(50 + hvd.rank())
    _train(_stock(model, compressor), model, 3)
    assert all(torch.equal(*pair) for pair in zip(ends, model.parameters(), strict=True))
    assert compressor.choice["bits"] == 3 and len(gathered(logged())[0]) == 1


@pytest.mark.parametrize(("name", "bits"), WANTED)
def test_a_wrapper_resumes_with_its_choice_between_half_steps(monkeypatch, logged, name, bits):
    _prefer(monkeypatch, name, bits)

    def make():
        model = network()
        optimizer = hvd_qgenx.DistributedOptimizer(
            hvd_qgenx.QGenX(model.parameters(), step_scale=0.05), compression=Compression.auto(seed=2)
        )
        return model, optimizer

    def half_step(model, optimizer, step):
        optimizer.zero_grad()
        loss(model).backward()
        getattr(optimizer, step)()

    model, optimizer = make()
    for step in ("extrapolation", "step", "extrapolation"):
        half_step(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert len({str(other) for other in gathered(saved[1]["param_groups"][0]["hvd_qgenx"]["compression"])}) == 1
    torch.manual_seed(hvd.rank())
    half_step(model, optimizer, "step")
    other, resumed = make()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.manual_seed(hvd.rank())
    half_step(other, resumed, "step")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
    assert len(gathered(logged())[0]) == 1


def test_the_state_of_one_kind_is_taken_up_by_another():
    """From a checkpoint of Compression.qgenx its counters and, under equal settings, its levels; and back."""
    p = torch.nn.Parameter(torch.zeros(5000))
    first = _wrapped([p], Compression.qgenx(bits=4, adapt_at=(0,)))
    for _ in range(3):
        p.grad = torch.randn(5000)
        first.step()
    state = copy.deepcopy(first.state_dict())
    second = _wrapped([p], Compression.auto(bits=[4]))
    second.load_state_dict(copy.deepcopy(state))
    assert second.state_dict()["param_groups"][0]["hvd_qgenx"]["step"] == 3
    p.grad = torch.randn(5000)
    second.step()
    assert second._exchange.kind.step == 4
    third = _wrapped([p], Compression.qgenx(bits=4, adapt_at=(0,)))
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    p.grad = torch.randn(5000)
    third.step()
    assert third._exchange.step == 5 and same_on_all_ranks([p])


def test_broadcast_brings_the_choice_to_ranks_that_have_none(monkeypatch, logged):
    _prefer(monkeypatch, "qgenx", 4)
    model = network()
    optimizer = _wrapped(model.parameters(), Compression.auto(seed=1))
    _train(optimizer, model, 2)
    state = copy.deepcopy(optimizer.state_dict())
    _prefer(monkeypatch, "none")
    other = _wrapped(model.parameters(), Compression.auto(seed=1))
    if hvd.rank() == 0:
        other.load_state_dict(state)
    hvd.broadcast_optimizer_state(other, 0)
    _train(other, model, 1)
    assert {chosen["bits"] for chosen in gathered(other._exchange.chosen)} == {4}
    assert same_on_all_ranks(model.parameters())


def test_hooks_in_another_order_on_each_rank_meet_in_one_choice(logged):
    """Each rank's backward reaches its parameters in an order of its own."""
    parameters = [torch.nn.Parameter(torch.zeros(3000)) for _ in range(4)]
    compressor = Compression.auto()
    names = [(f"p{i}", p) for i, p in enumerate(parameters)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), names, compression=compressor)
    order = parameters[hvd.rank() :] + parameters[: hvd.rank()]
    for _ in range(2):
        optimizer.zero_grad()
        for p in order:
            p.sum().mul(hvd.rank() + 1.0).backward()
        optimizer.step()
    assert "12,000 coordinates" in _one_line(logged)
    expected = -2 * (RANKS + 1) / 2
    # Constant vectors: 4 bits round them, without bias, by 4 % of their norm at most.
    assert all(float((p.detach() - expected).abs().max()) < 0.5 for p in parameters) and same_on_all_ranks(parameters)


def test_one_tensor_by_itself_is_chosen_for_too(logged):
    compressor = Compression.auto()
    tensor = torch.full((4000,), float(hvd.rank()))
    mean = hvd.allreduce(tensor, name="one", compression=compressor)
    assert mean.shape == tensor.shape and torch.equal(tensor, torch.full((4000,), float(hvd.rank())))
    assert "4,000 coordinates" in _one_line(logged)


def test_bytes_are_counted_whatever_was_chosen(monkeypatch):
    for name, bits, least, most in (("none", 0, 32, 33), ("fp16", 0, 16, 17), ("qgenx", 4, 3, 4.2)):
        with monkeypatch.context() as patched:
            _prefer(patched, name, bits)
            compressor = Compression.auto()
            for call in range(2):
                before = compressor.communication.bytes_sent
                hvd.allreduce(torch.randn(50_000), name=f"counted.{call}", compression=compressor)
                sent = compressor.communication.bytes_sent - before
        assert least <= 8 * sent / 50_000 < most, (name, sent)


def test_another_width_on_one_rank_is_told_on_all():
    compressor = Compression.auto(bits=[4] if hvd.rank() else [8])
    message = message_on_all_ranks(
        RuntimeError, lambda: hvd.allreduce(torch.ones(2000), name="told", compression=compressor)
    )
    assert "bits=(4,)" in message and "bits=(8,)" in message


def test_kinds_are_what_they_are_called():
    p = torch.nn.Parameter(torch.zeros(10))
    assert type(_wrapped([p], Compression.qgenx)._exchange) is CodedExchange
    assert type(_wrapped([p], Compression.auto)._exchange) is AutomaticExchange
