"""Uneven data, interrupted exchanges, unlike models and replicas, errors that are caught; on several ranks."""

import contextlib
import itertools
import signal
import threading
import time

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression
from hvd_qgenx.exchange import DisagreementError
from hvd_qgenx.transports import LostError, Patience
from hvd_qgenx.transports.waiting import Watched

FINE = {"bits": 8, "levels": "uniform", "norm": "linf"}
RANK, SIZE = hvd.rank(), hvd.size()
#: Names: an earlier test's error may keep its compressor alive on one rank, and those without names are counted.
NUMBERS = itertools.count()


def wrapped(model, base=torch.optim.SGD, compression=None, **options):
    compression = compression or Compression.qgenx(**FINE)
    optimizer, options = base(model.parameters(), lr=0.1), {"name": str(next(NUMBERS)), **options}
    return hvd_qgenx.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression, **options)


def dropped_in(model, compression=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compression = Compression.qgenx(**FINE, name=str(next(NUMBERS))) if compression is None else compression
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression, **options)


def iterate(model, optimizer):
    if hasattr(getattr(optimizer, "optimizer", None), "extrapolation"):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.extrapolation()
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


# ---- uneven data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
@pytest.mark.parametrize("compression", ["none", "qgenx"])
def test_a_mean_is_over_the_ranks_that_have_data(exchange, compression):
    """Gradients of one power of two each, which 8 bits hold exactly: every coordinate is its bucket's largest."""
    kind = Compression.none if compression == "none" else Compression.qgenx(**FINE)
    p = torch.nn.Parameter(torch.zeros(3000))
    optimizer = hvd_qgenx.DistributedOptimizer(torch.optim.SGD([p], lr=1.0), compression=kind, exchange=exchange)
    for _ in range(1 + RANK):
        p.grad = torch.full_like(p, 2.0**RANK)
        optimizer.step()
    optimizer.join()
    expected = 0.0
    for iteration in range(SIZE):
        there = [2.0**rank for rank in range(SIZE) if rank >= iteration]
        expected -= sum(there) / len(there)
    # A mean of K and a quotient are two roundings each.
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=SIZE * 4 * 2.0**-24, atol=0)
    assert same_on_all_ranks([p])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("base", [torch.optim.Adam, hvd_qgenx.ExtraAdam])
def test_ranks_without_data_follow_the_others_and_another_epoch_may_come(base, overlap):
    model = network()
    optimizer = wrapped(model, base, Compression.qgenx(bits=4, adapt_at=(0, 2)), overlap=overlap)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for epoch in range(2):
        for _ in range(2 + (RANK + epoch) % SIZE):
            iterate(model, optimizer)
            scheduler.step()
        optimizer.join(scheduler.step)
        assert same_on_all_ranks(model.parameters())
    assert set(gathered(optimizer.param_groups[0]["lr"])) == {optimizer.param_groups[0]["lr"]}
    assert set(gathered(optimizer._exchange.step)) == {optimizer._exchange.step}


def test_ranks_may_join_under_algorithm_1():
    model = network()
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.QGenX(model.parameters(), step_scale=0.1), compression=Compression.qgenx(**FINE)
    )
    for _ in range(2 + RANK):
        iterate(model, optimizer)
    optimizer.join()
    assert same_on_all_ranks(model.parameters())
    assert set(gathered(optimizer.optimizer.gamma)) == {optimizer.optimizer.gamma}


def test_join_between_half_steps_is_refused():
    model = network()
    optimizer = wrapped(model, hvd_qgenx.ExtraSGD)
    loss(model).backward()
    optimizer.extrapolation()
    assert "comes between iterations" in message_on_all_ranks(RuntimeError, optimizer.join)


def test_a_rank_with_more_batches_is_told_that_horovods_join_cannot_be_used():
    model = network()
    optimizer = dropped_in(model)
    iterate(model, optimizer)
    message = ""
    if RANK == 0:
        hvd.join()
    else:
        try:
            iterate(model, optimizer)
        except ValueError as error:
            message = str(error)
        hvd.join()
    messages = gathered(message)
    assert all(text.startswith("rank 0 has called hvd.join()") for text in messages[1:]), messages
    assert all("hvd_qgenx.DistributedOptimizer" in text for text in messages[1:]), messages


