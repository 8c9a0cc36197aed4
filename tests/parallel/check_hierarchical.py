"""hierarchical=True: dense within a host, coded between hosts. Runs on hosts of equal and unequal numbers of ranks.

One machine stands for several hosts: horovodrun takes localhost and 127.0.0.1 for two.
"""

import copy

import horovod.torch as hvd
import pytest
import torch
from ranks import error_of, gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression, backends
from hvd_qgenx.transports import horovod

RANKS = hvd.size()
LAST = RANKS - 1
HOSTS = []
for _rank, _local in enumerate(gathered(hvd.local_rank())):
    HOSTS += [[]] if _local == 0 else []
    HOSTS[-1].append(_rank)
HOST = next(host for host in HOSTS if hvd.rank() in host)
LEADERS = [host[0] for host in HOSTS]
several_hosts = pytest.mark.skipif(len(HOSTS) < 2, reason="nothing is coded on one host")
MAKES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "extra_adam": lambda parameters: hvd_qgenx.ExtraAdam(parameters, lr=0.01),
    "extra_adam_past": lambda parameters: hvd_qgenx.ExtraAdam(parameters, lr=0.01, past=True),
}


def wrap(model, make="sgd", choice=None, plan="allgather", **options):
    compression = choice or Compression.qgenx(bits=4, seed=3, adapt_at=(0, 3))
    options = {"compression": compression, "exchange": plan, "hierarchical": True, **options}
    return hvd_qgenx.DistributedOptimizer(MAKES[make](model.parameters()), model.named_parameters(), **options)


def iterate(model, optimizer, iterations, backward=lambda model: loss(model).backward()):
    for _ in range(iterations):
        for half_step in half_steps(optimizer):
            optimizer.zero_grad()
            backward(model)
            half_step()


def half_steps(optimizer):
    return (optimizer.extrapolation, optimizer.step) if hasattr(optimizer.optimizer, "past") else (optimizer.step,)


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return first == second


def test_hosts_are_those_of_horovods_local_ranks():
    exchange = wrap(network())._exchange
    assert exchange.within.transport.process_set.ranks == HOST
    assert exchange.hosts == len(HOSTS) and exchange.leads == (hvd.rank() == HOST[0])


@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
@pytest.mark.parametrize("make", MAKES)
def test_replicas_are_bit_identical_and_state_is_equal_at_any_moment(make, plan):
    model = network()
    optimizer = wrap(model, make, plan=plan)
    for _ in range(5):
        for half_step in half_steps(optimizer):
            optimizer.zero_grad()
            loss(model).backward()
            half_step()
            states = gathered(optimizer.state_dict())
            assert all(equal(states[0], state) for state in states)
    assert same_on_all_ranks(model.parameters())
    assert set(gathered(optimizer.communication.exchanges)) == {10 if make == "extra_adam" else 5}


def integers(model):
    """Gradients whose sums float32 holds exactly, in any order."""
    for p in model.parameters():
        p.grad = torch.randint(-512, 513, p.shape) / 256


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_parameters_that_are_not_coded_have_the_exact_mean(op):
    model = network()
    optimizer = wrap(model, choice=Compression.qgenx(min_numel=2**20), op=op)
    integers(model)
    vectors = gathered([p.grad.double() for p in model.parameters()])
    optimizer.step()
    for index, p in enumerate(model.parameters()):
        total = sum(vector[index] for vector in vectors)
        # A host's sum, times a weight, added over hosts and divided: three roundings to float32, of numbers up to 2 K.
        exact = total if op is hvd.Sum else total / RANKS
        assert (p.grad.double() - exact).abs().max() <= 3 * 2.0**-24 * 2 * RANKS
        assert op is not hvd.Sum or len(HOSTS) > 2 or torch.equal(p.grad.double(), exact)


