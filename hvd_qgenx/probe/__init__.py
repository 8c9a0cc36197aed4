"""Does compression pay here, and which one: measured on this network, these cores and this size.

``hvd_qgenx.probe(...)`` within a program, ``python -m hvd_qgenx.probe`` under horovodrun. The function is the package's
attribute of this name; this room is what ``from hvd_qgenx.probe import ...`` finds.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.automatic import DENSE
from hvd_qgenx.checks import check_integer, check_integers, check_positive
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange import PLANS, CodedExchange, DenseExchange, Exchange
from hvd_qgenx.exchange.coded import rehearse_coded
from hvd_qgenx.exchange.cost import TOLERANCE, Network, Way, Work, choose, estimate, link_bytes, part_bytes
from hvd_qgenx.exchange.dense import rehearse_dense
from hvd_qgenx.exchange.measurement import Meter
from hvd_qgenx.exchange.message import Messenger
from hvd_qgenx.stock import check_horovod
from hvd_qgenx.transports import Transport

__all__ = ["ProbeResult", "Row", "probe"]

NUMEL = 25_000_000  # about ResNet-50
BITS = (8, 4, 3, 2)
_NAMES = {"none": "float32", "fp16": "fp16", "qgenx2": "qgenx ternary"}
_LEAST_NUMEL = 2**17
_WARM_UPS, _LEAST_REPEATS = 2, 3


@dataclass(frozen=True)
class Row:
    """One way to exchange, measured.

    Attributes:
        compression, bits, plan, parts: the way: "none", "fp16" or "qgenx"; in how many messages.
        ms, ms_p10, ms_p90: milliseconds until the slowest rank has the mean: median and spread of the repeats.
        repeats: how many.
        bytes_sent: that a rank hands to collectives in an exchange.
        link_bytes: of these, and of what they become, that leave a rank's link, by the arithmetic of rings.
        variance: E||Q(v) - v||^2 / ||v||^2 of one rank's rounding, measured on normal numbers; 0 for none and fp16.
        bound: what takes most: "wire", "codec" or "latency".
        expected_ms: by the model of ``exchange.cost``; ``wire_ms``, ``codec_ms`` and ``latency_ms`` are its terms,
            before any of them hides behind another.
        measured_numel: coordinates that were exchanged. Where a whole exchange would have taken too long, fewer than
            asked for: milliseconds and bytes are then scaled, by the model and by the coordinates.
    """

    compression: str
    bits: int
    plan: str
    parts: int
    ms: float
    ms_p10: float
    ms_p90: float
    repeats: int
    bytes_sent: int
    link_bytes: int
    variance: float
    bound: str
    expected_ms: float
    wire_ms: float
    codec_ms: float
    latency_ms: float
    measured_numel: int

    @property
    def name(self) -> str:
        """For people: "float32", "qgenx 4 bits"."""
        known = _NAMES.get(f"{self.compression}{self.bits or ''}")
        return known or f"{self.compression} {self.bits} bits"


@dataclass(frozen=True)
class ProbeResult:
    """What ``probe`` found, of the slowest rank and of the one that sends most; equal on all ranks. ``str()`` is a
    table.

    Attributes:
        ranks, threads, numel, tensors: how many ranks, threads of each, coordinates, and tensors that hold them.
        network: latency and seconds per byte of each collective.
        rows: every way, the most exact one first.
        best: the row to use, by time alone: the first of those that take at most 5 % more than the fastest. Of ways
            whose variance is 1 or more, and whose rounding therefore adds more than there is, none is advised.
    """

    ranks: int
    threads: int
    numel: int
    tensors: int
    network: Network
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row:
        advised = [row for row in self.rows if row.variance < 1.0]
        limit = (1 + TOLERANCE) * min(row.ms for row in advised)
        return next(row for row in advised if row.ms <= limit)

    def to_csv(self, path: str | Path) -> None:
        """Writes a line for each row, with what is common to all of them in front."""
        common = {name: getattr(self, name) for name in ("ranks", "threads", "numel", "tensors")}
        columns = [field.name for field in fields(Row)]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [*common, *columns, "best"])
            writer.writeheader()
            for row in self.rows:
                values = {name: _rounded(getattr(row, name)) for name in columns}
                writer.writerow({**common, **values, "best": int(row is self.best)})

    def __str__(self) -> str:
        heads = ["compression", "plan", "ms", "p10 to p90", "bytes a rank", "bytes a link", "variance", "bound by"]
        lines = [heads, *(_cells(row, self.numel) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(_aligned(cells, widths)).rstrip() for cells in lines]
        line = self.network.allgather
        rate = f"{1e-6 * (self.ranks - 1) / line.per_byte:,.0f} MB/s" if line.per_byte else "more than could be seen"
        about = (
            f"{self.numel:,} coordinates in {self.tensors} tensors, {self.ranks} ranks of {self.threads} threads; "
            f"{1e3 * line.latency:.2g} ms a message, {rate} a link"
        )
        scaled = ["~ fewer coordinates were exchanged, and times scaled"] if any("~" in row for row in table) else []
        return "\n".join([about, *table, *scaled, self._advice()])

    def _advice(self) -> str:
        row, plain = self.best, self.rows[0]
        times = f", {plain.ms / row.ms:.2g} times as fast as float32" if row is not plain else ""
        where = "" if row.plan == "allreduce" else f" by {row.plan}" + (f" in {row.parts} parts" * (row.parts > 1))
        return f"Use {_CALLS.get(row.compression, '').format(bits=row.bits)}{where}: {_digits(row.ms)} ms{times}."


_CALLS = {
    "none": "Compression.none",
    "fp16": "Compression.fp16",
    "qgenx": "Compression.qgenx(bits={bits})",
}


def probe(
    numel: int | None = None,
    sizes: Iterable[int] | None = None,
    model: Any = None,
    repeats: int = 20,
    seconds: float = 20.0,
    process_set: Any = None,
    progress: bool = False,
) -> ProbeResult:
    """Measures exchanges of one gradient under every compression and plan; all ranks call it, and get the same.

    It measures the network with small messages and the work without a network, then times real exchanges of random
    gradients, each until all ranks have the mean.

    Args:
        numel: coordinates of one tensor; about ResNet-50's, if nothing is said.
        sizes: instead, coordinates of every tensor.
        model: instead, a ``torch.nn.Module``, or "package:function" that makes one, such as "torchvision:resnet50".
        repeats: of each way, at most.
        seconds: about how long it may take altogether. Where that is too short for whole exchanges, shorter ones are
            timed and scaled; their rows say so.
        process_set: the ranks to exchange with, if they are not all.
        progress: whether rank 0 says on standard error where it is.

    Raises:
        ImportError, RuntimeError: if Horovod is missing, not initialized, or has one rank alone.
        ValueError: naming the argument and what is allowed.
    """
    found = _sizes(numel, sizes, model)
    check_integer("repeats", repeats, _LEAST_REPEATS)
    check_positive("seconds", seconds)
    check_horovod()
    from hvd_qgenx.transports.horovod import HorovodTransport

    transport = HorovodTransport(process_set)
    transport.check_started()
    if transport.size < 2:
        raise RuntimeError("a probe needs at least two ranks: start it under horovodrun -np 2 or more")
    say = partial(print, file=sys.stderr, flush=True) if progress and transport.rank == 0 else _say_nothing
    return _Probe(transport, found, repeats, seconds, say).run()


class _Probe:
    """One measurement; the same decisions on all ranks, by numbers of the slowest."""

    def __init__(
        self, transport: Transport, sizes: tuple[int, ...], repeats: int, seconds: float, say: Callable[[str], None]
    ):
        self.transport, self.sizes, self.repeats, self.say = transport, sizes, repeats, say
        self.numel = sum(sizes)
        self.meter = Meter(Messenger(transport, Communication()), 0)
        self.end = time.monotonic() + seconds
        generator = torch.Generator().manual_seed(transport.rank)
        self.values = torch.randn(self.numel, generator=generator, dtype=torch.float32, device="cpu")
        self.gradient = torch.empty_like(self.values)

    def run(self) -> ProbeResult:
        self.say("probe: the network")
        kinds = {"allreduce", "overlap", *(["alltoall"] if self.transport.size > 2 else [])}
        network = self.meter.network(kinds)
        self.say("probe: the cores")
        works = {way: self.meter.work(partial(_rehearse, way, self.transport.size)) for way in _ways(network.ranks)}
        ways = [
            (way, work, parts)
            for way, work in works.items()
            for parts in sorted({1, choose(network, {way: work}, self.numel).parts})
        ]
        rows = []
        for index, (way, work, parts) in enumerate(ways):
            row = self._row(network, way, work, parts, len(ways) - index)
            self.say(f"probe: {index + 1} of {len(ways)}, {row.name} by {row.plan}: {_digits(row.ms)} ms")
            rows.append(row)
        threads = int(self.meter.slowest([torch.get_num_threads()])[0])
        return ProbeResult(network.ranks, threads, self.numel, len(self.sizes), network, tuple(rows))

    def _row(self, network: Network, way: Way, work: Work, parts: int, ways_left: int) -> Row:
        share = max(self.meter.slowest([self.end - time.monotonic()])[0], 0.0) / ways_left
        whole = estimate(network, way, work, self.numel, parts)
        numel = _affordable(self.numel, share / (_WARM_UPS + _LEAST_REPEATS) / whole.seconds)
        scale = whole.seconds / estimate(network, way, work, numel, parts).seconds
        times, sent, again, variance = self._time(way, numel, parts, share)
        longer = self.numel / numel
        milliseconds = [1e3 * scale * value for value in times]
        tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return Row(
            *way,
            parts=parts,
            ms=statistics.median(milliseconds),
            ms_p10=tenths[0],
            ms_p90=tenths[-1],
            repeats=len(times),
            bytes_sent=round(longer * sent),
            link_bytes=round(longer * link_bytes(way, network.ranks, sent - again, again)),
            variance=variance,
            bound=whole.bound,
            expected_ms=1e3 * whole.seconds,
            wire_ms=1e3 * whole.wire,
            codec_ms=1e3 * whole.codec,
            latency_ms=1e3 * whole.latency,
            measured_numel=numel,
        )

    def _time(self, way: Way, numel: int, parts: int, share: float) -> tuple[list[float], float, float, float]:
        """Seconds of each exchange of the first ``numel`` coordinates; bytes handed over in one, and in its second
        phase; and the relative variance of one rank's rounding."""
        sizes = _cut(self.sizes, numel)
        exchange = _make(way, self.transport, part_bytes(numel, parts))
        exchange.describe(["probe"], [torch.float32], sizes)
        spent = sum(self._exchange(exchange, numel, sizes) for _ in range(_WARM_UPS))
        before = (exchange.communication.bytes_sent, exchange.communication.second_phase_bytes)
        times: list[float] = []
        while len(times) < _LEAST_REPEATS or (len(times) < self.repeats and spent + sum(times) < share):
            times.append(self._exchange(exchange, numel, sizes))
        after = (exchange.communication.bytes_sent, exchange.communication.second_phase_bytes)
        sent, again = ((now - then) / len(times) for now, then in zip(after, before, strict=True))
        sent, again, variance = self.meter.slowest([sent, again, exchange.communication.variance or 0.0])
        return times, sent, again, variance

    def _exchange(self, exchange: Exchange, numel: int, sizes: Sequence[int]) -> float:
        self.gradient[:numel].copy_(self.values[:numel])  # the mean is decoded into it
        gradients = self.gradient[:numel].split(list(sizes))
        return self.meter.seconds(lambda: _exchange(exchange, gradients))


