"""The stock hvd.DistributedOptimizer with our compressor: the mean of what was decoded, times what Horovod applied."""

import horovod.torch as hvd
import pytest
import torch
from ranks import gathered, loss, message_on_all_ranks, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import Codec, Key, Levels

CODEC = Codec(Levels.uniform(4), min_numel=1024)
RANKS = hvd.size()


class Recorder:
    """A compressor that also writes down what it was given, in call order."""

    def __init__(self, compressor):
        self.compressor, self.given, self.steps = compressor, [], []
        self.decompress = compressor.decompress

    def compress(self, tensor):
        self.given.append((tensor.data_ptr(), tensor.detach().clone()))
        return self.compressor.compress(tensor)


def _recorder(**options):
    return Recorder(hvd_qgenx.Compression.qgenx(levels="uniform", seed=9, **options))


def _expected(recorder, model, step, ranks=None):
    """float32 sum in rank order of the locally decoded payloads, divided by the number of ranks; by name."""
    vector = torch.cat([tensor.reshape(-1) for _, tensor in recorder.given])
    sizes = [tensor.numel() for _, tensor in recorder.given]
    payload = CODEC.encode(vector, Key(9, hvd.rank(), step), sizes=sizes)
    names = {p.grad.data_ptr(): name for name, p in model.named_parameters()}
    sections = CODEC.decode_mean([payload]).split(sizes)
    mine = {names[pointer]: section for (pointer, _), section in zip(recorder.given, sections, strict=True)}
    everyone = [rank for rank in gathered(mine if ranks is None or hvd.rank() in ranks else None) if rank is not None]
    return {name: _mean([rank[name] for rank in everyone]) for name in everyone[0]}


def _mean(parts):
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def _step(optimizer, recorder, model, step, factor, passes=1):
    """One backward and exchange; asserts that every gradient is float32(mean x factor), bit for bit."""
    optimizer.zero_grad()
    for _ in range(passes):
        loss(model).backward()
    # Pointers move when Horovod sets gradients, so the expectation is computed before: force missing submissions first.
    expected = _expected(recorder, model, step) if len(recorder.given) == len(list(model.parameters())) else None
    optimizer.synchronize()
    assert expected is not None, "all hooks ran in backward"
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, (expected[name] * factor).view(p.shape)), name
    recorder.given.clear()
    with optimizer.skip_synchronize():
        optimizer.step()


def _factor(op, predivide=1.0):
    """What Horovod makes of a one."""
    options = {"prescale_factor": 1 / predivide, "postscale_factor": predivide} if op == hvd.Average else {}
    return hvd.allreduce(torch.ones(1), op=op, name="factor", **options)[0]


@pytest.mark.parametrize(
    ("options", "predivide"),
    [
        ({"op": hvd.Average}, 1.0),
        ({"op": hvd.Sum}, 1.0),
        ({"op": hvd.Average, "gradient_predivide_factor": 3.0}, 3.0),
        ({"op": hvd.Average, "groups": 2}, 1.0),
        ({"op": hvd.Average, "backward_passes_per_step": 2}, 1.0),
    ],
)
def test_gradient_is_the_mean_of_decoded_payloads_times_the_token(options, predivide):
    model, recorder = network(), _recorder()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=recorder, **options
    )
    for step in range(3):
        factor = _factor(options["op"], predivide)
        _step(optimizer, recorder, model, step, factor, options.get("backward_passes_per_step", 1))
    assert same_on_all_ranks(model.parameters())


def test_a_parameter_unused_on_one_rank_is_not_mixed_with_one_of_equal_shape():
    model = network()
    compressor = hvd_qgenx.Compression.qgenx(
        levels="uniform", bits=8, norm="linf", named_parameters=model.named_parameters()
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )
    for step in range(3):
        optimizer.zero_grad()
        if hvd.rank() == step % RANKS:  # this rank leaves out the first layer, so its call order differs
            model[4](torch.tanh(model[2](torch.randn(8, 40)))).square().mean().backward()
        else:
            loss(model).backward()
        local = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        exact = {n: sum(rank[n] for rank in gathered(local)) / RANKS for n in local}
        optimizer.step()
        for name, p in model.named_parameters():
            # 8 bits and the largest norm: every coordinate within one gap of each rank's largest, 1/127.
            bound = sum(rank[name].abs().max() for rank in gathered(local)) / RANKS / 127
            assert (p.grad - exact[name]).abs().max() <= bound * 1.001, name
    assert same_on_all_ranks(model.parameters())


def test_adaptive_levels_through_the_drop_in_agree():
    model, compressor = network(), hvd_qgenx.Compression.qgenx(bits=3, adapt_at=(0, 2))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters()), model.named_parameters(), compression=compressor
    )
    for _ in range(4):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    states = gathered(compressor.state_dict())
    assert all(state == states[0] for state in states) and states[0]["version"] == 2 and states[0]["step"] == 4
    assert same_on_all_ranks(model.parameters())