@several_hosts
@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_bits_are_those_of_an_exchange_of_hosts_sums_between_their_first_ranks(op, plan):
    model, twin = network(), network()
    optimizer = wrap(model, op=op, plan=plan)
    leaders = optimizer._exchange.across.transport.process_set
    between = wrap(twin, op=op, plan=plan, hierarchical=False, process_set=leaders)
    weight = 1.0 if op is hvd.Sum else len(HOSTS) / RANKS
    for _ in range(5):
        integers(model)
        sums = [torch.stack(every).sum(dim=0) for every in zip(*_of_this_host(model), strict=True)]
        for p, total in zip(twin.parameters(), sums, strict=True):
            p.grad = total * weight
        optimizer.step()
        if hvd.rank() in LEADERS:
            between.step()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert same_on_all_ranks(model.parameters())


def _of_this_host(model):
    every = gathered([p.grad for p in model.parameters()])
    return [every[rank] for rank in HOST]


ABSENT = {
    "on one rank": [0],
    "on the last rank": [LAST],
    "on one host": HOSTS[-1],
    "on all but the last rank": list(range(LAST)),
    "everywhere": list(range(RANKS)),
}


@pytest.mark.parametrize("ranks", ABSENT)
def test_a_parameter_without_gradient(ranks):
    model = network()
    optimizer = wrap(model, choice=Compression.qgenx(min_numel=2**20))
    integers(model)
    if hvd.rank() in ABSENT[ranks]:
        model[2].weight.grad = None
    every = [gradient for gradient in gathered(model[2].weight.grad) if gradient is not None]
    optimizer.step()
    assert same_on_all_ranks(model.parameters())
    if not every:
        assert model[2].weight.grad is None
    else:
        error = (model[2].weight.grad.double() - sum(g.double() for g in every) / RANKS).abs().max()
        assert error <= 3 * 2.0**-24 * 2 * RANKS


@pytest.mark.parametrize("nonfinite", ["nan", "raise"])
def test_a_gradient_that_is_not_finite_is_told_of_on_all_ranks(nonfinite):
    model = network()
    optimizer = wrap(model, choice=Compression.qgenx(bits=4, nonfinite=nonfinite))
    loss(model).backward()
    if hvd.rank() == LAST:
        model[2].weight.grad[7, 1] = float("inf")
    if nonfinite == "raise":
        message = message_on_all_ranks(FloatingPointError, optimizer.step)
        assert message.startswith("the gradient of 2.weight is not finite")
        return
    with pytest.warns(RuntimeWarning, match=r"the gradient of 2\.weight is not finite on some rank") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert model[2].weight.grad.isnan().all() and model[0].weight.grad.isfinite().all()


def test_synchronize_clip_and_half_step_and_accumulation():
    model = network()
    optimizer = wrap(model, "extra_adam")
    for half_step in half_steps(optimizer) * 2:
        optimizer.zero_grad()
        for _ in range(2):
            (loss(model) / 2).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with optimizer.skip_synchronize():
            half_step()
    assert same_on_all_ranks(model.parameters())


def test_parameters_of_several_types():
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    parameters = [torch.nn.Parameter(torch.zeros(2000, dtype=dtype)) for dtype in types]
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), compression=Compression.qgenx(bits=4), hierarchical=True
    )
    for index, p in enumerate(parameters):
        if index % RANKS != hvd.rank():
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.grad.dtype for p in parameters] == types
    # The mean of 2,000 roundings of equal numbers: coarsest at 4 bits, where each deviates by half a gap at most.
    assert all(abs(float(p.grad.double().mean()) - (RANKS - 1) / RANKS) < 0.05 for p in parameters)
    assert same_on_all_ranks(parameters)


