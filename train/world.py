"""The ranks of a training job, whoever launched them: what train/wgan.py and its programs ask of each other's ranks.

Every function that takes a name is a collective: all ranks call it, in the same order. launch.py knows the launchers.
"""

from __future__ import annotations

from importlib.metadata import version

import launch
import torch
import torch.distributed as dist
from launch import gather as gather_objects
from launch import local_rank, local_size, mean, other_rank_left, rank, size, start
from launch import share as from_first

__all__ = [
    "agree", "answer", "ask", "from_first", "gather", "gather_objects", "local_rank", "local_size", "mean",
    "other_rank_left", "rank", "share_start", "size", "start", "total", "versions",
]  # fmt: skip


def versions() -> dict[str, str]:
    return {} if launch.by_torchrun() else {"horovod": version("horovod")}


def gather(rows: torch.Tensor, name: str) -> torch.Tensor:
    """The rows of all ranks, in the order of ranks. They may have different numbers of them."""
    if launch.by_torchrun():
        return torch.cat(gather_objects(rows, name))
    return launch.horovod().allgather(rows, name=name)


def total(values: torch.Tensor, name: str) -> torch.Tensor:
    if not launch.by_torchrun():
        return launch.horovod().allreduce(values, name=name, op=launch.horovod().Sum)
    values = values.clone()
    dist.all_reduce(values)
    return values


def ask(flag: bool, name: str):
    """Begins to ask whether the flag is set on any rank; ``answer`` ends it, work between the two costs nothing."""
    asked = torch.tensor([float(flag)])
    if launch.by_torchrun():
        return asked, dist.all_reduce(asked, async_op=True)
    return launch.horovod().allreduce_async(asked, name=name, op=launch.horovod().Sum)


def answer(question) -> bool:
    if not launch.by_torchrun():
        return bool(launch.horovod().synchronize(question).item())
    asked, work = question
    work.wait()
    return bool(asked.item())


def share_start(game: torch.nn.Module, optimizers: list) -> None:
    """Everybody takes over the parameters and the optimizers' states of rank 0."""
    for optimizer in optimizers:
        launch.copy_from_first(game.state_dict(), optimizer)


def agree(problem: str | None, name: str, error: type[Exception]) -> None:
    """Raises ``error`` on all ranks, with the same sentence, if some rank has a problem."""
    problems = [each for each in gather_objects(problem, name) if each]
    if problems:
        raise error(problems[0])
