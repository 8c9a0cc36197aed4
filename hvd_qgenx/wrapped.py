"""What a DistributedOptimizer asks of the optimizer that it wraps, and what Horovod asks of the wrapper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from hvd_qgenx.checks import check_named_parameters, check_type
from hvd_qgenx.extragradient import OptimizerView

HOROVODS_MODULE = "horovod.torch.optimizer"


class Materialising(OptimizerView):
    """What Horovod's broadcast_optimizer_state may call on a rank whose state is empty.

    It calls ``step()`` there, to create state that it can overwrite; of its own wrapper, which it recognises by
    ``__module__``, it calls the base class's. This is that base class: it creates the state and moves nothing.
    """

    def _recall(self) -> None:
        """Takes up what a checkpoint or a broadcast left in the groups; see ``DistributedOptimizer``."""

    def step(self, closure=None):
        """Creates the optimizer's state as a placeholder, dropped again unless a broadcast overwrites it."""
        self._recall()
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved = [p.detach().clone() for p in parameters]
        gradients = [p.grad for p in parameters]
        options = [dict(group) for group in self.param_groups]
        if wants_sparse(self.optimizer):
            for p in parameters:
                p.grad = None if p.grad is None else p.grad.to_sparse(1)
        if hasattr(self.optimizer, "extrapolation"):
            self.optimizer.extrapolation()
        self.optimizer.step()
        with torch.no_grad():
            for p, value, gradient in zip(parameters, saved, gradients, strict=True):
                p.copy_(value)
                p.grad = gradient
        for group, before in zip(self.param_groups, options, strict=True):
            group.update(before)
        self._placeholder = True


def wants_sparse(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the innermost optimizer takes no dense gradient."""
    while isinstance(optimizer, OptimizerView):
        optimizer = optimizer.optimizer
    return isinstance(optimizer, torch.optim.SparseAdam)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    check_type("optimizer", optimizer, torch.optim.Optimizer)
    if getattr(optimizer, "__module__", None) == HOROVODS_MODULE:
        raise ValueError("optimizer must not be distributed already: its gradients would be averaged twice")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must not be LBFGS: each rank's own loss would decide how often it evaluates")


def names_of(optimizer: torch.optim.Optimizer, named_parameters: Iterable | None) -> dict[Tensor, str]:
    """The name of each parameter: unique, and none missing."""
    groups = [group["params"] for group in optimizer.param_groups]
    if named_parameters is None:
        return {p: f"parameter.{i}.{j}" for i, group in enumerate(groups) for j, p in enumerate(group)}
    pairs = check_named_parameters(named_parameters)
    repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    if repeated:
        raise ValueError(f"named_parameters must have unique names, repeated: {', '.join(repeated)}")
    names = {p: name for name, p in pairs}
    missing = [
        f"parameter {j} of group {i}" for i, group in enumerate(groups) for j, p in enumerate(group) if p not in names
    ]
    if missing:
        raise ValueError(f"named_parameters must name every parameter, not named: {', '.join(missing)}")
    return names
