"""Plans and parts: what two phases, and several messages, change and what they must not."""

import copy

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Compression
from hvd_qgenx.exchange.two_phase import fine_bits

RANKS = hvd.size()
PLANS = ("allgather", "two_phase")
SHAPES = ((40, 50), (3,), (5000,), (64, 33), (1,))


def _optimizer(plan, part_bytes=0, op=hvd.Average, compression=None, shapes=SHAPES):
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        compression=compression or Compression.qgenx(bits=4, adapt_at=(0, 3), bucket_size=256),
        exchange=plan,
        op=op,
    )
    optimizer._exchange.part_bytes = part_bytes
    return parameters, optimizer


def _gradients(call, lacking=()):
    """This rank's, of a generator of its own."""
    generator = torch.Generator().manual_seed(100 * call + hvd.rank())
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [None if index in lacking else gradient for index, gradient in enumerate(found)]


def _step(parameters, optimizer, gradients):
    """The means, as clones."""
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    optimizer.step()
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def _exact(gradients):
    """Sums over ranks in float64; None where no rank has one."""
    lists = gathered(gradients)
    found = [[own[i].double() for own in lists if own[i] is not None] for i in range(len(SHAPES))]
    return [sum(parts) if parts else None for parts in found]


@pytest.mark.parametrize("plan", PLANS)
def test_every_phase_of_every_part_is_timed_and_a_range_of_torchs_profiler(plan):
    parameters, optimizer = _optimizer(plan, part_bytes=12_000)
    for call in range(2):  # levels are fitted, and the means' after them
        _step(parameters, optimizer, _gradients(call))
    before = dict(optimizer.communication.seconds)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _step(parameters, optimizer, _gradients(2))
    names = [event.name for event in profile.events() if event.name.startswith("hvd_qgenx.")]
    parts, twice = len(optimizer._exchange._parts()), 2 if plan == "two_phase" else 1
    assert parts > 1 and names.count("hvd_qgenx.wait") == names.count("hvd_qgenx.decode") == twice * parts
    assert names.count("hvd_qgenx.encode") == parts * (RANKS + 1 if plan == "two_phase" else 1)
    assert all(optimizer.communication.seconds[phase] > before[phase] for phase in before)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("part_bytes", [0, 2048, 12_000])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def test_replicas_are_bit_identical_and_near_the_mean_whoever_lacks_what(plan, part_bytes, op):
    parameters, optimizer = _optimizer(plan, part_bytes, op)
    scale = RANKS if op == hvd.Average else 1
    for call in range(6):
        lacking = {0: (), 1: (0,), 2: (2, 4)}.get((call + hvd.rank()) % 3, ()) if call % 2 else ()
        if call == 5:
            lacking = (*lacking, 3)  # which no rank has then
        gradients = _gradients(call, lacking)
        means = _step(parameters, optimizer, gradients)
        assert same_on_all_ranks([mean for mean in means if mean is not None])
        for mean, exact, shape in zip(means, _exact(gradients), SHAPES, strict=True):
            assert (mean is None) == (exact is None)
            if mean is not None and len(shape) and torch.Size(shape).numel() > 1024:
                error = float((mean.double() * scale - exact).square().sum() / exact.square().sum())
                assert error < 0.3  # exponential levels, before any fit, have a relative variance of .1
            elif mean is not None:
                assert torch.allclose(mean.double() * scale, exact, rtol=1e-5)  # float32 sums, uncoded
    assert optimizer.communication.exchanges == 6


@pytest.mark.parametrize("plan", PLANS)
def test_parts_draw_independently_of_each_other(plan):
    """The vector is one segment of equal coordinates: parts under one stream would be equal."""
    parameters, optimizer = _optimizer(
        plan, 4096, compression=Compression.qgenx(bits=2, levels="uniform", norm="linf"), shapes=((4096,),)
    )
    gradient = torch.full((4096,), 0.5)
    gradient[::128] = 1.0
    (mean,) = _step(parameters, optimizer, [gradient])
    first, second, *_ = mean.split(1024)
    assert not torch.equal(first, second)


def test_a_mean_of_two_phases_is_unbiased():
    """Of n exchanges of one gradient, in units of the standard error: means scatter as those of n exchanges, no more.

    The largest of 5,000 is held against no less than the usual deviation, since that of a coordinate which is rarely
    rounded up is badly known.
    """
    parameters, optimizer = _optimizer("two_phase", compression=Compression.qgenx(bits=3, adapt_at=(0,)))
    gradients = _gradients(0)
    exact, n = [total / RANKS for total in _exact(gradients)], 400
    sums, squares = [torch.zeros(s, dtype=torch.float64) for s in SHAPES], [torch.zeros(s).double() for s in SHAPES]
    for _ in range(n):
        for total, square, mean in zip(sums, squares, _step(parameters, optimizer, gradients), strict=True):
            total += mean.double()
            square += mean.double().square()
    for index in (0, 2, 3):
        mean = sums[index] / n
        deviation = (squares[index] / n - mean.square()).clamp(min=0).sqrt()
        z = (mean - exact[index]) / (deviation / n**0.5).clamp(min=1e-9)
        usual = float(deviation.square().mean().sqrt())
        largest = (mean - exact[index]).abs() / deviation.clamp(min=usual) * n**0.5
        assert float(largest.max()) < 6.0 and abs(float(z.mean())) < 5 / z.numel() ** 0.5
        assert 0.8 < float(z.std()) < 1.2


