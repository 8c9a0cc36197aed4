"""overlap=True: whatever happens between backward and half-step, the bits are those without overlap."""

import copy
import gc
import warnings

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, message_on_all_ranks, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression, connection

RANKS = hvd.size()
LAST = RANKS - 1
PART_BYTES = 8192
PLANS = ("allgather", "two_phase")
MAKES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "extra_adam": lambda parameters: hvd_qgenx.ExtraAdam(parameters, lr=0.01),
    "extra_adam_past": lambda parameters: hvd_qgenx.ExtraAdam(parameters, lr=0.01, past=True),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(connection, "PART_BYTES", PART_BYTES)


def network():
    """Equal on all ranks; two parameters of two parts each, and small ones that share one."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 100), torch.nn.Tanh(), torch.nn.Linear(100, 40), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(40, 3))


def loss(model):
    return model(torch.randn(8, 40)).square().mean()


def wrap(model, overlap, make="sgd", choice=None, plan="allgather", **options):
    """With overlap, or in the same parts without."""
    compression = choice or Compression.qgenx(bits=4, seed=3, adapt_at=(0, 4))
    base = MAKES[make](model.parameters()) if isinstance(make, str) else make(model.parameters())
    options = {"compression": compression, "exchange": plan, "overlap": overlap, **options}
    optimizer = hvd_qgenx.DistributedOptimizer(base, model.named_parameters(), **options)
    if not overlap:
        optimizer._exchange.part_bytes = PART_BYTES
    return optimizer


def under_way(optimizer):
    """The parts that have been started; none without overlap."""
    return sorted(getattr(optimizer._exchange, "_flights", ()))


def num_parts(optimizer):
    return len(optimizer._exchange.parts())


def run(program, overlap, **options):
    """Parameters, state and gradients after ``program(model, optimizer)``, from equal random numbers."""
    model = network()
    optimizer = wrap(model, overlap, **options)
    torch.manual_seed(2000 + hvd.rank())
    program(model, optimizer)
    assert same_on_all_ranks(model.parameters())
    return model, optimizer


def assert_same_bits(program, **options):
    """Returns the optimizer with overlap."""
    model, optimizer = run(program, True, **options)
    other, plain = run(program, False, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    grads = [(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(p is q is None or torch.equal(p, q) for p, q in grads)
    counted = (optimizer.communication, plain.communication)
    assert len({(c.exchanges, c.coordinates, c.squared_error, c.codebook_version) for c in counted}) == 1
    return optimizer


def half_steps(optimizer):
    extrapolates = getattr(optimizer.optimizer, "extrapolation_uses_gradient", False)
    return (optimizer.extrapolation, optimizer.step) if extrapolates else (optimizer.step,)


def iterate(model, optimizer, iterations, backward=lambda model: loss(model).backward(), watch=lambda: None):
    for _ in range(iterations):
        if getattr(optimizer.optimizer, "past", False):
            optimizer.extrapolation()
        for half_step in half_steps(optimizer):
            optimizer.zero_grad()
            backward(model)
            watch()
            half_step()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", MAKES)
def test_bits_are_those_without_overlap_and_all_parts_but_the_first_start_in_backward(make, plan):
    seen = []

    def program(model, optimizer):
        iterate(model, optimizer, 7, watch=lambda: seen.append(under_way(optimizer)))

    optimizer = assert_same_bits(program, make=make, plan=plan)
    per_iteration = len(half_steps(optimizer))
    fitted = (0, 4 * per_iteration)  # the first exchange, and the one that fits levels again
    rest = list(range(1, num_parts(optimizer)))
    assert len(rest) > 3
    with_overlap = seen[: 7 * per_iteration]
    assert with_overlap == [[] if call in fitted else rest for call in range(len(with_overlap))]


def test_without_a_step_given_up_not_a_byte_more_is_sent():
    sent = [run(lambda *pair: iterate(*pair, 6), overlap)[1].communication for overlap in (True, False)]
    assert sent[0].bytes_sent == sent[1].bytes_sent and sent[0].collectives == sent[1].collectives


@pytest.mark.parametrize("make", ["sgd", "extra_adam"])
def test_the_last_of_backward_passes_per_step_sends(make):
    seen = []

    def backward(model, optimizer):
        for _ in range(3):
            (loss(model) / 3).backward()
            seen.append(len(under_way(optimizer)))

    def program(model, optimizer):
        iterate(model, optimizer, 3, lambda model: backward(model, optimizer))

    optimizer = assert_same_bits(program, make=make, backward_passes_per_step=3)
    assert seen[:3] == [0, 0, 0] and seen[3:6] == [0, 0, num_parts(optimizer) - 1]


def test_fewer_backwards_than_announced_send_all_in_the_half_step():
    def program(model, optimizer):
        iterate(model, optimizer, 3, watch=lambda: seen.append(len(under_way(optimizer))))

    seen = []
    assert_same_bits(program, backward_passes_per_step=2)
    assert not any(seen)


def test_the_number_of_backwards_can_be_set_later():
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        optimizer.set_backward_passes_per_step(2)
        iterate(model, optimizer, 2, lambda model: [loss(model).backward() for _ in range(2)])

    assert_same_bits(program)


def _uses(model, layers):
    """A backward through these linear layers alone."""
    sum(model[layer](torch.randn(8, model[layer].in_features)).square().mean() for layer in layers).backward()


@pytest.mark.parametrize(("missing", "plan"), [(0, "allgather"), (2, "two_phase"), (4, "allgather"), (4, "two_phase")])
@pytest.mark.parametrize("ranks", [[0], list(range(RANKS))])
def test_a_layer_that_some_ranks_or_all_do_not_use(missing, ranks, plan):
    layers = [layer for layer in (0, 2, 4) if layer != missing or hvd.rank() not in ranks]

    def program(model, optimizer):
        iterate(model, optimizer, 2)
        iterate(model, optimizer, 2, lambda model: _uses(model, layers))
        iterate(model, optimizer, 1)

    assert_same_bits(program, plan=plan)


def test_a_rank_without_any_gradient():
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        iterate(model, optimizer, 2, lambda model: loss(model).backward() if hvd.rank() else None)

    assert_same_bits(program)


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_that_one_rank_freezes_and_thaws(plan):
    seen = []

    def program(model, optimizer):
        model[4].requires_grad_(hvd.rank() != 0)  # no gradient can be hooked there yet
        for frozen in (model[2], model[0], None):
            iterate(model, optimizer, 2)
            for layer in (model[0], model[2], model[4]):
                layer.requires_grad_(layer is not frozen or hvd.rank() != 0)
        iterate(model, optimizer, 2, watch=lambda: seen.append(len(under_way(optimizer))))

    optimizer = assert_same_bits(program, plan=plan)
    assert seen[1] == num_parts(optimizer) - 1, "thawed parameters are watched, too"


@pytest.mark.parametrize(("make", "plan"), [("sgd", "two_phase"), ("extra_adam", "allgather")])
def test_synchronize_then_clip_then_half_step(make, plan):
    def program(model, optimizer):
        for _ in range(3):
            for half_step in half_steps(optimizer):
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.synchronize()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                with optimizer.skip_synchronize():
                    half_step()

    assert_same_bits(program, make=make, plan=plan)


@pytest.mark.parametrize("make", MAKES)
def test_step_with_a_closure(make):
    seen = []

    def program(model, optimizer):
        def closure():
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            seen.append(len(under_way(optimizer)))
            return value

        for _ in range(3):
            optimizer.step(closure)

    optimizer = assert_same_bits(program, make=make)
    assert max(seen) == num_parts(optimizer) - 1


FURTHER = (
    "the gradient of {} was accumulated again after it was sent: with overlap=True the backward of number "
    "backward_passes_per_step sends, which is 1; pass the number of backwards that precede a half-step"
)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ranks", [[0], [LAST], list(range(RANKS))])
def test_a_further_backward_is_an_error_where_it_happens_and_nowhere_else(ranks, plan):
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        optimizer.zero_grad()
        loss(model).backward()
        if hvd.rank() in ranks and optimizer._exchange.parts():
            with pytest.raises(RuntimeError) as error:
                loss(model).backward()
            assert str(error.value) in [FURTHER.format(name) for name, _ in model[4].named_parameters(prefix="4")]
        if hvd.rank() in ranks:
            optimizer.zero_grad()
            torch.manual_seed(4000 + hvd.rank())
            loss(model).backward()
        optimizer.step()
        torch.manual_seed(5000 + hvd.rank())
        iterate(model, optimizer, 2)

    assert_same_bits(program, plan=plan)


@pytest.mark.parametrize(
    ("clear", "make", "plan"),
    [
        ("optimizer", "sgd", "allgather"),
        ("optimizer", "extra_adam", "two_phase"),
        ("model", "sgd", "two_phase"),
        ("model in place", "sgd", "allgather"),
        ("in place", "extra_adam", "allgather"),
        ("by hand", "sgd", "allgather"),
    ],
)
@pytest.mark.parametrize("ranks", [[0], list(range(RANKS))])
def test_a_step_that_some_ranks_or_all_give_up(ranks, clear, make, plan):
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        for half_step in half_steps(optimizer) * 2:
            optimizer.zero_grad()
            loss(model).backward()
            if hvd.rank() in ranks:
                _clear(model, optimizer, clear)
                loss(model).backward()
            half_step()
        iterate(model, optimizer, 1)

    assert_same_bits(program, make=make, plan=plan)


def _clear(model, optimizer, how):
    if how == "by hand":
        for p in model.parameters():
            p.grad = None
    elif how.startswith("model"):
        model.zero_grad(set_to_none=how == "model")
    else:
        optimizer.zero_grad(set_to_none=how != "in place")


def test_a_step_given_up_by_ranks_of_which_one_had_no_gradient():
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        if hvd.rank():
            optimizer.zero_grad()
            loss(model).backward()
        iterate(model, optimizer, 2)

    assert_same_bits(program)


def test_a_rank_that_evaluates_with_gradients_alone_does_not_disturb_others():
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        if hvd.rank() == 0:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.zero_grad()
        gathered("evaluated")  # where others wait meanwhile
        iterate(model, optimizer, 2)

    assert_same_bits(program)


def test_after_a_step_given_up_parts_start_early_again():
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            seen.append(len(under_way(optimizer)))
        optimizer.step()
        iterate(model, optimizer, 1, watch=lambda: seen.append(len(under_way(optimizer))))

    seen = []
    optimizer = assert_same_bits(program)
    assert seen[:4] == [num_parts(optimizer) - 1] * 4


def _set_one(gradient):
    gradient[0, 1] = 7.0


def _replace(p):
    """By a copy that differs in one coordinate and was changed as often."""
    copied = p.grad.clone()
    copied.data[0, 1] = 7.0
    while copied._version < p.grad._version:
        copied.add_(0.0)
    p.grad = copied


CHANGES = {
    "clipped": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01),
    "scaled": lambda model: [p.grad.mul_(0.5) for p in model.parameters()],
    "scaled by .data": lambda model: [p.grad.data.mul_(0.5) for p in model.parameters()],
    "replaced": lambda model: [setattr(p, "grad", p.grad * 0.5) for p in model.parameters()],
    "one coordinate": lambda model: _set_one(model[2].weight.grad),
    "one coordinate of a copy": lambda model: _replace(model[2].weight),
    "one dropped": lambda model: setattr(model[4].bias, "grad", None),
}


@pytest.mark.parametrize(("change", "plan"), [*((change, "allgather") for change in CHANGES), ("clipped", "two_phase")])
@pytest.mark.parametrize("ranks", [[0], list(range(RANKS))])
def test_gradients_changed_after_backward_are_sent_as_they_are(ranks, change, plan):
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        backward = lambda model: (loss(model).backward(), hvd.rank() in ranks and CHANGES[change](model))  # noqa: E731
        iterate(model, optimizer, 2, backward)

    assert_same_bits(program, plan=plan)


def test_a_grad_scaler_that_unscales_before_the_exchange():
    def program(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()

    assert_same_bits(program)


@pytest.mark.parametrize(("make", "plan"), [("sgd", "two_phase"), ("extra_adam", "allgather")])
@pytest.mark.parametrize("ranks", [[0], list(range(RANKS))])
def test_state_dict_between_backward_and_half_step(ranks, make, plan):
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        for half_step in half_steps(optimizer) * 2:
            optimizer.zero_grad()
            loss(model).backward()
            if hvd.rank() in ranks:
                optimizer.state_dict()
            half_step()

    assert_same_bits(program, make=make, plan=plan)


@pytest.mark.parametrize("plan", PLANS)
def test_a_state_saved_between_backward_and_half_step_is_equal_on_all_ranks_and_continues(plan):
    model, optimizer = run(lambda *pair: iterate(*pair, 3), True, plan=plan)
    optimizer.zero_grad()
    loss(model).backward()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    memory = [state["param_groups"][0]["hvd_qgenx"] for state in gathered(saved[1])]
    assert all(state == memory[0] for state in memory)
    local = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    resumed = network()
    other = wrap(resumed, True, plan=plan)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for p, gradient in zip(resumed.parameters(), local, strict=True):
        p.grad = gradient
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("iteration", [2, 4])  # of the state that is loaded; at 4 levels are fitted again
def test_a_state_loaded_between_backward_and_half_step(iteration, plan):
    def program(model, optimizer):
        iterate(model, optimizer, iteration)
        saved = copy.deepcopy(optimizer.state_dict())
        iterate(model, optimizer, 2)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.load_state_dict(saved)
        optimizer.step()
        iterate(model, optimizer, 3)

    assert_same_bits(program, plan=plan)


@pytest.mark.parametrize("plan", PLANS)
def test_levels_that_fall_due_after_parts_have_started(plan):
    """On ranks that have started none, too: a loaded state turned the count of iterations back on all of them."""

    def program(model, optimizer):
        iterate(model, optimizer, 4)
        saved = copy.deepcopy(optimizer.state_dict())
        iterate(model, optimizer, 1)
        optimizer.zero_grad()
        _uses(model, [0, 2, 4] if hvd.rank() else [0, 2])
        optimizer.load_state_dict(saved)
        optimizer.step()
        iterate(model, optimizer, 3)

    assert_same_bits(program, plan=plan)


def test_extrapolation_twice():
    def program(model, optimizer):
        for half_step in (optimizer.extrapolation, optimizer.extrapolation, optimizer.step) * 3:
            optimizer.zero_grad()
            loss(model).backward()
            half_step()

    assert_same_bits(program, make="extra_adam")


def test_a_group_of_parameters_added_between_backward_and_half_step():
    def program(model, optimizer):
        iterate(model, optimizer, 2)
        optimizer.zero_grad()
        loss(model).backward()
        model.more = torch.nn.Linear(3, 2000)
        torch.nn.init.ones_(model.more.weight), torch.nn.init.ones_(model.more.bias)
        optimizer.add_param_group({"params": list(model.more.parameters())})
        optimizer.step()
        iterate(model, optimizer, 3)

    assert_same_bits(program)


@pytest.mark.parametrize("choice", ["none", "fp16", "dual_extrapolation", "optimistic", "dual_averaging"])
def test_where_nothing_can_start_early_nothing_changes(choice):
    make, compression = "sgd", getattr(Compression, choice, None)
    if compression is None:
        make, compression = (lambda p: hvd_qgenx.QGenX(p, method=choice)), Compression.qgenx(bits=4)

    def program(model, optimizer):
        assert not optimizer._exchange.parts()
        for _ in range(3):
            if make != "sgd":
                optimizer.zero_grad()
                loss(model).backward()
                optimizer.extrapolation()
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    models = []
    for overlap in (True, False):
        models.append(network())
        optimizer = wrap(models[-1], overlap, make, compression)
        torch.manual_seed(2000 + hvd.rank())
        program(models[-1], optimizer)
    assert same_on_all_ranks(models[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_network_of_one_part_starts_nothing_early(monkeypatch):
    monkeypatch.setattr(connection, "PART_BYTES", 2**20)
    model, optimizer = run(lambda *pair: iterate(*pair, 2), True)
    loss(model).backward()
    assert not under_way(optimizer)


@pytest.mark.parametrize("players", [("generator", "critic"), ("critic", "generator")])
def test_a_backward_through_one_player_sends_nothing_of_the_other(players):
    def game_of():
        torch.manual_seed(0)
        networks = {"generator": torch.nn.Linear(4, 1000), "critic": torch.nn.Linear(1000, 9)}
        return hvd_qgenx.Game({player: networks[player] for player in players})

    def losses(game):
        fake = game["generator"](torch.randn(8, 4))
        real = game["critic"](torch.randn(8, 1000)).square().mean()
        return {"generator": -game["critic"](fake).mean(), "critic": game["critic"](fake).square().mean() + real}

    ends = []
    for overlap in (True, False):
        game = game_of()
        optimizer = wrap(game, overlap, "extra_adam")
        torch.manual_seed(2000 + hvd.rank())
        for iteration in range(3):
            for half_step in half_steps(optimizer):
                optimizer.zero_grad()
                value = losses(game)["generator"]
                torch.autograd.backward(value, inputs=list(game["generator"].parameters()))
                if overlap and iteration:
                    _assert_only(optimizer, game, players)
                optimizer.zero_grad()
                game.backward(**losses(game))
                half_step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in game.parameters()]))
        assert same_on_all_ranks(game.parameters())
    assert torch.equal(*ends)


def _assert_only(optimizer, game, players):
    """Only parts of the generator are under way; none if the critic's, which are last, must precede them."""
    names = [name.split(".")[0] for name, _ in game.named_parameters()]
    parts = optimizer._exchange.parts()
    owners = {names[piece.segment] for part in under_way(optimizer) for piece in parts[part].slices}
    assert owners == ({"generator"} if players[-1] == "generator" else set())