def _exchange(exchange: Exchange, gradients: Sequence[Tensor]) -> None:
    exchange.settle()
    fused = exchange.fuse(gradients)
    exchange.adapt_if_due(fused)
    exchange.collect(exchange.submit(fused, "step"), [""] * len(gradients))


def _ways(ranks: int) -> Iterator[Way]:
    """All of them, the most exact one first; for two ranks two phases are the bytes of one."""
    yield from (Way(name, 0, "allreduce") for name in DENSE)
    plans = PLANS if ranks > 2 else ("allgather",)
    yield from (Way("qgenx", bits, plan) for bits, plan in itertools.product(BITS, plans))


def _rehearse(way: Way, ranks: int) -> Work:
    if way.compression in DENSE:
        return rehearse_dense(DENSE[way.compression], ranks)
    return rehearse_coded(_settings(way), ranks, way.plan)


def _make(way: Way, transport: Transport, part_bytes: int) -> Exchange:
    if way.compression in DENSE:
        return DenseExchange(DENSE[way.compression], transport)
    return CodedExchange(_settings(way), transport, plan=way.plan, part_bytes=part_bytes)


def _settings(way: Way) -> Settings:
    """Levels are fitted once, in the first exchange."""
    return Settings(bits=way.bits, adapt_at=(0,), adapt_every=0)