# ---- models that differ ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [wrapped, dropped_in])
@pytest.mark.parametrize("place", ["first", "last", "frozen"])
def test_more_parameters_on_one_rank_are_found_before_anything_is_exchanged(make, place):
    extra = [torch.nn.Linear(40, 40)] if RANK == SIZE - 1 and place != "frozen" else []
    layers = [*(extra if place == "first" else []), torch.nn.Linear(40, 40), *(extra if place == "last" else [])]
    model = torch.nn.Sequential(*layers)
    if place == "frozen" and make is dropped_in and RANK == 0:
        model[0].bias.requires_grad_(False)
    optimizer = make(model)
    if place == "frozen" and make is wrapped:
        return  # which takes a frozen parameter for one without gradient
    message = message_on_all_ranks(DisagreementError, lambda: iterate(model, optimizer))
    assert message.startswith("ranks disagree: rank 0 "), message


# ---- errors that are caught ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [wrapped, dropped_in])
@pytest.mark.parametrize("separately", [False, True])
def test_a_batch_that_is_not_finite_can_be_skipped(make, separately):
    model = network()
    optimizer = make(model, compression=Compression.qgenx(nonfinite="raise", name=str(next(NUMBERS))))
    skipped = 0
    for batch in range(5):
        optimizer.zero_grad()
        value = loss(model)
        (value * float("nan") if batch == 2 and RANK == 1 else value).backward()
        before = [p.detach().clone() for p in model.parameters()]
        try:
            if separately:
                optimizer.synchronize()
            with optimizer.skip_synchronize() if separately else contextlib.nullcontext():
                optimizer.step()
        except FloatingPointError:
            skipped += 1
            assert all(map(torch.equal, before, model.parameters()))
    assert skipped == 1
    assert same_on_all_ranks(model.parameters())


def test_a_gradient_that_cannot_be_sent_is_an_error_on_all_ranks_and_the_step_can_be_repeated():
    model = network()
    optimizer = dropped_in(model)
    iterate(model, optimizer)
    optimizer.zero_grad()
    value = loss(model)
    if RANK == 1:
        model[0].bias.register_hook(lambda gradient: gradient)
    value.backward()
    told = ""
    if RANK == 1:
        optimizer._compression._open.calls[0]().refusal = ValueError("gradient must be dense")
    try:
        optimizer.step()
    except (ValueError, DisagreementError) as error:
        told = str(error)
    messages = gathered(told)
    assert messages[1] == "gradient must be dense"
    assert all("(refusal)" in text for rank, text in enumerate(messages) if rank != 1), messages
    iterate(model, optimizer)
    assert same_on_all_ranks(model.parameters())


@pytest.mark.filterwarnings("ignore:optimizer.step.. called without:UserWarning")  # stock Horovod's, of the next step
@pytest.mark.parametrize("make", [wrapped, dropped_in])
def test_a_users_own_exception_between_backward_and_step_is_recovered_from_by_synchronize(make):
    model = network()
    optimizer = make(model)
    for batch in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        try:
            if batch == 1:
                raise KeyError("of the user's own, on all ranks")
        except KeyError:
            optimizer.synchronize()
            continue
        optimizer.step()
    iterate(model, optimizer)
    assert same_on_all_ranks(model.parameters())


# ---- interrupted exchanges -------------------------------------------------------------------------------------------


class Alarm(Exception):
    pass


def interrupted(action, seconds=0.3):
    """Whether a signal ended ``action``."""

    def ring(*_):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        action()
    except Alarm:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


def about_to_step(compression):
    """A network and its optimizer after an iteration and the next backward; and the counters in between."""
    model = network()
    optimizer = wrapped(model, compression=KINDS[compression])
    iterate(model, optimizer)
    before = optimizer._exchange.counters
    optimizer.zero_grad()
    loss(model).backward()
    return model, optimizer, before


KINDS = {"none": Compression.none, "qgenx": Compression.qgenx(**FINE), "adapts": Compression.qgenx(adapt_at=(0, 1))}


