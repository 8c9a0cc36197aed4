"""Two exchanges, one inside the other: dense between the ranks of a host, coded between hosts.

1. The ranks of a host add up their vectors, in float32.
2. The host's first rank, its leader, averages the sum with the other leaders'.
3. It shares the means with its host.

mean = (1/K) sum_r v_r = (1/H) sum_h (H/K) s_h, where s_h is the sum over host h: hosts may have different numbers of
ranks. All leaders hold the same means to the bit and their hosts take over these, so that replicas stay bit-identical.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.exchange.exchange import Collected, Exchange, Fused, Term
from hvd_qgenx.exchange.message import DisagreementError
from hvd_qgenx.transports import Transport

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Gathering:
    """Vectors on their way to their host's sum."""

    fused: Fused
    within: Any
    stage: str
    starts_iteration: bool


class HierarchicalExchange(Exchange):
    """The mean over hosts of sums over a host's ranks.

    Settings, parameters and state are compared between all ranks. The state is that of ``across``, which ranks that
    are no leaders keep without using it.

    Args:
        transport: all ranks.
        within: the exchange of this rank's host, with op "sum"; its first rank leads.
        across: that of the leaders.
        hosts: how many there are.
        nonfinite: what a mean that is not finite does.
    """

    def __init__(self, transport: Transport, within: Exchange, across: Exchange, hosts: int, nonfinite: str):
        super().__init__(transport, across.op, across.communication)
        self.within, self.across, self.hosts = within, across, hosts
        self.leads = within.transport.size == 1 or within.transport.rank == 0
        self.nonfinite = nonfinite
        within.reports = across.reports = False  # means are looked at here, where all ranks have them
        self._starts_iteration = True
        self._told: dict = {}

    def settings_lines(self) -> list[str]:
        return [*self.across.settings_lines(), f"hosts={self.hosts}, nonfinite={self.nonfinite}"]

    def describe(self, lines: Sequence[str], dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
        super().describe(lines, dtypes, sizes)
        self.within.describe([], [torch.float32], sizes)
        self.across.describe([], dtypes, sizes)

    def identify(self, number: int) -> None:
        super().identify(number)
        self.within.identify(number)

    def fuse(self, tensors: Sequence[Tensor | None]) -> Fused:
        return self.within.fuse(tensors)

    def settle(self) -> None:
        super().settle()
        self.within._agreed = self.across._agreed = True

    def _fit_if_due(self, fused: Fused, starts_iteration: bool) -> None:
        """Leaders fit levels to the vectors that they code, once they have them."""
        self._starts_iteration = starts_iteration

    def submit(self, fused: Fused, stage: str, term: Term | None = None, keep: bool = False) -> Gathering:
        if stage == "joined":
            raise ValueError("join() is not for hierarchical=True: hosts weigh their sums by all of their ranks")
        if term or keep:
            raise ValueError("a hierarchical exchange has no rank's own vector: use it without term and keep")
        self.step += 1
        return Gathering(fused, self.within.submit(fused, stage), stage, self._starts_iteration)

    def collect(self, submitted: Gathering, names: Sequence[str]) -> Collected:
        sums = self._sums(submitted, names)
        means = self._lead(sums, submitted, names) if self.leads else self._follow(submitted)
        self.across.step, self.across.iteration = self.step, self.iteration
        self.communication.host_bytes = self.within.communication.bytes_sent
        self.report_broken([mean is not None and bool(mean.view(-1)[0].isnan()) for mean in means], names)
        return Collected(means, [])

    def _sums(self, submitted: Gathering, names: Sequence[str]) -> list[Tensor | None]:
        try:
            with _saying("between the ranks of a host"):
                return self.within.collect(submitted.within, names).means
        except DisagreementError:
            self._refuse_across(submitted.starts_iteration)  # the other hosts wait for this one
            raise

    # ---- a host's first rank, and the others -------------------------------------------------------------------------

    def _lead(self, sums: Sequence[Tensor | None], submitted: Gathering, names: Sequence[str]) -> list[Tensor | None]:
        if self.hosts == 1:
            self._count(submitted.fused)  # which the exchange between hosts does where there are several
        try:
            with _saying("between the first ranks of hosts"):
                means = self._average(sums, submitted, names)
        except Exception as error:
            self._tell({"failure": str(error)}, [])
            raise
        state = self.across.state_dict()
        news = {key: value for key, value in state.items() if key not in ("step", "iteration")}
        present = [int(mean is not None) for mean in means]
        self._tell({"present": present, "state": state if news != self._told else None}, means)
        self._told = news
        return means

    def _average(
        self, sums: Sequence[Tensor | None], submitted: Gathering, names: Sequence[str]
    ) -> list[Tensor | None]:
        weight = 1.0 if self.op == "sum" else self.hosts / self.transport.size
        fused = self.across.fuse([None if total is None else total.float() * weight for total in sums])
        self.across.adapt_if_due(fused, submitted.starts_iteration)
        return self.across.collect(self.across.submit(fused, submitted.stage), names).means

    def _tell(self, head: dict, means: Sequence[Tensor | None]) -> None:
        if self.within.transport.size == 1:
            return
        written = json.dumps(head).encode()
        written += b" " * (-len(written) % 4)  # so that the vector behind it is where float32 may be
        start = torch.frombuffer(bytearray(_LENGTH.pack(len(written)) + written), dtype=torch.uint8)
        vectors = [mean.reshape(-1).view(torch.uint8) for mean in means if mean is not None]
        self.within.messenger.gather(self.within.envelope("vectors"), torch.cat([start, *vectors]))

    def _follow(self, submitted: Gathering) -> list[Tensor | None]:
        self._count(submitted.fused)
        nothing = torch.zeros(0, dtype=torch.uint8, device="cpu")
        _, bodies = self.within.messenger.gather(self.within.envelope("vectors"), nothing)
        (length,), body = _LENGTH.unpack(bodies[0][: _LENGTH.size].numpy().tobytes()), bodies[0][_LENGTH.size :]
        head = json.loads(body[:length].numpy().tobytes())
        if "failure" in head:
            raise DisagreementError(head["failure"])
        if head["state"]:
            self.across.load_state_dict(head["state"])
        sizes = [size if there else 0 for size, there in zip(self.sizes, head["present"], strict=True)]
        means = body[length:].view(torch.float32).split(sizes)
        return [mean if there else None for mean, there in zip(means, head["present"], strict=True)]

    # ---- around them -------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> tuple[int, int]:
        return self.step, self.iteration

    @counters.setter
    def counters(self, value: tuple[int, int]) -> None:
        for exchange in (self, self.within, self.across):
            exchange.step, exchange.iteration = value

    def _resume(self) -> None:
        self.within.messenger.drain()
        self.across.messenger.drain()
        super()._resume()

    def refuse(self, starts_iteration: bool = True, whole: bool = False) -> None:
        if not self._agreed:
            super().refuse()
            return
        self.within.refuse()
        self._refuse_across(starts_iteration)

    def _refuse_across(self, starts_iteration: bool) -> None:
        if self.leads and self.hosts > 1:
            self.across.refuse(starts_iteration)

    def state_dict(self) -> dict:
        return self.across.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.across.load_state_dict(state)
        self.step = self.within.step = state["step"]
        self.iteration = state["iteration"]

    def _position(self) -> list[int]:
        return self.across._position()


@contextlib.contextmanager
def _saying(where: str) -> Iterator[None]:
    """Says of a disagreement between whom it is: ranks are counted among these."""
    try:
        yield
    except DisagreementError as error:
        raise DisagreementError(f"{where}: {error}") from error