@pytest.mark.parametrize("plan", PLANS)
def test_two_optimizers_may_have_parts_under_way_together(plan):
    ends = []
    for overlap in (True, False):
        models = [network(), network()]
        optimizers = [wrap(model, overlap, plan=plan) for model in models]
        torch.manual_seed(2000 + hvd.rank())
        for _ in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                loss(model).backward()
            if overlap:
                seen = list(map(under_way, optimizers))
            for optimizer in optimizers:
                optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for model in models for p in model.parameters()]))
    assert seen == [list(range(1, num_parts(optimizers[0]) or len(seen[0]) + 1))] * 2
    assert torch.equal(*ends)


def test_hooks_of_an_optimizer_that_is_gone_do_nothing():
    model, optimizer = run(lambda *pair: iterate(*pair, 2), True)
    exchange = optimizer._exchange
    del optimizer
    gc.collect()
    for _ in range(2):
        loss(model).backward()
    assert not exchange._flights


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_of_several_types_and_layouts(plan):
    def program(model, optimizer):
        iterate(model, optimizer, 4, backward, lambda: seen.append(len(under_way(optimizer))))

    def backward(model):
        sum((p.float() * torch.randn(p.shape)).square().mean() for p in model).backward()

    ends, seen = [], []
    for overlap in (True, False):
        torch.manual_seed(0)
        types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
        model = torch.nn.ParameterList([torch.randn(3000).to(dtype) for dtype in types])
        model.append(torch.randn(64, 16, 3, 3).to(memory_format=torch.channels_last))
        optimizer = wrap(model, overlap, plan=plan)
        torch.manual_seed(2000 + hvd.rank())
        program(model, optimizer)
        ends.append([p.detach().clone() for p in model])
        assert same_on_all_ranks(model)
    assert max(seen) > 3
    assert all(map(torch.equal, *ends))


