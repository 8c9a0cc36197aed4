"""Extra-gradient on any torch optimizer: look ahead, then step from where you were.

    x_{t+1/2} = x_t + update(g(x_t))
    x_{t+1}   = x_t + update(g(x_{t+1/2}))

With ``past=True`` the first line uses g(x_{t-1/2}), the gradient of the last step, and an iteration needs one gradient
instead of two. Knows nothing of communication. The point x_t and that gradient are saved in the optimizer's own state
("anchor", "past"), so that a checkpoint between the two half-steps loses nothing. Source: Korpelevich (1976), Popov
(1980); for GANs Gidel et al. (2019), algorithms 2 and 3.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.checks import check_type


class OptimizerView(torch.optim.Optimizer):
    """An optimizer that is a view of another: it shares param_groups, state and defaults and owns nothing.

    A half-step, whichever verb makes it, calls every step hook once: this view's own around the verb, those of the
    other optimizer and torch's global ones around the other's one move, which is also what profilers show.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        check_no_stock(self)
        self.optimizer = check_type("optimizer", optimizer, torch.optim.Optimizer)
        # What Optimizer does for an unpickled one: it sets up hooks and touches neither groups nor state.
        self.__setstate__({})

    def _patch_step_function(self) -> None:
        """What torch does to every optimizer's step, and this one's does by itself: see ``_with_hooks``."""
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: as with torch's own, hooks stay behind."""
        return {"optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("optimizer", "defaults", "param_groups", "state"):
            if name in state:
                setattr(self, name, state[name])
        super().__setstate__({name: value for name, value in state.items() if not hasattr(type(self), name)})

    def _with_hooks(self, move: Callable, *arguments: Any) -> Any:
        """``move(*arguments)``, between this view's own step hooks; a pre-hook may change the arguments."""
        options: dict[str, Any] = {}
        for hook in self._optimizer_step_pre_hooks.values():
            if (changed := hook(self, (self, *arguments), options)) is not None:
                (_, *arguments), options = changed  # type: ignore[assignment]
        result = move(*arguments, **options)
        for after in self._optimizer_step_post_hooks.values():
            after(self, (self, *arguments), options)
        return result

    # What is assigned belongs to the other optimizer too: frameworks restore state that way.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict:
        """The other optimizer's state, in which this view keeps what it must remember."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._packed()
        for after in self._optimizer_state_dict_post_hooks.values():
            if (changed := after(self, state)) is not None:
                state = changed
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues exactly from a ``state_dict``."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := before(self, state_dict)) is not None:
                state_dict = changed
        self._unpack(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _packed(self) -> dict:
        return self.optimizer.state_dict()

    def _unpack(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class ExtraGradient(OptimizerView):
    """Extra-gradient whose update rule is that of ``base_optimizer``.

    The base's moments advance in both half-steps, as in Gidel et al. A closure given to ``step`` is evaluated at both
    points, or with ``past=True`` at x_{t+1/2} alone.

    Args:
        base_optimizer: any torch optimizer that makes one move a step; not LBFGS.
        past: extrapolation from the past, also called optimistic: ``extrapolation`` needs no gradient and ignores
            those present; it uses the gradient of the last ``step``, zero before the first.

    Example:
        >>> optimizer = ExtraGradient(torch.optim.RMSprop(model.parameters(), lr=1e-3))
        >>> optimizer.zero_grad(); loss().backward(); optimizer.extrapolation()
        >>> optimizer.zero_grad(); loss().backward(); optimizer.step()
    """

    def __init__(self, base_optimizer: torch.optim.Optimizer, past: bool = False):
        super().__init__(base_optimizer)
        self.past = check_type("past", past, bool)
        if hasattr(base_optimizer, "extrapolation") or isinstance(base_optimizer, torch.optim.LBFGS):
            raise ValueError(f"base_optimizer must make one move a step, {type(base_optimizer).__name__} does not")
        for group in self.param_groups:
            _prepare(group)
        self._start_state()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "past": self.past}

    def _start_state(self) -> None:
        # Where the base has made its state already, ours is there from the start too: all ranks then hold the same.
        for p, state in self.state.items():
            state["anchor"] = p.detach().clone()
            if self.past:
                state["past"] = torch.zeros_like(p)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters."""
        super().add_param_group(param_group)
        _prepare(self.param_groups[-1])

    @property
    def extrapolation_uses_gradient(self) -> bool:
        """Whether ``extrapolation`` reads gradients; a distributed wrapper asks if there is one to exchange."""
        return not self.past

    @property
    def extrapolated(self) -> bool:
        """Whether parameters are at x_{t+1/2}."""
        return any(group.get("extrapolated", False) for group in self.param_groups)

    def extrapolation(self) -> None:
        """Moves to x_{t+1/2}. A second call before ``step`` moves on from there; ``step`` still starts at x_t."""
        self._with_hooks(self._look_ahead)

    @torch.no_grad()
    def _look_ahead(self) -> None:
        with self._past_gradients() if self.past else nullcontext():
            # A second extrapolation must not take its own x_{t+1/2} for x_t.
            first = not self.extrapolated
            here = {p: p.clone() for p in self._moving()}
            self.optimizer.step()
            for p, x in here.items():
                if first or "anchor" not in self.state[p]:
                    self.state[p]["anchor"] = x
        self._set_extrapolated(True)

    @contextmanager
    def _past_gradients(self):
        """In this context gradients are those of the last step, or zero where there was no step yet."""
        present = {p: p.grad for p in self._parameters()}
        # At the first step a zero gradient, not none: moments and decay then start at once everywhere.
        begins = not any("past" in self.state.get(p, ()) for p in present)
        for p in present:
            p.grad = torch.zeros_like(p) if begins and p.requires_grad else self.state.get(p, {}).get("past")
        try:
            yield
        finally:
            for p, gradient in present.items():
                p.grad = gradient

    def step(self, closure: Callable | None = None):
        """Moves to x_{t+1}. With a closure it makes the whole iteration and returns the first loss.

        Raises:
            RuntimeError: without a closure, if there was no ``extrapolation`` since the last step; with one, if there
                was.
        """
        return self._with_hooks(self._step, closure)

    @torch.no_grad()
    def _step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            if self.extrapolated:
                raise RuntimeError("step(closure) starts at x_t, but parameters are at x_{t+1/2}: call step() alone")
            loss = self._closure_iteration(closure)
        if not self.extrapolated:
            raise RuntimeError("step() needs an extrapolation() before it, or a closure")
        # A copy: the next backward accumulates into the same memory.
        gradients = {p: None if p.grad is None else p.grad.clone() for p in self._parameters()} if self.past else {}
        self._step_from_anchor()
        # After the base's step: a base takes a state with something in it for one that it has made.
        for p, gradient in gradients.items():
            if gradient is not None:
                self.state[p]["past"] = gradient
            elif p in self.state:
                self.state[p].pop("past", None)
        return loss

    @torch.enable_grad()
    def _closure_iteration(self, closure: Callable):
        loss = closure() if self.extrapolation_uses_gradient else None
        self.extrapolation()
        ahead = closure()
        return ahead if loss is None else loss

    def _step_from_anchor(self) -> None:
        ahead = {p: p.clone() for p in self._moving()}
        self.optimizer.step()
        for p, x_half in ahead.items():
            # The base moved x_{t+1/2} by its update, weight decay included; the same move belongs to x_t.
            if "anchor" in self.state[p]:
                p.copy_(self.state[p]["anchor"] + (p - x_half))
        self._set_extrapolated(False)

    def _moving(self) -> list[torch.Tensor]:
        """Parameters that have a gradient now, or had one in an earlier half-step."""
        return [p for p in self._parameters() if p.grad is not None or "anchor" in self.state.get(p, ())]

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _set_extrapolated(self, value: bool) -> None:
        for group in self.param_groups:
            group["extrapolated"] = value


def check_no_stock(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if an optimizer is being made anew by ``horovod.torch.DistributedOptimizer``.

    That one makes a class of an optimizer's own which averages gradients before ``step`` and knows no other verb: ranks
    would extrapolate by their own gradients, and part.
    """
    kind = type(optimizer)
    if kind.__module__ == "horovod.torch.optimizer":
        raise ValueError(
            f"horovod.torch.DistributedOptimizer averages gradients in step() alone and cannot take {kind.__name__}: "
            "use hvd_qgenx.DistributedOptimizer, with the same arguments"
        )


def _prepare(group: dict) -> None:
    """Checks what torch's optimizers let through, and adds this module's memory to a group."""
    if "lr" in group and not math.isfinite(group["lr"]):
        raise ValueError(f"lr must be a finite number, got {group['lr']!r}")
    group.setdefault("extrapolated", False)


class ExtraSGD(ExtraGradient):
    """``ExtraGradient(torch.optim.SGD(params, ...), past)``; arguments as there."""

    def __init__(self, params, lr: float = 1e-3, *, past: bool = False, **options):
        check_no_stock(self)
        super().__init__(torch.optim.SGD(params, lr=lr, **options), past)


class ExtraAdam(ExtraGradient):
    """``ExtraGradient(torch.optim.Adam(params, ...), past)``; arguments as there.

    Source: Gidel et al. (2019), algorithm 4; ``past=True`` is its option 1.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), *, past: bool = False, **options
    ):
        check_no_stock(self)
        super().__init__(torch.optim.Adam(params, lr=lr, betas=betas, **options), past)
