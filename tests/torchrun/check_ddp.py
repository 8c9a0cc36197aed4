"""The hook in all of DistributedDataParallel's life; run by torchrun on 2 ranks or more."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from modules import (
    UNIFORM,
    backward,
    bits,
    decoded_mean,
    descend,
    error_of,
    error_on_all_ranks,
    gathered,
    hooked,
    inputs,
    local_gradients,
    net,
    same_on_all_ranks,
)
from torch.nn.parallel import DistributedDataParallel

import hvd_qgenx
from hvd_qgenx import backends
from hvd_qgenx.ddp import QGenXState, qgenx_hook

RANK, SIZE = dist.get_rank(), dist.get_world_size()
PLANS = ["allgather", "two_phase"]
#: Several parts of this small module, in which parameters are cut.
SMALL_PARTS = 8192


def gradients(model) -> list:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("part_bytes", [SMALL_PARTS, 2**24])
def test_replicas_are_identical_at_every_step(plan, part_bytes):
    state = QGenXState(bits=4, exchange=plan, part_bytes=part_bytes, adapt_at=(0, 3))
    model = hooked(state)
    for step in range(6):
        backward(model, step)
        descend(model)
        assert same_on_all_ranks([*gradients(model), *model.parameters()])
    assert state.communication.exchanges == 6 and state.communication.codebook_version == 2
    assert 0 < state.communication.variance < 0.1


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_the_gradient_is_what_the_codec_makes_of_all_ranks_gradients(options):
    """Before and after DDP cuts its buckets anew, which must have happened."""
    cuts = []

    def recording(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.index() == 0:
            cuts.append([])
        cuts[-1].append(bucket.buffer().numel())
        return qgenx_hook(state, bucket)

    state = QGenXState(**UNIFORM)
    model = DistributedDataParallel(net(), bucket_cap_mb=0.01, **options)
    model.register_comm_hook(state, recording)
    for step in range(3):
        own = local_gradients(model, step)
        backward(model, step)
        assert bits(gradients(model)) == bits(decoded_mean(state, own, step))
        descend(model)
    assert len(cuts) == 3 and len(cuts[2]) > 1 and cuts[0] != cuts[2]


def test_the_bits_are_those_of_the_optimizer_under_torchrun():
    """Levels adapt; the optimizer sends all at once, the hook in parts as DDP's buckets fill."""
    model, other = hooked(QGenXState(seed=5, adapt_at=(0, 2))), net()
    optimizer = hvd_qgenx.DistributedOptimizer(
        torch.optim.SGD(other.parameters(), lr=0.1),
        compression=hvd_qgenx.Compression.qgenx(seed=5, adapt_at=(0, 2)),
        exchange="allgather",
        process_group=dist.group.WORLD,
    )
    for step in range(5):
        backward(model, step)
        backward(other, step)
        optimizer.step()
        descend(model)
        assert bits(gradients(model)) == bits(gradients(other))
        assert bits(model.parameters()) == bits(other.parameters())


def test_parameters_that_a_rank_does_not_use_count_as_zero():
    state = QGenXState(**UNIFORM)
    model = hooked(state, find_unused_parameters=True)
    for step in range(4):
        own = local_gradients(model, step, with_extra=(RANK + step) % 2 == 0)
        backward(model, step, with_extra=(RANK + step) % 2 == 0)
        assert bits(gradients(model)) == bits(decoded_mean(state, own, step))


def test_gradients_accumulate_without_synchronisation():
    state = QGenXState(**UNIFORM)
    model = hooked(state)
    for step in range(3):
        first, second = local_gradients(model, 2 * step), local_gradients(model, 2 * step + 1)
        model.zero_grad()
        with model.no_sync():
            model(inputs(2 * step)).square().mean().backward()
        model(inputs(2 * step + 1)).square().mean().backward()
        own = [a + b for a, b in zip(first, second, strict=True)]
        assert bits(gradients(model)) == bits(decoded_mean(state, own, step))
        descend(model)
    assert state.communication.exchanges == 3


def test_uneven_inputs_join():
    """A rank without inputs left sends zeros, which count in the mean."""
    state = QGenXState(**UNIFORM)
    model = hooked(state)
    with model.join():
        for step in range(3 + RANK):
            backward(model, step)
            descend(model)
    assert same_on_all_ranks(model.parameters())
    assert state.communication.exchanges == 3 + SIZE - 1


