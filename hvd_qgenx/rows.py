"""Means of sparse gradients: their rows travel as they are, by one allgather, and are added in rank order."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hvd_qgenx.exchange import DisagreementError, Exchange, HierarchicalExchange


class Rows:
    """The sparse gradients of an optimizer. Arguments: the names of all parameters."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        #: Numbers of the gradients that were sparse once: a rank without one of them must still take part.
        self.known: set[int] = set()

    def replace(
        self,
        exchange: Exchange,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        starts_iteration: bool,
    ) -> list[Tensor | None]:
        """Makes the means of sparse gradients ``grad``; leaves the others, with None for those.

        Raises:
            ValueError: if the exchange is hierarchical.
            DisagreementError, ValueError: as ``exchange_rows``.
        """
        new = [i for i, g in enumerate(gradients) if g is not None and g.is_sparse and i not in self.known]
        if new and isinstance(exchange, HierarchicalExchange):
            raise ValueError(f"the gradient of {self.names[new[0]]} is sparse: pass sparse_as_dense=True")
        if new and exchange.transport.size > 1:
            announce(exchange, [self.names[i] for i in new], starts_iteration)
        self.known.update(new)
        rows = {i: gradients[i] for i in sorted(self.known)}
        for i, mean in exchange_rows(exchange, rows, self.names).items():
            parameters[i].grad = mean
        return [None if i in self.known else g for i, g in enumerate(gradients)]


def exchange_rows(
    exchange: Exchange, gradients: Mapping[int, Tensor | None], names: Sequence[str]
) -> dict[int, Tensor | None]:
    """The means of sparse gradients, coalesced; None where no rank has one.

    A rank without a row counts as zero there, as one without the gradient does.

    Args:
        exchange: whose ranks take part; they must all call this, in the same exchange.
        gradients: by their number, sparse or None.
        names: of all parameters, by number.

    Raises:
        DisagreementError: on every rank, if a gradient is sparse on one rank and not known to be on another.
        ValueError: if one of them is dense on this rank.
    """
    for index, gradient in gradients.items():
        if gradient is not None and not gradient.is_sparse:
            raise ValueError(f"the gradient of {names[index]} was sparse and is dense: pass sparse_as_dense=True")
    if exchange.transport.size == 1:
        return dict(gradients)
    ranks = _gather(exchange, gradients, names)
    means = {index: _mean([rank[index] for rank in ranks], own, exchange.op) for index, own in gradients.items()}
    _spoil(exchange, means, names)
    return means


def announce(exchange: Exchange, names: Sequence[str], starts_iteration: bool) -> None:
    """Before the first rows of these parameters, in the way in which ranks wait that do not know of any.

    Raises:
        DisagreementError: on every rank, unless all announce some.
    """
    try:
        exchange.meet("rows", starts_iteration)
    except DisagreementError as error:
        raise DisagreementError(
            f"{error}; the gradient of {', '.join(names)} is sparse here: make it so on all ranks, or pass "
            "sparse_as_dense=True"
        ) from error


def _gather(exchange: Exchange, gradients: Mapping[int, Tensor | None], names: Sequence[str]) -> list[dict]:
    own = {index: None if g is None else _packed(g.detach().coalesce()) for index, g in gradients.items()}
    _, bodies = exchange.messenger.gather(exchange.envelope("rows"), _written(own))
    ranks = [torch.load(io.BytesIO(body.numpy().tobytes()), weights_only=True) for body in bodies]
    leader = exchange.transport.members[0]
    for rank, other in zip(exchange.transport.members, ranks, strict=True):
        if other.keys() != ranks[0].keys():
            raise DisagreementError(
                f"ranks disagree on which gradients are sparse: rank {leader} has {_listed(ranks[0], names)}, "
                f"rank {rank} has {_listed(other, names)}; pass sparse_as_dense=True"
            )
    return ranks


def _spoil(exchange: Exchange, means: Mapping[int, Tensor | None], names: Sequence[str]) -> None:
    """As of any other gradient, one number that is not finite makes the whole mean NaN, with a warning."""
    broken = {i: mean is not None and not bool(mean.values().isfinite().all()) for i, mean in means.items()}
    exchange.report_broken(list(broken.values()), [names[index] for index in broken])
    for index, mean in means.items():
        if mean is not None and broken[index]:
            mean.values().fill_(torch.nan)


def _packed(gradient: Tensor) -> tuple[Tensor, Tensor, list[int], str]:
    return gradient.indices().cpu(), gradient.values().cpu(), list(gradient.shape), str(gradient.device)


def _written(rows: dict) -> Tensor:
    file = io.BytesIO()
    torch.save(rows, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _mean(packed: Sequence[tuple | None], own: Tensor | None, op: str) -> Tensor | None:
    """The sum in rank order, or the mean; where the rank's own gradient is, or on the CPU."""
    total: Tensor | None = None
    for rows in packed:
        if rows is not None:
            # Invariants are checked, since the rows of another rank are only bytes.
            one = torch.sparse_coo_tensor(
                rows[0], rows[1], rows[2], is_coalesced=True, check_invariants=True, device="cpu"
            )
            total = one if total is None else (total + one).coalesce()
    if total is None:
        return None
    if op == "mean":
        total.values().div_(len(packed))
    return total if own is None else total.to(own.device)


def _listed(rows: Mapping[int, object], names: Sequence[str]) -> str:
    return ", ".join(names[index] for index in rows) or "none"
