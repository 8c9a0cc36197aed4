"""Algorithm 1 of Q-GenX: dual extrapolation with a step size that adapts to what was received.

    X_{t+1/2} = X_t - gamma_t V_t            Y_{t+1} = Y_t - V_{t+1/2}            X_{t+1} = X_1 + gamma_{t+1} Y_{t+1}
    gamma_t   = step_scale K (1 + sum_{i<t} sum_k ||V_k,i - V_k,i+1/2||^2)^(-1/2)

V_t is the mean over the K ranks of the decoded vectors V_k,t. Knows nothing of communication: on several ranks the
wrapper sets ``num_ranks``, averages gradients and sets ``squared_difference`` before ``step``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_qgenx.checks import check_choice, check_positive

METHODS = ("dual_averaging", "dual_extrapolation", "optimistic")


class QGenX(torch.optim.Optimizer):
    """Q-GenX's update rule; needs no Lipschitz constant, no noise level and no learning rate.

    Args:
        params: as for any torch optimizer.
        method: where V_t comes from. "dual_averaging": V_t = 0. "dual_extrapolation": a fresh gradient at X_t (the
            gradients present at ``extrapolation``). "optimistic": V_{t-1/2}, the gradient of the last ``step``.
        step_scale: multiplies gamma_t, for problems whose unit is not 1; positive.

    Source: Ramezani-Kebrya et al., Q-GenX (ICLR 2023), algorithm 1.
    """

    def __init__(self, params, method: str = "dual_extrapolation", step_scale: float = 1.0):
        check_choice("method", method, METHODS)
        super().__init__(params, {"method": method, "step_scale": check_positive("step_scale", step_scale)})
        self.num_ranks = 1
        #: sum over ranks of ||V_k,t - V_k,t+1/2||^2 for the coming step; None means this process is alone.
        self.squared_difference: float | None = None
        self.param_groups[0].setdefault("sum_of_squares", 0.0)
        self.param_groups[0].setdefault("extrapolated", False)

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
    def gamma(self) -> float:
        """The step size gamma_t."""
        first = self.param_groups[0]
        return first["step_scale"] * self.num_ranks * (1.0 + first["sum_of_squares"]) ** -0.5

    @torch.no_grad()
    def extrapolation(self) -> None:
        """Moves to X_{t+1/2}."""
        for p in self._parameters():
            state = self._initial_state(p)
            if self.extrapolation_uses_gradient:
                state["look_ahead"] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            p.sub_(state["look_ahead"], alpha=self.gamma)
        self.param_groups[0]["extrapolated"] = True

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Moves to X_{t+1}. With a closure it makes the whole iteration and returns the first loss.

        Raises:
            RuntimeError: without a closure, if there was no ``extrapolation`` since the last step.
        """
        loss = self._closure_iteration(closure) if closure is not None else None
        if not self.extrapolated:
            raise RuntimeError("step() needs an extrapolation() before it, or a closure")
        first = self.param_groups[0]
        first["sum_of_squares"] += (
            self._local_difference() if self.squared_difference is None else self.squared_difference
        )
        self.squared_difference = None
        for p in self._parameters():
            self._advance(p)
        first["extrapolated"] = False
        return loss

    def _closure_iteration(self, closure: Callable):
        if self.extrapolated:
            raise RuntimeError("step(closure) starts at X_t, but parameters are at X_{t+1/2}: call step() alone")
        with torch.enable_grad():
            loss = closure() if self.extrapolation_uses_gradient else None
        self.extrapolation()
        with torch.enable_grad():
            ahead = closure()
        return ahead if loss is None else loss

    def _advance(self, p: torch.Tensor) -> None:
        state = self.state[p]
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        state["dual"].sub_(gradient)
        if self.method == "optimistic":
            state["look_ahead"].copy_(gradient)
        p.copy_(state["start"] + self.gamma * state["dual"])

    def _local_difference(self) -> float:
        """||V_t - V_{t+1/2}||^2 in float64, for a process that is alone."""
        pairs = ((self.state[p]["look_ahead"], p.grad) for p in self._parameters())
        return sum(float((v - (0 if g is None else g)).double().square().sum()) for v, g in pairs)

    def _initial_state(self, p: torch.Tensor) -> dict:
        state = self.state[p]
        if not state:
            state.update(start=p.detach().clone(), dual=torch.zeros_like(p), look_ahead=torch.zeros_like(p))
        return state

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]
