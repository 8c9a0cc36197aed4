"""A kind that is chosen, with its compression, before the first exchange: dense or coded, whichever is fastest here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange.coded import CodedExchange, rehearse_coded
from hvd_qgenx.exchange.cost import Way, Work
from hvd_qgenx.exchange.dense import DenseExchange, rehearse_dense
from hvd_qgenx.exchange.exchange import Collected, Exchange, Fused, Term
from hvd_qgenx.exchange.measurement import measure_and_choose
from hvd_qgenx.exchange.message import Envelope
from hvd_qgenx.transports import Transport


class AutomaticExchange(Exchange):
    """Chooses in ``settle``, which precedes all other verbs here, and is then the kind that it chose.

    Args:
        dense: Horovod's compressors by name, "none" and "fp16", from the most exact one to the least.
        bits: widths of the coded kind, likewise.
        settings: of the coded kind, but for its width.
        plans: of the coded kind.
        predivide: of the dense kind.
        keep: whether ``submit(keep=True)`` will be said.
        drop_in: whether tokens tell who has what, and all vectors travel in one message.
    """

    def __init__(
        self, dense: Mapping[str, Any], bits: Sequence[int], settings: Settings, transport: Transport,
        op: str = "mean", plans: Sequence[str] = ("allgather",), predivide: float = 1.0, keep: bool = False,
        drop_in: bool = False, communication: Communication | None = None,
    ):  # fmt: skip
        super().__init__(transport, op, communication)
        self.dense, self.bits, self.settings, self.plans = dense, tuple(bits), settings, tuple(plans)
        self.predivide, self.keep, self.drop_in = predivide, keep, drop_in
        #: What was chosen: compression, bits, plan, part_bytes, and among how many ranks.
        self.chosen: dict | None = None
        self.kind: Exchange | None = None
        self._described: tuple = ([], [], [])
        self._inherited: dict | None = None

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def settings_lines(self) -> list[str]:
        return [f"compression=auto, bits={self.bits}, plans={self.plans}", *self.settings.describe()]

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
        super().describe(lines, dtypes, sizes)
        self._described = (lines, dtypes, sizes)
        if self.kind:
            self.kind.describe(*self._described)

    def settle(self) -> None:
        super().settle()
        if self.kind is None:
            self._choose()
        self._chosen_kind.settle()

    def _choose(self) -> None:
        numel = sum(self.sizes)
        in_parts = not (self.keep or self.drop_in)
        choice = measure_and_choose(self.messenger, self.step, self._ways(), numel, in_parts, self.drop_in)
        self._use(**choice.way._asdict(), part_bytes=choice.part_bytes(numel))

    def _ways(self) -> dict[Way, Callable[[], Work]]:
        """Of every way, the most exact one first, how it is rehearsed."""
        ranks, dense_plan = self.transport.size, "allgather" if self.keep else "allreduce"
        ways: dict[Way, Callable[[], Work]] = {
            Way(name, 0, dense_plan): partial(rehearse_dense, compression, ranks, self.keep)
            for name, compression in self.dense.items()
        }
        for bits in self.bits:
            settings = replace(self.settings, bits=bits)
            for plan in self.plans:
                ways[Way("qgenx", bits, plan)] = partial(rehearse_coded, settings, ranks, plan, self.keep)
        return ways

    def _use(self, compression: str, bits: int, plan: str, part_bytes: int) -> None:
        if compression in self.dense:
            self.kind = DenseExchange(
                self.dense[compression], self.transport, self.op, self.predivide, self.communication
            )
        else:
            settings = replace(self.settings, bits=bits)
            self.kind = CodedExchange(settings, self.transport, self.op, plan, part_bytes, self.communication)
        self.kind.describe(*self._described)
        if self._inherited:
            self.kind.load_state_dict(self._inherited)
            self._inherited = None
        self.chosen = {
            "compression": compression, "bits": bits, "plan": plan, "part_bytes": part_bytes,
            "ranks": self.transport.size,
        }  # fmt: skip

    @property
    def counters(self) -> tuple[int, int]:
        return self.kind.counters if self.kind else (self.step, self.iteration)

    @counters.setter
    def counters(self, value: tuple[int, int]) -> None:
        self.step, self.iteration = value
        if self.kind:
            self.kind.counters = value

    def _resume(self) -> None:
        if self.kind:
            self.kind.messenger.drain()
        super()._resume()

    # ---- the verbs, which are the chosen kind's ----------------------------------------------------------------------

    @property
    def _chosen_kind(self) -> Exchange:
        assert self.kind is not None, "settle() precedes all other verbs"
        return self.kind

    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        return self._chosen_kind.fuse(tensors)

    def adapt_if_due(self, fused: Fused, starts_iteration: bool = True) -> None:
        self._chosen_kind.adapt_if_due(fused, starts_iteration)

    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Any:
        return self._chosen_kind.submit(fused, stage, term, keep)

    def collect(self, submitted: Any, names: Sequence[str]) -> Collected:
        return self._chosen_kind.collect(submitted, names)

    def meet(self, stage: str, starts_iteration: bool = True, whole: bool = False) -> None:
        if self.kind is None:
            super().meet(stage, starts_iteration, whole)
        else:
            self.kind.meet(stage, starts_iteration, whole)

    def last_as_received(self) -> list[Tensor | None] | None:
        return self.kind.last_as_received() if self.kind else None

    def envelope(self, stage: str, term: float = 0.0, first: int = 0, part: int = 0, phase: int = 0) -> Envelope:
        if self.kind is None:
            return super().envelope(stage, term, first, part, phase)
        return self.kind.envelope(stage, term, first, part, phase)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _position(self) -> list[int]:
        return [*self.kind._position(), 1] if self.kind else [self.step, self.iteration, 0, 0]

    def state_dict(self) -> dict:
        """The chosen kind's, and what was chosen."""
        state = self.kind.state_dict() if self.kind else self._inherited or super().state_dict()
        return {**state, "compression": self.chosen}

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly, with the same choice; among another number of ranks there will be another one."""
        chosen = state.get("compression")
        self.kind, self.chosen, self._inherited = None, None, state
        self.step, self.iteration = state["step"], state["iteration"]
        if chosen and chosen["ranks"] == self.transport.size:
            self._use(**{name: value for name, value in chosen.items() if name != "ranks"})
