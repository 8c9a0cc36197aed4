"""The ranks of a training job: the one place where the scripts of train/ ask Horovod for something.

Every function that takes a name is a collective: all ranks call it, in the same order.
"""

import horovod
import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

VERSION = horovod.__version__
#: What a collective raises when another rank has left.
RankLeft = HorovodInternalError


def start() -> None:
    hvd.init()


def rank() -> int:
    return hvd.rank()


def size() -> int:
    return hvd.size()


def local_rank() -> int:
    return hvd.local_rank()


def local_size() -> int:
    return hvd.local_size()


def gather_objects(value, name: str) -> list:
    """What every rank gave, in the order of ranks."""
    return hvd.allgather_object(value, name=name)


def from_first(value, name: str):
    """What rank 0 gave."""
    return hvd.broadcast_object(value, 0, name=name)


def gather(rows: torch.Tensor, name: str) -> torch.Tensor:
    """The rows of all ranks, in the order of ranks. They may have different numbers of them."""
    return hvd.allgather(rows, name=name)


def mean(values: torch.Tensor, name: str) -> torch.Tensor:
    return hvd.allreduce(values, name=name, op=hvd.Average)


def total(values: torch.Tensor, name: str) -> torch.Tensor:
    return hvd.allreduce(values, name=name, op=hvd.Sum)


def ask(flag: bool, name: str) -> int:
    """Begins to ask whether the flag is set on any rank; ``answer`` ends it, work between the two costs nothing."""
    return hvd.allreduce_async(torch.tensor([float(flag)]), name=name, op=hvd.Sum)


def answer(question: int) -> bool:
    return bool(hvd.synchronize(question).item())


def share_start(game: torch.nn.Module, optimizers: list) -> None:
    """Everybody takes over the parameters and the optimizers' states of rank 0."""
    hvd.broadcast_parameters(game.state_dict(), root_rank=0)
    for optimizer in optimizers:
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)


def agree(problem: str | None, name: str, error: type[Exception]) -> None:
    """Raises ``error`` on all ranks, with the same sentence, if some rank has a problem."""
    problems = [each for each in gather_objects(problem, name) if each]
    if problems:
        raise error(problems[0])