def test_bfloat16_modules_are_coded_from_float32_and_rounded_back():
    state = QGenXState(**UNIFORM)
    model = hooked(state, net().to(torch.bfloat16))
    for step in range(3):
        own = copy.deepcopy(model.module)
        own.zero_grad()
        own(inputs(step, torch.bfloat16)).square().mean().backward()
        model.zero_grad()
        model(inputs(step, torch.bfloat16)).square().mean().backward()
        assert bits(gradients(model)) == bits(decoded_mean(state, [p.grad for p in own.parameters()], step))


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks():
    model = net()
    state = QGenXState(**UNIFORM, named_parameters=model.named_parameters())
    model = hooked(state, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        before = bits(model.parameters())
        model.zero_grad()
        scale = float("inf") if step == 2 and RANK == 1 else 1.0
        loss = scaler.scale(model(inputs(step)).square().mean()) + scale * model.module.last.bias.sum() * 0.5
        if step == 2:
            with pytest.warns(RuntimeWarning, match="the gradient of last.bias is not finite on some rank"):
                loss.backward()
        else:
            loss.backward()
        scaler.step(optimizer)
        scaler.update()
        assert (bits(model.parameters()) == before) == (step == 2)
        assert same_on_all_ranks(model.parameters())
    assert scaler.get_scale() == 2.0


def test_raise_raises_on_all_ranks():
    state = QGenXState(**UNIFORM, nonfinite="raise")
    model = hooked(state)
    backward(model, 0)
    loss = model(inputs(1)).square().mean() * (float("inf") if RANK == 0 else 1.0)
    assert "is not finite on some rank" in error_on_all_ranks(loss.backward)


def test_several_modules_of_one_process_have_a_state_each():
    states = [QGenXState(**UNIFORM, seed=seed) for seed in (1, 2)]
    models = [hooked(state, net(seed)) for seed, state in enumerate(states)]
    for step in range(3):
        own = [local_gradients(model, step) for model in models]
        for model in models:
            model.zero_grad()
        sum(model(inputs(step)).square().mean() for model in models).backward()
        for model, state, mine in zip(models, states, own, strict=True):
            assert bits(gradients(model)) == bits(decoded_mean(state, mine, step))
            descend(model)


@pytest.mark.skipif(SIZE < 3, reason="a group of some ranks needs three")
def test_a_group_of_some_ranks_has_a_module_of_its_own():
    group = dist.new_group([0, 2])
    if RANK == 1:
        return
    state = QGenXState(group, **UNIFORM)
    model = hooked(state, process_group=group)
    for step in range(3):
        own = local_gradients(model, step)
        backward(model, step)
        assert bits(gradients(model)) == bits(decoded_mean(state, own, step, group))
        descend(model)


def run(model, steps) -> None:
    for step in steps:
        backward(model, step)
        descend(model)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "first rank alone"])
def test_a_run_that_resumes_ends_in_the_same_bits(plan, way):
    """In a new module, whose buckets are those of a first backward again, and of another size."""
    options = {"exchange": plan, "adapt_at": (0, 2, 6), "part_bytes": SMALL_PARTS}
    state = QGenXState(**options)
    model = hooked(state)
    run(model, range(4))
    saved, written = copy.deepcopy(model.module), io.BytesIO()
    pickle.dump(state, written) if way == "pickle" else torch.save(state.state_dict(), written)
    run(model, range(4, 8))
    written.seek(0)
    if way == "pickle":
        resumed = pickle.load(written)
    else:
        resumed = QGenXState(**options)
        if way == "state_dict" or RANK == 0:
            resumed.load_state_dict(torch.load(written, weights_only=True))
    again = hooked(resumed, saved, bucket_cap_mb=0.02)
    run(again, range(4, 8))
    assert bits(again.parameters()) == bits(model.parameters())
    assert str(resumed.state_dict()) == str(state.state_dict())