def test_both_roundings_are_reported():
    parameters, optimizer = _optimizer("two_phase")
    for call in range(3):
        _step(parameters, optimizer, _gradients(call))
    communication = optimizer.communication
    # Each bit more quarters it, or nearly.
    assert 0.0 < communication.mean_variance < 1.5 * communication.variance / 4 ** (fine_bits(4, RANKS) - 4)
    assert 0 < communication.second_phase_bytes < communication.bytes_sent


def test_two_phases_keep_what_averaging_gains():
    """Relative to the allgather's, over 30 exchanges of independent gradients."""
    errors = {}
    for plan in PLANS:
        parameters, optimizer = _optimizer(plan)
        errors[plan] = 0.0
        for call in range(30):
            gradients = _gradients(call)
            means = _step(parameters, optimizer, gradients)
            if call:  # the first one is an allgather in both
                pairs = zip(means, _exact(gradients), strict=True)
                errors[plan] += sum(float((mean.double() - exact / RANKS).square().sum()) for mean, exact in pairs)
    assert (errors["two_phase"] / errors["allgather"]) ** 0.5 < 1.3


@pytest.mark.parametrize("make", ["extra_adam", "qgenx"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_run_resumes_exactly_also_between_the_half_steps(make, plan):
    def optimizer_of(model):
        base = hvd_qgenx.QGenX(model.parameters()) if make == "qgenx" else hvd_qgenx.ExtraAdam(model.parameters())
        made = hvd_qgenx.DistributedOptimizer(
            base, model.named_parameters(), Compression.qgenx(bits=4, adapt_at=(0, 2)), exchange=plan
        )
        made._exchange.part_bytes = 4000
        return made

    def half(model, optimizer, step, seed):
        torch.manual_seed(seed + hvd.rank())
        optimizer.zero_grad()
        loss(model).backward()
        step()

    model = network()
    optimizer, twin = optimizer_of(model), None
    for iteration in range(6):
        half(model, optimizer, optimizer.extrapolation, 10 * iteration)
        if iteration == 3:
            twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
            resumed = optimizer_of(twin)
            resumed.load_state_dict(state)
        half(model, optimizer, optimizer.step, 10 * iteration + 5)
        if iteration == 3:
            half(twin, resumed, resumed.step, 35)
        elif twin is not None:
            half(twin, resumed, resumed.extrapolation, 10 * iteration)
            half(twin, resumed, resumed.step, 10 * iteration + 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert same_on_all_ranks(model.parameters())


def test_a_method_that_needs_every_ranks_vector_takes_the_allgather():
    ends = []
    for plan in PLANS:
        model = network()
        optimizer = hvd_qgenx.DistributedOptimizer(
            hvd_qgenx.QGenX(model.parameters(), method="optimistic"), model.named_parameters(), exchange=plan,
            compression=Compression.qgenx(bits=4),
        )  # fmt: skip
        for _ in range(4):
            optimizer.extrapolation()
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("part_bytes", [0, 4096])
def test_one_coordinate_that_is_not_finite_spoils_its_whole_tensor_in_every_part(plan, part_bytes):
    parameters, optimizer = _optimizer(plan, part_bytes)
    _step(parameters, optimizer, _gradients(0))
    gradients = _gradients(1)
    if hvd.rank() == RANKS - 1:
        gradients[2][4999] = torch.inf
    with pytest.warns(RuntimeWarning, match=r"the gradient of parameter\.0\.2 is not finite on some rank"):
        means = _step(parameters, optimizer, gradients)
    assert bool(means[2].isnan().all()) and all(bool(means[i].isfinite().all()) for i in (0, 1, 3, 4))


def test_buffers_are_kept():
    """After the first exchanges nothing of the vector's size is allocated: the same memory is sent from."""
    parameters, optimizer = _optimizer("two_phase", 8192)
    for call in range(3):
        _step(parameters, optimizer, _gradients(call))
    buffers = optimizer._exchange.buffers
    before = {name: buffer.data_ptr() for name, buffer in [*buffers._kept.items(), *buffers._floats.items()]}
    for call in range(3):
        _step(parameters, optimizer, _gradients(call))
    after = {name: buffer.data_ptr() for name, buffer in [*buffers._kept.items(), *buffers._floats.items()]}
    assert before == after and len(before) > 3


def test_gradients_are_overwritten_where_they_lie():
    """Views of one flat buffer see the means, as code with fused optimizers and clipping expects."""
    parameters, optimizer = _optimizer("allgather")
    flat = torch.randn(sum(p.numel() for p in parameters))
    parts = flat.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view(p.shape)
    optimizer.step()
    assert same_on_all_ranks([flat])
    assert all(p.grad.data_ptr() == part.data_ptr() for p, part in zip(parameters, parts, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("made", [0, 2, 3])  # ranks agree in the first exchange and fit levels in the fourth
def test_a_rank_that_cannot_send_tells_the_others_in_the_way_they_wait(plan, made):
    parameters, optimizer = _optimizer(plan)
    for call in range(made):
        _step(parameters, optimizer, _gradients(call))
    gradients = _gradients(made)
    if hvd.rank() == RANKS - 1:
        gradients[0] = gradients[0].to_sparse()
    with pytest.raises(RuntimeError) as raised:
        _step(parameters, optimizer, gradients)
    messages = gathered(str(raised.value))
    assert "the gradient of parameter.0.0 is sparse here: make it so on all ranks" in messages[-1]
    assert all(f"rank {RANKS - 1} at exchange {made} (rows)" in message for message in messages)
