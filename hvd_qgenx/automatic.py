"""Compression.auto: none, fp16 or qgenx, whichever is fastest on this network, these cores and this size."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.checks import check_integers, check_named_parameters, check_process_set
from hvd_qgenx.communication import Communication
from hvd_qgenx.compressor import QGenXCompressor
from hvd_qgenx.exchange.automatic import AutomaticExchange
from hvd_qgenx.exchange.coded import CodedExchange
from hvd_qgenx.identity import identify
from hvd_qgenx.levels import num_positive
from hvd_qgenx.stock import caller, check_horovod, is_optimizer
from hvd_qgenx.uncoded import FP16Compressor, NoneCompressor

DENSE = {"none": NoneCompressor, "fp16": FP16Compressor}


class AutoCompressor:
    """Chooses at the first exchange and keeps to it: ``Compression.none``, ``.fp16`` or ``.qgenx`` of some width.

    It weighs time alone. All ranks measure the network with small messages and the work on a vector of their own, in
    about a second together, and take what is expected to be fastest for the whole gradient; of two ways within 5 % of
    each other the more exact one (none, fp16, then qgenx from many bits to few). The choice, the same on all ranks, is
    logged once by ``logging.getLogger("hvd_qgenx")``, and is part of ``state_dict``. All but fp16 are without bias,
    which games need; fp16 rounds to nearest, by less than 2**-11 of a number above 6e-5.

    Overlap with backward is not weighed: stock Horovod sends none and fp16 during backward, and qgenx after it.

    Calling an instance returns a new one that is configured; each optimizer should get its own.
    """

    def __init__(
        self,
        bits: tuple[int, ...] = (8, 4, 3),
        settings: Settings | None = None,
        named_parameters: Iterable | None = None,
        process_set: Any = None,
    ):
        self.bits = bits
        self.settings = settings or Settings()
        # All ranks by no object, so that a copy means them wherever it is made.
        is_given = process_set is not None and check_process_set(process_set).process_set_id != 0
        self.process_set = process_set if is_given else None
        self._named = check_named_parameters(named_parameters) if named_parameters is not None else []
        self.communication = Communication()
        self._inherited: dict | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._made: AutomaticExchange | None = None
        self._chosen: Any = None
        self._epoch: object = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        """All that a copy takes along: what is under way, and the connection, stay behind."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_made", "_chosen", "_lock")}
        return {**kept, "_inherited": self._made.state_dict() if self._made else self._inherited}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start_over()

    def __call__(
        self,
        bits: Iterable[int] = (8, 4, 3),
        seed: int = 0,
        named_parameters: Iterable | None = None,
        process_set: Any = None,
        nonfinite: str = "nan",
    ) -> AutoCompressor:
        """A configured compressor.

        Args:
            bits: widths of ``Compression.qgenx`` to choose from, beside none and fp16; may be empty. Below 3 bits
                rounding adds more variance than the gradient's own square, so that fast steps may not be worth it.
            seed, nonfinite: as of ``Compression.qgenx``, should that be chosen.
            named_parameters: all parameters; by their sizes the choice is made. Needed only where Horovod's optimizer
                does not call, as in ``hvd.allreduce(tensor, compression=...)``: else the tensor alone counts.
            process_set: the ranks to exchange with, if they are not all; must be the optimizer's.

        Raises:
            ValueError: naming the argument and what is allowed.
        """
        widths = tuple(sorted(set(check_integers("bits", bits, 2)), reverse=True))
        for width in widths:
            num_positive(width)
        return AutoCompressor(widths, Settings(seed=seed, nonfinite=nonfinite), named_parameters, process_set)

    def __repr__(self) -> str:
        return f"Compression.auto(bits={self.bits}, seed={self.settings.seed}, chosen={self.choice})"

    @property
    def choice(self) -> dict | None:
        """What was chosen: "compression", "bits" and the ranks that chose; None before the first exchange."""
        return self._made.chosen if self._made else None

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """What the chosen compressor makes of ``tensor``; the first call on each rank meets those of the others."""
        with self._lock:
            self._follow_ranks()
            if self._chosen is None:
                self._chosen = self._choose(tensor)
        compressed, context = self._chosen.compress(tensor)
        if self._chosen in DENSE.values():
            self.communication.count(compressed)
            self.communication.coordinates += tensor.numel()
        return compressed, (self._chosen, context)

    def decompress(self, tensor: Tensor, ctx: tuple | None) -> Tensor:
        """What the compressor that was chosen when ``compress`` was called makes of it."""
        if ctx is None:  # a sparse gradient, which Horovod sends by itself
            return tensor
        chosen, context = ctx
        return chosen.decompress(tensor, context)

    def _follow_ranks(self) -> None:
        """Other ranks choose anew."""
        epoch = self._exchange.transport.epoch
        if self._epoch is not epoch:
            if self._epoch is not None:
                self.load_state_dict(self.state_dict())
                self._introduce(self._exchange)
            self._epoch = epoch

    def _choose(self, tensor: Tensor) -> Any:
        exchange = self._exchange
        if exchange.transport.size == 1:
            return NoneCompressor
        exchange.describe(["drop-in"], [torch.float32], [self._numel(tensor)])
        exchange.settle()
        if isinstance(exchange.kind, CodedExchange):
            return QGenXCompressor(exchange.kind.settings, self._named or None, self.process_set, exchange.kind)
        assert exchange.chosen is not None
        return DENSE[exchange.chosen["compression"]]

    def _numel(self, tensor: Tensor) -> int:
        """Coordinates of all gradients, as far as this rank can know."""
        if self._named:
            return sum(p.numel() for _, p in self._named)
        frame = caller()
        if not is_optimizer(frame):
            return tensor.numel()
        groups = frame.f_locals["self"].param_groups
        return sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)

    @property
    def _exchange(self) -> AutomaticExchange:
        """What makes the choice, and keeps the memory; needs Horovod."""
        if self._made is None:
            check_horovod()
            from hvd_qgenx.transports.horovod import HorovodTransport

            transport = HorovodTransport(self.process_set)
            self._made = AutomaticExchange(
                DENSE, self.bits, self.settings, transport, drop_in=True, communication=self.communication
            )
            self._introduce(self._made)
            if self._inherited:
                self._made.load_state_dict(self._inherited)
                self._inherited = None
        return self._made

    def _introduce(self, exchange: AutomaticExchange) -> None:
        """Gives the exchange the identity by which other ranks know it."""
        shapes = [f"{name} {tuple(p.shape)}" for name, p in self._named]
        words = ["automatic compressor", str(exchange.transport.members), *shapes]
        exchange.identify(identify(self, words, "an automatic compressor").number)

    def state_dict(self) -> dict:
        """The choice, and the memory of what was chosen, equal on all ranks, as plain numbers and words."""
        return self._exchange.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continues exactly from a ``state_dict``; ranks that load none take over the state of those that do."""
        self._exchange.load_state_dict(state)
        self._chosen = None
