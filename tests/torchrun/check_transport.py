"""The transport does what its protocol says, and whole runs over it end in the bits in which Horovod's end."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import runs
from modules import error_on_all_ranks, gathered

import hvd_qgenx
from hvd_qgenx import Compression
from hvd_qgenx.transports.torch_distributed import TorchTransport, own_group

RANK, SIZE = dist.get_rank(), dist.get_world_size()
runs.rank_here = dist.get_rank


def message(rank: int, length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int64).mul(rank + 3).to(torch.uint8)


def begun(operation):
    operation.begin()
    return operation


@pytest.mark.parametrize("length", [lambda rank: 5, lambda rank: 1 + 700 * rank, lambda rank: 3 * (rank % 2)])
def test_an_allgather_takes_messages_of_any_length(length):
    received = begun(TorchTransport().allgather(message(RANK, length(RANK)), "a")).wait()
    assert torch.equal(received, torch.cat([message(rank, length(rank)) for rank in range(SIZE)]))


def test_an_alltoall_takes_messages_of_any_length():
    parts = [message(10 * RANK + other, 4 * RANK + other) for other in range(SIZE)]
    splits = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    received = begun(TorchTransport().alltoall(torch.cat(parts), splits, "a")).wait()
    assert torch.equal(received, torch.cat([message(10 * rank + RANK, 4 * rank + RANK) for rank in range(SIZE)]))


def test_an_allreduce_sums_or_averages_in_place():
    transport = TorchTransport()
    for mean, predivide in ((False, 1.0), (True, 1.0), (True, 2.0)):
        vector = torch.full((1000,), 6.0 * (RANK + 1))
        result = begun(transport.allreduce(vector, "a", mean, predivide)).wait()
        total = 6.0 * SIZE * (SIZE + 1) / 2
        # 1/3 is rounded once, and so is the product.
        assert torch.allclose(result, torch.tensor(total / SIZE if mean else total), rtol=2**-23, atol=0)
        assert result is vector


def test_many_operations_are_under_way_at_once_and_awaited_in_any_order():
    transport = TorchTransport()
    flights = [begun(transport.allgather(message(RANK + i, 1000 * (1 + RANK) * i), f"{i}")) for i in range(8)]
    for i in reversed(range(8)):
        expected = [message(rank + i, 1000 * (1 + rank) * i) for rank in range(SIZE)]
        assert torch.equal(flights[i].wait(), torch.cat(expected))
        assert flights[i].done()


def test_an_own_group_has_the_same_ranks_and_an_order_of_its_own():
    group = own_group(None)
    first, second = TorchTransport(), TorchTransport(group)
    order = [first, second] if RANK else [second, first]  # which one group alone could not take
    flights = {id(transport): begun(transport.allgather(message(RANK, 10), "a")) for transport in order}
    assert all(len(flight.wait()) == 10 * SIZE for flight in flights.values())


def test_a_rank_outside_of_the_group_is_alone():
    group = dist.new_group([0])
    transport = TorchTransport(group)
    assert (transport.included, transport.size) == (RANK == 0, 1)
    assert transport.global_rank == RANK


# ---- whole runs ------------------------------------------------------------------------------------------------------

#: Of none and fp16 the sum's order is the collective's own affair: Horovod's ring, and Gloo's, add in other orders.
CODED = [case for case in runs.CASES if case[0] == "wrapper" and case[2] not in ("none", "fp16")]


@pytest.mark.skipif(SIZE != runs.RANKS, reason="the hashes are those of 3 ranks")
@pytest.mark.parametrize("case", CODED, ids=runs.name_of)
def test_a_run_ends_in_the_bits_of_horovods(case):
    entrance, method, kind, options = case
    found = runs.run((entrance, method, kind, {**options, "process_group": dist.group.WORLD}))
    assert found == json.loads(runs.FILE.read_text())[runs.name_of(case)]


@pytest.mark.parametrize("method", ["sgd", "extra_adam", "dual_extrapolation", "optimistic"])
@pytest.mark.parametrize("kind", ["none", "fp16"])
def test_what_is_not_coded_is_the_same_on_all_ranks(method, kind):
    found = runs.run(("wrapper", method, kind, {"process_group": dist.group.WORLD}))
    assert len(set(gathered(found))) == 1


@pytest.mark.parametrize("exchange", ["auto", "two_phase"])
@pytest.mark.parametrize("compression", [Compression.qgenx(bits=4), Compression.auto(bits=[4])], ids=["qgenx", "auto"])
def test_plans_and_choices_leave_replicas_identical(exchange, compression):
    parameters = runs._parameters()
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraAdam(parameters), compression=compression, exchange=exchange, process_group=dist.group.WORLD
    )
    for call in range(4):
        for p, gradient in zip(parameters, runs._gradients(parameters, call, True), strict=True):
            p.grad = gradient
        (optimizer.step if call % 2 else optimizer.extrapolation)()
    assert len(set(gathered(b"".join(p.detach().numpy().tobytes() for p in parameters)))) == 1


def optimizer(**options):
    parameter = torch.zeros(2, requires_grad=True)
    return hvd_qgenx.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True}, "process_group goes without process_set, overlap and hierarchical, which need Horovod"),
        ({"hierarchical": True}, "process_group goes without process_set, overlap and hierarchical"),
        ({"op": 2}, "op must be hvd.Average or hvd.Sum"),
    ],
)
def test_what_needs_horovod_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer(process_group=dist.group.WORLD, **options)


def test_a_group_must_be_a_group():
    with pytest.raises(ValueError, match="process_group must be a torch.distributed.ProcessGroup, got 'all'"):
        optimizer(process_group="all")


def test_ranks_that_disagree_learn_both_sides():
    one = optimizer(compression=Compression.qgenx(bits=4 if RANK else 3), process_group=dist.group.WORLD)
    one.param_groups[0]["params"][0].grad = torch.ones(2)
    assert error_on_all_ranks(one.step) == "ranks disagree: rank 0 has bits=3, rank 1 has bits=4"
