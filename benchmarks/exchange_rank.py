"""What benchmarks/exchange_time.py runs on every rank: all methods by turns on the same gradients; rank 0 writes.

horovodrun -np 3 python benchmarks/exchange_rank.py '{"model": "wgan:20", ...}'     # see ``Job``
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import horovod.torch as hvd
import torch
from exchange_methods import Method, Unavailable, codec_of, methods, parameters
from horovod.torch import mpi_ops
from shapes import Shapes, count, shapes_of
from torch import Tensor

from hvd_qgenx import Key

LEAST = 2  # rounds, whatever they take
COUNTED = 2  # steps of a method in a round, after one that finds Horovod's cache of names full of the others' sizes
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
COLLECTIVES = ("allreduce", "allgather", "alltoall", "reducescatter", "broadcast")
#: How far the mean may be off along the true one. Rounding without bias moves it by a standard error of at most
#: sqrt(32 / numel), the square root of ternary levels' variance over numel: .06 for the shortest list, 10,000.
OFF = 0.25


@dataclass(frozen=True)
class Job:
    """One run, all of whose figures compare with each other.

    Args:
        model: see ``shapes``.
        mode: "step" sets every ``p.grad`` and times ``step()``; "backward" times a backward pass of sum(p * g), one
            product for each parameter, and ``step()``.
        labels: of the methods.
        rounds: of all methods by turns, ``COUNTED`` steps of each; fewer if two are through after ``seconds``.
        warmups: steps before all rounds; the first fits levels.
        on_link: whether eth0 is this host's own, whose bytes are counted; on loopback nobody counts.
        out: the file that rank 0 writes.
    """

    model: str
    mode: str
    labels: list[str]
    rounds: int
    warmups: int
    seconds: float
    on_link: bool
    out: str


@dataclass
class Contender:
    """A method with parameters of its own (hooks would fire for all that share them), and its samples."""

    method: Method
    shapes: Shapes
    steps: list[tuple[float, float, float]] = field(default_factory=list)
    codec: list[float] = field(default_factory=list)
    handed: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.parameters = parameters(self.shapes)
        self.optimizer = self.method.make(self.parameters)

    def prepared(self, gradients: list[Tensor], room: list[Tensor] | None) -> Callable[[], object]:
        """What is to be timed; what is not has been done: gradients are set, or the loss is there."""
        if room is not None:
            for (_, p), gradient, place in zip(self.parameters, gradients, room, strict=True):
                p.grad = place.copy_(gradient)
            return self.optimizer.step
        products = [(p * g).sum() for (_, p), g in zip(self.parameters, gradients, strict=True)]
        loss = torch.stack(products).sum()

        def backward_and_step():
            loss.backward()
            self.optimizer.step()

        return backward_and_step

    def forget(self) -> None:
        for _, p in self.parameters:
            p.grad = None


def gradients_of(shapes: Shapes, rank: int) -> list[Tensor]:
    """Normal numbers, others on every rank."""
    random = torch.Generator().manual_seed(1 + rank)
    return [torch.randn(shape, generator=random) for shape in shapes.values()]


def contenders(job: Job, shapes: Shapes) -> list[Contender]:
    found, known = [], methods()
    for label in job.labels:
        if job.mode == "step" and known[label].by_hooks and not label.startswith("stock"):
            continue
        try:
            found.append(Contender(known[label], shapes))
        except Unavailable as error:
            say(f"{label} is left out: {error}")
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def check(contender: Contender, mean: list[Tensor]) -> None:
    """What is in ``p.grad`` must be the mean, up to rounding: <found, mean> = <mean, mean>."""
    pairs = zip(contender.parameters, mean, strict=True)
    found = sum(float((p.grad * m).sum(dtype=torch.float64)) for (_, p), m in pairs)
    ratio = found / sum(float((m * m).sum(dtype=torch.float64)) for m in mean)
    if not abs(ratio - 1) <= OFF:
        raise SystemExit(f"{contender.method.label} does not give the mean gradient: nothing is timed")


@contextmanager
def metered() -> Iterator[Counter]:
    """Counts the bytes that are handed to Horovod's extension, by kind of collective."""
    found, library = Counter(), mpi_ops.mpi_lib
    originals = {name: getattr(library, name) for name in dir(library) if "_async_torch_" in name}

    def counting(name: str, function: Callable) -> Callable:
        kind = next(kind for kind in COLLECTIVES if kind in name)

        def call(tensor, *arguments):
            tensors = tensor if isinstance(tensor, (list, tuple)) else [tensor]
            found[kind] += sum(t.numel() * t.element_size() for t in tensors)
            return function(tensor, *arguments)

        return call

    try:
        for name, function in originals.items():
            setattr(library, name, counting(name, function))
        yield found
    finally:
        for name, function in originals.items():
            setattr(library, name, function)


