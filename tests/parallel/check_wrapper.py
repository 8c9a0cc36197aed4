"""hvd_qgenx.DistributedOptimizer on several ranks."""

import copy
import warnings

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression

CHOICES = {
    "none": Compression.none,
    "fp16": Compression.fp16,
    "fixed8": Compression.qgenx(bits=8, levels="uniform", coder="fixed", norm="linf"),
    "fixed4": Compression.qgenx(bits=4, levels="uniform", coder="fixed", norm="linf"),
    "qgenx": Compression.qgenx(bits=4),
}
RANKS = hvd.size()


def _qgenx(method):
    return lambda parameters, lr: hvd_qgenx.QGenX(parameters, method=method, step_scale=lr)


MAKES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "extra_sgd": hvd_qgenx.ExtraSGD,
    "extra_adam": hvd_qgenx.ExtraAdam,
    "extra_adagrad": lambda parameters, lr: hvd_qgenx.ExtraGradient(torch.optim.Adagrad(parameters, lr=lr)),
    "dual_extrapolation": _qgenx("dual_extrapolation"),
    "dual_averaging": _qgenx("dual_averaging"),
    "optimistic": _qgenx("optimistic"),
    "extra_sgd_past": lambda parameters, lr: hvd_qgenx.ExtraSGD(parameters, lr=lr, past=True),
    "extra_adam_past": lambda parameters, lr: hvd_qgenx.ExtraAdam(parameters, lr=lr, past=True),
}


def _wrapped(model, choice="qgenx", optimizer=None, **options):
    base = optimizer or hvd_qgenx.ExtraAdam(model.parameters(), lr=1e-2)
    compression = CHOICES.get(choice, choice)
    return hvd_qgenx.DistributedOptimizer(base, model.named_parameters(), compression=compression, **options)


def _iterate(optimizer, model, count=1):
    for _ in range(count):
        for half_step in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            loss(model).backward()
            half_step()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", ["plain", "extra"])
def test_replicas_are_bit_identical(choice, family):
    model = network()
    base = torch.optim.Adam(model.parameters()) if family == "plain" else None
    optimizer = _wrapped(model, choice, base)
    for _ in range(20 if family == "plain" else 0):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    if family == "extra":
        _iterate(optimizer, model, 10)
    assert same_on_all_ranks(model.parameters())
    assert optimizer.communication.exchanges == 20


@pytest.mark.parametrize("choice", CHOICES)
def test_a_mean_is_near_the_exact_mean(choice):
    model = network()
    optimizer = _wrapped(model, choice, torch.optim.SGD(model.parameters(), lr=0.0))
    loss(model).backward()
    local = _gradients(model)
    optimizer.step()
    _assert_near_the_mean(_gradients(model), local, choice, optimizer)