def _affordable(numel: int, share: float) -> int:
    """The whole vector if its time fits its share, else so many coordinates that it does."""
    return numel if share >= 1.0 else min(numel, max(int(numel * share), _LEAST_NUMEL))


def _cut(sizes: Sequence[int], numel: int) -> list[int]:
    """The first tensors, the last of them cut, so that they have ``numel`` coordinates."""
    ends = [min(end, numel) for end in itertools.accumulate(sizes)]
    cut = [end - start for start, end in itertools.pairwise([0, *ends])]
    return [size for size in cut if size]


def _sizes(numel: int | None, sizes: Iterable[int] | None, model: Any) -> tuple[int, ...]:
    if sum(given is not None for given in (numel, sizes, model)) > 1:
        raise ValueError("numel, sizes and model exclude each other: give one of them")
    if sizes is not None:
        found = check_integers("sizes", sizes, 1)
    elif model is not None:
        found = tuple(p.numel() for p in _made(model).parameters() if p.requires_grad)
    else:
        found = (check_integer("numel", NUMEL if numel is None else numel, 1),)
    if not found:
        raise ValueError("model must have parameters that require a gradient, or sizes an entry")
    return found


def _made(model: Any) -> torch.nn.Module:
    """``model``, or what "package:function" makes, without memory for its parameters."""
    if isinstance(model, str):
        with torch.device("meta"):
            model = _function(model)()
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module or 'package:function' that makes one, got {model!r}")
    return model