def sample(contender: Contender, gradients: list[Tensor], room: list[Tensor] | None) -> tuple[float, float, float]:
    """One step, begun by all ranks at once: milliseconds, CPU milliseconds of all threads, bytes out of eth0.

    The bytes have headers and acknowledgements with them, and those of the barrier behind the step.
    """
    action = contender.prepared(gradients, room)
    hvd.barrier()
    sent, cpu, start = bytes_out(), time.process_time(), time.perf_counter()
    action()
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    hvd.barrier()  # what was handed to the network has left it when all ranks are here
    contender.forget()
    return 1e3 * wall, 1e3 * used, bytes_out() - sent


def bytes_out() -> int:
    return int(SENT.read_text()) if SENT.exists() else 0


class CodecAlone:
    """One encode, and one decode of as many payloads as there are ranks, into memory that is kept: CPU time of both."""

    def __init__(self, gradients: list[Tensor], sizes: list[int]):
        self.vector, self.sizes = torch.cat([g.view(-1) for g in gradients]), sizes
        self.mean = torch.ones_like(self.vector)
        self.out = torch.ones(0, dtype=torch.uint8)

    def sample(self, contender: Contender) -> None:
        codec = codec_of(contender.method, contender.optimizer)
        key, options = Key(0, hvd.rank(), 0), {"sizes": self.sizes, "inline": False}
        if len(self.out) < (most := codec.bound(len(self.vector), self.sizes)):
            self.out = torch.ones(most, dtype=torch.uint8)
        codec.encode(self.vector, key, self.out, **options)  # makes the tables of a new codec
        hvd.barrier()
        start = time.process_time()
        payload = codec.encode(self.vector, key, self.out, **options)
        codec.decode_mean([payload] * hvd.size(), out=self.mean)
        contender.codec.append(1e3 * (time.process_time() - start))


def warm_up(job: Job, contender: Contender, gradients: list[Tensor], room, mean: list[Tensor]) -> None:
    """The first step is checked, the last one counts the bytes."""
    for index in range(job.warmups):
        action = contender.prepared(gradients, room)
        with metered() as handed:
            action()
        if index == 0 and contender.method.averages:
            check(contender, mean)
        contender.handed = handed
        contender.forget()


def run(job: Job) -> None:
    shapes = shapes_of(job.model)
    gradients = gradients_of(shapes, hvd.rank())
    room = [torch.empty_like(g) for g in gradients] if job.mode == "step" else None
    field_ = contenders(job, shapes)
    mean = [hvd.allreduce(g, name=name) for name, g in zip(shapes, gradients, strict=True)]
    for contender in field_:
        warm_up(job, contender, gradients, room, mean)
    say(f"{job.model}, {job.mode}: {len(field_)} methods are warm")
    del mean
    repeat(job, field_, gradients, room)
    results = [result(job, contender) for contender in field_]
    if hvd.rank() == 0:
        about = {"numel": count(shapes), "num_parameters": len(shapes)}
        Path(job.out).write_text(json.dumps({**about, "results": results}))


def repeat(job: Job, field_: list[Contender], gradients: list[Tensor], room) -> None:
    alone = CodecAlone(gradients, [g.numel() for g in gradients])
    begin, done = time.monotonic(), 0
    gc.disable()
    while done < job.rounds and (done < LEAST or not all_agree(time.monotonic() - begin > job.seconds)):
        for contender in field_:
            contender.steps += [sample(contender, gradients, room) for _ in range(1 + COUNTED)][1:]
            if contender.method.coded is not None:
                alone.sample(contender)
        done += 1
        gc.collect()
    say(f"{job.model}, {job.mode}: {done} rounds in {time.monotonic() - begin:.0f} s")


def all_agree(mine: bool) -> bool:
    """Rank 0's opinion, on all ranks: a loop must end on all of them at once."""
    return bool(hvd.broadcast_object(mine, 0))


def result(job: Job, contender: Contender) -> dict:
    """A step lasts until the slowest rank is through; CPU time and bytes are means over ranks."""
    everyone = hvd.allgather_object((contender.steps, contender.codec, dict(contender.handed)))
    steps = [list(zip(*ranks, strict=True)) for ranks in zip(*(steps for steps, _, _ in everyone), strict=True)]
    codecs = zip(*(codec for _, codec, _ in everyone), strict=True)
    handed = sum((Counter(handed) for _, _, handed in everyone), Counter())
    return {
        "label": contender.method.label,
        "milliseconds": [max(walls) for walls, _, _ in steps],
        "cpu": [statistics.fmean(cpus) for _, cpus, _ in steps],
        "on_link": [statistics.fmean(links) for _, _, links in steps] if job.on_link else [],
        "codec": [statistics.fmean(ranks) for ranks in codecs],
        "handed": {kind: size / hvd.size() for kind, size in handed.items()},
    }


def say(text: str) -> None:
    if hvd.rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    hvd.init()
    torch.set_num_threads(1)
    run(Job(**json.loads(sys.argv[1])))