def test_the_compressor_is_usable_without_being_called():
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=hvd_qgenx.Compression.qgenx
    )
    for _ in range(2):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert same_on_all_ranks(model.parameters())


def test_clipping_between_synchronize_and_step():
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        compression=hvd_qgenx.Compression.qgenx(bits=4),
    )
    loss(model).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert same_on_all_ranks(model.parameters())


def test_allreduce_of_one_tensor_takes_the_compressor_too():
    vector, compressor = torch.randn(5000), hvd_qgenx.Compression.qgenx(levels="uniform", seed=9)
    result = hvd.allreduce(vector, name="one", op=hvd.Sum, compression=compressor)
    payload = CODEC.encode(vector, Key(9, hvd.rank(), 0))
    mean = CODEC.decode_mean([torch.from_numpy(p) for p in gathered(payload.numpy())])
    assert torch.equal(result, mean * RANKS)


@pytest.mark.parametrize("op", ["Min", "Max", "Product"])
def test_other_operations_are_refused_on_every_rank(op):
    compressor = hvd_qgenx.Compression.qgenx(bits=4)
    reduce = lambda: hvd.allreduce(torch.randn(10), name=f"op.{op}", op=getattr(hvd, op), compression=compressor)  # noqa: E731
    assert "op must be hvd.Average or hvd.Sum" in message_on_all_ranks(ValueError, reduce)


def test_tensors_of_no_float_type_are_refused():
    with pytest.raises(ValueError, match="gradient must be a dense"):
        hvd.allreduce(torch.ones(4, dtype=torch.int32), compression=hvd_qgenx.Compression.qgenx)


def test_ranks_that_were_told_different_bits_all_learn_both():
    compressor = hvd_qgenx.Compression.qgenx(bits=4 + (hvd.rank() == 1))
    message = message_on_all_ranks(
        RuntimeError, lambda: hvd.allreduce(torch.randn(10), name="bits", compression=compressor)
    )
    assert message == "ranks disagree: rank 0 has bits=4, rank 1 has bits=5"


def test_ranks_with_adaptive_and_fixed_levels_do_not_hang():
    compressor = hvd_qgenx.Compression.qgenx(levels="adaptive" if hvd.rank() == 0 else "uniform")
    message = message_on_all_ranks(
        RuntimeError, lambda: hvd.allreduce(torch.randn(10), name="levels", compression=compressor)
    )
    assert message == "ranks disagree: rank 0 has levels='adaptive', rank 1 has levels='uniform'"


def test_ranks_out_of_step_all_learn_both():
    compressor = hvd_qgenx.Compression.qgenx(levels="uniform")
    hvd.allreduce(torch.randn(10), name="sequence", compression=compressor)
    compressor._exchange.step = 5 + hvd.rank()
    message = message_on_all_ranks(
        RuntimeError, lambda: hvd.allreduce(torch.randn(10), name="sequence", compression=compressor)
    )
    assert message == "ranks are out of step: rank 0 is at exchange 5 (step), rank 1 at exchange 6 (step)"


def test_ranks_that_loaded_different_states_agree_on_the_one_that_is_furthest():
    compressor = hvd_qgenx.Compression.qgenx(levels="uniform")
    hvd.allreduce(torch.randn(10), name="loaded", compression=compressor)
    compressor.load_state_dict({**compressor.state_dict(), "step": 5 + hvd.rank()})
    hvd.allreduce(torch.randn(10), name="loaded", compression=compressor)
    assert compressor.state_dict()["step"] == 5 + hvd.size()


def test_shapes_that_differ_are_told_on_every_rank():
    compressor = hvd_qgenx.Compression.qgenx(levels="uniform")
    tensor = torch.randn(2000 + (hvd.rank() == 1))
    message = message_on_all_ranks(RuntimeError, lambda: hvd.allreduce(tensor, name="shapes", compression=compressor))
    assert message.startswith("ranks disagree on the coordinates of one tensor: rank 0 has 2000, rank 1 has 2001")


def test_a_gradient_that_is_not_finite_is_nan_everywhere_and_named():
    model = network()
    compressor = hvd_qgenx.Compression.qgenx(bits=4, named_parameters=model.named_parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )
    loss(model).backward()
    if hvd.rank() == RANKS - 1:
        model[2].weight.grad[3, 3] = float("inf")
    with pytest.warns(RuntimeWarning, match=r"the gradient of 2\.weight is not finite on some rank") as caught:
        optimizer.synchronize()
    assert len(caught) == 1
    assert model[2].weight.grad.isnan().all() and model[0].weight.grad.isfinite().all()