def _function(named: str) -> Callable[[], Any]:
    """Of "package:function"; also where the function lies in ``package.models``, as torchvision's do."""
    package, _, name = named.partition(":")
    for module in (package, f"{package}.models"):
        try:
            found = getattr(importlib.import_module(module), name or "-", None)
        except (ImportError, RuntimeError, ValueError) as error:  # torchvision for another torch raises the second
            raise ValueError(f"model must be 'package:function', got {named!r}: {error}") from None
        if callable(found):
            return found
    raise ValueError(f"model must be 'package:function', got {named!r}: there is no such function")


def _cells(row: Row, numel: int) -> list[str]:
    mark = "~" if row.measured_numel < numel else ""
    plan = f"{row.plan} in {row.parts} parts" if row.parts > 1 else row.plan
    spread = f"{_digits(row.ms_p10)} to {_digits(row.ms_p90)}"
    sizes = [f"{row.bytes_sent:,}", f"{row.link_bytes:,}"]
    variance = f"{row.variance:.2g}" if row.variance else "0"
    return [row.name, plan, f"{mark}{_digits(row.ms)}", spread, *sizes, variance, row.bound]


def _digits(ms: float) -> str:
    """Three significant ones, never as a power of ten."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Words to the left, numbers to the right."""
    sides = "<<>>>>><"
    return [f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True)]


def _rounded(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _say_nothing(line: str) -> None:
    """What ranks other than the first say."""