def test_sparse_gradients_wait_for_the_half_step():
    ends = []
    for overlap in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(900, 4, sparse=True), torch.nn.Linear(4, 900))
        optimizer = wrap(model, overlap, lambda p: torch.optim.SGD(p, lr=0.1), sparse_as_dense=True)
        torch.manual_seed(2000 + hvd.rank())
        iterate(model, optimizer, 3, lambda model: model(torch.randint(900, (5,))).square().sum().backward())
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert same_on_all_ranks(model.parameters())
    assert torch.equal(*ends)


@pytest.mark.parametrize("plan", PLANS)
def test_a_gradient_that_is_not_finite_is_nan_everywhere(plan):
    def backward(model):
        value = loss(model)
        (value * (float("inf") if hvd.rank() == LAST else 1.0)).backward()

    model, optimizer = run(lambda *pair: iterate(*pair, 2), True, plan=plan)
    with pytest.warns(RuntimeWarning, match="is not finite on some rank"):
        iterate(model, optimizer, 1, backward)
    assert all(p.grad.isnan().all() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(lambda *pair: iterate(*pair, 2), plan=plan)


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_a_sum_over_ranks(op):
    assert_same_bits(lambda *pair: iterate(*pair, 3), op=op)


def test_ranks_of_which_some_overlap_all_learn_both():
    model = network()
    optimizer = wrap(model, hvd.rank() != 1)
    loss(model).backward()
    message = message_on_all_ranks(RuntimeError, optimizer.step)
    ends = (f"exchange=allgather, overlap={rank == 0}, hierarchical=False" for rank in (0, 1))
    seen = [f"rank {rank} has optimizer=SGD, op=mean, {end}" for rank, end in enumerate(ends)]
    assert message == f"ranks disagree: {', '.join(seen)}"


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_in_other_half_steps_all_learn_both(plan):
    model, optimizer = run(lambda *pair: iterate(*pair, 1), True, make="extra_adam", plan=plan)
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.optimizer._set_extrapolated(True)  # so that step() gets as far as the exchange
    half_step = optimizer.step if hvd.rank() == 1 else optimizer.extrapolation
    message = message_on_all_ranks(RuntimeError, half_step)
    assert message == "ranks are out of step: rank 0 is at exchange 2 (extrapolation), rank 1 at exchange 2 (step)"


@pytest.mark.skipif(RANKS < 3, reason="a process set needs a rank outside it")
def test_ranks_outside_a_process_set_start_nothing():
    pair = hvd.add_process_set([0, 2])
    model = network()
    optimizer = wrap(model, True, process_set=pair)
    iterate(model, optimizer, 3)
    vectors = gathered(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(vectors[0], vectors[2]) and not torch.equal(vectors[0], vectors[1])
    hvd.remove_process_set(pair)
