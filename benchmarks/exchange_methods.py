"""What benchmarks/exchange_time.py compares: ways to get the mean gradient of all ranks into ``p.grad``.

A method's name is its entrance and what it sends, "wrapper_4"; its plan says by which collectives. Each makes an
optimizer whose ``step()`` exchanges what is in ``p.grad`` and does nothing else, see ``Still``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import horovod.torch as hvd
import numpy as np
import torch
from shapes import Shapes
from torch import Tensor, nn

import hvd_qgenx
from hvd_qgenx import Codec, Compression, Levels

Named = list[tuple[str, nn.Parameter]]
#: Levels are fitted once, before anything is timed; then each exchange is like the next.
CODED = {
    "8": {"bits": 8, "adapt_at": (0,), "adapt_every": 0},
    "4": {"bits": 4, "adapt_at": (0,), "adapt_every": 0},
    "3": {"bits": 3, "adapt_at": (0,), "adapt_every": 0},
    "ternary": {"bits": 2, "levels": "uniform"},
}
PLANS = ("allgather", "two_phase")
MIN_NUMEL = 1024  # Compression.qgenx's default: shorter parameters travel as float32


class Unavailable(Exception):
    """The package at hand does not have this method; the message says what it lacks."""


class Still(torch.optim.Optimizer):
    """Leaves the parameters alone, so that an exchange is all that a step costs."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        return None


@dataclass(frozen=True)
class Method:
    """One way to exchange.

    Args:
        name: entrance and content.
        plan: "allreduce", "allgather" or "two_phase".
        make: an optimizer for named parameters, and the compressor that holds its levels if it is not the optimizer.
        coded: the settings of ``Compression.qgenx``; None if nothing is coded.
        by_hooks: whether gradients are submitted in backward; without one this method is not itself.
        averages: whether it leaves the mean in ``p.grad``; one that only moves as many bytes does not.
    """

    name: str
    plan: str
    make: Callable[[Named], object]
    coded: dict | None = None
    by_hooks: bool = False
    averages: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}/{self.plan}"


# ---- Horovod's own, and ours -----------------------------------------------------------------------------------------


def stock(compression) -> Callable[[Named], object]:
    def make(named: Named):
        return hvd.DistributedOptimizer(Still([p for _, p in named]), named, compression=compression)

    return make


def wrapper(compression, plan: str) -> Callable[[Named], object]:
    def make(named: Named):
        options = (
            {"compression": compression} if plan == "allreduce" else {"compression": compression, "exchange": plan}
        )
        try:
            return hvd_qgenx.DistributedOptimizer(Still([p for _, p in named]), named, **options)
        except ValueError as error:
            if plan in PLANS and "exchange must be" in str(error):
                raise Unavailable(f"DistributedOptimizer has no exchange={plan!r}") from None
            raise

    return make


def drop_in(settings: dict, plan: str) -> Callable[[Named], object]:
    def make(named: Named):
        chooses = "exchange" in inspect.signature(Compression.qgenx.__call__).parameters
        if plan != "allgather" and not chooses:
            raise Unavailable(f"Compression.qgenx has no exchange={plan!r}")
        compressor = Compression.qgenx(**settings, **({"exchange": plan} if chooses else {}))
        optimizer = stock(compressor)(named)
        optimizer.compressor = compressor
        return optimizer

    return make


# ---- what others do, written anew ------------------------------------------------------------------------------------


