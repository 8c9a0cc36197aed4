"""How an optimizer's exchange is made: over which ranks, of which kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.automatic import DENSE, AutoCompressor
from hvd_qgenx.checks import check_positive, check_process_set
from hvd_qgenx.communication import Communication
from hvd_qgenx.compressor import QGenXCompressor
from hvd_qgenx.exchange import (
    PLANS,
    AheadExchange,
    Alone,
    AutomaticExchange,
    CodedExchange,
    DenseExchange,
    Exchange,
    HierarchicalExchange,
)
from hvd_qgenx.overlap import PART_BYTES
from hvd_qgenx.stock import check_horovod
from hvd_qgenx.transports import Transport
from hvd_qgenx.uncoded import NoneCompressor

if TYPE_CHECKING:
    from hvd_qgenx.transports.horovod import Hosts

AVERAGE, SUM = 0, 1  # as Horovod numbers hvd.Average and hvd.Sum, which need it installed
_WORLD = "world"


@dataclass(frozen=True)
class Connection:
    """What an optimizer's exchange is made of: plain values, so that a copy can make its own.

    Arguments are those of ``DistributedOptimizer``, all ranks said as ``unless_all`` and ``unless_world`` say it.
    """

    compression: Any
    process_set: Any
    process_group: Any
    op: Any
    predivide: float
    plan: str
    overlap: bool
    hierarchical: bool | tuple
    timeout: float | None

    def make(self, optimizer: torch.optim.Optimizer, communication: Communication | None = None) -> Exchange:
        """The exchange of ``optimizer`` among the ranks that are there now; what was counted goes on."""
        # What needs every rank's own vector has it whole in one message.
        wants_own = hasattr(optimizer, "squared_difference")
        transport = _make_transport(self.process_set, self.process_group, self.timeout)
        hosts = _hosts(self.hierarchical, optimizer, self.compression, transport)
        if hosts is not None and communication is not None:
            raise ValueError(
                "hierarchical=True cannot follow ranks that come and go: its process sets are gone with them"
            )
        return _make_exchange(
            self.compression, transport, self.op, self.predivide, self.plan, wants_own, self.overlap, hosts,
            communication,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"exchange={self.plan}, overlap={self.overlap}, hierarchical={bool(self.hierarchical)}"


def unless_all(process_set):
    """None for all ranks: by no object, so that a copy means all ranks wherever it is made."""
    return None if getattr(process_set, "process_set_id", None) == 0 else process_set


def unless_world(process_group):
    """The word of it for all ranks, which can be copied."""
    if process_group is None:
        return None
    from hvd_qgenx.transports.torch_distributed import is_world

    return _WORLD if is_world(process_group) else process_group


def _make_transport(process_set, process_group, timeout: float | None) -> Transport:
    """Torch's, if its group is given, or Horovod's; whose ranks must be connected."""
    if process_group is not None:
        from hvd_qgenx.transports.torch_distributed import TorchTransport

        return TorchTransport(None if process_group == _WORLD else process_group, timeout)
    check_horovod()
    from hvd_qgenx.transports.horovod import HorovodTransport

    transport = HorovodTransport(process_set, timeout)
    transport.check_started()
    return transport


def _hosts(hierarchical, optimizer: torch.optim.Optimizer, compression, transport) -> Hosts | None:
    """The hosts of a hierarchical exchange; None without, and on ranks that take no part."""
    if hierarchical is False:
        return None
    is_pair = isinstance(hierarchical, tuple) and len(hierarchical) == 2
    if hierarchical is not True and not (is_pair and all(map(check_process_set, hierarchical))):
        raise ValueError(f"hierarchical must be a bool or two process sets, (host, leaders), got {hierarchical!r}")
    if not isinstance(compression, QGenXCompressor):
        raise ValueError("hierarchical needs Compression.qgenx; for none and fp16 see HOROVOD_HIERARCHICAL_ALLREDUCE")
    if hasattr(optimizer, "squared_difference"):
        raise ValueError("hierarchical is not for QGenX, whose step size needs every rank's own vector")
    from hvd_qgenx.transports.horovod import hosts_of

    return hosts_of(transport.process_set, hierarchical if is_pair else None)


def _make_exchange(
    compression, transport, op, predivide: float, plan: str, wants_own: bool, overlap: bool, hosts: Hosts | None,
    communication: Communication | None = None,
) -> Exchange:  # fmt: skip
    if not (hasattr(compression, "compress") and hasattr(compression, "decompress")):
        raise ValueError(f"compression must be one of Compression's or a compressor of Horovod's, got {compression!r}")
    own = getattr(compression, "process_set", None)
    if own is not None and own.ranks != getattr(getattr(transport, "process_set", None), "ranks", None):
        raise ValueError("process_set must be the same for the optimizer and its compression, or be left to the first")
    operation = _operation(op)
    if transport.size == 1:
        return Alone(transport, operation, communication)
    if wants_own:
        plan = "allgather"  # the one by which every rank learns every other's own vector
    if isinstance(compression, AutoCompressor):
        plans = [plan] if plan != "auto" else list(PLANS) if transport.size > 2 else ["allgather"]
        return AutomaticExchange(
            DENSE,
            compression.bits,
            compression.settings,
            transport,
            operation,
            plans,
            predivide,
            wants_own,
            communication=communication,
        )
    if isinstance(compression, QGenXCompressor):
        settings = compression.settings
        # Where parts start early, or hosts come first, parts and plan must be known before anything is exchanged.
        fixed = "allgather" if plan == "auto" else plan
        if hosts is not None:
            return _make_hierarchical(transport, hosts, settings, operation, fixed)
        if overlap and not wants_own:
            return AheadExchange(settings, transport, operation, fixed, PART_BYTES, communication)
        return CodedExchange(settings, transport, operation, plan, communication=communication)
    return DenseExchange(compression, transport, operation, predivide, communication)


def _make_hierarchical(
    transport: Transport, hosts: Hosts, settings: Settings, operation: str, plan: str
) -> HierarchicalExchange:
    """Dense within the host, coded between hosts; nothing of either where there is one rank, or one host."""
    count = hosts.leaders.size
    coded = count > 1
    across = CodedExchange(settings, hosts.leaders, operation, plan) if coded else Alone(hosts.within, operation)
    dense = DenseExchange(NoneCompressor, hosts.within, "sum")
    within = dense if hosts.within.size > 1 else Alone(hosts.within, "sum")
    return HierarchicalExchange(transport, within, across, count, settings.nonfinite)


def _operation(op) -> str:
    if op not in (AVERAGE, SUM):
        raise ValueError("op must be hvd.Average or hvd.Sum: no other is defined for what is exchanged here")
    return "mean" if op == AVERAGE else "sum"


def check_predivide(factor: float, op) -> None:
    """Raises ValueError unless the factor can split the division of a mean."""
    check_positive("gradient_predivide_factor", factor)
    if factor != 1.0 and op != AVERAGE:
        raise ValueError("gradient_predivide_factor must be 1 unless op is hvd.Average")
