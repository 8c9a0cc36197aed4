"""DistributedOptimizer: any torch optimizer on the mean gradient of all ranks, extra-gradient ones included."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_qgenx.checks import (
    check_choice,
    check_integer,
    check_name,
    check_process_set,
    check_type,
)
from hvd_qgenx.communication import Communication
from hvd_qgenx.compression import Compression
from hvd_qgenx.connection import AVERAGE, Connection, check_predivide, unless_all, unless_world
from hvd_qgenx.exchange import PLANS, Collected, Exchange, HierarchicalExchange, Term, fingerprint
from hvd_qgenx.extragradient import check_no_stock
from hvd_qgenx.gradients import as_real, assign, real_type
from hvd_qgenx.identity import Identity, identify
from hvd_qgenx.overlap import Overlap
from hvd_qgenx.rows import Rows
from hvd_qgenx.wrapped import HOROVODS_MODULE, Materialising, check_optimizer, names_of, wants_sparse

EXCHANGES = ("auto", *PLANS)
_MEMORY = "hvd_qgenx"


class DistributedOptimizer(Materialising):
    """Averages gradients over all ranks before ``optimizer`` uses them.

    A plain optimizer has one exchange, in ``step``; one with ``extrapolation`` has one there and one in ``step`` (one
    in all, if its ``extrapolation_uses_gradient`` is false). Each exchange is one message holding all parameters that
    have a gradient on some rank; a parameter without gradient on this rank counts as zero, and one without gradient on
    all ranks keeps ``grad`` None. It wraps ``optimizer``: param_groups and state are shared.

    Args:
        optimizer: a torch.optim.Optimizer, ``ExtraGradient`` or ``QGenX``.
        named_parameters: (name, parameter) pairs of all parameters; names must be unique, also across networks.
        compression: ``Compression.none``, ``.fp16``, ``.qgenx(...)``, ``.auto``, or any compressor of Horovod's.
        backward_passes_per_step: with ``overlap``, how many backwards precede a half-step: the last of them sends.
            Without, gradients accumulate in ``p.grad`` and are exchanged in the half-step whatever their number.
        op: ``hvd.Average`` or ``hvd.Sum``; where Horovod is not installed, their numbers 0 and 1.
        gradient_predivide_factor: splits the division before and after the sum, where a sum travels (none, fp16).
        num_groups, groups: accepted as Horovod's; all parameters travel in one message anyway.
        sparse_as_dense: a sparse gradient is exchanged as a dense one. Else its rows travel as they are, uncoded; then
            it must be sparse on all ranks, or absent.
        process_set: Horovod's, the ranks that take part, None for all; on others every step is local.
        exchange: of coded gradients: "allgather" of all ranks' payloads, "two_phase" (shards to their owners, means
            back), or "auto", which lets all ranks choose one of them and a part size before the first exchange, by a
            measurement of less than a second; small networks, and ``QGenX``, have no choice and measure nothing. What
            was chosen is in ``state_dict``, and logged by ``logging.getLogger("hvd_qgenx")``.
        overlap: sends parts of the gradient during backward, as soon as they are there, instead of all of it in the
            half-step; the same bits as in parts of that size without. Gradients must then not be changed between
            backward and half-step except after ``synchronize``. Nothing starts early where ``compression`` is none or
            fp16, for ``QGenX``, for networks below 4 MiB, in the first exchange and in those that fit levels.
        hierarchical: the ranks of a host first add up their gradients, in float32, one of them exchanges coded with
            the other hosts, and its host takes over the result. Hosts are found by Horovod's local ranks, or given,
            as (host, leaders): the process sets of this rank's host and of the first ranks of all hosts. To be passed
            by all ranks of the job; needs HOROVOD_DYNAMIC_PROCESS_SETS=1 unless given. Not for ``QGenX``.
        name: by which ranks know this optimizer, instead of by its parameters' names and shapes.
        timeout: seconds that this rank waits for others in one operation before it raises, 0 for no limit; None is
            what HVD_QGENX_TIMEOUT says, or half an hour.
        check_replicas: after every so many steps ranks compare hashes of all parameters, and raise where they differ,
            naming the ranks and the first such parameter; 0 never.
        process_group: torch.distributed's, in place of a process set: Horovod is then not used, and need not be
            installed. ``torch.distributed.group.WORLD`` is all ranks. Not with ``overlap`` or ``hierarchical``.

    Raises:
        ValueError: naming the argument and what is allowed.

    Example:
        >>> optimizer = DistributedOptimizer(ExtraAdam(model.parameters()), compression=Compression.qgenx(bits=4))
        >>> optimizer.zero_grad(); loss().backward(); optimizer.extrapolation()
        >>> optimizer.zero_grad(); loss().backward(); optimizer.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable | None = None,
        compression=Compression.none,
        backward_passes_per_step: int = 1,
        op=AVERAGE,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups=None,
        sparse_as_dense: bool = False,
        process_set=None,
        exchange: str = "auto",
        overlap: bool = False,
        hierarchical: bool | tuple = False,
        name: str | None = None,
        timeout: float | None = None,
        check_replicas: int = 0,
        process_group=None,
    ):
        check_no_stock(self)
        check_optimizer(optimizer)
        super().__init__(optimizer)
        if process_set is not None:
            check_process_set(process_set)
        check_type("sparse_as_dense", sparse_as_dense, bool)
        check_type("overlap", overlap, bool)
        check_integer("backward_passes_per_step", backward_passes_per_step, 1)
        check_integer("num_groups", num_groups, 0)
        check_choice("exchange", exchange, EXCHANGES)
        check_integer("check_replicas", check_replicas, 0)
        check_predivide(gradient_predivide_factor, op)
        self.sparse_as_dense, self.name, self.check_replicas = sparse_as_dense, check_name(name), check_replicas
        self._names = names_of(self, named_parameters)
        self._passes = backward_passes_per_step
        if process_group is not None and (overlap or hierarchical is not False or process_set is not None):
            raise ValueError("process_group goes without process_set, overlap and hierarchical, which need Horovod")
        self._how = Connection(
            compression, unless_all(process_set), unless_world(process_group), op, gradient_predivide_factor,
            exchange, overlap, hierarchical, timeout,
        )  # fmt: skip
        self._inherited: dict | None = None
        self._start_over()
        self._connect()

    def _start_over(self) -> None:
        """What an optimizer has that is new, or a copy."""
        self._made: Exchange | None = None
        self._should_synchronize, self._synchronized, self._placeholder = True, False, False
        self.__module__ = HOROVODS_MODULE  # see Materialising

    def __getstate__(self) -> dict:
        """All that a copy takes along; it connects with other ranks when it first needs them."""
        state = self._made.state_dict() if self._made else self._inherited
        kept = {key: getattr(self, key) for key in ("sparse_as_dense", "name", "check_replicas", "_passes", "_how")}
        names = list(self._names.items())
        return {**super().__getstate__(), **kept, "_names": names, "_inherited": state, "_stood_in": self._placeholder}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_how" in state:
            self._names = dict(state["_names"])
            self._start_over()
            self._placeholder = vars(self).pop("_stood_in")

    def _connect(self, communication: Communication | None = None) -> None:
        """Makes the exchange, by which this optimizer meets those of other ranks."""
        self._made = self._how.make(self.optimizer, communication)
        self._epoch = self._made.transport.epoch
        self._overlap = Overlap(self._start_part, self._passes)
        self._describe()
        if self._inherited:
            self._made.load_state_dict(self._inherited)
            self._inherited = None
        if hasattr(self.optimizer, "num_ranks"):
            self.optimizer.num_ranks = self._made.transport.size

    @property
    def _exchange(self) -> Exchange:
        if self._made is None:
            self._connect()
        assert self._made is not None
        return self._made

    @property
    def communication(self):
        """Bytes handed to collectives, bits per coordinate, ratio to float32, variance."""
        return self._exchange.communication

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters; what a backward has sent of them is given up."""
        self._synchronized = False
        super().zero_grad(set_to_none)
        if self._made:
            self._overlap.end()
            self._made.give_up()

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters, on every rank; they are named by their position."""
        super().add_param_group(param_group)
        self._follow()

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From the next backward on, this many precede a half-step."""
        self._passes = check_integer("passes", passes, 1)
        if self._made:
            self._overlap.passes = self._passes

    def synchronize(self) -> None:
        """Exchanges gradients now, so that they can be looked at or clipped before the half-step that uses them."""
        self._begin()
        self._average(self._coming_stage)
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self):
        """In this context ``extrapolation`` and ``step`` use gradients that ``synchronize`` has exchanged."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def extrapolation(self) -> None:
        """The first half-step, on the mean gradient if the method uses one.

        Raises:
            AttributeError: if the optimizer is not of the extra-gradient family.
        """
        if not self._extrapolates:
            raise AttributeError(f"{type(self.optimizer).__name__} has no extrapolation(); wrap it in ExtraGradient")
        self._with_hooks(self._extrapolate)

    def _extrapolate(self) -> None:
        self._begin()
        if self._two_exchanges:
            self._synchronize_unless_done("extrapolation")
        else:
            with self._exchange.unbroken():
                self._exchange.settle()  # ranks that start here agree before any of them moves
        self.optimizer.extrapolation()

    def step(self, closure: Callable | None = None):
        """The step, on the mean gradient. With a closure the whole iteration; returns the first loss."""
        return self._with_hooks(self._step, closure)

    def _step(self, closure: Callable | None = None):
        self._begin()
        if closure is not None:
            loss = self._closure_step(closure)
        else:
            self._synchronize_unless_done("step")
            loss = self.optimizer.step()
        self._compare_replicas()
        return loss

    def join(self, after_step: Callable[[], object] | None = None) -> None:
        """To be called by every rank once it has no data left: takes part in the others' exchanges until all have none.

        Means are then those of the ranks that have data, and this rank makes every half-step that the others make, so
        that replicas stay equal. Another epoch may follow.

        Args:
            after_step: called after each such step; what the training loop does there beside ``step``, as with a
                scheduler that counts iterations.

        Raises:
            RuntimeError: between the half-steps of an iteration.
            ValueError: under ``hierarchical``.
        """
        if self.extrapolated:
            raise RuntimeError("join() comes between iterations, but parameters are at x_{t+1/2}: call step() first")
        if isinstance(self._exchange, HierarchicalExchange):
            raise ValueError("join() is not for hierarchical=True: hosts weigh their sums by all of their ranks")
        self._begin()
        while self._exchange.transport.size > 1 and self._take_part():
            if after_step is not None and not self.extrapolated:
                after_step()

    def _take_part(self) -> bool:
        """A half-step of the ranks that have data; False if there are none."""
        stage = self._coming_stage
        if self._extrapolates and not self._two_exchanges:
            self.optimizer.extrapolation()
        self.zero_grad()
        if self._average(stage, has_data=False).all_joined:
            return False
        if stage == "extrapolation":
            self.optimizer.extrapolation()
        else:
            self.optimizer.step()
            self._compare_replicas()
        return True

    def state_dict(self) -> dict:
        """The optimizer's state with this wrapper's (exchange counter, codebook); equal on all ranks, at any moment.

        Loaded by another number of ranks it continues from the same point with the same step size and the same random
        streams of the ranks that remain; under ``QGenX``, between its half-steps or with method="optimistic", each
        rank takes the mean of all ranks' last vectors for its own in the next term of the step size.
        """
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues exactly from a ``state_dict``; from one of an unwrapped optimizer with this wrapper's counters."""
        super().load_state_dict(state_dict)

    def _packed(self) -> dict:
        self._recall()
        self.param_groups[0][_MEMORY] = {**self._exchange.state_dict(), "placeholder": self._placeholder}
        packed = super()._packed()
        # Horovod broadcasts nothing, not even options, of an optimizer without state; ours has something to say.
        if self._placeholder and not any(packed["state"].values()):
            packed["state"] = {0: {_MEMORY: torch.zeros(1, dtype=torch.float32, device="cpu")}}
        return packed

    def _unpack(self, state: dict) -> None:
        super()._unpack(state)
        for p in [p for p, kept in self.state.items() if set(kept) == {_MEMORY}]:
            del self.state[p]
        self._placeholder = False
        self._recall()

    @property
    def extrapolated(self) -> bool:
        """Whether parameters are at x_{t+1/2}, so that ``step`` is due; never, for a plain optimizer."""
        return getattr(self.optimizer, "extrapolated", False)

    @property
    def _extrapolates(self) -> bool:
        return hasattr(self.optimizer, "extrapolation")

    @property
    def _two_exchanges(self) -> bool:
        return self._extrapolates and self.optimizer.extrapolation_uses_gradient

    @property
    def _coming_stage(self) -> str:
        """Of the half-step that is due."""
        return "extrapolation" if self._two_exchanges and not self.extrapolated else "step"

    def _starts_iteration(self, stage: str) -> bool:
        return stage == "extrapolation" or not self._two_exchanges

    def _recall(self) -> None:
        """Takes up what ``load_state_dict``, or a broadcast of what ``state_dict`` wrote, left in the first group."""
        memory = self.param_groups[0].pop(_MEMORY, None)
        if memory is not None:
            self._exchange.load_state_dict(memory)
            self._placeholder = memory["placeholder"]

    def _begin(self) -> None:
        """What precedes a half-step: takes up memory, drops state that only stood in for a broadcast."""
        self._recall()
        self._follow_ranks()
        if self._placeholder:
            self.state.clear()
            self._placeholder = False

    def _follow_ranks(self) -> None:
        """Where ranks have been connected anew, takes the kind of exchange that their new number asks for."""
        exchange = self._exchange
        if exchange.transport.epoch is not self._epoch:
            self._inherited = exchange.state_dict()
            self._connect(exchange.communication)

    def _compare_replicas(self) -> None:
        """Every ``check_replicas`` steps."""
        if self.check_replicas and self._exchange.counters[1] % self.check_replicas == 0:
            parameters = self._parameters()
            self._exchange.compare_replicas(list(map(fingerprint, parameters)), self._ordered_names)

    def _closure_step(self, closure: Callable):
        if not self._extrapolates:
            return self.optimizer.step(lambda: self._evaluate(closure, "step"))
        if self.optimizer.extrapolated:
            raise RuntimeError("step(closure) starts at x_t, but parameters are at x_{t+1/2}: call step() alone")
        loss = None
        if self._two_exchanges:
            loss = self._evaluate(closure, "extrapolation")
        self._with_hooks(self.optimizer.extrapolation)
        ahead = self._evaluate(closure, "step")
        self.optimizer.step()
        return ahead if loss is None else loss

    def _evaluate(self, closure: Callable, stage: str):
        with torch.enable_grad():
            loss = closure()
        self._average(stage)
        return loss

    def _synchronize_unless_done(self, stage: str) -> None:
        if not self._should_synchronize:
            if not self._synchronized:
                raise RuntimeError(f"{stage}() under skip_synchronize() needs a synchronize() before it")
        else:
            if self._synchronized:
                warnings.warn(
                    f"optimizer.{stage}() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize(): it exchanges again",
                    stacklevel=5,
                )
            self._average(stage)
        self._synchronized = False

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _average(self, stage: str, has_data: bool = True) -> Collected:
        """Replaces every gradient by the mean (or sum) over ranks: the one place that exchanges."""
        self._begin()
        parameters, exchange = self._follow(), self._exchange
        if not self._overlap.end():
            exchange.give_up()
        ends_difference = self._wants_difference and stage == "step"
        with exchange.unbroken():
            exchange.settle()
            # Now: before it a late rank has no vectors, and levels fitted below would read the last exchange's wrongly.
            before = self._look_ahead(parameters) if ends_difference else []
            term = (lambda received: _squared_distance(before, received)) if ends_difference else None
            collected = self._exchange_gradients(parameters, stage, has_data, term)
        if wants_sparse(self.optimizer) and self.sparse_as_dense:
            for p in parameters:
                p.grad = None if p.grad is None else p.grad.to_sparse(1)
        if ends_difference:
            self.optimizer.squared_difference = sum(collected.terms)
        return collected

    def _exchange_gradients(self, parameters: list[Tensor], stage: str, has_data: bool, term: Term | None) -> Collected:
        exchange, starts, keeps = self._exchange, self._starts_iteration(stage), self._keeps(stage)
        with exchange.refusing(starts, whole=term is not None or keeps):
            gradients = self._gradients(parameters)
            fused = exchange.fuse(gradients)
        exchange.adapt_if_due(fused, starts)
        submitted = exchange.submit(fused, stage if has_data else "joined", term, keeps)
        collected = exchange.collect(submitted, self._ordered_names)
        assign(parameters, gradients, collected.means)
        return collected

    def _start_part(self, part: int, gradients: list[Tensor | None]) -> bool:
        """Sends a part during backward; says whether it could."""
        self._recall()
        self._follow_ranks()
        stage = self._coming_stage
        gradients = [None if gradient is None else as_real(gradient) for gradient in gradients]
        return self._exchange.start(part, gradients, stage, self._starts_iteration(stage))

    @property
    def _wants_difference(self) -> bool:
        return self._exchange.transport.size > 1 and hasattr(self.optimizer, "squared_difference")

    def _keeps(self, stage: str) -> bool:
        """Whether the next exchange needs this one's vectors again, for Algorithm 1's ||V_k,t - V_k,t+1/2||^2."""
        optimistic = getattr(self.optimizer, "method", None) == "optimistic"
        return self._wants_difference and (stage == "extrapolation" or optimistic)

    def _look_ahead(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """This rank's V_k,t; where there is none, in a checkpoint of another number of ranks, their mean."""
        if (kept := self._exchange.last_as_received()) is not None:
            return kept
        vectors = [self.state.get(p, {}).get("look_ahead") for p in parameters]
        return [None if v is None else as_real(v.detach()).cpu().float().reshape(-1) for v in vectors]

    def _parameters(self) -> list[Tensor]:
        """All of them, frozen ones too: what is frozen may differ between ranks, and then only lacks a gradient."""
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """What is exchanged in one vector: dense, real."""
        gradients = [p.grad for p in parameters]
        sparse = [g is not None and g.is_sparse for g in gradients]
        if self.sparse_as_dense and any(sparse):
            gradients = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
        elif any(sparse) or self._rows.known:
            if any(sparse) and hasattr(self.optimizer, "squared_difference"):
                name = self._ordered_names[sparse.index(True)]
                raise ValueError(f"the gradient of {name} is sparse, which is not for QGenX: pass sparse_as_dense=True")
            starts = self._starts_iteration(self._coming_stage)
            gradients = self._rows.replace(self._exchange, parameters, gradients, starts)
        if self._has_complex:
            gradients = [None if g is None else as_real(g) for g in gradients]
        return gradients

    def _follow(self) -> list[Tensor]:
        """All parameters; if they are not those of which ranks were told, they will be told of these."""
        parameters = self._parameters()
        now = (list(map(id, parameters)), [p.dtype for p in parameters], [p.shape for p in parameters])
        if self._made and now != self._known:
            for i, group in enumerate(self.param_groups):
                for j, p in enumerate(group["params"]):
                    self._names.setdefault(p, f"parameter.{i}.{j}")
            self._describe()
        return parameters

    def _describe(self) -> None:
        """Tells the exchange what ranks must have in common, a line each."""
        assert self._made is not None
        parameters = self._parameters()
        self._known = (list(map(id, parameters)), [p.dtype for p in parameters], [p.shape for p in parameters])
        self._ordered_names = [self._names[p] for p in parameters]
        self._has_complex, self._rows = any(p.is_complex() for p in parameters), Rows(self._ordered_names)
        pairs = list(zip(self._ordered_names, parameters, strict=True))
        number, line = self._identity(pairs)
        kind = f"optimizer={type(self.optimizer).__name__}, op={self._made.op}, {self._how}"
        lines = [f"{name} of shape {tuple(p.shape)} and type {p.dtype}" for name, p in pairs]
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
        self._made.identify(number)
        self._made.describe([kind, *lines, line], [real_type(p.dtype) for p in parameters], sizes)
        self._overlap.follow(parameters, self._ordered_names, self._made.parts())

    def _identity(self, pairs: list[tuple[str, Tensor]]) -> Identity:
        shapes = [f"{name} {tuple(p.shape)}" for name, p in pairs]
        names = f"{pairs[0][0]} and {len(pairs) - 1} more" if len(pairs) > 1 else ", ".join(self._ordered_names)
        label = f"the optimizer {self.name!r}" if self.name else f"the optimizer of {names or 'nothing'}"
        members = str(self._exchange.transport.members)
        return identify(self, ["optimizer", members, *([self.name] if self.name else shapes)], label)


def _squared_distance(first: list[Tensor | None], second: list[Tensor | None]) -> float:
    """The sum over pairs of ||a - b||^2 in float64; None, and a vector that was not sent, is zero."""
    total = 0.0
    for pair in zip(first, second, strict=True):
        present = [v for v in pair if v is not None and len(v)]
        if present:
            difference = present[0] - present[1] if len(present) == 2 else present[0]
            total += float(difference.double().square().sum())
    return total