@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
def test_a_checkpoint_that_only_rank_0_loaded_continues_everywhere(plan):
    model = network()
    optimizer = wrap(model, "extra_adam", plan=plan)
    iterate(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = network(seed=3)
    other = wrap(resumed, "extra_adam", plan=plan)
    if hvd.rank() == 0:
        resumed.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    hvd.broadcast_parameters(resumed.state_dict(), 0)
    hvd.broadcast_optimizer_state(other, 0)
    for pair in ((model, optimizer), (resumed, other)):
        torch.manual_seed(7 + hvd.rank())
        iterate(*pair, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert equal(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("ahead", [0, LAST])
def test_ranks_that_are_behind_catch_up(ahead):
    """The one that is ahead may be a host's first rank or not."""
    model = network()
    optimizer = wrap(model)
    iterate(model, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    other = wrap(resumed)
    if hvd.rank() == ahead:
        other._exchange.load_state_dict(saved["param_groups"][0]["hvd_qgenx"])
    other.optimizer.load_state_dict(saved)
    other.optimizer.param_groups[0].pop("hvd_qgenx")
    for pair in ((model, optimizer), (resumed, other)):
        torch.manual_seed(7 + hvd.rank())
        iterate(*pair, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_of_an_exchange_without_hosts_goes_on_with_them():
    model = network()
    optimizer = wrap(model, hierarchical=False)
    iterate(model, optimizer, 3)
    other = wrap(model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    iterate(model, other, 2)
    memory = other.state_dict()["param_groups"][0]["hvd_qgenx"]
    assert memory["step"] == 5
    assert same_on_all_ranks(model.parameters())


@several_hosts
def test_ranks_with_other_settings_all_learn_both():
    model = network()
    optimizer = wrap(model, choice=Compression.qgenx(bits=3 if hvd.rank() == LAST else 4))
    loss(model).backward()
    message = message_on_all_ranks(RuntimeError, optimizer.step)
    assert message == f"ranks disagree: rank 0 has bits=4, rank {LAST} has bits=3"


@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("rank", [0, LAST])
def test_a_sparse_gradient_on_one_rank_is_an_error_on_all(rank, settled, plan):
    table = torch.nn.Embedding(50, 400)
    hvd.broadcast_parameters(table.state_dict(), 0)
    optimizer = wrap(table, plan=plan)
    if settled:
        iterate(table, optimizer, 2, lambda table: table(torch.tensor([1])).sum().backward())
    optimizer.zero_grad()
    table(torch.tensor([1])).sum().backward()
    if hvd.rank() == rank:
        table.weight.grad = table.weight.grad.to_sparse()
    errors = gathered(error_of(optimizer.step))
    assert "is sparse: pass sparse_as_dense=True" in errors[rank]
    assert all("(refusal)" in error for other, error in enumerate(errors) if other != rank)


@several_hosts
@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
@pytest.mark.parametrize("work", ["encode", "statistics"])
def test_a_device_that_fails_on_one_host_is_an_error_on_all_of_them(work, plan, monkeypatch):
    model = network()
    optimizer = wrap(model, plan=plan)
    iterate(model, optimizer, 3)
    before = copy.deepcopy(model.state_dict())

    def lost(*arguments):
        raise backends.DeviceError("the device is lost")

    with monkeypatch.context() as patch:
        if hvd.rank() == 0:
            patch.setattr(backends.backend_of(torch.device("cpu")), work, lost)
        errors = gathered(error_of(lambda: iterate(model, optimizer, 1)))  # the fourth fits levels
    assert all("the device is lost" in errors[rank] for rank in HOSTS[0]), errors
    assert all("(refusal)" in errors[rank] for host in HOSTS[1:] for rank in host), errors
    assert equal(model.state_dict(), before)
    iterate(model, optimizer, 2)
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
@pytest.mark.parametrize("ranks", [[LAST], HOSTS[-1]])
def test_ranks_in_other_half_steps_all_learn_of_it(ranks, plan):
    model = network()
    optimizer = wrap(model, "extra_adam", plan=plan)
    iterate(model, optimizer, 1)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.optimizer._set_extrapolated(True)  # so that step() gets as far as the exchange
    half_step = optimizer.step if hvd.rank() in ranks and len(ranks) < RANKS else optimizer.extrapolation
    errors = gathered(error_of(half_step))
    assert all("ranks are out of step" in error for error in errors) or len(ranks) == RANKS
    assert len(ranks) == RANKS or any("(step)" in error for error in errors)


def test_bytes_within_the_host_are_counted_apart():
    model = network()
    optimizer = wrap(model)
    iterate(model, optimizer, 10)
    dense = 10 * 4 * sum(p.numel() for p in model.parameters())
    counted = optimizer.communication
    assert (counted.host_bytes >= dense) == (len(HOST) > 1)
    leads_others = hvd.rank() in LEADERS and len(HOSTS) > 1
    assert counted.bytes_sent < (dense if leads_others else 5000), "the agreement alone, or coded vectors"
    assert (counted.variance is not None) == leads_others


def test_a_hierarchy_of_one_host_rounds_nothing():
    ranks = HOSTS[-1]
    whole = hvd.global_process_set if len(HOSTS) == 1 else _made(ranks)
    model = network()
    optimizer = wrap(model, process_set=whole)
    integers(model)
    vectors = gathered([p.grad.double() for p in model.parameters()])
    optimizer.step()
    if hvd.rank() in ranks:
        for index, p in enumerate(model.parameters()):
            exact = sum(vectors[rank][index] for rank in ranks) / len(ranks)
            # One multiplication by 1 / K, itself rounded.
            assert torch.allclose(p.grad.double(), exact, rtol=2.0**-23, atol=0)


def _made(host):
    """The process set of a host that is not alone: the one that a wrapper made, since Horovod makes none twice."""
    wrap(network())
    return horovod._MADE[tuple(host)]


@pytest.mark.skipif(RANKS < 4, reason="needs hosts with a rank outside the process set")
def test_a_process_set_that_has_some_ranks_of_a_host():
    ranks = [rank for rank in range(RANKS) if rank != LAST]
    some = hvd.add_process_set(ranks)
    model = network()
    optimizer = wrap(model, choice=Compression.qgenx(min_numel=2**20), process_set=some)
    integers(model)
    vectors = gathered([p.grad.double() for p in model.parameters()])
    optimizer.step()
    for index, p in enumerate(model.parameters() if hvd.rank() in ranks else ()):
        exact = sum(vectors[rank][index] for rank in ranks) / len(ranks)
        assert (p.grad.double() - exact).abs().max() <= 3 * 2.0**-24 * 2 * RANKS
    hvd.remove_process_set(some)


@several_hosts
def test_hosts_may_be_given():
    exchange = wrap(network())._exchange
    sets = (exchange.within.transport.process_set, exchange.across.transport.process_set)
    ends = []
    for hierarchical in (True, sets):
        model = network()
        optimizer = wrap(model, hierarchical=hierarchical)
        torch.manual_seed(7 + hvd.rank())
        iterate(model, optimizer, 3)
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


@several_hosts
def test_hosts_that_do_not_hold_every_rank_once_are_refused_everywhere():
    leaders = wrap(network())._exchange.across.transport.process_set
    message = message_on_all_ranks(ValueError, lambda: wrap(network(), hierarchical=(leaders, leaders)))
    assert message.startswith(
        "hierarchical must be two process sets, this rank's host and the first ranks of all hosts"
    )


def test_qgenx_is_refused():
    with pytest.raises(ValueError, match="hierarchical is not for QGenX"):
        parameters = list(network().parameters())
        compression = Compression.qgenx(bits=4)
        hvd_qgenx.DistributedOptimizer(hvd_qgenx.QGenX(parameters), compression=compression, hierarchical=True)


def test_with_overlap_nothing_starts_early_and_nothing_changes():
    ends = []
    for overlap in (True, False):
        model = network()
        optimizer = wrap(model, overlap=overlap)
        torch.manual_seed(7 + hvd.rank())
        iterate(model, optimizer, 3)
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert not optimizer._exchange.parts() and torch.equal(*ends)