@pytest.mark.skipif(SIZE < 3, reason="another number of ranks needs three")
def test_another_number_of_ranks_continues_with_the_levels_that_were():
    state = QGenXState(adapt_at=(0,), adapt_every=0)
    model = hooked(state)
    run(model, range(3))
    group = dist.new_group([0, 1])
    if RANK == 2:
        return
    resumed = QGenXState(group, adapt_at=(0,), adapt_every=0)
    resumed.load_state_dict(state.state_dict())
    again = hooked(resumed, copy.deepcopy(model.module), process_group=group)
    run(again, range(3, 5))
    assert same_on_all_ranks(again.parameters(), group)
    assert resumed.state_dict()["levels"] == state.state_dict()["levels"] and resumed.state_dict()["step"] == 5


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_ranks_with_other_settings_learn_both():
    model = hooked(QGenXState(bits=3 if RANK == 0 else 4))
    message = error_on_all_ranks(lambda: backward(model, 0))
    assert "ranks disagree: rank 0 has bits=3, rank 1 has bits=4" in message


def test_ranks_with_other_buckets_learn_both():
    model = hooked(QGenXState(), bucket_cap_mb=0.01 if RANK == 0 else 25, find_unused_parameters=True)
    message = error_on_all_ranks(lambda: backward(model, 0))
    assert "rank 0 has exchange=allgather" in message and "DDP's buckets of [" in message


def test_a_rank_that_is_elsewhere_is_named():
    state = QGenXState(**UNIFORM)
    model = hooked(state)
    backward(model, 0)
    if RANK == 1:
        state._exchange.step = 7
    message = error_on_all_ranks(lambda: backward(model, 1))
    assert "ranks are out of step: rank 0 is at exchange 1 (step), rank 1 at exchange 7 (step)" in message


def failing(work: str, number: int, thread: str = ""):
    """In place of a function of the codec's backend: raises what a lost device does, from that call on."""
    backend = backends.backend_of(torch.device("cpu"))
    real, calls = getattr(backend, work), []

    def works_or_raises(*arguments):
        if thread in threading.current_thread().name:
            calls.append(work)
        if len(calls) >= number:
            raise backends.DeviceError("the device is lost")
        return real(*arguments)

    return backend, work, works_or_raises


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("work", "number", "thread"),
    [("encode", 1, ""), ("encode", 5, ""), ("encode", 1, "receiver"), ("statistics", 1, "")],
)
def test_a_device_that_fails_on_one_rank_is_an_error_on_all(plan, work, number, thread, monkeypatch):
    if plan == "allgather" and thread:
        pytest.skip("there is no second rounding")
    adapt_at = (0, 3) if work == "statistics" else (0,)
    state = QGenXState(bits=4, exchange=plan, part_bytes=SMALL_PARTS, adapt_at=adapt_at)
    model = hooked(state)
    for step in range(3):
        backward(model, step)
    if RANK == 0:
        monkeypatch.setattr(*failing(work, number, thread))
    messages = gathered(error_of(lambda: backward(model, 3)))
    assert "the device is lost" in messages[0], messages
    assert all("rank 0" in message and "(refusal)" in message for message in messages[1:]), messages
    # Nobody waits in the next one either.
    messages = gathered(error_of(lambda: backward(model, 4)))
    assert all("this QGenXState has failed before" in message for message in messages), messages


def test_a_state_belongs_to_one_module():
    state = QGenXState()
    backward(hooked(state), 0)
    other = hooked(state, net(1))
    message = error_on_all_ranks(lambda: backward(other, 0))
    assert "a QGenXState belongs to one DistributedDataParallel module: a parameter of shape" in message


def test_a_second_hook_is_refused():
    model = hooked(QGenXState())
    with pytest.raises(RuntimeError, match="register_comm_hook or register_builtin_comm_hook can only be called once"):
        model.register_comm_hook(QGenXState(), qgenx_hook)


def test_other_wrappers_than_ddp_are_told_what_is_supported():
    with pytest.raises(TypeError, match="qgenx_hook is for DistributedDataParallel.*FullyShardedDataParallel.*Tensor"):
        qgenx_hook(QGenXState(), torch.zeros(3))


def test_one_rank_alone_rounds_nothing():
    groups = [dist.new_group([rank]) for rank in range(SIZE)]
    state = QGenXState(groups[RANK])
    model = hooked(state, process_group=groups[RANK])
    own = local_gradients(model, 0)
    backward(model, 0)
    assert bits(gradients(model)) == bits(own) and state.state_dict() == {}