def _gradients(model):
    """One float64 vector, zero where there is no gradient."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.reshape(-1) for part in parts]).double()


def _assert_near_the_mean(mean, local, choice, optimizer):
    """Squared error of a mean, relative to what one rank's rounding is relative to.

    none: float32 sums. fp16 rounds its input and every sum of up to K inputs (3e-7 measured for 3 ranks). Else the
    measured variance of one rank, the largest of all, times 2 for the scatter of one draw of some 1,600 coordinates.
    """
    locals_, variances = gathered(local), gathered(optimizer.communication.variance or 0.0)
    exact = sum(locals_) / RANKS
    error = (mean - exact).square().sum() / sum(v.square().sum() for v in locals_) * RANKS**2
    assert error < ({"none": 1e-12, "fp16": (RANKS * 2.0**-11) ** 2}.get(choice) or 2 * max(variances))


def test_extrapolation_exchanges_too():
    model = network()
    optimizer = _wrapped(model, "none")
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.extrapolation()
    assert same_on_all_ranks(model.parameters())
    assert optimizer.communication.exchanges == 1


@pytest.mark.parametrize("choice", CHOICES)
def test_step_with_a_closure_is_the_two_half_steps(choice):
    models, optimizers = [], []
    for by_closure in (False, True):
        model = network()
        optimizer = _wrapped(model, choice)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        for _ in range(3):
            if by_closure:
                assert isinstance(optimizer.step(closure), torch.Tensor)
            else:
                closure()
                optimizer.extrapolation()
                closure()
                optimizer.step()
        models.append(model)
        optimizers.append(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert optimizers[0].communication.exchanges == optimizers[1].communication.exchanges == 6


@pytest.mark.parametrize("make", ["extra_sgd_past", "optimistic", "dual_averaging"])
def test_methods_with_one_exchange_have_one_however_they_are_called(make):
    model, twin, calls = network(), network(), []
    optimizer, other = (_wrapped(m, "qgenx", MAKES[make](m.parameters(), lr=0.05)) for m in (model, twin))

    def closure(model=model, optimizer=optimizer):
        calls.append(optimizer.extrapolated)
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    torch.manual_seed(9 + hvd.rank())
    for _ in range(3):
        optimizer.step(closure)
    torch.manual_seed(9 + hvd.rank())
    for _ in range(3):
        other.extrapolation()
        other.zero_grad()
        loss(twin).backward()
        other.synchronize()
        with other.skip_synchronize():
            other.step()
    assert calls == [True] * 3, "evaluated at x_{t+1/2} alone"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert optimizer.communication.exchanges == other.communication.exchanges == 3
    assert same_on_all_ranks(model.parameters())


def test_step_with_a_closure_on_a_plain_optimizer_averages():
    model = network()
    optimizer = _wrapped(model, "none", torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step(lambda: loss(model).backward())
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_parameter_without_gradient_on_one_rank_counts_as_zero(choice):
    model = network()
    optimizer = _wrapped(model, choice, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.zero_grad()
    if hvd.rank() == 0:
        model[4](torch.randn(8, 40)).square().mean().backward()
    elif hvd.rank() == RANKS - 1:
        model[4](torch.tanh(model[2](torch.randn(8, 40)))).square().mean().backward()
    local = _gradients(model)
    optimizer.step()
    _assert_near_the_mean(_gradients(model), local, choice, optimizer)
    assert model[2].weight.grad is not None, "somebody had it"
    assert model[0].weight.grad is None, "nobody had it"
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("choice", CHOICES)
def test_parameters_that_nobody_has_cost_no_bytes(choice):
    model, sent = network(), []
    optimizer = _wrapped(model, choice, torch.optim.SGD(model.parameters(), lr=0.1))
    for layers in ((0, 2, 4), (0, 2, 4), (4,)):
        optimizer.zero_grad()
        before = optimizer.communication.bytes_sent
        sum(model[layer].weight.square().sum() for layer in layers).backward()
        optimizer.step()
        sent.append(optimizer.communication.bytes_sent - before)
    assert sent[2] < sent[1] / 2


def test_sum_is_the_mean_times_the_ranks():
    for choice in ("none", "qgenx"):
        gradients = []
        for op in (hvd.Average, hvd.Sum):
            model = network()
            optimizer = _wrapped(model, choice, torch.optim.SGD(model.parameters(), lr=0.1), op=op)
            loss(model).backward()
            optimizer.step()
            gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        # none: Horovod divides by multiplying with 1/K, one rounding of float32 away from the sum divided by K.
        assert torch.allclose(gradients[0] * RANKS, gradients[1], rtol=3e-7, atol=0)


def test_synchronize_then_clip_then_half_step():
    model = network()
    optimizer = _wrapped(model)
    for half_step in (optimizer.extrapolation, optimizer.step):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with optimizer.skip_synchronize():
            half_step()
    assert same_on_all_ranks(model.parameters())
    assert optimizer.communication.exchanges == 2


def test_step_after_synchronize_exchanges_again_and_warns():
    model = network()
    optimizer = _wrapped(model, "none", torch.optim.SGD(model.parameters(), lr=0.1))
    loss(model).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="exchanges again"):
        optimizer.step()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("choice", ["none", "qgenx"])
def test_broadcast_at_the_start_exchanges_and_advances_nothing(make, choice):
    model = network(seed=hvd.rank())
    optimizer = _wrapped(model, choice, MAKES[make](model.parameters(), lr=0.01))
    hvd.broadcast_parameters(model.state_dict(), 0)
    hvd.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.communication.exchanges == 0
    assert same_on_all_ranks(model.parameters())
    reference = network(seed=0)
    twin = _wrapped(reference, choice, MAKES[make](reference.parameters(), lr=0.01))
    for pair in ((model, optimizer), (reference, twin)):
        torch.manual_seed(7 + hvd.rank())
        _run(*pair, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def _run(model, optimizer, steps):
    for _ in range(steps):
        if hasattr(optimizer.optimizer, "extrapolation"):
            _iterate(optimizer, model)
        else:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("choice", ["none", "qgenx"])
@pytest.mark.parametrize("halfway", [False, True])
def test_a_checkpoint_that_only_rank_0_loaded_continues_everywhere(make, choice, halfway):
    model = network()
    optimizer = _wrapped(model, choice, MAKES[make](model.parameters(), lr=0.01))
    _run(model, optimizer, steps=2)
    halfway = halfway and hasattr(optimizer.optimizer, "extrapolation")
    if halfway:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.extrapolation()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = network(seed=3)
    other = _wrapped(resumed, choice, MAKES[make](resumed.parameters(), lr=0.5))
    if hvd.rank() == 0:
        resumed.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    hvd.broadcast_parameters(resumed.state_dict(), 0)
    hvd.broadcast_optimizer_state(other, 0)
    for pair in ((model, optimizer), (resumed, other)):
        torch.manual_seed(7 + hvd.rank())
        if halfway:
            pair[1].zero_grad()
            loss(pair[0]).backward()
            pair[1].step()
        _run(*pair, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert _equal(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("make", ["extra_adam", "extra_adam_past", "dual_extrapolation", "optimistic"])
@pytest.mark.parametrize("choice", ["none", "fp16", "qgenx"])
def test_state_is_equal_on_all_ranks_at_any_moment(make, choice):
    model = network()
    optimizer = _wrapped(model, choice, MAKES[make](model.parameters(), lr=0.01))
    for half_step in [optimizer.extrapolation, optimizer.step] * 2:
        loss(model).backward()
        half_step()
        states = gathered(optimizer.state_dict())
        assert all(_equal(states[0], state) for state in states)


def _equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return first == second


@pytest.mark.parametrize("method", ["dual_averaging", "dual_extrapolation", "optimistic"])
@pytest.mark.parametrize("choice", ["none", "qgenx"])
def test_qgenx_takes_the_same_step_on_all_ranks_and_its_formula(method, choice):
    model = network()
    optimizer = _wrapped(model, choice, hvd_qgenx.QGenX(model.parameters(), method=method, step_scale=0.1))
    _iterate(optimizer, model, 4)
    assert same_on_all_ranks(model.parameters())
    gammas = gathered(optimizer.optimizer.gamma)
    assert len(set(gammas)) == 1 and 0 < gammas[0] < 0.1 * RANKS
    assert optimizer.communication.exchanges == (8 if method == "dual_extrapolation" else 4)


def test_squared_difference_is_that_of_decoded_vectors_summed_over_ranks():
    model = network()
    rule = hvd_qgenx.QGenX(model.parameters())
    optimizer = _wrapped(model, "none", rule)
    local = []
    for half_step in (optimizer.extrapolation, optimizer.step):
        optimizer.zero_grad()
        loss(model).backward()
        local.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        half_step()
    total = sum(gathered(float((local[0] - local[1]).double().square().sum())))
    # Summed parameter by parameter there and in one go here: float64 rounding of 3,400 terms.
    assert rule.param_groups[0]["sum_of_squares"] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("method", ["dual_extrapolation", "optimistic"])
@pytest.mark.parametrize("choice", ["none", "fp16", "qgenx"])
def test_a_parameter_without_gradient_on_one_rank_is_zero_in_the_difference(method, choice):
    model = network()
    optimizer = _wrapped(model, choice, hvd_qgenx.QGenX(model.parameters(), method=method))
    for half_step in [optimizer.extrapolation, optimizer.step] * 2:
        optimizer.zero_grad()
        (loss(model) if hvd.rank() else model[4](torch.randn(8, 40)).square().mean()).backward()
        half_step()
    sums = gathered(optimizer.optimizer.param_groups[0]["sum_of_squares"])
    assert len(set(sums)) == 1 and 0 < sums[0] < float("inf")
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("choice", ["none", "qgenx"])
@pytest.mark.parametrize("method", ["dual_extrapolation", "optimistic"])
def test_a_checkpoint_goes_on_with_fewer_ranks_and_with_more(choice, method):
    """From all ranks to all but the last, and back: the same point and step size; a rank takes the mean for its own."""
    everywhere, fewer = hvd.global_process_set, hvd.add_process_set(list(range(RANKS - 1)))
    model = network()
    optimizer = _wrapped(model, choice, hvd_qgenx.QGenX(model.parameters(), method=method))
    _iterate(optimizer, model, 2)
    for ranks in (fewer, everywhere):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.extrapolation()
        saved, gamma = copy.deepcopy(optimizer.state_dict()), optimizer.optimizer.gamma
        saved, gamma, point = hvd.broadcast_object((saved, gamma, model.state_dict()), 0)
        model.load_state_dict(point)
        optimizer = _wrapped(model, choice, hvd_qgenx.QGenX(model.parameters()), process_set=ranks)
        optimizer.load_state_dict(saved)
        # A square and a root away from the same number.
        assert optimizer.optimizer.gamma == pytest.approx(gamma, rel=1e-12)
        assert optimizer.optimizer.num_ranks == (ranks.size() if ranks.included() else 1)
        _check_first_step(optimizer, model, choice, ranks)
    hvd.remove_process_set(fewer)
    _iterate(optimizer, model, 2)
    assert same_on_all_ranks(model.parameters())


def _check_first_step(optimizer, model, choice, ranks):
    """The first term after the change is sum_k ||mean of V_j,t over the old ranks - V_k,t+1/2||^2."""
    rule = optimizer.optimizer
    before = rule.param_groups[0]["sum_of_squares"]
    mean = torch.cat([rule.state[p]["look_ahead"].reshape(-1) for p in model.parameters()])
    optimizer.zero_grad()
    loss(model).backward()
    own = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    optimizer.step()
    terms = gathered(float((mean - own).double().square().sum()))
    if ranks.included() and choice == "none":
        total = sum(terms[: ranks.size()])
        # Float64 sums in another order, taken from a larger sum.
        assert rule.param_groups[0]["sum_of_squares"] - before == pytest.approx(total, rel=1e-9)


def test_ranks_with_other_shapes_or_names_all_learn_both():
    sizes = 5 + (hvd.rank() == 1)
    model = torch.nn.Linear(4, sizes)
    optimizer = _wrapped(model, "none", torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.randn(2, 4)).sum().backward()
    message = message_on_all_ranks(RuntimeError, optimizer.step)
    seen = [f"rank {rank} has weight of shape ({5 + rank}, 4) and type torch.float32" for rank in (0, 1)]
    assert message == f"ranks disagree: {', '.join(seen)}"


def test_ranks_with_other_compression_all_learn_both():
    model = network()
    optimizer = _wrapped(model, "qgenx" if hvd.rank() == 1 else "fp16")
    loss(model).backward()
    message = message_on_all_ranks(RuntimeError, optimizer.extrapolation)
    assert message == "ranks disagree: rank 0 has compression=FP16Compressor, rank 1 has bits=4"


@pytest.mark.parametrize("choice", ["none", "qgenx"])
def test_ranks_in_other_half_steps_all_learn_both(choice):
    model = network()
    optimizer = _wrapped(model, choice)
    _iterate(optimizer, model)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.optimizer._set_extrapolated(True)  # so that step() gets as far as the exchange
    half_step = optimizer.step if hvd.rank() == 1 else optimizer.extrapolation
    message = message_on_all_ranks(RuntimeError, half_step)
    assert message == "ranks are out of step: rank 0 is at exchange 2 (extrapolation), rank 1 at exchange 2 (step)"


def test_a_gradient_that_is_not_finite_is_nan_everywhere_or_raises_everywhere():
    for nonfinite in ("nan", "raise"):
        model = network()
        compression = Compression.qgenx(bits=4, nonfinite=nonfinite)
        optimizer = _wrapped(model, compression, torch.optim.SGD(model.parameters(), lr=0.1))
        loss(model).backward()
        if hvd.rank() == 0:
            model[0].bias.grad[1] = float("nan")
        if nonfinite == "raise":
            assert "the gradient of 0.bias is not finite" in message_on_all_ranks(FloatingPointError, optimizer.step)
        else:
            with pytest.warns(RuntimeWarning, match=r"the gradient of 0\.bias is not finite on some rank"):
                optimizer.step()
            assert model[0].bias.grad.isnan().all() and model[0].weight.grad.isfinite().all()


def test_a_grad_scaler_skips_the_step_on_all_ranks():
    model = network()
    optimizer = _wrapped(model, "qgenx", torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    for broken in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss(model)).backward()
        if broken and hvd.rank() == 0:
            model[0].weight.grad[0, 0] = float("inf")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert unchanged == broken
    assert set(gathered(scaler.get_scale())) == {2.0**9}
    assert same_on_all_ranks(model.parameters())


@pytest.mark.skipif(RANKS < 3, reason="a process set needs a rank outside it")
def test_a_process_set_leaves_others_alone():
    pair = hvd.add_process_set([0, 2])
    model = network()
    optimizer = _wrapped(model, "qgenx", process_set=pair)
    _iterate(optimizer, model, 2)
    vectors = gathered(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(vectors[0], vectors[2]) and not torch.equal(vectors[0], vectors[1])
    hvd.remove_process_set(pair)


def test_learning_rate_schedulers_see_an_optimizer():
    model = network()
    optimizer = _wrapped(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    _iterate(optimizer, model)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005 == optimizer.optimizer.param_groups[0]["lr"]


def test_two_optimizers_used_in_another_order_are_not_mixed():
    models = [network(), network()]
    optimizers = [_wrapped(model, "none", torch.optim.SGD(model.parameters(), lr=0.1)) for model in models]
    for model in models:
        loss(model).backward()
    mine, other = optimizers if hvd.rank() != 1 else optimizers[::-1]
    message = message_on_all_ranks(RuntimeError, mine.step)
    own = "the exchange of the optimizer of 0.weight and 5 more"
    assert message.startswith(f"ranks disagree: rank 0 has {own}")
    assert "of those with its names and shapes)" in message


@pytest.mark.parametrize("choice", ["none", "fp16", "qgenx"])
def test_parameters_frozen_on_some_ranks_only_count_as_zero_there(choice):
    parameters = [torch.nn.Parameter(torch.zeros(500)) for _ in range(3)]
    optimizer = hvd_qgenx.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.0), compression=CHOICES[choice])
    for step in range(2):
        optimizer.zero_grad()
        for index, p in enumerate(parameters):
            p.requires_grad_(not (step == 1 and index == hvd.rank()))
            if p.requires_grad:
                p.grad = torch.full((500,), 10.0**index)
        optimizer.step()
    for index in (0, 1):
        # Small parameters travel as float32; float16 rounds input, sum and mean by 2**-11 each.
        expected = torch.full((500,), 10.0**index * (RANKS - 1) / RANKS)
        assert torch.allclose(parameters[index].grad, expected, rtol=1.5e-3 if choice == "fp16" else 1e-6)


def test_a_plain_checkpoint_loaded_after_the_broadcast_is_kept():
    model = network()
    plain = torch.optim.Adam(model.parameters())
    for _ in range(2):
        loss(model).backward()
        plain.step()
    saved = copy.deepcopy(plain.state_dict())
    optimizer = _wrapped(model, "none", torch.optim.Adam(model.parameters()))
    hvd.broadcast_optimizer_state(optimizer, 0)
    optimizer.load_state_dict(saved)
    loss(model).backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 3


def test_a_checkpoint_of_other_settings_gives_its_counters_and_not_its_levels():
    model = network()
    optimizer = _wrapped(model, Compression.qgenx(bits=3))
    _iterate(optimizer, model)
    for levels, expected in (("uniform", 127), ("adaptive", 127)):
        other = _wrapped(model, Compression.qgenx(bits=8, levels=levels))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        _iterate(other, model)
        memory = other.state_dict()["param_groups"][0]["hvd_qgenx"]
        assert memory["step"] == 4 and len(memory["levels"]) == expected + 1
        assert memory["version"] == (levels == "adaptive")


def test_state_dict_inside_a_closure_does_not_turn_counters_back():
    model = network()
    optimizer = _wrapped(model)

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.state_dict()
        return value

    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.state_dict()["param_groups"][0]["hvd_qgenx"]["step"] == 6


def test_a_sparse_gradient_on_one_rank_is_an_error_on_all():
    table = torch.nn.Embedding(50, 4, sparse=hvd.rank() == 0)
    optimizer = _wrapped(table, "none", torch.optim.SGD(table.parameters(), lr=0.1))
    table(torch.tensor([1])).sum().backward()
    try:
        optimizer.step()
        error = None
    except (ValueError, RuntimeError) as raised:
        error = str(raised)
    errors = gathered(error)
    assert "the gradient of weight is sparse here: make it so on all ranks, or pass sparse_as_dense=True" in errors[0]
    assert all("rank 0 is at exchange 0 (rows), rank 1 at exchange 0 (step)" in other for other in errors)


@pytest.mark.parametrize("choice", CHOICES)
def test_parameters_of_several_types_with_gradients_on_some_ranks(choice):
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    parameters = [torch.nn.Parameter(torch.zeros(2000, dtype=dtype)) for dtype in types]
    optimizer = hvd_qgenx.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), compression=CHOICES[choice])
    for index, p in enumerate(parameters):
        if index % RANKS != hvd.rank():
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.grad.dtype for p in parameters] == types
    # The mean of 2,000 roundings of equal numbers: coarsest at 4 bits, where each deviates by half a gap at most.
    assert all(abs(float(p.grad.double().mean()) - (RANKS - 1) / RANKS) < 0.05 for p in parameters)
    assert same_on_all_ranks(parameters)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_rule_for_what_is_not_finite_is_the_same_for_every_choice(choice):
    model = network()
    optimizer = _wrapped(model, choice, torch.optim.SGD(model.parameters(), lr=0.1))
    loss(model).backward()
    if hvd.rank() == RANKS - 1:
        model[2].weight.grad[7, 1] = -float("inf")
    model[4].bias.grad[:] = 3e38  # finite here, but the sum over ranks is not
    with pytest.warns(RuntimeWarning, match=r"the gradient of 2\.weight, 4\.bias is not finite on some rank") as caught:
        optimizer.step()
    assert len(caught) == 1
    broken = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    assert broken == ["2.weight", "4.bias"]
    assert model[2].weight.grad.isnan().all() and model[4].bias.grad.isnan().all()


def test_a_model_too_small_to_be_coded_does_not_pay_for_statistics_forever():
    model = torch.nn.Linear(10, 2)
    hvd.broadcast_parameters(model.state_dict(), 0)
    optimizer = _wrapped(model, "qgenx", torch.optim.SGD(model.parameters(), lr=0.1))
    sent = []
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 10)).sum().backward()
        before = optimizer.communication.bytes_sent
        optimizer.step()
        sent.append(optimizer.communication.bytes_sent - before)
    assert [step for step, size in enumerate(sent) if size > 4000] == [0], "later ones wait for something to fit to"