@pytest.mark.parametrize("compression", KINDS)
@pytest.mark.parametrize("where", ["wait", "begin"])
def test_an_exchange_that_some_wait_for_and_that_one_was_kept_from_is_told_to_all_and_can_be_repeated(
    compression, where, monkeypatch
):
    model, optimizer, before = about_to_step(compression)
    begin = Watched.begin

    def begin_and_be_interrupted(operation):
        begin(operation)
        raise Alarm

    def keep_from(*_):
        raise Alarm

    if RANK == 0:
        settle, optimizer._exchange.settle = optimizer._exchange.settle, keep_from
        with pytest.raises(Alarm):
            optimizer.step()
        optimizer._exchange.settle = settle
        time.sleep(1.0)  # until the others have been interrupted, too; else they would learn of this in their step
    else:
        with monkeypatch.context() as patched:
            if where == "begin":
                patched.setattr(Watched, "begin", begin_and_be_interrupted)
            assert interrupted(optimizer.step)
    message = message_on_all_ranks(DisagreementError, lambda: iterate(model, optimizer))
    assert message == "rank 0 was interrupted in an exchange that no rank has made: it can be repeated, on all ranks"
    iterate(model, optimizer)
    assert optimizer._exchange.counters == (before[0] + 1, before[1] + 1)
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("compression", KINDS)
def test_an_exchange_that_was_interrupted_on_all_ranks_once_all_had_sent_is_repeated(compression, monkeypatch):
    model, optimizer, before = about_to_step(compression)

    def late(*_):
        raise Alarm

    with monkeypatch.context() as patched:
        patched.setattr(optimizer._exchange, "collect", late)
        with pytest.raises(Alarm):
            optimizer.step()
    iterate(model, optimizer)
    assert optimizer._exchange.counters == (before[0] + 1, before[1] + 1)
    assert same_on_all_ranks(model.parameters())


def test_an_exchange_that_was_interrupted_on_one_rank_is_an_error_on_all_until_a_state_is_loaded():
    model = network()
    optimizer = wrapped(model)
    iterate(model, optimizer)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    memory = optimizer.state_dict()
    optimizer.zero_grad()
    loss(model).backward()
    if RANK == 0:
        time.sleep(1.0)
    if RANK == 1:
        assert interrupted(optimizer.step)
    else:
        optimizer.step()
    message = message_on_all_ranks(DisagreementError, lambda: iterate(model, optimizer))
    assert message.startswith("rank 1 was interrupted in an exchange that the others have made"), message
    model.load_state_dict(state)
    optimizer.load_state_dict(memory)
    iterate(model, optimizer)
    assert same_on_all_ranks(model.parameters())


def test_another_optimizer_can_be_used_after_an_exchange_that_was_interrupted():
    model, other = network(), network(1)
    optimizer, second = wrapped(model), wrapped(other)
    iterate(model, optimizer)
    iterate(other, second)
    loss(model).backward()
    if RANK == 0:
        time.sleep(1.0)
        optimizer.step()
    else:
        assert interrupted(optimizer.step)
    iterate(other, second)
    assert same_on_all_ranks(other.parameters())


def test_a_wait_that_is_given_up_is_an_interruption():
    model = network()
    optimizer = wrapped(model)
    iterate(model, optimizer)
    optimizer._exchange.transport.patience = Patience(0.5, tell_after=0.1)
    loss(model).backward()
    gave_up = False
    if RANK == 0:
        time.sleep(1.5)
        optimizer.step()
    else:
        with pytest.raises(LostError, match="gave up: rank"):
            optimizer.step()
        gave_up = True
    optimizer._exchange.transport.patience = Patience()
    assert any(gathered(gave_up))
    message = message_on_all_ranks(DisagreementError, lambda: iterate(model, optimizer))
    assert "was interrupted in an exchange that the others have made" in message


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Compression.none, Compression.qgenx(**FINE)])
def test_two_threads_may_use_two_optimizers_at_once(kind):
    models = [network(), network(1)]
    optimizers = [wrapped(model, compression=kind) for model in models]
    errors = []

    def train(index):
        try:
            for _ in range(10):
                iterate(models[index], optimizers[index])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(index,), daemon=True) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    for model in models:
        assert same_on_all_ranks(model.parameters())


# ---- replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, hvd_qgenx.ExtraAdam])
def test_replicas_that_differ_are_named_with_the_parameter(base):
    model = network()
    optimizer = wrapped(model, base, check_replicas=2)
    iterate(model, optimizer)
    with torch.no_grad():
        if RANK == 1:
            model[2].weight[0, 0] += 1.0
    message = message_on_all_ranks(DisagreementError, lambda: iterate(model, optimizer))
    others = [rank for rank in range(SIZE) if rank != 1]
    named = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
    assert f"2.weight differs between {named} and rank 1;" in message, message


def test_equal_replicas_pass():
    model = network()
    optimizer = wrapped(model, check_replicas=1)
    for _ in range(3):
        iterate(model, optimizer)