@pytest.mark.skipif(RANKS < 3, reason="a process set needs a rank outside it")
def test_a_process_set_exchanges_among_its_own_ranks():
    pair = hvd.add_process_set([0, 2])
    model, recorder = network(), _recorder(process_set=pair)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=recorder, process_set=pair
    )
    loss(model).backward()
    if hvd.rank() == 1:
        gathered(None)  # takes part in the comparison only
        local = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        assert all(torch.equal(p.grad, local[n]) for n, p in model.named_parameters())
    else:
        expected = _expected(recorder, model, 0, ranks=(0, 2))
        optimizer.synchronize()
        assert all(torch.equal(p.grad, expected[n].view(p.shape)) for n, p in model.named_parameters())
    hvd.remove_process_set(pair)


def test_adasum_is_refused():
    if not hvd.mpi_enabled() or RANKS & (RANKS - 1):
        pytest.skip("Horovod's Adasum on a CPU needs MPI and a power of two of ranks")
    compressor = hvd_qgenx.Compression.qgenx(bits=4)
    adasum = lambda: hvd.allreduce(torch.ones(3000), name="adasum", op=hvd.Adasum, compression=compressor)  # noqa: E731
    assert "op must be hvd.Average or hvd.Sum" in message_on_all_ranks(ValueError, adasum)


def test_two_compressors_used_in_another_order_are_not_mixed():
    compressors = [hvd_qgenx.Compression.qgenx(levels="uniform", seed=seed) for seed in (1, 1)]
    order = compressors if hvd.rank() != 1 else compressors[::-1]
    kept = [compressor.compress(torch.ones(3000)) for compressor in compressors]
    tokens = [hvd.allreduce(token, name=f"order.{i}") for i, (token, _) in enumerate(kept)]
    index = compressors.index(order[0])
    message = message_on_all_ranks(RuntimeError, lambda: order[0].decompress(tokens[index], kept[index][1]))
    assert message.startswith("ranks use different optimizers or compressors: rank 0 a compressor")
    assert "of those with its names and shapes)" in message


def test_tensors_taken_after_other_exchanges_are_not_mixed():
    """Rank 0 keeps two tensors and takes both, the others take each at once: the second ones are in other exchanges."""
    compressor = hvd_qgenx.Compression.qgenx(levels="uniform")
    first = compressor.compress(torch.ones(3000))
    second = compressor.compress(torch.full((3000,), 100.0)) if hvd.rank() == 0 else None
    compressor.decompress(hvd.allreduce(first[0], name="first"), first[1])
    if hvd.rank() != 0:
        second = compressor.compress(torch.full((3000,), 100.0))
    token = hvd.allreduce(second[0], name="second")
    if hvd.rank() == 0:
        with pytest.raises(RuntimeError, match=r"ranks disagree on the coordinates of one tensor: .*rank 1 has none"):
            compressor.decompress(token, second[1])


@pytest.mark.parametrize("given_up_by", ["all ranks", "rank 0"])
def test_a_step_that_was_given_up_is_not_sent_with_the_next_one(given_up_by):
    compressor = hvd_qgenx.Compression.qgenx(levels="uniform", coder="fixed", norm="linf")
    if given_up_by == "all ranks" or hvd.rank() == 0:
        compressor.compress(torch.ones(5000))  # nobody asks for its mean: Horovod has let go of it
    token, call = compressor.compress(torch.full((4096,), 3.0))
    mean = compressor.decompress(hvd.allreduce(token, name="next"), call)
    assert torch.equal(mean, torch.full((4096,), 3.0))
    assert compressor.communication.coordinates == 4096 and compressor.communication.exchanges == 1


def test_a_step_that_was_under_way_is_not_sent_after_a_state_is_loaded():
    compressor = hvd_qgenx.Compression.qgenx(levels="uniform", coder="fixed", norm="linf")
    kept = compressor.compress(torch.ones(5000))
    compressor.load_state_dict(compressor.state_dict())
    token, call = compressor.compress(torch.full((4096,), 3.0))
    assert torch.equal(compressor.decompress(hvd.allreduce(token, name="loaded"), call), torch.full((4096,), 3.0))
    assert compressor.communication.coordinates == 4096 and kept is not None


def test_no_compression_on_one_rank_is_an_error_on_the_others():
    compression = hvd_qgenx.Compression.none if hvd.rank() == 0 else hvd_qgenx.Compression.qgenx(bits=4)
    gradient = torch.ones(2 + RANKS)  # as long as a token
    try:
        hvd.allreduce(gradient, name="mixture", compression=compression)
        error = "no error"
    except (ValueError, RuntimeError) as raised:
        error = str(raised)
    assert all("with the same compression on all ranks" in other for other in gathered(error)[1:])


def test_a_tensor_that_requires_a_gradient_is_refused():
    with pytest.raises(ValueError, match="gradient must not require a gradient itself"):
        hvd_qgenx.Compression.qgenx.compress(torch.ones(4, requires_grad=True))
