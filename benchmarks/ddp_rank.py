"""What benchmarks/ddp_time.py runs on every host: all hooks by turns on the same module and data; rank 0 writes."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from resnet18 import resnet18
from shapes import shapes_of
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.ddp import QGenXState, qgenx_hook

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


class Give(torch.autograd.Function):
    """A product whose gradient is there already, so that an exchange is nearly all that backward costs."""

    @staticmethod
    def forward(ctx, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None


class Given(nn.Module):
    """Parameters of these shapes, which nothing reads; numpy's zeros take no memory until they are written."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.from_numpy(np.zeros(s, np.float32))) for s in shapes.values())

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum(Give.apply(p, g) for p, g in zip(self.all, gradients, strict=True))


def noop(state: object, bucket):
    """Gives every bucket back as it is: what is left is DDP's own work and the network's computation."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@dataclass
class Job:
    model: str
    methods: list[str]
    rounds: int
    warmups: int
    batch: int
    width: int
    out: str


class Contender:
    """One method: a module of its own under DDP, with its hook."""

    def __init__(self, job: Job, method: str):
        self.method, self.state = method, None
        self.samples: list[tuple[float, float, int]] = []  # seconds, CPU seconds, bytes on the link
        torch.manual_seed(0)
        made = resnet18(width=job.width) if job.model == "resnet18" else Given(shapes_of(job.model))
        self.model = DistributedDataParallel(made, gradient_as_bucket_view=True)
        self._register(method)

    def _register(self, method: str) -> None:
        name, _, plan = method.partition("/")
        if name == "noop":
            self.model.register_comm_hook(None, noop)
        elif name == "fp16":
            self.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif name.startswith("powersgd"):
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=int(name.split("_")[1]), start_powerSGD_iter=2
            )
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        elif name.startswith("qgenx"):
            self.state = QGenXState(bits=int(name.split("_")[1]), exchange=plan, adapt_at=(0,), adapt_every=0)
            self.model.register_comm_hook(self.state, qgenx_hook)

    def iterate(self, data: tuple) -> tuple[float, float, int]:
        """Forward and backward of one iteration, from when all ranks are ready."""
        self.model.zero_grad(set_to_none=False)
        dist.barrier()
        sent, begin, cpu = on_link(), time.perf_counter(), time.process_time()
        out = self.model(data[0])
        (out if len(data) == 1 else nn.functional.cross_entropy(out, data[1])).backward()
        return time.perf_counter() - begin, time.process_time() - cpu, on_link() - sent

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters()])


def on_link() -> int:
    return int(SENT.read_text()) if SENT.exists() else 0


def data_of(job: Job, rank: int) -> tuple:
    """This rank's: given gradients, or pictures and labels."""
    generator = torch.Generator().manual_seed(rank)
    if job.model == "resnet18":
        pictures = torch.randn(job.batch, 3, 32, 32, generator=generator)
        return pictures, torch.randint(10, (job.batch,), generator=generator)
    return ([torch.randn(shape, generator=generator) for shape in shapes_of(job.model).values()],)


def codec_seconds(gradient: Tensor, sizes: list[int]) -> float:
    """CPU time of one encode of this rank's gradient and one decode of all ranks' payloads, buffers kept."""
    codec, key = Codec(Levels.uniform(4), min_numel=1024), Key(0, dist.get_rank(), 0)
    out = torch.ones(codec.bound(len(gradient), sizes), dtype=torch.uint8)
    mean, taken = torch.empty_like(gradient), []
    for _ in range(4):
        begin = time.process_time()
        payload = codec.encode(gradient, key, out, sizes=sizes, inline=False)
        codec.decode_mean([payload] * dist.get_world_size(), out=mean)
        taken.append(time.process_time() - begin)
    return statistics.median(taken[1:])


def error_of(contender: Contender, data: tuple, own: Tensor) -> float:
    """||mean - true mean||^2 / ||true mean||^2, for a module whose gradients do not depend on its state."""
    true = own.double()
    dist.all_reduce(true)
    true /= dist.get_world_size()
    contender.iterate(data)
    return float((contender.gradient().double() - true).square().sum() / true.square().sum())


def gathered(value) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def result(contender: Contender, numel: int) -> dict:
    """An iteration lasts until the slowest rank is through; CPU time and bytes are means over ranks."""
    rounds = list(zip(*gathered(contender.samples), strict=True))
    found = {
        "method": contender.method,
        "ms": [1e3 * max(sample[0] for sample in ranks) for ranks in rounds],
        "cpu_ms": [1e3 * statistics.fmean(sample[1] for sample in ranks) for ranks in rounds],
        "link_bytes": statistics.median(statistics.fmean(sample[2] for sample in ranks) for ranks in rounds),
    }
    if contender.state is not None:
        counted = contender.state.communication
        found["bits_per_coordinate"] = 8 * counted.bytes_sent / (numel * counted.exchanges)
    return found


def run(job: Job) -> None:
    data = data_of(job, dist.get_rank())
    contenders = [Contender(job, method) for method in job.methods]
    for contender in contenders:
        for _ in range(job.warmups):
            contender.iterate(data)
    gc.disable()
    for _ in range(job.rounds):
        for contender in contenders:
            contender.samples.append(contender.iterate(data))
    gc.enable()
    sizes = [p.numel() for p in contenders[0].model.parameters()]
    # DDP without communication: gradients of this rank alone.
    contenders[0].iterate(data)
    own = contenders[0].gradient().clone()
    results = [result(contender, sum(sizes)) for contender in contenders]
    for contender, found in zip(contenders, results, strict=True):
        found["error"] = error_of(contender, data, own)
    codec = statistics.fmean(gathered(codec_seconds(own, sizes)))
    if dist.get_rank() == 0:
        Path(job.out).write_text(json.dumps({"numel": sum(sizes), "codec_ms": 1e3 * codec, "results": results}))


if __name__ == "__main__":
    os.environ.setdefault("RANK", os.environ.get("LABORATORY_HOST", "0"))
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    run(Job(**json.loads(sys.argv[1])))
    dist.barrier()
    dist.destroy_process_group()
