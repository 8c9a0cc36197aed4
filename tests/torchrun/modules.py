"""What the tests of the hook share: modules that are equal on all ranks, data that are not, comparisons."""

import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvd_qgenx import Key
from hvd_qgenx.ddp import QGenXState, qgenx_hook

#: Nothing to agree on but the settings: what is sent can be made again from a rank's gradients alone.
UNIFORM = {"levels": "uniform"}


class Net(torch.nn.Module):
    """Parameters above and below 1024 coordinates; ``extra`` takes part only if it is told to."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(40, 60)
        self.extra = torch.nn.Linear(60, 60)
        self.last = torch.nn.Linear(60, 30)

    def forward(self, x, with_extra=True):
        x = self.first(x).tanh()
        return self.last(self.extra(x).tanh() if with_extra else x)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    torch.manual_seed(1000 + dist.get_rank())
    return made


def hooked(state, module=None, **options) -> DistributedDataParallel:
    """Several buckets of DDP's, which are cut anew after the first iteration."""
    model = DistributedDataParallel(module or net(), **{"bucket_cap_mb": 0.01, **options})
    model.register_comm_hook(state, qgenx_hook)
    return model


def inputs(step: int, dtype=torch.float32) -> torch.Tensor:
    """Of this rank, in this step."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(8, 40, generator=generator).to(dtype)


def backward(model, step: int, **options) -> None:
    model.zero_grad()
    model(inputs(step), **options).square().mean().backward()


def descend(model, rate: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=rate)


def gathered(value, group=None) -> list:
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def bits(tensors) -> bytes:
    return b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


def same_on_all_ranks(tensors, group=None) -> bool:
    return len(set(gathered(bits(tensors), group))) == 1


def local_gradients(model, step: int, **options) -> list:
    """Those of this rank alone, of the same parameters and inputs."""
    own = copy.deepcopy(getattr(model, "module", model))
    backward(own, step, **options)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in own.parameters()]


def decoded_mean(state: QGenXState, gradients, step: int, group=None) -> list:
    """What all ranks must hold after exchange ``step``, made again from all ranks' gradients by the codec alone."""
    codec, sizes = state.settings.codec(), [g.numel() for g in gradients]
    vector = torch.cat([g.float().reshape(-1) for g in gradients])
    payload = codec.encode(vector, Key(state.settings.seed, dist.get_rank(), step), sizes=sizes, inline=False)
    mean = codec.decode_mean(gathered(payload, group), numel=len(vector))
    return [part.view_as(g).to(g.dtype) for part, g in zip(mean.split(sizes), gradients, strict=True)]


def error_of(action) -> str:
    """The message of the error that ``action`` raises."""
    try:
        action()
    except Exception as error:
        return str(error)
    return "no error"


def error_on_all_ranks(action) -> str:
    """The message of the error that ``action`` must raise on every rank."""
    messages = gathered(error_of(action))
    assert "no error" not in messages, messages
    return messages[0]