class Int8Allgather:
    """GRACE's way: every tensor as int8 with one scale through Horovod's allgather, decoded and averaged by torch.

    q = round(127 g / max|g|): the cheapest of its quantisers, which favours it. All tensors are on their way before
    the first is waited for.
    """

    def __init__(self, named: Named):
        self.named = named

    def step(self) -> None:
        flights = [(p, *self._send(name, p.grad.view(-1))) for name, p in self.named]
        for p, symbols, scales in flights:
            self._receive(p.grad.view(-1), hvd.synchronize(symbols), hvd.synchronize(scales))

    def _send(self, name: str, gradient: Tensor) -> tuple[int, int]:
        scale = gradient.abs().amax() / 127
        symbols = (gradient / scale).round_().to(torch.int8)
        return (
            hvd.allgather_async(symbols, name=f"int8.{name}"),
            hvd.allgather_async(scale.view(1), name=f"int8.scale.{name}"),
        )

    def _receive(self, gradient: Tensor, symbols: Tensor, scales: Tensor) -> None:
        gradient.zero_()
        for part, scale in zip(symbols.chunk(hvd.size()), scales.tolist(), strict=True):
            gradient.add_(part, alpha=scale / hvd.size())


class PowerSGDVolume:
    """As many bytes as PowerSGD of rank 2 sends, by two allreduces one after the other; it computes no factors.

    A tensor of shape (n, ...) is an n x m matrix and sends 2n, then 2m float32; what has one dimension goes with the
    first as it is, but a list that is a single vector counts as a square matrix.
    """

    RANK = 2

    def __init__(self, named: Named):
        shapes = [tuple(p.shape) for _, p in named]
        if len(shapes) == 1 and len(shapes[0]) == 1:
            side = math.isqrt(shapes[0][0] - 1) + 1
            shapes = [(side, side)]
        matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1]
        whole = sum(shape[0] for shape in shapes if len(shape) == 1)
        self.first = torch.ones(self.RANK * sum(rows for rows, _ in matrices) + whole)
        self.second = torch.ones(self.RANK * sum(columns for _, columns in matrices))

    def step(self) -> None:
        hvd.allreduce_(self.first, name="powersgd.first")
        if len(self.second):
            hvd.allreduce_(self.second, name="powersgd.second")


# ---- all of them -----------------------------------------------------------------------------------------------------


def methods() -> dict[str, Method]:
    """By label, in the order of the tables; the first is what all are compared with."""
    found = [
        Method("stock_float32", "allreduce", stock(hvd.Compression.none), by_hooks=True),
        Method("stock_fp16", "allreduce", stock(hvd.Compression.fp16), by_hooks=True),
        Method("int8", "allgather", Int8Allgather),
        Method("powersgd_volume", "allreduce", PowerSGDVolume, averages=False),
    ]
    for kind in ("none", "fp16"):
        dense = getattr(Compression, kind)
        found.append(Method(f"wrapper_{kind}", "allreduce", wrapper(dense, "allreduce")))
        found.append(Method(f"dropin_{kind}", "allreduce", stock(dense), by_hooks=True))
    for kind, settings in CODED.items():
        for plan in PLANS:
            make = wrapper(Compression.qgenx(**settings), plan)
            found.append(Method(f"wrapper_{kind}", plan, make, settings))
            found.append(Method(f"dropin_{kind}", plan, drop_in(settings, plan), settings, by_hooks=True))
    return {method.label: method for method in found}


def codec_of(method: Method, optimizer) -> Codec:
    """The codec that the method uses by now, levels fitted to these gradients included."""
    levels, counts = method.coded.get("levels"), None
    if levels is None:
        state = _holder(getattr(optimizer, "compressor", optimizer).state_dict())
        levels, counts = Levels(tuple(state["levels"])), state["counts"]
    else:
        levels = Levels.uniform(method.coded["bits"])
    return Codec(levels, counts=counts, min_numel=MIN_NUMEL)


def _holder(state: dict) -> dict:
    """The part of a state, its own or the wrapper's in the first group, that has the levels."""
    return state if "levels" in state else state["param_groups"][0]["hvd_qgenx"]


def parameters(shapes: Shapes) -> Named:
    """Zeros that nothing writes to: numpy's, unlike torch's, take no memory until then."""
    return [(name, nn.Parameter(torch.from_numpy(np.zeros(shape, np.float32)))) for name, shape in shapes.items()]
