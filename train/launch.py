"""Who started the ranks, horovodrun or torchrun, and what ranks say to each other either way."""

import os
from functools import cache
from typing import Any

import torch
import torch.distributed as dist


@cache
def by_torchrun() -> bool:
    """torchrun leaves its mark in the environment; anything else is Horovod's, one process alone as well."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def horovod():
    """Imported only where it is used, since torchrun needs no Horovod."""
    import horovod.torch as hvd

    return hvd


def start() -> None:
    """Connects the ranks; the first says in one line who launched them."""
    if by_torchrun():
        if not dist.is_initialized():
            dist.init_process_group("gloo")
    else:
        horovod().init()


def end() -> None:
    """Parts the ranks, once all are here: torch's threads must not outlive the interpreter."""
    if by_torchrun():
        dist.barrier()
        dist.destroy_process_group()


def describe() -> str:
    if by_torchrun():
        return f"{size()} ranks, launched by torchrun: gradients travel over torch.distributed ({dist.get_backend()})."
    return f"{size()} ranks, launched by horovodrun: gradients travel over Horovod."


def rank() -> int:
    return dist.get_rank() if by_torchrun() else horovod().rank()


def size() -> int:
    return dist.get_world_size() if by_torchrun() else horovod().size()


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if by_torchrun() else horovod().local_rank()


def local_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if by_torchrun() else horovod().local_size()


def optimizer_options() -> dict[str, Any]:
    """What tells hvd_qgenx.DistributedOptimizer over what it is to send."""
    return {"process_group": dist.group.WORLD} if by_torchrun() else {}


def gather(value: Any, name: str) -> list:
    """The objects of all ranks, in rank order."""
    if not by_torchrun():
        return horovod().allgather_object(value, name=name)
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def share(value: Any, name: str) -> Any:
    """Rank 0's object, on all ranks."""
    if not by_torchrun():
        return horovod().broadcast_object(value, 0, name=name)
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def mean(vector: torch.Tensor, name: str) -> torch.Tensor:
    if not by_torchrun():
        return horovod().allreduce(vector, name=name)
    dist.all_reduce(vector)
    return vector / size()


def copy_from_first(tensors: dict[str, torch.Tensor], optimizer=None) -> None:
    """Rank 0's parameters, and its optimizer's state, become those of all ranks.

    Under torchrun the state is not sent: a new one is the same on all ranks, and a loaded one is in a file for all.
    """
    if not by_torchrun():
        horovod().broadcast_parameters(tensors, root_rank=0)
        horovod().broadcast_optimizer_state(optimizer, root_rank=0)
        return
    for tensor in tensors.values():
        dist.broadcast(tensor.data, 0)


def other_rank_left() -> type[Exception]:
    """What is raised here when another rank has ended."""
    if by_torchrun():
        return RuntimeError  # Gloo has no class of its own for it
    from horovod.common.exceptions import HorovodInternalError

    return HorovodInternalError
