"""What the parallel tests share: networks that are equal on all ranks, gradients that are not, comparisons."""

import horovod.torch as hvd
import torch


def network(seed: int = 0) -> torch.nn.Sequential:
    """Equal on all ranks: some parameters above and some below 1024 coordinates, two of equal shape."""
    torch.manual_seed(seed)
    layers = [
        torch.nn.Linear(40, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 40),
        torch.nn.Tanh(),
        torch.nn.Linear(40, 3),
    ]
    model = torch.nn.Sequential(*layers)
    torch.manual_seed(1000 + hvd.rank())
    return model


def loss(model: torch.nn.Module) -> torch.Tensor:
    """Of this rank's own random batch."""
    return model(torch.randn(8, 40)).square().mean()


def gathered(value):
    """The objects of all ranks, in rank order."""
    return hvd.allgather_object(value, name="gathered")


def same_on_all_ranks(tensors) -> bool:
    """Whether tensors are bit-identical on all ranks."""
    vector = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    copies = hvd.allgather(vector[None], name="same")
    return all(torch.equal(copy, copies[0]) for copy in copies)


def error_of(action) -> str:
    """The message of the error that ``action`` raises."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def message_on_all_ranks(kind, action) -> str:
    """The message of the error that ``action`` must raise on every rank, and which must be the same there."""
    try:
        action()
        message = "no error"
    except kind as error:
        message = str(error)
    messages = gathered(message)
    assert "no error" not in messages, messages
    assert len(set(messages)) == 1, messages
    return message
