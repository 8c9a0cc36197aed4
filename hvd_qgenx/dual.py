"""Algorithm 1 of Q-GenX: dual extrapolation with a step size that adapts to what was received.

    X_{t+1/2} = X_t - gamma_t V_t            Y_{t+1} = Y_t - V_{t+1/2}            X_{t+1} = X_1 + gamma_{t+1} Y_{t+1}
    gamma_t   = step_scale K (1 + sum_{i<t} sum_k ||V_k,i - V_k,i+1/2||^2)^(-1/2)

V_t is the mean over the K ranks of the decoded vectors V_k,t. The rates of the paper hold for the ergodic average
(1/t) sum_{i<=t} X_{i+1/2}, which ``averaged`` shows. Knows nothing of communication: on several ranks the wrapper sets
``num_ranks``, averages gradients and sets ``squared_difference`` before ``step``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

from hvd_qgenx.checks import check_choice, check_positive
from hvd_qgenx.extragradient import check_no_stock

METHODS = ("dual_averaging", "dual_extrapolation", "optimistic")


class QGenX(torch.optim.Optimizer):
    """Q-GenX's update rule; needs no Lipschitz constant, no noise level and no learning rate.

    On a closed convex set, project parameters onto it after each half-step: that is the method with the set's
    Euclidean projection as its mirror map.

    Args:
        params: as for any torch optimizer.
        method: where V_t comes from. "dual_averaging": V_t = 0. "dual_extrapolation": a fresh gradient at X_t (the
            gradients present at ``extrapolation``). "optimistic": V_{t-1/2}, the gradient of the last ``step``.
        step_scale: multiplies gamma_t, for problems whose unit is not 1; positive.

    Source: Ramezani-Kebrya et al., Q-GenX (ICLR 2023), algorithm 1.
    """

    def __init__(self, params, method: str = "dual_extrapolation", step_scale: float = 1.0):
        check_no_stock(self)
        check_choice("method", method, METHODS)
        check_positive("step_scale", step_scale)
        super().__init__(params, {"method": method, "step_scale": float(step_scale), "iterations": 0})
        self._start_over()
        first = self.param_groups[0]
        for name, value in (("sum_of_squares", 0.0), ("extrapolated", False), ("num_ranks", 1)):
            first.setdefault(name, value)

    def _start_over(self) -> None:
        #: sum over ranks of ||V_k,t - V_k,t+1/2||^2 for the coming step; None means this process is alone.
        self.squared_difference: float | None = None
        self._shows_average = False

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "squared_difference" not in vars(self):  # in a copy, which torch makes of state and groups alone
            self._start_over()

    @property
    def method(self) -> str:
        return self.param_groups[0]["method"]

    @property
    def extrapolation_uses_gradient(self) -> bool:
        """Whether ``extrapolation`` reads gradients: only dual extrapolation does."""
        return self.method == "dual_extrapolation"

    @property
    def extrapolated(self) -> bool:
        """Whether parameters are at X_{t+1/2}."""
        return self.param_groups[0]["extrapolated"]

    @property
    def num_ranks(self) -> int:
        """K. Setting it on the way keeps gamma_t as it is: 1 + sum becomes (K_new / K_old)^2 (1 + sum)."""
        return self.param_groups[0]["num_ranks"]

    @num_ranks.setter
    def num_ranks(self, value: int) -> None:
        first = self.param_groups[0]
        if first["sum_of_squares"] != 0.0 and value != first["num_ranks"]:
            # Otherwise X_{t+1} = X_1 + gamma_{t+1} Y_{t+1} would jump: gamma weighs all that was summed so far.
            first["sum_of_squares"] = (value / first["num_ranks"]) ** 2 * (1.0 + first["sum_of_squares"]) - 1.0
        first["num_ranks"] = value

    @property
    def gamma(self) -> float:
        """The step size gamma_t."""
        first = self.param_groups[0]
        return first["step_scale"] * self.num_ranks * (1.0 + first["sum_of_squares"]) ** -0.5

    # What torch.compile would trace here is Python numbers in param_groups, which it lost when this was tried.
    @torch.optim.Optimizer.profile_hook_step
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def extrapolation(self) -> None:
        """Moves to X_{t+1/2}; to hooks and profilers a step as any other."""
        # The average is for looking at: a step from there would leave the method's path.
        self._check_place()
        for p in self._parameters():
            state = self._initial_state(p)
            if self.extrapolation_uses_gradient:
                # Kept, since the step size needs it when V_{t+1/2} is known.
                state["look_ahead"] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            p.sub_(state["look_ahead"], alpha=self.gamma)
        self.param_groups[0]["extrapolated"] = True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Moves to X_{t+1}. With a closure it makes the whole iteration and returns the first loss.

        Raises:
            RuntimeError: without a closure, if there was no ``extrapolation`` since the last step.
        """
        self._check_place()
        loss = self._closure_iteration(closure) if closure is not None else None
        if not self.extrapolated:
            raise RuntimeError("step() needs an extrapolation() before it, or a closure")
        first = self.param_groups[0]
        first["sum_of_squares"] += (
            self._local_difference() if self.squared_difference is None else self.squared_difference
        )
        # It belongs to this step alone: a stale one would pass unnoticed.
        self.squared_difference = None
        for group in self.param_groups:
            group["iterations"] += 1
            for p in filter(_takes_part, group["params"]):
                self._advance(p, group["iterations"])
        first["extrapolated"] = False
        return loss

    @contextmanager
    def averaged(self):
        """In this context parameters are their ergodic average, (1/t) sum_{i<=t} X_{i+1/2}; afterwards as before.

        Example:
            >>> with optimizer.averaged():
            ...     evaluate(model)
        """
        self._check_place()
        pairs = [(p, self.state[p]["average"]) for p in self._parameters() if "average" in self.state.get(p, ())]
        here = [p.detach().clone() for p, _ in pairs]
        self._shows_average = True
        try:
            _assign([p for p, _ in pairs], [average for _, average in pairs])
            yield
        finally:
            _assign([p for p, _ in pairs], here)
            self._shows_average = False

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues exactly from a ``state_dict``; from one of another number of ranks with the same gamma_t."""
        here = self.num_ranks
        super().load_state_dict(state_dict)
        self.num_ranks = here

    def _check_place(self) -> None:
        if self._shows_average:
            raise RuntimeError("parameters are their average inside averaged(): leave it before you go on")

    def _closure_iteration(self, closure: Callable):
        if self.extrapolated:
            raise RuntimeError("step(closure) starts at X_t, but parameters are at X_{t+1/2}: call step() alone")
        with torch.enable_grad():
            loss = closure() if self.extrapolation_uses_gradient else None
        self.extrapolation()
        with torch.enable_grad():
            ahead = closure()
        return ahead if loss is None else loss

    def _advance(self, p: torch.Tensor, iteration: int) -> None:
        state = self._initial_state(p)
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        state["dual"].sub_(gradient)
        if self.method == "optimistic":
            state["look_ahead"].copy_(gradient)
        # p is at X_{t+1/2} now: the running mean needs no sum that grows.
        state["average"].lerp_(p, 1.0 / iteration)
        # From X_1 by all of Y, not by a step from X_t: gamma weighs every gradient anew.
        p.copy_(state["start"] + self.gamma * state["dual"])

    def _local_difference(self) -> float:
        """||V_t - V_{t+1/2}||^2 in float64, for a process that is alone."""
        pairs = ((self.state[p]["look_ahead"], p.grad) for p in self._parameters())
        return sum(squared_norm(v if g is None else v - g) for v, g in pairs)

    def _initial_state(self, p: torch.Tensor) -> dict:
        state = self.state[p]
        if not state:
            start = p.detach().clone()
            zeros = {name: torch.zeros_like(start) for name in ("dual", "look_ahead", "average")}
            state.update(start=start, **zeros)
        return state

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"] if _takes_part(p)]


def squared_norm(vector: torch.Tensor) -> float:
    """||v||^2 in float64; of complex numbers, over real and imaginary parts."""
    real = torch.view_as_real(vector) if vector.is_complex() else vector
    return float(real.double().square().sum())


def _takes_part(p: torch.Tensor) -> bool:
    return p.requires_grad


@torch.no_grad()
def _assign(parameters: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
